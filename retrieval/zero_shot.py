"""Zero-shot classification: rank labels by the cosine of a photo with sentences made from each label."""

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
HAN_CHARACTER = re.compile(f"[{HAN}]")
DOUBLE_ARTICLE = re.compile(r"\b(?:an?|the) (?=(?:an?|the|some|one|two|three) )", re.IGNORECASE)
ARTICLE_BEFORE_VOWEL = re.compile(r"\ba (?=[aeiou])", re.IGNORECASE)


def classify(
    encoder: Encoder, paths: Sequence[Path], labels: Sequence[str], *, temperature: float, templates: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Classify images -> label probabilities (N, K) of the N readable ones; readable (len(paths),) bool.

    Raises ValueError for fewer than two, empty or equal labels, and for a template without exactly one {}.
    """
    class_emb = class_embeddings(encoder, labels, templates)
    image_emb, readable = encoder.encode_images(paths, "photos")
    return probabilities(image_emb.view(-1, class_emb.shape[1]), class_emb, temperature), readable


def probabilities(image_emb: Tensor, class_emb: Tensor, temperature: float) -> Tensor:
    """Return the softmax over labels of cosine / temperature (arXiv 2103.00020, §3.1.2).

    image_emb (N, D), class_emb (K, D), unit rows -> (N, K).
    """
    return (image_emb @ class_emb.T / temperature).softmax(1)


def class_embeddings(encoder: Encoder, labels: Sequence[str], templates: Sequence[str] = ()) -> Tensor:
    """Return a unit row per label, (K, D): the mean of its prompts' embeddings (arXiv 2103.00020, §3.1.4)."""
    _check_labels(labels)
    label_prompts = [prompts(label, templates) for label in labels]
    rows = encoder.encode_captions([prompt for sentences in label_prompts for prompt in sentences], "labels")
    counts = [len(sentences) for sentences in label_prompts]
    return F.normalize(torch.stack([label_rows.mean(0) for label_rows in rows.split(counts)]), dim=1)


def prompts(label: str, templates: Sequence[str] = ()) -> list[str]:
    """Fill a label into the templates, by default those of its language (English or Chinese).

    An article of the label replaces the template's: "an owl" gives "a photo of an owl".
    """
    templates = templates or (CHINESE_TEMPLATES if HAN_CHARACTER.search(label) else TEMPLATES)
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template needs one {{}} for the label, got {template!r}")
    sentences = [DOUBLE_ARTICLE.sub("", template.replace("{}", label.strip())) for template in templates]
    return [ARTICLE_BEFORE_VOWEL.sub("an ", sentence) for sentence in sentences]


def class_folders(folder: Path) -> tuple[list[str], list[Path], Tensor]:
    """List a folder with one subfolder per class, `golden_retriever/photo.jpg` -> labels, images, class index (N,).

    Raises FileNotFoundError if the folder does not exist, ValueError for fewer than two classes with photos.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder} (--zero-shot)")
    classes = {
        path: sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    classes = {path: photos for path, photos in classes.items() if photos}
    if len(classes) < 2:
        raise ValueError(f"{folder} contains {len(classes)} folders with photos: it needs one per class, at least two")
    photos = [photo for files in classes.values() for photo in files]
    truth = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(files) for files in classes.values()]))
    return [" ".join(re.split(r"[_\-\s]+", path.name)).strip() for path in classes], photos, truth


def accuracy(probability: Tensor, truth: Tensor) -> dict[str, float]:
    """Return top-1, top-5 and mean per-class top-1 accuracy in percent; ties count against the model.

    probability (N, K), truth (N,) int64 class indices. Top-5 is omitted for five classes or fewer.
    """
    true_probability = probability.gather(1, truth[:, None])
    rank = (probability >= true_probability).sum(1)  # from 1
    correct = (rank == 1).double()
    by_class = [correct[truth == index].mean() for index in truth.unique()]
    scores = {"top1": correct.mean(), "mean_class_top1": torch.stack(by_class).mean()}
    if probability.shape[1] > 5:
        scores["top5"] = (rank <= 5).double().mean()
    return {name: 100 * score.item() for name, score in scores.items()}


def confusion(probability: Tensor, truth: Tensor) -> Tensor:
    """Count how often class i (row) was predicted as class j (column): (N, K), (N,) -> (K, K) int64."""
    classes = probability.shape[1]
    return (truth * classes + probability.argmax(1)).bincount(minlength=classes**2).view(classes, classes)


def _check_labels(labels):
    if len(labels) < 2:
        raise ValueError(f"classification needs at least two labels, got {len(labels)}")
    for label in labels:
        if not label.strip():
            raise ValueError("a label is empty")
        if labels.count(label) > 1:
            raise ValueError(f"the label {label!r} is given twice")
