"""Pictures with lists of texts: captions that match a query, labels as bars, examples of a data set."""

from collections.abc import Sequence
from pathlib import Path

from reporting.match_picture import COLUMNS, MAX_QUERIES
from reporting.picture import (
    BAR,
    GAP,
    LABEL_SIZE,
    QUERY,
    SOFT,
    TEXT,
    TILE,
    TITLE_SIZE,
    TRACK,
    Picture,
    wrap,
)
from runtime.text import display_filename, display_text

SIZE = LABEL_SIZE + 1  # of captions and labels
MAX_TITLE_LINES, MAX_QUERY_LINES = 10, 6  # of a sentence alone, or below a photo, in a column of TILE pixels
MAX_CAPTIONS, MAX_CAPTION_LINES, CAPTION_WIDTH, SCORE_WIDTH = 40, 4, 700, 100  # the widths in pixels
MAX_EXAMPLE_LINES, BULLET = 3, 10  # of a caption below its photo; pixels before it
MAX_LABELS, MAX_LABEL_LINES, LABEL_WIDTH, BAR_WIDTH = 50, 2, 300, 320


def plot_captions(answers: Sequence[tuple], path: Path) -> None:
    """Draw the captions that match each query, a sentence or an image, best first, with their scores.

    answers: for each query its text, its image or None, and its matches (score, caption). The suffix of `path` is the
    format. Long texts end in "…", and a line tells how many matches are not shown.
    """
    _plot(answers, path, _draw_captions)


def plot_labels(answers: Sequence[tuple], path: Path) -> None:
    """Draw the labels of each image as horizontal bars, the most probable first, with their probabilities.

    answers: as in plot_captions, the matches being (probability, label).
    """
    _plot(answers, path, _draw_labels)


def plot_examples(title: str, examples: Sequence[tuple[Path, str, Sequence[str]]], path: Path) -> None:
    """Draw images of a data set with their captions. examples: (image path, heading, captions) each."""
    picture, columns = Picture(), min(COLUMNS, len(examples))
    lines = wrap(picture, display_text(title), TITLE_SIZE, max(2, columns) * (TILE + GAP) - GAP, 2)
    top = 2 * GAP + picture.lines((GAP, GAP), lines, TITLE_SIZE)
    for start in range(0, len(examples), columns):
        for column, example in enumerate(examples[start : start + columns]):
            _draw_example(picture, (GAP + column * (TILE + GAP), int(top)), *example)
        top = picture.height + GAP
    picture.save(path)


def _draw_example(picture, position, image_path, heading, captions):
    left, top = position
    lines = wrap(picture, display_text(heading), LABEL_SIZE, TILE, 1)
    top += int(picture.lines(position, lines, LABEL_SIZE, SOFT)) + 4
    picture.photo((left, top), image_path)
    top += TILE + 6
    for caption in captions:
        lines = wrap(picture, display_text(caption), LABEL_SIZE, TILE - BULLET, MAX_EXAMPLE_LINES)
        picture.text((left, top), "·", LABEL_SIZE)
        top += picture.lines((left + BULLET, top), lines, LABEL_SIZE) + 3


def _plot(answers, path, draw_matches):
    picture = Picture()
    for number, (text, query_image, matches) in enumerate(answers[:MAX_QUERIES]):
        top = picture.height + GAP
        if number:
            picture.box((GAP, top), TILE + GAP + SCORE_WIDTH + CAPTION_WIDTH, 1, TRACK)
            top += GAP
        _draw_query(picture, (GAP, int(top)), text, query_image)
        draw_matches(picture, (TILE + 3 * GAP, int(top)), matches)
    picture.save(path)


def _draw_query(picture, position, text, query_image):
    left, top = position
    if query_image is None:
        picture.lines(position, wrap(picture, display_text(text), TITLE_SIZE, TILE, MAX_TITLE_LINES), TITLE_SIZE)
        return
    picture.photo(position, query_image, frame=True)
    sentence = display_text(text).removeprefix(display_text(query_image)).removeprefix(" + ")
    top += TILE + 4
    for line, colour in (("the query", QUERY), (display_filename(query_image), SOFT), (sentence, TEXT)):
        lines = wrap(picture, line, LABEL_SIZE, TILE, MAX_QUERY_LINES if line == sentence else 1)
        top += picture.lines((left, top), lines, LABEL_SIZE, colour)


def _draw_captions(picture, position, matches):
    left, top = position
    for rank, match in enumerate(matches[:MAX_CAPTIONS], start=1):
        picture.text((left, top), f"{rank}.  {match.score:.3f}", SIZE, SOFT)
        lines = wrap(picture, display_text(match.item), SIZE, CAPTION_WIDTH, MAX_CAPTION_LINES)
        top += picture.lines((left + SCORE_WIDTH, top), lines, SIZE) + GAP / 2
    if len(matches) > MAX_CAPTIONS:
        picture.text((left + SCORE_WIDTH, top), f"and {len(matches) - MAX_CAPTIONS:,} more", SIZE, SOFT)


def _draw_labels(picture, position, matches):
    left, top = position
    shown = matches[:MAX_LABELS]
    texts = [wrap(picture, display_text(match.item), SIZE, LABEL_WIDTH, MAX_LABEL_LINES) for match in shown]
    width = max((picture.font(line, SIZE).getlength(line) for lines in texts for line in lines), default=0)
    bar_left = left + width + GAP
    for match, lines in zip(shown, texts, strict=True):
        picture.box((bar_left, top + 2), BAR_WIDTH, SIZE, TRACK)
        picture.box((bar_left, top + 2), max(1, BAR_WIDTH * match.score), SIZE, BAR)
        picture.text((bar_left + BAR_WIDTH + GAP, top), _percent(match.score), SIZE)
        top += picture.lines((left, top), lines, SIZE, TEXT) + GAP / 2
    if rest := matches[MAX_LABELS:]:
        together = _percent(sum(match.score for match in rest))
        picture.text((left, top), f"and {len(rest):,} more labels, {together} together", SIZE, SOFT)


def _percent(share):
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"
