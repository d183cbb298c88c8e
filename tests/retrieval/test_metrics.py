"""Chunked search and retrieval metrics agree with their definitions in plain loops, ties included."""

import math
import statistics
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retrieval import exact_search
from retrieval.bf16_prefilter import Bf16Prefilter
from retrieval.metrics import retrieval_metrics, top_k
from runtime.mmap_store import open_embeddings, write_embeddings

METRICS = {
    f"{direction}_{name}" for direction in ("i2t", "t2i") for name in ("R@1", "R@5", "R@10", "mAP@10", "medR")
} | {"rsum"}


def integers(*shape, seed=0, high=2):
    """Return integers as floats: their products are exact, so that ties are ties in every chunk."""
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["float32", "prefilter"])
def search(request, monkeypatch):
    """Run a test without and with the bfloat16 prefilter, whatever this CPU supports."""
    monkeypatch.setattr(exact_search, "prefilter_pays", lambda *_: request.param == "prefilter")
    return request.param


def top_k_by_sorting(queries, gallery, k):
    rows = []
    for scores in (queries @ gallery.T).tolist():
        rows.append(sorted(((-score, index) for index, score in enumerate(scores)))[:k])
    scores, indices = ([[pair[i] for pair in row] for row in rows] for i in (0, 1))
    return -torch.tensor(scores), torch.tensor(indices)


def metrics_by_loops(image_emb, text_emb, caption_image_ids, ks=(1, 5, 10)):
    sim = (image_emb.double() @ text_emb.double().T).tolist()
    caption_image_ids = caption_image_ids.tolist()

    def rank(scores, relevant):
        """Return for each candidate, best first, whether it is relevant; at equal scores the irrelevant come first."""
        order = sorted(range(len(scores)), key=lambda c: (-round(scores[c], 9), c in relevant))
        return [c in relevant for c in order]

    captions_of = {
        image: {caption for caption, own_image in enumerate(caption_image_ids) if own_image == image}
        for image in set(caption_image_ids)
    }
    rankings = {
        "i2t": [rank(sim[image], captions) for image, captions in captions_of.items()],
        "t2i": [rank([row[caption] for row in sim], {image}) for caption, image in enumerate(caption_image_ids)],
    }
    result = {}
    for direction, lists in rankings.items():
        ranks = [1 + hits.index(True) for hits in lists]
        for k in ks:
            result[f"{direction}_R@{k}"] = 100 * sum(rank <= k for rank in ranks) / len(ranks)
        precisions = [sum(sum(hits[: r + 1]) / (r + 1) for r in range(min(10, len(hits))) if hits[r]) for hits in lists]
        average_precisions = [total / min(10, sum(hits)) for total, hits in zip(precisions, lists, strict=True)]
        result[f"{direction}_mAP@10"] = 100 * sum(average_precisions) / len(average_precisions)
        result[f"{direction}_medR"] = statistics.median(ranks)
    result["rsum"] = sum(value for name, value in result.items() if "_R@" in name)
    return result


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 70, 1000])
@pytest.mark.parametrize("k", [1, 6, 69, 70, 200])
def test_top_k_is_a_stable_sort_for_any_chunk_size(k, chunk_size, search):
    for seed in range(3):
        queries, gallery = integers(9, 3, seed=seed, high=1), integers(70, 3, seed=seed + 50, high=1)
        scores, indices = top_k(queries, gallery, k, chunk_size=chunk_size)
        expected_scores, expected_indices = top_k_by_sorting(queries, gallery, k)
        assert indices.tolist() == expected_indices.tolist()
        assert scores.tolist() == expected_scores.tolist()


@pytest.mark.parametrize("chunk_size", [3, 32, 1024])
def test_top_k_equals_torch_topk_for_distinct_scores(chunk_size, search):
    queries, gallery = F.normalize(normals(20, 16), dim=1), F.normalize(normals(333, 16, seed=1), dim=1)
    expected = (queries @ gallery.T).topk(10)
    scores, indices = top_k(queries, gallery, 10, chunk_size=chunk_size)
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(indices, expected.indices)


def test_equal_gallery_rows_tie_across_a_ragged_last_chunk(search):
    rows = F.normalize(normals(10, 64), dim=1)
    _, indices = top_k(rows, rows.repeat(3, 1), 3, chunk_size=8)
    assert indices.tolist() == [[i, i + 10, i + 20] for i in range(10)]


def test_plus_and_minus_zero_tie(search):
    queries, gallery = torch.tensor([[0.0], [1.0]]), torch.tensor([[-1.0], [1.0], [-0.0], [0.0]])
    assert top_k(queries, gallery, 4, chunk_size=3)[1].tolist() == [[0, 1, 2, 3], [1, 2, 3, 0]]


def test_infinite_scores_are_ordered_and_nan_is_last(search):
    gallery = torch.tensor([[torch.nan], [1.0], [torch.inf], [-torch.inf], [-torch.nan], [torch.inf], [-3e38]])
    for chunk_size in (1, 2, 3, 7):
        scores, indices = top_k(torch.ones(1, 1), gallery, 7, chunk_size=chunk_size)
        assert indices.tolist() == [[2, 5, 1, 6, 0, 3, 4]]
        assert scores[0, -3:].tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_top_k_of_a_memory_mapped_gallery_equals_that_of_a_tensor(dtype, tmp_path, search):
    gallery, queries = integers(100, 6, seed=1), integers(5, 6)
    np.save(tmp_path / "gallery.npy", gallery.numpy().astype(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = top_k(queries, open_embeddings(tmp_path / "gallery.npy"), 9, chunk_size=16)
    for actual, expected in zip(found, top_k(queries, gallery, 9), strict=True):
        assert torch.equal(actual, expected)


def test_embeddings_written_in_blocks_are_read_back(tmp_path):
    blocks = [np.full((rows, 3), value) for rows, value in ((2, 0.0), (3, 1.5), (0, 9.0), (2, 0.0))]
    write_embeddings(tmp_path / "rows.npy", blocks, 3)
    assert open_embeddings(tmp_path / "rows.npy").tolist() == [[1.5 * (2 <= row < 5)] * 3 for row in range(7)]


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_embeddings_file_raises_a_one_line_error(tmp_path, size):
    np.save(tmp_path / "rows.npy", np.ones((9, 4), np.float16))
    whole = (tmp_path / "rows.npy").read_bytes()
    (tmp_path / "rows.npy").write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"rows\.npy is truncated or damaged .*encode again"):
        open_embeddings(tmp_path / "rows.npy")


@pytest.mark.parametrize("rows", [np.ones((3, 4)), np.ones(3, np.float16), np.ones((2, 2), np.int64)])
def test_file_of_other_data_is_refused(tmp_path, rows):
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(ValueError, match=r"contains no embeddings: expected .*, found"):
        open_embeddings(tmp_path / "rows.npy")
    with pytest.raises(FileNotFoundError, match=r"other\.npy"):
        open_embeddings(tmp_path / "other.npy")


def test_top_k_never_computes_more_than_a_chunk_of_scores(monkeypatch, search):
    widths, matmul = [], torch.Tensor.matmul
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: widths.append(b.shape[1]) or matmul(a, b))
    top_k(normals(4, 8), normals(100, 8), 5, chunk_size=16)
    assert max(widths) <= 16
    assert len(widths) == math.ceil(100 / 16)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0])
def test_scores_closer_than_bfloat16_precision_are_ranked_correctly(spread, scale, search):
    """Rows differ by less than the rounding of bfloat16, at any norm; the best 10 are those of float64."""
    center = F.normalize(normals(1, 64), dim=1)
    gallery = (scale * (center + spread * normals(3000, 64, seed=1))).half()
    queries = center + 0.1 * normals(30, 64, seed=2)
    scores, indices = top_k(queries, gallery, 10, chunk_size=256)
    expected = queries.double() @ gallery.double().T
    torch.testing.assert_close(scores.double(), expected.topk(10).values, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(expected.gather(1, indices), scores.double(), rtol=1e-5, atol=1e-6 * scale)


def test_prefilter_passes_every_pair_of_the_best_k():
    queries, gallery = 3 * normals(50, 32), normals(500, 32, seed=1)
    exact = queries @ gallery.T
    for kth in (torch.full((50, 1), torch.nan), exact.topk(5).values[:, -1:], exact.amin(1, keepdim=True)):
        query, row = Bf16Prefilter(queries, 5).candidates(gallery, 0, kth)
        passed = torch.zeros_like(exact, dtype=torch.bool)
        passed[query, row] = True
        best = torch.zeros_like(passed).scatter(1, exact.topk(5).indices, True)
        assert passed[best & ~(exact <= kth)].all()
        assert query.tolist() == sorted(query.tolist())
    assert passed.all()  # the last threshold is each query's lowest score


def test_prefilter_passes_few_pairs_and_is_ineffective_for_identical_rows():
    queries, gallery = F.normalize(normals(50, 64), dim=1), F.normalize(normals(5000, 64, seed=1), dim=1)
    prefilter = Bf16Prefilter(queries, 5)
    prefilter.candidates(gallery, 0, torch.full((50, 1), torch.nan))
    assert not prefilter.is_ineffective()
    assert prefilter.num_passed < 50 * 5 * 3
    prefilter = Bf16Prefilter(queries, 5)
    prefilter.candidates(gallery[:1].repeat(5000, 1), 0, torch.full((50, 1), torch.nan))
    assert prefilter.is_ineffective()


def test_collapsed_gallery_returns_the_lowest_indices(search):
    rows = F.normalize(normals(1, 64), dim=1).repeat(2000, 1)
    assert top_k(rows[:9], rows, 3, chunk_size=128)[1].tolist() == [[0, 1, 2]] * 9


def test_empty_gallery_or_no_queries_return_empty_results(search):
    scores, indices = top_k(torch.ones(3, 2), torch.ones(0, 2), 5)
    assert scores.shape == indices.shape == (3, 0)
    scores, indices = top_k(torch.ones(0, 2), torch.ones(4, 2), 3)
    assert scores.shape == indices.shape == (0, 3)
    assert (scores.dtype, indices.dtype) == (torch.float32, torch.int64)


def test_top_k_scores_in_float32_for_bfloat16_inputs_under_autocast_and_without_gradients(search):
    queries, gallery = integers(4, 8).requires_grad_(), integers(30, 8, seed=1)
    expected = top_k(queries.detach(), gallery, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, indices = top_k(queries.bfloat16(), gallery.bfloat16(), 5, chunk_size=4)
    assert torch.equal(scores, expected[0])
    assert torch.equal(indices, expected[1])
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(5, 3), 0), "k is 0"),
        ((torch.ones(2, 3), torch.ones(5, 3), 1, 0), "chunk_size is 0"),
        ((torch.ones(2, 3), torch.ones(5, 4), 1), r"\(2, 3\) and \(5, 4\)"),
        ((torch.ones(3), torch.ones(5, 3), 1), r"\(3,\)"),
    ],
)
def test_top_k_names_the_invalid_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_k(*arguments)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_follow_their_definitions_for_any_chunk_size(seed, chunk_size):
    """13 images with 0 to 12 captions each in random order, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    caption_image_ids = torch.randint(0, 13, (40,), generator=generator)
    caption_image_ids[:12] = seed  # more relevant captions than the 10 that AP@10 considers
    caption_image_ids = caption_image_ids[torch.randperm(40, generator=generator)]
    image_emb = integers(13, 4, seed=seed)
    text_emb = image_emb[caption_image_ids] + integers(40, 4, seed=seed + 9, high=1)
    metrics = retrieval_metrics(image_emb, text_emb, caption_image_ids, chunk_size=chunk_size)
    assert metrics == pytest.approx(metrics_by_loops(image_emb, text_emb, caption_image_ids))
    assert set(metrics) == METRICS
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize("chunk_size", [5, 64])
def test_metrics_of_unit_embeddings_follow_their_definitions(chunk_size):
    caption_image_ids = torch.arange(30).repeat_interleave(3)
    image_emb = F.normalize(normals(30, 16), dim=1)
    text_emb = F.normalize(image_emb[caption_image_ids] + 0.5 * normals(90, 16, seed=1), dim=1)
    metrics = retrieval_metrics(image_emb, text_emb, caption_image_ids, ks=(2, 3), chunk_size=chunk_size)
    assert metrics == pytest.approx(metrics_by_loops(image_emb, text_emb, caption_image_ids, ks=(2, 3)))
    assert {"i2t_R@2", "t2i_R@3"} <= set(metrics)


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 1024])
@pytest.mark.parametrize("direction", [torch.ones(1, 1000), normals(1, 300), normals(1, 768).abs()])
def test_collapsed_model_scores_zero(direction, chunk_size):
    emb, caption_image_ids = F.normalize(direction, dim=1), torch.arange(50).repeat_interleave(2)
    metrics = retrieval_metrics(emb.repeat(50, 1), emb.repeat(100, 1), caption_image_ids, chunk_size=chunk_size)
    assert metrics["rsum"] == metrics["i2t_mAP@10"] == metrics["t2i_mAP@10"] == 0
    assert (metrics["i2t_medR"], metrics["t2i_medR"]) == (99, 50)


def test_perfect_model_scores_100_percent():
    caption_image_ids = torch.arange(6).repeat_interleave(2)
    metrics = retrieval_metrics(torch.eye(6), torch.eye(6)[caption_image_ids], caption_image_ids)
    assert metrics.pop("rsum") == pytest.approx(600)
    assert metrics.pop("i2t_medR") == metrics.pop("t2i_medR") == 1
    assert set(metrics.values()) == {100}


def test_sibling_caption_never_lowers_the_rank_of_an_image():
    image_emb = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text_emb = torch.tensor([[0.5, 0.0], [0.9, 0.0], [0.7, 0.0], [0.0, 1.0]])  # the best caption comes second
    metrics = retrieval_metrics(image_emb, text_emb, torch.tensor([0, 0, 0, 1]))
    assert metrics["i2t_R@1"] == metrics["i2t_mAP@10"] == 100


def test_median_of_an_even_number_of_ranks_is_the_mean_of_the_middle_two():
    image_emb = torch.eye(3)
    text_emb = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 1.0]])  # ranks 1 and 2 among the images
    assert retrieval_metrics(image_emb, text_emb, torch.tensor([0, 1]))["t2i_medR"] == 1.5


def test_image_without_captions_is_a_candidate_but_not_a_query():
    image_emb, text_emb = torch.eye(2), torch.tensor([[0.1, 0.9]])
    metrics = retrieval_metrics(image_emb, text_emb, torch.tensor([0]))
    assert metrics["i2t_R@1"] == 100
    assert metrics["t2i_R@1"] == 0
    assert metrics["t2i_medR"] == 2


def test_bfloat16_embeddings_are_ranked_in_float32():
    caption_image_ids = torch.arange(20).repeat_interleave(2)
    image_emb, text_emb = integers(20, 6).bfloat16(), integers(40, 6, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = retrieval_metrics(image_emb, text_emb, caption_image_ids, chunk_size=8)
    assert metrics == pytest.approx(metrics_by_loops(image_emb, text_emb, caption_image_ids))


def test_collapsed_model_scores_zero_at_reduced_matmul_precision():
    before = torch.get_float32_matmul_precision()
    emb, caption_image_ids = F.normalize(normals(1, 256), dim=1), torch.arange(40).repeat_interleave(2)
    try:
        torch.set_float32_matmul_precision("medium")
        metrics = retrieval_metrics(emb.repeat(40, 1), emb.repeat(80, 1), caption_image_ids, chunk_size=32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert metrics["rsum"] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"caption_image_ids": torch.tensor([0, 1])}, "one integer for each of the 3"),
        ({"caption_image_ids": torch.tensor([0.0, 1.0, 1.0])}, "float32"),
        ({"caption_image_ids": torch.tensor([0, 1, 2])}, "from 0 to 2"),
        ({"caption_image_ids": torch.tensor([-1, 1, 1])}, "from -1 to 1"),
        ({"text_emb": torch.ones(3, 5)}, "do not match"),
        ({"text_emb": torch.ones(0, 4), "caption_image_ids": torch.ones(0, dtype=torch.int64)}, "no captions"),
        ({"image_emb": torch.full((2, 4), torch.nan)}, "image_emb contains nan"),
        ({"ks": (0, 1)}, "each k must be at least 1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_metrics_name_the_invalid_argument(changed, message):
    valid = {"image_emb": torch.ones(2, 4), "text_emb": torch.ones(3, 4), "caption_image_ids": torch.tensor([0, 1, 1])}
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(**(valid | changed))
