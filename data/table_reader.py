"""Read captions from text files: tables (comma, tab, pipe or semicolon) and lines such as `photo.jpg#0<TAB>caption`."""

import ast
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.records import (
    FIND_COLUMNS,
    IMAGE_NAME,
    IMAGE_NAME_PATTERN,
    UNDECODED,
    CaptionRecords,
    ColumnNames,
    decode_head,
    decode_text,
    match_columns,
    parse_split,
    shorten,
)

DELIMITERS = {",": "commas", "\t": "tabs", "|": "pipes", ";": "semicolons"}
CAPTION_LINE = re.compile(rf"\s*({IMAGE_NAME_PATTERN})(#\S*)?\s+(\S.*)", re.IGNORECASE)
QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
NUMPY_LIST = re.compile(rf"\[\s*(?:(?:{QUOTED})\s*)+\]", re.DOTALL)  # strings without commas between them
NUMBER_AND_CAPTION = re.compile(r"\s*\d+\s+(\S.*)")  # in one row of Flickr30k, number and caption share a cell
SAMPLE_LINES = 200  # by which the format is detected
MAX_CELL_LINES = 30  # if a quoted cell is longer, its closing quote is missing


@dataclass(frozen=True)
class Columns:
    """The columns of a table, by index; `width` is their number."""

    delimiter: str
    width: int
    image: int
    captions: list[int]
    split: int | None
    has_header: bool


def read_table(path: Path, names: ColumnNames = FIND_COLUMNS) -> CaptionRecords:
    """Read the captions of a text file in any of the supported table formats.

    Raises ValueError if the file as a whole is no caption table; rows that cannot be used are in `bad_rows`.
    """
    lines = decode_text(path).split("\n")
    sample = [line for line in lines if line.strip()][:SAMPLE_LINES]
    if not sample:
        raise ValueError(f"{path}, line 1: expected captions, found no line; add lines such as photo.jpg,a dog in snow")
    matches = [match for match in map(CAPTION_LINE.fullmatch, sample) if match]
    if sum(match[2] is not None for match in matches) > len(sample) // 2:
        return _read_lines(path, lines, "lines of photo.jpg#number and caption")
    columns = find_columns(sample)
    if columns is not None:
        return _read_columns(path, lines, columns)
    if len(matches) > len(sample) // 2:
        return _read_lines(path, lines, "lines of photo.jpg and caption")
    raise ValueError(
        f"{path}, line 1: expected a header such as image,caption or rows such as photo.jpg,a dog in snow (with "
        f"commas, tabs, pipes or semicolons), found {shorten(sample[0])}; name the columns image and caption in line 1"
    )


def is_caption_table(path: Path) -> bool:
    """Return whether the start of a text file contains captions in a format that `read_table` supports."""
    sample = [line for line in decode_head(path).split("\n") if line.strip()][:SAMPLE_LINES]
    n_matches = sum(CAPTION_LINE.fullmatch(line) is not None for line in sample)
    return bool(sample) and (n_matches > len(sample) // 2 or find_columns(sample) is not None)


def find_columns(sample: list[str]) -> Columns | None:
    """Return the columns of a table from its header, else from the cells that are image names; None if not found."""
    tables = {d: [_split_cells(line, d) for line in sample] for d in DELIMITERS}
    for delimiter, rows in tables.items():
        columns = _columns_from_header(delimiter, [cell.strip().lower() for cell in rows[0]])
        if columns is not None:
            return columns
    return max((_columns_from_cells(d, rows) for d, rows in tables.items()), key=lambda result: result[0])[1]


def _columns_from_header(delimiter, header):
    while header and not header[-1]:  # spreadsheets export empty columns at the end
        header.pop()
    image, captions, split = match_columns(header)
    if image is None or not captions:
        return None
    caption_indices = [header.index(name) for name in captions]
    split = None if split is None else header.index(split)
    return Columns(delimiter, len(header), header.index(image), caption_indices, split, has_header=True)


def _columns_from_cells(delimiter, rows):
    """Return (number of matching rows, Columns) of a table without a known header, or (0, None)."""
    has_header = not any(_is_image_name(cell) for cell in rows[0])
    counts = Counter(index for row in rows if len(row) > 1 for index, cell in enumerate(row) if _is_image_name(cell))
    image, n_matches = max(counts.items(), key=lambda item: item[1], default=(0, 0))
    if n_matches <= len(rows) // 2:
        return 0, None
    rows = [row for row in rows if len(row) > image and _is_image_name(row[image])]
    width = min(len(row) for row in rows) if delimiter == "," else Counter(map(len, rows)).most_common(1)[0][0]
    others = [index for index in range(width) if index != image]
    split = next((i for i in others if all(parse_split(row[i]) for row in rows if len(row) > i)), None)
    captions = [i for i in others if i != split and not all(row[i].strip().isdigit() for row in rows if len(row) > i)]
    if not captions:
        return 0, None
    return n_matches, Columns(delimiter, width, image, captions, split, has_header)


def _is_image_name(cell):
    return IMAGE_NAME.fullmatch(cell.strip()) is not None


def _read_columns(path, lines, columns):
    table_format = f"table with {DELIMITERS[columns.delimiter]}"
    captions = CaptionRecords(table_format + ("" if columns.has_header else ", no header"), [path])
    skip_header, location = columns.has_header, f"{path}, line "
    for number, row in _iter_rows(lines, columns.delimiter, path, captions.bad_rows):
        if skip_header:
            skip_header = False
            continue
        try:
            cells = _repair_cells(_split_cells(row, columns.delimiter), columns)
        except csv.Error as error:
            captions.bad_rows.append(
                f"{location}{number}: expected {columns.width} columns, found invalid CSV ({error}); correct the row"
            )
            continue
        if cells is None:
            captions.bad_rows.append(_width_error(f"{location}{number}", row, columns))
            continue
        texts = [text for index in columns.captions if index < len(cells) for text in _parse_captions(cells[index])]
        split = parse_split(cells[columns.split]) if columns.split is not None and columns.split < len(cells) else None
        captions.add(cells[columns.image], texts, split, location, number, "fill it in or delete the row")
    return captions


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
    if len(_split_cells(row, columns.delimiter)) > columns.width:
        fix = f'put captions that contain {DELIMITERS[columns.delimiter]} in "quotes"'
    width = len(_split_cells(row, columns.delimiter))
    return f"{location}: expected {columns.width} columns, found {width} in {shorten(row)}; {fix}"


def _parse_captions(cell):
    """Return the captions in a cell: its text, or a list of texts as JSON, Python or NumPy prints it."""
    if cell.startswith("[") and cell.endswith("]"):
        array = f"[{', '.join(re.findall(QUOTED, cell))}]" if NUMPY_LIST.fullmatch(cell) else cell
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                return [text for text in parse(array) if isinstance(text, str)] or [cell]
    return [cell] if cell.strip() else []


def _iter_rows(lines, delimiter, path, bad_rows) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of each row. A quoted cell may span lines; an unclosed quote loses its line only."""
    start = 0
    while start < len(lines):
        row, n_lines = lines[start], 1
        if delimiter != "|" and row.count('"') % 2 and _has_open_quote(row, delimiter):
            multiline_row = _read_multiline_row(lines, start, delimiter)
            if multiline_row is None:
                bad_rows.append(
                    f"{path}, line {start + 1}: expected a closing quote, found an unclosed one in "
                    f'{shorten(row)}; close it, or write "" for a quote within a caption'
                )
                row = ""
            else:
                row, n_lines = multiline_row
        if row.strip():
            yield start + 1, row
        start += n_lines


def _read_multiline_row(lines, start, delimiter):
    """Return (text, number of lines) of the row that opens a quote in lines[start], or None if it is not closed."""
    row = lines[start]
    for n_lines, line in enumerate(lines[start + 1 : start + MAX_CELL_LINES], start=2):
        cells = line.split(delimiter, 1)
        if len(cells) == 2 and _is_image_name(cells[0].strip().strip('"')):
            return None  # this line is the next row
        row += "\n" + line
        if line.count('"') % 2 and not _has_open_quote(row, delimiter):
            return row, n_lines
    return None


def _has_open_quote(row, delimiter):
    try:
        next(csv.reader([row], delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _split_cells(row, delimiter):
    if delimiter == "|" or '"' not in row:  # tables with pipes do not use quotes
        return row.split(delimiter)
    return next(csv.reader([row], delimiter=delimiter), [])


def _read_lines(path, lines, line_format):
    captions, location = CaptionRecords(line_format, [path]), f"{path}, line "
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = CAPTION_LINE.fullmatch(line)
        if match:
            captions.add(match[1], [match[3]], None, location, number, "write the caption after the file name")
        else:
            found = "bytes that are not valid UTF-8" if UNDECODED.search(line) else shorten(line)
            expected = line_format.removeprefix("lines of ")
            captions.bad_rows.append(
                f"{location}{number}: expected {expected}, found {found}; correct or delete the line"
            )
    return captions
