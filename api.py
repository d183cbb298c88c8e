"""Use from Python, in a notebook or in your own program: `import api`.

Load a run or a pretrained dual encoder with `load`, train from a Config with `train`. docs/python.md has examples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from config import Config, default_config

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from retrieval.searcher import Match

__all__ = ["Config", "Retriever", "default_config", "load", "train"]


class Retriever:
    """A dual encoder that embeds sentences and photos, and searches and measures with them; see `load`."""

    def __init__(self, searcher, config: Config):
        self._searcher, self.config = searcher, config

    def embed_sentences(self, sentences: Sequence[str]) -> "np.ndarray":
        """Embed sentences -> (Q, D) float32 unit rows; the dot product with a photo's row is their cosine.

        Raises ValueError for an empty sentence.
        """
        for number, sentence in enumerate(sentences, start=1):
            if not sentence.strip():
                raise ValueError(f"sentence {number} is empty")
        return self._searcher.encoder.encode_captions(list(sentences), "sentences").numpy()

    def embed_photos(self, photos: Sequence["str | Path | Image"]) -> "np.ndarray":
        """Embed photos, given as files or as Pillow images -> (N, D) float32 unit rows.

        Raises OSError with the reason for one that cannot be read.
        """
        import numpy as np
        import torch

        from data.image_io import load_image, to_rgb

        encoder = self._searcher.encoder
        rows = [np.empty((0, 0), np.float32)]
        for start in range(0, len(photos), 64):
            images = [
                load_image(photo, encoder.preprocess.draft_size)
                if isinstance(photo, str | Path)
                else np.asarray(to_rgb(photo))
                for photo in photos[start : start + 64]
            ]
            pixels = np.stack([encoder.preprocess(image).transpose(2, 0, 1) for image in images])
            rows.append(encoder.embed_pixels(torch.from_numpy(np.ascontiguousarray(pixels))).numpy())
        return np.concatenate(rows[1:]) if len(rows) > 1 else rows[0]

    def search(self, folder: str | Path, query: "str | Path", k: int = 8) -> "list[Match]":
        """Find the k photos of a folder that fit a sentence, or that resemble a photo (a Path), best first.

        Each photo of the folder is encoded once and cached. A match has `score` and `item`, the photo's path. The score
        is the cosine, minus the hubness correction if the run has a query bank.
        """
        from retrieval.embedding_store import list_images
        from retrieval.searcher import search_images

        searcher = self._searcher
        emb = searcher.embed_images([query]) if isinstance(query, Path) else searcher.embed_sentences([query])
        (matches,) = search_images(emb, searcher.gallery(list_images(Path(folder).expanduser())), k)
        return matches

    def evaluate(
        self, split: Literal["train", "val", "test"] = "test", *, dataset: str | None = None
    ) -> dict[str, float]:
        """Measure retrieval over all photos and captions of a split, by the cosine -> retrieval_metrics.

        dataset: a name, folder or caption file; default: the data set of the run.
        """
        from dataclasses import replace

        from data.loading import open_data
        from retrieval.metrics import retrieval_metrics

        config = self.config
        if dataset is not None:
            config = replace(config, dataset=dataset, data_dir=None, split="auto", limit=None)
        encoded = self._searcher.encoder.encode_split(open_data(config).split(split), split)
        return retrieval_metrics(encoded.image_emb, encoded.text_emb, encoded.caption_image_ids)


def load(
    source: str | Path,
    *,
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto",
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    cache_dir: str | Path | None = None,
    mirrored: bool | None = None,
    embed_dims: int | None = None,
) -> Retriever:
    """Load a run's best checkpoint or a shared run (a folder, or OWNER/NAME on the hub), or a pretrained dual encoder.

    cache_dir: folder for embeddings of galleries; default: that of the run, else "cache". mirrored: read each photo
    mirrored too, which takes twice as long; None reads photos as the run was trained for. embed_dims: use the first
    values of embeddings only, for a run that was trained with nested_dims.
    """
    from retrieval.searcher import searcher_for_pretrained, searcher_for_run
    from runtime.run_dir import CONFIG, read_shared_config

    options = {"device": device, "precision": precision, "cache_dir": None if cache_dir is None else Path(cache_dir)}
    options["mirrored"] = mirrored
    folder = _find_run(source)
    if (folder / "log.jsonl").is_file() or (folder / "towers").is_dir():
        return Retriever(searcher_for_run(folder, embed_dims=embed_dims, **options), read_shared_config(folder))
    if folder.is_dir() and not any((folder / name).is_file() for name in (CONFIG, "open_clip_config.json")):
        raise ValueError(f"{folder} is neither a run nor a pretrained model: it has no {CONFIG}")
    if embed_dims is not None:
        raise ValueError(f"embed_dims needs a run that was trained with nested_dims, which {source} is not")
    return Retriever(searcher_for_pretrained(str(source), **options), Config(model=str(source)))


def _find_run(source):
    """Return the folder of a run or of a shared run on the hub, and the path of any other source."""
    from models.hub_run import find_hub_run, report_local_folder

    folder = Path(source).expanduser()
    if folder.is_dir():
        report_local_folder(folder)
        return folder
    return find_hub_run(str(source)) or folder


def train(config: Config) -> Path:
    """Train a model as `python train.py` does, and return the run's folder, for `load`.

    Raises ValueError or OSError with one line for settings or data that cannot be used.
    """
    from data.loading import open_data
    from runtime.text import wrap
    from training.trainer import train

    data = open_data(config)
    print(wrap(data.describe()), flush=True)
    return train(config, data, None)
