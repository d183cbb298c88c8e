"""Numbers of caption texts: equal for captions that the tokenizer reads as the same text."""

from collections.abc import Iterable, Sequence

import numpy as np

from data.tokenizer import Tokens


def number_texts(tokens: Tokens, captions: Sequence[str], unknown_ids: Iterable[int] = ()) -> np.ndarray:
    """Number the texts of M captions by first occurrence -> (M,) int64; equal token ids have equal numbers.

    tokens: those of `captions`. A caption with a token of unknown_ids is compared by its text instead, because all
    unknown words have the same id.
    """
    has_unknown = np.add.reduceat(np.isin(tokens.flat, list(unknown_ids)), tokens.starts[:-1]) if len(tokens) else []
    numbers, number_of_row = {}, np.full(len(tokens.starts) - 1, -1, dtype=np.int64)
    for row, caption in zip(tokens.rows.tolist(), captions, strict=True):
        if number_of_row[row] < 0:
            ids = tokens.flat[tokens.starts[row] : tokens.starts[row + 1]]
            key = " ".join(caption.casefold().split()) if has_unknown[row] else ids.tobytes()
            number_of_row[row] = numbers.setdefault(key, len(numbers))
    return number_of_row[tokens.rows]
