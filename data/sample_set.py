"""Synthetic sample data set, generated locally, so that the program can be tried without a download.

A scene shows two coloured shapes on one of six backgrounds, and has five captions. Rendering uses integer arithmetic
and one stable random stream, so the files are identical on every machine.
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
SIDE = 128  # pixels, width and height of an image
MARGIN = 12  # pixels without shapes along each edge; a crop to 85 % of the area removes at most 10
MIN_GAP = 6  # pixels between two shapes
OUTLINE = 2  # pixels, white, so that yellow is visible on sand and black at night
SUPERSAMPLING = 4  # samples per pixel along each axis, for antialiasing
MAX_SCENES = 1000  # file names have three digits, and there are 1128 different pairs of shapes

SIZES = {"big": 21, "small": 13}  # radius in pixels
COLOURS = {"red": (222, 45, 48), "orange": (250, 138, 28), "yellow": (252, 212, 48), "green": (38, 160, 84)}
COLOURS |= {"blue": (40, 104, 226), "purple": (124, 62, 176), "pink": (250, 142, 192), "black": (38, 38, 44)}


def _box(x: int, y: int) -> tuple:
    return ((-x, -y), (x, -y), (x, y), (-x, y))


# A shape is the union of its polygons and discs (x, y, radius), in hundredths of its radius, with y pointing down.
# Each shape is symmetric under a horizontal flip, and extends to at most 105 when tilted.
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


class Background(NamedTuple):
    """A vertical gradient from `top` to `bottom`, hills (crest x, crest y, flatness, colour) and pale dots (x, y)."""

    phrases: tuple[str, ...]
    top: tuple[int, ...]
    bottom: tuple[int, ...]
    hills: tuple = ()
    dots: tuple = ()


STARS = ((10, 14), (31, 6), (52, 19), (77, 8), (99, 16), (119, 7), (7, 47), (122, 41), (64, 55), (20, 88), (110, 84))
DARK_HILL, DUSKY_HILL = ((84, 112, 900, (16, 18, 44)),), ((30, 98, 500, (112, 62, 98)),)
DUNES = ((64, 46, 10**6, (66, 164, 206)), (30, 66, 800, (240, 214, 156)))  # the first is the sea, almost flat
HILLS = ((100, 44, 160, (164, 212, 132)), (24, 58, 300, (128, 192, 100)))
BACKGROUNDS = {
    "white": Background(("on a white background", "on white paper"), (254, 254, 254), (244, 244, 246)),
    "grey": Background(("on a grey background", "against a grey wall"), (168, 170, 175), (140, 142, 148)),
    "night": Background(("against the night sky", "at night"), (14, 18, 52), (44, 50, 104), DARK_HILL, STARS),
    "beach": Background(("on the beach", "by the sea"), (176, 222, 246), (222, 242, 250), DUNES),
    "meadow": Background(("in a meadow", "on the grass"), (190, 228, 250), (230, 244, 250), HILLS),
    "sunset": Background(("at sunset", "in front of a sunset"), (128, 88, 150), (255, 176, 112), DUSKY_HILL),
}

# For a shape on this side: its relation to the other shape; its place in the image; its place as seen from the other.
SIDES = {
    "left": (("left of", "to the left of"), "on the left", "on its left"),
    "right": (("right of", "to the right of"), "on the right", "on its right"),
    "above": (("above", "over"), "at the top", "above it"),
    "below": (("below", "under"), "at the bottom", "below it"),
}
# Each row gives one caption. a, b: the shapes without their size; A, B: with it.
TEMPLATES = (
    ("{a} {rel} {b}", "there is {a} {rel} {b}", "here is {a} {rel} {b}"),
    ("{A} {rel} {B}", "a picture of {A} {rel} {B}", "{A} that is {rel} {B}"),
    ("{a} {rel} {b} {place}", "{place}, {a} {rel} {b}", "{place} there is {A} {rel} {B}"),
    ("{a} and {b} {place}", "{A} together with {B} {place}", "two shapes {place}, {a} and {b}"),
    ("{a} with {b} {beside}", "{a} {here}, {b} {there}", "{here} there is {A}, {there} {B}"),
)


class SceneObject(NamedTuple):
    """One shape in a scene: centre (x, y) in pixels; tilt -1, 0 or 1."""

    size: str
    colour: str
    shape: str
    x: int
    y: int
    tilt: int


class Scene(NamedTuple):
    """Two shapes with captions; `first` is on side sides[0], "left" or "above", and `second` on sides[1]."""

    first: SceneObject
    second: SceneObject
    sides: tuple[str, str]
    background: str
    captions: tuple[str, ...]


def make_scenes(count: int) -> list[Scene]:
    """Generate the first `count` scenes, balanced over their attributes.

    Each round uses every combination of colour and shape once, and every combination of background and sizes once.
    Raises ValueError unless `count` is from 1 to MAX_SCENES.
    """
    if not 1 <= count <= MAX_SCENES:
        raise ValueError(f"scenes must be from 1 to {MAX_SCENES}, got {count}")
    rng = np.random.RandomState(SEED)  # unlike default_rng, its stream never changes between NumPy versions
    kinds, settings = list(product(COLOURS, SHAPES)), list(product(BACKGROUNDS, SIZES, SIZES))
    scenes, used_pairs = [], set()
    while len(scenes) < count:
        pairs, order, axes = (rng.permutation(n) for n in (len(kinds), len(settings), len(settings)))
        for pair, setting, is_horizontal in zip(pairs.reshape(-1, 2), order, axes % 2, strict=True):
            if frozenset(pair) not in used_pairs:  # a caption that only names the two shapes must fit one image only
                used_pairs.add(frozenset(pair))
                scenes.append(_make_scene(rng, [kinds[k] for k in pair], bool(is_horizontal), *settings[setting]))
    return scenes[:count]


def _make_scene(rng: np.random.RandomState, kinds: list, is_horizontal: bool, background: str, *sizes: str) -> Scene:
    sides = ("left", "right") if is_horizontal else ("above", "below")
    centres = _choose_centres(rng, *(SIZES[size] + OUTLINE for size in sizes))
    objects = [
        SceneObject(size, *kind, *(centre if is_horizontal else centre[::-1]), tilt=_choose(rng, (-1, 0, 1)))
        for size, kind, centre in zip(sizes, kinds, centres, strict=True)
    ]
    return Scene(*objects, sides, background, _make_captions(rng, objects, sides, background))


def _choose(rng: np.random.RandomState, options):
    return options[int(rng.random_sample() * len(options))]


def _choose_centres(rng: np.random.RandomState, radius: int, other_radius: int) -> list[tuple[int, int]]:
    """Choose the centres of two shapes, as coordinates along and across their common axis.

    The shapes are at least MARGIN away from the edges of the image and MIN_GAP from each other.
    """
    free = range(SIDE - 2 * (MARGIN + radius + other_radius) - MIN_GAP + 1)
    start, end = sorted((_choose(rng, free), _choose(rng, free)))
    along = MARGIN + radius + start, MARGIN + 2 * radius + MIN_GAP + end + other_radius
    middle = SIDE // 2 + _choose(rng, range(-10, 11))
    return [(position, middle + _choose(rng, range(-4, 5))) for position in along]


def _make_captions(
    rng: np.random.RandomState, objects: list[SceneObject], sides: tuple, background: str
) -> tuple[str, ...]:
    """Fill one template of each row of TEMPLATES, in random row order, starting from either shape."""
    captions = []
    for row in rng.permutation(len(TEMPLATES)):
        subject, other, side, opposite = _choose(rng, ((*objects, *sides), (*objects[::-1], *sides[::-1])))
        relations, here, _ = SIDES[side]
        _, there, beside = SIDES[opposite]
        words = {"a": _name(subject), "b": _name(other), "A": _name(subject, size=True), "B": _name(other, size=True)}
        words |= {"rel": _choose(rng, relations), "place": _choose(rng, BACKGROUNDS[background].phrases)}
        captions.append(_choose(rng, TEMPLATES[row]).format(**words, here=here, there=there, beside=beside))
    return tuple(captions)


def _name(item: SceneObject, *, size: bool = False) -> str:
    words = " ".join(item[:3] if size else item[1:3])
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def render(scene: Scene) -> np.ndarray:
    """Render a scene as (SIDE, SIDE, 3) uint8."""
    canvas = _render_background(scene.background).copy()
    for item in (scene.first, scene.second):
        inner, outer = _shape_coverage(item.shape, SIZES[item.size], item.tilt)
        half = len(inner) // 2
        column = canvas[:, item.x - half : item.x + half]
        _blend(column[item.y - half + 2 : item.y + half + 2], outer, (0, 0, 0), opacity=1)  # shadow
        box = column[item.y - half : item.y + half]
        _blend(box, outer, (255, 255, 255))
        _blend(box, inner, COLOURS[item.colour])
    return canvas.astype(np.uint8)


def _blend(canvas: np.ndarray, coverage: np.ndarray, colour: tuple[int, ...], *, opacity: int = 4) -> None:
    """Blend `colour` into canvas (H, W, 3) in place; coverage (H, W) counts samples, opacity counts quarters."""
    full, weight = 4 * SUPERSAMPLING * SUPERSAMPLING, opacity * coverage[:, :, None]
    canvas[:] = (canvas * (full - weight) + np.array(colour) * weight + full // 2) // full


def _sample_positions(side: int) -> np.ndarray:
    """Return the sample positions of `side` pixels along an axis, centred at 0, in units of half a sample."""
    return 2 * np.arange(side * SUPERSAMPLING, dtype=np.int64) + 1 - side * SUPERSAMPLING


def _count_samples(mask: np.ndarray) -> np.ndarray:
    """Count the True samples of each pixel: (SUPERSAMPLING * H, SUPERSAMPLING * W) bool -> (H, W) int64."""
    blocks = mask.reshape(len(mask) // SUPERSAMPLING, SUPERSAMPLING, -1, SUPERSAMPLING)
    return blocks.sum(axis=(1, 3), dtype=np.int64)


@cache
def _render_background(name: str) -> np.ndarray:
    background, row = BACKGROUNDS[name], np.arange(SIDE, dtype=np.int64)[:, None, None]
    gradient = (np.array(background.top) * (SIDE - 1 - row) + np.array(background.bottom) * row) // (SIDE - 1)
    canvas = np.repeat(gradient, SIDE, axis=1)
    unit = 2 * SUPERSAMPLING  # sample positions per pixel
    x = y = _sample_positions(SIDE) + unit * SIDE // 2  # from the top left corner
    for crest_x, crest_y, flatness, colour in background.hills:
        ground = unit * crest_y + (x - unit * crest_x) ** 2 // (unit * flatness)
        _blend(canvas, _count_samples(y[:, None] > ground), colour)
    for dot_x, dot_y in background.dots:
        canvas[dot_y : dot_y + 2, dot_x : dot_x + 2] = (206, 210, 236)
    return canvas


@cache
def _shape_coverage(shape: str, radius: int, tilt: int) -> tuple[np.ndarray, np.ndarray]:
    """Count, for each pixel of a square around a shape, its samples in the shape, and in the shape with outline."""
    axis = _sample_positions(2 * (radius + OUTLINE + 2))
    # 60² + 11² = 61²: a rotation by about ten degrees in integers, free of rounding errors
    cosine, sine = (60, 11 * tilt) if tilt else (61, 0)
    x, y = cosine * axis + sine * axis[:, None], cosine * axis[:, None] - sine * axis
    mask = _shape_mask(shape, 100 * x, 100 * y, scale=61 * 2 * SUPERSAMPLING * radius)
    outlined, distance = mask.copy(), OUTLINE * SUPERSAMPLING
    for shift in product(range(-distance, distance + 1), repeat=2):
        if shift[0] ** 2 + shift[1] ** 2 <= distance**2:
            outlined |= np.roll(mask, shift, axis=(0, 1))
    return _count_samples(mask), _count_samples(outlined)


def _shape_mask(shape: str, x: np.ndarray, y: np.ndarray, *, scale: int) -> np.ndarray:
    """Return which points (x, y) are inside one of the shape's discs or polygons, scaled by `scale`."""
    mask = np.zeros(x.shape, dtype=bool)
    for cx, cy, r in DISCS.get(shape, ()):
        mask |= (x - scale * cx) ** 2 + (y - scale * cy) ** 2 <= (scale * r) ** 2
    for corners in POLYGONS.get(shape, ()):
        inside = np.zeros(x.shape, dtype=bool)  # even-odd rule: toggled by each edge to the right of the point
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            dx, dy, px, py = scale * (bx - ax), scale * (by - ay), x - scale * ax, y - scale * ay
            inside ^= ((py < 0) != (py < dy)) & ((dx * py > px * dy) == (dy > 0))
        mask |= inside
    return mask


def write_sample_set(folder: Path, *, scenes: int = 300) -> None:
    """Write Images/scene_000.png ... and captions.txt into `folder`, unless they already exist.

    The folder is created atomically. Raises ValueError if it contains anything else, and leaves it unchanged.
    """
    scene_of_image = {f"scene_{k:03d}.png": scene for k, scene in enumerate(make_scenes(scenes))}
    caption_file = _format_captions(scene_of_image)
    if _is_complete(folder, scene_of_image, caption_file):
        return
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} contains something other than the sample set: delete it or choose another folder")
    try:
        with new_folder(folder) as temporary:
            _write_files(temporary, scene_of_image, caption_file)
    except OSError:
        # Another process may have written the same files in the meantime.
        if not _is_complete(folder, scene_of_image, caption_file):
            raise


def _is_complete(folder: Path, scene_of_image: dict[str, Scene], caption_file: bytes) -> bool:
    captions, images = folder / "captions.txt", [folder / "Images" / name for name in scene_of_image]
    return captions.is_file() and captions.read_bytes() == caption_file and all(image.is_file() for image in images)


def _format_captions(scene_of_image: dict[str, Scene]) -> bytes:
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("image", "caption"))
    rows.writerows((name, caption) for name, scene in scene_of_image.items() for caption in scene.captions)
    return text.getvalue().encode("utf-8")


def _write_files(folder: Path, scene_of_image: dict[str, Scene], caption_file: bytes) -> None:
    from PIL import Image

    (folder / "Images").mkdir(parents=True)
    for name, scene in scene_of_image.items():
        Image.fromarray(render(scene)).save(folder / "Images" / name)
    (folder / "captions.txt").write_bytes(caption_file)
