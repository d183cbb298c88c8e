"""Keys for cached embeddings: hashes of the weights and of the settings that affect an embedding."""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from config import MODEL_FIELDS
from runtime.run_dir import BEST, FROZEN, QUERY_BANK, TOWERS, WEIGHTS, is_shared_run, read_config

HASHED_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model")  # weights, configuration, vocabulary


def dual_encoder_key(folder: Path) -> str:
    """Return a hash of a pretrained dual encoder's folder, over the names and contents of its files."""
    digest = hashlib.sha256()
    for path in sorted(
        path for path in folder.iterdir() if path.suffix in HASHED_SUFFIXES and path.is_file() and path.stat().st_size
    ):
        _add_file(digest, path)
    return digest.hexdigest()


def weights_key(folder: Path) -> str:
    """Return a hash of a run's best checkpoint: its weights, its towers' files and the settings of its model.

    A checkpoint is a zip archive whose directory stores a checksum per tensor, so no tensor is read. Raises
    FileNotFoundError without a checkpoint, ValueError for a damaged one.
    """
    config, digest = read_config(folder), hashlib.sha256()
    digest.update(repr([getattr(config, field) for field in (*MODEL_FIELDS, "max_tokens")]).encode())
    if is_shared_run(folder):
        for path in (folder / WEIGHTS, folder / QUERY_BANK):
            if path.is_file() and path.stat().st_size:
                _add_file(digest, path)
    elif not (folder / BEST).is_file():
        raise FileNotFoundError(f"{folder} has no {BEST}: its training did not finish an epoch; train it again")
    for path in (folder / BEST, folder / FROZEN):
        if path.is_file():
            digest.update(repr(_checksums(path)).encode())
    for path in sorted((folder / TOWERS).rglob("*")):
        if path.is_file():
            digest.update(path.name.encode("utf-8", "surrogateescape"))
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
    return digest.hexdigest()


def _add_file(digest, path):
    """Add a file's name and content, which must not be empty, to the digest."""
    import mmap

    digest.update(path.name.encode("utf-8", "surrogateescape"))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        digest.update(content)


def digest(parts: Sequence[str]) -> str:
    """Return the SHA-256 of strings, which may contain undecodable bytes of file names."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _checksums(checkpoint):
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return [(entry.filename.partition("/")[2], entry.file_size, entry.CRC) for entry in archive.infolist()]
    except Exception:  # damaged directories raise errors of many types
        raise ValueError(f"{checkpoint} cannot be used as a checkpoint: it is truncated or damaged") from None
