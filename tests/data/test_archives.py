"""Archives are read in place, and give the same data set and batches as the folder that was packed."""

import base64
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import write_image_folder

from data import archives, storage
from data.archive_index import Index, load_index
from data.image_cache import ImageCache
from data.image_io import load_image
from data.loading import open_dataset
from data.preprocess import Preprocess
from dataset import CLIPDataset

OPTIONS = {"data_dir": None, "split_seed": 3}


@pytest.fixture(autouse=True)
def no_state():
    """Forget the indexes, handles and notes of other tests."""
    yield
    archives.set_index_folder(None)
    for kept in (archives._indexes, archives._handles, storage._printed):
        kept.clear()


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "birds", 12)


def pack_zip(source, target, prefix="", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in sorted(source.rglob("*")):
            if path.is_file():
                archive.write(path, prefix + path.relative_to(source).as_posix())
    return target


def pack_tar(source, target, names=None):
    with tarfile.open(target, "w") as archive:
        for path in sorted(source.rglob("*")):
            if path.is_file() and (names is None or path.name in names):
                archive.add(path, path.relative_to(source).as_posix())
    return target


def same_data(left, right):
    assert left.table.reset_index(drop=True).equals(right.table.reset_index(drop=True))
    for split in ("train", "val", "test"):
        ours, theirs = left.split(split), right.split(split)
        assert ours.captions == theirs.captions
        assert (ours.caption_image_ids == theirs.caption_image_ids).all()
        for path, other in zip(ours.paths, theirs.paths, strict=True):
            np.testing.assert_array_equal(load_image(path, 32), load_image(other, 32))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "birds/"])
def test_zip_of_a_folder_is_the_folder(folder, tmp_path, method, prefix):
    archive = pack_zip(folder, tmp_path / "packed.zip", prefix, method)
    expected = open_dataset(str(folder), cache_dir=str(tmp_path / "c"), **OPTIONS)
    packed = open_dataset(str(archive), cache_dir=str(tmp_path / "c"), **OPTIONS)
    same_data(packed, expected)
    assert len(pickle.dumps(packed.split("train").paths[0])) < 500


def test_tar_of_a_folder_is_the_folder(folder, tmp_path):
    archive = pack_tar(folder, tmp_path / "packed.tar")
    expected = open_dataset(str(folder), cache_dir=str(tmp_path / "c"), **OPTIONS)
    same_data(open_dataset(str(archive), cache_dir=str(tmp_path / "c"), **OPTIONS), expected)


@pytest.fixture
def shards(folder, tmp_path):
    """Three shards with photo and text by key, as img2dataset writes them."""
    target = tmp_path / "shards"
    target.mkdir()
    photos = sorted((folder / "Images").iterdir())
    for number in range(3):
        with tarfile.open(target / f"{number:05d}.tar", "w") as archive:
            for row, photo in enumerate(photos[4 * number : 4 * number + 4]):
                archive.add(photo, f"{number}{row:04d}{photo.suffix}")
                text = f"a bird number {row} of shard {number}".encode()
                info = tarfile.TarInfo(f"{number}{row:04d}.txt")
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text))
    return target


def test_shards_are_a_data_set(shards, tmp_path):
    data = open_dataset(str(shards), cache_dir=str(tmp_path / "c"), **OPTIONS)
    assert data.table.image.iloc[0] == "00000.tar/00000.png" and len(data.table) == 12
    assert set(data.table.caption) == {f"a bird number {row} of shard {n}" for row in range(4) for n in range(3)}
    for pattern, count in (("{00000..00001}.tar", 8), ("*.tar", 12), ("0000{0,2}.tar", 8)):
        part = open_dataset(str(shards / pattern), cache_dir=str(tmp_path / "c"), **OPTIONS)
        assert len(part.table) == count
        assert load_image(part.split("train").paths[0], 16).shape[2] == 3


def test_missing_shard_is_named(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"2 of 5 files do not exist: 00003\.tar is missing"):
        storage.list_files(shards / "{00000..00004}.tar")


def test_archives_beside_loose_photos_are_ignored_and_said(folder, capsys):
    pack_zip(folder, folder / "copy.zip")
    assert not any("copy.zip/" in name for name in storage.list_files(folder))
    assert "copy.zip is not read" in capsys.readouterr().err


def test_names_that_point_outside_are_skipped(tmp_path, capsys):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("../up.jpg", "/etc/abs.jpg", "ok/1.jpg", "a/../../b.jpg", ".hidden/2.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert storage.list_files(tmp_path / "x.tar") == ["ok/1.jpg"]
    assert "4 members are skipped" in capsys.readouterr().err
    assert storage.read_bytes(tmp_path / "x.tar/ok/1.jpg") == b"abc"
    assert not storage.is_file(tmp_path / "x.tar/link.jpg")


@pytest.mark.parametrize("encoding", ["gbk", "cp437", "utf-8"])
def test_names_of_old_zip_programs(tmp_path, encoding):
    name = {"gbk": "照片/小狗.jpg", "cp437": "Übung/café.jpg", "utf-8": "фото/1.jpg"}[encoding]
    raw = name.encode(encoding)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("x" * len(raw), b"pixels")
    (tmp_path / "old.zip").write_bytes(content.getvalue().replace(b"x" * len(raw), raw))
    assert storage.list_files(tmp_path / "old.zip") == [name]
    assert storage.read_bytes(tmp_path / "old.zip" / name) == b"pixels"


def test_truncated_archives_name_the_member(folder, tmp_path):
    for pack, name in ((pack_tar, "cut.tar"), (pack_zip, "cut.zip")):
        whole = pack(folder, tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"cut\.\w+ is truncated.*photo_\d\d\.png"):
            storage.list_files(tmp_path / name)


def test_encrypted_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.writestr("secret.jpg", b"abc")
    data = bytearray((tmp_path / "e.zip").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "e.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"e\.zip is encrypted \(member secret\.jpg\)"):
        storage.list_files(tmp_path / "e.zip")


def test_damaged_member_and_bomb(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.jpg", bytes(100_000))
        archive.writestr("ok.jpg", b"hello hello hello")
    path = tmp_path / "d.zip"
    assert storage.read_bytes(path / "zeros.jpg", 10) == bytes(10)
    monkeypatch.setattr(archives, "MAX_MEMBER", 50_000)
    with pytest.raises(OSError, match=r"zeros\.jpg: the member has 100,000 bytes"):
        storage.read_bytes(path / "zeros.jpg")
    data = bytearray(path.read_bytes())
    start = data.index(b"ok.jpg") + 6
    data[start + 2] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, (1, 1))
    with pytest.raises(OSError, match=r"d\.zip/ok\.jpg: (damaged|truncated)"):
        storage.read_bytes(path / "ok.jpg")


@pytest.mark.parametrize("name", ["a.tar.gz", "b.tgz", "c.tar.bz2"])
def test_compressed_tar_is_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises((ValueError, FileNotFoundError), match="compressed tar archive cannot be read in place"):
        open_dataset(str(tmp_path / name), cache_dir=str(tmp_path / "c"), **OPTIONS)
    with pytest.raises(ValueError, match="repack it without compression"):
        storage.list_files(tmp_path)


def test_base64_table(tmp_path):
    rows = {"1000002": b"first photo", "17": b"\xff\xfb\xbf second"}
    lines = [f"{key}\t{base64.urlsafe_b64encode(value).decode()}\n" for key, value in rows.items()]
    (tmp_path / "valid_imgs.tsv").write_text("".join(lines) + "no tab here\n")
    assert storage.list_files(tmp_path) == ["valid_imgs.tsv/1000002.jpg", "valid_imgs.tsv/17.jpg"]
    for key, value in rows.items():
        assert storage.read_bytes(tmp_path / f"valid_imgs.tsv/{key}.jpg") == value


def test_index_is_kept_and_checked(folder, tmp_path, monkeypatch):
    archives.set_index_folder(tmp_path / "c")
    path = pack_zip(folder, tmp_path / "k.zip")
    names = storage.list_files(path)
    [file] = (tmp_path / "c" / "archives").glob("*.npz")
    stat = path.stat()
    assert isinstance(load_index(file, (stat.st_size, stat.st_mtime_ns)), Index)
    assert load_index(file, (stat.st_size, 5)) is None
    before = storage.file_stamp(path / names[0])
    file.write_bytes(b"damaged")
    archives._indexes.clear()
    assert storage.list_files(path) == names and storage.file_stamp(path / names[0]) == before
    shutil.rmtree(folder / "Images")
    pack_zip(folder, path)  # a changed archive is indexed again
    assert storage.list_files(path) == ["captions.txt"] and storage.file_stamp(path / names[0]) is None


def test_threads_and_forks_read_the_same(folder, tmp_path):
    path = pack_tar(folder, tmp_path / "t.tar")
    names = [name for name in storage.list_files(path) if name.endswith(".png")]
    expected = [(folder / name).read_bytes() for name in names]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda name: storage.read_bytes(path / name), names * 20)) == expected * 20
    script = "import os,sys\nfrom data import storage\nroot, *names = sys.argv[1:]\n"
    script += "first = [storage.read_bytes(f'{root}/{n}') for n in names]\npids = []\n"
    script += "for _ in range(4):\n  pid = os.fork()\n  if not pid:\n"
    script += "    os._exit(first * 9 != [storage.read_bytes(f'{root}/{n}') for n in names * 9])\n  pids.append(pid)\n"
    script += "sys.exit(any(os.waitpid(pid, 0)[1] for pid in pids))\n"
    assert subprocess.run([sys.executable, "-c", script, str(path), *names], check=False).returncode == 0


def test_zip64_and_repeated_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "big.zip", "w", allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("a.jpg"), "w", force_zip64=True) as member:
            member.write(b"large")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("b.jpg", b"old")
            archive.writestr("b.jpg", b"new")
    assert storage.read_bytes(tmp_path / "big.zip/a.jpg") == b"large"
    assert storage.read_bytes(tmp_path / "big.zip/b.jpg") == b"new"


@pytest.mark.parametrize("name", ["packed.zip", "packed.tar"])
@pytest.mark.parametrize("cached", [False, True])
def test_training_items_equal_those_of_the_folder(folder, tmp_path, name, cached):
    archive = (pack_zip if name.endswith("zip") else pack_tar)(folder, tmp_path / name)
    preprocess = Preprocess(16)
    items = []
    for source in (folder, archive):
        split = open_dataset(str(source), cache_dir=str(tmp_path / "c"), **OPTIONS).split("train")
        ids = [np.frombuffer(caption.encode(), np.uint8) for caption in split.captions]
        cache = ImageCache(split.paths, preprocess, tmp_path / "c") if cached else None
        options = {"captions_per_image": 1, "augment": True, "min_crop": 0.5, "seed": 7, "image_cache": cache}
        dataset = CLIPDataset(split, ids, ids, preprocess=preprocess, **options)
        dataset = pickle.loads(pickle.dumps(dataset))
        items.append([dataset[epoch, row] for epoch in (0, 1, 0) for row in range(len(dataset))])
    for ours, theirs in zip(*items, strict=True):
        np.testing.assert_array_equal(ours["pixels"], theirs["pixels"])
        assert all((a == b).all() for a, b in zip(ours["captions"], theirs["captions"], strict=True))
