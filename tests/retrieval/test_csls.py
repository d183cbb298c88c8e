"""Hubs: what is near to everything is not found for everything, in evaluation and in search."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import run_in_process, write_image_folder

from models.checkpoint import load_state
from retrieval import csls as hubs_module
from retrieval.csls import QueryBank, load_query_bank, make_query_bank, query
from retrieval.embedding_store import list_images
from retrieval.encoder import load_encoder
from retrieval.metrics import retrieval_metrics

TRAINING = ["--image-size", 32, "--embed-dim", 16, "--batch-size", 8, "--precision", "float32", "--num-workers", 0]


def rows(seed, count, dim=8):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def hubness(emb, query_bank):
    return (emb @ query_bank.T).sort(1, descending=True).values[:, : hubs_module.NEIGHBOURS].mean(1)


@pytest.mark.parametrize("size", [4, 10, 300])
def test_scores_are_cosines_less_half_of_the_mean_of_the_nearest_in_the_bank(size):
    query_bank, photos, captions = QueryBank(rows(1, size), rows(2, size)), rows(3, 7), rows(4, 5)
    cosines, of_photos, of_captions = (
        photos @ captions.T,
        hubness(photos, query_bank.text_emb),
        hubness(captions, query_bank.image_emb),
    )
    torch.testing.assert_close(query(captions) @ query_bank.photos(photos).T, cosines.T - of_photos / 2)
    torch.testing.assert_close(query(photos) @ query_bank.captions(captions).T, cosines - of_captions / 2)
    torch.testing.assert_close(query(captions, 0.0) @ query_bank.photos(photos).T, cosines.T)
    image_emb, text_emb = query_bank.both(photos, captions)
    torch.testing.assert_close(image_emb @ text_emb.T, cosines - of_photos[:, None] / 2 - of_captions / 2)


def test_a_photo_near_to_all_captions_no_longer_hides_the_right_ones():
    common = F.normalize(torch.ones(1, 40), dim=1)
    own = F.normalize(rows(5, 30, 40) - rows(5, 30, 40) @ common.T * common, dim=1)
    captions = F.normalize(1.2 * common + own, dim=1)  # all say the same, and each something of its own
    query_bank, photos, captions = QueryBank(own[:15], captions[:15]), torch.cat([own[15:], common]), captions[15:]
    plain = retrieval_metrics(photos, captions, torch.arange(15))
    corrected = retrieval_metrics(*query_bank.both(photos, captions), torch.arange(15))
    assert plain["t2i_R@1"] == 0 and corrected["t2i_R@1"] == 100


def test_a_bank_holds_so_many_photos_with_their_captions(monkeypatch):
    photos, owner = rows(6, 2500), torch.arange(2500).repeat_interleave(2)
    captions = photos[owner]
    kept = make_query_bank(photos, captions, owner)
    assert len(kept["image_emb"]) == hubs_module.MOST_PHOTOS and len(kept["text_emb"]) == 2 * hubs_module.MOST_PHOTOS
    torch.testing.assert_close(kept["image_emb"].repeat_interleave(2, 0), kept["text_emb"])
    assert kept["image_emb"].unique(dim=0).shape == kept["image_emb"].shape
    query_bank = load_query_bank(kept)
    assert query_bank.image_emb.dtype == torch.float32 and (query_bank.image_emb - kept["image_emb"]).abs().max() == 0
    few = hubs_module.FEWEST_PHOTOS - 1
    assert (
        make_query_bank(photos[:few], captions[: 2 * few], owner[: 2 * few]) is None and load_query_bank(None) is None
    )


@pytest.fixture
def place(tmp_path, image_tower, text_tower, monkeypatch):
    """The working folder, with photos and a run that keeps a bank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hubs_module, "FEWEST_PHOTOS", 2)
    write_image_folder(tmp_path / "my_photos", 30)
    words = ["--dataset", "my_photos", "--image-encoder", image_tower, "--text-encoder", text_tower]
    done = run_in_process("train.py", *words, *TRAINING, "--epochs", 1, "--name", "run")
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_a_run_keeps_a_bank_and_evaluation_uses_it_for_other_photos(place):
    kept = load_state(place / "runs/run/best.pt")["query_bank"]
    assert kept["image_emb"].shape == (2, 16) and kept["text_emb"].shape == (4, 16)

    assert run_in_process("evaluate.py", "runs/run", "--precision", "float32").stdout.count("rsum") == 2
    assert (
        run_in_process("evaluate.py", "runs/run", "--precision", "float32", "--split", "val").stdout.count("rsum") == 1
    )
    measured = json.loads((place / "runs/run/metrics.json").read_text())
    assert list(measured) == ["test", "test, corrected for hubs", "val"]
    assert {path.name for path in (place / "runs/run").glob("metrics-*.png")} == {
        "metrics-test.png",
        "metrics-test-corrected-for-hubs.png",
        "metrics-val.png",
    }
    for split, lines in (("val", 1), ("test", 2)):  # the same photos by their name
        done = run_in_process(
            "evaluate.py", "runs/run", "--dataset", "my_photos", "--precision", "float32", "--split", split
        )
        assert done.stdout.count("rsum") == lines
    settings = json.loads((place / "runs/run/config.json").read_text())  # as of a named data set that lies in a folder
    settings |= {"dataset": "flickr8k", "data_dir": settings["dataset"]}
    (place / "runs/run/config.json").write_text(json.dumps(settings))
    done = run_in_process(
        "evaluate.py", "runs/run", "--dataset", "my_photos", "--precision", "float32", "--split", "val"
    )
    assert done.stdout.count("rsum") == 1


def test_search_ranks_by_the_bank_what_is_of_the_other_kind(place):
    encoder, _ = load_encoder(place / "runs/run", device="cpu", precision="float32")
    paths = [place / "my_photos" / name for name in list_images(place / "my_photos").stamps]
    photos, _ = encoder.encode_images(paths, "")
    (sentence,) = encoder.encode_captions(["red on the left"], "")
    expected = photos @ sentence - hubness(photos, encoder.query_bank.text_emb) / 2
    found = json.loads(
        run_in_process(
            "infer.py", "red on the left", "--gallery", "my_photos", "--json", "--precision", "float32", "--top-k", 30
        ).stdout
    )
    scores = {match["photo"].rpartition("/")[2]: match["score"] for match in found["matches"]}
    assert scores == pytest.approx(
        {path.name: score.item() for path, score in zip(paths, expected, strict=True)}, abs=2e-3
    )

    like = json.loads(
        run_in_process(
            "infer.py", "--image", paths[3], "--gallery", "my_photos", "--json", "--precision", "float32"
        ).stdout
    )["matches"][0]
    assert like["photo"].endswith(paths[3].name) and like["score"] == pytest.approx(1, abs=2e-3)
    captions = json.loads(
        run_in_process("infer.py", "--image", paths[3], "--json", "--precision", "float32", "--top-k", 1).stdout
    )["matches"]
    emb = encoder.encode_captions([captions[0]["caption"]], "")
    best = (photos[3] @ emb.T - hubness(emb, encoder.query_bank.image_emb) / 2).item()
    assert captions[0]["score"] == pytest.approx(best, abs=2e-3)
    same = json.loads(
        run_in_process(
            "infer.py", captions[0]["caption"], "--find", "captions", "--json", "--precision", "float32"
        ).stdout
    )["matches"][0]
    assert same["score"] == pytest.approx(1, abs=2e-3)
