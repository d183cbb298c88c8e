"""The sample set: the same bits everywhere, captions that fit one picture, and no half-written folder."""

import csv
import hashlib
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data import sample_set

SCENES = sample_set.make_scenes(300)
PIXELS = "c6031e8df723427ce1f1b14af67f6ed8e6a8857cfa7740cf00b4d7e813b0e7f2"
CAPTIONS = "2542e1ea0177ed2b01131a8b54bf9a4074c0c3e2c2bdb6c75cd2324d86e78ab2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sample"
    sample_set.write_sample_set(folder)
    return folder


def read_captions(folder):
    with open(folder / "captions.txt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def state(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_decoded_pixels_and_captions_are_pinned(folder):
    pixels = hashlib.sha256()
    for path in sorted((folder / "Images").iterdir()):
        pixels.update(np.asarray(Image.open(path)).tobytes())
    assert pixels.hexdigest() == PIXELS
    assert hashlib.sha256((folder / "captions.txt").read_bytes()).hexdigest() == CAPTIONS


def test_images_are_small_and_rgb(folder):
    paths = sorted(path.name for path in (folder / "Images").iterdir())
    assert paths == [f"scene_{k:03d}.png" for k in range(len(SCENES))]
    with Image.open(folder / "Images" / paths[0]) as image:
        assert (image.size, image.mode) == ((sample_set.SIDE, sample_set.SIDE), "RGB")


def test_caption_file_reads_back_as_the_scenes_captions(folder):
    rows = [(row["image"], row["caption"]) for row in read_captions(folder)]
    assert rows == [(f"scene_{k:03d}.png", caption) for k, scene in enumerate(SCENES) for caption in scene.captions]
    assert any("," in caption for _, caption in rows), "a quoted field is part of the format"


def test_every_caption_names_both_shapes_with_their_colours():
    for scene in SCENES:
        assert len(set(scene.captions)) == 5
        for caption in scene.captions:
            has_flag = re.findall(rf"({'|'.join(sample_set.COLOURS)}) ({'|'.join(sample_set.SHAPES)})", caption)
            assert sorted(has_flag) == sorted(thing[1:3] for thing in (scene.first, scene.second)), caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|[{}]|  ", caption), caption


def test_no_caption_and_no_pair_of_shapes_belongs_to_two_scenes():
    assert len({caption for scene in SCENES for caption in scene.captions}) == 5 * len(SCENES)
    pairs = {frozenset(thing[1:3] for thing in (scene.first, scene.second)) for scene in SCENES}
    assert len(pairs) == len(SCENES)


@pytest.mark.parametrize(("one", "other"), [("left", "right"), ("above", "below")])
def test_relation_in_the_caption_is_the_one_in_the_picture(one, other):
    synonyms = {"above": "above|over", "below": "below|under"}
    checked = 0
    for scene in SCENES:
        things = {" ".join(thing[1:3]): thing for thing in (scene.first, scene.second)}
        pattern = "|".join(things)
        for caption in scene.captions:
            for side in (one, other):
                words = rf"(?:that is |to the )?(?:{synonyms.get(side, side)})(?: of)?"
                found = re.search(rf"({pattern}) {words} an? (?:big |small )?({pattern})", caption)
                if found:
                    a, b = (things[name] for name in found.groups())
                    along = (a.x, b.x) if one == "left" else (a.y, b.y)
                    assert (along[0] < along[1]) == (side == one), caption
                    checked += 1
    assert checked > 200


def test_left_and_right_mean_a_place_only():
    for scene in SCENES:
        has_flag = {word for caption in scene.captions for word in caption.split()} & {"left", "right"}
        assert not has_flag or scene.sides == ("left", "right")
    crossing = [caption for scene in SCENES for caption in scene.captions if re.search("left|right", caption)]
    assert all(re.search(r"(to the )?(left|right) of an? |on (its|the) (left|right)\b", c) for c in crossing)


def test_attributes_are_balanced():
    things = [thing for scene in SCENES for thing in (scene.first, scene.second)]
    for position in range(3):  # size, colour, shape
        counts = Counter(thing[position] for thing in things).values()
        assert max(counts) < 1.3 * min(counts)
    for counts in (Counter(scene.background for scene in SCENES), Counter(scene.sides for scene in SCENES)):
        assert max(counts.values()) < 1.3 * min(counts.values())


def test_shapes_lie_inside_the_margin_and_apart():
    for scene in SCENES:
        bare = sample_set._backdrop(scene.background)
        rows, columns = np.nonzero((sample_set.render(scene) != bare).any(axis=2))
        edge = sample_set.MARGIN - 2  # the shadow falls two pixels lower
        assert min(rows.min(), columns.min()) >= edge and max(rows.max(), columns.max()) < sample_set.SIDE - edge
        reach = sum(sample_set.SIZES[thing.size] for thing in (scene.first, scene.second))
        gap = max(abs(scene.first.x - scene.second.x), abs(scene.first.y - scene.second.y)) - reach
        assert gap >= sample_set.GAP


@pytest.mark.parametrize("size", sample_set.SIZES)
@pytest.mark.parametrize("shape", sample_set.SHAPES)
def test_a_mirrored_shape_is_the_shape(shape, size):
    for upright, mirrored in ((0, 0), (-1, 1)):
        cover, rim = sample_set._stencils(shape, sample_set.SIZES[size], upright)
        other, _ = sample_set._stencils(shape, sample_set.SIZES[size], mirrored)
        assert np.abs(cover - other[:, ::-1]).max() <= 1  # a sample on the very edge may fall to either side
        assert not rim[[0, -1]].any() and not rim[:, [0, -1]].any(), "cut off by its square"


def test_fewer_scenes_are_the_first_ones():
    assert sample_set.make_scenes(30) == SCENES[:30]


def test_complete_folder_is_left_alone(folder):
    before = state(folder)
    sample_set.write_sample_set(folder)
    assert state(folder) == before


def test_interrupted_write_leaves_nothing_behind_and_can_be_repeated(tmp_path, monkeypatch):
    folder, render, calls = tmp_path / "new" / "sample", sample_set.render, []

    def stop_at_the_seventh(scene):
        calls.append(scene)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return render(scene)

    monkeypatch.setattr(sample_set, "render", stop_at_the_seventh)
    with pytest.raises(KeyboardInterrupt):
        sample_set.write_sample_set(folder, scenes=10)
    assert not folder.exists() and not list(folder.parent.iterdir())
    sample_set.write_sample_set(folder, scenes=10)
    assert len(list((folder / "Images").iterdir())) == 10 and len(read_captions(folder)) == 50
    assert list(folder.parent.iterdir()) == [folder]


def test_folder_written_meanwhile_by_another_process_is_kept(tmp_path, monkeypatch):
    folder, write = tmp_path / "sample", sample_set._write

    def write_after_another(draft, drawn, table):
        write(draft, drawn, table)
        write(folder, drawn, table)

    monkeypatch.setattr(sample_set, "_write", write_after_another)
    sample_set.write_sample_set(folder, scenes=3)
    assert list(tmp_path.iterdir()) == [folder] and len(read_captions(folder)) == 15


@pytest.mark.parametrize("spoil", ["missing image", "other captions", "foreign file"])
def test_folder_with_something_else_is_named_and_kept(tmp_path, spoil):
    folder = tmp_path / "sample"
    if spoil == "foreign file":
        folder.mkdir()
        (folder / "photo.jpg").write_bytes(b"mine")
    else:
        sample_set.write_sample_set(folder, scenes=3)
    if spoil == "missing image":
        (folder / "Images" / "scene_001.png").unlink()
    if spoil == "other captions":
        (folder / "captions.txt").write_text("image,caption\n", encoding="utf-8")
    before = state(folder)
    with pytest.raises(ValueError, match="something other than the sample set"):
        sample_set.write_sample_set(folder, scenes=3)
    assert state(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_empty_folder_is_filled(tmp_path):
    sample_set.write_sample_set(tmp_path, scenes=3)
    assert len(read_captions(tmp_path)) == 15


@pytest.mark.parametrize("scenes", [0, sample_set.MOST + 1])
def test_impossible_number_of_scenes_is_told(tmp_path, scenes):
    with pytest.raises(ValueError, match=f"scenes={scenes}"):
        sample_set.write_sample_set(tmp_path / "sample", scenes=scenes)


def test_most_scenes_can_be_made():
    assert len(sample_set.make_scenes(sample_set.MOST)) == sample_set.MOST
