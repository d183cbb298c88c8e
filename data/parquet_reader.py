"""Read parquet files with captions, under any name: photos as bytes, as {bytes, path}, or as paths of files."""

import contextlib
import hashlib
import os
from collections import defaultdict
from pathlib import Path

from data.format_detection import Layout
from data.records import FIND_COLUMNS, IMAGE_SUFFIXES, CaptionRecords, ColumnNames, match_columns, parse_split
from data.storage import list_files
from runtime.atomic_io import new_folder
from runtime.paths import path_below
from runtime.text import format_examples

FORMAT = "parquet"
BATCH = 256  # rows in memory
STORAGE_FOLDERS = ("data", "default")


def parquet_files(source: Path) -> list[str]:
    """Return the parquet files of a folder, relative to it; of a file its own name."""
    if source.is_file():
        return [source.name] if source.suffix.lower() == ".parquet" else []
    return [file for file in list_files(source) if file.lower().endswith(".parquet")] if source.is_dir() else []


def read_parquet(source: Path, cache_dir: str | Path, names: ColumnNames = FIND_COLUMNS) -> Layout:
    """Read the captions of a folder of parquet files, or of one file; stored photos are written to `cache_dir`.

    Raises ValueError without pyarrow, for damaged files, and where columns or folders can be read in several ways.
    """
    root = source.parent if source.is_file() else source
    captions = CaptionRecords(FORMAT, [])
    tables, ignored = _open_tables(root, parquet_files(source), names)
    if ignored:
        captions.notes.append(f"without captions and photos, not read: {format_examples(ignored)}")
    columns = {(image, *texts, split) for _, _, image, texts, split in tables}
    chosen = " | ".join(", ".join(filter(None, column)) for column in sorted(columns, key=str))
    used = {name for column in columns for name in column}
    unused = dict.fromkeys(name for _, table, *_ in tables for name in table.schema_arrow.names if name not in used)
    captions.notes.append(f"columns read: {chosen}" + (f"; ignored: {format_examples(list(unused))}" if unused else ""))
    folder = Path(cache_dir).resolve() / "parquet_photos" / _fingerprint(root, [table[0] for table in tables], chosen)
    captions.files = [root / table[0] for table in tables]
    with contextlib.nullcontext() if folder.is_dir() else new_folder(folder) as photo_folder:
        stored = [_read_table(captions, root, number, table, photo_folder) for number, table in enumerate(tables)]
    if not any(stored):  # all photos are files
        return Layout(root, captions, [file for file in list_files(root) if not file.endswith(".parquet")], [], [])
    return Layout(folder, captions, sorted({image for image, _, _ in captions.rows}), [], [])


def _open_tables(root, files, names):
    """Return (file, table, image column, caption columns, split column) of each file, and the files without them."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{root} contains parquet files, which need: pip install pyarrow") from None
    tables, errors, bases = [], {}, defaultdict(list)
    for file in files:
        try:
            table = pyarrow.parquet.ParquetFile(root / file)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"{root / file} is truncated or no parquet file ({reason}): download it again") from None
        try:
            tables.append((file, table, *_find_columns(table.schema_arrow, names, root / file)))
            bases[_base_folder(file)].append(file)
        except LookupError as error:
            errors[file] = str(error)
    if not tables:
        raise ValueError(next(iter(errors.values())))
    if len(bases) > 1:
        examples = " and ".join(f"{base or '.'}/" for base in sorted(bases)[:2])
        raise ValueError(f"{root} contains several data sets ({examples}): pass the folder of one of them")
    return tables, list(errors)


def _base_folder(file):
    """Return a file's folder without the parts that name a split or mere storage: en/partial-train -> en."""
    parts = file.split("/")[:-1]
    return "/".join(part for part in parts if part.lower() not in STORAGE_FOLDERS and _split_word(part) is None)


def _split_word(part):
    word = part.lower().removeprefix("partial-").split("-")[0].split(".")[0].split("_")[0]
    return parse_split(word) if word else None


def _split_of(file):
    return next((split for part in reversed(file.split("/")) if (split := _split_word(part))), None)


def _find_columns(schema, names, file):
    """Return the image column, the caption columns and the split column or None.

    Raises LookupError if the file has no such columns, and ValueError if it has several columns of photos.
    """
    import pyarrow.types as types

    def is_photo(kind):
        if types.is_struct(kind):
            return "bytes" in {field.name for field in kind}
        return types.is_binary(kind) or types.is_large_binary(kind)

    def is_text(kind):
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind)

    found = ", ".join(schema.names)
    wanted = [names.image, names.caption, names.split]
    if absent := [name for name in wanted if name is not None and name not in schema.names]:
        raise LookupError(f"{file}: no column {', '.join(absent)}; the columns are {found}")
    photos = [field.name for field in schema if is_photo(field.type)]
    texts = [field.name for field in schema if is_text(field.type)]
    known, captions, split = match_columns(name for name in texts if name != names.image)
    if names.image is None and len(photos) > 1:
        known_photo = match_columns(photos)[0]
        if known_photo is None:
            raise ValueError(f"{file}: photos in the columns {', '.join(photos)}: choose one with --image-column")
        photos = [known_photo]
    image = names.image or (photos[0] if photos else known)
    captions = [names.caption] if names.caption is not None else [name for name in captions if name != image]
    if image is None or not captions:
        raise LookupError(
            f"{file}: expected a column of photos and one of captions, found {found}; choose them with "
            "--image-column and --caption-column"
        )
    return image, captions, names.split or split


def _read_table(captions, root, number, table, photo_folder):
    """Add the rows of a file; write its photos, unless the cache has them. Return whether it stores photos."""
    file, content, image, texts, split = table
    stored, row_number, file_split = False, 0, _split_of(file)
    location = f"{root / file}, row "
    for rows in _iter_batches(content, list(dict.fromkeys(filter(None, (image, *texts, split)))), root / file):
        for row in rows:
            name, data = _photo(row[image], root, file)
            if data is not None:
                stored, suffix = True, os.path.splitext(name)[1].lower()
                # Neither the file's name nor the photo's, which strangers choose, becomes a path.
                name = f"{number}-{row_number:06d}{suffix if suffix in IMAGE_SUFFIXES else '.jpg'}"
                if photo_folder is not None:
                    path_below(photo_folder, name).write_bytes(data)
            values = [value for key in texts for value in (row[key] if isinstance(row[key], list) else [row[key]])]
            if not name:
                captions.bad_rows.append(f"{location}{row_number}: expected a photo in {image}, found none; remove it")
            elif not all(isinstance(value, str) for value in values):
                found = f"expected text in {', '.join(texts)}, found {values!r:.60}"
                captions.bad_rows.append(f"{location}{row_number}: {found}; fill it in")
            else:
                row_split = (parse_split(str(row[split])) if split else None) or file_split
                captions.add(name, values, row_split, location, row_number, "fill it in")
            row_number += 1
    return stored


def _iter_batches(content, columns, path):
    """Yield lists of rows. Raises ValueError with the file's name where the file is damaged."""
    try:
        for batch in content.iter_batches(BATCH, columns=columns):
            yield batch.to_pylist()
    except (OSError, ValueError) as error:  # damaged pages, values or text
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path} is truncated or damaged ({reason}): download it again") from None


def _photo(value, root, file):
    """Return the name and the bytes of a photo; bytes are None if it is a file."""
    if isinstance(value, bytes):
        return "", value
    if isinstance(value, dict):
        path, data = value.get("path") or "", value.get("bytes")
        return path if isinstance(path, str) else "", data
    return (value if isinstance(value, str) else ""), None


def _fingerprint(root, files, chosen):
    """Return a hash that changes with the files and with the columns that are read."""
    stamps = [(file, os.stat(root / file).st_size, os.stat(root / file).st_mtime_ns) for file in files]
    return hashlib.sha256(repr((os.path.abspath(root), stamps, chosen)).encode()).hexdigest()[:24]
