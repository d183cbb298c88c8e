"""CSLS with a query bank: the formula against plain code, and its use in evaluation and search."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import run_in_process, write_image_folder

from models.checkpoint import load_state
from retrieval import csls
from retrieval.csls import QueryBank, csls_query, load_query_bank, make_query_bank
from retrieval.embedding_store import list_images
from retrieval.encoder import load_encoder
from retrieval.metrics import retrieval_metrics

TRAINING = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]


def unit_rows(seed, count, dim=8):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def hubness(emb, query_emb):
    return (emb @ query_emb.T).sort(1, descending=True).values[:, : csls.NEIGHBOURS].mean(1)


@pytest.mark.parametrize("size", [4, 10, 300])
def test_csls_is_the_cosine_minus_half_the_mean_cosine_with_the_nearest_of_the_query_bank(size):
    query_bank = QueryBank(unit_rows(1, size), unit_rows(2, size))
    image_emb, text_emb = unit_rows(3, 7), unit_rows(4, 5)
    sim = image_emb @ text_emb.T
    image_hubness, text_hubness = hubness(image_emb, query_bank.text_emb), hubness(text_emb, query_bank.image_emb)
    images, captions = query_bank.csls_images(image_emb), query_bank.csls_captions(text_emb)
    torch.testing.assert_close(csls_query(text_emb) @ images.T, sim.T - image_hubness / 2)
    torch.testing.assert_close(csls_query(image_emb) @ captions.T, sim - text_hubness / 2)
    torch.testing.assert_close(csls_query(text_emb, 0.0) @ images.T, sim.T)
    images, captions = query_bank.csls_pair(image_emb, text_emb)
    torch.testing.assert_close(images @ captions.T, sim - image_hubness[:, None] / 2 - text_hubness / 2)


def test_csls_ranks_the_correct_images_above_a_hub():
    hub = F.normalize(torch.ones(1, 40), dim=1)
    image_emb = F.normalize(unit_rows(5, 30, 40) - unit_rows(5, 30, 40) @ hub.T * hub, dim=1)  # orthogonal to the hub
    text_emb = F.normalize(1.2 * hub + image_emb, dim=1)  # every caption is closer to the hub than to its image
    query_bank = QueryBank(image_emb[:15], text_emb[:15])
    image_emb, text_emb = torch.cat([image_emb[15:], hub]), text_emb[15:]
    by_cosine = retrieval_metrics(image_emb, text_emb, torch.arange(15))
    by_csls = retrieval_metrics(*query_bank.csls_pair(image_emb, text_emb), torch.arange(15))
    assert by_cosine["t2i_R@1"] == 0 and by_csls["t2i_R@1"] == 100


def test_a_query_bank_has_a_limited_number_of_images_with_all_their_captions():
    image_emb, caption_image_ids = unit_rows(6, 2500), torch.arange(2500).repeat_interleave(2)
    text_emb = image_emb[caption_image_ids]
    state = make_query_bank(image_emb, text_emb, caption_image_ids)
    assert len(state["image_emb"]) == csls.MAX_BANK_IMAGES and len(state["text_emb"]) == 2 * csls.MAX_BANK_IMAGES
    torch.testing.assert_close(state["image_emb"].repeat_interleave(2, 0), state["text_emb"])
    assert state["image_emb"].unique(dim=0).shape == state["image_emb"].shape
    query_bank = load_query_bank(state)
    assert query_bank.image_emb.dtype == torch.float32 and (query_bank.image_emb - state["image_emb"]).abs().max() == 0
    n = csls.MIN_BANK_IMAGES - 1
    assert make_query_bank(image_emb[:n], text_emb[: 2 * n], caption_image_ids[: 2 * n]) is None
    assert load_query_bank(None) is None


@pytest.fixture
def workdir(tmp_path, image_tower, text_tower, monkeypatch):
    """Return the working folder, with photos and a run whose checkpoint stores a query bank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(csls, "MIN_BANK_IMAGES", 2)
    write_image_folder(tmp_path / "my_photos", 30)
    flags = ["--dataset", "my_photos", "--image-encoder", image_tower, "--text-encoder", text_tower]
    done = run_in_process("train.py", *flags, *TRAINING, "--epochs", 1, "--name", "run")
    assert done.returncode == 0, done.stderr
    return tmp_path


def evaluate(*flags):
    return run_in_process("evaluate.py", "runs/run", *flags, "--precision", "float32").stdout


def infer(*flags):
    """Return the matches of infer.py's line of JSON."""
    return json.loads(run_in_process("infer.py", *flags, "--json", "--precision", "float32").stdout)["matches"]


def test_a_run_stores_a_query_bank_and_evaluation_uses_it_except_on_the_split_it_was_made_from(workdir):
    state = load_state(workdir / "runs/run/best.pt")["query_bank"]
    assert state["image_emb"].shape == (2, 16) and state["text_emb"].shape == (4, 16)

    assert evaluate().count("rsum") == 2
    assert evaluate("--split", "val").count("rsum") == 1
    measured = json.loads((workdir / "runs/run/metrics.json").read_text())
    assert list(measured) == ["test", "test, with CSLS", "val"]
    assert {path.name for path in (workdir / "runs/run").glob("metrics-*.png")} == {
        "metrics-test.png",
        "metrics-test-with-CSLS.png",
        "metrics-val.png",
    }
    for split, tables in (("val", 1), ("test", 2)):  # the run's own data set, given by name
        assert evaluate("--dataset", "my_photos", "--split", split).count("rsum") == tables
    config = json.loads((workdir / "runs/run/config.json").read_text())  # a named data set in a folder, with --data-dir
    config |= {"dataset": "flickr8k", "data_dir": config["dataset"]}
    (workdir / "runs/run/config.json").write_text(json.dumps(config))
    assert evaluate("--dataset", "my_photos", "--split", "val").count("rsum") == 1


def test_search_applies_csls_across_modalities_only(workdir):
    encoder, _ = load_encoder(workdir / "runs/run", device="cpu", precision="float32")
    paths = [workdir / "my_photos" / name for name in list_images(workdir / "my_photos").stamps]
    image_emb, _ = encoder.encode_images(paths, "")
    (sentence_emb,) = encoder.encode_captions(["red on the left"], "")
    expected = image_emb @ sentence_emb - hubness(image_emb, encoder.query_bank.text_emb) / 2
    matches = infer("red on the left", "--gallery", "my_photos", "--top-k", 30)
    scores = {match["photo"].rpartition("/")[2]: match["score"] for match in matches}
    assert scores == pytest.approx(
        {path.name: score.item() for path, score in zip(paths, expected, strict=True)}, abs=2e-3
    )

    photo = infer("--image", paths[3], "--gallery", "my_photos")[0]
    assert photo["photo"].endswith(paths[3].name) and photo["score"] == pytest.approx(1, abs=2e-3)
    caption = infer("--image", paths[3], "--top-k", 1)[0]
    text_emb = encoder.encode_captions([caption["caption"]], "")
    best = (image_emb[3] @ text_emb.T - hubness(text_emb, encoder.query_bank.image_emb) / 2).item()
    assert caption["score"] == pytest.approx(best, abs=2e-3)
    same_caption = infer(caption["caption"], "--find", "captions")[0]
    assert same_caption["score"] == pytest.approx(1, abs=2e-3)
