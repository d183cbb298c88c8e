"""Choose the image, caption and split columns of a table by their names and by what their cells contain."""

import re
from collections.abc import Container, Sequence
from typing import NamedTuple

from data.column_names import (
    IMAGE_COLUMNS,
    LANGUAGES,
    NO_SPLIT,
    SPLIT_COLUMNS,
    ColumnNames,
    caption_groups,
    is_split_word,
    parse_caption_name,
    parse_split,
)
from data.records import IMAGE_NAME, shorten
from runtime.text import format_examples

URL = re.compile(r"(?:[a-z][a-z0-9+.-]{0,20}://|www\.|data:|mailto:).*", re.IGNORECASE | re.DOTALL)
NUMERIC = re.compile(r"(?=\D*\d)[\d\s.,:;/+\-%$€¥£()\[\]{}TZeE]+")  # numbers, dates, boxes
MONTHS = r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mon|tue|wed|thu|fri|sat|sun)[a-z]{0,6}\b"
DATE = re.compile(rf"(?=\D*\d)(?:[\d\s.,:+-]|{MONTHS})+", re.IGNORECASE)  # May 3, 2024
FILE_NAME = re.compile(r"[^\s]+\.[a-z][a-z0-9]{1,4}", re.IGNORECASE)
NO_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]{4}")  # scripts that need no spaces
MAX_JUDGED = 1000  # characters of a cell by which its kind is judged
CATEGORY = 0.1  # distinct cells per row, below which a column contains categories, if another one has free text
MIN_CATEGORY_ROWS = 20


SURE_SPLIT_COLUMNS = (
    "split",
    "data_split",
    "partition",
    "划分",
    "数据集划分",
)  # in others, such as "set", words decide
WEAK_CAPTION_COLUMNS = ("title", "label", "标题")  # single words in them may be classes


class Choice(NamedTuple):
    """The columns to read, by index, and a note that names them and the ignored ones."""

    image: int
    captions: list[int]
    split: int | None
    note: str | None


class ColumnChooser:
    """Choose the columns of a table from its header (None: it has none) and a sample of its rows.

    photos: what `in` tells whether a cell is the name of an existing photo without its suffix, or its number.
    """

    def __init__(self, header: Sequence[str] | None, rows: Sequence[Sequence[str]], photos: Container[str] = ()):
        self.header = header
        self.width = len(header) if header is not None else max(map(len, rows), default=0)
        self.cells = [
            [cell for row in rows if len(row) > k and (cell := row[k].strip()[:MAX_JUDGED])] for k in range(self.width)
        ]
        self.kinds = [[cell_kind(cell, photos) for cell in cells] for cells in self.cells]
        self.n_rows = len(rows)

    def choose(self, wanted: ColumnNames) -> Choice | None:
        """Return the columns, or None if there is no image or caption column.

        Raises ValueError if a wanted column does not exist, or if several columns may be the image or the caption.
        """
        image = self._wanted(wanted.image, "--image-column")[0] if wanted.image is not None else self._find_image()
        if image is None:
            return None
        split = None
        if wanted.split is not None and wanted.split.lower() != NO_SPLIT:
            split = self._wanted(wanted.split, "--split-column")[0]
        elif wanted.split is None:
            split = self._find_split(image)
        if wanted.caption is not None:
            captions, languages = self._wanted_captions(wanted.caption, (image, split)), {}
        else:
            captions, languages = self._find_captions((image, split))
        if not captions:
            return None
        return Choice(image, captions, split, self._note(image, captions, split, languages))

    def name(self, index: int) -> str:
        """Return the name of a column as the user is shown it and can pass it to --caption-column."""
        own = self.header[index].strip() if self.header is not None else ""
        return own or str(index + 1)

    def image_rows(self) -> int:
        """Return how many rows have an image name, in the column with the most."""
        counts = [sum(kind in ("image", "photo") for kind in kinds) for kinds in self.kinds]
        urls = [
            sum(kind == "url" and IMAGE_NAME.search(cell) is not None for cell, kind in zip(*column, strict=True))
            for column in zip(self.cells, self.kinds, strict=True)
        ]
        return max(max(counts, default=0), max(urls, default=0))

    def _wanted(self, names, flag):
        """Return the indices of the columns that the user named, by name or, if no name matches, by number."""
        indices = []
        by_name = {self.name(k).lower(): k for k in reversed(range(self.width))}
        for name in names.split(",") if names.strip().lower() not in by_name else [names]:
            name = name.strip()
            index = by_name.get(name.lower())
            if index is None and name.isdecimal() and 1 <= int(name[:9]) <= self.width:
                index = int(name) - 1
            if index is None:
                columns = ", ".join(self.name(k) for k in range(self.width))
                raise ValueError(f"expected the column {shorten(name)} of {flag}, found the columns {columns}")
            indices.append(index)
        return indices

    def _wanted_captions(self, wanted, taken):
        language = LANGUAGES.get(wanted.strip().lower())
        if language is not None and self.header is not None:
            names = {self.name(k): k for k in reversed(range(self.width)) if k not in taken}
            chosen = [] if wanted in names else caption_groups(names, language).chosen
            if chosen and parse_caption_name(chosen[0]).language == language:
                return [names[name] for name in chosen]
        return self._wanted(wanted, "--caption-column")

    def _share(self, index, *kinds):
        """Return the fraction of the filled cells of a column that have one of the kinds."""
        found = self.kinds[index]
        return sum(kind in kinds for kind in found) / len(found) if found else 0.0

    def _find_image(self):
        header = [name.strip().lower() for name in self.header or ()]
        known = [header.index(name) for name in IMAGE_COLUMNS if name in header]
        for kind, least in (("image", 0.5), ("photo", 0.9), ("url", 0.9)):  # url: of the photos that were downloaded
            candidates = [k for k in range(self.width) if self._share(k, kind) > least]
            if kind == "url":
                candidates = [k for k in candidates if IMAGE_NAME.search(self.cells[k][0])]
            named = [k for k in known if k in candidates]
            self._check_same_photo(named)
            if not named and len(candidates) > 1:
                raise self._unclear(candidates, "image names", "--image-column")
            if candidates:
                return (named or candidates)[0]
        unlike = ("text", "date", "url")  # what a column of names without suffix does not contain
        return next((k for k in known if self._share(k, *unlike) < 0.5), next(iter(known), None))

    def _check_same_photo(self, candidates):
        """Raise ValueError if two known image columns contain different photos."""
        for other in candidates[1:]:
            pairs = list(zip(self.cells[candidates[0]], self.cells[other], strict=False))
            same = sum(_stem(a) == _stem(b) or _stem(a) in b or _stem(b) in a for a, b in pairs)
            if pairs and same < len(pairs) / 2 and self._share(other, "image") > 0.5:
                raise self._unclear([candidates[0], other], "image names", "--image-column")

    def _find_split(self, image):
        header = [name.strip().lower() for name in self.header or ()]
        known = [header.index(name) for name in SPLIT_COLUMNS if name in header and header.index(name) != image]
        with_words = [k for k in known if any(map(is_split_word, self.cells[k]))]
        certain = [k for k in known if header[k] in SURE_SPLIT_COLUMNS and self.cells[k]]
        self._check_same_split(with_words)
        others = [k for k in range(self.width) if k != image and self._is_split(k)]
        return next(iter((*with_words, *certain, *others)), None)

    def _check_same_split(self, candidates):
        """Raise ValueError if two known split columns assign a row to different splits."""
        for other in candidates[1:]:
            pairs = zip(self.cells[candidates[0]], self.cells[other], strict=False)
            splits = [(parse_split(a), parse_split(b)) for a, b in pairs]
            if len(self.cells[candidates[0]]) == len(self.cells[other]) and any(a and b and a != b for a, b in splits):
                raise self._unclear([candidates[0], other], "train, val and test", "--split-column")

    def _is_split(self, index):
        """Return whether a column without a known name contains split words only; with a header, train among them."""
        splits = {parse_split(cell) for cell in self.cells[index]}
        return bool(splits) and None not in splits and (self.header is None or {"train"} < splits)

    def _find_captions(self, taken):
        """Return the caption columns and the languages: by name, if their cells are texts, else by their cells."""
        free = [k for k in range(self.width) if k not in taken]
        usable = [k for k in free if self._share(k, "url", "image", "photo") <= 0.5]
        texts = [k for k in usable if self._share(k, "text") > 0.5]
        words = [k for k in usable if self._share(k, "text", "word") > 0.5]
        strong = [k for k in words if k in texts or self.name(k).lower() not in WEAK_CAPTION_COLUMNS]
        if named := self._named_captions(strong):
            return named
        if texts or self.header is None:
            return self._captions_by_cells(free, texts, words), {}
        if named := self._named_captions(words) or self._named_captions(usable) or self._named_captions(free):
            return named
        if words:
            raise ValueError(
                f"expected a column of captions, found single words in {format_examples([self.name(k) for k in words])}"
                f"; if these are the captions, pass --caption-column {self.name(words[0])}"
            )
        return [], {}

    def _named_captions(self, columns):
        names = {self.name(k): k for k in reversed(columns)} if self.header is not None else {}
        groups = caption_groups(sorted(names, key=names.get))
        return ([names[name] for name in groups.chosen], groups.languages) if groups.chosen else None

    def _captions_by_cells(self, free, texts, words):
        if len(texts) > 1 and self.n_rows >= MIN_CATEGORY_ROWS:
            texts = [k for k in texts if len(set(self.cells[k])) >= CATEGORY * self.n_rows] or texts
        if not texts and len(free) == 1:
            texts = words  # photo.jpg,dog: no other column can be meant
        if len(texts) > 1:
            raise self._unclear(texts, "texts", "--caption-column")
        return texts

    def _unclear(self, candidates, what, flag):
        names = [f"{self.name(k)} ({shorten(self.cells[k][0], 30)})" for k in candidates]
        kind = "column" if self.header is not None else "column number"
        return ValueError(
            f"expected one column of {what}, found them in the {kind}s {' and '.join(names[:5])}; choose with {flag} "
            f"{self.name(candidates[0])}"
        )

    def _note(self, image, captions, split, languages):
        if self.header is None and self.width == 2:
            if self._share(captions[0], "text") > 0.5:
                return None
            words = format_examples(list(dict.fromkeys(self.cells[captions[0]])))
            return f"captions from column {self.name(captions[0])} are single words: {words}"
        roles = [f"images from column {self.name(image)}", f"captions from {', '.join(map(self.name, captions))}"]
        if split is not None:
            roles.append(f"split from {self.name(split)}")
        used = {image, *captions, split}
        ignored = [self.name(k) for k in range(self.width) if k not in used and (self.cells[k] or self.name(k))]
        if not ignored and len(captions) == 1 and split is None:
            return None
        note = ", ".join(roles) + (f"; ignored: {format_examples(ignored)}" if ignored else "")
        if len(languages) > 1:
            note += "; --caption-column chooses another language"
        return note


def cell_kind(cell: str, photos: Container[str] = ()) -> str:
    """Return what a cell contains: image, photo (a name without suffix), url, date (or numbers), file, word or text."""
    if URL.fullmatch(cell):
        return "url"
    if cell[:1] in "[{" and cell[-1:] in "]}" and not NUMERIC.fullmatch(cell):
        return "text"  # a list of captions
    if IMAGE_NAME.fullmatch(cell):
        return "image"
    if cell in photos:
        return "photo"
    if NUMERIC.fullmatch(cell) or DATE.fullmatch(cell):
        return "date"
    if FILE_NAME.fullmatch(cell):
        return "file"
    return "text" if len(cell.split(None, 1)) > 1 or NO_SPACES.search(cell) else "word"


def _stem(name):
    return IMAGE_NAME.sub(lambda match: match[0].rpartition(".")[0], name).replace("\\", "/").rpartition("/")[2]
