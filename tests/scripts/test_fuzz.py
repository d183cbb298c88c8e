"""Fuzz tests: a damaged file either works or raises an error with a message, never an unexpected exception.

By default, each test runs 20 examples. `FUZZ=1000 python -m pytest tests/scripts/test_fuzz.py` runs 1000. The areas of
`python -m benchmarks.fuzz`, which also watches time, memory and the disk, run here in a short form.
"""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, write_image_folder
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from benchmarks.fuzz import describe
from benchmarks.fuzz_areas import AREAS, mutate_file, read_run
from data.image_io import load_image
from data.loading import open_dataset, read_captions
from evaluate import save_metrics
from models.checkpoint import load_run, load_state, save_state
from runtime.run_dir import newest_finished_run, read_config, read_log
from training.train_state import TrainState

N_EXAMPLES = int(os.environ.get("FUZZ", 20))
FUZZ = settings(
    max_examples=N_EXAMPLES,
    deadline=60_000,  # milliseconds; a longer example counts as hanging
    derandomize=N_EXAMPLES == 20,
    database=None,
    suppress_health_check=list(HealthCheck),
)
RUN_FILES = (
    *("best.pt", "last.pt", "config.json", "log.jsonl", "checksums.txt", "towers/image.json"),
    *("towers/text/config.json", "towers/text/tokenizer.json", "towers/text/tokenizer_config.json"),
)


def succeeds_or_raises(call):
    """Run `call`. It may raise ValueError or OSError with a message of the program; cli.run prints it as one line."""
    try:
        return call()
    except (ValueError, OSError) as error:
        assert str(error).strip(), repr(error)
        assert not isinstance(error, UnicodeError | json.JSONDecodeError), repr(error)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "delete", "truncate", "insert", "duplicate"]),
        # Relative position; more often in file headers, and in archive directories at the end.
        st.floats(0, 1) | st.floats(0, 0.01) | st.floats(0.99, 1),
        st.integers(1, 200),
        st.binary(min_size=1, max_size=20),
    ),
    min_size=1,
    max_size=6,
)


def damage(content, edits):
    """Return `content` after edits that overwrite, delete, insert or duplicate bytes."""
    result = bytearray(content)
    for kind, position, length, new in edits:
        start = int(position * len(result))
        if kind == "overwrite":
            result[start : start + len(new)] = new
        elif kind == "delete":
            del result[start : start + length]
        elif kind == "truncate":
            del result[start:]
        elif kind == "insert":
            result[start:start] = new
        else:
            result[start:start] = result[start : start + length]
    return bytes(result)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def modified_json(draw, value):
    """Return JSON like `value` in which one element is replaced, deleted or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: draw(modified_json(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(modified_json(value[index])), *value[index + 1 :]]
    if isinstance(value, dict) and value and draw(st.booleans()):
        return {key: item for key, item in value.items() if key != draw(st.sampled_from(sorted(value)))}
    return draw(JSON)


# Caption files

WORDS = st.text(st.sampled_from("abc ,\"'\t;#|\\/.\n\r\0é狗🐕\ufeff\u2028"), max_size=12)
NAMES = st.sampled_from([f"photo_{k:02d}.png" for k in range(10)]) | WORDS
FORMATS = {
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


def format_rows(file_format, rows):
    """Return the text of a caption file with rows of (image, caption)."""
    if file_format == "csv":
        return "image,caption\n" + "".join(f"{image},{caption}\n" for image, caption in rows)
    if file_format == "tsv":
        return "image\tcaption\n" + "".join(f"{image}\t{caption}\n" for image, caption in rows)
    if file_format == "pipes":
        return "image_name| comment_number| comment\n" + "".join(f"{i}| {k}| {c}\n" for k, (i, c) in enumerate(rows))
    if file_format == "tokens":
        return "".join(f"{image}#{number}\t{caption}\n" for number, (image, caption) in enumerate(rows))
    if file_format == "jsonl":
        return "".join(json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in rows)
    return json.dumps(json_rows(file_format, rows))


def json_rows(file_format, rows):
    if file_format == "karpathy":
        return {"images": [{"filename": i, "split": "train", "sentences": [{"raw": c}]} for i, c in rows]}
    if file_format == "coco":
        images = [{"id": number, "file_name": image} for number, (image, _) in enumerate(rows)]
        return {"images": images, "annotations": [{"image_id": k, "caption": c} for k, (_, c) in enumerate(rows)]}
    return [{"image": image, "caption": caption} for image, caption in rows]


@st.composite
def caption_files(draw):
    """Draw the name and the bytes of a caption file, intact or damaged."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    rows = draw(st.lists(st.tuples(NAMES, WORDS), max_size=12))
    if FORMATS[name] in ("json", "karpathy", "coco") and draw(st.booleans()):
        return name, json.dumps(draw(modified_json(json_rows(FORMATS[name], rows)))).encode()
    content = format_rows(FORMATS[name], rows).encode(draw(st.sampled_from(["utf-8", "utf-16", "utf-8-sig"])))
    return name, damage(content, draw(st.just([]) | EDITS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("fuzz") / "photos", 10, size=8)


def delete_caption_files(folder):
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


@FUZZ
@given(caption_files())
def test_caption_file_is_read_or_raises(folder, file):
    delete_caption_files(folder)
    (folder / file[0]).write_bytes(file[1])
    for path in (folder, folder / file[0]):
        table = succeeds_or_raises(lambda path=path: read_captions(path))
        if table is not None:
            assert list(table.columns) == ["image", "caption"] and len(table)
            assert all(isinstance(cell, str) and cell.strip() for row in table.itertuples(index=False) for cell in row)


@FUZZ
@given(caption_files(), st.lists(st.lists(NAMES, max_size=8), min_size=3, max_size=3) | st.none())
def test_data_set_is_opened_or_raises(folder, file, split_lists):
    delete_caption_files(folder)
    (folder / file[0]).write_bytes(file[1])
    for split, names in zip(("train", "dev", "test"), split_lists or (), strict=False):
        (folder / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names), "utf-8")
    before = sorted(folder.rglob("*"))
    cache = folder.parent / "cache"
    data = succeeds_or_raises(lambda: open_dataset(str(folder), data_dir=None, cache_dir=str(cache), split_seed=0))
    if data is not None:
        images = [set(data.split(split).paths) for split in ("train", "val", "test")]
        assert all(images) and not images[0] & images[1] | images[0] & images[2] | images[1] & images[2]
        assert isinstance(data.describe(), str)
    assert sorted(folder.rglob("*")) == before


# Images


def encode_image(file_format):
    file = io.BytesIO()
    pixels = random.Random(1).randbytes(24 * 16 * 3)
    image = Image.frombytes("RGB", (24, 16), pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    image.convert("P" if file_format == "GIF" else "RGB").save(
        file, file_format, **({} if file_format in ("GIF", "BMP") else {"exif": exif})
    )
    return file.getvalue()


AVIF = ["AVIF"] if features.check("avif") else []
IMAGES = {name: encode_image(name) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *AVIF)}


@FUZZ
@given(st.sampled_from(sorted(IMAGES)), st.just([]) | EDITS)
def test_image_is_read_or_raises_oserror(tmp_path_factory, file_format, edits):
    path = tmp_path_factory.getbasetemp() / "fuzzed.img"
    path.write_bytes(damage(IMAGES[file_format], edits))
    try:
        pixels = load_image(path, 16)
    except OSError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == "uint8" and pixels.size


# Runs and checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_tower, text_tower, photos):
    """The folder of a finished run, and the contents of its files."""
    from config import default_config
    from training.trainer import train

    runs_dir = tmp_path_factory.mktemp("fuzz-run")
    config = replace(
        default_config(str(photos)),
        image_encoder=str(image_tower),
        text_encoder=str(text_tower),
        image_size=32,
        embed_dim=4,
        batch_size=11,
        epochs=1,
        runs_dir=str(runs_dir),
        cache_dir=str(runs_dir / "cache"),
        name="run",
        device="cpu",
        precision="float32",
        num_workers=0,
    )
    folder = train(config, open_dataset(str(photos), data_dir=None, cache_dir=str(runs_dir / "c"), split_seed=0), None)
    return folder, FileContents({name: (folder / name).read_bytes() for name in RUN_FILES})


class FileContents(dict):
    """The contents of a run's files, with a short repr for hypothesis's reports."""

    def __repr__(self):
        return "FileContents"


def restore(run):
    for name, content in run[1].items():
        (run[0] / name).write_bytes(content)


def load_all(folder):
    """Load a run's folder as the scripts do before they read images."""
    succeeds_or_raises(lambda: read_log(folder))
    succeeds_or_raises(lambda: newest_finished_run(folder.parent))
    succeeds_or_raises(lambda: load_run(folder))
    resumed = succeeds_or_raises(lambda: load_run(folder, "last.pt"))
    if resumed is not None:
        succeeds_or_raises(lambda: TrainState.from_state(resumed.state, 2))


@FUZZ
@given(st.data())
def test_run_with_a_damaged_file_is_loaded_or_raises(run, data):
    restore(run)
    folder, contents = run
    name = data.draw(st.sampled_from(RUN_FILES))
    if name.endswith(".json") and data.draw(st.booleans()):
        damaged = json.dumps(data.draw(modified_json(json.loads(contents[name])))).encode()
    else:
        damaged = damage(contents[name], data.draw(EDITS))
    (folder / name).write_bytes(damaged)
    load_all(folder)
    if name.endswith(".pt") and damaged != contents[name]:
        with pytest.raises(ValueError):
            load_state(folder / name)


@FUZZ
@given(st.sampled_from(["best.pt", "last.pt"]), st.none() | st.floats(0, 1), EDITS)
def test_damaged_checkpoint_without_checksum_is_loaded_or_raises(run, name, member, edits):
    restore(run)
    folder, contents = run
    (folder / "checksums.txt").unlink()
    damaged = damage(contents[name], edits) if member is None else damage_member(contents[name], member, edits)
    (folder / name).write_bytes(damaged)
    load_all(folder)


def damage_member(archive, position, edits):
    """Damage one member of a ZIP archive and keep the archive valid, so that the damage reaches the unpickler."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(target, "w") as result:
        names = sorted(source.namelist(), key=lambda name: not name.endswith("data.pkl"))
        chosen = names[int(position * position * (len(names) - 1))]  # squared, so that the pickle is chosen more often
        for name in names:
            content = source.read(name)
            result.writestr(name, damage(content, edits) if name == chosen else content)
    return target.getvalue()


LEAVES = JSON | st.sampled_from([torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.tensor(float("nan"))])


@FUZZ
@given(st.data())
def test_checkpoint_with_modified_state_is_loaded_or_raises(run, data):
    restore(run)
    folder, _ = run
    state = load_state(folder / "last.pt")
    parent = state
    while data.draw(st.booleans()):
        children = [value for value in parent.values() if isinstance(value, dict) and value]
        if not children:
            break
        parent = data.draw(st.sampled_from(children))
    key = data.draw(st.sampled_from(sorted(parent, key=str)))
    if data.draw(st.booleans()):
        parent[key] = data.draw(LEAVES)
    else:
        del parent[key]
    for name in ("best.pt", "last.pt"):
        save_state(folder / name, state)
    load_all(folder)


@FUZZ
@given(JSON)
@example({"alpha": float("nan")})
def test_config_is_read_or_raises(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(value))
    succeeds_or_raises(lambda: read_config(folder))


@FUZZ
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_damaged_metrics_file_raises_and_is_not_overwritten(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-metrics"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "metrics.json").write_bytes(content)
    metrics = {f"{direction}_R@1": 1.0 for direction in ("i2t", "t2i")}
    if succeeds_or_raises(lambda: save_metrics(folder, "val", metrics) or True):
        assert json.loads((folder / "metrics.json").read_text())["val"] == metrics
    else:
        assert (folder / "metrics.json").read_bytes() == content


# The areas of benchmarks/fuzz.py, in a short form


@pytest.mark.parametrize("name", sorted(AREAS.keys() - {"runs"}))
def test_area_of_the_benchmark_finds_nothing(tmp_path, name):
    attempt = AREAS[name](tmp_path)
    for number in range(N_EXAMPLES // 2):
        assert describe(attempt, random.Random(f"{name}-{number}"), tmp_path) is None, number


def test_run_from_a_stranger_is_read_or_raises_one_line_that_names_a_file(run):
    folder, contents = run
    for number in range(2 * N_EXAMPLES):
        rng = random.Random(f"runs-{number}")
        restore(run)
        if rng.random() < 0.7:
            (folder / "checksums.txt").unlink()
        name = rng.choice(RUN_FILES)
        mutate_file(folder / name, contents[name], rng)
        assert describe(lambda rng: read_run(folder), rng, folder.parent) is None, number
    restore(run)


BAD_AREA = """
import os, sys
from pathlib import Path
from benchmarks.fuzz import Flags, run_child

def area(folder):
    def attempt(rng):
        actions = [
            lambda: Path("{outside}").write_text("x"),
            lambda: os.rename("{outside}", folder / "moved"),
            lambda: {{}}["missing"],
            lambda: int("x"),
            lambda: (folder / "missing").read_text(),
            lambda: __import__("socket").create_connection(("127.0.0.1", 9)),
            lambda: (folder / "inside").write_text("x"),
        ]
        actions[attempt.number]()
    attempt.number = -1
    def numbered(rng):
        attempt.number += 1
        attempt(rng)
    return numbered

run_child(Flags(areas=("bad",), child=Path("{folder}"), tries=7), area)
"""


def test_the_watch_reports_writes_elsewhere_connections_tracebacks_and_errors_without_a_file(tmp_path):
    (tmp_path / "own").mkdir()
    code = BAD_AREA.format(outside=tmp_path / "elsewhere", folder=tmp_path / "own")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    problems = {number: [line["problem"] for line in lines if line.get("try") == number] for number in range(7)}
    assert "elsewhere" in problems[0][0] and "os.rename" in problems[1][0], done.stderr
    assert "KeyError" in problems[2][0] and "names no file" in problems[3][0] and problems[4] == []
    assert any("socket.connect" in problem for problem in problems[5]) and problems[6] == []
    assert lines[-1]["next"] == 7 and not Path(ROOT, "fuzz").exists()
