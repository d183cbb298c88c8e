"""Captions in text: tables with commas, tabs, bars or semicolons, and lines such as `photo.jpg#0<TAB>caption`."""

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
    IMAGE_NAME,
    IMAGE_PATTERN,
    UNDECODED,
    CaptionRecords,
    decode_text,
    match_columns,
    parse_split,
    shorten,
)

DELIMITERS = {",": "commas", "\t": "tabs", "|": "bars", ";": "semicolons"}
LINE = re.compile(rf"\s*({IMAGE_PATTERN})(#\S*)?\s+(\S.*)", re.IGNORECASE)
QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
ARRAY = re.compile(rf"\[\s*(?:(?:{QUOTED})\s*)+\]", re.DOTALL)  # of texts, without commas between them
GLUED = re.compile(r"\s*\d+\s+(\S.*)")  # Flickr30k has a row whose number and caption share a cell
SAMPLE = 200  # lines by which a form is told
LONGEST_CELL = 30  # lines; a quote that spans more was left open


@dataclass(frozen=True)
class Columns:
    """Where a table keeps what, by position; `width` columns in all."""

    delimiter: str
    width: int
    image: int
    captions: list[int]
    split: int | None
    has_header: bool


def read_table(path: Path) -> CaptionRecords:
    """The captions of a text file, in whichever form it has.

    Raises ValueError where the file as a whole is no caption table; rows that cannot be used come back as `bad`.
    """
    lines = decode_text(path).split("\n")
    sample = [line for line in lines if line.strip()][:SAMPLE]
    if not sample:
        raise ValueError(f"{path}, line 1: expected captions, found no line; one line is e.g.: photo.jpg,a dog in snow")
    fitting = [found for found in map(LINE.fullmatch, sample) if found]
    if sum(found[2] is not None for found in fitting) > len(sample) // 2:
        return _read_lines(path, lines, "lines of photo.jpg#number and caption")
    columns = find_columns(sample)
    if columns is not None:
        return _read_columns(path, lines, columns)
    if len(fitting) > len(sample) // 2:
        return _read_lines(path, lines, "lines of photo.jpg and caption")
    raise ValueError(
        f"{path}, line 1: expected a header such as image,caption or rows such as photo.jpg,a dog in snow (with "
        f"commas, tabs, bars or semicolons), found {shorten(sample[0])}; name the columns image and caption in line 1"
    )


def looks_like_table(text: str) -> bool:
    """Whether the head of a text file holds captions in a form that `read_table` knows."""
    sample = [line for line in text.split("\n") if line.strip()][:SAMPLE]
    fitting = sum(LINE.fullmatch(line) is not None for line in sample)
    return bool(sample) and (fitting > len(sample) // 2 or find_columns(sample) is not None)


def find_columns(sample: list[str]) -> Columns | None:
    """The columns of a table by its header, else by what looks like a photo's name; None where there are none."""
    tables = {d: [_cells(line, d) for line in sample] for d in DELIMITERS}
    for delimiter, rows in tables.items():
        has_flag = _named_columns(delimiter, [cell.strip().lower() for cell in rows[0]])
        if has_flag is not None:
            return has_flag
    return max((_seen_columns(d, rows) for d, rows in tables.items()), key=lambda found: found[0])[1]


def _named_columns(delimiter, header):
    while header and not header[-1]:  # spreadsheets leave empty columns at the end
        header.pop()
    image, captions, split = match_columns(header)
    if image is None or not captions:
        return None
    places = [header.index(name) for name in captions]
    split = None if split is None else header.index(split)
    return Columns(delimiter, len(header), header.index(image), places, split, has_header=True)


def _seen_columns(delimiter, rows):
    """(rows that fit, Columns) of a table without a header that says so."""
    has_header = not any(_is_photo(cell) for cell in rows[0])
    photos = Counter(place for row in rows if len(row) > 1 for place, cell in enumerate(row) if _is_photo(cell))
    image, fitting = max(photos.items(), key=lambda found: found[1], default=(0, 0))
    if fitting <= len(rows) // 2:
        return 0, None
    rows = [row for row in rows if len(row) > image and _is_photo(row[image])]
    width = min(len(row) for row in rows) if delimiter == "," else Counter(map(len, rows)).most_common(1)[0][0]
    others = [place for place in range(width) if place != image]
    split = next((p for p in others if all(parse_split(row[p]) for row in rows if len(row) > p)), None)
    texts = [p for p in others if p != split and not all(row[p].strip().isdigit() for row in rows if len(row) > p)]
    if not texts:
        return 0, None
    return fitting, Columns(delimiter, width, image, texts, split, has_header)


def _is_photo(cell):
    return IMAGE_NAME.fullmatch(cell.strip()) is not None


def _read_columns(path, lines, columns):
    form = f"table with {DELIMITERS[columns.delimiter]}"
    captions = CaptionRecords(form + ("" if columns.has_header else ", no header"), [path])
    header_is_due, place = columns.has_header, f"{path}, line "
    for number, record in _records(lines, columns.delimiter, path, captions.bad):
        if header_is_due:
            header_is_due = False
            continue
        try:
            cells = _fit(_cells(record, columns.delimiter), columns)
        except csv.Error as error:
            captions.bad.append(
                f"{place}{number}: expected {columns.width} columns, found no CSV ({error}); mend the row"
            )
            continue
        if cells is None:
            captions.bad.append(_wrong_width(f"{place}{number}", record, columns))
            continue
        texts = [text for column in columns.captions if column < len(cells) for text in _texts(cells[column])]
        split = parse_split(cells[columns.split]) if columns.split is not None and columns.split < len(cells) else None
        captions.add(cells[columns.image], texts, split, place, number, "fill it in or delete the row")
    return captions


def _fit(cells, columns):
    """The row with as many cells as there are columns, or None: a caption may hold the delimiter without quotes."""
    while len(cells) > columns.width and not cells[-1].strip():
        cells.pop()
    extra = len(cells) - columns.width
    if extra == 0:
        return cells
    if extra > 0 and len(columns.captions) == 1:
        place = columns.captions[0]
        if place in (0, columns.width - 1):
            joined = columns.delimiter.join(cells[place : place + extra + 1])
            return [*cells[:place], joined, *cells[place + extra + 1 :]]
    if extra == -1 and columns.captions == [columns.width - 1] and columns.image < columns.width - 2:
        glued = GLUED.fullmatch(cells[-1])
        return [*cells[:-1], "", glued[1]] if glued else None
    needed = max(columns.image, min(columns.captions))
    return cells if extra < 0 and len(cells) > needed else None


def _wrong_width(where, record, columns):
    hint = "write a file name and a caption"
    if len(_cells(record, columns.delimiter)) > columns.width:
        hint = f'put a caption that holds {DELIMITERS[columns.delimiter]} into "quotes"'
    found = len(_cells(record, columns.delimiter))
    return f"{where}: expected {columns.width} columns, found {found} in {shorten(record)}; {hint}"


def _texts(cell):
    """The captions in a cell: itself, or a list of them, as JSON, Python or NumPy writes it."""
    if cell.startswith("[") and cell.endswith("]"):
        written = f"[{', '.join(re.findall(QUOTED, cell))}]" if ARRAY.fullmatch(cell) else cell
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                return [text for text in read(written) if isinstance(text, str)] or [cell]
    return [cell] if cell.strip() else []


def _records(lines, delimiter, path, bad) -> Iterator[tuple[int, str]]:
    """(line number, text) of each row; a quoted cell may run over lines, and a quote left open costs its line only."""
    place = 0
    while place < len(lines):
        record, taken = lines[place], 1
        if delimiter != "|" and record.count('"') % 2 and _is_open(record, delimiter):
            whole = _close(lines, place, delimiter)
            if whole is None:
                bad.append(
                    f"{path}, line {place + 1}: expected a closing quote, found one that stays open in "
                    f'{shorten(record)}; close it, or write "" for a quote within a caption'
                )
                record = ""
            else:
                record, taken = whole
        if record.strip():
            yield place + 1, record
        place += taken


def _close(lines, place, delimiter):
    """(text, lines) of the row that starts at lines[place] with an open quote, or None if it is never closed."""
    record = lines[place]
    for taken, line in enumerate(lines[place + 1 : place + LONGEST_CELL], start=2):
        cells = line.split(delimiter, 1)
        if len(cells) == 2 and _is_photo(cells[0].strip().strip('"')):
            return None  # the next row has begun
        record += "\n" + line
        if line.count('"') % 2 and not _is_open(record, delimiter):
            return record, taken
    return None


def _is_open(record, delimiter):
    try:
        next(csv.reader([record], delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _cells(record, delimiter):
    if delimiter == "|" or '"' not in record:  # bars come without quoting
        return record.split(delimiter)
    return next(csv.reader([record], delimiter=delimiter), [])


def _read_lines(path, lines, form):
    captions, place = CaptionRecords(form, [path]), f"{path}, line "
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = LINE.fullmatch(line)
        if found:
            captions.add(found[1], [found[3]], None, place, number, "write the caption behind the file name")
        else:
            fault = "bytes that are not UTF-8 text" if UNDECODED.search(line) else shorten(line)
            due = form.removeprefix("lines of ")
            captions.bad.append(f"{place}{number}: expected {due}, found {fault}; mend or delete the line")
    return captions
