"""Several processes encode one gallery: its files equal those of one process, whoever is killed meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from helpers import ROOT

from retrieval import embedding_store, gallery_shards
from retrieval.embedding_store import ImageList, list_images, open_gallery
from retrieval.gallery_shards import has_shards, plan_shards, planning_lock

COUNT = 600  # photos: shards of 128 for two processes


def encode(names, encoded=None):
    """Encode names in batches of 64; the row depends on the name, and every 50th photo cannot be read."""
    for start in range(0, len(names), 64):
        batch = names[start : start + 64]
        reasons = ["damaged" if int(name[6:10]) % 50 == 49 else None for name in batch]
        if encoded is not None:
            encoded += batch
        yield np.array([row(name) for name, reason in zip(batch, reasons, strict=True) if not reason]), reasons


def row(name):
    return np.array([float(name[6:10]), 1, 2], np.float32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "photos"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"photo_{number:04d}.png").write_bytes(bytes(100))
    return list_images(folder)


@pytest.fixture
def expected(photos, tmp_path):
    """The files that one process writes."""
    open_gallery(tmp_path / "one", photos, encode)
    return content(tmp_path / "one")


def content(store):
    return {path.name: path.read_bytes() for path in store.iterdir() if path.suffix in (".npy", ".jsonl")}


def as_process(monkeypatch, rank, count=2):
    for name, value in (("RANK", rank), ("WORLD_SIZE", count), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", count)):
        monkeypatch.setenv(name, str(value))


def kill_after(batches):
    """Return a function that encodes so many batches and then ends as a killed process does."""
    left = iter(range(batches))

    def killed(names):
        for batch in encode(names):
            if next(left, None) is None:
                raise SystemExit
            yield batch

    return killed


SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_gallery_shards import encode
from retrieval.embedding_store import list_images, open_gallery

done = []
def slow(names):
    for batch in encode(names, done):
        time.sleep({seconds})
        yield batch

gallery = open_gallery(Path(sys.argv[1]), list_images(Path(sys.argv[2])), slow)
print(len(gallery.names), len(gallery.unreadable), len(done))
"""


def start(rank, count, store, photos, seconds=0.05):
    script = SCRIPT.format(tests=str(ROOT / "tests" / "retrieval"), seconds=seconds)
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(store), str(photos.root)],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_three_processes_share_the_photos_and_write_the_files_of_one(photos, expected, tmp_path):
    processes = [start(rank, 3, tmp_path / "store", photos) for rank in range(3)]
    results = [process.communicate(timeout=60) for process in processes]
    counts = [list(map(int, out.split())) for out, _ in results]
    assert [count[:2] for count in counts] == [[588, 12]] * 3, results
    assert sum(count[2] for count in counts) == COUNT and all(count[2] for count in counts)
    assert content(tmp_path / "store") == expected
    assert not (tmp_path / "store" / "shards").exists()


def test_a_process_finishes_the_shards_of_one_that_was_killed(photos, expected, tmp_path):
    store = tmp_path / "store"
    killed = start(1, 2, store, photos, seconds=0.2)
    while not any(path.stat().st_size for path in store.glob("shards/*/1.jsonl")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    other = start(0, 2, store, photos)
    killed.send_signal(signal.SIGKILL)
    out, err = other.communicate(timeout=60)
    killed.communicate()
    assert out.split()[:2] == ["588", "12"] and int(out.split()[2]) < COUNT, err
    assert content(store) == expected


@pytest.mark.parametrize("later", ["one process", "three processes"])
def test_interrupted_shards_are_continued_with_any_number_of_processes(later, photos, expected, tmp_path, monkeypatch):
    as_process(monkeypatch, 1)
    with pytest.raises(SystemExit):
        open_gallery(tmp_path / "store", photos, kill_after(3))
    if later == "one process":
        monkeypatch.delenv("RANK")
    else:
        as_process(monkeypatch, 2, 3)
    encoded, announced = [], []
    gallery = open_gallery(tmp_path / "store", photos, lambda names: encode(names, encoded), announce=announced.append)
    assert len(gallery.names) == 588 and len(encoded) == COUNT - 3 * 64
    assert content(tmp_path / "store") == expected
    assert [len(names) for names in announced] == [COUNT - 3 * 64]


def test_interrupted_merge_is_continued_and_encodes_nothing_again(photos, expected, tmp_path, monkeypatch):
    as_process(monkeypatch, 0)
    appended, append = [], embedding_store._append

    def interrupted(base, *arguments):
        if base.parent == tmp_path / "store":
            appended.append(base)
            if len(appended) == 3:
                raise SystemExit
        return append(base, *arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(embedding_store, "_append", interrupted)
        open_gallery(tmp_path / "store", photos, encode)
    encoded = []
    open_gallery(tmp_path / "store", photos, lambda names: encode(names, encoded))
    assert not encoded and content(tmp_path / "store") == expected


def test_photos_that_change_between_shards_and_merge_are_encoded_again(photos, tmp_path, monkeypatch):
    as_process(monkeypatch, 0)
    with pytest.raises(SystemExit):
        open_gallery(tmp_path / "store", photos, kill_after(8))
    names = list(photos.stamps)
    stamps = {name: photos.stamps[name] for name in names[1:]} | {"photo_0601.png": (5, 5)}  # deleted, and added
    stamps[names[70]] = (6, 6)  # changed
    encoded = []
    changed = ImageList("changed", photos.root, stamps)
    gallery = open_gallery(tmp_path / "store", changed, lambda names: encode(names, encoded))
    assert {names[70], "photo_0601.png"} <= set(encoded) and names[0] not in gallery.names
    assert sorted([*gallery.names, *gallery.unreadable]) == sorted(stamps)
    np.testing.assert_array_equal(gallery.embeddings, np.array([row(name) for name in gallery.names], np.float16))


def test_order_of_a_split_is_kept(photos, tmp_path, monkeypatch):
    names = sorted(photos.stamps, key=lambda name: zlib.crc32(name.encode()))
    split = ImageList("split", photos.root, {name: photos.stamps[name] for name in names})
    open_gallery(tmp_path / "one", split, encode)
    as_process(monkeypatch, 1)
    open_gallery(tmp_path / "two", split, encode)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_a_process_that_is_late_finds_the_gallery_complete(photos, expected, tmp_path, monkeypatch):
    as_process(monkeypatch, 1)
    open_gallery(tmp_path / "store", photos, encode)
    as_process(monkeypatch, 0)
    gallery = open_gallery(tmp_path / "store", photos, lambda names: pytest.fail("encoded again"))
    assert len(gallery.names) == 588 and content(tmp_path / "store") == expected
    assert not has_shards(tmp_path / "store")


@pytest.mark.parametrize("plan", ["{}", "[1]", "half a pl"])
def test_damaged_plan_is_reported_and_made_again(plan, photos, expected, tmp_path, monkeypatch, capsys):
    as_process(monkeypatch, 0)
    with pytest.raises(SystemExit):
        open_gallery(tmp_path / "store", photos, kill_after(3))
    (tmp_path / "store" / "shards" / "plan.json").write_text(plan)
    open_gallery(tmp_path / "store", photos, encode)
    assert content(tmp_path / "store") == expected and "plan.json is damaged" in capsys.readouterr().err


def test_full_disk_in_a_shard_is_one_error_and_keeps_the_rest(photos, expected, tmp_path, monkeypatch):
    as_process(monkeypatch, 0)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(embedding_store, "append_embeddings", full)
        open_gallery(tmp_path / "store", photos, encode)
    open_gallery(tmp_path / "store", photos, encode)
    assert content(tmp_path / "store") == expected


def test_shards_are_whole_batches_and_every_process_has_several(tmp_path, monkeypatch):
    as_process(monkeypatch, 0, 4)
    names = [f"{number}.png" for number in range(5000)]
    with planning_lock(tmp_path):
        plan_shards(tmp_path, names)
    starts = json.loads((tmp_path / "shards" / "plan.json").read_text())
    assert starts == names[320::320] and 320 % gallery_shards.BATCH == 0 and len(starts) + 1 == 16
