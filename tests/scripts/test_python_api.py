"""The Python API: every snippet of docs/python.md runs, and embeddings are those of search."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import ROOT, run_in_process, write_image_folder
from PIL import Image
from tiny_dual_encoders import clip

import api
from config import Config

BLOCK = re.compile(r"^```python( skip-without-onnx)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Return a working folder in which the snippets of docs/python.md were executed in order, and their variables."""
    folder = tmp_path_factory.mktemp("api")
    variables = {}
    AcceleratorState._reset_state(reset_partial_state=True)  # tests of this process train with another precision
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for onnx, code in BLOCK.findall((ROOT / "docs" / "python.md").read_text("utf-8")):
            if onnx:
                pytest.importorskip("onnxscript")
                assert run_in_process("export.py", "runs/first", "--onnx").returncode == 0
            exec(compile(code, "docs/python.md", "exec"), variables)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder, variables


def test_every_snippet_of_the_documentation_runs(workdir):
    _, variables = workdir
    assert variables["cosines"].shape == (2, 2) and variables["run"].name == "first"
    onnx_cosine = float(variables["image_emb"][0] @ variables["text_emb"][0])
    own = variables["model"].embed_sentences(["a red circle"])[0] @ variables["photos"][0]
    assert onnx_cosine == pytest.approx(own, abs=0.03)  # bfloat16 and another resizing


def test_rows_are_unit_vectors_and_files_equal_images(workdir):
    folder, variables = workdir
    model, path = variables["model"], folder / "cache" / "sample" / "Images" / "scene_000.png"

    by_file, by_image = model.embed_photos([path]), model.embed_photos([Image.open(path)])

    np.testing.assert_allclose(np.linalg.norm(by_file, axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(by_file, by_image, atol=1e-6)
    assert by_file.dtype == np.float32 and model.embed_photos([]).shape[0] == 0


def test_evaluate_equals_the_script(workdir, monkeypatch):
    folder, variables = workdir
    monkeypatch.chdir(folder)
    done = run_in_process("evaluate.py", "runs/first")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "runs" / "first" / "metrics.json").read_text())["test"]

    found = variables["model"].evaluate("test")

    assert {key: metrics[key] for key in found} == pytest.approx(found)


def test_search_equals_the_script(workdir, monkeypatch):
    folder, variables = workdir
    monkeypatch.chdir(folder)
    done = run_in_process("infer.py", "a red circle", "--gallery", "cache/sample/Images", "--json", "--top-k", 3)

    matches = variables["model"].search("cache/sample/Images", "a red circle", k=3)

    assert [match["photo"] for match in json.loads(done.stdout)["matches"]] == [str(match.item) for match in matches]


def test_commands_and_snippets_of_the_page_about_sharing_run(workdir, monkeypatch):
    folder, _ = workdir
    monkeypatch.chdir(folder)
    page = (ROOT / "docs" / "sharing.md").read_text("utf-8")
    commands = re.findall(r"^python (?!.*OWNER).*$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        done = run_in_process(*shlex.split(command, comments=True)[1:])
        assert done.returncode == 0, done.stderr
    variables = {}
    for _, code in BLOCK.findall(page):
        exec(compile(code, "docs/sharing.md", "exec"), variables)
    assert variables["cosines"].shape == (1, 1)


def test_pretrained_dual_encoder_is_loaded_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for component in clip():
        component.save_pretrained("clip")
    write_image_folder(tmp_path / "photos", 12)

    model = api.load("clip", device="cpu", precision="float32")

    assert model.embed_sentences(["red"]).shape[0] == 1
    metrics = model.evaluate("test", dataset="photos")
    assert 0 <= metrics["rsum"] <= 600


def test_hubness_column_is_never_in_the_rows(workdir, monkeypatch):
    _, variables = workdir
    model = variables["model"]
    from dataclasses import replace

    from retrieval.csls import QueryBank

    bank = QueryBank(torch.eye(model.config.embed_dim)[:20], torch.eye(model.config.embed_dim)[:20])
    encoder, towers = model._searcher.model()
    monkeypatch.setitem(model._searcher.__dict__, "_loaded", (replace(encoder, query_bank=bank), towers))
    assert model.embed_sentences(["a red circle"]).shape == (1, model.config.embed_dim)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.load("nowhere/at/all"), "nowhere"),
        (lambda: api.train(Config(dataset="no_such_folder")), "no_such_folder"),
        (lambda: api.load(ROOT / "docs"), "neither a run nor a pretrained model"),
    ],
)
def test_mistakes_are_errors_of_one_line(tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_importing_the_api_is_fast():
    code = "import sys, api; assert not {'torch', 'pandas', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
