"""FAISS and Milvus find the matches of exact search, and their indexes follow changes of the gallery."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from retrieval import ann_index
from retrieval.embedding_store import Gallery
from retrieval.metrics import top_k
from runtime.mmap_store import open_embeddings, write_embeddings

DIM = 16


def search_index(name, gallery, queries, k):
    """Search with an index -> scores (Q, k), rows (Q, k) as tensors, to compare with `top_k`."""
    scores, rows = ann_index.search_index(name, gallery, queries.numpy(), k)
    return torch.from_numpy(scores), torch.from_numpy(rows)


def gallery_of(folder, seeds, version):
    """Write a gallery with one photo per seed, whose embedding the seed determines."""
    rows = np.stack([np.random.default_rng(seed).standard_normal(DIM, np.float32) for seed in seeds])
    folder.mkdir(exist_ok=True)
    write_embeddings(folder / f"{version}.npy", [rows / np.linalg.norm(rows, axis=1, keepdims=True)], rows.shape[1])
    names = [f"{seed}/été {seed}.jpg" for seed in seeds]
    return Gallery(folder, names, open_embeddings(folder / f"{version}.npy"), {}, folder, str(version))


@pytest.fixture
def queries():
    return torch.nn.functional.normalize(torch.randn(20, DIM, generator=torch.Generator().manual_seed(0)))


def test_milvus_lite_and_exact_search_return_the_same_top_10(tmp_path, queries):
    pytest.importorskip("milvus_lite")
    gallery = gallery_of(tmp_path / "photos-00ff", range(500), 1)
    scores, rows = top_k(queries, gallery.embeddings, 10)
    found_scores, found = search_index(str(tmp_path / "x.db"), gallery, queries, 10)
    assert torch.equal(found, rows)
    torch.testing.assert_close(found_scores, scores, atol=1e-5, rtol=0)


def test_milvus_follows_changes_of_the_gallery(tmp_path, queries, capsys):
    pytest.importorskip("milvus_lite")
    for version, seeds in enumerate((range(50), range(50), [*range(10, 50), *range(100, 105)])):
        gallery = gallery_of(tmp_path / "photos-00ff", seeds, max(1, version))
        _, found = search_index("milvus", gallery, queries, 99)
        assert torch.equal(found, top_k(queries, gallery.embeddings, 99)[1])
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 2
    assert "50 photos added, 0 removed" in messages[0] and "5 photos added, 10 removed" in messages[1]


def test_collection_of_another_process_is_searched_and_follows_changes(tmp_path, queries):
    pytest.importorskip("milvus_lite")
    for version, seeds in ((1, range(30)), (1, range(30)), (2, range(35))):
        gallery = gallery_of(tmp_path / "a-00ff", seeds, version)
        code = f"""
import sys, torch
sys.path[:0] = {sys.path!r}
from test_ann_index import gallery_of, search_index
from pathlib import Path
gallery = gallery_of(Path({str(tmp_path / "a-00ff")!r}), {seeds!r}, {version})
print(search_index({str(tmp_path / "x.db")!r}, gallery, torch.tensor({queries.tolist()}), 5)[1].tolist())
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(top_k(queries, gallery.embeddings, 5)[1].tolist())


def test_two_galleries_share_one_milvus_file(tmp_path, queries):
    pytest.importorskip("milvus_lite")
    for folder, seeds in (("a-00ff", range(30)), ("b-ff00", range(30, 70)), ("a-00ff", range(30))):
        gallery = gallery_of(tmp_path / folder, seeds, 1)
        _, found = search_index(str(tmp_path / "x.db"), gallery, queries, 5)
        assert torch.equal(found, top_k(queries, gallery.embeddings, 5)[1])


def test_cluster_that_does_not_answer_is_a_one_line_error(tmp_path, queries, monkeypatch):
    pytest.importorskip("pymilvus")
    monkeypatch.setattr("retrieval.milvus_index.TIMEOUT", 1)
    with pytest.raises(ConnectionError, match=r"Milvus at http://127\.0\.0\.1:9"):
        search_index("http://127.0.0.1:9", gallery_of(tmp_path / "a-00ff", range(5), 1), queries, 3)


@pytest.mark.parametrize("num_photos", [3, 2000])
def test_faiss_finds_the_exact_matches_up_to_its_printed_recall(tmp_path, queries, capsys, num_photos):
    pytest.importorskip("faiss")
    gallery = gallery_of(tmp_path / "photos-00ff", range(num_photos), 1)
    exact_scores, exact = top_k(queries, gallery.embeddings, 10)
    scores, found = search_index("faiss", gallery, queries, 10)
    message = capsys.readouterr().err
    recall = float(message.partition("faiss: ")[2].partition("%")[0])
    shared = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(exact.tolist(), found.tolist(), strict=True)])
    assert recall >= 99 and shared > 0.9 and found.shape == exact.shape
    torch.testing.assert_close(scores[:, 0], exact_scores[:, 0], atol=0.05, rtol=0)


def test_faiss_index_is_built_once_and_rebuilt_when_the_gallery_changes(tmp_path, queries, monkeypatch):
    pytest.importorskip("faiss")
    builds, build = [], ann_index._build
    monkeypatch.setattr(ann_index, "_build", lambda *args: builds.append(args) or build(*args))
    for version, seeds in ((1, range(50)), (1, range(50)), (2, range(40))):
        gallery = gallery_of(tmp_path / "photos-00ff", seeds, version)
        _, found = search_index("faiss", gallery, queries, 3)
        assert torch.equal(found[:, :1], top_k(queries, gallery.embeddings, 1)[1])
    assert len(builds) == 2
    assert sorted(path.name for path in gallery.store.glob("faiss*")) == ["faiss-2.index", "faiss-2.json"]


def test_interrupted_build_of_the_faiss_index_is_repeated(tmp_path, queries, monkeypatch):
    faiss = pytest.importorskip("faiss")
    gallery = gallery_of(tmp_path / "photos-00ff", range(50), 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(faiss, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        search_index("faiss", gallery, queries, 3)
    assert search_index("faiss", gallery, queries, 3)[1].shape == (20, 3)


def test_faiss_returns_k_matches_even_if_the_probed_lists_contain_fewer(tmp_path, queries):
    pytest.importorskip("faiss")
    gallery = gallery_of(tmp_path / "photos-00ff", range(1000), 1)
    search_index("faiss", gallery, queries, 10)
    (metadata,) = gallery.store.glob("faiss-*.json")  # an easier gallery reaches the target recall with few lists
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"nprobe": 1}))
    _, found = search_index("faiss", gallery, queries, 1000)
    assert all(sorted(rows) == list(range(1000)) for rows in found.tolist())


def test_missing_library_is_an_error_with_the_install_command(tmp_path, queries, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"--index needs faiss-cpu: pip install faiss-cpu"):
        search_index("faiss", gallery_of(tmp_path / "a-00ff", range(5), 1), queries, 3)
