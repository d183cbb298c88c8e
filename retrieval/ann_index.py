"""Engines for galleries that outgrow exact search on one machine: FAISS for an approximate index, Milvus for a cluster.

Each is built from a gallery, follows its changes, and finds what `retrieval.top_k` finds, FAISS as far as its recall.
"""

import hashlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from retrieval.embedding_store import Gallery
from retrieval.metrics import top_k
from runtime.atomic_io import replace_file, write_text

ROWS = 65_536  # copied at a time
ROWS_PER_LIST = 64  # of the sample that FAISS learns its lists from
JUDGED_PHOTOS, K, WANTED_RECALL = 200, 10, 0.99
INSERTED_ROWS = 1000  # Milvus takes 64 MB at a time
LONGEST_NAME, MOST_MATCHES = 4096, 16_384  # that Milvus allows
FIELDS = ("id", "photo", "embedding")
TIMEOUT = 10  # seconds until a cluster that does not answer is given up
MILVUS = "milvus"  # the gallery's own file


def search_index(name: str, gallery: Gallery, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest photos of each query (Q, D): scores (Q, k) and rows of the gallery (Q, k), best first.

    name: "faiss", "milvus" for a file beside the gallery, a file ending in .db, or a cluster's http address.
    Raises ValueError for another name or a missing library, ConnectionError where a cluster does not answer.
    """
    if name == "faiss":
        return search_faiss(gallery, queries, k)
    return search_milvus(gallery, queries, k, uri=str(gallery.store / "milvus.db") if name == MILVUS else name)


def search_faiss(gallery: Gallery, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Approximate search; the index is built when the gallery has changed, and its recall is printed."""
    faiss = _library("faiss", "faiss-cpu")
    path = gallery.store / f"faiss-{gallery.version}.index"
    if not path.is_file():
        _build_faiss(faiss, gallery, path)
    index, made = faiss.read_index(str(path), faiss.IO_FLAG_MMAP), json.loads(path.with_suffix(".json").read_text())
    print(f"FAISS: {made['recall']:.1%} of the exact 10 nearest are found ({made['measured_on']})", file=sys.stderr)
    index.nprobe, k = made["nprobe"], min(k, index.ntotal)
    vectors = queries.float().cpu().numpy()
    scores, rows = index.search(vectors, k)
    while (rows < 0).any() and index.nprobe < index.nlist:  # the lists that were looked into hold fewer than k
        index.nprobe *= 2
        scores, rows = index.search(vectors, k)
    return torch.from_numpy(scores), torch.from_numpy(rows)


def _build_faiss(faiss, gallery, path):
    """Sort the rows into lists around centres, and let a search look into as many lists as good recall needs."""
    rows = gallery.embeddings
    lists = max(1, min(int(4 * len(rows) ** 0.5), len(rows) // ROWS_PER_LIST))
    index = faiss.index_factory(rows.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    rng = np.random.default_rng(0)
    sample = rng.choice(len(rows), min(len(rows), lists * ROWS_PER_LIST), replace=False)
    index.train(rows[np.sort(sample)].astype(np.float32))
    for start in range(0, len(rows), ROWS):
        index.add(rows[start : start + ROWS].astype(np.float32))
    judges = rng.choice(len(rows), min(len(rows), JUDGED_PHOTOS), replace=False)
    recall = _widen(index, rows, rows[np.sort(judges)].astype(np.float32), lists)
    made = {"nprobe": index.nprobe, "recall": recall, "measured_on": f"{len(judges)} photos of the gallery as queries"}
    write_text(path.with_suffix(".json"), json.dumps(made) + "\n")  # first: where the index is, this is too
    replace_file(path, lambda unfinished: faiss.write_index(index, str(unfinished)))
    for old in gallery.store.glob("faiss-*"):
        if old.stem != path.stem:
            old.unlink()


def _widen(index, rows, queries, lists):
    """Double the lists that a search looks into until it finds enough of the exact matches; their share."""
    _, exact = top_k(torch.from_numpy(queries), rows, K)
    while True:
        _, found = index.search(queries, exact.shape[1])
        recall = float(np.mean([len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]))
        recall /= exact.shape[1]
        if recall >= WANTED_RECALL or index.nprobe >= lists:
            return recall
        index.nprobe = min(lists, 2 * index.nprobe)


def search_milvus(gallery: Gallery, queries: Tensor, k: int, *, uri: str) -> tuple[Tensor, Tensor]:
    """The search of Milvus: of a file with milvus-lite, of a cluster by its address (MILVUS_TOKEN is its password).

    A collection holds one gallery as one model sees it; photos that were added, changed or deleted follow.
    """
    milvus = _library("pymilvus", "pymilvus", "milvus-lite")
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it writes what it raises
    collection = f"photos_{gallery.store.name.rpartition('-')[2]}"
    ids = _ids(gallery)
    try:
        client = milvus.MilvusClient(uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=TIMEOUT)
        _follow(milvus, client, collection, gallery, ids, uri)
        client.load_collection(collection)  # another process may have left it released
        vectors, most = queries.float().cpu().numpy().tolist(), min(k, len(ids), MOST_MATCHES)
        found = client.search(collection, vectors, limit=most, output_fields=["id"], consistency_level="Strong")
        client.close()
    except milvus.MilvusException as error:
        raise ConnectionError(f"Milvus at {uri}: {error.message}") from None
    row = {number: row for row, number in enumerate(ids)}
    scores = torch.tensor([[match["distance"] for match in matches] for matches in found])
    return scores, torch.tensor([[row[match["id"]] for match in matches] for matches in found])


def _follow(milvus, client, collection, gallery, ids, uri):
    """Make the collection hold what the gallery holds; nothing to do where it did so before."""
    note = gallery.store / "milvus.json"
    followed = json.loads(note.read_text()) if note.is_file() else {}
    there = client.has_collection(collection)
    if there and followed.get(uri) == gallery.version and _count(client, collection) == len(ids):
        return
    if not there:
        _create(milvus, client, collection, gallery.embeddings.shape[1], uri)
    client.load_collection(collection)
    held = set(_held_ids(client, collection))
    if gone := list(held - set(ids)):
        for start in range(0, len(gone), INSERTED_ROWS):
            client.delete(collection, ids=gone[start : start + INSERTED_ROWS])
    new = [row for row, number in enumerate(ids) if number not in held]
    for start in range(0, len(new), INSERTED_ROWS):
        rows = new[start : start + INSERTED_ROWS]
        vectors = gallery.embeddings[rows].astype(np.float32)
        names = [_shortened(gallery.names[row]) for row in rows]
        photos = zip((ids[row] for row in rows), names, vectors, strict=True)
        client.insert(collection, [dict(zip(FIELDS, photo, strict=True)) for photo in photos])
    client.flush(collection)
    print(f"Milvus at {uri}: {len(new):,} photos added, {len(gone):,} taken out", file=sys.stderr)
    write_text(note, json.dumps(followed | {uri: gallery.version}) + "\n")


def _create(milvus, client, collection, dim, uri):
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    number, name, vector = FIELDS
    schema.add_field(number, milvus.DataType.INT64, is_primary=True)
    schema.add_field(name, milvus.DataType.VARCHAR, max_length=LONGEST_NAME)
    schema.add_field(vector, milvus.DataType.FLOAT_VECTOR, dim=dim)
    params = client.prepare_index_params()
    # A file is searched exactly; a cluster chooses the index that suits it.
    params.add_index(vector, index_type="FLAT" if uri.endswith(".db") else "AUTOINDEX", metric_type="IP")
    client.create_collection(collection, schema=schema, index_params=params)


def _held_ids(client, collection) -> Iterator[int]:
    found = client.query_iterator(collection, batch_size=INSERTED_ROWS, output_fields=["id"])
    while batch := found.next():
        yield from (row["id"] for row in batch)
    found.close()


def _count(client, collection):
    return int(client.get_collection_stats(collection)["row_count"])


def _ids(gallery):
    """A number for each photo that no other has: from its name and its embedding, so that a changed one is new."""
    return [
        int.from_bytes(hashlib.blake2b(os.fsencode(name) + row.tobytes(), digest_size=8).digest(), "big") >> 1
        for name, row in zip(gallery.names, gallery.embeddings, strict=True)
    ]


def _shortened(name):
    """A name that Milvus takes: UTF-8, and not too long."""
    return os.fsencode(name)[-LONGEST_NAME:].decode("utf-8", "ignore")


def _library(module, *packages):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ValueError(f"--index needs {' and '.join(packages)}: pip install {' '.join(packages)}") from None
