"""Pictures of captions and of labels: no text leaves its column, and a bar is as long as its probability."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from reporting import list_picture
from reporting.list_picture import (
    BAR_WIDTH,
    BULLET,
    CAPTION_WIDTH,
    LABEL_WIDTH,
    MAX_CAPTIONS,
    MAX_LABELS,
    SCORE_WIDTH,
    plot_captions,
    plot_examples,
    plot_labels,
)
from reporting.picture import BAR, GAP, QUERY, TILE, Picture


class Match(NamedTuple):
    score: float
    item: str


LONG = {
    "words": "a brown dog runs " * 12,
    "letters": "W" * 200,
    "Chinese": "一只狗在雪地里奔跑" * 23,
    "mixed": "狗 dog " * 40,
    "empty": "",
}


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / f"{'n' * 200}.png"
    Image.new("RGB", (60, 40), (250, 0, 0)).save(path)
    return path


@pytest.fixture
def texts(monkeypatch):
    """The (left, right, line) of every text that is drawn, in pixels."""
    drawn, original = [], Picture.text

    def text(self, position, line, size, *colour):
        drawn.append((position[0], position[0] + self.font(line, size).getlength(line), line))
        original(self, position, line, size, *colour)

    monkeypatch.setattr(Picture, "text", text)
    return drawn


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("has_photo", [True, False])
def test_captions_and_queries_stay_in_their_columns(text, has_photo, photo, texts, tmp_path):
    matches = [Match(0.5, text), Match(-0.25, "a dog")]
    plot_captions([(text, photo if has_photo else None, matches)] * 2, tmp_path / "captions.png")
    columns = [GAP, TILE + 3 * GAP, TILE + 3 * GAP + SCORE_WIDTH]
    assert {left for left, _, _ in texts} <= set(columns)
    for left, right, line in texts:
        assert right - left <= (TILE, SCORE_WIDTH, CAPTION_WIDTH)[columns.index(left)], line
    assert sum(line == "a dog" for _, _, line in texts) == 2
    assert Image.open(tmp_path / "captions.png").width <= columns[-1] + CAPTION_WIDTH + 2 * GAP


def test_a_long_caption_ends_in_an_ellipsis_and_the_next_one_is_below_it(photo, texts, tmp_path):
    plot_captions([("q", photo, [Match(0.5, "word " * 400), Match(0.4, "next")])], tmp_path / "captions.png")
    lines = [line for left, _, line in texts if left == TILE + 3 * GAP + SCORE_WIDTH]
    assert len(lines) == list_picture.MAX_CAPTION_LINES + 1 and lines[-2].endswith("…") and lines[-1] == "next"


def test_sentence_of_a_query_of_both_is_below_the_photo(photo, texts, tmp_path):
    plot_captions([(f"{photo} + in the snow", photo, [Match(0.5, "x")])], tmp_path / "captions.png")
    assert "in the snow" in [line for _, _, line in texts]


def test_captions_that_are_not_shown_are_counted(photo, texts, tmp_path):
    matches = [Match(0.5, f"caption {number}") for number in range(MAX_CAPTIONS + 3)]
    plot_captions([("q", photo, matches)], tmp_path / "captions.png")
    assert texts[-1][2] == "and 3 more"


@pytest.mark.parametrize("probabilities", [(1.0,), (0.5, 0.25, 0.25), (0.75, 0.25, 1e-9, 0.0)])
def test_a_bar_is_as_long_as_its_probability(probabilities, photo, texts, tmp_path):
    plot_labels([("q", photo, [Match(p, f"label {p}") for p in probabilities])], tmp_path / "labels.png")
    pixels = np.asarray(Image.open(tmp_path / "labels.png")).astype(int)
    is_bar = (np.abs(pixels - BAR).max(-1) == 0) & (np.arange(pixels.shape[1]) > TILE + 2 * GAP)
    lengths = [int(row.sum()) for row in is_bar]
    starts = [y for y in range(1, len(lengths)) if lengths[y] and not lengths[y - 1]]
    assert [lengths[y] for y in starts] == pytest.approx([max(1, BAR_WIDTH * p) for p in probabilities], abs=2)
    assert {"< 0.1 %"} & {line for _, _, line in texts} == ({"< 0.1 %"} if 1e-9 in probabilities else set())


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_labels_stay_in_their_column_beside_the_photo(text, photo, texts, tmp_path):
    plot_labels([("q", photo, [Match(0.9, text), Match(0.1, "a dog")])], tmp_path / "labels.png")
    assert all(right - left <= LABEL_WIDTH for left, right, _ in texts)
    pixels = np.asarray(Image.open(tmp_path / "labels.png")).astype(int)
    assert (np.abs(pixels - QUERY).max(-1) == 0).sum() > 1000  # the frame around the query


def test_labels_beyond_the_picture_are_counted_with_their_probability(photo, texts, tmp_path):
    matches = [Match(1 / 100, f"label {number}") for number in range(100)]
    plot_labels([("q", photo, matches)], tmp_path / "labels.png")
    assert texts[-1][2] == f"and {100 - MAX_LABELS} more labels, {100 - MAX_LABELS}.0 % together"
    assert "1.0 %" in [line for _, _, line in texts]


def test_drawing_imports_neither_matplotlib_nor_torch(photo, tmp_path):
    code = (
        "import sys, pathlib, reporting.list_picture as p; from collections import namedtuple; "
        f"p.plot_labels([('x', None, [namedtuple('M', 'score item')(.5, 'a dog')])], "
        f"pathlib.Path({str(tmp_path / 'o.png')!r})); assert not {{'matplotlib', 'torch'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(list_picture.__file__).parents[1])


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_captions_of_examples_stay_below_their_photo(text, count, photo, texts, tmp_path):
    plot_examples(text, [(photo, text, [text, "a dog", text])] * count, tmp_path / "examples.png")
    columns = [GAP + column * (TILE + GAP) for column in range(min(4, count))]
    assert {left for left, _, _ in texts} <= {*columns, *(left + BULLET for left in columns)}
    title = [line for line in texts if line[1] - line[0] > TILE]
    assert all(right <= GAP + max(2, len(columns)) * (TILE + GAP) for _, right, _ in title) and len(title) <= 2
    assert sum(line == "a dog" for _, _, line in texts) == count
    pixels = np.asarray(Image.open(tmp_path / "examples.png")).astype(int)
    assert (np.abs(pixels - (250, 0, 0)).max(-1) < 3).sum() > 0.9 * count * TILE * TILE * 40 / 60
