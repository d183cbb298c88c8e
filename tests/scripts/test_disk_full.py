"""Full and read-only disks, with real mounts: the previous checkpoint is unchanged, and the error is one line."""

import contextlib
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import one_line_error, open_data_of, run_in_process, write_image_folder

from models.checkpoint import load_state, save_state
from retrieval.embedding_store import list_images, open_gallery
from runtime import cli
from runtime.run_dir import read_log
from training import trainer
from training.trainer import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")


def mount(*arguments):
    try:
        subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("mounting is not permitted here")


@pytest.fixture
def disk(tmp_path):
    """A mounted disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder):
    mount("-o", "remount,ro", folder)
    try:
        yield
    finally:
        mount("-o", "remount,rw", folder)


def read_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(disk, free_bytes):
    """Fill the disk so that this many bytes are free."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(max(0, free - free_bytes)))


@pytest.mark.parametrize("free_bytes", [0, 4096, 100_000])
def test_full_disk_leaves_the_previous_checkpoint_and_no_partial_file(disk, free_bytes):
    save_state(disk / "last.pt", {"w": torch.ones(100_000)})
    fill(disk, free_bytes)
    before = read_files(disk)
    with pytest.raises(
        OSError, match=r"cannot write .*last\.pt: No space left on device; the previous file is unchanged"
    ):
        save_state(disk / "last.pt", {"w": torch.zeros(200_000)})
    after = read_files(disk)
    assert after.pop(Path("checksums.txt")).startswith(before.pop(Path("checksums.txt"))[:64]) and after == before
    assert load_state(disk / "last.pt")["w"].sum() == 100_000
    (disk / "filler").unlink()
    save_state(disk / "last.pt", {"w": torch.zeros(200_000)})
    assert load_state(disk / "last.pt")["w"].sum() == 0


def test_read_only_disk_leaves_every_file_unchanged(disk):
    save_state(disk / "last.pt", {"w": torch.ones(10)})
    before = read_files(disk)
    with read_only(disk), pytest.raises(OSError, match=r"cannot write .*last\.pt: Read-only file system"):
        save_state(disk / "last.pt", {"w": torch.zeros(10)})
    assert read_files(disk) == before


def test_training_on_a_full_disk_reports_the_saved_epoch_and_resumes_from_it(tiny_config, disk, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)
    uninterrupted = tiny_config(epochs=3, name="uninterrupted", embed_dim=8, freeze_image=True)
    expected = load_state(train(uninterrupted, open_data_of(uninterrupted), None) / "last.pt")["model"]
    config = dataclasses.replace(uninterrupted, runs_dir=str(disk / "runs"), name="interrupted")
    original = trainer.Trainer._save_epoch

    def save(self, record):
        if self.state.epoch == 2:
            self.writer.wait()  # for the first epoch's files
            fill(disk, 10_000)
        original(self, record)

    with monkeypatch.context() as full_disk, pytest.raises(OSError) as error:
        full_disk.setattr(trainer.Trainer, "_save_epoch", save)
        train(config, open_data_of(config), None)
    folder = disk / "runs" / "interrupted"
    line = str(error.value)
    assert "No space left" in line and "epoch 1 is saved" in line and f"--resume {folder}" in line and "\n" not in line
    assert len(read_log(folder)) == 1 and not list(folder.glob(".*"))
    (disk / "filler").unlink()
    train(config, open_data_of(config), folder)
    resumed = load_state(folder / "last.pt")["model"]
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in expected.items())


def test_disk_that_fills_up_while_photos_are_encoded_keeps_what_was_encoded(disk, tmp_path, capsys):
    photos = write_image_folder(tmp_path / "gallery", 24) / "Images"
    names, dim, encoded = list(list_images(photos).stamps), 20_000, []

    def encode(new):  # four photos in a batch, with 160 kB of rows
        for start in range(0, len(new), 4):
            encoded.append(new[start : start + 4])
            rows = [np.full(dim, names.index(name), np.float32) for name in encoded[-1]]
            yield np.stack(rows), [None] * len(rows)

    for free_bytes, saved in ((0, 0), (200_000, 4), (350_000, 8), (500_000, 12), (550_000, 12)):
        shutil.rmtree(disk / "store", ignore_errors=True)
        (disk / "filler").unlink(missing_ok=True)
        fill(disk, free_bytes)
        with pytest.raises(SystemExit) as exit_info:
            cli.run(lambda: open_gallery(disk / "store", list_images(photos), encode))
        (line,) = capsys.readouterr().err.splitlines()
        assert exit_info.value.code == 2 and "No space left on device" in line and "--cache-dir" in line, line
        assert not saved or f"{saved} of 24 photos are encoded and saved; make space" in line, (free_bytes, line)
        (disk / "filler").unlink()
        encoded.clear()
        gallery = open_gallery(disk / "store", list_images(photos), encode)
        assert list(itertools.chain(*encoded)) == names[saved:]
        assert gallery.names == names and gallery.embeddings[:, -1].tolist() == list(range(24))
        del gallery  # it has mapped the file, and the disk could not be unmounted


@pytest.fixture
def flags(tiny_config, photos, tmp_path, monkeypatch):
    """Flags for a training of one second; the working folder is the one that contains the disk."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    flags = ["--dataset", photos, "--image-encoder", config.image_encoder, "--text-encoder", config.text_encoder]
    flags += ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--epochs", 1, "--precision", "float32"]
    return [*flags, "--num-workers", 0, "--device", "cpu", "--name", "x"]


@pytest.mark.parametrize("flag", ["--runs-dir", "--cache-dir"])
def test_read_only_folder_is_a_one_line_error(disk, flags, flag):
    with read_only(disk):
        line = one_line_error(run_in_process("train.py", *flags, "--freeze-image", "--freeze-text", flag, "disk/new"))
    assert "disk/new" in line and "Read-only" in line


def test_disk_that_fills_up_during_training_is_a_one_line_error_at_any_size(disk, flags):
    for free_bytes in (0, 4096, 8192, 16384, 65536, 500_000, 2_000_000):
        shutil.rmtree(disk / "runs", ignore_errors=True)
        (disk / "filler").unlink(missing_ok=True)
        fill(disk, free_bytes)
        line = one_line_error(run_in_process("train.py", *flags, "--runs-dir", "disk/runs"))
        assert "space" in line, (free_bytes, line)
        assert not list(disk.rglob(".*"))


def test_disk_that_is_too_small_for_cached_features_is_a_one_line_error_and_leaves_no_files(disk, flags):
    for free_bytes in (0, 4096, 16384):
        shutil.rmtree(disk / "cache", ignore_errors=True)
        (disk / "filler").unlink(missing_ok=True)
        fill(disk, free_bytes)
        caching = ["--unfreeze-image-stages", 1, "--cached-views", 4]
        line = one_line_error(run_in_process("train.py", *flags, *caching, "--cache-dir", "disk/cache"))
        assert "space" in line or "but only 0.0 GB are free" in line, (free_bytes, line)
        assert not list(disk.rglob("*.images"))
