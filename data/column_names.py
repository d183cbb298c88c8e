"""Known names of columns and JSON keys: which one names the image, the caption and the split."""

import re
from collections.abc import Iterable
from typing import NamedTuple

# Names of columns and JSON keys, in order of preference.
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_name", "image_file", "image_path", "img_path", "img_name")
IMAGE_COLUMNS += ("filepath", "file_path", "path", "file", "img", "photo", "picture", "images", "image_filename")
IMAGE_COLUMNS += ("pic", "图片", "图像", "照片", "文件名", "图片名", "图片名称", "图片路径", "image_id", "name")
IMAGE_COLUMNS += ("img_id", "photo_id", "article_id", "id")
CAPTION_COLUMNS = ("caption", "captions", "raw", "text", "texts", "comment", "sentence", "sentences", "description")
CAPTION_COLUMNS += ("comments", "描述", "图片描述", "说明", "文本", "句子", "字幕", "image_caption", "标题", "title")
CAPTION_COLUMNS += ("descriptions", "alt_text", "label", "txt")  # txt: of WebDataset
SPLIT_COLUMNS = (
    "split",
    "set",
    "subset",
    "partition",
    "data_split",
    "group",
    "fold",
    "phase",
    "划分",
    "数据集划分",
    "数据集",
)
LANGUAGES = {  # of captions: words in column names
    **dict.fromkeys(("en", "eng", "english", "英文", "英语"), "en"),
    **dict.fromkeys(("zh", "zho", "cn", "chinese", "中文", "汉语"), "zh"),
    **dict.fromkeys(("de", "ger", "deu", "german", "deutsch"), "de"),
    **dict.fromkeys(("fr", "fra", "french"), "fr"),
    **dict.fromkeys(("es", "spa", "spanish"), "es"),
    **dict.fromkeys(("ja", "jp", "jpn", "japanese", "日文", "日语"), "ja"),
    **dict.fromkeys(("ko", "kr", "kor", "korean"), "ko"),
    **dict.fromkeys(("ru", "rus", "russian"), "ru"),
}
# Codes that no other word of a header is likely to be: "id", "no" and "is" are left out.
LANGUAGES |= {
    code: code for code in ("pt", "nl", "pl", "cs", "sv", "uk", "vi", "tr", "ar", "hi", "th", "hu", "el", "he")
}
LANGUAGES |= {"it": "it", "fi": "fi", "da": "da", "ro": "ro", "fa": "fa", "bn": "bn"}
LANGUAGE_PREFIX = re.compile("^(英文|英语|中文|汉语|日文|日语)(?=.)")
SPLIT_WORDS = {"train": "train", "training": "train", "restval": "train"}  # restval: COCO's val that Karpathy trains on
SPLIT_WORDS |= {"val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test", "testing": "test"}
SPLIT_SYNONYMS = SPLIT_WORDS | {  # only in columns: in the name of a folder, "tr" may be Turkish
    **dict.fromkeys(("trn", "tr", "trainset", "train_set", "训练", "训练集"), "train"),
    **dict.fromkeys(("vali", "devel", "development", "valset", "val_set", "验证", "验证集"), "val"),
    **dict.fromkeys(("tst", "te", "testset", "test_set", "测试", "测试集"), "test"),
}
EITHER_SPLIT = {"eval", "evaluation", "holdout", "heldout", "hold_out", "held_out"}  # val or test, by the other words
NO_SPLIT = "none"  # of --split-column


class ColumnNames(NamedTuple):
    """Columns of a table or keys of JSON entries that the user named; None: found by their names and contents."""

    image: str | None = None  # --image-column
    caption: str | None = None  # --caption-column; several with commas, or a language
    split: str | None = None  # --split-column; "none": the column is ignored


FIND_COLUMNS = ColumnNames()


class CaptionName(NamedTuple):
    """The name of a caption column in parts: caption_en_2 -> rank of "caption", "en", "2"."""

    rank: int  # in CAPTION_COLUMNS; len(CAPTION_COLUMNS) for a name that is only a language
    language: str | None
    number: str | None


def match_columns(names: Iterable[str]) -> tuple[str | None, list[str], str | None]:
    """Return the names of the image column, the caption columns and the split column.

    `names` are those of a table's columns or of a JSON object's keys. A missing column is None, or [] for captions.
    Of captions in several languages, the English ones are returned.
    """
    names = list(names)
    lower = {name.strip().lower(): name for name in reversed(names)}
    image, split = (
        next((lower[name] for name in known if name in lower), None) for known in (IMAGE_COLUMNS, SPLIT_COLUMNS)
    )
    try:
        captions = caption_groups(name for name in names if name not in (image, split)).chosen
    except ValueError:  # several languages, none of them English: --caption-column is needed
        captions = []
    return image, captions, split


class CaptionGroups(NamedTuple):
    """The caption columns of a header: those that are read, and the languages that could be read instead."""

    chosen: list[str]
    languages: dict[str | None, list[str]]  # language -> columns named alike; empty if the chosen ones have no rival


def caption_groups(names: Iterable[str], language: str | None = None) -> CaptionGroups:
    """Choose the caption columns by name: one, or several that are numbered; of several languages, one.

    language: the wanted one; default: the columns without a language, else English. Raises ValueError if neither
    exists, with the columns in its message.
    """
    parsed = {name: parts for name in names if (parts := parse_caption_name(name)) is not None}
    if language is not None and not any(parts.language == language for parts in parsed.values()):
        language = None
    ranks = [parts.rank for parts in parsed.values() if language is None or parts.language == language]
    if not ranks:
        return CaptionGroups([], {})
    best = min(ranks)
    by_language = {}
    for name, parts in parsed.items():
        if parts.rank == best:
            by_language.setdefault(parts.language, []).append(name)
    for found in (language, None, "en", *(by_language if len(by_language) == 1 else ())):
        if found in by_language and (language is None or found == language):
            chosen = by_language[found]
            break
    else:
        columns = [name for group in by_language.values() for name in group]
        raise ValueError(
            f"expected captions of one language, found the columns {', '.join(columns)}; choose one with "
            f"--caption-column {columns[0]}"
        )
    if not any(parsed[name].number for name in chosen):
        chosen = chosen[:1]
    return CaptionGroups(chosen, by_language if len(by_language) > 1 else {})


def parse_caption_name(name: str) -> CaptionName | None:
    """Return the parts of a name such as caption, Caption1, "caption (2)", sentence_a, caption-de, en or 中文描述."""
    if len(name) > 60:
        return None
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.strip()).lower()
    prefix = LANGUAGE_PREFIX.match(name)
    language = LANGUAGES[prefix[1]] if prefix else None
    words = re.findall(r"[^\W\d_]+|\d+", name[prefix.end() :] if prefix else name)
    number = words.pop() if len(words) > 1 and (words[-1].isdigit() or words[-1] in tuple("abcde")) else None
    for index in (-1, 0):
        if language is None and words and words[index] in LANGUAGES:
            language = LANGUAGES[words.pop(index)]
    base = "_".join(words)
    if base in CAPTION_COLUMNS:
        return CaptionName(CAPTION_COLUMNS.index(base), language, number)
    if not words and language is not None and number is None:
        return CaptionName(len(CAPTION_COLUMNS), language, None)
    return None


def parse_split(value: object) -> str | None:
    """Return "train", "val" or "test" for the words that data sets use, else None."""
    return SPLIT_SYNONYMS.get(_split_word(value))


def is_split_word(value: object) -> bool:
    """Return whether a cell contains a word for train, val or test, or one that may mean val or test."""
    return parse_split(value) is not None or _split_word(value) in EITHER_SPLIT


def resolve_splits(words: Iterable[str]) -> dict[str, str | None]:
    """Return {word: "train", "val", "test" or None if it is not known} for the words of one split column.

    "eval" and "holdout" mean val in some data sets and test in others: they are the one that no other word names; if
    none does, test. Either is then the part that is not trained on.
    """
    words = list(dict.fromkeys(words))
    splits = {word: parse_split(word) for word in words}
    unclear = [word for word in words if _split_word(word) in EITHER_SPLIT]
    free = [split for split in ("test", "val") if split not in splits.values()]
    if "train" in splits.values() and len({_split_word(word) for word in unclear}) == 1 and free:
        splits |= dict.fromkeys(unclear, free[0])
    return splits


def _split_word(value):
    return str(value).strip().lower().replace("-", "_").replace(" ", "_")[:40]
