"""The sample set: identical files on every machine, captions that fit one image only, no partly written folder."""

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


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_pixels_and_captions_match_the_recorded_hashes(folder):
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


def test_caption_file_contains_the_captions_of_the_scenes(folder):
    rows = [(row["image"], row["caption"]) for row in read_captions(folder)]
    assert rows == [(f"scene_{k:03d}.png", caption) for k, scene in enumerate(SCENES) for caption in scene.captions]
    assert any("," in caption for _, caption in rows), "one caption must contain a comma, which needs quoting"


def test_every_caption_names_both_shapes_with_their_colours():
    for scene in SCENES:
        assert len(set(scene.captions)) == 5
        for caption in scene.captions:
            named_shapes = re.findall(rf"({'|'.join(sample_set.COLOURS)}) ({'|'.join(sample_set.SHAPES)})", caption)
            assert sorted(named_shapes) == sorted(item[1:3] for item in (scene.first, scene.second)), caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|[{}]|  ", caption), caption


def test_every_caption_and_every_pair_of_shapes_is_unique():
    assert len({caption for scene in SCENES for caption in scene.captions}) == 5 * len(SCENES)
    pairs = {frozenset(item[1:3] for item in (scene.first, scene.second)) for scene in SCENES}
    assert len(pairs) == len(SCENES)


@pytest.mark.parametrize(("side", "opposite"), [("left", "right"), ("above", "below")])
def test_relation_in_the_caption_matches_the_positions(side, opposite):
    synonyms = {"above": "above|over", "below": "below|under"}
    checked = 0
    for scene in SCENES:
        objects = {" ".join(item[1:3]): item for item in (scene.first, scene.second)}
        pattern = "|".join(objects)
        for caption in scene.captions:
            for word in (side, opposite):
                relation = rf"(?:that is |to the )?(?:{synonyms.get(word, word)})(?: of)?"
                match = re.search(rf"({pattern}) {relation} an? (?:big |small )?({pattern})", caption)
                if match:
                    a, b = (objects[name] for name in match.groups())
                    first, second = (a.x, b.x) if side == "left" else (a.y, b.y)
                    assert (first < second) == (word == side), caption
                    checked += 1
    assert checked > 200


def test_left_and_right_always_mean_a_position():
    for scene in SCENES:
        directions = {word for caption in scene.captions for word in caption.split()} & {"left", "right"}
        assert not directions or scene.sides == ("left", "right")
    horizontal = [caption for scene in SCENES for caption in scene.captions if re.search("left|right", caption)]
    assert all(re.search(r"(to the )?(left|right) of an? |on (its|the) (left|right)\b", c) for c in horizontal)


def test_attributes_are_balanced():
    objects = [item for scene in SCENES for item in (scene.first, scene.second)]
    for position in range(3):  # size, colour, shape
        counts = Counter(item[position] for item in objects).values()
        assert max(counts) < 1.3 * min(counts)
    for counts in (Counter(scene.background for scene in SCENES), Counter(scene.sides for scene in SCENES)):
        assert max(counts.values()) < 1.3 * min(counts.values())


def test_shapes_keep_the_margin_and_do_not_touch():
    for scene in SCENES:
        background = sample_set._render_background(scene.background)
        rows, columns = np.nonzero((sample_set.render(scene) != background).any(axis=2))
        edge = sample_set.MARGIN - 2  # the shadow is two pixels lower
        assert min(rows.min(), columns.min()) >= edge and max(rows.max(), columns.max()) < sample_set.SIDE - edge
        radii = sum(sample_set.SIZES[item.size] for item in (scene.first, scene.second))
        gap = max(abs(scene.first.x - scene.second.x), abs(scene.first.y - scene.second.y)) - radii
        assert gap >= sample_set.MIN_GAP


@pytest.mark.parametrize("size", sample_set.SIZES)
@pytest.mark.parametrize("shape", sample_set.SHAPES)
def test_shapes_are_symmetric_under_a_horizontal_flip(shape, size):
    for tilt, flipped_tilt in ((0, 0), (-1, 1)):
        coverage, outlined = sample_set._shape_coverage(shape, sample_set.SIZES[size], tilt)
        flipped, _ = sample_set._shape_coverage(shape, sample_set.SIZES[size], flipped_tilt)
        assert np.abs(coverage - flipped[:, ::-1]).max() <= 1  # a sample exactly on an edge may count on either side
        assert not outlined[[0, -1]].any() and not outlined[:, [0, -1]].any(), "the shape extends beyond its square"


def test_a_smaller_set_contains_the_first_scenes():
    assert sample_set.make_scenes(30) == SCENES[:30]


def test_complete_folder_is_not_rewritten(folder):
    before = modification_times(folder)
    sample_set.write_sample_set(folder)
    assert modification_times(folder) == before


def test_interrupted_write_leaves_no_files_and_can_be_repeated(tmp_path, monkeypatch):
    folder, render, calls = tmp_path / "new" / "sample", sample_set.render, []

    def interrupt_seventh_call(scene):
        calls.append(scene)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return render(scene)

    monkeypatch.setattr(sample_set, "render", interrupt_seventh_call)
    with pytest.raises(KeyboardInterrupt):
        sample_set.write_sample_set(folder, scenes=10)
    assert not folder.exists() and not list(folder.parent.iterdir())
    sample_set.write_sample_set(folder, scenes=10)
    assert len(list((folder / "Images").iterdir())) == 10 and len(read_captions(folder)) == 50
    assert list(folder.parent.iterdir()) == [folder]


def test_folder_that_another_process_writes_at_the_same_time_is_used(tmp_path, monkeypatch):
    folder, write = tmp_path / "sample", sample_set._write_files

    def write_both(temporary, scene_of_image, caption_file):
        write(temporary, scene_of_image, caption_file)
        write(folder, scene_of_image, caption_file)

    monkeypatch.setattr(sample_set, "_write_files", write_both)
    sample_set.write_sample_set(folder, scenes=3)
    assert list(tmp_path.iterdir()) == [folder] and len(read_captions(folder)) == 15


@pytest.mark.parametrize("difference", ["missing image", "other captions", "other file"])
def test_folder_with_other_contents_raises_and_is_unchanged(tmp_path, difference):
    folder = tmp_path / "sample"
    if difference == "other file":
        folder.mkdir()
        (folder / "photo.jpg").write_bytes(b"photo")
    else:
        sample_set.write_sample_set(folder, scenes=3)
    if difference == "missing image":
        (folder / "Images" / "scene_001.png").unlink()
    if difference == "other captions":
        (folder / "captions.txt").write_text("image,caption\n", encoding="utf-8")
    before = modification_times(folder)
    with pytest.raises(ValueError, match="something other than the sample set"):
        sample_set.write_sample_set(folder, scenes=3)
    assert modification_times(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_empty_folder_is_filled(tmp_path):
    sample_set.write_sample_set(tmp_path, scenes=3)
    assert len(read_captions(tmp_path)) == 15


@pytest.mark.parametrize("scenes", [0, sample_set.MAX_SCENES + 1])
def test_number_of_scenes_out_of_range_raises(tmp_path, scenes):
    with pytest.raises(ValueError, match=f"scenes must be .*, got {scenes}$"):
        sample_set.write_sample_set(tmp_path / "sample", scenes=scenes)


def test_the_maximum_number_of_scenes_can_be_generated():
    assert len(sample_set.make_scenes(sample_set.MAX_SCENES)) == sample_set.MAX_SCENES
