"""The journal of a gallery: damage never gives a photo another photo's row, and bad days cost only time."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import write_image_folder

from retrieval import embedding_store
from retrieval.embedding_store import list_images, open_gallery
from retrieval.gallery_journal import read_journal, to_lines
from runtime.mmap_store import append_embeddings, create_embeddings, open_embeddings

ROOT = Path(__file__).parents[2]


def encode(names):
    for start in range(0, len(names), 3):
        batch = names[start : start + 3]
        yield np.array([[float(name[6:8]), 1, 2, 3] for name in batch], np.float32), [None] * len(batch)


@pytest.fixture
def photos(tmp_path):
    return list_images(write_image_folder(tmp_path / "photos", 10) / "Images")


def rows_of(photos, store):
    gallery = open_gallery(store, photos, encode)
    assert len(gallery.names) == len(photos.stamps)
    return {name: row[0] for name, row in zip(gallery.names, gallery.embeddings.tolist(), strict=True)}


def edits():
    rng = random.Random(3)
    return {
        "deleted": lambda lines: [*lines[:3], *lines[4:]],
        "repeated": lambda lines: [*lines[:3], lines[2], *lines[3:]],
        "swapped": lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
        "a reason": lambda lines: [*lines[:3], lines[3].replace(b"null", b'"damaged"'), *lines[4:]],
        "another time": lambda lines: [*lines[:3], json.dumps([*json.loads(lines[3])[:2], 7, None, 5]).encode()],
        "without checksum": lambda lines: [*lines[:3], json.dumps(json.loads(lines[4])[:3]).encode(), *lines[4:]],
        "a bit": lambda lines: [
            *lines[:3],
            bytes([lines[3][0], lines[3][1], lines[3][2] ^ 1, *lines[3][3:]]),
            *lines[4:],
        ],
        "bytes": lambda lines: [*lines[:3], rng.randbytes(40).replace(b"\n", b""), *lines[4:]],
        "a carriage return": lambda lines: [*lines[:3], lines[3] + b"\rx", *lines[4:]],
    }


@pytest.mark.parametrize("kind", sorted(edits()))
def test_changed_line_is_found_and_the_photos_from_there_are_encoded_again(kind, photos, tmp_path, capsys):
    expected, journal = rows_of(photos, tmp_path / "store"), tmp_path / "store" / "1.jsonl"
    lines = edits()[kind](journal.read_bytes().splitlines())
    journal.write_bytes(b"".join(line + b"\n" for line in lines))
    mapped = open_embeddings(tmp_path / "store" / "1.npy")
    before = mapped.tolist()
    capsys.readouterr()
    assert rows_of(photos, tmp_path / "store") == expected
    assert capsys.readouterr().err.count("is made again") == 1
    assert mapped.tolist() == before  # of a process that has opened the gallery
    assert rows_of(photos, tmp_path / "store") == expected and not capsys.readouterr().err


def old_lines(records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_journal_of_an_older_version_is_read_and_gets_checksums(photos, tmp_path):
    expected, journal = rows_of(photos, tmp_path / "store"), tmp_path / "store" / "1.jsonl"
    records = [json.loads(line)[:3] for line in journal.read_bytes().splitlines()]
    journal.write_bytes(old_lines(records))

    def refuse(names):
        raise AssertionError("nothing needs encoding")

    assert len(open_gallery(tmp_path / "store", photos, refuse).names) == 10
    assert all(len(json.loads(line)) == 5 for line in journal.read_bytes().splitlines())
    assert rows_of(photos, tmp_path / "store") == expected


def test_lines_of_an_older_version_count_only_if_the_checksums_after_them_fit(tmp_path):
    path, records = tmp_path / "1.jsonl", [["a.jpg", 3, 4], ["b.jpg", 5, -6, "damaged"], ["c.jpg", 7, 2**62]]
    new = to_lines(records)[0].splitlines(keepends=True)
    path.write_bytes(old_lines(records[:2]) + new[2])
    assert read_journal(path, 9).records == records
    path.write_bytes(old_lines([["a.jpg", 3, 5], records[1]]) + new[2])
    journal = read_journal(path, 9)
    assert journal.records == [] and journal.size == 0 and "checksum" in journal.damage
    path.write_bytes(b"".join(new)[:-9])  # an interrupted write is not damage
    assert read_journal(path, 9).records == records[:2] and not read_journal(path, 9).damage
    path.write_bytes(b"".join(new))
    assert read_journal(path, 1).records == records[:2]  # the third has no row


@pytest.mark.parametrize("seconds", [0, -10_000, 2_000_000_000, 4_000_000_000])  # 1970, before, 2033, 2096
def test_clock_that_jumps_changes_no_row_and_encodes_only_what_it_touched(seconds, photos, tmp_path):
    expected = rows_of(photos, tmp_path / "store")
    name = next(iter(photos.stamps))
    os.utime(photos.root / name, (seconds, seconds))
    for path in (tmp_path / "store").iterdir():
        os.utime(path, (seconds, seconds))
    moved, encoded = list_images(photos.root), []
    gallery = open_gallery(tmp_path / "store", moved, lambda names: encoded.append(names) or encode(names))
    assert encoded == [[name]] and sorted(gallery.names) == sorted(expected)
    assert rows_of(moved, tmp_path / "store") == expected


def test_complete_gallery_is_opened_where_every_write_is_refused(photos, tmp_path, monkeypatch):
    expected = rows_of(photos, tmp_path / "store")
    with (tmp_path / "store" / "1.jsonl").open("ab") as file:
        file.write(b'["half a li')  # interrupted: the gallery is complete without it

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    for name in ("truncate", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    assert rows_of(photos, tmp_path / "store") == expected


def test_interrupted_start_leaves_a_gallery_that_can_be_continued(photos, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "1.npy").write_bytes(b"\x93NU")  # created, and killed before the header was written
    assert len(rows_of(photos, tmp_path / "store")) == 10


def test_interrupted_append_leaves_the_rows_before_it(tmp_path, monkeypatch):
    path, rows = tmp_path / "rows.npy", np.arange(40, dtype=np.float32).reshape(10, 4)
    create_embeddings(path, 4)
    append_embeddings(path, 0, rows)

    class Killed(BaseException):
        pass

    class Rows(np.ndarray):
        def astype(self, dtype):
            raise Killed

    with pytest.raises(Killed):
        append_embeddings(path, 6, rows[:2].view(Rows))
    os.truncate(path, os.path.getsize(path) - 4 * 4 * 2)  # the file was shortened already
    assert open_embeddings(path).tolist() == rows[:6].tolist()


SCRIPT = """
import sys, time
import numpy as np
from pathlib import Path
from retrieval.embedding_store import list_images, open_gallery

def encode(names):
    for name in names:
        time.sleep(0.02)
        yield np.array([[float(name[6:8]), 1, 2, 3]], np.float32), [None]

gallery = open_gallery(Path(sys.argv[1]), list_images(Path(sys.argv[2])), encode)
assert [row[0] for row in gallery.embeddings] == [float(name[6:8]) for name in gallery.names]
print(len(gallery.names))
"""


def test_two_processes_that_encode_one_gallery_take_turns(photos, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store"), str(photos.root)]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    results = [process.communicate(timeout=60) for process in [subprocess.Popen(command, **options) for _ in range(3)]]
    assert [out for out, _ in results] == ["10\n"] * 3, results
    assert len((tmp_path / "store" / "1.jsonl").read_bytes().splitlines()) == 10
    assert embedding_store.open_embeddings(tmp_path / "store" / "1.npy").shape == (10, 4)
