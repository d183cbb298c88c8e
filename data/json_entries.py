"""Read JSON entries, objects that name a photo and its captions, whatever their keys are called."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from data.caption_rows import CaptionRows
from data.column_names import LANGUAGES, caption_groups, parse_caption_name, resolve_splits
from data.columns import cell_kind
from data.records import IMAGE_NAME, CaptionRecords, ColumnNames, match_columns, shorten
from runtime.text import format_examples

TEXT_KEYS = ("caption", "raw", "text", "sentence", "description", "value", "captions", "texts", "sentences")
NESTED_KEYS = ("annotations", "annotation", "regions")  # lists of objects with a caption, inside an image's object
FILE_KEYS = ("file_name", "filename", "path", "name", "url")  # of an image that is an object
ID_LISTS = ("image_ids", "img_ids")  # Chinese-CLIP: one text may belong to several photos
SURE_SPLIT_KEYS = ("split", "data_split", "partition")  # in others, such as "set", the words decide
LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z]{2,4})?")
SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # half an emoji; U+DC80 to U+DCFF are bytes that are not UTF-8
SAMPLE_ENTRIES = 1000  # by which the keys are judged
FIX = "fill it in or delete the entry"


class EntryReader:
    """Add JSON entries to `records`: match their keys, unwrap captions that are objects, choose one language.

    `finish` must be called after the last entry: it reports split words that are not known and the language.
    """

    def __init__(self, records: CaptionRecords, names: ColumnNames):
        self.records, self.names = records, names
        self.columns_of = {}  # keys of an entry -> image key, caption keys, split key
        self.never_captions, self.file_keys, self.empty, self.no_texts = set(), [], set(), {}
        self.unlabelled, self.n_unlabelled = False, 0
        self.by_language = {}  # language -> rows as CaptionRecords.add takes them
        self.split_words, self.used_keys, self.ignored_keys = Counter(), {}, {}

    def sample(self, entries: Iterable) -> None:
        """Judge the keys by the first entries: empty, or only file names, URLs, dates and numbers, are no captions."""
        values = {}
        entries = [entry for entry in entries if isinstance(entry, dict)]
        for entry in entries:
            for key, value in entry.items():
                if value not in (None, "", [], {}):
                    values.setdefault(key, []).append(value)
        self.file_keys = [key for key, found in values.items() if all(map(is_image_name, found))]
        self.empty = {key for entry in entries for key in entry} - set(values)
        self.no_texts = {key: found[0] for key, found in values.items() if all(map(_is_no_text, found))}
        self.never_captions, self.columns_of = self.empty | set(self.no_texts), {}
        self.unlabelled = bool(self.empty & set(ID_LISTS))  # texts of a test set whose photos are not published

    def add_all(self, entries: Sequence, location: str, split: str | None = None) -> None:
        """Add a list of entries, numbered from 1; `split` is that of entries which name none."""
        self.sample(entries[:SAMPLE_ENTRIES])
        for number, entry in enumerate(entries, start=1):
            self.add(entry, location, number, split)

    def add(self, entry: object, location: str, number: int | str, split: str | None = None) -> None:
        """Add one entry, or an error message at `location` and `number`."""
        image, keys, split_key = self._match(entry) if isinstance(entry, dict) else (None, (), None)
        if image is None or not keys:
            keys_found = f"the keys {', '.join(map(str, entry))}" if isinstance(entry, dict) else json_type(entry)
            wanted = " and ".join((self.names.image or "image", self.names.caption or "caption"))
            self._refuse(f"{location}{number}: expected the keys {wanted}, found {show(keys_found)}; rename the keys")
            return
        if self.unlabelled and entry[image] == []:
            self.n_unlabelled += 1
            return
        try:
            images = _images(entry[image])
            texts = [text for key in keys for text in find_texts(entry[key])]
        except (TypeError, RecursionError):
            expected = f"expected strings for {image} and {keys[0]}"
            self._refuse(f"{location}{number}: {expected}, found {show(entry)}; {FIX}")
            return
        own = entry[split_key] if split_key is not None else None
        if own not in (None, ""):
            own = SplitWord(str(own).strip())
            self.split_words[split_key, own] += 1
        for name in images:
            self._add_texts(name, texts, own or split, location, number)

    def _add_texts(self, image, texts, split, location, number):
        if any(SURROGATE.search(text) for text in (image, *(text for text, _ in texts)) if not text.isascii()):
            expected = "expected text, found half of an emoji (an unpaired surrogate)"
            self._refuse(f"{location}{number}: {expected} in {show(image)}; correct or delete the entry")
            return
        languages = dict.fromkeys(language for _, language in texts)
        for language in languages or (None,):
            row = image, [text for text, own in texts if own == language], split, location, number, FIX
            if language is None:
                self.records.add(*row)
            else:
                self.by_language.setdefault(language, []).append(row)

    def finish(self) -> None:
        """Add the captions of the chosen language. Raises ValueError for unknown split words or an unclear language."""
        path = self.records.files[0]
        if self.by_language:
            for row in self.by_language.pop(self._language(path)):
                self.records.add(*row)
        if self.split_words:
            splits = self._splits(path)
            self.records.rows = CaptionRows(
                (image, text, splits[split] if isinstance(split, SplitWord) else split)
                for image, text, split in self.records.rows
            )
        if self.n_unlabelled:
            self.records.notes.append(f"{path.name}: {self.n_unlabelled:,} texts name no photo and are not used")
        if ignored := [key for key in self.ignored_keys if key not in self.used_keys]:
            taken = ", ".join(f"{key} as {role}" for key, role in self.used_keys.items())
            self.records.notes.append(f"{path.name}: {taken}; keys not used: {format_examples(ignored)}")

    def _splits(self, path):
        """Return {word: split} of the words in the split key. Raises ValueError if one is not known."""
        words = {word for _, word in self.split_words}
        splits, keys = resolve_splits(sorted(words)), {key for key, _ in self.split_words}
        unknown = [word for word in splits if splits[word] is None]
        if unknown and len(unknown) == len(splits) and self.names.split is None and not keys & set(SURE_SPLIT_KEYS):
            key = ", ".join(sorted(keys))
            self.records.notes.append(f"{path.name}: {key} has no words for train, val and test and is not used")
        elif unknown:
            found = format_examples([show(word) for word in unknown])
            raise ValueError(
                f"{path}: expected train, val and test in {', '.join(sorted(keys))}, found {found}; rename them, or "
                "pass --split-column with the right key, or with none to split at random"
            )
        return splits

    def _language(self, path):
        languages, wanted = sorted(self.by_language), self.names.caption
        if wanted in languages or len(languages) == 1:
            return wanted if wanted in languages else languages[0]
        english = [language for language in languages if re.split("[-_]", language)[0] in ("en", "eng")]
        if len(english) != 1:
            raise ValueError(
                f"{path}: expected captions of one language, found {', '.join(languages)}; choose one with "
                f"--caption-column {languages[0]}"
            )
        self.records.notes.append(
            f"captions in {', '.join(languages)}: {english[0]} is read; --caption-column chooses another"
        )
        return english[0]

    def _refuse(self, message):
        self.records.bad_rows.append(message)

    def _match(self, entry):
        keys = tuple(entry)
        if keys not in self.columns_of:
            try:
                self.columns_of[keys] = columns = self._columns(keys)
            except ValueError as error:
                raise ValueError(f"{self.records.files[0]}: {error}") from None
            image, captions, split = columns
            roles = {image: "image", split: "split"} | dict.fromkeys(captions, "caption")
            self.used_keys |= {key: role for key, role in roles.items() if key is not None}
            self.ignored_keys |= dict.fromkeys(keys)
        return self.columns_of[keys]

    def _columns(self, keys):
        """Return the image key, the caption keys and the split key; the keys that the user named come first."""
        image, captions, split = match_columns(keys)
        if set(captions) & self.never_captions or image in captions:
            named, rest = captions, [key for key in keys if key not in self.never_captions and key != image]
            captions = match_columns(rest)[1] or [key for key in NESTED_KEYS if key in rest][:1]
            captions = captions or [key for key in named if key in self.empty]  # their rows are reported
            if not captions and self.names.caption is None:
                raise ValueError(
                    f"expected texts in {named[0]}, found only file names, URLs, dates or numbers such as "
                    f"{show(self.no_texts.get(named[0]))}; if these are the captions, pass --caption-column {named[0]}"
                )
        files = [key for key in self.file_keys if key in keys]
        if len(files) == 1 and (image is None or image not in self.file_keys):
            image = files[0]
        if image is None:
            image = next((key for key in keys if key.lower() in ID_LISTS), None)
        captions = captions or [key for key in NESTED_KEYS if key in keys][:1]
        captions = [key for key in captions if key != image]
        if self.names.image is not None:
            image = self.names.image if self.names.image in keys else None
        if self.names.caption is not None:
            named = named_captions(keys, self.names)
            captions = named if named or not _is_language(self.names.caption) else captions
        elif not captions:
            caption_groups(key for key in keys if key not in (image, split))  # raises ValueError for rival languages
        if self.names.split is not None:
            split = self.names.split if self.names.split in keys else None
        return image, captions, split


class SplitWord(str):
    """The word for a split, as it stands in an entry."""


def named_captions(keys: Iterable[str], names: ColumnNames) -> list[str]:
    """Return the keys that --caption-column names: one, several with commas, or those of a language; else []."""
    keys = list(keys)
    if names.caption is None or names.caption in keys:
        return [names.caption] if names.caption is not None else []
    listed = [name.strip() for name in names.caption.split(",")]
    if len(listed) > 1 and all(name in keys for name in listed):
        return listed
    language = LANGUAGES.get(names.caption.strip().lower())
    if language is None:
        return []
    chosen = caption_groups(keys, language).chosen
    return chosen if chosen and parse_caption_name(chosen[0]).language == language else []


def find_texts(value: object) -> list[tuple[str, str | None]]:
    """Return the (text, language) pairs of a caption value: a string, a list or an object, nested in any way.

    Raises TypeError if it contains anything else.
    """
    if isinstance(value, str):
        return [(value, None)]
    if isinstance(value, list):
        return [pair for item in value for pair in find_texts(item)]
    if not isinstance(value, dict):
        raise TypeError
    key = next((key for key in TEXT_KEYS if key in value), None)
    if key is not None:
        own = next((value[name] for name in ("language", "lang", "locale") if isinstance(value.get(name), str)), None)
        return [(text, language or own) for text, language in find_texts(value[key])]
    if value and all(map(str.isdecimal, value)):  # {"0": "a dog", "1": "two dogs"}
        return find_texts(list(value.values()))
    if value and all(map(LANGUAGE.fullmatch, value)):  # {"en": "a dog", "de": "ein Hund"}
        return [(text, language) for language, item in value.items() for text, _ in find_texts(item)]
    raise TypeError


def json_type(content: object) -> str:
    """Return the JSON name of a value's type, for an error message."""
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(content), "a number")


def show(value: object) -> str:
    """Return a value in quotes and shortened, for an error message; lone surrogates become question marks."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError, TypeError):
        text = f"{json_type(value)} that is nested too deeply"
    return shorten(text[:1000].encode("utf-8", "replace").decode())


def _images(value):
    """Return the image names of an entry: a name, a number as id, an object with a file name, or a list of them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, int) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, list) and value:
        return [name for item in value for name in _images(item)]
    if isinstance(value, dict):
        return _images(next((value[key] for key in FILE_KEYS if isinstance(value.get(key), str)), None))
    raise TypeError


def is_image_name(value: object) -> bool:
    """Return whether a value is a text that ends like the name of an image file."""
    return isinstance(value, str) and IMAGE_NAME.fullmatch(value.strip()) is not None


def _is_no_text(value):
    """Return whether a value, or each item of a list, is a file name, an address, a date or a number."""
    if isinstance(value, list) and value:
        return all(map(_is_no_text, value))
    is_number = isinstance(value, int | float)
    return is_number or (isinstance(value, str) and cell_kind(value.strip()[:1000]) in ("image", "url", "date", "file"))


def _is_language(word):
    return LANGUAGE.fullmatch(word) is not None
