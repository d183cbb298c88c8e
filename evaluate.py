"""Evaluate a run, `python evaluate.py runs/NAME --split test`, or a pretrained model, `--model NAME --dataset NAME`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import Config
from data.download import NOT_SHARED
from models.hub_run import find_run, hub_name, output_folder
from retrieval.embed_dims import check_embed_dims
from runtime import cli
from runtime.atomic_io import write_text
from runtime.run_dir import METRICS, newest_finished_run, read_config, read_metrics, read_shared_config
from runtime.text import display_text, slug

LOSS_BATCH, BATCH_LOSS = 32, "batch32_loss"
WITH_CSLS = "with CSLS"  # retrieval/csls.py
ANY_PHOTO = "any photo with that text"  # retrieval/text_metrics.py
MAX_REPEATED = 0.005  # share of the captions at several photos; above it, ANY_PHOTO is measured too


@dataclass(frozen=True)
class Flags:
    """Evaluate retrieval over the full pool of a split, or zero-shot classification with --zero-shot.

    R@K: percentage of queries with a correct match among the first K results. mAP@10: mean average precision of the
    first ten, in percent. medR: median rank of the best correct match, from 1. rsum: sum of the six R@K. top-5 error:
    share of queries without a correct match among the first five. "with CSLS": the same metrics with the hubness
    correction that search applies. "any photo with that text": where captions repeat, the same metrics with every
    photo that has the caption's text as correct, and every caption equal to one of a photo's own. top1, top5: accuracy
    in percent on a data set of class folders, where a photo is classified by the class names.
    """

    run: Annotated[Path | None, tyro.conf.Positional] = None  # a folder, or OWNER/NAME on the hub; default: newest
    model: str | None = None  # evaluate a pretrained model (CLIP, SigLIP ...) instead of a run: a name or a folder
    split: Literal["train", "val", "test"] = "test"  # the split to evaluate on
    report: bool = False  # also write report.html: what the run finds and misses, and pairs that look wrong
    embed_dims: int | None = None  # use the first values of embeddings, for a run trained with --nested-dims
    as_trained: bool = False  # preprocess photos as in training: ignore the run's --eval-image-scale and --tta-flip
    dataset: str | None = None  # evaluate on another data set than the run's: a name, folder or file
    zero_shot: Path | None = None  # classify the photos of a folder with one subfolder per class, named after the class
    templates: tuple[str, ...] = ()  # prompts with {} for a class name, replacing the built-in ones
    data_dir: Path | None = None  # where the data set is stored, if it has moved since training
    runs_dir: Path = Path(Config.runs_dir)  # the folder that contains the runs
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto uses the GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision of the encoders


def main() -> None:
    flags = cli.parse_flags(Flags)
    if flags.report and flags.zero_shot is not None:
        raise ValueError("--report describes retrieval: leave out --zero-shot")
    if flags.report and flags.embed_dims is not None:
        raise ValueError("--report describes the search with all values: leave out --embed-dims")
    folder, config = resolve_run(flags)
    if flags.model is None:
        check_embed_dims(folder, flags.embed_dims)
    output = output_folder(folder, flags.runs_dir)
    read_metrics(output)  # report a damaged file before minutes of encoding
    if flags.zero_shot is not None:
        return evaluate_zero_shot(folder, flags)
    from data.loading import open_run_data
    from retrieval.metrics import describe_small_pool

    data = open_run_data(folder, config, flags.data_dir, flags.split)
    split = data.split(flags.split)
    name = flags.split if flags.dataset is None else f"{flags.split} of {Path(data.name).name}"
    name += ", as trained" if flags.as_trained else ""
    name += dims_suffix(flags)
    pool = f"{flags.split} split of {data.name}, {len(split.paths):,} images, {len(split.captions):,} captions"
    print(display_text(f"{hub_name(folder) or folder}: {pool}"), flush=True)
    for line in (data.limit, describe_small_pool(flags.split, len(split.paths), len(split.captions))):
        if line:
            print(display_text(line), flush=True)
    encoder, model = load_model(folder, flags)
    encoded = encoder.encode_split(split, flags.split)
    for scoring, metrics in evaluate_retrieval(
        encoder, model, split, encoded, folder, flags, data.photo_classes()
    ).items():
        print(f"{scoring}\n{table(metrics)}" if scoring else table(metrics))
        save_metrics(output, f"{name}, {scoring}" if scoring else name, metrics)
    if flags.report:
        from data.loading import open_data
        from reporting.run_report import write_report

        everything = open_data(config, flags.data_dir)  # all splits, while an evaluation needs one
        frozen = flags.model is None and config.freeze_image and config.freeze_text
        report = write_report(folder, everything, encoder, flags.split, output, frozen=frozen, encoded=(split, encoded))
        print(f"report: {display_text(report)}")


def resolve_run(flags: Flags) -> tuple[Path, Config]:
    """Return the folder that metrics are written to, and the configuration that names the data set."""
    if flags.model is None:
        folder = find_run(flags.run, "a run") if flags.run else newest_finished_run(flags.runs_dir)
        config = read_shared_config(folder)
    elif flags.run is not None:
        raise ValueError("a run and --model exclude each other: give one of them")
    elif flags.embed_dims is not None:
        raise ValueError("--embed-dims needs a run that was trained with --nested-dims: leave out --model")
    elif flags.dataset is None and flags.zero_shot is None:
        raise ValueError("--model needs a data set to evaluate on: add --dataset NAME_OR_FOLDER")
    else:
        folder, config = flags.runs_dir / f"pretrained-{slug(flags.model, keep='.-')}", Config()
    if flags.dataset is not None:  # the run's data_dir belongs to its own data set
        config = replace(config, dataset=flags.dataset, data_dir=None, split="auto", limit=None)
    return folder, config


def load_model(folder: Path, flags: Flags):
    """Load the Encoder and the model of the run's best checkpoint or of the pretrained model."""
    settings = {"device": flags.device, "precision": flags.precision}
    if flags.model is not None:
        from retrieval.encoder import load_pretrained_encoder

        return load_pretrained_encoder(flags.model, max_tokens=Config.max_tokens, **settings)
    from retrieval.encoder import load_encoder

    return load_encoder(folder, as_trained=flags.as_trained, embed_dims=flags.embed_dims, **settings)


def dims_suffix(flags: Flags) -> str:
    """Return what a name in metrics.json says about --embed-dims."""
    return "" if flags.embed_dims is None else f", {flags.embed_dims} values"


def evaluate_retrieval(
    encoder, model, split, encoded, folder: Path, flags: Flags, classes: dict[Path, str] | None = None
) -> dict[str, dict]:
    """Return the retrieval metrics of an encoded split by scoring.

    The scorings are "" for the cosine, and WITH_CSLS if the run has a query bank, but not on the split that this bank
    was made from. If more than MAX_REPEATED of the captions are at several photos, the result also
    contains ANY_PHOTO, and prints why. classes: photo -> class name, for accuracy.
    """
    from retrieval.metrics import retrieval_metrics

    scorings = {"": (encoded.image_emb, encoded.text_emb)}
    if encoder.query_bank is not None and not (flags.split == "val" and _is_training_data(flags.dataset, folder)):
        scorings[WITH_CSLS] = encoder.query_bank.csls_pair(encoded.image_emb, encoded.text_emb)
    owners, temperature = encoded.caption_image_ids, model.temperature.item()
    results = {scoring: retrieval_metrics(*rows, owners) for scoring, rows in scorings.items()}
    if len(encoded.image_emb) >= LOSS_BATCH:
        results[""][BATCH_LOSS] = batch_loss(*scorings[""], owners, temperature=temperature)
    if classes:
        photos = [split.paths[row] for row in encoded.readable_images.tolist()]
        results[""] |= class_accuracy(encoder, encoded.image_emb, photos, classes, temperature, flags.templates)
    if repeated := find_repeated(encoder, split, encoded):
        from retrieval.text_metrics import retrieval_metrics_by_text

        for scoring, rows in scorings.items():
            name = f"{scoring}, {ANY_PHOTO}" if scoring else ANY_PHOTO
            results[name] = retrieval_metrics_by_text(*rows, owners, *repeated)
    return results


def find_repeated(encoder, split, encoded):
    """Return text_ids (M,) and photo_ids (N,) of an encoded split if its captions repeat, and print how many do.

    Returns None if at most MAX_REPEATED of the captions are at several photos.
    """
    import torch

    from data.image_lookup import number_photos
    from data.text_ids import number_texts
    from data.tokenizer import tokenize
    from data.unknown_words import unknown_ids
    from retrieval.text_metrics import count_repeated

    tokens = tokenize(encoder.tokenizer, split.captions, max_tokens=encoder.max_tokens)
    text_ids = torch.from_numpy(number_texts(tokens, split.captions, unknown_ids(encoder.tokenizer)))
    text_ids = text_ids[encoded.readable_captions]
    photo_ids = torch.from_numpy(number_photos(split.paths))[encoded.readable_images]
    repeated = count_repeated(encoded.caption_image_ids, text_ids, photo_ids)
    if repeated.share <= MAX_REPEATED:
        return None
    copies = f"; {repeated.photos:,} photos are copies of others" if repeated.photos else ""
    print(
        f"{repeated.captions:,} of {repeated.total:,} captions ({100 * repeated.share:.1f} %) are at several photos"
        f"{copies}: measured by photo, as papers do, and with {ANY_PHOTO} as correct",
        flush=True,
    )
    return text_ids, photo_ids


def class_accuracy(encoder, image_emb, photos, classes: dict[Path, str], temperature, templates) -> dict[str, float]:
    """Classify photos by the class names of their data set in prompt templates, and return `accuracy` in percent."""
    import torch

    from retrieval.zero_shot import accuracy, class_embeddings, probabilities

    labels = sorted(set(classes.values()))
    index = {label: row for row, label in enumerate(labels)}
    truth = torch.tensor([index[classes[photo]] for photo in photos])
    return accuracy(probabilities(image_emb, class_embeddings(encoder, labels, templates), temperature), truth)


def _is_training_data(dataset, folder):
    """Return whether `dataset` is the one that the run was trained on; its validation split is the query bank."""
    config = read_config(folder)
    if config.dataset.startswith(NOT_SHARED):  # any data set may be the one that the shared run was trained on
        return True
    trained_on = {Path(path).expanduser().resolve() for path in (config.dataset, config.data_dir) if path is not None}
    return dataset is None or Path(dataset).expanduser().resolve() in trained_on


def batch_loss(image_emb, text_emb, caption_image_ids, *, temperature: float) -> float:
    """Return the mean InfoNCE loss over batches of 32 images with one caption each, in a fixed random order.

    This is the validation loss that notebooks report; a model that ignores its inputs has log 32 = 3.47.
    image_emb (N, D), text_emb (M, D) unit rows, N at least 32, caption_image_ids (M,).
    """
    import numpy as np
    import torch

    from losses import info_nce

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(caption_image_ids), generator=generator)
    # np.unique returns the first caption of each image, in the random order.
    image_ids, first = np.unique(caption_image_ids[order].numpy(), return_index=True)
    pairs = torch.randperm(len(image_ids), generator=generator)
    images, texts = image_emb[torch.from_numpy(image_ids)[pairs]], text_emb[order[torch.from_numpy(first)[pairs]]]
    positives = torch.eye(LOSS_BATCH, dtype=torch.bool)
    batches = [slice(start, start + LOSS_BATCH) for start in range(0, len(pairs) - LOSS_BATCH + 1, LOSS_BATCH)]
    losses = [info_nce(images[rows] @ texts[rows].T, positives, temperature).item() for rows in batches]
    return sum(losses) / len(losses)


def evaluate_zero_shot(folder: Path, flags: Flags) -> None:
    """Print and save the zero-shot accuracy on a folder of class folders, and plot the confusion matrix."""
    from reporting.plots import plot_confusion
    from retrieval.zero_shot import accuracy, class_folders, classify, confusion

    labels, photos, truth, notes = class_folders(flags.zero_shot.expanduser())
    print("\n".join(map(display_text, notes)), end="\n" if notes else "")
    encoder, model = load_model(folder, flags)
    temperature = model.temperature.item()
    probability, readable = classify(encoder, photos, labels, temperature=temperature, templates=flags.templates)
    if not len(probability):
        raise ValueError(f"none of the {len(photos):,} photos in {flags.zero_shot} could be read")
    truth, name = truth[readable], flags.zero_shot.expanduser().resolve().name
    print(display_text(f"{folder}: {len(truth):,} photos of {len(labels)} classes in {flags.zero_shot}"))
    if not readable.all():
        from runtime.text import format_skipped

        print(format_skipped(int((~readable).sum())))
    metrics = accuracy(probability, truth)
    print(format_accuracy(metrics))
    folder = output_folder(folder, flags.runs_dir)
    update_metrics(folder, f"zero-shot {name}{dims_suffix(flags)}", metrics)
    plot, title = folder / f"zero-shot-{name}.png", f"{folder.name} on {name}, top-1 {metrics['top1']:.1f} %"
    plot_confusion(confusion(probability, truth), labels, title, plot)
    print(display_text(f"saved {folder / METRICS} and {plot}"))


def table(metrics: dict) -> str:
    """Format the metrics as a table with one row per direction."""
    columns = ["R@1", "R@5", "R@10", "mAP@10", "medR"]
    lines = ["              " + "".join(f"{name:>9}" for name in columns)]
    for direction, label in (("i2t", "image → text"), ("t2i", "text → image")):
        lines.append(f"{label:<14}" + "".join(f"{metrics[f'{direction}_{name}']:>9.1f}" for name in columns))
    errors = " / ".join(f"{1 - metrics[f'{direction}_R@5'] / 100:.3f}" for direction in ("i2t", "t2i"))
    summary = f"rsum {metrics['rsum']:.1f}   top-5 error {errors}"
    if BATCH_LOSS in metrics:
        summary += f"   InfoNCE in batches of {LOSS_BATCH} {metrics[BATCH_LOSS]:.3f}"
    classes = [f"classified by the class names: {format_accuracy(metrics)}"] if "top1" in metrics else []
    return "\n".join([*lines, summary, *classes])


def format_accuracy(metrics: dict) -> str:
    """Format the accuracy of a classification: top-1, the mean of the classes' top-1, top-5."""
    names = ("top1", "mean_class_top1", "top5")
    return "   ".join(f"{name} {metrics[name]:.1f} %" for name in names if name in metrics)


def save_metrics(folder: Path, name: str, metrics: dict) -> None:
    """Save the metrics in the run's metrics.json and as a bar chart."""
    from reporting.plots import plot_metrics

    update_metrics(folder, name, metrics)
    plot = folder / f"metrics-{slug(name, keep='.-')}.png"
    plot_metrics(metrics, f"{folder.name}, {name}", plot)
    print(display_text(f"saved {folder / METRICS} and {plot}"))


def update_metrics(folder: Path, name: str, metrics: dict) -> None:
    """Write the metrics to the run's metrics.json under `name`, next to earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / METRICS, json.dumps(read_metrics(folder) | {name: metrics}, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
