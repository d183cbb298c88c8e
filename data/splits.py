"""Assign each image to train, val or test: by published lists, by the caption files, or at random."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.coco_json import COCO_FORMAT, KARPATHY_FORMAT
from data.format_detection import FLICKR8K_LISTS, Layout, official_lists
from data.image_lookup import base_name
from data.json_reader import read_json
from data.records import decode_text

SPLITS = ("train", "val", "test")
RANDOM_SPLIT = "random split, train:test 4:1 by image"
MAX_VAL_IMAGES = 5000  # of a val split that is drawn here, because val is searched after every epoch


def random_split(images: Sequence[str], seed: int) -> dict[str, str]:
    """Return {image: split} with a fifth of the images in test and a tenth of the others in val."""
    return _cut(_shuffle(images, np.random.RandomState(seed)))


def _shuffle(images, rng):
    # Not permutation(images): NumPy would reserve the length of the longest name for each of them.
    return [images[index] for index in rng.permutation(len(images))]


def _cut(images):
    """Return {image: split}: the first images are test, the next ones val."""
    n_test = max(1, len(images) // 5)
    n_val = _val_size(len(images) - n_test)
    splits = np.repeat(["test", "val", "train"], [n_test, n_val, max(0, len(images) - n_test - n_val)])
    return dict(zip(images, splits.tolist(), strict=False))


def stratified_split(class_of: Mapping[str, str], seed: int) -> dict[str, str]:
    """Return {image: split} with the sizes of `random_split`, drawn so that each class has about the same shares.

    class_of: image -> class. Each class is shuffled and spread evenly over the order in which the splits are cut.
    """
    return _cut(_stratified_order(class_of, seed))


def _stratified_order(class_of, seed):
    rng, images_of = np.random.RandomState(seed), {}
    for image in sorted(class_of):
        images_of.setdefault(class_of[image], []).append(image)
    keys = {}
    for label in sorted(images_of):
        images, offset = _shuffle(images_of[label], rng), rng.random_sample()
        keys |= {image: (offset + position) / len(images) for position, image in enumerate(images)}
    return sorted(keys, key=lambda image: (keys[image], image))


def complete_split(
    split_of_image: Mapping[str, str], seed: int, class_of: Mapping[str, str] | None = None
) -> tuple[dict[str, str], str]:
    """Return a split with train, val and test, and a description of the changes.

    Without a test split, val becomes test. Without a val split, a tenth of train becomes val; with class_of
    (image -> class), about a tenth of each class.
    """
    split_of_image, changes = dict(split_of_image), ""
    splits = set(split_of_image.values())
    if "test" not in splits and "val" in splits:
        split_of_image = {image: "test" if split == "val" else split for image, split in split_of_image.items()}
        changes = ", its val is used as test"
        splits = set(split_of_image.values())
    if "val" not in splits:
        train = sorted(image for image, split in split_of_image.items() if split == "train")
        if class_of:
            order = _stratified_order({image: class_of[image] for image in train}, seed)
        else:
            order = _shuffle(train, np.random.RandomState(seed))
        split_of_image |= dict.fromkeys(order[: _val_size(len(train))], "val")
        changes += f", val drawn from train (seed {seed})"
    return split_of_image, changes


def _val_size(n_images):
    return min(MAX_VAL_IMAGES, max(1, n_images // 10))


class SplitNames(NamedTuple):
    """The split of every image name that has one, where it is from, and the splits of which no photo is there."""

    split_of_name: dict[str, str]
    source: str  # a description for the terminal
    absent: list[str]  # not downloaded


def assign_split(
    names: Sequence[str],
    file_splits: Mapping[str, str],
    layout: Layout,
    seed: int,
    *,
    found: Collection[str] | None = None,
    how: str = "auto",
    needed: str | None = None,
) -> SplitNames:
    """Return the split of every image name.

    Published lists take precedence over the splits in the caption files (`file_splits`), and these over a random split.
    how: "random" ignores both. found: the names with a photo; a split without any was not downloaded, and the others
    are split again, unless only the split `needed` will be used.
    """
    if how == "random":
        has_split = bool(_own_split(names, file_splits, layout)[0])
        return _random(names, layout, seed, "; the split of the data set is not used" if has_split else "", [])
    split_of_name, source = _own_split(names, file_splits, layout)
    if not split_of_name:
        return _random(names, layout, seed, "", [])
    present = {split_of_name.get(name) for name in found} if found is not None else set(split_of_name.values())
    absent = [split for split in SPLITS if split in set(split_of_name.values()) - present]
    whole, changes = _complete(split_of_name, seed, layout)
    if whole and (not absent or needed is not None):
        return SplitNames(whole, source + changes, absent)
    parts, gone = " and ".join(sorted(present - {None})), " and ".join(absent)
    remark = f", of {parts} only: no photo of {gone} is here (not downloaded)" if absent else ""
    rest = {name: split for name, split in split_of_name.items() if split not in absent}
    completed, changes = _complete(rest, seed, layout)
    if completed:
        return SplitNames(completed, source + remark + changes, absent)
    return _random(rest if absent else names, layout, seed, remark, absent)


def _complete(split_of_name, seed, layout):
    """Return the split with train, val and test, and the changes; ({}, "") if there is no train or nothing else."""
    if not _is_split(split_of_name):
        return {}, ""
    return complete_split(split_of_name, seed, layout.captions.classes)


def has_own_split(layout: Layout) -> bool:
    """Return whether the caption files name train and another split themselves; COCO's own is not the published one."""
    return layout.captions.format != COCO_FORMAT and _is_split(
        {split: split for _, _, split in layout.captions.rows if split}
    )


def _own_split(names, file_splits, layout):
    split_of_name, source = _published_split(names, layout)
    if split_of_name:
        return split_of_name, source
    is_karpathy = layout.captions.format == KARPATHY_FORMAT
    return dict(file_splits), KARPATHY_FORMAT if is_karpathy else "split from the caption files"


def _is_split(split_of_name):
    return "train" in split_of_name.values() and len(set(split_of_name.values())) > 1


def _random(names, layout, seed, remark, absent):
    classes = layout.captions.classes
    if classes:
        source = f"{RANDOM_SPLIT}, stratified by class, seed {seed}, val drawn from train{remark}"
        return SplitNames(stratified_split(classes, seed), source, absent)
    return SplitNames(
        random_split(sorted(names), seed), f"{RANDOM_SPLIT}, seed {seed}, val drawn from train{remark}", absent
    )


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
