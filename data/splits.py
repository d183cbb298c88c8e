"""Which image is trained on, chosen on and tested on: by published lists, by what the files say, or at random."""

from collections.abc import Mapping, Sequence

import numpy as np

from data.format_detection import FLICKR8K_LISTS, Layout, official_lists
from data.image_lookup import base_name
from data.json_reader import KARPATHY_FORM, read_json
from data.records import decode_text

SPLITS = ("train", "val", "test")
AT_RANDOM = "train:test 4:1 by image"
MOST_VAL = 5000  # images of a val part that is drawn here: it is searched after every epoch


def random_split(images: Sequence[str], seed: int) -> dict[str, str]:
    """A fifth of the images is test; a tenth of the others is val."""
    shuffled = np.random.RandomState(seed).permutation(images)
    n_test = max(1, len(images) // 5)
    n_val = _val_size(len(images) - n_test)
    names = np.repeat(["test", "val", "train"], [n_test, n_val, max(0, len(images) - n_test - n_val)])
    return dict(zip(shuffled.tolist(), names.tolist(), strict=False))


def complete_split(split: Mapping[str, str], seed: int) -> tuple[dict[str, str], str]:
    """A split that has all three parts, and what was done to it; one without test gives its val for it."""
    split, said = dict(split), ""
    parts = set(split.values())
    if "test" not in parts and "val" in parts:
        split = {image: "test" if part == "val" else part for image, part in split.items()}
        said = ", its val is the test"
        parts = set(split.values())
    if "val" not in parts:
        train = sorted(image for image, part in split.items() if part == "train")
        chosen = np.random.RandomState(seed).permutation(train)[: _val_size(len(train))]
        split |= dict.fromkeys(chosen.tolist(), "val")
        said += f", val out of train (seed {seed})"
    return split, said


def _val_size(images):
    return min(MOST_VAL, max(1, images // 10))


def assign_split(
    names: Sequence[str], said: Mapping[str, str], layout: Layout, seed: int
) -> tuple[dict[str, str], str]:
    """The split of every image name that has one, and in words where it comes from.

    Published lists win over what the captions' files say (`said`), and these over chance.
    """
    published, source = _published_split(names, layout)
    if not published:
        published = said
        source = layout.captions.form if layout.captions.form == KARPATHY_FORM else "split as in the files"
    if "train" in published.values() and len(set(published.values())) > 1:
        split, added = complete_split(published, seed)
        return split, source + added
    return random_split(sorted(names), seed), f"{AT_RANDOM}, seed {seed}, val out of train"


def keep_duplicates_together(
    split_of_name: Mapping[str, str], found: Mapping[str, str], copies: Mapping[str, str], source: str
) -> tuple[dict[str, str], list[str]]:
    """The split of each file, and the files left out of it so that no photo is on two sides of it.

    `copies` names for a photo the first one with the same bytes. A random split takes copies along to the side of the
    first; a published one keeps its held-out parts whole, and a part before them goes without its copy.
    """
    split = {}
    for name, file in found.items():
        part = split_of_name.get(name)
        if part and (file not in split or SPLITS.index(part) > SPLITS.index(split[file])):
            split[file] = part
    if source.startswith(AT_RANDOM):
        return split | {copy: split[first] for copy, first in copies.items()}, []
    strictest = {}
    for file in {*copies, *copies.values()} & split.keys():
        first = copies.get(file, file)
        strictest[first] = max(strictest.get(first, 0), SPLITS.index(split[file]))
    left_out = [
        file
        for file in {*copies, *copies.values()} & split.keys()
        if SPLITS.index(split[file]) < strictest[copies.get(file, file)]
    ]
    for file in left_out:
        del split[file]
    return split, sorted(left_out)


def _published_split(names, layout):
    if lists := official_lists(layout.files):
        listed = {
            line.strip(): FLICKR8K_LISTS[name]
            for name, file in lists.items()
            for line in decode_text(layout.folder / file).split("\n")
        }
        return _by_plain_name(names, listed), "official split lists"
    if layout.captions.form != KARPATHY_FORM:
        for path in layout.karpathy:
            split = _by_plain_name(names, {image: split for image, _, split in read_json(path).rows})
            if len(split) > len(names) // 2:
                return split, KARPATHY_FORM
    return {}, ""


def _by_plain_name(names, listed):
    listed = {base_name(image): split for image, split in listed.items()}
    return {name: listed[base_name(name)] for name in names if base_name(name) in listed}
