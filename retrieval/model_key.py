"""Keys of cached embeddings: they change with the weights and with the settings that change an embedding."""

import hashlib
import zipfile
from pathlib import Path

from config import MODEL_FIELDS
from runtime.run_dir import BEST, FROZEN, TOWERS, read_config

PAIR_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")  # weights, settings, vocabulary


def dual_encoder_key(folder: Path) -> str:
    """A name for a pretrained pair in a folder: it changes with any of its files."""
    import mmap

    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in PAIR_FILES and path.stat().st_size):
        digest.update(path.name.encode())
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digest.update(content)
    return digest.hexdigest()


def weights_key(folder: Path) -> str:
    """A name for what a run's best checkpoint makes of photos and sentences: it changes with weights and settings.

    A checkpoint is a zip archive, and its directory holds a checksum of each tensor: the tensors need not be read.
    """
    config, digest = read_config(folder), hashlib.sha256()
    digest.update(repr([getattr(config, field) for field in (*MODEL_FIELDS, "max_tokens")]).encode())
    if not (folder / BEST).is_file():
        raise FileNotFoundError(f"{folder} has no {BEST}: its training did not finish an epoch; start it anew")
    for path in (folder / BEST, folder / FROZEN):
        if path.is_file():
            digest.update(repr(_checksums(path)).encode())
    for path in sorted((folder / TOWERS).rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def digest(parts):
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _checksums(checkpoint):
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return [(entry.filename.partition("/")[2], entry.file_size, entry.CRC) for entry in archive.infolist()]
    except zipfile.BadZipFile:
        raise ValueError(f"{checkpoint} cannot be used as a checkpoint: it is cut off or damaged") from None
