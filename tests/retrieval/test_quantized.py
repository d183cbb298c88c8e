"""Codes of 8 bits and of 1 bit find the matches of exact search, because the best thousand are ranked exactly."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from test_ann_index import gallery_of

from retrieval import quantized
from retrieval.ann_index import search_index
from retrieval.embedding_store import Gallery
from retrieval.numpy_search import top_k
from runtime.mmap_store import open_embeddings, write_embeddings

DIM = 96


def clustered_gallery(folder, count, *, csls=0.0):
    """Write a gallery of `count` photos in clusters, as real ones are, with a last column of this spread."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((40, DIM))[rng.integers(40, size=count)] + 0.5 * rng.standard_normal((count, DIM))
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.concatenate([rows, csls * rng.standard_normal((count, 1)) - 0.2], 1) if csls else rows
    folder.mkdir(exist_ok=True)
    write_embeddings(folder / "1.npy", [rows.astype(np.float32)], rows.shape[1])
    names = [f"{row}.jpg" for row in range(count)]
    return Gallery(folder, names, open_embeddings(folder / "1.npy"), {}, folder, "1")


def queries_of(dim, count=20):
    rows = np.random.default_rng(9).standard_normal((count, dim), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_candidates_are_ranked_by_their_exact_product_and_ties_by_their_row():
    rows = np.array([[1, 0], [0, 1], [1, 0], [0.5, 0.5], [1, 0]], np.float16)
    queries = np.array([[1, 0], [0, 1]], np.float32)
    scores, found = quantized.rank_candidates(queries, rows, np.array([[4, 3, 2, 1], [0, 2, 3, 4]]), 3)
    assert found.tolist() == [[2, 4, 3], [3, 0, 2]] and scores.tolist() == [[1, 1, 0.5], [0.5, 0, 0]]


@pytest.mark.parametrize("name", quantized.CODES)
@pytest.mark.parametrize("csls", [0.0, 0.06])
def test_codes_find_the_exact_matches(name, csls, tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    monkeypatch.setattr(quantized, "SHORTLIST", 300)  # a tenth of the gallery
    gallery = clustered_gallery(tmp_path / "photos-00ff", 3000, csls=csls)
    queries = gallery.embeddings[::150, :DIM] + 1.5 * queries_of(DIM)  # cosines of about 0.55 with their photos
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    queries = np.append(queries, np.ones((20, 1), np.float32), 1) if csls else queries
    scores, rows = search_index(name, gallery, queries, 10)
    exact = top_k(queries, gallery.embeddings, 10)[1]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), exact.tolist(), strict=True)])
    assert shared >= 0.95, shared
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, gallery.embeddings[rows]), atol=1e-5)
    (index,) = gallery.store.glob(f"{name}-*.index")
    assert index.stat().st_size < gallery.embeddings.nbytes * {"int8": 0.51, "binary": 0.2}[name]


def test_printed_recall_is_that_of_the_queries_where_photos_are_found_more_easily(tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    monkeypatch.setattr(quantized, "SHORTLIST", 20)
    gallery, queries = clustered_gallery(tmp_path / "photos-00ff", 3000), queries_of(DIM, 200)
    _, rows = search_index("binary", gallery, queries, 10)
    exact = top_k(queries, gallery.embeddings, 10)[1]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), exact.tolist(), strict=True)])
    printed = capsys.readouterr().err
    assert shared < 0.9 and printed.startswith(f"binary: {shared:.1%} of the 10 exact nearest neighbours are found")
    assert "the lower of 200 photos of the gallery and 200 first queries" in printed


@pytest.mark.parametrize("name", quantized.CODES)
def test_search_of_more_photos_than_there_are_returns_all_of_them(name, tmp_path):
    pytest.importorskip("faiss")
    gallery, queries = gallery_of(tmp_path / "photos-00ff", [*range(30), 3, 3], 1), queries_of(16)
    scores, rows = search_index(name, gallery, queries, 99)
    exact_scores, exact = top_k(queries, gallery.embeddings, 99)
    assert rows.tolist() == exact.tolist()  # photos 3, 30 and 31 are equal: the lower row comes first
    np.testing.assert_allclose(scores, exact_scores, atol=1e-6)


def test_index_follows_changes_of_the_gallery_and_is_built_once_for_each(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    builds, build = [], quantized._build
    monkeypatch.setattr(quantized, "_build", lambda *arguments: builds.append(arguments) or build(*arguments))
    for version, seeds in ((1, range(50)), (1, range(50)), (2, range(10, 60))):
        gallery, queries = gallery_of(tmp_path / "photos-00ff", seeds, version), queries_of(16)
        assert (
            search_index("binary", gallery, queries, 5)[1].tolist() == top_k(queries, gallery.embeddings, 5)[1].tolist()
        )
    assert len(builds) == 2
    assert sorted(path.name for path in gallery.store.glob("binary*")) == ["binary-2.index", "binary-2.json"]


def test_damaged_codes_are_made_anew_in_one_line(tmp_path, capsys):
    pytest.importorskip("faiss")
    gallery, queries = gallery_of(tmp_path / "photos-00ff", range(50), 1), queries_of(16)
    expected = search_index("int8", gallery, queries, 5)[1].tolist()
    path = gallery.store / "int8-1.index"
    path.write_bytes(path.read_bytes()[:-40])
    capsys.readouterr()
    assert search_index("int8", gallery, queries, 5)[1].tolist() == expected
    assert f"{path} is damaged (it was changed) and is made again" in capsys.readouterr().err


def test_search_of_codes_does_not_import_torch(tmp_path):
    pytest.importorskip("faiss")
    gallery = gallery_of(tmp_path / "photos-00ff", range(50), 1)
    search_index("binary", gallery, queries_of(16), 5)
    code = f"""
import sys, numpy as np
from pathlib import Path
from retrieval.ann_index import search_index
from retrieval.embedding_store import Gallery
from runtime.mmap_store import open_embeddings
store = Path({str(gallery.store)!r})
gallery = Gallery(store, ["x"] * 50, open_embeddings(store / "1.npy"), {{}}, store, "1")
search_index("binary", gallery, np.ones((1, 16), np.float32), 5)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
