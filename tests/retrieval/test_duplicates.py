"""Groups of photos that are the same picture: equal bytes, nearly equal embeddings, and chains of them."""

from pathlib import Path

import numpy as np
import pytest

from retrieval.duplicates import duplicate_groups
from retrieval.embedding_store import Gallery


@pytest.fixture
def gallery(tmp_path):
    """Eight photos of different bytes with random embeddings of 16 dimensions and a column of hubness corrections."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(8, 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.concatenate([rows, rng.normal(size=(8, 1)) * 5], 1).astype(np.float16)
    names = [f"{n}.jpg" for n in range(8)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 1000)
    return Gallery(tmp_path, names, rows, {}, tmp_path, "1")


def groups_of(gallery, threshold=0.98):
    groups = duplicate_groups(gallery, 16, threshold)
    return [([path.name for path in group.photos], group.is_exact) for group in groups]


def test_different_photos_form_no_group(gallery):
    assert groups_of(gallery) == []


def test_equal_bytes_are_an_exact_group_whatever_the_embeddings(gallery):
    (gallery.root / "5.jpg").write_bytes((gallery.root / "2.jpg").read_bytes())

    assert groups_of(gallery) == [(["2.jpg", "5.jpg"], True)]


def test_near_embeddings_are_a_group_and_chains_join(gallery):
    for row, step in ((3, 0.1), (6, 0.2)):
        moved = gallery.embeddings[1, :16] + step * np.eye(16)[0]
        gallery.embeddings[row, :16] = moved / np.linalg.norm(moved)
    assert gallery.embeddings[1, :16] @ gallery.embeddings[6, :16] < 0.99  # linked through photo 3 only

    ((photos, exact),) = groups_of(gallery, threshold=0.99)

    assert photos == ["1.jpg", "3.jpg", "6.jpg"] and not exact


def test_threshold_is_respected(gallery):
    moved = gallery.embeddings[0, :16] + 0.3 * np.eye(16)[0]
    gallery.embeddings[4, :16] = moved / np.linalg.norm(moved)
    a, b = (gallery.embeddings[row, :16].astype(float) for row in (0, 4))
    cosine = a @ b

    assert groups_of(gallery, threshold=cosine - 0.01) and not groups_of(gallery, threshold=cosine + 0.01)


def test_largest_group_is_first(gallery):
    for name in ("5.jpg", "6.jpg"):
        (gallery.root / name).write_bytes((gallery.root / "2.jpg").read_bytes())
    (gallery.root / "7.jpg").write_bytes((gallery.root / "0.jpg").read_bytes())

    assert [photos for photos, _ in groups_of(gallery)] == [["2.jpg", "5.jpg", "6.jpg"], ["0.jpg", "7.jpg"]]


def test_nothing_is_deleted_or_written(gallery):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in Path(gallery.root).iterdir())
    groups_of(gallery)

    assert sorted((path.name, path.stat().st_mtime_ns) for path in Path(gallery.root).iterdir()) == before
