"""Assign each image to train, val or test: by published lists, by the caption files, or at random."""

from collections.abc import Mapping, Sequence

import numpy as np

from data.format_detection import FLICKR8K_LISTS, Layout, official_lists
from data.image_lookup import base_name
from data.json_reader import KARPATHY_FORMAT, read_json
from data.records import decode_text

SPLITS = ("train", "val", "test")
RANDOM_SPLIT = "random split, train:test 4:1 by image"
MAX_VAL_IMAGES = 5000  # of a val split that is drawn here, because val is searched after every epoch


def random_split(images: Sequence[str], seed: int) -> dict[str, str]:
    """Return {image: split} with a fifth of the images in test and a tenth of the others in val."""
    shuffled = np.random.RandomState(seed).permutation(images)
    n_test = max(1, len(images) // 5)
    n_val = _val_size(len(images) - n_test)
    splits = np.repeat(["test", "val", "train"], [n_test, n_val, max(0, len(images) - n_test - n_val)])
    return dict(zip(shuffled.tolist(), splits.tolist(), strict=False))


def complete_split(split_of_image: Mapping[str, str], seed: int) -> tuple[dict[str, str], str]:
    """Return a split with train, val and test, and a description of the changes.

    Without a test split, val becomes test. Without a val split, a tenth of train becomes val.
    """
    split_of_image, changes = dict(split_of_image), ""
    splits = set(split_of_image.values())
    if "test" not in splits and "val" in splits:
        split_of_image = {image: "test" if split == "val" else split for image, split in split_of_image.items()}
        changes = ", its val is used as test"
        splits = set(split_of_image.values())
    if "val" not in splits:
        train = sorted(image for image, split in split_of_image.items() if split == "train")
        val = np.random.RandomState(seed).permutation(train)[: _val_size(len(train))]
        split_of_image |= dict.fromkeys(val.tolist(), "val")
        changes += f", val drawn from train (seed {seed})"
    return split_of_image, changes


def _val_size(n_images):
    return min(MAX_VAL_IMAGES, max(1, n_images // 10))


def assign_split(
    names: Sequence[str], file_splits: Mapping[str, str], layout: Layout, seed: int
) -> tuple[dict[str, str], str]:
    """Return {image name: split} for every image that has a split, and a description of its source.

    Published lists take precedence over the splits in the caption files (`file_splits`), and these over a random split.
    """
    split_of_name, source = _published_split(names, layout)
    if not split_of_name:
        split_of_name = file_splits
        is_karpathy = layout.captions.format == KARPATHY_FORMAT
        source = KARPATHY_FORMAT if is_karpathy else "split from the caption files"
    if "train" in split_of_name.values() and len(set(split_of_name.values())) > 1:
        split_of_name, changes = complete_split(split_of_name, seed)
        return split_of_name, source + changes
    return random_split(sorted(names), seed), f"{RANDOM_SPLIT}, seed {seed}, val drawn from train"


def keep_duplicates_together(
    split_of_name: Mapping[str, str], found: Mapping[str, str], duplicate_of: Mapping[str, str], source: str
) -> tuple[dict[str, str], list[str]]:
    """Return {file: split} and the files excluded from it, so that no photo is in two splits.

    `found` is {image name: file}, `duplicate_of` {file: first file with the same bytes}. In a random split, duplicates
    join the split of the first. A published val or test stays complete; a duplicate in an earlier split is excluded.
    """
    split_of_file = {}
    for name, file in found.items():
        split = split_of_name.get(name)
        if split and (file not in split_of_file or SPLITS.index(split) > SPLITS.index(split_of_file[file])):
            split_of_file[file] = split
    if source.startswith(RANDOM_SPLIT):
        return split_of_file | {file: split_of_file[first] for file, first in duplicate_of.items()}, []
    last_split = {}  # of each first file: the last of train, val and test among its duplicates
    for file in {*duplicate_of, *duplicate_of.values()} & split_of_file.keys():
        first = duplicate_of.get(file, file)
        last_split[first] = max(last_split.get(first, 0), SPLITS.index(split_of_file[file]))
    excluded = [
        file
        for file in {*duplicate_of, *duplicate_of.values()} & split_of_file.keys()
        if SPLITS.index(split_of_file[file]) < last_split[duplicate_of.get(file, file)]
    ]
    for file in excluded:
        del split_of_file[file]
    return split_of_file, sorted(excluded)


def _published_split(names, layout):
    """Return {image name: split} from Flickr8k's lists or one of Karpathy's files, and its source; else ({}, "")."""
    if lists := official_lists(layout.files):
        listed = {
            line.strip(): FLICKR8K_LISTS[name]
            for name, file in lists.items()
            for line in decode_text(layout.folder / file).split("\n")
        }
        return _match_base_names(names, listed), "official split lists"
    if layout.captions.format != KARPATHY_FORMAT:
        for path in layout.karpathy_files:
            split = _match_base_names(names, {image: split for image, _, split in read_json(path).rows})
            if len(split) > len(names) // 2:
                return split, KARPATHY_FORMAT
    return {}, ""


def _match_base_names(names, listed):
    listed = {base_name(image): split for image, split in listed.items()}
    return {name: listed[base_name(name)] for name in names if base_name(name) in listed}
