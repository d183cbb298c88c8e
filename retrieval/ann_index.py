"""Search engines for galleries too large for exact search on one machine: approximate with FAISS, or with Milvus.

Each engine indexes a gallery, keeps the index up to date, and returns the matches of `retrieval.top_k`; FAISS misses
a few of them, and prints its recall.
"""

import hashlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retrieval.embedding_store import Gallery
from retrieval.metrics import top_k
from runtime.atomic_io import replace_file, write_text
from runtime.cache import load_cached, report_damaged, require
from runtime.paths import file_stamp
from runtime.text import display_text

CHUNK_SIZE = 65_536  # rows converted to float32 at a time
ROWS_PER_LIST = 64  # gallery rows that train each inverted list of FAISS
RECALL_QUERIES, RECALL_K, TARGET_RECALL = 200, 10, 0.99
MILVUS_BATCH_SIZE = 1000  # rows per request: Milvus accepts 64 MB
MAX_NAME_BYTES, MAX_MATCHES = 4096, 16_384  # limits of Milvus
FIELDS = ("id", "photo", "embedding")
TIMEOUT = 10  # seconds to wait for a cluster's answer
MILVUS = "milvus"  # the index name for a file in the gallery's own folder


def search_index(name: str, gallery: Gallery, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest photos of each query (Q, D), best first: scores (Q, k) and rows of the gallery (Q, k).

    name: "faiss", "milvus" for a file in the gallery's folder, a file that ends in .db, or a cluster's http address.
    Raises ValueError for any other name or a missing library, ConnectionError if a cluster does not answer.
    """
    if name == "faiss":
        return search_faiss(gallery, queries, k)
    return search_milvus(gallery, queries, k, uri=str(gallery.store / "milvus.db") if name == MILVUS else name)


def search_faiss(gallery: Gallery, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search approximately with FAISS. Builds the index if the gallery has changed, and prints its recall."""
    faiss = _import_library("faiss", "faiss-cpu")
    path = gallery.store / f"faiss-{gallery.version}.index"
    opened = load_cached(path, lambda path: _open_faiss(faiss, gallery, path))
    if opened is None:
        _build_faiss(faiss, gallery, path)
        opened = _open_faiss(faiss, gallery, path)
    index, metadata = opened
    recall, measured_on = metadata["recall"], display_text(metadata["measured_on"])
    print(f"FAISS: {recall:.1%} of the 10 exact nearest neighbours are found ({measured_on})", file=sys.stderr)
    index.nprobe, k = metadata["nprobe"], min(k, index.ntotal)
    vectors = queries.float().cpu().numpy()
    scores, rows = index.search(vectors, k)
    while (rows < 0).any() and index.nprobe < index.nlist:  # the probed lists contain fewer than k rows
        index.nprobe *= 2
        scores, rows = index.search(vectors, k)
    return torch.from_numpy(scores), torch.from_numpy(rows)


def _open_faiss(faiss, gallery, path):
    """Memory-map the index; return it and its metadata. Raises an exception if it is damaged or has been changed."""
    stamp = path.stat()  # FileNotFoundError: it has not been built yet
    try:
        metadata = json.loads(path.with_suffix(".json").read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError("its .json file is missing") from None
    # FAISS crashes on some damaged files, so it reads only the file that was written.
    require(metadata["stamp"] == [stamp.st_size, stamp.st_mtime_ns], "it was changed")
    require(type(metadata["nprobe"]) is int and metadata["nprobe"] >= 1, "nprobe is wrong")
    require(type(metadata["recall"]) is float and 0 <= metadata["recall"] <= 1, "the recall is wrong")
    require(isinstance(metadata["measured_on"], str), "measured_on is wrong")
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    require((index.ntotal, index.d) == gallery.embeddings.shape, "it belongs to another gallery")
    return index, metadata


def _build_faiss(faiss, gallery, path):
    """Build an inverted file index (IVF), probing as many lists as the target recall needs, and delete older ones."""
    rows = gallery.embeddings
    num_lists = max(1, min(int(4 * len(rows) ** 0.5), len(rows) // ROWS_PER_LIST))
    index = faiss.index_factory(rows.shape[1], f"IVF{num_lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    rng = np.random.default_rng(0)
    sample = rng.choice(len(rows), min(len(rows), num_lists * ROWS_PER_LIST), replace=False)
    index.train(rows[np.sort(sample)].astype(np.float32))
    for start in range(0, len(rows), CHUNK_SIZE):
        index.add(rows[start : start + CHUNK_SIZE].astype(np.float32))
    queries = rng.choice(len(rows), min(len(rows), RECALL_QUERIES), replace=False)
    recall = _tune_nprobe(index, rows, rows[np.sort(queries)].astype(np.float32), num_lists)
    metadata = {
        "nprobe": index.nprobe,
        "recall": recall,
        "measured_on": f"{len(queries)} photos of the gallery as queries",
    }
    path.unlink(missing_ok=True)  # a damaged one: no index exists without its metadata
    temporary = path.with_suffix(".new")
    replace_file(temporary, lambda temporary: _write_faiss(faiss, index, temporary))
    metadata["stamp"] = file_stamp(temporary)
    write_text(path.with_suffix(".json"), json.dumps(metadata) + "\n")
    temporary.replace(path)
    for old in gallery.store.glob("faiss-*"):
        if old.stem != path.stem:
            old.unlink()


def _write_faiss(faiss, index, path):
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:  # how FAISS reports a full disk
        raise OSError(str(error)) from None


def _tune_nprobe(index, rows, queries, num_lists):
    """Double the number of probed lists until the recall reaches TARGET_RECALL; return the recall."""
    _, exact = top_k(torch.from_numpy(queries), rows, RECALL_K)
    while True:
        _, found = index.search(queries, exact.shape[1])
        recall = float(np.mean([len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]))
        recall /= exact.shape[1]
        if recall >= TARGET_RECALL or index.nprobe >= num_lists:
            return recall
        index.nprobe = min(num_lists, 2 * index.nprobe)


def search_milvus(gallery: Gallery, queries: Tensor, k: int, *, uri: str) -> tuple[Tensor, Tensor]:
    """Search with Milvus: a file with milvus-lite, a cluster by its address, with MILVUS_TOKEN as its password.

    A collection contains one gallery, encoded by one model. Added, changed and deleted photos are synchronised first.
    """
    milvus = _import_library("pymilvus", "pymilvus", "milvus-lite")
    for name in ("pymilvus", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log the errors that they raise
    collection = f"photos_{gallery.store.name.rpartition('-')[2]}"
    ids = _photo_ids(gallery)
    try:
        client = milvus.MilvusClient(uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=TIMEOUT)
        try:
            found = _search_collection(milvus, client, collection, gallery, ids, uri, queries, k)
        except milvus.MilvusException as error:
            if not uri.endswith(".db"):
                raise
            report_damaged(Path(uri), error.message)
            client.drop_collection(collection)
            found = _search_collection(milvus, client, collection, gallery, ids, uri, queries, k)
        client.close()
    except milvus.MilvusException as error:
        raise ConnectionError(f"Milvus at {uri}: {error.message}") from None
    row_of = {photo_id: row for row, photo_id in enumerate(ids)}
    scores = torch.tensor([[match["distance"] for match in matches] for matches in found])
    return scores, torch.tensor([[row_of[match["id"]] for match in matches] for matches in found])


def _search_collection(milvus, client, collection, gallery, ids, uri, queries, k):
    _sync_collection(milvus, client, collection, gallery, ids, uri)
    client.load_collection(collection)  # another process may have released it
    vectors, limit = queries.float().cpu().numpy().tolist(), min(k, len(ids), MAX_MATCHES)
    return client.search(collection, vectors, limit=limit, output_fields=["id"], consistency_level="Strong")


def _sync_collection(milvus, client, collection, gallery, ids, uri):
    """Insert the gallery's new photos into the collection and delete removed ones; skip this if nothing has changed."""
    synced_path = gallery.store / "milvus.json"
    synced_versions = load_cached(synced_path, _read_versions) or {}
    exists = client.has_collection(collection)
    if exists and synced_versions.get(uri) == gallery.version and _count_rows(client, collection) == len(ids):
        return
    if not exists:
        _create_collection(milvus, client, collection, gallery.embeddings.shape[1], uri)
    client.load_collection(collection)
    stored = set(_stored_ids(client, collection))
    if removed := list(stored - set(ids)):
        for start in range(0, len(removed), MILVUS_BATCH_SIZE):
            client.delete(collection, ids=removed[start : start + MILVUS_BATCH_SIZE])
    new = [row for row, photo_id in enumerate(ids) if photo_id not in stored]
    for start in range(0, len(new), MILVUS_BATCH_SIZE):
        rows = new[start : start + MILVUS_BATCH_SIZE]
        vectors = gallery.embeddings[rows].astype(np.float32)
        names = [_truncate_name(gallery.names[row]) for row in rows]
        photos = zip((ids[row] for row in rows), names, vectors, strict=True)
        client.insert(collection, [dict(zip(FIELDS, photo, strict=True)) for photo in photos])
    client.flush(collection)
    print(f"Milvus at {display_text(uri)}: {len(new):,} photos added, {len(removed):,} removed", file=sys.stderr)
    write_text(synced_path, json.dumps(synced_versions | {uri: gallery.version}) + "\n")


def _read_versions(path):
    versions = json.loads(path.read_text("utf-8"))
    require(isinstance(versions, dict), "it is not a JSON object")
    return versions


def _create_collection(milvus, client, collection, dim, uri):
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    id_field, name_field, vector_field = FIELDS
    schema.add_field(id_field, milvus.DataType.INT64, is_primary=True)
    schema.add_field(name_field, milvus.DataType.VARCHAR, max_length=MAX_NAME_BYTES)
    schema.add_field(vector_field, milvus.DataType.FLOAT_VECTOR, dim=dim)
    params = client.prepare_index_params()
    # A file is searched exactly; a cluster chooses its own index.
    params.add_index(vector_field, index_type="FLAT" if uri.endswith(".db") else "AUTOINDEX", metric_type="IP")
    client.create_collection(collection, schema=schema, index_params=params)


def _stored_ids(client, collection) -> Iterator[int]:
    iterator = client.query_iterator(collection, batch_size=MILVUS_BATCH_SIZE, output_fields=["id"])
    while batch := iterator.next():
        yield from (row["id"] for row in batch)
    iterator.close()


def _count_rows(client, collection):
    return int(client.get_collection_stats(collection)["row_count"])


def _photo_ids(gallery):
    """Return a unique 63-bit id per photo, a hash of its name and embedding, so that a changed photo gets a new id."""
    return [
        int.from_bytes(hashlib.blake2b(os.fsencode(name) + row.tobytes(), digest_size=8).digest(), "big") >> 1
        for name, row in zip(gallery.names, gallery.embeddings, strict=True)
    ]


def _truncate_name(name):
    """Return the end of a name as Milvus accepts it: valid UTF-8 of at most MAX_NAME_BYTES bytes."""
    return os.fsencode(name)[-MAX_NAME_BYTES:].decode("utf-8", "ignore")


def _import_library(module, *packages):
    """Import an optional library. Raises ValueError with the install command if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ValueError(f"--index needs {' and '.join(packages)}: pip install {' '.join(packages)}") from None
