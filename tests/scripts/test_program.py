"""The whole program as a person runs it: train, evaluate and search from the command line, and what goes wrong."""

import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, one_line_error, run_in_process, run_script, write_image_folder
from PIL import Image

import evaluate
from runtime import cli
from runtime.run_dir import read_log

FLOAT32 = ["--precision", "float32", "--num-workers", 0]  # accelerate allows a process one precision only
SMALL = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, *FLOAT32]


@pytest.fixture(scope="module")
def place(tmp_path_factory, image_tower, text_tower):
    """A working folder with photos in my_photos/ and a run of 2 epochs on them, and what training said."""
    place = tmp_path_factory.mktemp("program")
    write_image_folder(place / "my_photos", 30)
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower]
    done = run_script(
        "train.py", "--dataset", "my_photos", *towers, *SMALL, "--epochs", 2, "--name", "first", cwd=place
    )
    return place, done


def matches(done):
    """What infer.py printed: (rank, cosine, match) of each row."""
    rows = re.findall(r"^ +(\d+) +(-?\d\.\d{3})  (.+)$", done.stdout, re.MULTILINE)
    return [(int(rank), float(score), match) for rank, score, match in rows]


def test_training_prints_the_data_the_epochs_and_what_to_do_next(place):
    folder, done = place
    assert "train 22 images / 44 captions, val 2 images / 4 captions, test 6 images / 12 captions" in done.stdout
    assert re.search(r"^epoch 1/2 .*loss \d.*InfoNCE.*triplet.*R@1/5/10.*images/s$", done.stdout, re.MULTILINE)
    assert re.search(r"^epoch 2/2 ", done.stdout, re.MULTILINE)
    assert "python evaluate.py runs/first --split test" in done.stdout and "python infer.py " in done.stdout
    run = folder / "runs" / "first"
    assert {"config.json", "log.jsonl", "last.pt", "best.pt", "curves.png", "towers"} <= {p.name for p in run.iterdir()}
    assert [record["epoch"] for record in read_log(run)] == [1, 2]
    with Image.open(run / "curves.png") as curves:
        assert min(curves.size) > 100


def test_training_says_nothing_on_stderr_but_progress(place):
    assert place[1].stderr.strip() == ""


def test_evaluating_prints_and_stores_the_metrics_of_each_split(place, monkeypatch):
    folder, _ = place
    monkeypatch.chdir(folder)
    for split, images in (("test", 6), ("val", 2)):
        words = ["evaluate.py", "runs/first", "--split", split, "--precision", "float32"]
        done = run_script(*words, cwd=folder) if split == "test" else run_in_process(*words)
        assert f"{split} split" in done.stdout and f"{images} images" in done.stdout
    stored = json.loads((folder / "runs" / "first" / "metrics.json").read_text())
    assert stored.keys() == {"test", "val"}
    for metrics in stored.values():
        recalls = [metrics[f"{way}_R@{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
        assert metrics["rsum"] == pytest.approx(sum(recalls)) and all(0 <= recall <= 100 for recall in recalls)
    best = max(record["rsum"] for record in read_log(folder / "runs" / "first"))
    assert stored["val"]["rsum"] == pytest.approx(best)
    assert f"rsum {stored['val']['rsum']:.1f}" in done.stdout
    assert (folder / "runs" / "first" / "metrics-test.png").is_file()


def test_the_loss_in_batches_of_32_is_that_of_pairs():
    import torch

    generator = torch.Generator().manual_seed(0)
    image_emb = torch.nn.functional.normalize(torch.randn(70, 8, generator=generator))
    owner = torch.arange(70).repeat_interleave(3)
    text_emb = image_emb[owner]  # all captions of a photo are alike, so that it does not matter which one is drawn
    same = torch.zeros(70, 8)
    same[:, 0] = 1
    assert evaluate.batch_loss(same, same[owner], owner, temperature=0.07) == pytest.approx(math.log(32))
    losses = []
    order = torch.randperm(210, generator=torch.Generator().manual_seed(0))  # as many numbers are drawn before
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(torch.randperm(210, generator=generator), order)
    pairs = torch.randperm(70, generator=generator)
    for start in (0, 32):
        sim = image_emb[pairs[start : start + 32]] @ image_emb[pairs[start : start + 32]].T / 0.07
        losses.append(sum(sim[k].logsumexp(0) - sim[k, k] for k in range(32)) / 32)
    found = evaluate.batch_loss(image_emb, text_emb, owner, temperature=0.07)
    assert found == pytest.approx((sum(losses) / 2).item(), rel=1e-5)
    metrics = {f"{way}_{name}": 40.0 for way in ("i2t", "t2i") for name in ("R@1", "R@5", "R@10", "mAP@10", "medR")}
    said = evaluate.table(metrics | {"rsum": 240.0, evaluate.BATCH_LOSS: found})
    assert f"top-5 error 0.600 / 0.600   InfoNCE in batches of 32 {found:.3f}" in said


def test_a_sentence_finds_photos_with_the_newest_run(place):
    folder, _ = place
    done = run_script("infer.py", "a picture of red beside blue", "--top-k", 4, cwd=folder)
    found = matches(done)
    assert [rank for rank, _, _ in found] == [1, 2, 3, 4]
    assert [score for _, score, _ in found] == sorted((score for _, score, _ in found), reverse=True)
    assert len({match for *_, match in found}) == 4
    assert all((folder / match).is_file() for *_, match in found)
    picture = re.search(r"^picture: (.+)$", done.stdout, re.MULTILINE)[1]
    with Image.open(folder / picture) as image:
        assert min(image.size) > 100


def test_a_photo_finds_captions(place):
    folder, _ = place
    done = run_script(
        *("infer.py", "--image", "my_photos/Images/photo_00.png", "--run", "runs/first", "--top-k", 100),
        *("--out", "found.jpg"),
        cwd=folder,
    )
    captions = (folder / "my_photos" / "captions.txt").read_text()
    found = matches(done)
    assert len(found) == 12  # the test split holds no more
    assert all(match in captions for *_, match in found)
    assert (folder / "found.jpg").is_file()


def test_resuming_goes_on_with_the_runs_own_settings(place, monkeypatch):
    folder, _ = place
    monkeypatch.chdir(folder)
    shutil.copytree("runs/first", "again/first")
    done = run_in_process("train.py", "--resume", "again/first", "--epochs", 3)
    assert "epoch 3/3" in done.stdout and "epoch 1/3" not in done.stdout
    assert [record["epoch"] for record in read_log(folder / "again" / "first")] == [1, 2, 3]


def test_a_run_starts_from_another_and_takes_over_its_model(place, monkeypatch):
    folder, _ = place
    monkeypatch.chdir(folder)
    words = ["--dataset", "my_photos", "--batch-size", 8, *FLOAT32, "--runs-dir", "more", "--epochs", 1]
    done = run_in_process("train.py", "--start-from", "runs/first", *words, "--name", "second")
    assert done.returncode == 0, done.stderr
    parent, child = (json.loads((folder / run / "config.json").read_text()) for run in ("runs/first", "more/second"))
    assert child["embed_dim"] == parent["embed_dim"] == 16 and child["image_encoder"] == parent["image_encoder"]


def test_a_run_goes_on_being_useful_when_its_photos_have_moved(place, tmp_path, monkeypatch):
    folder, _ = place
    moved = write_image_folder(tmp_path / "moved", 30)
    shutil.copytree(folder / "runs" / "first", tmp_path / "runs" / "first")
    config = tmp_path / "runs" / "first" / "config.json"
    config.write_text(config.read_text().replace(str(folder / "my_photos"), str(tmp_path / "gone")))
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "gone") in one_line_error(run_in_process("evaluate.py", "runs/first"))
    assert "6 images" in run_in_process("evaluate.py", "runs/first", "--data-dir", moved).stdout


def test_broken_photos_in_the_data_set_are_named_and_the_rest_is_used(place, tmp_path, monkeypatch):
    folder, _ = place
    monkeypatch.chdir(folder)
    photos = write_image_folder(tmp_path / "photos", 30)
    for path in sorted((photos / "Images").iterdir())[::2]:
        path.write_bytes(path.read_bytes()[:60])
    done = run_in_process("evaluate.py", "runs/first", "--data-dir", photos, "--split", "train")
    assert re.search(r"train: \d+ photos could not be read and are skipped: photo_\d\d\.png", done.stdout)
    assert "rsum" in done.stdout


def test_a_broken_query_photo_is_one_line_that_names_it(place, tmp_path, monkeypatch):
    folder, _ = place
    monkeypatch.chdir(folder)
    (tmp_path / "broken.jpg").write_bytes(b"this is no image")
    assert "broken.jpg" in one_line_error(run_in_process("infer.py", "--image", tmp_path / "broken.jpg"))


def test_a_query_without_a_single_token_does_not_crash(place, monkeypatch):
    folder, _ = place
    monkeypatch.chdir(folder)
    assert run_in_process("infer.py", "\u200b").returncode in (0, 2)


@pytest.mark.parametrize("checkpoint", ["best.pt", "config.json", "towers/image.json"])
def test_a_damaged_run_is_one_line_that_names_it(place, tmp_path, monkeypatch, checkpoint):
    folder, _ = place
    monkeypatch.chdir(folder)
    run = shutil.copytree("runs/first", tmp_path / "first")
    (run / checkpoint).write_bytes((run / checkpoint).read_bytes()[:-20])
    assert str(run) in one_line_error(run_in_process("evaluate.py", run))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train.py", "--epoch", 1], ["--epoch", "did you mean --epochs?"]),
        (["train.py", "--epochs", 0], ["--epochs must be at least 1", "got 0"]),
        (["train.py", "--dataset", "no_photos"], ["'no_photos'", "sample, flickr8k"]),
        (["train.py", "--data-dir", "nowhere"], ["nowhere", "--data-dir"]),
        (["train.py", "--resume", "runs/none"], ["runs/none", "--resume"]),
        (["train.py", "--resume", "my_photos"], ["my_photos", "config.json"]),
        (["train.py", "--dataset", "my_photos/Images"], ["captions.txt"]),
        (["evaluate.py", "runs/none"], ["runs/none"]),
        (["evaluate.py", "--runs-dir", "nowhere"], ["nowhere", "python train.py"]),
        (["evaluate.py", "runs/first", "--split", "dev"], ["--split", "dev", "val"]),
        (["infer.py"], ["sentence", "--image"]),
        (["infer.py", " "], ["empty"]),
        (["infer.py", "a dog", "--image", "x.jpg"], ["x.jpg", "--image"]),
        (["infer.py", "a dog", "--queries", "my_photos/captions.txt"], ["--queries", "alone"]),
        (["infer.py", "a dog", "--labels", "a dog", "a cat"], ["--labels", "--image"]),
        (["infer.py", "a dog", "--model", "clip"], ["--model", "--gallery"]),
        (["infer.py", "a dog", "--model", "./clip", "--gallery", "my_photos"], ["./clip"]),
        (["infer.py", "a dog", "--index", "annoy"], ["--index", "faiss", "annoy"]),
        (["infer.py", "--image", "my_photos/Images/photo_00.png", "--index", "faiss"], ["--index", "--find photos"]),
        (["infer.py", "--queries", "none.txt"], ["none.txt", "--queries"]),
        (["infer.py", "a dog", "--gallery", "nowhere"], ["nowhere"]),
        (["infer.py", "a dog", "--gallery", "runs/first/towers"], ["no photos", "runs/first/towers", ".jpg"]),
        (["infer.py", "a dog", "--gallery", "my_photos", "--find", "captions"], ["--gallery", "--find captions"]),
        (["infer.py", "--image", "none.jpg"], ["none.jpg", "--image"]),
        (["infer.py", "a dog", "--top-k", 0], ["--top-k", "0"]),
        (["infer.py", "a dog", "--out", "x.txt"], ["--out", "x.txt"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value,
)
def test_a_mistake_is_answered_in_one_line_and_at_once(place, words, parts):
    folder, _ = place
    before = sorted(folder.rglob("*"))
    started = time.perf_counter()
    line = one_line_error(run_script(*words, cwd=folder, check=False))
    assert time.perf_counter() - started < 10
    assert all(part in line for part in parts), line
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_a_wrong_flag_is_told_alike_whatever_the_terminal_writes(tmp_path, encoding):
    done = run_script("train.py", "--alhpa", 1, cwd=tmp_path, check=False, PYTHONIOENCODING=encoding)
    line = one_line_error(done)
    assert "did you mean --alpha?" in line and "---" not in line and "--alhpa" in line


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_results_are_printed_whatever_the_terminal_writes(place, monkeypatch, encoding):
    folder, _ = place
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "runs/first"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    cli.run(evaluate.main)
    sys.stdout.flush()
    assert b"rsum" in sys.stdout.buffer.getvalue()


def test_a_name_that_is_taken_is_refused_and_the_run_left_alone(place, image_tower, text_tower, monkeypatch):
    folder, _ = place
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs" / "first").iterdir()}
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower]
    assert "runs/first" in one_line_error(
        run_in_process("train.py", "--dataset", "my_photos", *towers, *SMALL, "--name", "first")
    )
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs" / "first").iterdir()} == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_keeps_its_steps_and_resume_finishes(place, image_tower, text_tower, monkeypatch, signum):
    folder, _ = place
    words = ["--dataset", "my_photos", "--image-encoder", image_tower, "--text-encoder", text_tower, *SMALL]
    command = [sys.executable, ROOT / "train.py", *words, "--epochs", 500, "--runs-dir", signum.name, "--name", "x"]
    training = subprocess.Popen(
        list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in training.stdout:
            if line.startswith("epoch "):
                break
        training.send_signal(signum)
        _, errors = training.communicate(timeout=60)
    finally:
        training.kill()
    assert training.returncode == 128 + signum, errors
    assert "is saved; continue with" in errors and f"--resume {signum.name}/x" in errors and "Traceback" not in errors
    run = folder / signum.name / "x"
    finished = len(read_log(run))
    assert finished >= 1 and (run / "last.pt").is_file() and not list(run.glob(".*"))
    monkeypatch.chdir(folder)
    line = one_line_error(run_in_process("infer.py", "a dog", "--runs-dir", signum.name))
    assert "finished" in line and f"--resume {signum.name}/x" in line
    run_in_process("train.py", "--resume", f"{signum.name}/x", "--epochs", finished + 1)
    assert [record["epoch"] for record in read_log(run)] == list(range(1, finished + 2))


def test_the_sample_set_is_trained_measured_and_searched_without_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--epochs", 1, "--image-encoder", "test_resnet", "--image-size", 32, "--captions-per-image", 1]
    done = run_script("train.py", *quick, "--num-workers", 0, cwd=tmp_path)
    assert "train 216 images / 1,080 captions" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert "rsum" in run_in_process("evaluate.py").stdout
    found = matches(run_in_process("infer.py", "a yellow circle left of a red cross"))
    assert len(found) == 8 and all("scene_" in match for *_, match in found)
    assert json.loads((run / "metrics.json").read_text())["test"]["rsum"] > 0
