"""Search with a trained run or a pretrained dual encoder, for infer.py and app.py. Models are loaded at first use."""

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
Target = Literal["photos", "captions"]  # what to search in


class Match(NamedTuple):
    """A retrieved photo (its path) or caption with its score, or a label with its probability.

    The score is the cosine with the query, minus the CSLS correction if the run has a query bank (csls.py).
    """

    score: float
    item: Path | str


class Searcher:
    """Encode queries with a model, and open the galleries of photos and captions that it has encoded.

    load: called at first use, returns the Encoder and the CLIPModel. key: identifies the weights (model_key.py).
    """

    def __init__(self, key: str, load: Callable[[], tuple["Encoder", "CLIPModel"]], *, cache_dir: Path):
        self.key, self.load, self.store = key, load, cache_dir / "galleries"

    @cached_property
    def _loaded(self):
        return self.load()

    @property
    def encoder(self) -> "Encoder":
        return self._loaded[0]

    def embed_sentences(self, sentences: Sequence[str], *, target: Target = "photos") -> "Tensor":
        """Encode sentences as queries (Q, F). Raises ValueError for an empty sentence."""
        for number, sentence in enumerate(sentences, start=1):
            if not sentence.strip():
                raise ValueError(f"sentence {number} is empty" if len(sentences) > 1 else "the sentence is empty")
        return self._to_query(self.encoder.encode_captions(sentences, "sentences"), target != "captions")

    def describe_truncation(self, sentence: str) -> str | None:
        """Return a message if the sentence is longer than max_tokens and therefore truncated, else None."""
        length, limit = len(self.encoder.tokenizer(sentence, verbose=False)["input_ids"]), self.encoder.max_tokens
        if length <= limit:
            return None
        return f"the sentence is truncated: the model reads {limit} of its {length} tokens: {sentence[:60]}…"

    def embed_images(self, paths: Sequence[Path], *, target: Target = "photos") -> "Tensor":
        """Encode photos as queries (Q, F). Raises OSError with the reason for one that cannot be read."""
        return self._to_query(self._embed(paths), target != "photos")

    def _to_query(self, emb, cross_modal):
        """Append the CSLS weight, 1 across modalities, else 0: the bank measures image-text hubness only."""
        from retrieval.csls import csls_query

        return emb if self.encoder.query_bank is None else csls_query(emb, float(cross_modal))

    def _embed(self, paths):
        """Encode photos -> unit rows (Q, D)."""
        import torch

        # Starting a worker process takes longer than decoding a photo.
        rows, encoder = [], replace(self.encoder, num_workers=0)
        for batch, reasons in encoder.encode_image_batches(paths, "photos"):
            if any(reasons):
                raise OSError(next(filter(None, reasons)))
            rows.append(batch)
        return torch.cat(rows)

    def classify(self, photo: Path, labels: Sequence[str]) -> list[Match]:
        """Rank the labels by probability, best first. Raises ValueError for fewer than two, empty or equal labels."""
        from retrieval.zero_shot import class_embeddings, probabilities

        photo_emb, temperature = self._embed([photo]), self._loaded[1].temperature.item()
        (probs,) = probabilities(photo_emb, class_embeddings(self.encoder, labels), temperature).tolist()
        return sorted(map(Match, probs, labels), key=lambda match: -match.score)

    def gallery(self, photos: ImageList) -> Gallery:
        """Open the gallery of these photos and encode the new ones. Prints the speed and the unreadable photos."""
        store, messages = self.store / self._name(photos.name, str(photos.root.resolve())), []
        gallery = open_gallery(store, photos, lambda names: self._encode(photos.root, names, messages))
        if messages:
            print(*messages, file=sys.stderr)
        if gallery.unreadable:
            from runtime.text import format_examples, format_skipped

            examples = format_examples([f"{name}: {reason}" for name, reason in gallery.unreadable.items()])
            print(f"{format_skipped(len(gallery.unreadable))}: {examples}", file=sys.stderr)
        return gallery

    def embed_captions(self, captions: Sequence[str]) -> np.ndarray:
        """Encode captions as rows (M, F) to search in, cached on disk."""
        path = self.store / f"{self._name('captions', *captions)}.npy"
        if not path.is_file():
            rows, query_bank = self.encoder.encode_captions(captions, "captions"), self.encoder.query_bank
            rows = (rows if query_bank is None else query_bank.csls_captions(rows)).numpy()
            with writable(self.store):
                replace_file(path, lambda tmp: write_embeddings(tmp, [rows], rows.shape[1]))
        return open_embeddings(path)

    def _encode(self, root, names, messages) -> Iterator[tuple[np.ndarray, list[str | None]]]:
        remaining, started = iter(names), time.perf_counter()
        # Decoding a camera's photo takes as long as encoding it.
        workers = max(self.encoder.num_workers, (os.cpu_count() or 1) // 2)
        encoder, query_bank = replace(self.encoder, num_workers=workers), self.encoder.query_bank
        for rows, reasons in encoder.encode_image_batches([root / name for name in names], "photos"):
            batch = zip(reasons, remaining, strict=False)
            rows = rows if query_bank is None or not len(rows) else query_bank.csls_images(rows)
            yield rows.numpy(), [reason and reason.removeprefix(f"{root / name}: ") for reason, name in batch]
        seconds = time.perf_counter() - started
        messages.append(f"{len(names):,} photos encoded in {seconds:.0f} s ({len(names) / seconds:.0f} photos/s)")

    def _name(self, name, *parts):
        """Return a file name that depends on the weights and on `parts`."""
        return f"{slug(name, max_length=SLUG_LENGTH) or 'photos'}-{digest([self.key, *parts])[:16]}"


def combine_queries(sentence_emb: "Tensor | None", photo_emb: "Tensor | None") -> "Tensor":
    """Combine a sentence and a photo into one query (Q, F): their normalised sum, "this photo, but in snow".

    If one of them is None, the other is returned unchanged.
    """
    import torch.nn.functional as F

    if sentence_emb is None or photo_emb is None:
        return photo_emb if sentence_emb is None else sentence_emb
    return F.normalize(sentence_emb + photo_emb, dim=-1)


def search_captions(queries: "Tensor", rows: np.ndarray, captions: Sequence[str], k: int) -> list[list[Match]]:
    """Return for each query (Q, F) the k captions whose rows (M, F) score highest, best first."""
    from retrieval.metrics import top_k

    return _matches(*top_k(queries, rows, k), captions)


def search_images(queries: "Tensor", gallery: Gallery, k: int, index: str | None = None) -> list[list[Match]]:
    """Return for each query (Q, F) the k photos of the gallery that score highest, best first.

    The search is exact, unless the name of an index (ann_index.py) is given.
    """
    if index is not None:
        from retrieval.ann_index import search_index

        return _matches(*search_index(index, gallery, queries, k), gallery.paths)
    from retrieval.metrics import top_k

    return _matches(*top_k(queries, gallery.embeddings, k), gallery.paths)


def _matches(scores, indices, items):
    found = zip(scores.tolist(), indices.tolist(), strict=True)
    return [[Match(score, items[row]) for score, row in zip(*pair, strict=True)] for pair in found]


def searcher_for_run(folder: Path, *, device: str, precision: str, cache_dir: Path | None) -> Searcher:
    """Return the Searcher of a run's best checkpoint. cache_dir None is the cache of the run's configuration."""

    def load():
        from retrieval.encoder import load_encoder

        return load_encoder(folder, device=device, precision=precision)

    return Searcher(weights_key(folder), load, cache_dir=Path(cache_dir or read_config(folder).cache_dir))


def searcher_for_pretrained(name: str, *, device: str, precision: str, cache_dir: Path | None) -> Searcher:
    """Return the Searcher of a pretrained dual encoder, given its folder or its name on the Hugging Face Hub."""
    from models.hf_hub import local_or_name

    cache_dir, source = Path(cache_dir or Config.cache_dir), local_or_name(name)

    def load():
        from retrieval.encoder import load_pretrained_encoder

        return load_pretrained_encoder(name, max_tokens=Config.max_tokens, device=device, precision=precision)

    if Path(source).is_dir():
        return Searcher(dual_encoder_key(Path(source)), load, cache_dir=cache_dir)
    loaded = load()  # only after the download is the hub's current revision known
    from huggingface_hub import try_to_load_from_cache

    config_path = str(try_to_load_from_cache(name, "config.json"))  # .../snapshots/COMMIT/config.json
    return Searcher(digest([name, Path(config_path).parent.name]), lambda: loaded, cache_dir=cache_dir)


def check_index(name: str) -> None:
    """Raise ValueError unless `name` is one that ann_index.py accepts."""
    if not re.fullmatch(r"faiss|milvus|.+\.db|https?://.+", name):
        raise ValueError(f"--index must be faiss, milvus, a file FILE.db or an http(s) address, got {name}")
