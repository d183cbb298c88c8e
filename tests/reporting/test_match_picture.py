"""The picture of the matches: every photo is in it, whatever its name, its query and the state of its file."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from reporting import match_picture, picture
from reporting.match_picture import plot_photos
from reporting.picture import TILE


class Match(NamedTuple):
    score: float
    item: Path


@pytest.fixture
def matches(tmp_path):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    found = []
    for number, colour in enumerate(colours):
        path = tmp_path / f"photo {number}.png"
        Image.new("RGB", (40 + 10 * number, 60), colour).save(path)
        found.append(Match(0.9 - number / 10, path))
    return found


def has_colour(path, colour, minimum=1000):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (np.abs(pixels - colour).max(-1) < 12).sum() >= minimum


def test_every_match_is_in_the_picture(matches, tmp_path):
    plot_photos([("a red square", None, matches)], tmp_path / "found.png")

    assert all(has_colour(tmp_path / "found.png", Image.open(m.item).getpixel((5, 5))) for m in matches)
    assert Image.open(tmp_path / "found.png").width > 4 * TILE


def test_query_photo_has_a_frame(matches, tmp_path):
    plot_photos([("nearest", matches[0].item, matches[1:])], tmp_path / "found.png")

    assert has_colour(tmp_path / "found.png", picture.QUERY)


def test_several_queries_have_one_row_each(matches, tmp_path):
    plot_photos([(f"query {n}", None, matches[n : n + 2]) for n in range(3)], tmp_path / "rows.png")

    assert Image.open(tmp_path / "rows.png").height > 3 * TILE


def test_tile_and_a_line_say_that_a_photo_was_deleted_or_damaged_after_the_search(
    matches, tmp_path, capsys, monkeypatch
):
    matches[1].item.unlink()
    matches[2].item.write_bytes(b"no photo")
    written, text = [], picture.Picture.text
    monkeypatch.setattr(
        picture.Picture, "text", lambda self, at, line, *rest: written.append(line) or text(self, at, line, *rest)
    )

    plot_photos([("a red square", None, matches)], tmp_path / "found.png")

    assert has_colour(tmp_path / "found.png", (230, 230, 230))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"2 photos could not be drawn: {matches[1].item}: the photo was deleted or moved after the ")
    assert f"{matches[2].item}: the photo can no longer be read: not an image" in line
    tiles = " ".join(written)
    assert "the photo was deleted or moved" in tiles and "the photo can no longer be read" in tiles


def test_photo_of_an_archive_that_was_deleted_after_the_search_is_reported(matches, tmp_path, capsys):
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(matches[0].item, "a.png")
    plot_photos([("red", None, [Match(0.5, archive / "a.png")])], tmp_path / "found.png")
    assert capsys.readouterr().err == ""
    archive.unlink()
    plot_photos([("red", None, [Match(0.5, archive / "a.png")])], tmp_path / "found.png")
    assert capsys.readouterr().err.startswith(f"1 photo could not be drawn: {archive}/a.png: the photo was deleted")


@pytest.mark.parametrize("text", ["word " * 400, "w" * 3000, "a\x1b[2Jb\nc", "", "x\u202ey"])
def test_long_and_odd_queries_fit_the_width(matches, tmp_path, text):
    odd = tmp_path / ("n" * 200 + ".png")
    matches[0].item.rename(odd)

    plot_photos([(text, None, [Match(0.5, odd), *matches[1:]])], tmp_path / "found.png")

    width = Image.open(tmp_path / "found.png").width
    assert width == pytest.approx(4 * TILE + 5 * picture.GAP, abs=2)


def test_missing_glyphs_are_reported(matches, tmp_path, capsys):
    plot_photos([("a \U00013000 hieroglyph", None, matches)], tmp_path / "found.png")
    assert "shows boxes" in capsys.readouterr().err

    plot_photos([("a café, straße", None, matches)], tmp_path / "found.png")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("suffix", "start"), [(".jpg", b"\xff\xd8"), (".pdf", b"%PDF"), (".svg", b"<svg")])
def test_suffix_is_the_format(matches, tmp_path, suffix, start):
    plot_photos([("a red square", None, matches)], tmp_path / f"found{suffix}")

    assert (tmp_path / f"found{suffix}").read_bytes().startswith(start)


def test_drawing_imports_neither_matplotlib_nor_torch(matches, tmp_path):
    code = (
        "import sys, pathlib, reporting.match_picture as p; from collections import namedtuple; "
        f"p.plot_photos([('x', None, [namedtuple('M', 'score item')(.5, pathlib.Path({str(matches[0].item)!r}))])], "
        f"pathlib.Path({str(tmp_path / 'o.png')!r})); assert not {{'matplotlib', 'torch'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(match_picture.__file__).parents[1])
