"""infer.py under torchrun: every process encodes a share, the first one answers; and how photos are read."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import run_in_process, run_script, write_image_folder

from retrieval.embedding_store import list_images, open_gallery

TRAINING = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_tower, text_tower):
    """A folder with a run in runs/first that reads photos twice."""
    folder = tmp_path_factory.mktemp("launched")
    write_image_folder(folder / "my_photos", 30)
    flags = ["--dataset", folder / "my_photos", "--image-encoder", image_tower, "--text-encoder", text_tower]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = run_in_process("train.py", *flags, *TRAINING, "--epochs", 1, "--name", "first", "--tta-flip")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def workdir(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def galleries():
    return sorted(path for path in Path("cache/galleries").iterdir() if path.is_dir())


def test_two_processes_answer_once_with_the_gallery_of_one(workdir):
    write_image_folder(workdir / "many", 200)
    flags = ["red on the left", "--gallery", "many", "--json", "--top-k", 5, "--precision", "float32"]
    launched = run_script(*LAUNCHER, "infer.py", *flags, "--cache-dir", "two", cwd=workdir, OMP_NUM_THREADS="1")
    single = run_in_process("infer.py", *flags, "--cache-dir", "one")
    assert single.returncode == 0, single.stderr
    assert launched.stdout == single.stdout and len(launched.stdout.splitlines()) == 1
    assert launched.stderr.count("searching the 200 photos") == 1
    assert launched.stderr.count("photos: about") <= 1  # none if the first process comes late
    (one,), (two,) = (sorted((workdir / name / "galleries").glob("*/1.npy")) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.with_suffix(".jsonl").read_bytes() == two.with_suffix(".jsonl").read_bytes()


def test_other_processes_print_nothing_and_save_no_picture(workdir, monkeypatch):
    import infer

    write_image_folder(workdir / "holiday", 5)
    for rank in ("1", "0"):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", rank)
            patch.setenv("WORLD_SIZE", "2")
            patch.setattr("sys.argv", ["infer.py", "red", "--gallery", "holiday"])
            infer.main()
        assert (workdir / "runs" / "first" / "matches").exists() == (rank == "0")
        assert len(galleries()) == 1


def test_photos_read_once_have_a_gallery_of_their_own(workdir):
    write_image_folder(workdir / "holiday", 6)
    found = {}
    for mirrored in ("auto", "no", "yes"):
        done = run_in_process("infer.py", "red", "--gallery", "holiday", "--json", "--mirrored", mirrored)
        assert done.returncode == 0, done.stderr
        found[mirrored] = [match["score"] for match in json.loads(done.stdout)["matches"]]
    assert len(galleries()) == 2 and found["auto"] == found["yes"] != found["no"]


def test_threads_sleep_while_they_wait_unless_the_environment_says_otherwise(workdir, monkeypatch):
    import infer

    write_image_folder(workdir / "holiday", 2)
    for before, after in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        with monkeypatch.context() as patch:
            patch.setattr("os.environ", {**os.environ, **({"OMP_WAIT_POLICY": before} if before else {})})
            patch.setattr("sys.argv", ["infer.py", "red", "--gallery", "holiday", "--json"])
            infer.main()
            assert os.environ["OMP_WAIT_POLICY"] == after


def test_api_reads_photos_as_chosen(workdir):
    import api

    encoders = [api.load("runs/first", device="cpu", mirrored=mirrored)._searcher for mirrored in (None, True, False)]
    assert [searcher.encoder.tta_flip for searcher in encoders] == [True, True, False]
    assert [searcher.settings.mirrored for searcher in encoders] == [None, None, False]


def test_galleries_of_older_versions_are_used_as_they_are(workdir):
    write_image_folder(workdir / "holiday", 6)
    flags = ["infer.py", "red", "--gallery", "holiday", "--json"]
    run_in_process(*flags)
    (store,) = galleries()
    (store / "encoding.json").unlink()
    again = run_in_process(*flags, "--precision", "float32")
    assert again.returncode == 0 and len(galleries()) == 1 and "photos encoded" not in again.stderr
    open_gallery(store, list_images(workdir / "holiday"), lambda names: pytest.fail("encoded again"))
