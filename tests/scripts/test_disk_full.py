"""Disks that are full or cannot be written, for real: the checkpoint from before stands, and one line says so."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import one_line_error, open_data_of, run_in_process

from models.checkpoint import load_state, save_state
from runtime.run_dir import read_log
from training import trainer
from training.trainer import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")


def mount(*words):
    try:
        subprocess.run(["mount", *map(str, words)], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("mounting is not permitted here")


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB."""
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


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(disk, left):
    """Leave this many bytes free."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(max(0, free - left)))


@pytest.mark.parametrize("left", [0, 4096, 100_000])
def test_a_full_disk_leaves_the_checkpoint_from_before_and_nothing_half_written(disk, left):
    save_state(disk / "last.pt", {"w": torch.ones(100_000)})
    fill(disk, left)
    before = files(disk)
    with pytest.raises(OSError, match=r"cannot write .*last\.pt: No space left on device; the one from before is kept"):
        save_state(disk / "last.pt", {"w": torch.zeros(200_000)})
    after = files(disk)
    assert after.pop(Path("checksums.txt")).startswith(before.pop(Path("checksums.txt"))[:64]) and after == before
    assert load_state(disk / "last.pt")["w"].sum() == 100_000
    (disk / "filler").unlink()
    save_state(disk / "last.pt", {"w": torch.zeros(200_000)})
    assert load_state(disk / "last.pt")["w"].sum() == 0


def test_a_disk_that_cannot_be_written_leaves_every_file_as_it_was(disk):
    save_state(disk / "last.pt", {"w": torch.ones(10)})
    before = files(disk)
    with read_only(disk), pytest.raises(OSError, match=r"cannot write .*last\.pt: Read-only file system"):
        save_state(disk / "last.pt", {"w": torch.zeros(10)})
    assert files(disk) == before


def test_training_that_meets_a_full_disk_says_what_is_kept_and_goes_on_from_there(
    tiny_config, disk, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)
    whole = tiny_config(epochs=3, name="whole", embed_dim=8, freeze_image=True)
    expected = load_state(train(whole, open_data_of(whole), None) / "last.pt")["model"]
    config = dataclasses.replace(whole, runs_dir=str(disk / "runs"), name="parts")
    real = trainer.Trainer._save_epoch

    def save(self, record):
        if self.state.epoch == 2:
            fill(disk, 10_000)
        real(self, record)

    with monkeypatch.context() as full, pytest.raises(OSError) as error:
        full.setattr(trainer.Trainer, "_save_epoch", save)
        train(config, open_data_of(config), None)
    folder = disk / "runs" / "parts"
    line = str(error.value)
    assert "No space left" in line and "epoch 1 is saved" in line and f"--resume {folder}" in line and "\n" not in line
    assert len(read_log(folder)) == 1 and not list(folder.glob(".*"))
    (disk / "filler").unlink()
    train(config, open_data_of(config), folder)
    ended = load_state(folder / "last.pt")["model"]
    assert all(torch.equal(tensor, ended[key]) for key, tensor in expected.items())


@pytest.fixture
def flags(tiny_config, photos, tmp_path, monkeypatch):
    """What trains for a second from the folder that holds the disk."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    flags = ["--dataset", photos, "--image-encoder", config.image_encoder, "--text-encoder", config.text_encoder]
    flags += ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--epochs", 1, "--precision", "float32"]
    return [*flags, "--num-workers", 0, "--device", "cpu", "--name", "x"]


@pytest.mark.parametrize("place", ["--runs-dir", "--cache-dir"])
def test_the_program_ends_with_one_line_where_it_may_not_write(disk, flags, place):
    with read_only(disk):
        line = one_line_error(run_in_process("train.py", *flags, "--freeze-image", "--freeze-text", place, "disk/new"))
    assert "disk/new" in line and "Read-only" in line


def test_a_disk_that_is_full_from_the_start_is_one_line_wherever_it_runs_out(disk, flags):
    for left in (0, 4096, 8192, 16384, 65536, 500_000, 2_000_000):
        shutil.rmtree(disk / "runs", ignore_errors=True)
        (disk / "filler").unlink(missing_ok=True)
        fill(disk, left)
        line = one_line_error(run_in_process("train.py", *flags, "--runs-dir", "disk/runs"))
        assert "space" in line, (left, line)
        assert not list(disk.rglob(".*"))


def test_features_that_fill_the_disk_are_one_line_and_leave_nothing_behind(disk, flags):
    for left in (0, 4096, 16384):
        shutil.rmtree(disk / "cache", ignore_errors=True)
        (disk / "filler").unlink(missing_ok=True)
        fill(disk, left)
        views = ["--unfreeze-image-stages", 1, "--cached-views", 4]
        line = one_line_error(run_in_process("train.py", *flags, *views, "--cache-dir", "disk/cache"))
        assert "space" in line or "where 0.0 GB are free" in line, (left, line)
        assert not list(disk.rglob("*.images"))
