"""Measure a run, `python evaluate.py runs/NAME --split test`, or a pretrained pair, `--model NAME --dataset NAME`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import Config
from runtime import cli
from runtime.atomic_io import write_text
from runtime.run_dir import METRICS, newest_finished_run, read_config, read_metrics
from runtime.text import slug

LOSS_BATCH, BATCH_LOSS = 32, "batch32_loss"
CORRECTED = "corrected for hubs"  # hubness.py


@dataclass(frozen=True)
class Flags:
    """Recall@K, mAP@10 and median rank over the full pool of a split, or how well classes are told apart."""

    run: Annotated[Path | None, tyro.conf.Positional] = None  # the run's folder; without it the newest finished one
    model: str | None = None  # instead of a run: a pretrained pair as it is (CLIP, SigLIP ...), a name or a folder
    split: Literal["train", "val", "test"] = "test"  # what to measure on
    as_trained: bool = (
        False  # read photos as in training, though search reads them larger (--eval-image-scale) or twice
    )
    dataset: str | None = None  # of another data set than the run's own
    zero_shot: Path | None = None  # instead: a folder with a folder of photos per class, named like the class
    templates: tuple[str, ...] = ()  # sentences a class is said in, with {} for its name, instead of the built-in ones
    data_dir: Path | None = None  # where the data set lies now, if it has moved since training
    runs_dir: Path = Path(Config.runs_dir)  # where runs are looked for
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # "auto" takes the GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the encoders


def main() -> None:
    flags = cli.parse_flags(Flags)
    folder, config = subject(flags)
    read_metrics(folder)  # what is wrong with them is told before minutes of measuring
    if flags.zero_shot is not None:
        return measure_zero_shot(folder, flags)
    from data.loading import open_data

    data = open_data(config, flags.data_dir)
    part = data.split(flags.split)
    what = flags.split if flags.dataset is None else f"{flags.split} of {Path(data.name).name}"
    what += ", as trained" if flags.as_trained else ""
    print(
        f"{folder}: {flags.split} split of {data.name}, {len(part.paths):,} images, {len(part.captions):,} captions",
        flush=True,
    )
    measured = measure(part, folder, flags)
    for how, metrics in measured.items():
        print(f"{how}\n{table(metrics)}" if how else table(metrics))
        save(folder, f"{what}, {how}" if how else what, metrics)


def subject(flags: Flags) -> tuple[Path, Config]:
    """The folder of what is measured, where its figures go, and the configuration that names the data set."""
    if flags.model is None:
        folder = cli.existing_folder(flags.run, "a run") if flags.run else newest_finished_run(flags.runs_dir)
        config = read_config(folder)
    elif flags.run is not None:
        raise ValueError("give one of a run and --model")
    elif flags.dataset is None and flags.zero_shot is None:
        raise ValueError("--model needs a data set to be measured on: add --dataset NAME_OR_FOLDER")
    else:
        folder, config = flags.runs_dir / f"pretrained-{slug(flags.model, keep='.-')}", Config()
    if flags.dataset is not None:  # without its own --data-dir, and the old one's is not that of the new
        config = replace(config, dataset=flags.dataset, data_dir=None)
    return folder, config


def load(folder: Path, flags: Flags):
    """The Encoder of the run's best checkpoint or of the pretrained pair, and its model."""
    settings = {"device": flags.device, "precision": flags.precision}
    if flags.model is not None:
        from retrieval.encoder import load_pretrained_encoder

        return load_pretrained_encoder(flags.model, max_tokens=Config.max_tokens, **settings)
    from retrieval.encoder import load_encoder

    return load_encoder(folder, as_trained=flags.as_trained, **settings)


def measure(part, folder: Path, flags: Flags) -> dict[str, dict]:
    """The retrieval metrics of a split: "" by the cosine, CORRECTED as search ranks where the run has a bank."""
    from retrieval.metrics import retrieval_metrics

    encoder, model = load(folder, flags)
    encoded = encoder.encode_split(part, flags.split)
    embedded = encoded.image_emb, encoded.text_emb, encoded.caption_image_ids
    metrics = retrieval_metrics(*embedded)
    if len(encoded.image_emb) >= LOSS_BATCH:
        metrics[BATCH_LOSS] = batch_loss(*embedded, temperature=model.temperature.item())
    if encoder.query_bank is None or (flags.split == "val" and _of_the_run(flags.dataset, folder)):
        return {"": metrics}
    scored = encoder.query_bank.both(encoded.image_emb, encoded.text_emb)
    return {"": metrics, CORRECTED: retrieval_metrics(*scored, encoded.caption_image_ids)}


def _of_the_run(dataset, folder):
    """Whether a data set is the one that the run was trained on, whose validation part is the bank."""
    trained = read_config(folder)
    own = {Path(path).expanduser().resolve() for path in (trained.dataset, trained.data_dir) if path is not None}
    return dataset is None or Path(dataset).expanduser().resolve() in own


def batch_loss(image_emb, text_emb, caption_image_ids, *, temperature: float) -> float:
    """InfoNCE, the mean over batches of 32 photos with one caption each in a fixed random order: the validation loss
    that notebooks report, log 32 = 3.47 for a model that knows nothing.

    image_emb (N, D), text_emb (M, D) unit rows, N at least 32, caption_image_ids (M,).
    """
    import numpy as np
    import torch

    from losses import info_nce

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(caption_image_ids), generator=generator)
    owner, first = np.unique(caption_image_ids[order].numpy(), return_index=True)  # a random caption of each photo
    pairs = torch.randperm(len(owner), generator=generator)
    images, texts = image_emb[torch.from_numpy(owner)[pairs]], text_emb[order[torch.from_numpy(first)[pairs]]]
    own = torch.eye(LOSS_BATCH, dtype=torch.bool)
    batches = [slice(start, start + LOSS_BATCH) for start in range(0, len(pairs) - LOSS_BATCH + 1, LOSS_BATCH)]
    losses = [info_nce(images[rows] @ texts[rows].T, own, temperature).item() for rows in batches]
    return sum(losses) / len(losses)


def measure_zero_shot(folder: Path, flags: Flags) -> None:
    """Print and store how often the right class is found, and draw which are taken for which."""
    from reporting.plots import plot_confusion
    from retrieval.zero_shot import accuracy, class_folders, classify, confusion

    labels, photos, truth = class_folders(flags.zero_shot.expanduser())
    encoder, model = load(folder, flags)
    temperature = model.temperature.item()
    chances, readable = classify(encoder, photos, labels, temperature=temperature, templates=flags.templates)
    if not len(chances):
        raise ValueError(f"none of the {len(photos):,} photos in {flags.zero_shot} could be read")
    truth, name = truth[readable], flags.zero_shot.expanduser().resolve().name
    print(f"{folder}: {len(truth):,} photos of {len(labels)} classes in {flags.zero_shot}")
    if not readable.all():
        from runtime.text import format_skipped

        print(format_skipped(int((~readable).sum())))
    metrics = accuracy(chances, truth)
    print("   ".join(f"{key} {value:.1f} %" for key, value in metrics.items()))
    store(folder, f"zero-shot {name}", metrics)
    picture = folder / f"zero-shot-{name}.png"
    plot_confusion(
        confusion(chances, truth), labels, f"{folder.name} on {name}, top-1 {metrics['top1']:.1f} %", picture
    )
    print(f"saved {folder / METRICS} and {picture}")


def table(metrics: dict) -> str:
    """The metrics, a row per direction."""
    columns = ["R@1", "R@5", "R@10", "mAP@10", "medR"]
    lines = ["              " + "".join(f"{name:>9}" for name in columns)]
    for way, label in (("i2t", "image → text"), ("t2i", "text → image")):
        lines.append(f"{label:<14}" + "".join(f"{metrics[f'{way}_{name}']:>9.1f}" for name in columns))
    errors = " / ".join(f"{1 - metrics[f'{way}_R@5'] / 100:.3f}" for way in ("i2t", "t2i"))
    last = f"rsum {metrics['rsum']:.1f}   top-5 error {errors}"
    if BATCH_LOSS in metrics:
        last += f"   InfoNCE in batches of {LOSS_BATCH} {metrics[BATCH_LOSS]:.3f}"
    return "\n".join([*lines, last])


def save(folder: Path, split: str, metrics: dict) -> None:
    """Write the metrics beside those of other splits, and their bars."""
    from reporting.plots import plot_metrics

    store(folder, split, metrics)
    picture = folder / f"metrics-{slug(split, keep='.-')}.png"
    plot_metrics(metrics, f"{folder.name}, {split}", picture)
    print(f"saved {folder / METRICS} and {picture}")


def store(folder: Path, name: str, metrics: dict) -> None:
    """Write the metrics into the run's metrics.json, beside what was measured before."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / METRICS, json.dumps(read_metrics(folder) | {name: metrics}, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
