"""Sentences without PyTorch: the exported text tower gives the same results, and is made anew when it does not fit."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, run_in_process, write_image_folder
from tiny_dual_encoders import clip

from data.loading import open_run_data
from retrieval import onnx_text, onnx_text_export
from retrieval.embedding_store import list_images, list_split_images
from retrieval.onnx_text import export_in_background, export_run_in_background, refusal_file
from retrieval.onnx_text_export import prepare
from retrieval.searcher import search_images, searcher_for_pretrained, searcher_for_run
from runtime.run_dir import read_shared_config

TRAINING = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]
SENTENCES = ["red on the left", "a picture of blue", "xyzzy red", "red and green " * 60]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, image_tower, text_tower):
    """Return a folder with a run in runs/first, photos in holiday/, and the run's exported text tower in cache/."""
    for library in onnx_text.EXPORT_LIBRARIES:
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("onnx")
    write_image_folder(folder / "my_photos", 30)
    write_image_folder(folder / "holiday", 20)
    flags = ["--dataset", folder / "my_photos", "--image-encoder", image_tower, "--text-encoder", text_tower]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = run_in_process("train.py", *flags, *TRAINING, "--epochs", 1, "--name", "first")
    assert done.returncode == 0, done.stderr
    assert prepare(searcher(folder))
    return folder


def searcher(folder, cache="cache", **options):
    options = {"device": "cpu", "precision": "float32"} | options
    return searcher_for_run(folder / "runs" / "first", cache_dir=folder / cache, **options)


def pytorch_searcher(folder):
    """Return a searcher whose model is loaded, so that it does not use the exported text tower."""
    loaded = searcher(folder)
    loaded.model()
    return loaded


def test_embeddings_are_those_of_pytorch(workdir):
    exported, loaded = searcher(workdir), pytorch_searcher(workdir)
    assert exported.onnx_text_encoder and not loaded.onnx_text_encoder

    for target in ("photos", "captions"):
        emb = exported.embed_sentences(SENTENCES, target=target)
        expected = loaded.embed_sentences(SENTENCES, target=target)
        assert emb.dtype == np.float32
        np.testing.assert_allclose(emb, expected, atol=1e-4)


def test_many_sentences_have_the_embeddings_of_few(workdir):
    few, many = searcher(workdir).onnx_text_encoder, searcher(workdir).onnx_text_encoder
    expected = np.concatenate([few.encode([sentence]) for sentence in SENTENCES])
    session = many.session
    for _ in range(3):  # 4, 8 and 12 sentences
        np.testing.assert_allclose(many.encode(SENTENCES), expected, atol=1e-6)
    assert few.session is not many.session is not session


def test_matches_and_warnings_are_those_of_pytorch(workdir):
    exported, loaded = searcher(workdir), pytorch_searcher(workdir)
    photos = list_images(workdir / "holiday")
    gallery = loaded.gallery(photos)

    for sentence in SENTENCES:
        (found,), (expected,) = (
            search_images(each.embed_sentences([sentence]), gallery, 10) for each in (exported, loaded)
        )
        assert [match.score for match in found] == pytest.approx([match.score for match in expected], abs=1e-4)
        assert exported.warnings(sentence) == loaded.warnings(sentence)
    with pytest.raises(ValueError, match="knows no word"):
        exported.warnings("xyzzy")


def infer_in_new_process(workdir, *flags, imported="pass"):
    code = (
        "import runpy, sys; sys.argv = ['infer.py', *sys.argv[1:]]; "
        f"runpy.run_path({str(ROOT / 'infer.py')!r}, run_name='__main__'); {imported}"
    )
    command = [sys.executable, "-c", code, *map(str, flags)]
    return subprocess.run(command, cwd=workdir, capture_output=True, text=True, env=environment(), check=False)


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_typed_sentence_imports_no_pytorch(workdir):
    flags = ("red on the left", "--run", "runs/first", "--gallery", "holiday", "--top-k", 10)
    expected = run_json(workdir, *flags, "--device", "cpu", "--precision", "bfloat16")
    heavy = "{'torch', 'transformers', 'timm', 'torchvision', 'matplotlib', 'pandas'} & set(sys.modules)"

    done = infer_in_new_process(workdir, *flags, imported=f"assert not {heavy}, {heavy}")

    assert done.returncode == 0, done.stderr
    names = [line.split()[-1] for line in done.stdout.splitlines() if line.strip()[:2].strip().isdigit()]
    assert len(names) == 10 and set(names) <= {match["photo"] for match in expected}
    assert (workdir / "runs" / "first" / "matches" / "red-on-the-left.png").is_file()


def run_json(workdir, *flags):
    done = infer_in_new_process(workdir, *flags, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["matches"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "settings", "version", "tokenizer"])
def test_damaged_export_is_reported_and_pytorch_is_used(workdir, tmp_path, capsys, damage):
    shutil.copytree(workdir / "cache" / "text_encoders", tmp_path / "text_encoders")
    damaged = searcher(workdir, cache=tmp_path)
    folder = damaged.text_encoder_folder
    if damage == "truncated":
        (folder / "text.onnx").write_bytes((folder / "text.onnx").read_bytes()[:1000])
    elif damage == "missing":
        (folder / "text.onnx.data").unlink(missing_ok=True)
        (folder / "text.onnx").unlink()
    elif damage == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    else:
        settings = json.loads((folder / "settings.json").read_text())
        settings = [] if damage == "settings" else settings | {"version": 0}
        (folder / "settings.json").write_text(json.dumps(settings))

    emb = damaged.embed_sentences(SENTENCES[:1])

    np.testing.assert_allclose(emb, pytorch_searcher(workdir).embed_sentences(SENTENCES[:1]), atol=1e-6)
    (line,) = capsys.readouterr().err.splitlines()
    assert "is damaged" in line
    assert prepare(searcher(workdir, cache=tmp_path)) and searcher(workdir, cache=tmp_path).onnx_text_encoder


def test_export_of_other_weights_is_not_used(workdir, tmp_path):
    shutil.copytree(workdir / "runs", tmp_path / "runs")
    shutil.copytree(workdir / "cache" / "text_encoders", tmp_path / "cache" / "text_encoders")
    config = json.loads((tmp_path / "runs" / "first" / "config.json").read_text())
    (tmp_path / "runs" / "first" / "config.json").write_text(json.dumps(config | {"max_tokens": 9}))

    assert not searcher(tmp_path).onnx_text_encoder


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"precision": "bfloat16"}, {"precision": "float16"}])
def test_another_device_or_precision_than_the_exports_is_respected(workdir, options):
    assert not searcher(workdir, **options).onnx_text_encoder


def test_without_onnxruntime_pytorch_is_used(workdir, monkeypatch):
    monkeypatch.setattr(onnx_text, "is_available", lambda: False)

    assert not searcher(workdir).onnx_text_encoder


def test_pretrained_dual_encoder_is_exported_too(workdir, tmp_path):
    for component in clip():
        component.save_pretrained(tmp_path / "clip")
    options = {"device": "cpu", "precision": "float32", "cache_dir": tmp_path}
    assert prepare(searcher_for_pretrained(str(tmp_path / "clip"), **options))

    exported, loaded = (searcher_for_pretrained(str(tmp_path / "clip"), **options) for _ in range(2))
    loaded.model()
    sentences = ["red on the left", "blue"]
    assert exported.onnx_text_encoder
    np.testing.assert_allclose(exported.embed_sentences(sentences), loaded.embed_sentences(sentences), atol=1e-4)


def test_tower_that_cannot_be_exported_is_not_tried_again(workdir, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("PyTorch cannot export this tower")

    monkeypatch.setattr(onnx_text_export, "tower_to_onnx", refuse)
    refused = searcher(workdir, cache=tmp_path)

    assert not prepare(refused) and not refused.text_encoder_folder.exists()
    assert refusal_file(refused.text_encoder_folder).is_file()
    assert started_exports(monkeypatch, refused.text_encoder_folder) == []


def test_full_disk_at_the_export_leaves_nothing_and_the_next_search_tries_again(workdir, tmp_path, monkeypatch):
    def write_half(*args, **_):
        args[5].write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = searcher(workdir, cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(onnx_text_export, "tower_to_onnx", write_half)
        with pytest.raises(OSError, match="No space left"):
            prepare(full)

    (left,) = full.text_encoder_folder.parent.iterdir()
    assert left.suffix == ".lock"
    monkeypatch.delenv("NO_BACKGROUND_EXPORT")
    assert len(started_exports(monkeypatch, full.text_encoder_folder)) == 1
    assert prepare(searcher(workdir, cache=tmp_path))


def test_damaged_export_is_made_again_in_the_background_of_the_search(workdir, tmp_path, monkeypatch, capsys):
    shutil.copytree(workdir / "cache" / "text_encoders", tmp_path / "text_encoders")
    damaged = searcher(workdir, cache=tmp_path)
    (damaged.text_encoder_folder / "text.onnx").write_bytes(b"damaged")
    monkeypatch.delenv("NO_BACKGROUND_EXPORT")

    damaged.embed_sentences(SENTENCES[:1])

    assert "is made again" in capsys.readouterr().err and damaged.export_is_damaged
    folder = damaged.text_encoder_folder
    assert len(started_exports(monkeypatch, folder, is_damaged=damaged.export_is_damaged)) == 1
    assert not searcher(workdir).export_is_damaged and started_exports(monkeypatch, folder) == []


def test_end_of_training_starts_the_export_and_never_fails(workdir, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_BACKGROUND_EXPORT")
    run, exporting = workdir / "runs" / "first", lambda: export_run_in_background(run, tmp_path)

    (command,) = started_exports(monkeypatch, export=exporting)
    assert command[1:] == ["-m", "retrieval.onnx_text_export", str(run), str(tmp_path)]
    with monkeypatch.context() as patch:  # of two processes, the first one exports
        patch.setenv("RANK", "1")
        assert started_exports(patch, export=exporting) == []
    assert started_exports(monkeypatch, export=lambda: export_run_in_background(tmp_path / "no run", tmp_path)) == []
    with monkeypatch.context() as patch:
        patch.setattr(onnx_text, "EXPORT_LIBRARIES", ("onnx", "not_installed"))
        assert started_exports(patch, export=exporting) == []


def test_training_prepares_the_first_search(workdir, image_tower, text_tower, tmp_path, monkeypatch):
    flags = ["--dataset", workdir / "my_photos", "--image-encoder", image_tower, "--text-encoder", text_tower]
    flags += [*TRAINING, "--epochs", 1, "--name", "second", "--runs-dir", tmp_path, "--cache-dir", tmp_path / "cache"]
    calls = []
    monkeypatch.setattr(onnx_text, "export_run_in_background", lambda *args: calls.append(args))

    assert run_in_process("train.py", *flags).returncode == 0

    assert calls == [(tmp_path / "second", tmp_path / "cache")]


def test_top_matches_on_the_sample_set_are_those_of_pytorch(tmp_path, monkeypatch):
    """Search the test photos of the built-in set with its test captions; the model is trained for one epoch."""
    for library in onnx_text.EXPORT_LIBRARIES:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    done = run_in_process("train.py", *TRAINING, "--epochs", 1, "--name", "first")
    assert done.returncode == 0, done.stderr
    assert prepare(searcher(tmp_path))
    exported, loaded = searcher(tmp_path), pytorch_searcher(tmp_path)
    data = open_run_data(tmp_path / "runs" / "first", read_shared_config(tmp_path / "runs" / "first"), None, "test")
    gallery, captions = loaded.gallery(list_split_images(data, "test")), sorted(set(data.split("test").captions))

    emb, expected_emb = exported.embed_sentences(captions), loaded.embed_sentences(captions)
    found, expected = (search_images(rows, gallery, 10) for rows in (emb, expected_emb))

    assert len(captions) >= 50 and np.abs(emb - expected_emb).max() < 1e-4
    for matches, wanted in zip(found, expected, strict=True):
        # Photos whose scores differ by less than rounding does may change places.
        assert [m.score for m in matches] == pytest.approx([m.score for m in wanted], abs=1e-5)
    same = sum([m.item for m in a] == [m.item for m in b] for a, b in zip(found, expected, strict=True))
    assert same >= 0.98 * len(captions)


def started_exports(monkeypatch, folder=None, export=None, **options):
    commands = []

    class Process:
        pid = 0

        def __init__(self, command, **_):
            commands.append(command)

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr("os.setpriority", lambda *_: None, raising=False)
    export() if export else export_in_background(Path("runs/first"), Path("cache"), folder, **options)
    return commands


def test_export_in_the_background_is_started_once(workdir, tmp_path, monkeypatch):
    folder = tmp_path / "text_encoders" / "abc"
    assert started_exports(monkeypatch, folder) == []  # the tests set NO_BACKGROUND_EXPORT

    monkeypatch.delenv("NO_BACKGROUND_EXPORT")
    (command,) = started_exports(monkeypatch, folder)
    assert command[1:3] == ["-m", "retrieval.onnx_text_export"]
    folder.mkdir(parents=True)
    assert started_exports(monkeypatch, folder) == []


def test_the_command_of_the_background_exports(workdir, tmp_path):
    command = [sys.executable, "-m", "retrieval.onnx_text_export", workdir / "runs" / "first", tmp_path]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, timeout=120, capture_output=True)

    assert searcher(workdir, cache=tmp_path).onnx_text_encoder
