"""A small data set drawn on the spot, so that the program can be tried without a download.

A scene shows two coloured shapes before one of six backgrounds; five captions describe it. Pictures are drawn in whole
numbers and every choice comes from one frozen random stream, so each machine gets the same bits.
"""

import csv
import io
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.atomic_io import new_folder

SEED = 82
SIDE = 128  # pixels
MARGIN = 12  # pixels kept free along the edge: a crop to 85 % of the area takes at most 10
GAP = 6  # pixels between two shapes, at least
RIM = 2  # pixels of white around a shape, so that yellow shows on sand and black at night
FINE = 4  # samples per pixel along each axis
MOST = 1000  # scenes: three digits name them, and 1128 different pairs of shapes exist

SIZES = {"big": 21, "small": 13}  # radius in pixels
COLOURS = {"red": (222, 45, 48), "orange": (250, 138, 28), "yellow": (252, 212, 48), "green": (38, 160, 84)}
COLOURS |= {"blue": (40, 104, 226), "purple": (124, 62, 176), "pink": (250, 142, 192), "black": (38, 38, 44)}


def _box(x: int, y: int) -> tuple:
    return ((-x, -y), (x, -y), (x, y), (-x, y))


# A shape is its polygons and discs (x, y, radius) laid over each other, in hundredths of its radius, y downwards.
# Each looks the same in a mirror, and stays within 105 when tilted.
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
STAR = ((0, -100), (27, -34), (97, -28), (44, 18), (60, 86), (0, 49), (-60, 86), (-44, 18), (-97, -28), (-27, -34))
POLYGONS = {
    "square": [_box(84, 84)],
    "triangle": [((0, -92), (90, 68), (-90, 68))],
    "star": [STAR],
    "heart": [((0, 95), (85, 1), (46, -34), (0, -24), (-46, -34), (-85, 1))],
    "cross": [_box(33, 95), _box(95, 33)],
}
DISCS = {"circle": [(0, 0, 96)], "heart": [(46, -34, 52), (-46, -34, 52)]}


class Backdrop(NamedTuple):
    """A sky fading from `top` to `bottom`, hills (crest x, crest y, flatness, colour) and pale dots (x, y)."""

    phrases: tuple[str, ...]
    top: tuple[int, ...]
    bottom: tuple[int, ...]
    hills: tuple = ()
    dots: tuple = ()


STARS = ((10, 14), (31, 6), (52, 19), (77, 8), (99, 16), (119, 7), (7, 47), (122, 41), (64, 55), (20, 88), (110, 84))
DARK_HILL, DUSKY_HILL = ((84, 112, 900, (16, 18, 44)),), ((30, 98, 500, (112, 62, 98)),)
DUNES = ((64, 46, 10**6, (66, 164, 206)), (30, 66, 800, (240, 214, 156)))  # the first is the sea, flat to the eye
HILLS = ((100, 44, 160, (164, 212, 132)), (24, 58, 300, (128, 192, 100)))
BACKGROUNDS = {
    "white": Backdrop(("on a white background", "on white paper"), (254, 254, 254), (244, 244, 246)),
    "grey": Backdrop(("on a grey background", "against a grey wall"), (168, 170, 175), (140, 142, 148)),
    "night": Backdrop(("against the night sky", "at night"), (14, 18, 52), (44, 50, 104), DARK_HILL, STARS),
    "beach": Backdrop(("on the beach", "by the sea"), (176, 222, 246), (222, 242, 250), DUNES),
    "meadow": Backdrop(("in a meadow", "on the grass"), (190, 228, 250), (230, 244, 250), HILLS),
    "sunset": Backdrop(("at sunset", "in front of a sunset"), (128, 88, 150), (255, 176, 112), DUSKY_HILL),
}

# What stands on a side is ... the other shape; stands ... in the picture; and, seen from the other shape, ...
SIDES = {
    "left": (("left of", "to the left of"), "on the left", "on its left"),
    "right": (("right of", "to the right of"), "on the right", "on its right"),
    "above": (("above", "over"), "at the top", "above it"),
    "below": (("below", "under"), "at the bottom", "below it"),
}
# One caption comes from each row. a, b: the shapes without their size; A, B: with it.
TEMPLATES = (
    ("{a} {rel} {b}", "there is {a} {rel} {b}", "here is {a} {rel} {b}"),
    ("{A} {rel} {B}", "a picture of {A} {rel} {B}", "{A} that is {rel} {B}"),
    ("{a} {rel} {b} {place}", "{place}, {a} {rel} {b}", "{place} there is {A} {rel} {B}"),
    ("{a} and {b} {place}", "{A} together with {B} {place}", "two shapes {place}, {a} and {b}"),
    ("{a} with {b} {beside}", "{a} {here}, {b} {there}", "{here} there is {A}, {there} {B}"),
)


class Thing(NamedTuple):
    """One shape in its place: centre (x, y) in pixels, tilt -1, 0 or 1."""

    size: str
    colour: str
    shape: str
    x: int
    y: int
    tilt: int


class Scene(NamedTuple):
    """Two shapes and what is said of them; `first` is on side sides[0], "left" or "above", `second` on sides[1]."""

    first: Thing
    second: Thing
    sides: tuple[str, str]
    background: str
    captions: tuple[str, ...]


def make_scenes(count: int) -> list[Scene]:
    """Describe the first `count` scenes: in rounds that deal out each kind of shape and each setting once."""
    if not 1 <= count <= MOST:
        raise ValueError(f"scenes={count}: choose a number from 1 to {MOST}")
    rng = np.random.RandomState(SEED)  # not default_rng: NumPy promises never to change this stream
    kinds, settings = list(product(COLOURS, SHAPES)), list(product(BACKGROUNDS, SIZES, SIZES))
    scenes, shown = [], set()
    while len(scenes) < count:
        pairs, deal, turn = (rng.permutation(n) for n in (len(kinds), len(settings), len(settings)))
        for pair, setting, across in zip(pairs.reshape(-1, 2), deal, turn % 2, strict=True):
            if frozenset(pair) not in shown:  # so that a caption of no more than the two shapes fits one picture only
                shown.add(frozenset(pair))
                scenes.append(_scene(rng, [kinds[k] for k in pair], bool(across), *settings[setting]))
    return scenes[:count]


def _scene(rng: np.random.RandomState, kinds: list, across: bool, background: str, *sizes: str) -> Scene:
    sides = ("left", "right") if across else ("above", "below")
    places = _places(rng, *(SIZES[size] + RIM for size in sizes))
    things = [
        Thing(size, *kind, *(place if across else place[::-1]), tilt=_pick(rng, (-1, 0, 1)))
        for size, kind, place in zip(sizes, kinds, places, strict=True)
    ]
    return Scene(*things, sides, background, _captions(rng, things, sides, background))


def _pick(rng: np.random.RandomState, options):
    return options[int(rng.random_sample() * len(options))]


def _places(rng: np.random.RandomState, first: int, second: int) -> list[tuple[int, int]]:
    """Centres of two shapes of these radii, along and across the line they stand on, clear of edge and each other."""
    free = range(SIDE - 2 * (MARGIN + first + second) - GAP + 1)
    start, end = sorted((_pick(rng, free), _pick(rng, free)))
    along = MARGIN + first + start, MARGIN + 2 * first + GAP + end + second
    middle = SIDE // 2 + _pick(rng, range(-10, 11))
    return [(place, middle + _pick(rng, range(-4, 5))) for place in along]


def _captions(rng: np.random.RandomState, things: list[Thing], sides: tuple, background: str) -> tuple[str, ...]:
    """One caption of each row of TEMPLATES, the rows in random order, each told from the side of either shape."""
    captions = []
    for row in rng.permutation(len(TEMPLATES)):
        one, other, side, opposite = _pick(rng, ((*things, *sides), (*things[::-1], *sides[::-1])))
        ways, here, _ = SIDES[side]
        _, there, beside = SIDES[opposite]
        words = {"a": _name(one), "b": _name(other), "A": _name(one, size=True), "B": _name(other, size=True)}
        words |= {"rel": _pick(rng, ways), "place": _pick(rng, BACKGROUNDS[background].phrases)}
        captions.append(_pick(rng, TEMPLATES[row]).format(**words, here=here, there=there, beside=beside))
    return tuple(captions)


def _name(thing: Thing, *, size: bool = False) -> str:
    words = " ".join(thing[:3] if size else thing[1:3])
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: (SIDE, SIDE, 3) uint8."""
    canvas = _backdrop(scene.background).copy()
    for thing in (scene.first, scene.second):
        inner, outer = _stencils(thing.shape, SIZES[thing.size], thing.tilt)
        half = len(inner) // 2
        column = canvas[:, thing.x - half : thing.x + half]
        _paint(column[thing.y - half + 2 : thing.y + half + 2], outer, (0, 0, 0), opacity=1)  # a shadow
        box = column[thing.y - half : thing.y + half]
        _paint(box, outer, (255, 255, 255))
        _paint(box, inner, COLOURS[thing.colour])
    return canvas.astype(np.uint8)


def _paint(canvas: np.ndarray, cover: np.ndarray, colour: tuple[int, ...], *, opacity: int = 4) -> None:
    """Blend `colour` into canvas (H, W, 3) in place; cover (H, W) counts samples hit, opacity counts quarters."""
    full, weight = 4 * FINE * FINE, opacity * cover[:, :, None]
    canvas[:] = (canvas * (full - weight) + np.array(colour) * weight + full // 2) // full


def _samples(side: int) -> np.ndarray:
    """Where `side` pixels are sampled along an axis, from their middle, in halves of a sample's width."""
    return 2 * np.arange(side * FINE, dtype=np.int64) + 1 - side * FINE


def _count(hit: np.ndarray) -> np.ndarray:
    """Samples hit in each pixel: (FINE * H, FINE * W) bool -> (H, W) int64."""
    return hit.reshape(len(hit) // FINE, FINE, -1, FINE).sum(axis=(1, 3), dtype=np.int64)


@cache
def _backdrop(name: str) -> np.ndarray:
    backdrop, down = BACKGROUNDS[name], np.arange(SIDE, dtype=np.int64)[:, None, None]
    fade = (np.array(backdrop.top) * (SIDE - 1 - down) + np.array(backdrop.bottom) * down) // (SIDE - 1)
    canvas = np.repeat(fade, SIDE, axis=1)
    unit = 2 * FINE  # to pixels from the top left corner
    x = y = _samples(SIDE) + unit * SIDE // 2
    for crest_x, crest_y, flatness, colour in backdrop.hills:
        ground = unit * crest_y + (x - unit * crest_x) ** 2 // (unit * flatness)
        _paint(canvas, _count(y[:, None] > ground), colour)
    for dot_x, dot_y in backdrop.dots:
        canvas[dot_y : dot_y + 2, dot_x : dot_x + 2] = (206, 210, 236)
    return canvas


@cache
def _stencils(shape: str, radius: int, tilt: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples hit in each pixel of a square around a shape: by the shape itself, and by the shape with its rim."""
    axis = _samples(2 * (radius + RIM + 2))
    # 60² + 11² = 61²: a turn by some ten degrees in whole numbers, which no rounding of a sine can upset
    cosine, sine = (60, 11 * tilt) if tilt else (61, 0)
    x, y = cosine * axis + sine * axis[:, None], cosine * axis[:, None] - sine * axis
    hit = _inside(shape, 100 * x, 100 * y, scale=61 * 2 * FINE * radius)
    grown, reach = hit.copy(), RIM * FINE
    for step in product(range(-reach, reach + 1), repeat=2):
        if step[0] ** 2 + step[1] ** 2 <= reach**2:
            grown |= np.roll(hit, step, axis=(0, 1))
    return _count(hit), _count(grown)


def _inside(shape: str, x: np.ndarray, y: np.ndarray, *, scale: int) -> np.ndarray:
    """Which points (x, y) lie in one of the shape's discs or polygons, these drawn `scale` times as large."""
    hit = np.zeros(x.shape, dtype=bool)
    for cx, cy, r in DISCS.get(shape, ()):
        hit |= (x - scale * cx) ** 2 + (y - scale * cy) ** 2 <= (scale * r) ** 2
    for corners in POLYGONS.get(shape, ()):
        odd = np.zeros(x.shape, dtype=bool)  # inside, an odd number of edges lie to the right
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            dx, dy, px, py = scale * (bx - ax), scale * (by - ay), x - scale * ax, y - scale * ay
            odd ^= ((py < 0) != (py < dy)) & ((dx * py > px * dy) == (dy > 0))
        hit |= odd
    return hit


def write_sample_set(folder: Path, *, scenes: int = 300) -> None:
    """Write Images/scene_000.png ... and captions.txt into `folder`, unless they are there already.

    The folder appears whole or not at all. One that holds anything else raises ValueError and stays as it is.
    """
    drawn = {f"scene_{k:03d}.png": scene for k, scene in enumerate(make_scenes(scenes))}
    table = _table(drawn)
    if _complete(folder, drawn, table):
        return
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} holds something other than the sample set: remove it or name another folder")
    try:
        with new_folder(folder) as draft:
            _write(draft, drawn, table)
    except OSError:
        if not _complete(folder, drawn, table):  # else another process was quicker, with the same bits
            raise


def _complete(folder: Path, drawn: dict[str, Scene], table: bytes) -> bool:
    captions, images = folder / "captions.txt", [folder / "Images" / name for name in drawn]
    return captions.is_file() and captions.read_bytes() == table and all(image.is_file() for image in images)


def _table(drawn: dict[str, Scene]) -> bytes:
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("image", "caption"))
    rows.writerows((name, caption) for name, scene in drawn.items() for caption in scene.captions)
    return text.getvalue().encode("utf-8")


def _write(folder: Path, drawn: dict[str, Scene], table: bytes) -> None:
    from PIL import Image

    (folder / "Images").mkdir(parents=True)
    for name, scene in drawn.items():
        Image.fromarray(render(scene)).save(folder / "Images" / name)
    (folder / "captions.txt").write_bytes(table)
