"""Read a folder with one folder of photos per class, `pets/golden_retriever/1.jpg`, as a data set with captions."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.class_names import class_names, read_class_names
from data.class_prompts import prompts
from data.records import IMAGE_NAME, CaptionRecords, parse_split
from runtime.text import display_text, format_examples

MAX_LOOSE_FRACTION = 0.05  # of the photos: outside the class folders, and not used
MIN_PHOTOS_PER_CLASS = 2  # on average; a folder for each photo is no class


class ClassFolders(NamedTuple):
    """Photos in folders named after their class."""

    labels: list[str]  # names of the K classes, sorted
    class_of: dict[str, str]  # photo, relative to the data set's folder -> its label
    split_of: dict[str, str]  # photo -> train, val or test; {} without split folders
    split_folders: list[str]  # relative to the data set's folder; [] if there are none
    notes: list[str]  # lines for the terminal


def read_class_folders(folder: Path, files: Sequence[str]) -> CaptionRecords:
    """Read class folders: the captions of a photo are its class name in each prompt template.

    Raises ValueError with the reason if the folders are not classes without doubt; see `find_class_folders`.
    """
    classes = find_class_folders(folder, files)
    per_class = len(classes.class_of) / len(classes.labels)
    if per_class < MIN_PHOTOS_PER_CLASS:
        raise ValueError(f"{len(classes.labels):,} folders with {per_class:.1f} photos each are no classes")
    captions = {label: prompts(label) for label in classes.labels}
    example = captions[classes.labels[0]][1]
    note = (
        f"no caption file: read as {len(classes.labels):,} classes by folder name: {format_examples(classes.labels)}; "
        f"captions are made from the names, such as {display_text(example)!r}"
    )
    records = CaptionRecords(f"{len(classes.labels):,} class folders", [folder], notes=[note, *classes.notes])
    records.classes = classes.class_of
    records.rows.extend(
        (photo, caption, classes.split_of.get(photo))
        for photo, label in classes.class_of.items()
        for caption in captions[label]
    )
    return records


def find_class_folders(folder: Path, files: Sequence[str]) -> ClassFolders:
    """Find the class folders among `files` of a folder, below split folders (train/, val/, test/) if there are any.

    Folders that contain a single folder are passed through. Raises ValueError with the reason if there are fewer than
    two classes, if split and class folders are mixed, if many photos are outside the class folders, and for names that
    are no class names (`class_names`).
    """
    photos = sorted(file for file in files if IMAGE_NAME.fullmatch(file))
    prefix, folders, loose = _descend("", photos)
    if splits := _split_folders(prefix, folders):
        levels = {name: _descend(f"{prefix}{name}/", folders[name]) for name in splits}
        for inner, own, outside in levels.values():
            loose += outside
            if not own:
                raise ValueError(f"{inner}: a split folder with photos, but without class folders")
        members = [
            (inner, name, own, splits[split])
            for split, (inner, class_photos, _) in levels.items()
            for name, own in class_photos.items()
        ]
    else:
        members = [(prefix, name, own, None) for name, own in folders.items()]
    _check_members(members, loose, len(photos), folder)
    names = sorted({name for _, name, _, _ in members})
    known, source = read_class_names(folder, files, names)
    if not known:
        _check_depth(members)
    label_of = class_names(names, known)
    class_of = {photo: label_of[name] for _, name, own, _ in members for photo in own}
    split_of = {photo: split for _, _, own, split in members for photo in own if split}
    notes = [f"class names from {source}"] if source else []
    train = {name for _, name, _, split in members if split == "train"}
    if splits and (untrained := [label_of[name] for name in names if name not in train]):
        notes.append(f"classes without training photos: {format_examples(untrained)}")
    notes += (
        [f"{len(loose):,} photos outside the class folders are not used: {format_examples(loose)}"] if loose else []
    )
    split_folders = [prefix + name for name in splits]
    return ClassFolders(sorted(label_of.values()), class_of, split_of, split_folders, notes)


def _descend(prefix, photos):
    """Return the path below which the class folders are, their photos by folder name, and the photos outside.

    A folder without photos of its own is passed through if it is the only one.
    """
    loose = []
    while True:
        folders = {}
        for photo in photos:
            name, slash, _ = photo[len(prefix) :].partition("/")
            if slash:
                folders.setdefault(name, []).append(photo)
            else:
                loose.append(photo)
        deeper = f"{prefix}{next(iter(folders), '')}/"
        if len(folders) != 1 or any("/" not in photo[len(deeper) :] for photo in folders[deeper[len(prefix) : -1]]):
            return prefix, folders, loose
        prefix, photos = deeper, folders[deeper[len(prefix) : -1]]


def _split_word(name):
    """Return the split that a folder's name contains, or None: train, val2017, seg_test."""
    words = [name, *re.split(r"[\W\d_]+", name)]
    return next((split for word in words if word and (split := parse_split(word))), None)


def _split_folders(prefix, folders):
    """Return {folder name: split} if the folders are splits, {} if they are classes. Raises ValueError if in doubt."""
    splits = {name: split for name in folders if (split := _split_word(name))}
    if not splits:
        return {}
    if len(splits) == len(folders):
        return splits
    others = [name for name in folders if name not in splits]
    nested = [name for name in splits if all("/" in photo[len(f"{prefix}{name}/") :] for photo in folders[name])]
    if nested or len(splits) >= len(others):
        raise ValueError(
            f"{format_examples([prefix + name for name in splits])} may be splits, {format_examples(others)} are not: "
            "pass one of them, or move the others away"
        )
    return {}  # one of several classes: car, bus, train


def _check_members(members, loose, total, folder):
    n_classes = len({name for _, name, _, _ in members})
    if n_classes < 2:
        raise ValueError(f"{folder} contains {n_classes} folders with photos: it needs one per class, at least two")
    if len(loose) > MAX_LOOSE_FRACTION * total:
        raise ValueError(f"{len(loose):,} of {total:,} photos are outside the class folders: {format_examples(loose)}")


def _check_depth(members):
    """Raise ValueError if no folder contains photos itself: its subfolders may be the classes as well."""
    if any("/" not in photo[len(f"{prefix}{name}/") :] for prefix, name, own, _ in members for photo in own):
        return
    prefix, name, own, _ = members[0]
    inner = own[0][len(f"{prefix}{name}/") :].partition("/")[0]
    raise ValueError(
        f"the classes may be {prefix}{name} or {prefix}{name}/{inner}: pass the folder that contains the class folders"
    )
