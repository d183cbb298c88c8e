"""What benchmarks/fuzz.py tries: one small function per area.

An area is a function from an empty folder to a function that performs one try, given a random.Random. A try damages a
file below the folder and reads it as the scripts do. It may have an attribute `names`: texts of which an error message
must contain one, besides the folder's path.
"""

import contextlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

from benchmarks.fuzz_mutations import WORDS, damage, mutate_file, write_photos

Attempt = Callable[[Random], None]


def _caption_files(names):
    """Return {file name: text} of intact caption files in the common formats."""
    rows = [(name, f"a picture of {word}") for name in names for word in ("red", "blue")]
    objects = [{"image": name, "caption": caption} for name, caption in rows]
    karpathy = {"images": [{"filename": n, "split": "train", "sentences": [{"raw": c}]} for n, c in rows[::2]]}
    coco = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"image_id": number // 2, "caption": c} for number, (_, c) in enumerate(rows)],
    }
    return {
        "captions.txt": "image,caption\n" + "".join(f"{n},{c}\n" for n, c in rows),
        "captions.tsv": "image\tcaption\n" + "".join(f"{n}\t{c}\n" for n, c in rows),
        "results.csv": "image_name| comment_number| comment\n" + "".join(f"{n}| 0| {c}\n" for n, c in rows),
        "Flickr8k.token.txt": "".join(f"{n}#{k % 2}\t{c}\n" for k, (n, c) in enumerate(rows)),
        "captions.json": json.dumps(objects),
        "captions.jsonl": "".join(json.dumps(item) + "\n" for item in objects),
        "dataset_flickr8k.json": json.dumps(karpathy),
        "captions_val2017.json": json.dumps(coco),
    }


def open_photos(path: Path, cache: Path, rng: Random) -> None:
    """Open a data set as the scripts do."""
    from data.loading import open_dataset

    bad = rng.random() < 0.5
    data = open_dataset(str(path), data_dir=None, cache_dir=str(cache), split_seed=0, allow_bad_rows=bad)
    for split in ("train", "val", "test"):
        data.split(split)
    data.describe()


def captions(folder: Path) -> Attempt:
    """Caption files of all formats, in a folder with photos."""
    names = write_photos(folder / "set", 10)
    files = _caption_files(names)

    def attempt(rng):
        for path in (folder / "set").iterdir():
            if path.name not in names:
                path.unlink()
        name = rng.choice(sorted(files))
        text = files[name]
        if rng.random() < 0.4 and not name.endswith((".json", ".jsonl")):
            for _ in range(rng.randint(1, 4)):
                position = rng.randrange(len(text))
                text = text[:position] + rng.choice(WORDS) + text[position:]
        encoding = rng.choice(("utf-8",) * 4 + ("utf-16", "utf-8-sig", "latin-1"))
        path = folder / "set" / name
        mutate_file(path, text.encode(encoding, "replace"), rng)
        open_photos(rng.choice((path, path.parent)), folder / "cache", rng)

    return attempt


def images(folder: Path) -> Attempt:
    """Photos of all formats."""
    from PIL import Image, features

    from data.image_io import load_image

    photo = Image.frombytes("RGB", (24, 16), Random(1).randbytes(24 * 16 * 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    contents = {}
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else [])):
        file = io.BytesIO()
        photo.save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
        contents[kind] = file.getvalue()

    def attempt(rng):
        path = folder / "photo.img"
        path.write_bytes(damage(contents[rng.choice(sorted(contents))], rng))
        load_image(path, 16)

    return attempt


def archives(folder: Path) -> Attempt:
    """A data set or a gallery in a zip or tar archive, in shards, in a base64 table or in parquet files."""
    from data import archives, storage

    contents = _packed_sets(folder)

    def attempt(rng):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        root = folder / "in"
        chosen = rng.choice(sorted(contents))
        for name, content in contents[chosen].items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        name = rng.choice(sorted(contents[chosen]))
        mutate_file(root / name, contents[chosen][name], rng)
        try:
            if rng.random() < 0.4:
                open_photo_list(rng.choice((root, root / name)))
            else:
                open_photos(rng.choice((root, root / name)), folder / "cache", rng)
        finally:
            shutil.rmtree(root)
            for known in (archives._indexes, archives._handles, storage._printed):
                known.clear()

    return attempt


def open_photo_list(path: Path) -> None:
    """List a gallery and read each photo, as the encoder does: a photo may be unreadable, with a reason."""
    from data.image_io import load_image
    from retrieval.embedding_store import list_images

    photos = list_images(path)
    for name in photos.stamps:
        try:
            load_image(photos.root / name, 16)
        except OSError as error:
            if str(photos.root) not in str(error) or "\n" in str(error):
                raise


def _packed_sets(folder):
    """Return {kind: {file name: content}} of the same small data set in each format that packs photos."""
    import base64

    names = write_photos(folder / "set", 6)
    texts = _caption_files(names)
    (folder / "set" / "captions.txt").write_text(texts["captions.txt"])
    photos = {name: (folder / "set" / name).read_bytes() for name in names}
    sets = {
        kind: {f"photos.{suffix}": Path(shutil.make_archive(str(folder / kind), kind, folder / "set")).read_bytes()}
        for kind, suffix in (("zip", "zip"), ("tar", "tar"), ("gztar", "tar.gz"))
    }
    sets["shards"] = {f"{number:05d}.tar": _make_shard(photos, names[number::2]) for number in range(2)}
    rows = [f"{number}\t{base64.b64encode(photos[name]).decode()}\n" for number, name in enumerate(names)]
    pairs = [{"text_id": number, "text": f"a picture {number}", "image_ids": [number]} for number in range(len(names))]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs).encode()
    sets["base64"] = {
        **{f"{split}_imgs.tsv": "".join(rows).encode() for split in ("train", "valid")},
        **{f"{split}_texts.jsonl": lines for split in ("train", "valid")},
    }
    with contextlib.suppress(ImportError):
        sets["parquet"] = {"train-00000-of-00001.parquet": _make_parquet(photos)}
    return sets


def _make_shard(photos, names):
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as shard:
        for name in names:
            for suffix, content in ((".png", photos[name]), (".txt", f"a picture of {name}".encode())):
                info = tarfile.TarInfo(Path(name).stem + suffix)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    return target.getvalue()


def _make_parquet(photos):
    import pyarrow
    import pyarrow.parquet

    cells = [{"bytes": content, "path": name} for name, content in photos.items()]
    table = pyarrow.table({"image": cells, "caption": [f"a picture of {name}" for name in photos]})
    target = io.BytesIO()
    pyarrow.parquet.write_table(table, target)
    return target.getvalue()


def make_run(folder: Path) -> Path:
    """Train a run of one epoch with the smallest towers, and return its folder."""
    from config import default_config
    from data.loading import open_data
    from training.trainer import train

    names = write_photos(folder / "set", 12)
    (folder / "set" / "captions.txt").write_text(_caption_files(names)["captions.txt"])
    config = replace(
        replace(
            default_config(str(folder / "set")), pretrained=False, image_encoder="test_resnet", text_encoder="scratch"
        ),
        **{"image_size": 32, "embed_dim": 4, "batch_size": 8, "epochs": 1, "cached_views": 0, "name": "run"},
        **{"runs_dir": str(folder / "runs"), "cache_dir": str(folder / "cache"), "device": "cpu"},
        **{"precision": "float32", "num_workers": 0, "allow_unknown_words": True},
    )
    run = train(config, open_data(config), None)
    (run / "metrics.json").write_text(json.dumps({"test": {"i2t_R@1": 50.0, "rsum": 200.0}}))
    return run


def runs(folder: Path) -> Attempt:
    """A run from a stranger: any of its files, with checksums that fit or without."""
    run = make_run(folder)
    contents = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.suffix != ".png"}

    def attempt(rng):
        for path, content in contents.items():
            path.write_bytes(content)
        path = rng.choice(sorted(contents))
        if rng.random() < 0.7:
            (run / "checksums.txt").unlink()
        mutate_file(path, contents[path], rng)
        read_run(run)

    return attempt


def read_run(run: Path) -> None:
    """Read a run's folder as the scripts do: each step must succeed or raise an error, which is then raised here."""
    from models.checkpoint import load_run
    from retrieval.encoder import load_encoder
    from retrieval.model_key import weights_key
    from runtime.run_dir import newest_finished_run, read_log, read_metrics, read_shared_config
    from training.train_state import TrainState

    def search():
        weights_key(run)
        encoder, _ = load_encoder(run, device="cpu", precision="float32")
        if not encoder.encode_captions(["a picture of red"], "captions").isfinite().all():
            raise AssertionError("an embedding is not finite")

    def resume():
        loaded = load_run(run, "last.pt")
        try:
            TrainState.from_state(loaded.state, 2)
        except ValueError as error:
            raise ValueError(f"{run / 'last.pt'}: {error}") from error

    errors = []
    for step in (read_log, read_metrics, read_shared_config, lambda run: newest_finished_run(run.parent)):
        errors += _error_of(lambda step=step: step(run))
    for step in (search, resume):
        errors += _error_of(step)
    if errors:
        raise max(errors, key=lambda error: str(run.parent) not in str(error) or "\n" in str(error))


def _error_of(step):
    try:
        step()
    except (ValueError, OSError) as error:
        return [error]
    return []


def caches(folder: Path) -> Attempt:
    """The files of a cache: a gallery, token ids and the table of a data set. They are made again."""
    import numpy as np

    from data.loading import open_dataset
    from data.tokenizer import tokenize, train_tokenizer
    from retrieval.embedding_store import list_images, open_gallery

    names = write_photos(folder / "set", 8)
    (folder / "set" / "captions.txt").write_text(_caption_files(names)["captions.txt"])
    cache, texts = folder / "cache", [f"a picture of {word}" for word in ("red", "blue", "green")]
    tokenizer = train_tokenizer(texts * 5)

    def fill():
        open_dataset(str(folder / "set"), data_dir=None, cache_dir=str(cache), split_seed=0)
        tokenize(tokenizer, texts, max_tokens=8, cache_dir=cache)
        photos = list_images(folder / "set")
        rows = np.eye(8, 4, dtype=np.float32)
        gallery = open_gallery(
            cache / "galleries" / "g", photos, lambda names: [(rows[: len(names)], [None] * len(names))]
        )
        if gallery.embeddings.shape[1] != 4:  # each search checks this, and asks to delete the folder
            raise ValueError(f"{gallery.store}: rows of another model")
        if len(gallery.paths) != 8 or np.asarray(gallery.embeddings).shape != (8, 4):
            raise AssertionError("the gallery has lost photos")

    fill()
    contents = {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}

    def attempt(rng):
        shutil.rmtree(cache)
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        path = rng.choice(sorted(contents))
        mutate_file(path, contents[path], rng)
        fill()

    return attempt


def sweeps(folder: Path) -> Attempt:
    """A sweep's file of configurations, and the runs that it finds."""
    from sweep import read_sweep

    text = "# base\nbase\nalpha --alpha 0.2\nbig --batch-size 64 --epochs 3\n"

    def attempt(rng):
        path = folder / "sweep.txt"
        content = text
        for _ in range(rng.randint(0, 3)):
            position = rng.randrange(len(content))
            content = (
                content[:position] + rng.choice((*WORDS, "--seed 3", "../x", "\n", "--name x")) + content[position:]
            )
        mutate_file(path, content.encode("utf-8", "replace"), rng)
        read_sweep(path)

    return attempt


def page(folder: Path) -> Attempt:
    """What a visitor can upload to the page."""
    from webui.page import check_upload

    def attempt(rng):
        path = folder / "upload.png"
        path.write_bytes(damage(b"\x89PNG\r\n\x1a\n" + bytes(100), rng))
        check_upload(
            rng.choice((str(path), str(folder), str(path) + "\0", "", "/dev/zero", "../x", "\ud800", "x" * 5000))
        )

    attempt.names = ("photo", "upload", "image")
    return attempt


def page_requests(folder: Path) -> Attempt:
    """What a visitor can send to the page's API."""
    from benchmarks.fuzz_page import attempt_requests, page_client

    client, dependencies = page_client(folder, make_run(folder))
    return attempt_requests(client, [str(item["api_name"]) for item in dependencies if item.get("api_name")])


AREAS: dict[str, Callable[[Path], Attempt]] = {
    area.__name__: area for area in (captions, images, archives, runs, caches, sweeps, page, page_requests)
}
