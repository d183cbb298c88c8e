"""Read Hugging Face `datasets`: a folder written by `save_to_disk`, or a name on the Hub."""

import contextlib
import hashlib
import os
from pathlib import Path

from data.caption_rows import CaptionRows
from data.column_names import NO_SPLIT, resolve_splits
from data.format_detection import Layout
from data.records import FIND_COLUMNS, IMAGE_SUFFIXES, CaptionRecords, ColumnNames, match_columns, parse_split
from runtime.atomic_io import new_folder
from runtime.paths import path_below

SAVED_FILES = ("dataset_dict.json", "state.json")  # written by save_to_disk: of a DatasetDict, and of a Dataset
FORMAT = "Hugging Face data set"


def is_hf_dataset(path: Path) -> bool:
    """Return whether a folder contains a data set that `datasets` saved."""
    return path.is_dir() and any((path / name).is_file() for name in SAVED_FILES)


def read_hf_dataset(source: Path | str, cache_dir: str | Path, names: ColumnNames = FIND_COLUMNS) -> Layout:
    """Read the captions of a local folder (Path) or of a data set on the Hub (str).

    Photos stored in the tables are written to `cache_dir`. Raises ValueError if `datasets` is not installed or no
    column contains images or captions, and ConnectionError if the Hub does not provide the data set.
    """
    splits = _load_splits(source, Path(cache_dir))
    folder = Path(cache_dir).resolve() / "hf_photos" / _fingerprint(source, splits, names.image)
    captions = CaptionRecords(FORMAT, [Path(str(source))])
    with contextlib.nullcontext() if folder.is_dir() else new_folder(folder) as photo_folder:
        parts = resolve_splits(splits)
        for index, (name, split) in enumerate(splits.items()):
            columns = _find_columns(split, name, str(source), names)
            _read_split(captions, split, columns, (name, parts[name], index), str(source), photo_folder)
    files = sorted({image for image, _, _ in captions.rows})
    if files and all(map(os.path.isabs, files)):  # photos that are files already are used in place
        folder = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
        captions.rows = CaptionRows(
            (os.path.relpath(row[0], folder).replace(os.sep, "/"), *row[1:]) for row in captions.rows
        )
        files = sorted({image for image, _, _ in captions.rows})
    return Layout(folder, captions, files, [], [])


def _load_splits(source, cache_dir):
    """Return {split name: Dataset}; a data set without splits has the name "all"."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source} requires the library `datasets`: pip install datasets") from None
    hf_cache = str(cache_dir.resolve() / "huggingface")
    try:
        if isinstance(source, str):
            loaded = datasets.load_dataset(source, cache_dir=hf_cache)
        else:
            loaded = datasets.load_from_disk(str(source))
    except Exception as error:  # `datasets` does not wrap the exceptions of its network and file libraries
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if isinstance(source, str):
            raise ConnectionError(
                f"could not load the data set {source}: there is no such folder, and loading it from the Hugging Face "
                f"Hub failed ({reason}); check the name and that the data set is complete"
            ) from None
        raise ValueError(
            f"could not load the data set {source} ({reason}); check that this is the right folder and that it is "
            "complete"
        ) from None
    return dict(loaded) if isinstance(loaded, dict) else {"all": loaded}


def _read_split(captions, split, columns, part, source, photo_folder):
    """Add the rows of a split (`part`: its name, what it means, its number); write stored photos to `photo_folder`.

    photo_folder is None if they are in the cache.

    The photo files are numbered: neither the split's name nor the photo's, which the data set chooses, becomes a path.
    """
    from datasets import Image

    (image, caption_keys, split_key), (name, part_split, split_index) = columns, part
    if isinstance(split.features[image], Image):
        split = split.cast_column(image, Image(decode=False))
    split = split.select_columns([key for key in (image, *caption_keys, split_key) if key])
    location = f"{source}, {name}, row "
    for number, row in enumerate(split):
        photo = row[image] or {}
        texts = [text for key in caption_keys for text in (row[key] if isinstance(row[key], list) else [row[key]])]
        file = photo.get("path") or ""
        if photo.get("bytes") is not None:
            suffix = Path(file).suffix.lower()
            file = f"{split_index}-{number:06d}{suffix if suffix in IMAGE_SUFFIXES else '.jpg'}"
            if photo_folder is not None:
                path_below(photo_folder, file).write_bytes(photo["bytes"])
        elif not os.path.isfile(file):
            captions.bad_rows.append(f"{location}{number}: expected an image, found none; remove the row")
            continue
        if not all(isinstance(text, str) for text in texts):
            keys = ", ".join(caption_keys)
            captions.bad_rows.append(
                f"{location}{number}: expected strings in {keys}, found {texts!r:.60}; fill them in"
            )
            continue
        row_split = (parse_split(row[split_key]) if split_key else None) or part_split
        captions.add(file, texts, row_split, location, number, "fill it in")


def _find_columns(split, name, source, names):
    """Return the image column, the caption columns and the split column (or None)."""
    from datasets import Image

    features = split.features
    images = [key for key, feature in features.items() if isinstance(feature, Image) or _is_encoded_image(feature)]
    for flag, wanted in zip(("--image-column", "--caption-column", "--split-column"), names, strict=True):
        if wanted is not None and wanted not in features and (flag, wanted) != ("--split-column", NO_SPLIT):
            raise ValueError(f"{source}, {name}: no column {wanted} of {flag}; the columns are {', '.join(features)}")
    if names.image is not None and names.image not in images:
        raise ValueError(
            f"{source}, {name}: expected images in {names.image}, found other values; choose a column of "
            f"images with --image-column ({', '.join(images) or 'there is none'})"
        )
    images = [names.image] if names.image is not None else images
    if len(images) > 1:
        raise ValueError(f"{source}, {name}: images in the columns {', '.join(images)}; choose one with --image-column")
    others = [key for key in features if key not in images and key not in (names.split, names.caption)]
    _, captions, split_key = match_columns(others)
    captions = [names.caption] if names.caption is not None else captions
    if names.split is not None:
        split_key = None if names.split == NO_SPLIT else names.split
    if not images or not captions:
        raise ValueError(
            f"{source}, {name}: expected a column of images and one of captions, found {', '.join(features)}; "
            "rename the caption column to `caption`, or pass --caption-column"
        )
    return images[0], captions, split_key


def _is_encoded_image(feature):
    return isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()


def _fingerprint(source, splits, image_column):
    """Return a hash of the data set's rows, which does not depend on where the cache is stored."""
    digest = hashlib.sha256(repr([(name, split._fingerprint, len(split)) for name, split in splits.items()]).encode())
    if image_column is not None:
        digest.update(repr(image_column).encode())
    if isinstance(source, Path):
        files = sorted(path for path in source.rglob("*") if path.is_file())
        digest.update(repr([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]).encode())
    return digest.hexdigest()[:24]
