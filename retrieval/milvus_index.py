"""Search with Milvus: a file with milvus-lite, or a server by its address.

A collection contains one gallery, encoded by one model. Added, changed and deleted photos are synchronised first.
"""

import hashlib
import json
import logging
import os
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from retrieval.embedding_store import Gallery
from retrieval.faiss_file import import_library
from runtime.atomic_io import write_text
from runtime.cache import load_cached, report_damaged, require
from runtime.text import display_text

MILVUS_BATCH_SIZE = 1000  # rows per request: Milvus accepts 64 MB
MAX_NAME_BYTES, MAX_MATCHES = 4096, 16_384  # limits of Milvus
FIELDS = ("id", "photo", "embedding")
SYNCED, NAME = "milvus.json", "name"
# After a lost connection gRPC waits up to two minutes before it tries again, also for a new client.
GRPC_OPTIONS = {"grpc.max_reconnect_backoff_ms": 1000}
TIMEOUT = 10  # seconds to wait for a server's answer


def search_milvus(gallery: Gallery, queries: np.ndarray, k: int, *, uri: str) -> tuple[np.ndarray, np.ndarray]:
    """Search with Milvus: a file with milvus-lite, a server by its address, with MILVUS_TOKEN as its password.

    Raises ConnectionError, in one line, for whatever the server does not answer.
    """
    from filelock import FileLock

    milvus = import_library("pymilvus", "pymilvus", "milvus-lite")
    for name in ("pymilvus", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log the errors that they raise
    ids = _photo_ids(gallery)
    with FileLock(gallery.store / "milvus.lock"):  # one process at a time synchronises a gallery
        found = _search(milvus, gallery, ids, uri, queries, k)
    row_of = {photo_id: row for row, photo_id in enumerate(ids)}
    known = [[match for match in matches if match["id"] in row_of] for matches in found]
    width = min(map(len, known))
    if width < len(found[0]):
        print(f"Milvus at {display_text(uri)}: rows that are no photos of this gallery were ignored", file=sys.stderr)
    scores = np.array([[match["distance"] for match in matches[:width]] for matches in known], np.float32)
    return scores, np.array([[row_of[match["id"]] for match in matches[:width]] for matches in known], np.int64)


def _search(milvus, gallery, ids, uri, queries, k):
    """Connect, synchronise and search; make a damaged file anew. Raises ConnectionError."""
    try:
        token = os.environ.get("MILVUS_TOKEN", "")
        client = milvus.MilvusClient(uri, token=token, timeout=TIMEOUT, grpc_options=GRPC_OPTIONS)
        try:
            return _search_collection(milvus, client, gallery, ids, uri, queries, k)
        except milvus.MilvusException as error:
            if not uri.endswith(".db"):
                raise
            report_damaged(Path(uri), error.message)
            client.drop_collection(_collection(gallery, uri, _synced_versions(gallery)))
            return _search_collection(milvus, client, gallery, ids, uri, queries, k)
        finally:
            client.close()
    except milvus.MilvusException as error:
        reason = " ".join(error.message.split()).rstrip(".")
        what_to_do = "if the server has stopped, start it and run the same command again; what was added is kept"
        if uri.endswith(".db"):
            what_to_do = "without --index, the search needs no Milvus"
        raise ConnectionError(f"Milvus at {uri}: {reason}; {what_to_do}") from None


def _search_collection(milvus, client, gallery, ids, uri, queries, k):
    collection = _sync_collection(milvus, client, gallery, ids, uri)
    client.load_collection(collection)  # another process may have released it
    limit = min(k, len(ids), MAX_MATCHES)
    return client.search(collection, queries.tolist(), limit=limit, output_fields=["id"], consistency_level="Strong")


def _sync_collection(milvus, client, gallery, ids, uri):
    """Insert the gallery's new photos and delete removed ones, unless nothing has changed; return the collection."""
    synced_versions = _synced_versions(gallery)
    collection = _collection(gallery, uri, synced_versions)
    exists = client.has_collection(collection)
    if exists and synced_versions.get(uri) == gallery.version and _count_rows(client, collection) == len(ids):
        return collection
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
        # upsert: an insert that is repeated after a lost connection would store a photo twice
        client.upsert(collection, [dict(zip(FIELDS, photo, strict=True)) for photo in photos])
    if uri.endswith(".db"):  # a server has logged what it has accepted, and waits three seconds for a flush
        client.flush(collection)
    print(f"Milvus at {display_text(uri)}: {len(new):,} photos added, {len(removed):,} removed", file=sys.stderr)
    write_text(gallery.store / SYNCED, json.dumps(synced_versions | {uri: gallery.version}) + "\n")
    return collection


def _synced_versions(gallery):
    """Return the gallery's version in each Milvus by its address, and as NAME the suffix of its collections there.

    The suffix is written before a collection has that name: an interrupted synchronisation continues in it.
    """
    path = gallery.store / SYNCED
    versions = load_cached(path, _read_versions)
    if not versions:
        versions = {NAME: uuid.uuid4().hex[:8]}
        write_text(path, json.dumps(versions) + "\n")
    return versions


def _collection(gallery, uri, synced_versions):
    """Return the collection of a gallery.

    Two machines may have different photos at the same path and a server in common: there the name has a suffix that is
    drawn once for each cache, so that neither removes the photos of the other. Older caches have collections without.
    """
    name = f"photos_{gallery.store.name.rpartition('-')[2]}"
    return name if uri.endswith(".db") or NAME not in synced_versions else f"{name}_{synced_versions[NAME]}"


def _read_versions(path):
    versions = json.loads(path.read_text("utf-8"))
    require(isinstance(versions, dict), "it is not a JSON object")
    require(re.fullmatch("[0-9a-f]{8}", versions.get(NAME, "0" * 8)), "the name of its collection is wrong")
    return versions


def _create_collection(milvus, client, collection, dim, uri):
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    id_field, name_field, vector_field = FIELDS
    schema.add_field(id_field, milvus.DataType.INT64, is_primary=True)
    schema.add_field(name_field, milvus.DataType.VARCHAR, max_length=MAX_NAME_BYTES)
    schema.add_field(vector_field, milvus.DataType.FLOAT_VECTOR, dim=dim)
    params = client.prepare_index_params()
    # A file is searched exactly; a server chooses its own index.
    params.add_index(vector_field, index_type="FLAT" if uri.endswith(".db") else "AUTOINDEX", metric_type="IP")
    client.create_collection(collection, schema=schema, index_params=params)


def _stored_ids(client, collection) -> Iterator[int]:
    iterator = client.query_iterator(collection, batch_size=MILVUS_BATCH_SIZE, output_fields=["id"])
    while batch := iterator.next():
        yield from (row["id"] for row in batch)
    iterator.close()


def _count_rows(client, collection):
    client.load_collection(collection)
    (count,) = client.query(collection, output_fields=["count(*)"], consistency_level="Strong")  # without deleted rows
    return count["count(*)"]


def _photo_ids(gallery):
    """Return a unique 63-bit id per photo, a hash of its name and embedding, so that a changed photo gets a new id."""
    return [
        int.from_bytes(hashlib.blake2b(os.fsencode(name) + row.tobytes(), digest_size=8).digest(), "big") >> 1
        for name, row in zip(gallery.names, gallery.embeddings, strict=True)
    ]


def _truncate_name(name):
    """Return the end of a name as Milvus accepts it: valid UTF-8 of at most MAX_NAME_BYTES bytes."""
    return os.fsencode(name)[-MAX_NAME_BYTES:].decode("utf-8", "ignore")
