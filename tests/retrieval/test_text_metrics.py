"""Metrics where any photo with the caption's text is right agree with their definition in plain loops."""

import statistics

import pytest
import torch
import torch.nn.functional as F

from retrieval import text_metrics
from retrieval.metrics import retrieval_metrics
from retrieval.text_metrics import count_repeated, retrieval_metrics_by_text


def integers(*shape, seed=0, high=2):
    """Return integers as floats: their products are exact, so that ties are ties in every chunk."""
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def draw(*shape, below, seed):
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def is_right(image, caption, caption_image_ids, text_ids, photo_ids):
    """Return whether a photo, or one with the same bytes, has a caption with the text of this caption."""
    return any(
        photo_ids[other_image] == photo_ids[image] and text == text_ids[caption]
        for other_image, text in zip(caption_image_ids, text_ids, strict=True)
    )


def metrics_by_loops(image_emb, text_emb, caption_image_ids, text_ids, photo_ids):
    sim = (image_emb @ text_emb.T).tolist()
    ids = caption_image_ids.tolist(), text_ids.tolist(), photo_ids.tolist()
    right = [[is_right(i, m, *ids) for m in range(len(text_emb))] for i in range(len(image_emb))]

    def ranking(scores, hits):
        return [
            hits[c] for c in sorted(range(len(scores)), key=lambda c: (-scores[c], hits[c]))
        ]  # ties: wrong ones first

    rows = {
        "i2t": [ranking(sim[i], right[i]) for i in range(len(sim)) if any(right[i])],
        "t2i": [ranking([row[m] for row in sim], [row[m] for row in right]) for m in range(len(text_emb))],
    }
    result = {}
    for direction, lists in rows.items():
        ranks = [1 + hits.index(True) for hits in lists]
        for k in (1, 5, 10):
            result[f"{direction}_R@{k}"] = 100 * sum(rank <= k for rank in ranks) / len(ranks)
        precisions = [sum(sum(hits[: r + 1]) / (r + 1) for r in range(min(10, len(hits))) if hits[r]) for hits in lists]
        totals = [total / min(10, sum(hits)) for total, hits in zip(precisions, lists, strict=True)]
        result[f"{direction}_mAP@10"] = 100 * sum(totals) / len(totals)
        result[f"{direction}_medR"] = statistics.median(ranks)
    return result | {"rsum": sum(value for name, value in result.items() if "_R@" in name)}


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 1000])
@pytest.mark.parametrize(("images", "captions", "texts", "photos"), [(17, 41, 6, 17), (23, 30, 30, 9), (9, 60, 2, 4)])
def test_metrics_by_text_match_loops_with_ties_and_copies(images, captions, texts, photos, chunk_size):
    for seed in range(3):
        image_emb, text_emb = integers(images, 3, seed=seed), integers(captions, 3, seed=seed + 9)
        caption_image_ids = draw(captions, below=images, seed=seed)  # some images have no caption
        text_ids, photo_ids = draw(captions, below=texts, seed=seed + 1) * 7, draw(images, below=photos, seed=seed + 2)
        expected = metrics_by_loops(image_emb, text_emb, caption_image_ids, text_ids, photo_ids)
        inputs = image_emb, text_emb, caption_image_ids, text_ids, photo_ids
        found = retrieval_metrics_by_text(*inputs, chunk_size=chunk_size)
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("chunk_size", [5, 16, 1024])
def test_without_repeats_both_readings_are_equal(chunk_size):
    image_emb, text_emb = F.normalize(integers(30, 8), dim=1), F.normalize(integers(75, 8, seed=1) + 0.1, dim=1)
    caption_image_ids = draw(75, below=30, seed=2)
    by_photo = retrieval_metrics(image_emb, text_emb, caption_image_ids, chunk_size=chunk_size)
    by_text = retrieval_metrics_by_text(
        image_emb, text_emb, caption_image_ids, torch.arange(75).flip(0), chunk_size=chunk_size
    )
    assert by_text == pytest.approx(by_photo)


def test_a_caption_at_ten_photos_is_right_for_each_of_them():
    classes = F.one_hot(torch.arange(4).repeat_interleave(10)).float()
    own = torch.arange(40)
    by_text = retrieval_metrics_by_text(classes, classes, own, own // 10)
    assert by_text["rsum"] == 600 and by_text["i2t_mAP@10"] == by_text["t2i_mAP@10"] == 100
    assert retrieval_metrics(classes, classes, own)["t2i_R@1"] == 0  # the other nine photos tie


def test_a_collapsed_model_scores_nothing_by_text_either():
    ones = torch.ones(40, 3) / 3**0.5
    metrics = retrieval_metrics_by_text(ones, ones, torch.arange(40), torch.arange(40) // 2)
    assert metrics["rsum"] == 0 and metrics["t2i_medR"] == 39


def test_no_block_is_larger_than_the_chunk_size(monkeypatch):
    shapes, original = [], text_metrics.score_block
    monkeypatch.setattr(
        text_metrics, "score_block", lambda *args: shapes.append(original(*args).shape) or original(*args)
    )
    retrieval_metrics_by_text(
        integers(20, 3), integers(50, 3), draw(50, below=20, seed=1), torch.zeros(50), chunk_size=8
    )
    assert max(rows for rows, _ in shapes) == max(columns for _, columns in shapes) == 8


def test_captions_at_several_photos_are_counted_with_copies_of_photos():
    images, texts = torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([0, 0, 1, 2, 2, 3])
    assert count_repeated(images, texts, torch.arange(4)) == (2, 6, 0)  # text 0 is at one photo, twice
    assert count_repeated(images, texts, torch.tensor([0, 1, 2, 0])) == (5, 6, 1)
    assert count_repeated(images, texts, torch.arange(4)).share == pytest.approx(1 / 3)
