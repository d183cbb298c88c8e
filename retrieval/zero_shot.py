"""Classification without training for it: labels become sentences, and a photo takes the label whose sentences fit."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.records import IMAGE_SUFFIXES
from retrieval.encoder import Encoder
from runtime.text import HAN

TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "there is a {} in the photo")
CHINESE_TEMPLATES = ("{}", "一张{}的照片", "照片里有{}")
CHINESE = re.compile(f"[{HAN}]")
ARTICLE_TWICE = re.compile(r"\b(?:an?|the) (?=(?:an?|the|some|one|two|three) )", re.IGNORECASE)
ARTICLE_BEFORE_VOWEL = re.compile(r"\ba (?=[aeiou])", re.IGNORECASE)


def classify(
    encoder: Encoder, paths: Sequence[Path], labels: Sequence[str], *, temperature: float, templates: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Probabilities (N, K) of the labels for the N readable photos, and which were readable, (paths,) bool.

    Raises ValueError for labels or templates that make no choice.
    """
    class_emb = class_embeddings(encoder, labels, templates)
    image_emb, readable = encoder.encode_images(paths, "photos")
    return probabilities(image_emb.view(-1, class_emb.shape[1]), class_emb, temperature), readable


def probabilities(image_emb: Tensor, class_emb: Tensor, temperature: float) -> Tensor:
    """Softmax over the labels of cosine / temperature: (N, D), (K, D) unit rows → (N, K) (arXiv 2103.00020, §3.1.2)."""
    return (image_emb @ class_emb.T / temperature).softmax(1)


def class_embeddings(encoder: Encoder, labels: Sequence[str], templates: Sequence[str] = ()) -> Tensor:
    """A unit row per label, (K, D): the mean of its prompts' embeddings (arXiv 2103.00020, §3.1.4)."""
    _require_choice(labels)
    said = [prompts(label, templates) for label in labels]
    rows = encoder.encode_captions([prompt for sentences in said for prompt in sentences], "labels")
    return F.normalize(torch.stack([part.mean(0) for part in rows.split([len(part) for part in said])]), dim=1)


def prompts(label: str, templates: Sequence[str] = ()) -> list[str]:
    """The sentences that stand for a label; without templates, those of its language. "an owl" keeps its article."""
    templates = templates or (CHINESE_TEMPLATES if CHINESE.search(label) else TEMPLATES)
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template needs one {{}} where the label goes, got {template!r}")
    said = [ARTICLE_TWICE.sub("", template.replace("{}", label.strip())) for template in templates]
    return [ARTICLE_BEFORE_VOWEL.sub("an ", sentence) for sentence in said]


def class_folders(folder: Path) -> tuple[list[str], list[Path], Tensor]:
    """Labels, photos and each photo's label (N,) of a folder of class folders, `golden_retriever/photo.jpg`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder} (--zero-shot)")
    classes = {
        path: sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    classes = {path: photos for path, photos in classes.items() if photos}
    if len(classes) < 2:
        raise ValueError(f"{folder} holds {len(classes)} folders with photos: one per class is needed, at least two")
    photos = [photo for files in classes.values() for photo in files]
    numbers = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(files) for files in classes.values()]))
    return [" ".join(re.split(r"[_\-\s]+", path.name)).strip() for path in classes], photos, numbers


def accuracy(probability: Tensor, truth: Tensor) -> dict[str, float]:
    """Top-1, top-5 and the mean of the classes' top-1 in percent; a tie counts against the model.

    probability (N, K), truth (N,) int64. Top-5 is left out where there are no more than five classes.
    """
    own = probability.gather(1, truth[:, None])
    place = (probability >= own).sum(1)  # from 1
    right = (place == 1).double()
    by_class = [right[truth == number].mean() for number in truth.unique()]
    scores = {"top1": right.mean(), "mean_class_top1": torch.stack(by_class).mean()}
    if probability.shape[1] > 5:
        scores["top5"] = (place <= 5).double().mean()
    return {name: 100 * score.item() for name, score in scores.items()}


def confusion(probability: Tensor, truth: Tensor) -> Tensor:
    """How often class i (row) was taken for class j (column): (N, K), (N,) → (K, K) int64."""
    classes = probability.shape[1]
    return (truth * classes + probability.argmax(1)).bincount(minlength=classes**2).view(classes, classes)


def _require_choice(labels):
    if len(labels) < 2:
        raise ValueError(f"a choice needs at least two labels, got {len(labels)}")
    for label in labels:
        if not label.strip():
            raise ValueError("a label is empty")
        if labels.count(label) > 1:
            raise ValueError(f"the label {label!r} is given twice")
