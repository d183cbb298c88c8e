"""Read captions from text files: tables (comma, tab, pipe or semicolon) and lines such as `photo.jpg#0<TAB>caption`."""

import ast
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data.caption_rows import CaptionRows
from data.column_names import is_split_word, resolve_splits
from data.columns import ColumnChooser
from data.json_entries import find_texts
from data.records import (
    FIND_COLUMNS,
    IMAGE_NAME,
    IMAGE_SUFFIX_PATTERN,
    MAX_PLAIN_NAME,
    UNDECODED,
    CaptionRecords,
    ColumnNames,
    decode_head,
    match_columns,
    read_lines,
    shorten,
)
from data.row_scanner import NO_QUOTES, RowScanner, split_cells
from data.text_lines import TextLines
from runtime.text import format_examples

DELIMITERS = {",": "commas", "\t": "tabs", "|": "pipes", ";": "semicolons"}
# The end of the file name in a line: its suffix, in Flickr8k a number, and white space before the caption.
NAME_END = re.compile(rf"{IMAGE_SUFFIX_PATTERN}(?:\.\d{{1,9}})?(#[^\s#]{{0,20}})?\s+", re.IGNORECASE)
QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
NUMPY_LIST = re.compile(rf"\[\s*(?:(?:{QUOTED})\s*)+\]", re.DOTALL)  # strings without commas between them
NUMBER_AND_CAPTION = re.compile(r"\s*\d+\s+(\S.*)")  # in one row of Flickr30k, number and caption share a cell
WEAK_IMAGE_COLUMNS = ("name", "path", "file", "id")  # in many tables that are not about photos
NO_PLAIN_TEXT = ("", " ", "\t", "\n", "[", "{")  # first character of a cell that is blank or a list, perhaps
MAX_COLUMNS = 1000
SAMPLE_LINES = 200  # by which the format is detected


@dataclass(frozen=True)
class Columns:
    """The columns of a table, by index; `width` is their number."""

    delimiter: str
    width: int
    image: int
    captions: list[int]
    split: int | None
    has_header: bool
    note: str | None = None  # which columns are read and which are ignored
    split_name: str = ""


def read_table(path: Path, names: ColumnNames = FIND_COLUMNS, photos: Container[str] = ()) -> CaptionRecords:
    """Read the captions of a text file in any of the supported table formats.

    photos: what `in` tells whether a cell names an existing photo without its suffix. Raises ValueError if the file as
    a whole is no caption table, or can be read in two ways; rows that cannot be used are in `bad_rows`.
    """
    lines, encoding_note = read_lines(path)
    sample = [line for line in islice(lines, 10 * SAMPLE_LINES) if line and not line.isspace()][:SAMPLE_LINES]
    if not sample:
        raise ValueError(f"{path}, line 1: expected captions, found no line; add lines such as photo.jpg,a dog in snow")
    captions = _read(path, lines, sample, names, photos)
    captions.notes += [encoding_note] if encoding_note else []
    return captions


def _read(path, lines, sample, names, photos):
    matches = [match for match in map(parse_caption_line, sample) if match]
    if names == FIND_COLUMNS and sum(number is not None for _, number, _ in matches) > len(sample) // 2:
        return _read_lines(path, lines, "lines of photo.jpg#number and caption")
    try:
        columns = find_columns(sample, names, photos)
    except ValueError as error:
        raise ValueError(f"{path}, line 1: {error}") from None
    if columns is not None:
        return _read_columns(path, lines, columns, photos)
    if len(matches) > len(sample) // 2:
        return _read_lines(path, lines, "lines of photo.jpg and caption")
    raise ValueError(
        f"{path}, line 1: expected a header such as image,caption or rows such as photo.jpg,a dog in snow (with "
        f"commas, tabs, pipes or semicolons), found {shorten(sample[0])}; name the columns image and caption in line 1"
    )


def is_caption_table(path: Path, photos: Container[str] = ()) -> bool:
    """Return whether the start of a text file contains captions in a format that `read_table` supports."""
    sample = [line for line in decode_head(path).split("\n") if line.strip()][:SAMPLE_LINES]
    if not sample:
        return False
    try:
        found = find_columns(sample, FIND_COLUMNS, photos) is not None
    except ValueError:  # a table of photos and texts, but it is not clear which text is the caption
        found = True
    return found or sum(parse_caption_line(line) is not None for line in sample) > len(sample) // 2


def is_unclear_table(path: Path, photos: Container[str] = ()) -> bool:
    """Return whether a table has captions, but --caption-column or another flag has to choose its columns."""
    sample = [line for line in decode_head(path).split("\n") if line.strip()][:SAMPLE_LINES]
    try:
        find_columns(sample, FIND_COLUMNS, photos)
    except ValueError:
        return True
    return False


def parse_caption_line(line: str) -> tuple[str, str | None, str] | None:
    """Return (image, "#number" or None, caption) of a line such as `photo.jpg#0<TAB>a dog`, or None."""
    line = line.strip()
    end = NAME_END.search(line)
    if end is None:
        return None
    name = line[: end.start(1)] if end[1] is not None else line[: end.end()].rstrip()
    return None if "\t" in name or "|" in name else (name, end[1], line[end.end() :])


def find_columns(sample: list[str], names: ColumnNames = FIND_COLUMNS, photos: Container[str] = ()) -> Columns | None:
    """Return the columns of a table, by its header and its cells; None if it has no image or caption column.

    Raises ValueError if a column that the user named does not exist, or if several could be the image or the caption.
    """
    tables = {d: _sample_rows(sample, d) for d in DELIMITERS}
    tables = {d: rows for d, rows in tables.items() if rows}
    named = [d for d, rows in tables.items() if _has_known_header(rows[0], names)]
    if named:
        return _choose(named[0], tables[named[0]], True, names, photos)
    choosers = {d: ColumnChooser(None, rows, photos) for d, rows in tables.items()}
    counts = {d: chooser.image_rows() for d, chooser in choosers.items() if chooser.width > 1}
    best = max(counts, key=counts.get, default=None)
    if best is None or counts[best] <= len(tables[best]) // 2:
        half_named = [d for d, rows in tables.items() if _names_image_column(rows[0])]
        if half_named:  # names without suffix
            return _choose(half_named[0], tables[half_named[0]], True, names, photos)
        if any(names[:2]):
            raise ValueError(
                f"expected the columns {format_examples([name for name in names if name])}, found "
                f"{shorten(sample[0])}; name them as in the file's first line"
            )
        return None
    has_header = not ColumnChooser(None, tables[best][:1], photos).image_rows()
    return _choose(best, tables[best], has_header, names, photos)


def _sample_rows(sample, delimiter):
    """Return the cells of the first rows; a row that goes on in the next line is left out."""
    scanner = RowScanner(TextLines("\n".join(sample)), delimiter, lambda cells: len(cells) > 1)
    with suppress(csv.Error):
        rows = [split_cells(row, delimiter)[: MAX_COLUMNS + 1] for _, row in scanner] or [[]]
        return [row for row in rows if len(row) > 1] if len(rows[0]) <= MAX_COLUMNS else []
    return []


def _has_known_header(cells, names):
    """Return whether a first line names the image and the caption column, or those that the user named."""
    header = [cell.strip() for cell in cells]
    lower = [cell.lower() for cell in header]
    wanted = [name.strip().lower() for column in names[:2] if column for name in column.split(",")]
    if wanted and any(name in lower for name in wanted):
        return True
    image, captions, _ = match_columns(header)
    return image is not None and bool(captions) and not any(map(_is_image_name, header))


def _names_image_column(cells):
    image = match_columns(cells)[0]
    return image is not None and image.strip().lower() not in WEAK_IMAGE_COLUMNS


def _choose(delimiter, rows, has_header, names, photos):
    """Return the columns of a table with this delimiter, or None."""
    header, body = (rows[0], rows[1:]) if has_header else (None, rows)
    while header and not header[-1].strip():  # spreadsheets export empty columns at the end
        header = header[:-1]
    if header is None and delimiter == ",":  # captions may contain commas that are not quoted
        width = min(len(row) for row in rows)
    elif header is None:
        width = Counter(map(len, rows)).most_common(1)[0][0]
    else:
        width = len(header)
    complete = [row for row in body if len(row) >= width] if header is None else body
    chooser = ColumnChooser(header, [row[:width] for row in complete], photos)
    choice = chooser.choose(names)
    if choice is None:
        return None
    split_name = "" if choice.split is None else chooser.name(choice.split)
    return Columns(delimiter, width, *choice[:3], has_header, choice.note, split_name)


def _is_image_name(cell):
    return IMAGE_NAME.fullmatch(cell.strip()) is not None


def _read_columns(path, lines, columns, photos):
    table_format = f"table with {DELIMITERS[columns.delimiter]}"
    captions = CaptionRecords(table_format + ("" if columns.has_header else ", no header"), [path])
    location, words = f"{path}, line ", Counter()
    scanner = RowScanner(lines, columns.delimiter, lambda cells: _names_image(cells, columns, photos))
    delimiter, width = columns.delimiter, columns.width
    first_caption, is_single = columns.captions[0], len(columns.captions) == 1
    rows = iter(scanner)
    if columns.has_header:
        next(rows, None)
    if is_single and not lines.contains("\0"):
        rows = _add_plain_rows(rows, captions, columns, words)
    for number, row in rows:
        try:
            cells = split_cells(row, delimiter)
            if len(cells) != width:
                cells = _repair_cells(cells, columns)
        except csv.Error as error:
            captions.bad_rows.append(
                f"{location}{number}: expected {columns.width} columns, found invalid CSV ({error}); correct the row"
            )
            continue
        if cells is None:
            captions.bad_rows.append(_width_error(f"{location}{number}", row, columns))
            continue
        if first_caption < len(cells) and is_single and cells[first_caption][:1] not in NO_PLAIN_TEXT:
            texts = [cells[first_caption]]
        else:
            texts = [text for index in columns.captions if index < len(cells) for text in _parse_captions(cells[index])]
        split = None
        if columns.split is not None:
            split = cells[columns.split].strip() if columns.split < len(cells) else ""
            split = _count(words, split)
        captions.add(cells[columns.image], texts, split, location, number, "fill it in or delete the row")
    for number, row in scanner.unclosed:
        captions.bad_rows.append(
            f"{location}{number}: expected a closing quote, found an unclosed one in {shorten(row)}; close it, or "
            'write "" for a quote within a caption'
        )
    captions.notes += [f"{path.name}: {columns.note}"] if columns.note else []
    if columns.split is not None:
        _name_splits(captions, words, columns, path)
    return captions


def _add_plain_rows(rows, captions, columns, words):
    """Add the rows without anything that `CaptionRecords.add` would change or refuse; yield the others.

    Of millions of rows, nearly all are plain: one cell per column, no quotes, a caption that is no list. The caller
    adds each row that is yielded before it takes the next one, so the order of the rows is kept.
    """
    delimiter, width, image_at, split_at = columns.delimiter, columns.width, columns.image, columns.split
    (caption_at,), quoted = columns.captions, columns.delimiter != NO_QUOTES
    add_image, add_text, add_split = (column.append for column in captions.rows.columns)
    last_cell = image = split = None
    for number, row in rows:
        if not (quoted and '"' in row) and (row.isascii() or UNDECODED.search(row) is None):
            cells = row.split(delimiter)
            if len(cells) == width:
                cell, text = cells[image_at], cells[caption_at]
                if cell != last_cell:  # one string for all captions of an image
                    last_cell, image = cell, cell.strip().replace("\\", "/")
                if image and len(image) <= MAX_PLAIN_NAME and text[:1] not in NO_PLAIN_TEXT and (text := text.strip()):
                    if split_at is not None:
                        split = _count(words, cells[split_at].strip())
                    add_image(image)
                    add_text(text)
                    add_split(split)
                    continue
        yield number, row


def _count(words, split):
    """Count the word of a split column and return it; equal words of millions of rows become one string."""
    words[split] += 1
    return sys.intern(split)


def _names_image(cells, columns, photos):
    """Return whether a line within quotes is a row of its own, because the quote before it is not closed."""
    if len(cells) <= max(columns.image, columns.captions[0]):
        return False
    cell = cells[columns.image].strip()
    return IMAGE_NAME.fullmatch(cell) is not None or cell in photos


def _name_splits(captions, words, columns, path):
    """Replace the words of the split column by train, val and test. Raises ValueError if some are not known."""
    splits = resolve_splits(word for word in words if word)
    unknown = [word for word, split in splits.items() if split is None]
    if unknown:
        unclear = [word for word in unknown if is_split_word(word)]
        why = " (each may mean val or test)" if unclear == unknown else ""
        raise ValueError(
            f"{path}, line 1: expected train, val and test in the column {columns.split_name}, found "
            f"{format_examples([shorten(word, 30) for word in unknown])}{why}; rename them, or ignore the column with "
            "--split-column none"
        )
    if words[""]:
        captions.notes.append(f"{path.name}: {words['']:,} rows have no split in the column {columns.split_name}")
    if any(word != split for word, split in splits.items()) or words[""]:
        splits[""] = None
        captions.rows = CaptionRows((image, text, splits[word]) for image, text, word in captions.rows)


def _repair_cells(cells, columns):
    """Return the row with one cell per column, or None. A caption may contain the delimiter without quotes."""
    while len(cells) > columns.width and not cells[-1].strip():
        cells.pop()
    extra = len(cells) - columns.width
    if extra == 0:
        return cells
    if extra > 0 and len(columns.captions) == 1:
        index = columns.captions[0]
        if index in (0, columns.width - 1):
            caption = columns.delimiter.join(cells[index : index + extra + 1])
            return [*cells[:index], caption, *cells[index + extra + 1 :]]
    if extra == -1 and columns.captions == [columns.width - 1] and columns.image < columns.width - 2:
        match = NUMBER_AND_CAPTION.fullmatch(cells[-1])
        return [*cells[:-1], "", match[1]] if match else None
    required = max(columns.image, min(columns.captions))
    return cells if extra < 0 and len(cells) > required else None


def _width_error(location, row, columns):
    fix = "write a file name and a caption"
    if len(split_cells(row, columns.delimiter)) > columns.width:
        fix = f'put captions that contain {DELIMITERS[columns.delimiter]} in "quotes"'
    width = len(split_cells(row, columns.delimiter))
    return f"{location}: expected {columns.width} columns, found {width} in {shorten(row)}; {fix}"


def _parse_captions(cell):
    """Return the captions in a cell: its text, or a list of texts as JSON, Python or NumPy prints it.

    Label Studio and VGG Image Annotator write objects: {"text": ["a dog"]}.
    """
    if cell.startswith("{") and cell.endswith("}"):
        with suppress(ValueError, TypeError, RecursionError):
            return [text for text, _ in find_texts(json.loads(cell))]
    if cell.startswith("[") and cell.endswith("]"):
        array = f"[{', '.join(re.findall(QUOTED, cell))}]" if NUMPY_LIST.fullmatch(cell) else cell
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                texts = parse(array)
                return [text for text in texts if isinstance(text, str)] or [text for text, _ in find_texts(texts)]
    return [cell] if cell.strip() else []


def _read_lines(path, lines, line_format):
    captions, location = CaptionRecords(line_format, [path]), f"{path}, line "
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = parse_caption_line(line)
        if match:
            captions.add(match[0], [match[2]], None, location, number, "write the caption after the file name")
        else:
            found = "bytes that are not valid UTF-8" if UNDECODED.search(line) else shorten(line)
            expected = line_format.removeprefix("lines of ")
            captions.bad_rows.append(
                f"{location}{number}: expected {expected}, found {found}; correct or delete the line"
            )
    return captions
