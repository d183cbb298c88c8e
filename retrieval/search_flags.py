"""Flags that are checked before any library for searching is imported, so that --help and mistakes are fast."""

import re
from typing import Literal

Target = Literal["photos", "captions"]  # what to search in
MAX_LABEL = 200  # characters of a label, in infer.py and on the page


def check_index(name: str) -> None:
    """Raise ValueError unless `name` is one that ann_index.py accepts."""
    if not re.fullmatch(r"faiss|int8|binary|milvus|.+\.db|https?://.+", name):
        known = "faiss, int8, binary, milvus, a file FILE.db or an http(s) address"
        raise ValueError(f"--index must be {known}, got {name}")
