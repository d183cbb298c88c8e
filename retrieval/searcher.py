"""Search with a trained run or a pretrained dual encoder, for infer.py and app.py.

Models are loaded at first use. A sentence needs none if its text tower was exported before (onnx_text.py): PyTorch is
then not even imported.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from config import Config
from data.archives import set_index_folder
from retrieval import onnx_text
from retrieval.embed_dims import check_embed_dims
from retrieval.embedding_store import Gallery, ImageList, open_gallery, writable
from retrieval.gallery_settings import ReadingSettings, gallery_folder
from retrieval.gallery_shards import has_shards
from retrieval.model_key import digest, dual_encoder_key, weights_key
from retrieval.onnx_text import OnnxTextEncoder, text_encoder_folder
from retrieval.search_flags import Target
from runtime.atomic_io import replace_file
from runtime.cache import load_cached, require
from runtime.launcher import num_processes, process_rank
from runtime.mmap_store import open_embeddings, write_embeddings
from runtime.run_dir import read_shared_config
from runtime.text import slug

if TYPE_CHECKING:
    from modules import CLIPModel
    from retrieval.encoder import Encoder

SLUG_LENGTH = 40  # characters


# What transformers imports with its models, and a text tower does not use: 3 of the 4 seconds of importing them.
UNUSED_BY_TEXT = (
    *("torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint"),
    *("torch.nn.attention.flex_attention", "torchvision", "accelerate", "scipy", "sklearn", "timm", "sympy"),
)


class _NewPhotos(Exception):
    """A gallery cannot be opened without encoding photos."""


class Match(NamedTuple):
    """A retrieved photo (its path) or caption with its score, or a label with its probability.

    The score is the cosine with the query, minus the CSLS correction if the run has a query bank (csls.py).
    """

    score: float
    item: Path | str


class Searcher:
    """Encode queries with a model, and open the galleries of photos and captions that it has encoded.

    load: called at first use, returns the Encoder and the CLIPModel; its argument text_only leaves out the image tower.
    key: identifies the weights (model_key.py). use_onnx: encode sentences with the exported text tower, if there is
    one. settings: how the photos of galleries are read; `load` follows them. text_only: set it if all queries are
    sentences and `gallery` will not be called; sentences then need neither the image tower nor the libraries for it.
    Queries are (Q, F) float32.
    """

    def __init__(
        self,
        key: str,
        load: Callable[..., tuple["Encoder", "CLIPModel"]],
        *,
        cache_dir: Path,
        use_onnx: bool = False,
        settings: ReadingSettings = ReadingSettings(),  # noqa: B008 - immutable
    ):
        self.settings = settings
        self.key, self.load, self.store = key, load, cache_dir / "galleries"
        set_index_folder(cache_dir)
        self.text_encoder_folder = text_encoder_folder(cache_dir, key)
        self.use_onnx = use_onnx and onnx_text.is_available()
        self.export_is_damaged = False
        self.gallery_size = 0  # photos of the gallery that was opened last
        self.text_only = False
        self.dim: int | None = None  # F, once a query was encoded

    @cached_property
    def _loaded(self):
        return self.load()

    @cached_property
    def _loaded_text(self):
        from runtime.deferred_import import deferred_import

        with deferred_import(UNUSED_BY_TEXT):
            return self.load(text_only=True)

    def text_model(self) -> tuple["Encoder", "CLIPModel"]:
        """Return an Encoder of sentences and its CLIPModel, with text_only without an image tower."""
        return self._loaded_text if self.text_only and "_loaded" not in self.__dict__ else self._loaded

    @property
    def encoder(self) -> "Encoder":
        return self._loaded[0]

    def model(self) -> tuple["Encoder", "CLIPModel"]:
        """Return the Encoder and the CLIPModel, loaded at the first call."""
        return self._loaded

    @cached_property
    def onnx_text_encoder(self) -> OnnxTextEncoder | None:
        """The exported text tower, or None without one, or if the model is loaded already."""
        is_loaded = "_loaded" in self.__dict__ or "_loaded_text" in self.__dict__
        if not self.use_onnx or is_loaded or not self.text_encoder_folder.is_dir():
            return None
        found = load_cached(self.text_encoder_folder, OnnxTextEncoder)
        self.export_is_damaged = found is None
        return found

    def embed_sentences(self, sentences: Sequence[str], *, target: Target = "photos") -> np.ndarray:
        """Encode sentences as queries. Raises ValueError for an empty sentence."""
        for number, sentence in enumerate(sentences, start=1):
            if not sentence.strip():
                raise ValueError(f"sentence {number} is empty" if len(sentences) > 1 else "the sentence is empty")
        if self.onnx_text_encoder:
            emb, csls = self.onnx_text_encoder.encode(sentences), self.onnx_text_encoder.csls
        else:
            encoder, _ = self.text_model()
            emb, csls = encoder.encode_captions(sentences, "queries").numpy(), encoder.query_bank is not None
        return self._to_query(emb, csls, target != "captions")

    def warnings(self, sentence: str) -> list[str]:
        """Return messages about a sentence that the model reads only in part: truncated, or with unknown words.

        Raises ValueError if the model knows none of its words.
        """
        from data.unknown_words import describe_unknown_query

        if text := self.onnx_text_encoder:
            tokenizer, limit, dual_encoder = text.tokenizer, text.max_tokens, text.dual_encoder
        else:
            encoder, model = self.text_model()
            tokenizer, limit = encoder.tokenizer, encoder.max_tokens
            dual_encoder = model.text_encoder.pooling == "own"
        messages = []
        if (length := len(tokenizer(sentence, verbose=False)["input_ids"])) > limit:
            read = f"the model reads {limit} of its {length} tokens"
            messages.append(f"the sentence is truncated: {read}: {sentence[:60]}…")
        unknown = describe_unknown_query(tokenizer, sentence, dual_encoder=dual_encoder)
        return messages + [unknown] * (unknown is not None)

    def embed_images(self, paths: Sequence[Path], *, target: Target = "photos") -> np.ndarray:
        """Encode photos as queries. Raises OSError with the reason for one that cannot be read."""
        emb, csls = self._embed(paths).numpy(), self.encoder.query_bank is not None
        return self._to_query(emb, csls, target != "photos")

    def _to_query(self, emb, csls, cross_modal):
        """Append the CSLS weight, 1 across modalities, else 0: the bank measures image-text hubness only."""
        rows = np.append(emb, np.full((len(emb), 1), cross_modal, emb.dtype), axis=1) if csls else emb
        self.dim = rows.shape[1]
        return rows

    def _embed(self, paths):
        """Encode photos -> unit rows (Q, D)."""
        import torch

        # Starting a worker process takes longer than decoding a photo.
        rows, encoder = [], replace(self.encoder, num_workers=0)
        for batch, reasons in encoder.encode_image_batches(paths, "queries"):
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

    def encoded_gallery(self, photos: ImageList) -> Gallery | None:
        """Open the gallery of these photos as `gallery` does, or return None if new photos are to be encoded."""

        def refuse(names):
            raise _NewPhotos

        if num_processes() > 1 or has_shards(self._gallery_folder(photos)):
            return None
        try:
            return self._open_gallery(photos, refuse)
        except _NewPhotos:
            return None

    def gallery(self, photos: ImageList, on_progress: Callable[[int, int], None] | None = None) -> Gallery:
        """Open the gallery of these photos and encode the new ones. Prints the speed and the unreadable photos.

        on_progress: called with the number of new photos that are encoded and saved, and the number of all new ones.
        """
        started = []

        def gallery_encoder():  # PyTorch is imported and the model loaded only if there are photos to encode
            if not started:
                from retrieval.gallery_encoding import GalleryEncoder

                started.append(GalleryEncoder(self.encoder, photos.root, self._gallery_folder(photos), on_progress))
            return started[0]

        gallery = self._open_gallery(
            photos, lambda names: gallery_encoder()(names), lambda names: gallery_encoder().announce(names)
        )
        if started and (message := started[0].report()):
            print(message, file=sys.stderr)
        return gallery

    def _gallery_folder(self, photos):
        root = str(photos.root.resolve())
        return gallery_folder(self.settings, lambda *parts: self.store / self._name(photos.name, root, *parts))

    def _open_gallery(self, photos, encode, announce=None):
        gallery = open_gallery(self._gallery_folder(photos), photos, encode, announce, dim=self.dim)
        self.gallery_size = len(gallery.names)
        if gallery.unreadable and process_rank() == 0:
            from runtime.text import format_examples, format_skipped

            examples = format_examples([f"{name}: {reason}" for name, reason in gallery.unreadable.items()])
            print(f"{format_skipped(len(gallery.unreadable))}: {examples}", file=sys.stderr)
        return gallery

    def embed_captions(self, captions: Sequence[str]) -> np.ndarray:
        """Encode captions as rows (M, F) to search in, cached on disk."""
        path = self.store / f"{self._name('captions', *captions)}.npy"
        cached = load_cached(path, lambda path: _open_rows(path, len(captions)))
        if cached is None:
            rows, query_bank = self.encoder.encode_captions(captions, "gallery"), self.encoder.query_bank
            rows = (rows if query_bank is None else query_bank.csls_captions(rows)).numpy()
            with writable(self.store):
                replace_file(path, lambda tmp: write_embeddings(tmp, [rows], rows.shape[1]))
            cached = open_embeddings(path)
        return cached

    def _name(self, name, *parts):
        """Return a file name that depends on the weights and on `parts`."""
        return f"{slug(name, max_length=SLUG_LENGTH) or 'photos'}-{digest([self.key, *parts])[:16]}"


def _open_rows(path, count):
    rows = open_embeddings(path)
    require(len(rows) == count and rows.dtype == np.float16, f"it has {rows.dtype} rows {rows.shape}")
    require(rows.flags.c_contiguous and path.stat().st_size == rows.offset + rows.nbytes, "it has another size")
    return rows


def combine_queries(sentence_emb: np.ndarray | None, photo_emb: np.ndarray | None) -> np.ndarray:
    """Combine a sentence and a photo into one query (Q, F): their normalised sum, "this photo, but in snow".

    If one of them is None, the other is returned unchanged.
    """
    if sentence_emb is None or photo_emb is None:
        return photo_emb if sentence_emb is None else sentence_emb
    total = sentence_emb + photo_emb
    return total / np.linalg.norm(total, axis=-1, keepdims=True).clip(1e-12)


def search_captions(queries: np.ndarray, rows: np.ndarray, captions: Sequence[str], k: int) -> list[list[Match]]:
    """Return for each query (Q, F) the k captions whose rows (M, F) score highest, best first."""
    return _matches(*_top_k(queries, rows, k), captions)


def search_images(queries: np.ndarray, gallery: Gallery, k: int, index: str | None = None) -> list[list[Match]]:
    """Return for each query (Q, F) the k photos of the gallery that score highest, best first.

    The search is exact, unless the name of an index (ann_index.py) is given. Raises ValueError if the gallery has
    another dimension, which only a damaged file has.
    """
    if (dim := gallery.embeddings.shape[1]) != queries.shape[1]:
        raise ValueError(
            f"the rows in {gallery.store} have {dim} values, those of the model {queries.shape[1]}: delete that "
            "folder; the photos are then encoded again"
        )
    if index is None:
        nearest = _top_k(queries, gallery.embeddings, k)
    else:
        from retrieval.ann_index import search_index

        nearest = search_index(index, gallery, queries, k)
    found = _matches(*nearest, gallery.names)
    return [[Match(match.score, gallery.root / match.item) for match in matches] for matches in found]


def _top_k(queries, rows, k):
    """Search with PyTorch if it was imported to encode the queries, else with NumPy."""
    if "torch" not in sys.modules:
        from retrieval.numpy_search import top_k

        return top_k(queries, rows, k)
    import torch

    from retrieval.exact_search import top_k

    return top_k(torch.from_numpy(queries), rows, k)


def _matches(scores, indices, items):
    found = zip(scores.tolist(), indices.tolist(), strict=True)
    return [[Match(score, items[row]) for score, row in zip(*pair, strict=True)] for pair in found]


def searcher_for_run(
    folder: Path,
    *,
    device: str,
    precision: str,
    cache_dir: Path | None,
    mirrored: bool | None = None,
    embed_dims: int | None = None,
) -> Searcher:
    """Return the Searcher of a run's best checkpoint. cache_dir None is the cache of the run's configuration.

    mirrored: whether photos are read a second time, mirrored; None reads them as the run was trained for (tta_flip).
    embed_dims: search with the first values of embeddings only. Raises ValueError for a width that the run was not
    trained with.
    """
    embed_dims = check_embed_dims(folder, embed_dims)

    def load(text_only: bool = False):
        from retrieval.encoder import load_encoder

        options = {"device": device, "precision": precision, "text_only": text_only, "embed_dims": embed_dims}
        return _load(lambda: load_encoder(folder, **options), settings)

    config = read_shared_config(folder)
    settings = ReadingSettings(precision, None if mirrored == config.tta_flip else mirrored)
    use_onnx, key = _onnx_fits(device, precision), weights_key(folder)
    if embed_dims is not None:
        key = digest([key, f"embed_dims={embed_dims}"])
    cache_dir = Path(cache_dir or config.cache_dir)
    return Searcher(key, load, cache_dir=cache_dir, use_onnx=use_onnx, settings=settings)


def _load(load, settings):
    """Return the Encoder, which reads photos as the settings say, and the model."""
    from runtime.device import use_own_gpu

    use_own_gpu()
    encoder, model = load()
    return encoder if settings.mirrored is None else replace(encoder, tta_flip=settings.mirrored), model


def _onnx_fits(device, precision):
    """Return whether the settings leave the choice to the program: the exported tower is in float32 on the CPU."""
    return device in ("auto", "cpu") and precision in ("auto", "float32")


def searcher_for_pretrained(
    name: str, *, device: str, precision: str, cache_dir: Path | None, mirrored: bool | None = None
) -> Searcher:
    """Return the Searcher of a pretrained dual encoder, given its folder or its name on the Hugging Face Hub.

    mirrored: whether photos are read a second time, mirrored.
    """
    from models.hf_hub import dual_encoder_source

    cache_dir, source = Path(cache_dir or Config.cache_dir), dual_encoder_source(name)
    settings = ReadingSettings(precision, mirrored or None)

    def load(text_only: bool = False):
        from retrieval.encoder import load_pretrained_encoder

        options = {"max_tokens": Config.max_tokens, "device": device, "precision": precision, "text_only": text_only}
        return _load(lambda: load_pretrained_encoder(source, **options), settings)

    if Path(source).is_dir():
        key, use_onnx = dual_encoder_key(Path(source)), _onnx_fits(device, precision)
        return Searcher(key, load, cache_dir=cache_dir, use_onnx=use_onnx, settings=settings)
    loaded = load()  # only after the download is the hub's current revision known
    from huggingface_hub import try_to_load_from_cache

    paths = (try_to_load_from_cache(source, name) for name in ("config.json", "open_clip_config.json"))
    config_path = str(next(path for path in paths if isinstance(path, str)))  # .../snapshots/COMMIT/config.json
    key = digest([source, Path(config_path).parent.name])
    return Searcher(key, lambda **_: loaded, cache_dir=cache_dir, settings=settings)
