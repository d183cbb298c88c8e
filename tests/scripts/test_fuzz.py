"""Files that are broken in any way: each either works or ends with one line, never with another error.

A short search by default; `FUZZ=1000 pytest tests/test_fuzz.py` tries that many cases for each test.
"""

import io
import json
import os
import random
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from helpers import write_image_folder
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from data.image_io import load_image
from data.loading import open_dataset, read_captions
from evaluate import save as save_metrics
from models.checkpoint import load_run, load_state, save_state
from runtime.run_dir import newest_finished_run, read_config, read_log
from training.train_state import TrainState

CASES = int(os.environ.get("FUZZ", 20))
FUZZ = settings(
    max_examples=CASES,
    deadline=60_000,  # milliseconds: nothing hangs
    derandomize=CASES == 20,
    database=None,
    suppress_health_check=list(HealthCheck),
)
RUN_FILES = (
    *("best.pt", "last.pt", "config.json", "log.jsonl", "checksums.txt", "towers/image.json"),
    *("towers/text/config.json", "towers/text/tokenizer.json", "towers/text/tokenizer_config.json"),
)


def works_or_is_refused(call):
    """Run `call`; a refusal is a ValueError or OSError that says more than a decoder; cli.run makes it one line."""
    try:
        return call()
    except (ValueError, OSError) as error:
        assert str(error).strip(), repr(error)
        assert not isinstance(error, UnicodeError | json.JSONDecodeError), repr(error)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "end", "insert", "double"]),
        st.floats(0, 1) | st.floats(0, 0.01) | st.floats(0.99, 1),  # where; headers and directories more often
        st.integers(1, 200),
        st.binary(min_size=1, max_size=20),
    ),
    min_size=1,
    max_size=6,
)


def damaged(whole, edits):
    """Bytes like `whole`, with some of them changed, cut out, doubled or put in."""
    found = bytearray(whole)
    for kind, share, length, new in edits:
        at = int(share * len(found))
        if kind == "flip":
            found[at : at + len(new)] = new
        elif kind == "cut":
            del found[at : at + length]
        elif kind == "end":
            del found[at:]
        elif kind == "insert":
            found[at:at] = new
        else:
            found[at:at] = found[at : at + length]
    return bytes(found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def other_values(draw, value):
    """JSON like `value`, of which one part is something else, gone or new."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: draw(other_values(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(other_values(value[at])), *value[at + 1 :]]
    if isinstance(value, dict) and value and draw(st.booleans()):
        return {key: part for key, part in value.items() if key != draw(st.sampled_from(sorted(value)))}
    return draw(JSON)


# Caption files

WORDS = st.text(st.sampled_from("abc ,\"'\t;#|\\/.\n\r\0é狗🐕\ufeff\u2028"), max_size=12)
NAMES = st.sampled_from([f"photo_{k:02d}.png" for k in range(10)]) | WORDS
KINDS = {
    "captions.txt": "csv",
    "captions.csv": "csv",
    "captions.tsv": "tsv",
    "results.csv": "pipes",
    "Flickr8k.token.txt": "tokens",
    "captions.json": "json",
    "captions.jsonl": "jsonl",
    "dataset_flickr8k.json": "karpathy",
    "captions_val2017.json": "coco",
}


def written(kind, rows):
    """Rows of (image, caption) as a file of that kind holds them."""
    if kind == "csv":
        return "image,caption\n" + "".join(f"{image},{caption}\n" for image, caption in rows)
    if kind == "tsv":
        return "image\tcaption\n" + "".join(f"{image}\t{caption}\n" for image, caption in rows)
    if kind == "pipes":
        return "image_name| comment_number| comment\n" + "".join(f"{i}| {k}| {c}\n" for k, (i, c) in enumerate(rows))
    if kind == "tokens":
        return "".join(f"{image}#{number}\t{caption}\n" for number, (image, caption) in enumerate(rows))
    if kind == "jsonl":
        return "".join(json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in rows)
    return json.dumps(as_json(kind, rows))


def as_json(kind, rows):
    if kind == "karpathy":
        return {"images": [{"filename": i, "split": "train", "sentences": [{"raw": c}]} for i, c in rows]}
    if kind == "coco":
        images = [{"id": number, "file_name": image} for number, (image, _) in enumerate(rows)]
        return {"images": images, "annotations": [{"image_id": k, "caption": c} for k, (_, c) in enumerate(rows)]}
    return [{"image": image, "caption": caption} for image, caption in rows]


@st.composite
def caption_files(draw):
    """A name and the bytes of a caption file, sound or broken."""
    name = draw(st.sampled_from(sorted(KINDS)))
    rows = draw(st.lists(st.tuples(NAMES, WORDS), max_size=12))
    if KINDS[name] in ("json", "karpathy", "coco") and draw(st.booleans()):
        return name, json.dumps(draw(other_values(as_json(KINDS[name], rows)))).encode()
    whole = written(KINDS[name], rows).encode(draw(st.sampled_from(["utf-8", "utf-16", "utf-8-sig"])))
    return name, damaged(whole, draw(st.just([]) | EDITS))


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("fuzz") / "album", 10, size=8)


def without_captions(album):
    for path in album.iterdir():
        if path.is_file():
            path.unlink()


@FUZZ
@given(caption_files())
def test_a_caption_file_is_read_or_refused_in_one_line(album, file):
    without_captions(album)
    (album / file[0]).write_bytes(file[1])
    for path in (album, album / file[0]):
        table = works_or_is_refused(lambda path=path: read_captions(path))
        if table is not None:
            assert list(table.columns) == ["image", "caption"] and len(table)
            assert all(isinstance(cell, str) and cell.strip() for row in table.itertuples(index=False) for cell in row)


@FUZZ
@given(caption_files(), st.lists(st.lists(NAMES, max_size=8), min_size=3, max_size=3) | st.none())
def test_a_folder_is_opened_or_refused_in_one_line(album, file, lists):
    without_captions(album)
    (album / file[0]).write_bytes(file[1])
    for split, names in zip(("train", "dev", "test"), lists or (), strict=False):
        (album / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names), "utf-8")
    before = sorted(album.rglob("*"))
    cache = album.parent / "cache"
    data = works_or_is_refused(lambda: open_dataset(str(album), data_dir=None, cache_dir=str(cache), split_seed=0))
    if data is not None:
        images = [set(data.split(split).paths) for split in ("train", "val", "test")]
        assert all(images) and not images[0] & images[1] | images[0] & images[2] | images[1] & images[2]
        assert isinstance(data.describe(), str)
    assert sorted(album.rglob("*")) == before


# Photos


def encoded_image(kind):
    file = io.BytesIO()
    pixels = random.Random(1).randbytes(24 * 16 * 3)
    image = Image.frombytes("RGB", (24, 16), pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.convert("P" if kind == "GIF" else "RGB").save(
        file, kind, **({} if kind in ("GIF", "BMP") else {"exif": exif})
    )
    return file.getvalue()


AVIF = ["AVIF"] if features.check("avif") else []
IMAGES = {kind: encoded_image(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *AVIF)}


@FUZZ
@given(st.sampled_from(sorted(IMAGES)), st.just([]) | EDITS)
def test_a_photo_is_read_or_refused_in_one_line(tmp_path_factory, kind, edits):
    path = tmp_path_factory.getbasetemp() / "fuzzed.img"
    path.write_bytes(damaged(IMAGES[kind], edits))
    try:
        pixels = load_image(path, 16)
    except OSError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == "uint8" and pixels.size


# Runs and checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_tower, text_tower, photos):
    """The folder of a finished run, and the bytes of its files."""
    from config import default_config
    from training.trainer import train

    place = tmp_path_factory.mktemp("fuzz-run")
    config = replace(
        default_config(str(photos)),
        image_encoder=str(image_tower),
        text_encoder=str(text_tower),
        image_size=32,
        embed_dim=4,
        batch_size=11,
        epochs=1,
        runs_dir=str(place),
        cache_dir=str(place / "cache"),
        name="run",
        device="cpu",
        precision="float32",
        num_workers=0,
    )
    folder = train(config, open_dataset(str(photos), data_dir=None, cache_dir=str(place / "c"), split_seed=0), None)
    return folder, Whole({name: (folder / name).read_bytes() for name in RUN_FILES})


class Whole(dict):
    """The bytes of a run's files; megabytes of them are not for a report."""

    def __repr__(self):
        return "Whole"


def restore(run):
    for name, content in run[1].items():
        (run[0] / name).write_bytes(content)


def use(folder):
    """What the programs do with a run's folder before they turn to photos."""
    works_or_is_refused(lambda: read_log(folder))
    works_or_is_refused(lambda: newest_finished_run(folder.parent))
    works_or_is_refused(lambda: load_run(folder))
    resumed = works_or_is_refused(lambda: load_run(folder, "last.pt"))
    if resumed is not None:
        works_or_is_refused(lambda: TrainState.from_state(resumed.state, 2))


@FUZZ
@given(st.data())
def test_a_run_with_a_damaged_file_is_used_or_refused_in_one_line(run, data):
    restore(run)
    folder, whole = run
    name = data.draw(st.sampled_from(RUN_FILES))
    if name.endswith(".json") and data.draw(st.booleans()):
        changed = json.dumps(data.draw(other_values(json.loads(whole[name])))).encode()
    else:
        changed = damaged(whole[name], data.draw(EDITS))
    (folder / name).write_bytes(changed)
    use(folder)
    if name.endswith(".pt") and changed != whole[name]:
        with pytest.raises(ValueError):
            load_state(folder / name)


@FUZZ
@given(st.sampled_from(["best.pt", "last.pt"]), st.none() | st.floats(0, 1), EDITS)
def test_a_checkpoint_without_checksum_is_used_or_refused_in_one_line(run, name, member, edits):
    restore(run)
    folder, whole = run
    (folder / "checksums.txt").unlink()
    changed = damaged(whole[name], edits) if member is None else repacked(whole[name], member, edits)
    (folder / name).write_bytes(changed)
    use(folder)


def repacked(whole, member, edits):
    """A sound archive like `whole`, of which one member is damaged, so that the damage reaches the unpickler."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(target, "w") as packed:
        names = sorted(source.namelist(), key=lambda name: not name.endswith("data.pkl"))
        chosen = names[int(member * member * (len(names) - 1))]  # the pickle more often than a tensor
        for name in names:
            content = source.read(name)
            packed.writestr(name, damaged(content, edits) if name == chosen else content)
    return target.getvalue()


LEAVES = JSON | st.sampled_from([torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.tensor(float("nan"))])


@FUZZ
@given(st.data())
def test_a_checkpoint_with_another_content_is_used_or_refused_in_one_line(run, data):
    restore(run)
    folder, _ = run
    state = load_state(folder / "last.pt")
    place = state
    while data.draw(st.booleans()):
        inner = [part for part in place.values() if isinstance(part, dict) and part]
        if not inner:
            break
        place = data.draw(st.sampled_from(inner))
    key = data.draw(st.sampled_from(sorted(place, key=str)))
    if data.draw(st.booleans()):
        place[key] = data.draw(LEAVES)
    else:
        del place[key]
    for name in ("best.pt", "last.pt"):
        save_state(folder / name, state)
    use(folder)


@FUZZ
@given(JSON)
@example({"alpha": float("nan")})
def test_any_settings_are_taken_or_refused_in_one_line(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(value))
    works_or_is_refused(lambda: read_config(folder))


@FUZZ
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_broken_metrics_are_told_in_one_line_and_not_overwritten(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-metrics"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "metrics.json").write_bytes(content)
    metrics = {f"{way}_R@1": 1.0 for way in ("i2t", "t2i")}
    if works_or_is_refused(lambda: save_metrics(folder, "val", metrics) or True):
        assert json.loads((folder / "metrics.json").read_text())["val"] == metrics
    else:
        assert (folder / "metrics.json").read_bytes() == content
