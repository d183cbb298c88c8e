"""Nested dimensions: the loss is that of a loop over prefixes, and search uses the first values of embeddings alone."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import one_line_error, open_data_of, run_in_process, write_image_folder

from config import Config
from retrieval import onnx_text, onnx_text_export
from retrieval.csls import QueryBank
from retrieval.embedding_store import list_images
from retrieval.encoder import load_encoder
from retrieval.searcher import searcher_for_run
from runtime.run_dir import read_config
from training.objectives import Objective, objective_loss
from training.trainer import train

DIMS = (3, 10)
CAPTION_IMAGE_IDS = [0, 1, 2, 2, 0, 3, 4, 1]  # of 5 images
NO_PROCESS = SimpleNamespace(pid=0)  # in place of the one that exports
OPTIONS = {"device": "cpu", "precision": "float32"}


def loop_loss(images, texts, dims, temperature, alpha, margin):
    """InfoNCE and the hardest-negative triplet loss of one prefix, pair by pair, with gradients."""
    images, texts = ([_normalised(row[:dims]) for row in rows] for rows in (images, texts))
    sim = [[sum(a * b for a, b in zip(image, text, strict=True)) for text in texts] for image in images]
    positive = [[owner == image for owner in CAPTION_IMAGE_IDS] for image in range(len(images))]
    by_image, by_caption, triplets = [], [], []
    for i, row in enumerate(sim):
        total = sum((value / temperature).exp() for value in row).log()
        own = [value / temperature for value, is_own in zip(row, positive[i], strict=True) if is_own]
        by_image.append(total - sum(own) / len(own))
    for m, owner in enumerate(CAPTION_IMAGE_IDS):
        by_caption.append(sum((row[m] / temperature).exp() for row in sim).log() - sim[owner][m] / temperature)
        for negatives in (
            [sim[owner][n] for n in range(len(texts)) if not positive[owner][n]],
            [sim[i][m] for i in range(len(images)) if not positive[i][m]],
        ):
            distance = (2 - 2 * sim[owner][m]).sqrt() - (2 - 2 * max(negatives)).sqrt()
            triplets.append((margin + distance).clamp(min=0))
    main = (sum(by_image) / len(by_image) + sum(by_caption) / len(by_caption)) / 2
    return main + alpha * sum(triplets) / len(triplets)


def _normalised(row):
    return row / sum(value * value for value in row).sqrt()


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_loss_and_gradients_are_the_mean_of_a_loop_over_prefixes(chunk_size):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(rows, 16, generator=generator, dtype=torch.float64) for rows in (5, 8)]
    leaves.append(torch.tensor(0.3, dtype=torch.float64))
    results = []
    for is_loop in (True, False):
        images, texts, temperature = (leaf.clone().requires_grad_() for leaf in leaves)
        units = [torch.nn.functional.normalize(emb, dim=-1) for emb in (images, texts)]
        if is_loop:
            widths = (*DIMS, 16)
            total = sum(loop_loss(*units, dims, temperature, 0.7, 0.2) for dims in widths) / len(widths)
        else:
            terms = objective_loss(
                *units,
                torch.arange(5),
                torch.tensor(CAPTION_IMAGE_IDS),
                Objective(margin=0.2, nested_dims=DIMS),
                temperature=temperature,
                alpha=0.7,
                chunk_size=chunk_size,
            )
            total = terms.total
            torch.testing.assert_close(total, terms.main + 0.7 * terms.triplet)
        total.backward()
        results.append([total.detach(), images.grad, texts.grad, temperature.grad])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


def test_loss_is_the_mean_of_the_losses_without_nested_dims():
    generator = torch.Generator().manual_seed(0)
    units = [torch.nn.functional.normalize(torch.randn(rows, 16, generator=generator), dim=-1) for rows in (5, 8)]
    ids, settings = (torch.arange(5), torch.tensor(CAPTION_IMAGE_IDS)), {"temperature": 0.1, "alpha": 0.5}
    plain = objective_loss(*units, *ids, Objective(), **settings)
    nested = objective_loss(*units, *ids, Objective(nested_dims=(4,)), **settings)
    prefixes = [torch.nn.functional.normalize(emb[:, :4], dim=-1) for emb in units]
    prefix = objective_loss(*prefixes, *ids, Objective(), **settings)
    assert nested.total == torch.stack([plain.total, prefix.total]).mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nested_dims": (8, 16)}, r"--nested-dims must be below --embed-dim \(16\), got 16"),
        ({"nested_dims": (0, 4)}, r"--nested-dims must be numbers from 1 to 65,536"),
        ({"nested_dims": tuple(range(1, 40))}, r"at most 32 of them"),
    ],
)
def test_widths_that_cannot_be_trained_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(embed_dim=16, **settings)


def test_order_and_repetition_of_the_widths_do_not_matter():
    assert Config(nested_dims=(64, 32, 64)).nested_dims == (32, 64)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, image_tower, text_tower):
    """Return a folder with a run in runs/nested, trained with 4 and 8 of 16 values, and photos in holiday/."""
    folder = tmp_path_factory.mktemp("nested")
    write_image_folder(folder / "my_photos", 30)
    write_image_folder(folder / "holiday", 12)
    settings = {"image_encoder": str(image_tower), "text_encoder": str(text_tower), "image_size": 32, "embed_dim": 16}
    settings |= {"unfreeze_image_stages": None, "unfreeze_text_layers": None, "cached_views": 0, "word_dropout": 0.0}
    settings |= {
        "eval_image_scale": 1.0,
        "tta_flip": False,
        "batch_size": 8,
        "epochs": 1,
        "freeze_epochs": 0,
        "num_workers": 0,
        **OPTIONS,
    }
    paths = {"dataset": folder / "my_photos", "runs_dir": folder / "runs", "cache_dir": folder / "cache"}
    config = Config(nested_dims=(8, 4), name="nested", **settings, **{name: str(path) for name, path in paths.items()})
    train(config, open_data_of(config), None)
    return folder


def test_embeddings_are_the_renormalised_prefix(workdir):
    run, sentences = workdir / "runs" / "nested", ["red on the left", "blue"]
    assert read_config(run).nested_dims == (4, 8)
    photos = sorted((workdir / "holiday").rglob("*.png"))[:3]
    rows = {}
    for dims in (None, 8, 4):
        encoder, model = load_encoder(run, embed_dims=dims, **OPTIONS)
        assert model.embed_dim == (dims or 16)
        rows[dims] = encoder.encode_captions(sentences, ""), encoder.encode_images(photos, "")[0]
    for dims in (8, 4):
        for found, whole in zip(rows[dims], rows[None], strict=True):
            expected = torch.nn.functional.normalize(whole[:, :dims], dim=-1)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_galleries_of_other_widths_are_kept_apart(workdir):
    folders, photos = {}, list_images(workdir / "holiday")
    for dims in (None, 8, 4, 16, 8):
        searcher = searcher_for_run(workdir / "runs" / "nested", cache_dir=workdir / "c", embed_dims=dims, **OPTIONS)
        gallery = searcher.gallery(photos)
        assert gallery.embeddings.shape == (12, dims or 16)
        folders.setdefault(gallery.store, []).append(dims)
    assert list(folders.values()) == [[None, 16], [8, 8], [4]]  # 16 is the whole width


def test_scripts_use_a_trained_width_and_refuse_others_in_one_line(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    run = ["--run", "runs/nested", "--device", "cpu"]
    found = run_in_process("infer.py", "red", "--gallery", "holiday", "--embed-dims", 4, *run, "--json")
    assert found.returncode == 0 and len(json.loads(found.stdout)["matches"]) == 8, found.stderr
    for arguments in (
        ["infer.py", "red", "--gallery", "holiday", "--embed-dims", 5, *run],
        ["evaluate.py", "runs/nested", "--embed-dims", 5],
        ["export.py", "runs/nested", "--onnx", "--embed-dims", 5],
    ):
        line = one_line_error(run_in_process(*arguments))
        assert "--embed-dims 5: runs/nested was trained with --nested-dims 4 8" in line
    for arguments in (
        ["infer.py", "red", "--gallery", "holiday", "--embed-dims", 4, "--model", "clip"],
        ["evaluate.py", "--model", "clip", "--dataset", "my_photos", "--embed-dims", 4],
        ["export.py", "runs/nested", "--share", "out", "--embed-dims", 4],
        ["evaluate.py", "runs/nested", "--report", "--embed-dims", 4],
    ):
        assert "--embed-dims" in one_line_error(run_in_process(*arguments))
    done = run_in_process("evaluate.py", "runs/nested", "--embed-dims", 4, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "test, 4 values" in json.loads((workdir / "runs/nested/metrics.json").read_text("utf-8"))


def test_exported_towers_have_the_width(workdir, monkeypatch):
    for library in onnx_text.EXPORT_LIBRARIES:
        pytest.importorskip(library)
    import onnxruntime

    monkeypatch.chdir(workdir)
    done = run_in_process("export.py", "runs/nested", "--onnx", "--embed-dims", 4)
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession("runs/nested/onnx-4/image.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": np.zeros((2, 3, 32, 32), np.uint8)})[0].shape == (2, 4)

    ids = np.ones((2, 3), np.int64)
    session = onnxruntime.InferenceSession("runs/nested/onnx-4/text.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"input_ids": ids, "attention_mask": ids})[0].shape == (2, 4)


def test_text_tower_of_each_width_is_exported_for_itself(workdir, monkeypatch):
    folders, commands = set(), []
    for dims in (None, 4):
        searcher = searcher_for_run(workdir / "runs" / "nested", cache_dir=workdir / "c", embed_dims=dims, **OPTIONS)
        folders.add(searcher.text_encoder_folder)
        monkeypatch.delenv("NO_BACKGROUND_EXPORT", raising=False)
        monkeypatch.setattr(onnx_text, "EXPORT_LIBRARIES", ())
        monkeypatch.setattr(onnx_text.os, "setpriority", lambda *_: None)
        monkeypatch.setattr(onnx_text.subprocess, "Popen", lambda command, **_: commands.append(command) or NO_PROCESS)
        onnx_text.export_in_background(
            workdir / "runs" / "nested", workdir / "c", searcher.text_encoder_folder, embed_dims=dims
        )
    assert len(folders) == 2 and commands[1] == [*commands[0], "4"]
    monkeypatch.setattr(sys, "argv", commands[1][2:])
    prepared = []
    monkeypatch.setattr(onnx_text_export, "prepare", prepared.append)
    onnx_text_export.main()
    assert prepared[0].text_encoder_folder == searcher.text_encoder_folder


def test_run_without_nested_dims_refuses_a_part_of_its_embeddings(tiny_config):
    config = tiny_config()
    run = train(config, open_data_of(config), None)
    with pytest.raises(ValueError, match=r"--embed-dims 4: .* was trained without --nested-dims"):
        load_encoder(run, embed_dims=4, **OPTIONS)


def test_query_bank_of_a_prefix_has_unit_rows():
    bank = QueryBank(*(torch.nn.functional.normalize(torch.randn(rows, 16), dim=-1) for rows in (5, 9)))
    truncated = bank.truncated(4)
    for emb, whole in ((truncated.image_emb, bank.image_emb), (truncated.text_emb, bank.text_emb)):
        torch.testing.assert_close(emb, torch.nn.functional.normalize(whole[:, :4], dim=-1))
