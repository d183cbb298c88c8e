"""The picture of the photos that match a query."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reporting.picture import GAP, LABEL_SIZE, LINE, QUERY, SOFT, TEXT, TILE, TITLE_SIZE, Picture, wrap
from runtime.text import display_filename, display_text

if TYPE_CHECKING:
    import numpy as np

COLUMNS = 4  # of photos, for one query
MAX_QUERIES = 20  # in one picture
MAX_TITLE_LINES, MAX_ROW_LINES = 4, 9


def plot_photos(answers: Sequence[tuple], path: Path) -> None:
    """Draw the photos that match a query, best first, with their scores; with several queries, one row for each.

    answers: for each query its text, its image or None, and its matches (score, path of an image). The suffix of
    `path` is the format.
    """
    _draw(answers).save(path)


def draw_photos(answers: Sequence[tuple]) -> "np.ndarray":
    """Draw what `plot_photos` writes -> (H, W, 3) uint8."""
    import numpy as np

    return np.asarray(_draw(answers).image())


def _draw(answers):
    picture = Picture()
    if len(answers) == 1:
        _draw_grid(picture, *answers[0])
    else:
        for answer in answers[:MAX_QUERIES]:
            _draw_row(picture, *answer)
    return picture


def _draw_grid(picture, text, query_image, matches):
    cells = [(None, query_image)] if query_image else []
    cells += [(rank, match) for rank, match in enumerate(matches, start=1)]
    columns = max(2, min(COLUMNS, len(cells)))
    top = GAP
    width = columns * (TILE + GAP) - GAP
    for line in wrap(picture, display_text(text), TITLE_SIZE, width, MAX_TITLE_LINES):
        picture.text((GAP, top), line, TITLE_SIZE)
        top += TITLE_SIZE * LINE
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        left = GAP + column * (TILE + GAP)
        _draw_cell(picture, (left, int(top + GAP + row * (TILE + 3 * GAP + 2.7 * LABEL_SIZE))), *cell)


def _draw_row(picture, text, query_image, matches):
    top = picture.height + GAP
    lines = wrap(picture, display_text(text), LABEL_SIZE + 2, TILE - GAP, MAX_ROW_LINES)
    for number, line in enumerate(lines):
        picture.text((GAP, top + number * LINE * (LABEL_SIZE + 2)), line, LABEL_SIZE + 2)
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
        (line,) = wrap(picture, text, LABEL_SIZE, TILE, 1)
        picture.text((left, top + TILE + 4 + number * LINE * LABEL_SIZE), line, LABEL_SIZE, colour)
