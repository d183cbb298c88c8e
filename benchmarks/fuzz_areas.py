"""What benchmarks/fuzz.py tries: one small function per area, and the mutations that all of them share.

An area is a function from an empty folder to a function that performs one try, given a random.Random. A try damages a
file below the folder and reads it as the scripts do. It may have an attribute `names`: texts of which an error message
must contain one, besides the folder's path.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

Attempt = Callable[[Random], None]
VALUES = (  # in place of a value in JSON
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        0.5,
        -0.0,
        1e-300,
        1e300,
        float("nan"),
        float("inf"),
        2**31,
        2**63,
        10**9,
        10**40,
    ),
    *("", "x", " ", "0", "../../x", "/etc/passwd", "/dev/zero", "https://example.org/x", "owner/name", "hf-hub:a/b"),
    *("a\nb\x1b[2J", "\0", "\ud800", "é狗🐕\u202e", "x" * 5000, "null", "kernels-community/flash-attn", "~", "auto"),
    *([], {}, [[]], [0], [1, 2, 3], ["a"], {"": 1}, {"a": {"b": []}}, [None] * 50, [[1.0] * 3] * 3),
)
WORDS = (
    "a dog",
    "red, left",
    '"quoted',
    "two\ttabs",
    "狗",
    "",
    " ",
    "a\0b",
    "x" * 300,
    "'s",
    "#0",
    "\u2028",
    "a|b",
    "{}",
)
KEYS = (
    "auto_map",
    "timm_backbone",
    "quantization_config",
    "pretrained",
    "checkpoint_path",
    "vocab_size",
    "dim",
    "name",
)


def damage(content: bytes, rng: Random) -> bytes:
    """Return `content` after one to five edits that overwrite, delete, truncate, insert or duplicate bytes."""
    result = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        # More often in headers, and in the directories of archives at the end.
        position = int(rng.choice((rng.random(), rng.random() ** 4, 1 - rng.random() ** 4)) * len(result))
        length, kind = rng.randint(1, 200), rng.randrange(6)
        if kind == 0:
            result[position : position + length] = rng.randbytes(length)
        elif kind == 1:
            del result[position : position + length]
        elif kind == 2 and rng.random() < 0.3:
            del result[position:]
        elif kind == 3:
            result[position:position] = rng.choice(
                (b"\0", b"\n", b'"', b"\xff\xfe", b"9" * 5000, b" " * 20_000, b"[" * 2000)
            )
        elif kind == 4:
            result[position:position] = result[position : position + length]
        elif result:
            result[min(position, len(result) - 1)] ^= 1 << rng.randrange(8)
    return bytes(result)


def modify(value: object, rng: Random) -> object:
    """Return a copy of a JSON value in which one element is replaced, removed, added or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.2:
            return value | {rng.choice(KEYS): rng.choice(VALUES)}
        if kind < 0.25:
            return {(str(rng.choice(VALUES)) if name == key else name): item for name, item in value.items()}
        return value | {key: modify(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], modify(value[index], rng), *value[index + 1 :]]
    if isinstance(value, int | float) and rng.random() < 0.3:
        return value * rng.choice((-1, 0, 2, 1000, 10**7))
    return rng.choice(VALUES)


def mutate_file(path: Path, content: bytes, rng: Random) -> None:
    """Write `content` with one mutation: of its values if it is JSON, of a member if it is an archive, or of bytes."""
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        path.write_bytes(_modify_json(path, content, rng))
    elif content[:2] == b"PK" and rng.random() < 0.6:
        path.write_bytes(_damage_member(content, rng))
    else:
        path.write_bytes(damage(content, rng))


def _modify_json(path, content, rng):
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    index = rng.randrange(len(lines) or 1)
    try:
        value = json.loads(lines[index])
    except (ValueError, IndexError):  # the text was damaged before
        return damage(content, rng)
    lines[index] = json.dumps(modify(value, rng)).encode()
    return b"\n".join(lines)


def _damage_member(archive, rng):
    """Damage one member, and keep the archive valid so that the damage reaches the next reader; or compress it."""
    target = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(target, "w", method) as result:
        names = source.namelist()
        chosen = rng.choice([name for name in names if name.endswith(".pkl")] * len(names) + names)
        for name in names:
            result.writestr(name, damage(source.read(name), rng) if name == chosen else source.read(name))
    return target.getvalue()


def write_photos(folder: Path, count: int) -> list[str]:
    """Write photos of one colour each, and return their names."""
    from PIL import Image

    folder.mkdir(parents=True)
    names = [f"photo_{number:02d}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.new("RGB", (24, 16), (number * 40 % 256, number * 70 % 256, number * 90 % 256)).save(folder / name)
    return names


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
    """A data set in a zip or tar archive."""
    names = write_photos(folder / "set", 6)
    (folder / "set" / "captions.txt").write_text(_caption_files(names)["captions.txt"])
    contents = {
        f"photos.{suffix}": Path(shutil.make_archive(str(folder / "made"), kind, folder / "set")).read_bytes()
        for kind, suffix in (("zip", "zip"), ("tar", "tar"), ("gztar", "tar.gz"))
    }

    def attempt(rng):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        path = folder / "in" / rng.choice(sorted(contents))
        path.parent.mkdir(exist_ok=True)
        mutate_file(path, contents[path.name], rng)
        try:
            open_photos(path, folder / "cache", rng)
        finally:
            path.unlink()

    return attempt


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


AREAS: dict[str, Callable[[Path], Attempt]] = {
    area.__name__: area for area in (captions, images, archives, runs, caches, sweeps, page)
}
