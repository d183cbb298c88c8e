"""Write the model card of a shared run: README.md with metadata for the hub, data, recall, training and licences."""

import difflib
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from config import Config, default_config
from data.download import HUB_NAME, NAMES, NOT_SHARED
from data.splits import SPLITS
from models.checkpoint import Run
from models.hf_hub import OPENAI_NAMES
from models.hub_run import CARD
from models.shared_settings import public_config, public_launches
from runtime.atomic_io import write_text
from runtime.run_dir import BEST, METRICS, QUERY_BANK, read_launches, read_log, read_metrics
from runtime.text import display_text

TEMPLATE = "model_card.md.j2"
NOT_STATED = "not stated"
# Identifiers of the hub; other licences are "other:" and a name.
LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "mpl-2.0", "unlicense", "cc0-1.0", "wtfpl", "zlib"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0"),
    *("cc-by-3.0", "cc-by-sa-3.0", "cc-by-nc-3.0", "cc-by-nc-sa-3.0", "cc-by-2.0", "cc-by-nc-2.0", "cc-by-2.5"),
    *("gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "eupl-1.1", "artistic-2.0", "afl-3.0", "ecl-2.0"),
    *("openrail", "openrail++", "bigscience-openrail-m", "creativeml-openrail-m", "bigcode-openrail-m"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "gemma", "cdla-permissive-2.0", "cdla-sharing-1.0", "odbl", "pddl"),
    *("etalab-2.0", "odc-by", "osl-3.0", "postgresql", "ncsa", "epl-2.0", "bsl-1.0", "ms-pl", "unknown"),
)
OTHER = "other:"  # before the name of a licence that the hub has no identifier for
DATA_NOTES = {  # what is known about the photos of the data sets with a name
    "flickr8k": "The photos of Flickr8k are from Flickr and have terms of their own: those of their owners and of "
    "Flickr. The data set is distributed for non-commercial research and education.",
    "flickr30k": "The photos of Flickr30k are from Flickr and have terms of their own: those of their owners and of "
    "Flickr. The data set is distributed for non-commercial research and education.",
    "coco": "The photos of COCO are from Flickr and have terms of their own: those of their owners and of Flickr. The "
    "annotations are distributed under CC BY 4.0.",
    "sample": "The sample set is drawn by this program.",
}
KS = (1, 5, 10)
ACCURACY = "top1"


@dataclass(frozen=True)
class Licenses:
    """Licences that the owner of a run states, of the weights and of the data; None: not stated."""

    weights: str | None = None
    data: str | None = None


def check_license(name: str | None, flag: str) -> None:
    """Raise ValueError, with similar names, unless `name` is an identifier of the hub, "other:NAME" or None."""
    if name is None or name in LICENSES or (name.startswith(OTHER) and name.removeprefix(OTHER).strip()):
        return
    similar = difflib.get_close_matches(name.lower(), LICENSES, n=3)
    hint = f"did you mean {', '.join(similar)}?" if similar else "examples: apache-2.0, mit, cc-by-4.0, cc-by-nc-4.0"
    raise ValueError(f"{flag}: the hub has no licence {name!r}; {hint} For any other one pass '{OTHER}NAME'")


def write_model_card(run: Run, folder: Path, name: str, *, command: str, licenses: Licenses, sizes: dict) -> None:
    """Write README.md into the folder of a shared run.

    name: the title. command: what `--run` takes for it, OWNER/NAME or a folder. sizes: split -> {"photos", "captions"}.
    """
    from jinja2 import Environment, FileSystemLoader

    config, launches = public_config(run.config), public_launches(read_launches(run.folder), run.config)
    rows = recall_rows(run)
    dataset = _dataset_name(config)
    content = {
        "metadata": _metadata(run, config, rows, name, licenses).to_yaml(),
        "name": name,
        "run": shlex.quote(command),
        "dataset": dataset,
        "is_public": not config.dataset.startswith(NOT_SHARED),
        "launch": launches[-1] if launches else {},
        "sizes": [(split, sizes[split]) for split in SPLITS if split in sizes],
        "rows": rows,
        "test_measured": any(row["split"] == "test" for row in rows),
        "older": is_older_than_weights(run.folder),
        "commands": training_commands(launches, config),
        "model": _describe_towers(run, config),
        "epoch": run.state.get("epoch"),
        "has_bank": run.state.get("query_bank") is not None,
        "query_bank": QUERY_BANK,
        "license": (licenses.weights or NOT_STATED).removeprefix(OTHER),
        "data_license": (licenses.data or NOT_STATED).removeprefix(OTHER),
        "data_note": DATA_NOTES.get(config.dataset, ""),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = markdown_cell
    write_text(folder / CARD, environment.get_template(TEMPLATE).render(content))


def recall_rows(run: Run) -> list[dict]:
    """Return a table of recall: what evaluate.py measured, and the validation split at the epoch of the weights."""
    rows = [
        {"split": name, "values": values, "measured": "evaluate.py"}
        for name, values in read_metrics(run.folder).items()
        if all(f"{direction}_R@{k}" in values for direction in ("t2i", "i2t") for k in KS)
    ]
    for record in read_log(run.folder):
        if record["epoch"] == run.state.get("epoch") and "t2i_R@1" in record:
            rows.append({"split": "val", "values": record, "measured": f"during training, epoch {record['epoch']}"})
    return rows


def split_sizes(run: Run) -> dict[str, dict[str, int]]:
    """Return the numbers of photos and captions of each split, {} if they are not known.

    A run records them; for an older one they are counted if its data set is in a local folder and unchanged.
    """
    launch = (read_launches(run.folder) or [{}])[-1]
    if isinstance(recorded := launch.get("splits"), dict) and recorded:
        return recorded
    local = run.config.data_dir or (run.config.dataset if run.config.dataset not in NAMES else None)
    if "data" not in launch or local is None or not Path(local).exists():
        return {}
    from data.loading import open_data

    try:
        data = open_data(run.config)
    except (ValueError, OSError):
        return {}
    return data.split_sizes() if data.fingerprint() == launch["data"] else {}


def is_older_than_weights(folder: Path) -> bool:
    """Return whether metrics.json was written before best.pt, and so perhaps measured other weights."""
    metrics, best = folder / METRICS, folder / BEST
    return metrics.is_file() and best.is_file() and metrics.stat().st_mtime < best.stat().st_mtime


def training_commands(launches: list[dict], config: Config) -> list[str]:
    """Return the commands that trained the run, or one that is equivalent to its settings if none was recorded."""
    recorded = [launch.get("command") or "" for launch in launches]
    recorded = [command for command in recorded if "train.py" in command]
    return list(dict.fromkeys(recorded)) or [_command_of(config)]


def _command_of(config):
    """Return the command whose flags give these settings."""
    default = default_config(config.dataset, config.model)
    words = ["python", "train.py", "--dataset", config.dataset.removeprefix(NOT_SHARED)]
    for field in fields(Config):
        value = getattr(config, field.name)
        if field.name in ("dataset", "name") or value == getattr(default, field.name) or value is None:
            continue
        flag = field.name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(words)


def _metadata(run, config, rows, name, licenses):
    from huggingface_hub import EvalResult, ModelCardData

    license_id = "other" if (licenses.weights or "").startswith(OTHER) else licenses.weights
    results = [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-text retrieval",
            dataset_type=config.dataset.removeprefix(NOT_SHARED),
            dataset_name=_dataset_name(config),
            dataset_split=row["split"],
            metric_type="recall",
            metric_name=f"{direction} R@{k}",
            metric_value=round(row["values"][f"{key}_R@{k}"], 2),
        )
        for row in rows
        if row["split"] in SPLITS
        for key, direction in (("t2i", "text to image"), ("i2t", "image to text"))
        for k in KS
    ]
    return ModelCardData(
        model_name=name.rpartition("/")[2],
        license=license_id,
        license_name=_slug_of_license(licenses.weights) if license_id == "other" else None,
        pipeline_tag="zero-shot-image-classification",
        tags=["image-text-retrieval", "text-to-image-retrieval", "image-search", "dual-encoder", "pytorch"],
        datasets=[config.dataset] if HUB_NAME.fullmatch(config.dataset) and config.dataset not in NAMES else None,
        base_model=_base_models(config) or None,
        metrics=["recall"],
        eval_results=results or None,
    )


def _slug_of_license(name):
    from runtime.text import slug

    return slug(name.removeprefix(OTHER).strip().lower(), keep=".-")


def _base_models(config):
    """Return the names on the hub of the towers that training started from."""
    names = [config.model] if config.model else [config.image_encoder, config.text_encoder] if config.pretrained else []
    names = [OPENAI_NAMES.get(name, name).removeprefix("hf-hub:") for name in names]
    return [name for name in names if HUB_NAME.fullmatch(name)]


def _describe_towers(run, config):
    model, count = run.model, lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters"
    if config.model:
        image, text = [f"that of {config.model}"] * 2
    else:
        image, text = config.image_encoder, config.text_encoder if config.pretrained else "a small DistilBERT"
    preprocess = model.image_encoder.preprocess
    return {
        "image": f"{image}, {count(model.image_encoder)}",
        "text": f"{text}, {count(model.text_encoder)}",
        "heads": ", ".join(dict.fromkeys(config.heads)),
        "dims": model.embed_dim,
        "size": preprocess.scaled(config.eval_image_scale).size,
        "max_tokens": min(config.max_tokens, model.text_encoder.max_tokens or config.max_tokens),
    }


def _dataset_name(config):
    return display_text(config.dataset.removeprefix(NOT_SHARED))


def markdown_cell(value: object) -> str:
    """Return text for a cell of a Markdown table or for a paragraph: on one line, without markup of its own."""
    text = display_text(" ".join(str(value).split()))
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return text
