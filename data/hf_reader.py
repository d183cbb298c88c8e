"""Data sets of Hugging Face `datasets`: a folder written by save_to_disk, parquet files, or a name on the hub."""

import contextlib
import hashlib
import os
from pathlib import Path

from data.format_detection import Layout
from data.records import IMAGE_SUFFIXES, CaptionRecords, match_columns, parse_split
from runtime.atomic_io import new_folder
from runtime.paths import path_below

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves: of a data set with parts, and without
FORM = "Hugging Face data set"


def is_hf_dataset(path: Path) -> bool:
    """Whether a folder holds a data set as `datasets` writes it."""
    return path.is_dir() and (any((path / name).is_file() for name in SAVED) or any(_parquet(path)))


def read_hf_dataset(source: Path | str, cache_dir: str | Path) -> Layout:
    """The captions of a local folder (Path) or of the hub (str); photos kept in tables are written to `cache_dir`.

    Raises ValueError without `datasets`, or where no column holds images or captions; ConnectionError where the hub
    does not give the data set.
    """
    parts = _load(source, Path(cache_dir))
    folder = Path(cache_dir).resolve() / "hf_photos" / _fingerprint(source, parts)
    captions = CaptionRecords(FORM, [Path(str(source))])
    with contextlib.nullcontext() if folder.is_dir() else new_folder(folder) as draft:
        for number, (name, part) in enumerate(parts.items()):
            _read_part(captions, part, name, number, str(source), draft)
    files = sorted({image for image, _, _ in captions.rows})
    if files and all(map(os.path.isabs, files)):  # photos that lie in files of their own stay where they are
        folder = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
        captions.rows = [(os.path.relpath(row[0], folder).replace(os.sep, "/"), *row[1:]) for row in captions.rows]
        files = sorted({image for image, _, _ in captions.rows})
    return Layout(folder, captions, files, [], [])


def _load(source, cache_dir):
    """The parts of a data set by their names."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source} is read with the library `datasets`: pip install datasets") from None
    kept = str(cache_dir.resolve() / "huggingface")
    try:
        if isinstance(source, str):
            found = datasets.load_dataset(source, cache_dir=kept)
        elif any((source / name).is_file() for name in SAVED):
            found = datasets.load_from_disk(str(source))
        else:
            found = datasets.load_dataset("parquet", data_files=_parts_of_files(_parquet(source)), cache_dir=kept)
    except Exception as error:  # the library passes on whatever its network and file libraries raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        kind = ConnectionError if isinstance(source, str) else ValueError
        where = "there is no such folder, and on the Hugging Face hub" if isinstance(source, str) else "in this folder"
        raise kind(
            f"could not load the data set {source}: {where} {reason}; is the name right, and is it whole?"
        ) from None
    return dict(found) if isinstance(found, dict) else {"all": found}


def _parquet(folder):
    return sorted((*folder.glob("*.parquet"), *folder.glob("data/*.parquet")))


def _parts_of_files(files):
    """The hub names parquet files by their part: data/train-00000-of-00009.parquet."""
    parts = {}
    for file in files:
        word = file.name.split("-")[0].split(".")[0]
        parts.setdefault(word if parse_split(word) else "all", []).append(str(file))
    return parts


def _read_part(captions, part, name, part_number, source, draft):
    """Add a part's rows; photos that are kept in its table are written to `draft`, or are there already (None).

    Their files are numbered: neither the part's name nor the photo's, which the data set chooses, becomes a path.
    """
    from datasets import Image

    image, keys, split = _columns(part, name, source)
    if isinstance(part.features[image], Image):
        part = part.cast_column(image, Image(decode=False))
    part = part.select_columns([key for key in (image, *keys, split) if key])
    place = f"{source}, {name}, row "
    for number, row in enumerate(part):
        where, photo = f"{place}{number}", row[image] or {}
        texts = [text for key in keys for text in (row[key] if isinstance(row[key], list) else [row[key]])]
        file = photo.get("path") or ""
        if photo.get("bytes") is not None:
            suffix = Path(file).suffix.lower()
            file = f"{part_number}-{number:06d}{suffix if suffix in IMAGE_SUFFIXES else '.jpg'}"
            if draft is not None:
                path_below(draft, file).write_bytes(photo["bytes"])
        elif not os.path.isfile(file):
            captions.bad.append(f"{where}: expected an image, found none; leave the row out")
            continue
        if not all(isinstance(text, str) for text in texts):
            captions.bad.append(f"{where}: expected texts in {', '.join(keys)}, found {texts!r:.60}; fill them in")
            continue
        captions.add(
            file, texts, (parse_split(row[split]) if split else None) or parse_split(name), place, number, "fill it in"
        )


def _columns(part, name, source):
    """The columns that hold the image, the captions and the split (or None)."""
    from datasets import Image

    features = part.features
    images = [key for key, feature in features.items() if isinstance(feature, Image) or _is_struct(feature)]
    _, captions, split = match_columns(key for key in features if key not in images)
    if not images or not captions:
        raise ValueError(
            f"{source}, {name}: expected a column of images and one of captions, found {', '.join(features)}; "
            "name the column of captions `caption`"
        )
    return images[0], captions, split


def _is_struct(feature):
    return isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()


def _fingerprint(source, parts):
    """Changes with the data set's rows; the same for the same data set wherever the cache lies."""
    digest = hashlib.sha256(repr([(name, part._fingerprint, len(part)) for name, part in parts.items()]).encode())
    if isinstance(source, Path):
        files = sorted(path for path in source.rglob("*") if path.is_file())
        digest.update(repr([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]).encode())
    return digest.hexdigest()[:24]
