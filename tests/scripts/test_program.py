"""End-to-end tests through the command line: training, evaluation, search, and error messages."""

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

FLOAT32 = ["--precision", "float32", "--num-workers", 0]  # accelerate allows only one precision per process
SMALL = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, *FLOAT32]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, image_tower, text_tower):
    """A working folder with photos in my_photos/ and a run of 2 epochs in runs/first/, and the training process."""
    folder = tmp_path_factory.mktemp("program")
    write_image_folder(folder / "my_photos", 30)
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower]
    training = run_script(
        "train.py", "--dataset", "my_photos", *towers, *SMALL, "--epochs", 2, "--name", "first", cwd=folder
    )
    return folder, training


def parse_matches(done):
    """Parse the output of infer.py: (rank, cosine, match) of each row."""
    rows = re.findall(r"^ +(\d+) +(-?\d\.\d{3})  (.+)$", done.stdout, re.MULTILINE)
    return [(int(rank), float(score), match) for rank, score, match in rows]


def test_training_prints_the_data_the_epochs_and_the_next_commands(first_run):
    folder, training = first_run
    assert "train 22 images / 44 captions, val 2 images / 4 captions, test 6 images / 12 captions" in " ".join(
        training.stdout.split()
    )
    assert re.search(r"^ +loss InfoNCE triplet +R@1 .* rsum +img/s +left$", training.stdout, re.MULTILINE)
    assert re.search(r"^epoch 1/2 +\d.* best +\d+ +\d+ s$", training.stdout, re.MULTILINE)
    assert re.search(r"^epoch 2/2 ", training.stdout, re.MULTILINE)
    assert re.search(r"^best: epoch [12], rsum ", training.stdout, re.MULTILINE)
    lines = [line for line in training.stdout.splitlines() if str(folder) not in line]  # a path is not broken
    assert all(len(line) <= 100 for line in lines)
    assert "python evaluate.py runs/first --split test" in training.stdout and "python infer.py " in training.stdout
    run = folder / "runs" / "first"
    assert {"config.json", "log.jsonl", "last.pt", "best.pt", "curves.png", "towers"} <= {p.name for p in run.iterdir()}
    assert [record["epoch"] for record in read_log(run)] == [1, 2]
    with Image.open(run / "curves.png") as curves:
        assert min(curves.size) > 100


def test_training_prints_only_progress_bars_to_stderr(first_run):
    assert first_run[1].stderr.strip() == ""


def test_evaluation_prints_and_saves_the_metrics_of_each_split(first_run, monkeypatch):
    folder, _ = first_run
    monkeypatch.chdir(folder)
    for split, images in (("test", 6), ("val", 2)):
        arguments = ["evaluate.py", "runs/first", "--split", split, "--precision", "float32"]
        done = run_script(*arguments, cwd=folder) if split == "test" else run_in_process(*arguments)
        assert f"{split} split" in done.stdout and f"{images} images" in done.stdout
    saved = json.loads((folder / "runs" / "first" / "metrics.json").read_text())
    assert saved.keys() == {"test", "val"}
    for metrics in saved.values():
        recalls = [metrics[f"{direction}_R@{k}"] for direction in ("i2t", "t2i") for k in (1, 5, 10)]
        assert metrics["rsum"] == pytest.approx(sum(recalls)) and all(0 <= recall <= 100 for recall in recalls)
    best = max(record["rsum"] for record in read_log(folder / "runs" / "first"))
    assert saved["val"]["rsum"] == pytest.approx(best)
    assert f"rsum {saved['val']['rsum']:.1f}" in done.stdout
    assert (folder / "runs" / "first" / "metrics-test.png").is_file()


def test_batch_loss_is_info_nce_over_batches_of_32_pairs():
    import torch

    generator = torch.Generator().manual_seed(0)
    image_emb = torch.nn.functional.normalize(torch.randn(70, 8, generator=generator))
    caption_image_ids = torch.arange(70).repeat_interleave(3)
    text_emb = image_emb[caption_image_ids]  # all captions of an image are equal, so the sampled one does not matter
    collapsed = torch.zeros(70, 8)
    collapsed[:, 0] = 1
    loss = evaluate.batch_loss(collapsed, collapsed[caption_image_ids], caption_image_ids, temperature=0.07)
    assert loss == pytest.approx(math.log(32))
    losses = []
    # batch_loss first permutes the 210 captions, then the 70 images.
    order = torch.randperm(210, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(torch.randperm(210, generator=generator), order)
    pairs = torch.randperm(70, generator=generator)
    for start in (0, 32):
        sim = image_emb[pairs[start : start + 32]] @ image_emb[pairs[start : start + 32]].T / 0.07
        losses.append(sum(sim[k].logsumexp(0) - sim[k, k] for k in range(32)) / 32)
    loss = evaluate.batch_loss(image_emb, text_emb, caption_image_ids, temperature=0.07)
    assert loss == pytest.approx((sum(losses) / 2).item(), rel=1e-5)
    metrics = {f"{d}_{name}": 40.0 for d in ("i2t", "t2i") for name in ("R@1", "R@5", "R@10", "mAP@10", "medR")}
    table = evaluate.table(metrics | {"rsum": 240.0, evaluate.BATCH_LOSS: loss})
    assert f"top-5 error 0.600 / 0.600   InfoNCE in batches of 32 {loss:.3f}" in table


def test_sentence_query_finds_photos_with_the_newest_run(first_run):
    folder, _ = first_run
    done = run_script("infer.py", "a picture of red beside blue", "--top-k", 4, cwd=folder)
    matches = parse_matches(done)
    assert [rank for rank, _, _ in matches] == [1, 2, 3, 4]
    assert [score for _, score, _ in matches] == sorted((score for _, score, _ in matches), reverse=True)
    assert len({match for *_, match in matches}) == 4
    assert all((folder / match).is_file() for *_, match in matches)
    picture = re.search(r"^picture: (.+)$", done.stdout, re.MULTILINE)[1]
    with Image.open(folder / picture) as image:
        assert min(image.size) > 100


def test_image_query_finds_captions(first_run):
    folder, _ = first_run
    done = run_script(
        *("infer.py", "--image", "my_photos/Images/photo_00.png", "--run", "runs/first", "--top-k", 100),
        *("--out", "found.jpg"),
        cwd=folder,
    )
    captions = (folder / "my_photos" / "captions.txt").read_text()
    matches = parse_matches(done)
    assert len(matches) == 12  # all captions of the test split
    assert all(match in captions for *_, match in matches)
    assert (folder / "found.jpg").is_file()


def test_resume_continues_with_the_settings_of_the_run(first_run, monkeypatch):
    folder, _ = first_run
    monkeypatch.chdir(folder)
    shutil.copytree("runs/first", "again/first")
    done = run_in_process("train.py", "--resume", "again/first", "--epochs", 3)
    assert "epoch 3/3" in done.stdout and "epoch 1/3" not in done.stdout
    assert [record["epoch"] for record in read_log(folder / "again" / "first")] == [1, 2, 3]


def test_start_from_takes_over_the_model_of_another_run(first_run, monkeypatch):
    folder, _ = first_run
    monkeypatch.chdir(folder)
    arguments = ["--dataset", "my_photos", "--batch-size", 8, *FLOAT32, "--runs-dir", "more", "--epochs", 1]
    done = run_in_process("train.py", "--start-from", "runs/first", *arguments, "--name", "second")
    assert done.returncode == 0, done.stderr
    parent, child = (json.loads((folder / run / "config.json").read_text()) for run in ("runs/first", "more/second"))
    assert child["embed_dim"] == parent["embed_dim"] == 16 and child["image_encoder"] == parent["image_encoder"]


def test_run_can_be_evaluated_after_its_photos_have_moved(first_run, tmp_path, monkeypatch):
    folder, _ = first_run
    moved = write_image_folder(tmp_path / "moved", 30)
    shutil.copytree(folder / "runs" / "first", tmp_path / "runs" / "first")
    config = tmp_path / "runs" / "first" / "config.json"
    config.write_text(config.read_text().replace(str(folder / "my_photos"), str(tmp_path / "missing")))
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "missing") in one_line_error(run_in_process("evaluate.py", "runs/first"))
    assert "6 images" in run_in_process("evaluate.py", "runs/first", "--data-dir", moved).stdout


def test_unreadable_photos_are_reported_and_skipped(first_run, tmp_path, monkeypatch):
    folder, _ = first_run
    monkeypatch.chdir(folder)
    photos = write_image_folder(tmp_path / "photos", 30)
    for path in sorted((photos / "Images").iterdir())[::2]:
        path.write_bytes(path.read_bytes()[:60])
    done = run_in_process("evaluate.py", "runs/first", "--data-dir", photos, "--split", "train")
    assert re.search(r"train: \d+ photos could not be read and are skipped: photo_\d\d\.png", done.stdout)
    assert "rsum" in done.stdout


def test_unreadable_query_image_gives_a_one_line_error(first_run, tmp_path, monkeypatch):
    folder, _ = first_run
    monkeypatch.chdir(folder)
    (tmp_path / "damaged.jpg").write_bytes(b"not an image")
    assert "damaged.jpg" in one_line_error(run_in_process("infer.py", "--image", tmp_path / "damaged.jpg"))


def test_query_without_tokens_does_not_crash(first_run, monkeypatch):
    folder, _ = first_run
    monkeypatch.chdir(folder)
    assert run_in_process("infer.py", "\u200b").returncode in (0, 2)


@pytest.mark.parametrize("file_name", ["best.pt", "config.json", "towers/image.json"])
def test_damaged_run_gives_a_one_line_error_with_its_path(first_run, tmp_path, monkeypatch, file_name):
    folder, _ = first_run
    monkeypatch.chdir(folder)
    run = shutil.copytree("runs/first", tmp_path / "first")
    (run / file_name).write_bytes((run / file_name).read_bytes()[:-20])
    assert str(run) in one_line_error(run_in_process("evaluate.py", run))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train.py", "--epoch", 1], ["--epoch", "did you mean --epochs?"]),
        (["train.py", "--epochs", 0], ["--epochs must be from 1", "got 0"]),
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
def test_errors_are_one_line_fast_and_write_no_files(first_run, arguments, expected):
    folder, _ = first_run
    before = sorted(folder.rglob("*"))
    started = time.perf_counter()
    line = one_line_error(run_script(*arguments, cwd=folder, check=False))
    assert time.perf_counter() - started < 10
    assert all(text in line for text in expected), line
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_unknown_flag_error_does_not_depend_on_the_terminal_encoding(tmp_path, encoding):
    done = run_script("train.py", "--alhpa", 1, cwd=tmp_path, check=False, PYTHONIOENCODING=encoding)
    line = one_line_error(done)
    assert "did you mean --alpha?" in line and "---" not in line and "--alhpa" in line


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_results_are_printed_in_any_terminal_encoding(first_run, monkeypatch, encoding):
    folder, _ = first_run
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "runs/first"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    cli.run(evaluate.main)
    sys.stdout.flush()
    assert b"rsum" in sys.stdout.buffer.getvalue()


def test_existing_run_name_is_an_error_and_the_run_is_unchanged(first_run, image_tower, text_tower, monkeypatch):
    folder, _ = first_run
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs" / "first").iterdir()}
    towers = ["--image-encoder", image_tower, "--text-encoder", text_tower]
    assert "runs/first" in one_line_error(
        run_in_process("train.py", "--dataset", "my_photos", *towers, *SMALL, "--name", "first")
    )
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs" / "first").iterdir()} == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_is_saved_and_can_be_resumed(first_run, image_tower, text_tower, monkeypatch, signum):
    folder, _ = first_run
    arguments = ["--dataset", "my_photos", "--image-encoder", image_tower, "--text-encoder", text_tower, *SMALL]
    command = [sys.executable, ROOT / "train.py", *arguments, "--epochs", 500, "--runs-dir", signum.name, "--name", "x"]
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


def test_training_evaluation_and_search_on_the_sample_set_need_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--epochs", 1, "--image-encoder", "test_resnet", "--image-size", 32, "--captions-per-image", 1]
    done = run_script("train.py", *flags, "--num-workers", 0, cwd=tmp_path)
    assert "train 216 images / 1,080 captions" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert "rsum" in run_in_process("evaluate.py").stdout
    matches = parse_matches(run_in_process("infer.py", "a yellow circle left of a red cross"))
    assert len(matches) == 8 and all("scene_" in match for *_, match in matches)
    assert json.loads((run / "metrics.json").read_text())["test"]["rsum"] > 0
