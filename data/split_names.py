"""Find train, val and test in the paths of files: train/captions.csv, en_val.json, captions_train2017.json."""

import re

from data.records import SPLIT_WORDS

SPLIT_IN_NAME = re.compile(
    rf"(?<![a-z])({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE
)


def split_in_path(file: str) -> str | None:
    """Return the split in a file's path, or None; the last one counts."""
    found = SPLIT_IN_NAME.findall(file)
    return SPLIT_WORDS[found[-1].lower()] if found else None


def without_split(file: str) -> str:
    """Return a file's path with * for each split in it: the same for the files of one data set."""
    return SPLIT_IN_NAME.sub("*", file)
