"""A picture of photos, bars and lines of text, drawn with Pillow: importing matplotlib would take longer than it."""

import base64
import io
import sys

from data.image_io import load_image
from data.storage import file_stamp
from reporting.fonts import INSTALL_HINT, font_file
from runtime.atomic_io import replace_file
from runtime.text import display_text, format_examples

TILE, GAP = 288, 14  # pixels: side of a photo, distance
TITLE_SIZE, LABEL_SIZE = 24, 15  # pixels: height of the letters
LINE = 1.35  # height of a line of text, in heights of its letters
TEXT, SOFT, QUERY, BAR, TRACK = (28, 36, 48), (85, 96, 112), (214, 106, 32), (59, 111, 182), (232, 236, 242)
UNASSIGNED = "\U0010ffff"  # a character that no font has


class Picture:
    """Photos, bars and lines of text at pixel positions, on a white ground that grows with them."""

    def __init__(self):
        self.items, self.width, self.height = [], 0, 0
        self.lost = []  # photos that could not be drawn, with the reason
        self.missing_glyphs, self.fonts = False, {}

    def font(self, text, size):
        """Return the font for a text, with letters of `size` pixels."""
        from PIL import ImageFont

        key = font_file(text), size
        if key not in self.fonts:
            self.fonts[key] = ImageFont.truetype(str(key[0]), size)
        return self.fonts[key]

    def text(self, position, line, size, colour=TEXT):
        """Add one line of text; `wrap` makes it fit."""
        font = self.font(line, size)
        unknown = bytes(font.getmask(UNASSIGNED))
        self.missing_glyphs |= any(bytes(font.getmask(letter)) == unknown for letter in set(line) if ord(letter) > 127)
        self._add(position, font.getlength(line), size * LINE, ("text", line, font, colour))

    def lines(self, position, lines, size, colour=TEXT):
        """Add lines of text below each other; returns their height in pixels."""
        for number, line in enumerate(lines):
            self.text((position[0], position[1] + number * size * LINE), line, size, colour)
        return len(lines) * size * LINE

    def photo(self, position, path, *, frame=False):
        """Add a photo in a square of TILE pixels; with a frame, it is the query.

        A photo that cannot be read is a grey square with the reason, and `save` reports it.
        """
        image, problem = _thumbnail(path)
        offset = [start + (TILE - side) // 2 for start, side in zip(position, image.size, strict=True)]
        self._add(position, TILE, TILE, ("photo", image, offset, frame))
        if problem:
            self.lost.append(f"{path}: {problem}")
            lines = wrap(self, display_text(problem), LABEL_SIZE, TILE - 2 * GAP, 5)
            top = position[1] + (TILE - len(lines) * LABEL_SIZE * LINE) / 2
            self.lines((position[0] + GAP, top), lines, LABEL_SIZE, SOFT)

    def box(self, position, width, height, colour):
        """Add a filled rectangle."""
        self._add(position, width, height, ("box", (width, height), colour))

    def _add(self, position, width, height, item):
        self.items.append((position, item))
        self.width, self.height = max(self.width, position[0] + width), max(self.height, position[1] + height)

    def image(self):
        """Draw everything -> an RGB image."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (int(self.width) + GAP, int(self.height) + GAP), "white")
        draw = ImageDraw.Draw(image)
        for position, (kind, content, *details) in self.items:
            if kind == "text":
                font, colour = details
                draw.text(position, content, colour, font)
            elif kind == "box":
                draw.rectangle([*position, position[0] + content[0], position[1] + content[1]], fill=details[0])
            else:
                _paste(image, draw, content, *details)
        return image

    def save(self, path):
        """Write the picture to a file whose suffix is the format.

        Reports on stderr the photos that could not be drawn, and if a character is in no font.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        image = self.image()
        replace_file(path, lambda temporary: _save(image, temporary, path.suffix.lower()))
        if self.lost:
            photos = "1 photo" if len(self.lost) == 1 else f"{len(self.lost):,} photos"
            print(f"{photos} could not be drawn: {format_examples(self.lost)}", file=sys.stderr)
        if self.missing_glyphs:
            shown = display_text(path)
            print(f"{shown} shows boxes for characters that no installed font has; {INSTALL_HINT}", file=sys.stderr)


def _paste(image, draw, photo, offset, frame):
    image.paste(photo, tuple(offset))
    if frame:
        box = [offset[0] - 3, offset[1] - 3, offset[0] + photo.width + 2, offset[1] + photo.height + 2]
        draw.rectangle(box, outline=QUERY, width=6)


def wrap(picture, text, size, width, max_lines):
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
    """Return a photo that fits into a tile and None, or an empty tile and why the photo cannot be read."""
    from PIL import Image, ImageOps

    try:
        return ImageOps.contain(Image.fromarray(load_image(path, TILE)), (TILE, TILE)), None
    except OSError as error:
        reason = "the photo was deleted or moved after the search"
        if file_stamp(path) is not None:
            reason = f"the photo can no longer be read: {str(error).removeprefix(f'{path}: ')}"
        return Image.new("RGB", (TILE, TILE), (230, 230, 230)), reason


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
