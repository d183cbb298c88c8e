"""Class names from folder names: without numbers, WordNet ids looked up, names without a meaning refused."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.records import decode_text
from runtime.text import format_examples

# Files that name the classes, beside the class folders: `FOLDER NAME` on each line, or a name for each of 0, 1, 2 ...
NAME_FILES = ("classes.txt", "class_names.txt", "labels.txt", "words.txt", "synset_words.txt", "LOC_synset_mapping.txt")
WORDNET_ID = re.compile(r"n\d{8}")
WORDNET_PREFIX = re.compile(r"n\d{8}[-_. ]+(?=\w)")  # n02085620-Chihuahua
NUMBER_PREFIX = re.compile(r"(\d+)\s*[-_. ]\s*(?=[^\W\d_])")  # 001.Black_footed_Albatross
DATE = re.compile(r"(?:19|20)\d\d[-_. ]?(?:0[1-9]|1[0-2])(?![0-9]{3})")  # 2023-05, 20230514, 2023_05_14 Birthday
CAMERA = re.compile(r"[1-9]\d\d(?=[A-Z0-9_]*[A-Z])[A-Z0-9_]{5}")  # 100CANON: DCF, the standard of camera folders
HASH = re.compile(r"(?=[0-9a-f-]*\d)[0-9a-f-]{8,}", re.IGNORECASE)
# Names of folders that describe storage and not what a photo shows; compared without digits, spaces and underscores.
STRUCTURAL = re.compile(
    r"images?|imgs?|photos?|pics?|pictures?|jpe?gs?|jpegimages|pngs?|raw|originals?|resized|thumbs?|thumbnails?|masks?"
    r"|annotations?|segmentation|data|dataset|part|batch|shard|chunk|(?:new|untitled)?folder|album|dcim|camera(?:roll)?"
    r"|screenshots?|downloads?|whatsappimages|class(?:es)?|category|labels?|id|cluster|unlabell?ed|pred(?:iction)?s?"
    r"|图片|照片|图像|相机|新建文件夹|下载",
    re.IGNORECASE,
)


def class_names(folders: Sequence[str], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return {folder name: class name}; `known` names some or all of the folders, see `read_class_names`.

    `n02085620-Chihuahua` is Chihuahua. `001.Black_footed_Albatross` is Black footed Albatross where all folders are
    numbered, each differently. Raises ValueError for folders that name no class (numbers, dates, ids, `images`), for
    folders that `known` lacks, and for two folders with one name.
    """
    known = known or {}
    if known and (lacking := [folder for folder in folders if folder not in known]):
        raise ValueError(f"the list of class names has no line for {format_examples(lacking)}")
    names = {folder: known.get(folder) or _clean(folder, _are_numbered(folders)) for folder in folders}
    if not known:
        _check_meaning(folders)
    first = {}
    for folder, name in names.items():
        other = first.setdefault(name.casefold(), folder)
        if other != folder:
            raise ValueError(f"the folders {other} and {folder} are both the class {name!r}: rename or merge them")
    return names


def _clean(folder, numbered):
    name = WORDNET_PREFIX.sub("", folder)
    name = NUMBER_PREFIX.sub("", name, count=1) if numbered and NUMBER_PREFIX.match(name) else name
    return " ".join(re.split(r"[_\-\s]+", name)).strip() or folder


def _are_numbered(folders):
    numbers = [match[1] for folder in folders if (match := NUMBER_PREFIX.match(folder))]
    return len(numbers) == len(folders) == len(set(numbers))


def _check_meaning(folders):
    """Raise ValueError if the name of a folder cannot be that of a class."""
    numbered = _are_numbered(folders) and any(int(NUMBER_PREFIX.match(folder)[1]) < 100 for folder in folders)
    checks = {
        "WordNet ids": lambda name: WORDNET_ID.fullmatch(name),
        "dates": lambda name: DATE.match(name),
        "numbers": lambda name: not re.search(r"[^\W\d_]", name),
        "camera folders": lambda name: CAMERA.fullmatch(name) and not numbered,
        "ids": lambda name: HASH.fullmatch(name),
        "folders of storage": lambda name: STRUCTURAL.fullmatch(re.sub(r"[\W\d_]", "", name)),
    }
    for kind, matches in checks.items():
        if meaningless := [folder for folder in folders if matches(folder)]:
            raise ValueError(
                f"{format_examples(meaningless)} {'is' if len(meaningless) == 1 else 'are'} {kind}, not class names; "
                f"to use them all the same, write classes.txt beside them with a line 'FOLDER NAME' for each"
            )


def read_class_names(folder: Path, files: Sequence[str], folders: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """Return {folder name: class name} from one of NAME_FILES among `files` of the folder, and that file's name.

    A line is a folder's name, a tab or space, and its class name. Without folder names, line 0, 1, 2 ... names the
    folder 0, 1, 2 ... or, if there is a folder with the number of lines, 1, 2, 3 ... A file that names none of the
    folders is ignored: ({}, None).
    """
    wanted = set(folders)
    for name in NAME_FILES:
        for file in sorted(
            (f for f in files if f.rpartition("/")[2].lower() == name.lower()), key=lambda f: f.count("/")
        ):
            lines = [line.strip() for line in decode_text(folder / file).split("\n") if line.strip()]
            if known := _by_folder(lines, wanted) or _by_number(lines, wanted):
                return known, file
    return {}, None


def _by_folder(lines, wanted):
    known = {}
    for line in lines:
        key, _, name = line.partition("\t") if "\t" in line else line.partition(" ")
        key, name = key.strip(), name.strip()
        if key in wanted and name:
            # A WordNet id has several synonyms: "tench, Tinca tinca".
            known[key] = name.partition(",")[0].strip() if WORDNET_ID.fullmatch(key) else name
    return known


def _by_number(lines, wanted):
    if not all(folder.isdecimal() for folder in wanted):
        return {}
    numbers = sorted(wanted, key=int)
    matches = [int(number) for number in numbers] in (list(range(len(lines))), list(range(1, len(lines) + 1)))
    return dict(zip(numbers, lines, strict=True)) if matches else {}
