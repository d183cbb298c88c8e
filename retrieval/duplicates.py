"""Find photos of a gallery that are the same picture: by equal bytes, and by nearly equal embeddings."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.image_lookup import find_duplicates
from retrieval.embedding_store import Gallery

NEIGHBOURS = 32  # photos that each photo is compared with
QUERIES = 1024  # photos searched at a time


class Group(NamedTuple):
    """Photos that are the same picture; `cosine` is the lowest cosine that links them, 1.0 for equal bytes."""

    photos: list[Path]  # at least two, in the order of the gallery
    cosine: float

    @property
    def is_exact(self) -> bool:
        return self.cosine == 1.0


def duplicate_groups(gallery: Gallery, dims: int, threshold: float) -> list[Group]:
    """Return the groups of photos linked by equal bytes or by a cosine of at least `threshold`, largest first.

    dims: the embedding's dimensions; a run with a query bank appends a column that is not part of it. Each photo is
    compared with its NEIGHBOURS nearest ones, so that larger groups are still found through one another.
    """
    paths = gallery.paths
    links = {}
    for first, second, cosine in _near_pairs(gallery.embeddings, dims, threshold):
        links[first, second] = min(cosine, np.nextafter(1.0, 0.0))
    row_of_path = {str(path): row for row, path in enumerate(paths)}
    for duplicate, original in find_duplicates(row_of_path).items():
        links[row_of_path[original], row_of_path[duplicate]] = 1.0
    groups = _connected(len(paths), links)
    return sorted(
        (Group([paths[row] for row in rows], cosine) for rows, cosine in groups), key=lambda g: -len(g.photos)
    )


def _near_pairs(embeddings, dims, threshold):
    """Yield (row, row, cosine) of photos with a cosine of at least `threshold`."""
    import torch

    from retrieval.exact_search import top_k

    for start in range(0, len(embeddings), QUERIES):
        queries = torch.from_numpy(np.array(embeddings[start : start + QUERIES], dtype=np.float32))
        queries[:, dims:] = 0  # the hubness correction is no part of the cosine
        scores, rows = top_k(queries, embeddings, NEIGHBOURS)
        query, column = (scores >= threshold).nonzero(as_tuple=True)
        for first, second, score in zip(
            (start + query).tolist(), rows[query, column].tolist(), scores[query, column].tolist(), strict=True
        ):
            if first != second:
                yield min(first, second), max(first, second), score


def _connected(size: int, links: dict[tuple[int, int], float]) -> Iterable[tuple[list[int], float]]:
    """Yield (rows, lowest cosine of their links) of each connected set of two or more rows."""
    parent = list(range(size))

    def root(row):
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for first, second in links:
        a, b = sorted((root(first), root(second)))
        parent[b] = a
    members, lowest = defaultdict(list), defaultdict(lambda: 1.0)
    for row in range(size):
        members[root(row)].append(row)
    for (first, _), cosine in links.items():
        lowest[root(first)] = min(lowest[root(first)], cosine)
    return [(rows, float(lowest[key])) for key, rows in members.items() if len(rows) > 1]
