"""Search with a trained run: what infer.py and app.py share. A tower is loaded when the first query needs it."""

import hashlib
import re
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from config import MODEL_FIELDS
from embeddings import open_embeddings, write_embeddings
from gallery import Gallery, Photos, open_gallery, writable
from run_folder import BEST, FROZEN, TOWERS, read_config, replace_file

if TYPE_CHECKING:
    from torch import Tensor

    from encode import Encoder

SLUG_LENGTH = 40


class Match(NamedTuple):
    """What was found, a photo's path or a caption, and its cosine with the query."""

    score: float
    item: Path | str


class Searcher:
    """The best weights of a run: what they say of sentences and photos, and the galleries they have encoded."""

    def __init__(self, folder: Path, *, device: str = "auto", precision: str = "auto", cache_dir: Path | None = None):
        self.folder, self.config, self.key = folder, read_config(folder), weights_key(folder)
        self.device, self.precision = device, precision
        self.store = Path(cache_dir or self.config.cache_dir) / "galleries"

    @cached_property
    def _loaded(self):
        from encode import load_encoder

        return load_encoder(self.folder, device=self.device, precision=self.precision)

    @property
    def encoder(self) -> "Encoder":
        return self._loaded[0]

    def sentences(self, sentences: Sequence[str]) -> "Tensor":
        """Embeddings (Q, D) of sentences, unit rows. Raises ValueError for an empty one."""
        for number, sentence in enumerate(sentences, start=1):
            if not sentence.strip():
                raise ValueError(f"sentence {number} is empty" if len(sentences) > 1 else "the sentence is empty")
        return self.encoder.captions(sentences, "sentences")

    def too_long(self, sentence: str) -> str | None:
        """A line about what the model leaves unread, where a sentence is longer than it can read."""
        tokens, most = len(self.encoder.tokenizer(sentence)["input_ids"]), self.encoder.max_tokens
        return None if tokens <= most else f"the model reads {most} of the sentence's {tokens} tokens: {sentence[:60]}…"

    def photos(self, paths: Sequence[Path]) -> "Tensor":
        """Embeddings (Q, D) of photos, unit rows. Raises OSError with the reason for one that cannot be read."""
        import torch

        rows = []
        for batch, reasons in self.encoder.image_batches(paths, "photos"):
            if any(reasons):
                raise OSError(next(filter(None, reasons)))
            rows.append(batch)
        return torch.cat(rows)

    def classify(self, photo: Path, labels: Sequence[str]) -> list[Match]:
        """The labels with their probabilities, the best first. Raises ValueError for labels that make no choice."""
        from zero_shot import class_embeddings, probabilities

        photo_emb, temperature = self.photos([photo]), self._loaded[1].temperature.item()
        (chances,) = probabilities(photo_emb, class_embeddings(self.encoder, labels), temperature).tolist()
        return sorted(map(Match, chances, labels), key=lambda match: -match.score)

    def gallery(self, photos: Photos) -> Gallery:
        """The gallery of these photos; those that it does not hold yet are encoded."""
        store, notes = self.store / self._name(photos.name, str(photos.root.resolve())), []
        gallery = open_gallery(store, photos, lambda names: self._encode(photos.root, names, notes))
        if notes:
            print(*notes, file=sys.stderr)
        if gallery.broken:
            from readers import few

            said = few([f"{name}: {reason}" for name, reason in gallery.broken.items()])
            print(f"{len(gallery.broken):,} photos could not be read and are left out: {said}", file=sys.stderr)
        return gallery

    def captions(self, captions: Sequence[str]) -> np.ndarray:
        """Embeddings (M, D) of many captions, kept on disk."""
        path = self.store / f"{self._name('captions', *captions)}.npy"
        if not path.is_file():
            rows = self.encoder.captions(captions, "captions").numpy()
            with writable(self.store):
                replace_file(path, lambda unfinished: write_embeddings(unfinished, rows))
        return open_embeddings(path)

    def _encode(self, root, names, notes) -> Iterator[tuple[np.ndarray, list[str | None]]]:
        left, started = iter(names), time.perf_counter()
        for rows, reasons in self.encoder.image_batches([root / name for name in names], "photos"):
            named = zip(reasons, left, strict=False)
            yield rows.numpy(), [reason and reason.removeprefix(f"{root / name}: ") for reason, name in named]
        seconds = time.perf_counter() - started
        notes.append(f"{len(names):,} photos encoded in {seconds:.0f} s, {len(names) / seconds:.0f} a second")

    def _name(self, name, *parts):
        """A file name that differs for other weights and other parts."""
        digest = hashlib.sha256("\0".join([self.key, *parts]).encode("utf-8", "surrogateescape")).hexdigest()
        return f"{slug(name) or 'photos'}-{digest[:16]}"


def combine(sentence_emb: "Tensor | None", photo_emb: "Tensor | None") -> "Tensor":
    """The query of a sentence, a photo or both, (1, D): "this photo, but in snow" is the sum of the two."""
    import torch.nn.functional as F

    if sentence_emb is None or photo_emb is None:
        return photo_emb if sentence_emb is None else sentence_emb
    return F.normalize(sentence_emb + photo_emb, dim=-1)


def nearest_captions(queries: "Tensor", rows: np.ndarray, captions: Sequence[str], k: int) -> list[list[Match]]:
    """For each query (Q, D) the k captions with the nearest rows (M, D), best first."""
    from retrieval import top_k

    return _matches(*top_k(queries, rows, k), captions)


def nearest_photos(queries: "Tensor", gallery: Gallery, k: int, index: str | None = None) -> list[list[Match]]:
    """For each query (Q, D) the k nearest photos of the gallery, best first; every one is compared, unless an index
    (index.py) is named."""
    if index is not None:
        from index import search_index

        return _matches(*search_index(index, gallery, queries, k), gallery.paths)
    from retrieval import top_k

    return _matches(*top_k(queries, gallery.embeddings, k), gallery.paths)


def _matches(scores, indices, items):
    found = zip(scores.tolist(), indices.tolist(), strict=True)
    return [[Match(score, items[row]) for score, row in zip(*pair, strict=True)] for pair in found]


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


def _checksums(checkpoint):
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return [(entry.filename.partition("/")[2], entry.file_size, entry.CRC) for entry in archive.infolist()]
    except zipfile.BadZipFile:
        raise ValueError(f"{checkpoint} cannot be used as a checkpoint: it is cut off or damaged") from None


def check_index(name: str) -> None:
    """Raise ValueError for what no index (index.py) is called."""
    if not re.fullmatch(r"faiss|milvus|.+\.db|https?://.+", name):
        raise ValueError(f"--index must be faiss, milvus, a file FILE.db or an http address, got {name}")


def slug(text: str) -> str:
    """The words of a text as a part of a file's name."""
    return re.sub(r"\W+", "-", text)[:SLUG_LENGTH].strip("-")
