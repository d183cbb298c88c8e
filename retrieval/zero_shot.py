"""Zero-shot classification: rank labels by the cosine of a photo with sentences made from each label."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.class_folders import find_class_folders
from data.class_prompts import prompts
from data.storage import list_files
from data.unknown_words import describe_unknown_query
from retrieval.encoder import Encoder


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
    for label in labels:
        describe_unknown_query(encoder.tokenizer, label, kind="label")  # raises for one without a known word
    label_prompts = [prompts(label, templates) for label in labels]
    rows = encoder.encode_captions([prompt for sentences in label_prompts for prompt in sentences], "labels")
    counts = [len(sentences) for sentences in label_prompts]
    return F.normalize(torch.stack([label_rows.mean(0) for label_rows in rows.split(counts)]), dim=1)


def class_folders(folder: Path) -> tuple[list[str], list[Path], Tensor, list[str]]:
    """List a folder with one subfolder per class, `golden_retriever/photo.jpg`.

    Returns the K class names, the N photos, their class indices (N,) and lines for the terminal. Raises
    FileNotFoundError if the folder does not exist, and ValueError if its subfolders are not classes without doubt
    (`find_class_folders`) or are the splits of a data set.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder} (--zero-shot)")
    try:
        classes = find_class_folders(folder, list_files(folder))
    except ValueError as error:
        raise ValueError(f"{folder} cannot be used as class folders: {error}") from None
    if classes.split_folders:
        inner = " or ".join(str(folder / name) for name in classes.split_folders)
        raise ValueError(f"the subfolders of {folder} are splits, not classes: pass one of them, {inner}")
    index = {label: row for row, label in enumerate(classes.labels)}
    truth = torch.tensor([index[label] for label in classes.class_of.values()])
    return classes.labels, [folder / photo for photo in classes.class_of], truth, classes.notes


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
    seen = set()
    for label in labels:
        if not label.strip():
            raise ValueError("a label is empty")
        if label in seen:
            raise ValueError(f"the label {label!r} is given twice")
        seen.add(label)
