"""Search with a trained run or a pretrained pair: what infer.py and app.py share. Loaded when a query needs it."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from config import Config
from retrieval.embedding_store import Gallery, ImageList, open_gallery, writable
from retrieval.model_key import digest, dual_encoder_key, weights_key
from runtime.atomic_io import replace_file
from runtime.mmap_store import open_embeddings, write_embeddings
from runtime.run_dir import read_config
from runtime.text import slug

if TYPE_CHECKING:
    from torch import Tensor

    from modules import CLIPModel
    from retrieval.encoder import Encoder

SLUG_LENGTH = 40  # characters
Kind = Literal["photos", "captions"]  # what is searched among


class Match(NamedTuple):
    """What was found: a photo's path or a caption, with its cosine with the query, corrected for hubs where the run has
    a bank (hubness.py); or a label, with its probability."""

    score: float
    item: Path | str


class Searcher:
    """What a model says of sentences and photos, and the galleries that it has encoded.

    load gives its Encoder and CLIPModel, when they are first needed; key names it: it changes with the weights.
    """

    def __init__(self, key: str, load: Callable[[], tuple["Encoder", "CLIPModel"]], *, cache_dir: Path):
        self.key, self.load, self.store = key, load, cache_dir / "galleries"

    @cached_property
    def _loaded(self):
        return self.load()

    @property
    def encoder(self) -> "Encoder":
        return self._loaded[0]

    def embed_sentences(self, sentences: Sequence[str], *, among: Kind = "photos") -> "Tensor":
        """Sentences as queries, (Q, F). Raises ValueError for an empty one."""
        for number, sentence in enumerate(sentences, start=1):
            if not sentence.strip():
                raise ValueError(f"sentence {number} is empty" if len(sentences) > 1 else "the sentence is empty")
        return self._as_query(self.encoder.encode_captions(sentences, "sentences"), among != "captions")

    def describe_truncation(self, sentence: str) -> str | None:
        """A line about what the model leaves unread, where a sentence is longer than it can read."""
        tokens, most = len(self.encoder.tokenizer(sentence, verbose=False)["input_ids"]), self.encoder.max_tokens
        return None if tokens <= most else f"the model reads {most} of the sentence's {tokens} tokens: {sentence[:60]}…"

    def embed_images(self, paths: Sequence[Path], *, among: Kind = "photos") -> "Tensor":
        """Photos as queries, (Q, F). Raises OSError with the reason for one that cannot be read."""
        return self._as_query(self._embed(paths), among != "photos")

    def _as_query(self, emb, of_other_kind):
        """The bank says which photos are near to too many captions; that is no fault in a photo like another photo."""
        from retrieval.csls import query

        return emb if self.encoder.query_bank is None else query(emb, float(of_other_kind))

    def _embed(self, paths):
        """Embeddings (Q, D) of photos, unit rows."""
        import torch

        rows, here = [], replace(self.encoder, num_workers=0)  # a process of its own takes longer than a photo
        for batch, reasons in here.encode_image_batches(paths, "photos"):
            if any(reasons):
                raise OSError(next(filter(None, reasons)))
            rows.append(batch)
        return torch.cat(rows)

    def classify(self, photo: Path, labels: Sequence[str]) -> list[Match]:
        """The labels with their probabilities, the best first. Raises ValueError for labels that make no choice."""
        from retrieval.zero_shot import class_embeddings, probabilities

        photo_emb, temperature = self._embed([photo]), self._loaded[1].temperature.item()
        (chances,) = probabilities(photo_emb, class_embeddings(self.encoder, labels), temperature).tolist()
        return sorted(map(Match, chances, labels), key=lambda match: -match.score)

    def gallery(self, photos: ImageList) -> Gallery:
        """The gallery of these photos; those that it does not hold yet are encoded."""
        store, notes = self.store / self._name(photos.name, str(photos.root.resolve())), []
        gallery = open_gallery(store, photos, lambda names: self._encode(photos.root, names, notes))
        if notes:
            print(*notes, file=sys.stderr)
        if gallery.broken:
            from runtime.text import format_examples, format_skipped

            said = format_examples([f"{name}: {reason}" for name, reason in gallery.broken.items()])
            print(f"{format_skipped(len(gallery.broken))}: {said}", file=sys.stderr)
        return gallery

    def embed_captions(self, captions: Sequence[str]) -> np.ndarray:
        """Many captions as rows (M, F) to search in, kept on disk."""
        path = self.store / f"{self._name('captions', *captions)}.npy"
        if not path.is_file():
            rows, query_bank = self.encoder.encode_captions(captions, "captions"), self.encoder.query_bank
            rows = (rows if query_bank is None else query_bank.captions(rows)).numpy()
            with writable(self.store):
                replace_file(path, lambda unfinished: write_embeddings(unfinished, [rows], rows.shape[1]))
        return open_embeddings(path)

    def _encode(self, root, names, notes) -> Iterator[tuple[np.ndarray, list[str | None]]]:
        left, started = iter(names), time.perf_counter()
        # Photos of a camera take as long to unpack as to encode.
        workers = max(self.encoder.num_workers, (os.cpu_count() or 1) // 2)
        encoder = replace(self.encoder, num_workers=workers)
        for rows, reasons in encoder.encode_image_batches([root / name for name in names], "photos"):
            has_flag = zip(reasons, left, strict=False)
            rows = rows if self.encoder.query_bank is None or not len(rows) else self.encoder.query_bank.photos(rows)
            yield rows.numpy(), [reason and reason.removeprefix(f"{root / name}: ") for reason, name in has_flag]
        seconds = time.perf_counter() - started
        notes.append(f"{len(names):,} photos encoded in {seconds:.0f} s, {len(names) / seconds:.0f} a second")

    def _name(self, name, *parts):
        """A file name that differs for other weights and other parts."""
        return f"{slug(name, max_length=SLUG_LENGTH) or 'photos'}-{digest([self.key, *parts])[:16]}"


def combine_queries(sentence_emb: "Tensor | None", photo_emb: "Tensor | None") -> "Tensor":
    """The query of a sentence, a photo or both, (Q, F): "this photo, but in snow" is the sum of the two."""
    import torch.nn.functional as F

    if sentence_emb is None or photo_emb is None:
        return photo_emb if sentence_emb is None else sentence_emb
    return F.normalize(sentence_emb + photo_emb, dim=-1)


def search_captions(queries: "Tensor", rows: np.ndarray, captions: Sequence[str], k: int) -> list[list[Match]]:
    """For each query (Q, F) the k captions with the nearest rows (M, F), best first."""
    from retrieval.metrics import top_k

    return _matches(*top_k(queries, rows, k), captions)


def search_images(queries: "Tensor", gallery: Gallery, k: int, index: str | None = None) -> list[list[Match]]:
    """For each query (Q, F) the k nearest photos of the gallery, best first; every one is compared, unless an index
    (index.py) is named."""
    if index is not None:
        from retrieval.ann_index import search_index

        return _matches(*search_index(index, gallery, queries, k), gallery.paths)
    from retrieval.metrics import top_k

    return _matches(*top_k(queries, gallery.embeddings, k), gallery.paths)


def _matches(scores, indices, items):
    found = zip(scores.tolist(), indices.tolist(), strict=True)
    return [[Match(score, items[row]) for score, row in zip(*pair, strict=True)] for pair in found]


def searcher_for_run(folder: Path, *, device: str, precision: str, cache_dir: Path | None) -> Searcher:
    """The Searcher of a run's best weights. cache_dir None is where the run keeps its own things."""

    def load():
        from retrieval.encoder import load_encoder

        return load_encoder(folder, device=device, precision=precision)

    return Searcher(weights_key(folder), load, cache_dir=Path(cache_dir or read_config(folder).cache_dir))


def searcher_for_pretrained(name: str, *, device: str, precision: str, cache_dir: Path | None) -> Searcher:
    """The Searcher of a pretrained pair as it is, by its folder or its name on the hub (pairs.py)."""
    from models.hf_hub import local_or_name

    cache_dir, source = Path(cache_dir or Config.cache_dir), local_or_name(name)

    def load():
        from retrieval.encoder import load_pretrained_encoder

        return load_pretrained_encoder(name, max_tokens=Config.max_tokens, device=device, precision=precision)

    if Path(source).is_dir():
        return Searcher(dual_encoder_key(Path(source)), load, cache_dir=cache_dir)
    loaded = load()  # downloads it: only then is it known which state of it the hub holds
    from huggingface_hub import try_to_load_from_cache

    state = str(try_to_load_from_cache(name, "config.json"))  # .../snapshots/COMMIT/config.json
    return Searcher(digest([name, Path(state).parent.name]), lambda: loaded, cache_dir=cache_dir)


def check_index(name: str) -> None:
    """Raise ValueError for what no index (index.py) is called."""
    if not re.fullmatch(r"faiss|milvus|.+\.db|https?://.+", name):
        raise ValueError(f"--index must be faiss, milvus, a file FILE.db or an http address, got {name}")
