"""The picture of the photos that match a query, drawn with Pillow: importing matplotlib would take longer than it."""

import base64
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from data.image_io import load_image
from reporting.fonts import INSTALL_HINT, font_file
from runtime.atomic_io import replace_file
from runtime.text import display_filename, display_text

COLUMNS = 4  # of photos, for one query
MAX_QUERIES = 20  # in one picture
TILE, GAP = 288, 14  # pixels: side of a photo, distance
TITLE_SIZE, LABEL_SIZE = 24, 15  # pixels: height of the letters
MAX_TITLE_LINES, MAX_ROW_LINES = 4, 9
TEXT, SOFT, QUERY = (28, 36, 48), (85, 96, 112), (214, 106, 32)
UNASSIGNED = "\U0010ffff"  # a character that no font has


def plot_photos(answers: Sequence[tuple], path: Path) -> None:
    """Draw the photos that match a query, best first, with their scores; with several queries, one row for each.

    answers: for each query its text, its image or None, and its matches (score, path of an image). The suffix of
    `path` is the format. Says on stderr if a character is in no font.
    """
    picture = _Picture()
    if len(answers) == 1:
        _draw_grid(picture, *answers[0])
    else:
        for answer in answers[:MAX_QUERIES]:
            _draw_row(picture, *answer)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture.image()
    replace_file(path, lambda temporary: _save(image, temporary, path.suffix.lower()))
    if picture.missing_glyphs:
        shown = display_text(path)
        print(f"{shown} shows boxes for characters that no installed font has; {INSTALL_HINT}", file=sys.stderr)


class _Picture:
    """Photos and lines of text at pixel positions, on a white ground that grows with them."""

    def __init__(self):
        self.items, self.width, self.height = [], 0, 0
        self.missing_glyphs, self.fonts = False, {}

    def font(self, text, size):
        from PIL import ImageFont

        key = font_file(text), size
        if key not in self.fonts:
            self.fonts[key] = ImageFont.truetype(str(key[0]), size)
        return self.fonts[key]

    def text(self, position, line, size, colour=TEXT):
        font = self.font(line, size)
        unknown = bytes(font.getmask(UNASSIGNED))
        self.missing_glyphs |= any(bytes(font.getmask(letter)) == unknown for letter in set(line) if ord(letter) > 127)
        self._add(position, font.getlength(line), size * 1.35, ("text", line, font, colour))

    def photo(self, position, path, *, frame=False):
        image = _thumbnail(path)
        offset = [start + (TILE - side) // 2 for start, side in zip(position, image.size, strict=True)]
        self._add(position, TILE, TILE, ("photo", image, offset, frame))

    def _add(self, position, width, height, item):
        self.items.append((position, item))
        self.width, self.height = max(self.width, position[0] + width), max(self.height, position[1] + height)

    def image(self):
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (int(self.width) + GAP, int(self.height) + GAP), "white")
        draw = ImageDraw.Draw(image)
        for position, (kind, content, *details) in self.items:
            if kind == "text":
                font, colour = details
                draw.text(position, content, colour, font)
                continue
            offset, frame = details
            image.paste(content, tuple(offset))
            if frame:
                box = [offset[0] - 3, offset[1] - 3, offset[0] + content.width + 2, offset[1] + content.height + 2]
                draw.rectangle(box, outline=QUERY, width=6)
        return image


def _draw_grid(picture, text, query_image, matches):
    cells = [(None, query_image)] if query_image else []
    cells += [(rank, match) for rank, match in enumerate(matches, start=1)]
    columns = max(2, min(COLUMNS, len(cells)))
    top = GAP
    width = columns * (TILE + GAP) - GAP
    for line in _wrap(picture, display_text(text), TITLE_SIZE, width, MAX_TITLE_LINES):
        picture.text((GAP, top), line, TITLE_SIZE)
        top += TITLE_SIZE * 1.35
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        left = GAP + column * (TILE + GAP)
        _draw_cell(picture, (left, int(top + GAP + row * (TILE + 3 * GAP + 2.7 * LABEL_SIZE))), *cell)


def _draw_row(picture, text, query_image, matches):
    top = picture.height + GAP
    lines = _wrap(picture, display_text(text), LABEL_SIZE + 2, TILE - GAP, MAX_ROW_LINES)
    for number, line in enumerate(lines):
        picture.text((GAP, top + number * 1.35 * (LABEL_SIZE + 2)), line, LABEL_SIZE + 2)
    for rank, match in enumerate(matches, start=1):
        _draw_cell(picture, (GAP + rank * (TILE + GAP), int(top)), rank, match)


def _draw_cell(picture, position, rank, match):
    left, top = position
    if rank is None:
        picture.photo(position, match, frame=True)
        lines = [("the query", QUERY), (display_filename(match), SOFT)]
    else:
        picture.photo(position, match.item)
        lines = [(f"{rank}.  {match.score:.3f}", TEXT), (display_filename(match.item), SOFT)]
    for number, (text, colour) in enumerate(lines):
        (line,) = _wrap(picture, text, LABEL_SIZE, TILE, 1)
        picture.text((left, top + TILE + 4 + number * 1.35 * LABEL_SIZE), line, LABEL_SIZE, colour)


def _wrap(picture, text, size, width, max_lines):
    """Break text into lines of at most `width` pixels, between words where possible; the last one may end in "…"."""
    font, lines = picture.font(text, size), []
    rest = " ".join(text.split())
    while rest and len(lines) < max_lines:
        count = _fitting(font, rest, width)
        if count < len(rest):
            if len(lines) == max_lines - 1:
                return [*lines, rest[: max(1, _fitting(font, rest, width - font.getlength("…")))].rstrip() + "…"]
            space = rest.rfind(" ", 0, count + 1)
            count = space if space > 0 else count
        lines.append(rest[:count].rstrip())
        rest = rest[count:].lstrip()
    return lines or [""]


def _fitting(font, text, width):
    """Return how many characters of a text fit into `width` pixels, at least 1."""
    low, high = 1, min(len(text), max(1, int(width)))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _thumbnail(path):
    from PIL import Image, ImageOps

    try:
        image = Image.fromarray(load_image(path, TILE))
    except OSError:  # deleted or replaced since the search
        image = Image.new("RGB", (TILE, TILE), (230, 230, 230))
    return ImageOps.contain(image, (TILE, TILE))


def _save(image, path, suffix):
    if suffix != ".svg":
        formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".pdf": "PDF"}
        image.save(path, formats.get(suffix, "PNG"), quality=90)
        return
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    content = f'<image {size} href="data:image/png;base64,{data}"/>'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{content}</svg>\n', "utf-8")
