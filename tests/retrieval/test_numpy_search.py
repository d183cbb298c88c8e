"""Search with NumPy: the results of exact_search.top_k, ties and nan included."""

import numpy as np
import pytest
import torch

from retrieval.exact_search import top_k as torch_top_k
from retrieval.numpy_search import top_k


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("n", "k", "chunk"), [(1, 1, 4), (7, 9, 3), (1000, 8, 64), (1000, 8, 4096), (130, 130, 7)])
def test_results_are_those_of_torch(dtype, n, k, chunk):
    rng = np.random.default_rng(n + k)
    gallery = rng.integers(-2, 3, (n, 5)).astype(dtype)  # small integers: many ties, exact sums
    queries = rng.integers(-2, 3, (6, 5)).astype(np.float32)

    scores, indices = top_k(queries, gallery, k, chunk)

    expected_scores, expected_indices = torch_top_k(torch.from_numpy(queries), torch.from_numpy(gallery), k)
    assert np.array_equal(scores, expected_scores.numpy())
    assert np.array_equal(indices, expected_indices.numpy())


def test_nan_is_ranked_last():
    gallery = np.array([[np.nan], [1.0], [-3.0]], np.float32)

    scores, indices = top_k(np.ones((1, 1), np.float32), gallery, 3)

    assert indices.tolist() == [[1, 2, 0]] and scores[0, 2] == -np.inf


@pytest.mark.parametrize(("queries", "k"), [((1, 4), 3), ((1, 5), 0)])
def test_wrong_shapes_and_k_are_refused(queries, k):
    with pytest.raises(ValueError, match=r"do not match|at least 1"):
        top_k(np.zeros(queries, np.float32), np.zeros((3, 5), np.float32), k)


def test_memory_does_not_grow_with_the_gallery(tmp_path):
    import tracemalloc

    np.save(tmp_path / "rows.npy", np.ones((60_000, 64), np.float16))
    gallery = np.load(tmp_path / "rows.npy", mmap_mode="r")
    tracemalloc.start()
    top_k(np.ones((1, 64), np.float32), gallery, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 6e6  # the gallery would be 15 MB in float32
