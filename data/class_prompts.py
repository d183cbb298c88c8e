"""Sentences made from a class name: the templates of zero-shot classification and of class folders without captions."""

import re
from collections.abc import Sequence

from runtime.text import HAN

TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "there is a {} in the photo")
CHINESE_TEMPLATES = ("{}", "一张{}的照片", "照片里有{}")
HAN_CHARACTER = re.compile(f"[{HAN}]")
DOUBLE_ARTICLE = re.compile(r"\b(?:an?|the) (?=(?:an?|the|some|one|two|three) )", re.IGNORECASE)
ARTICLE_BEFORE_VOWEL = re.compile(r"\ba (?=[aeiou])", re.IGNORECASE)


def prompts(label: str, templates: Sequence[str] = ()) -> list[str]:
    """Fill a label into the templates, by default those of its language (English or Chinese).

    An article of the label replaces the template's: "an owl" gives "a photo of an owl".
    """
    templates = templates or (CHINESE_TEMPLATES if HAN_CHARACTER.search(label) else TEMPLATES)
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template needs one {{}} for the label, got {template!r}")
    sentences = [DOUBLE_ARTICLE.sub("", template.replace("{}", label.strip())) for template in templates]
    return [ARTICLE_BEFORE_VOWEL.sub("an ", sentence) for sentence in sentences]
