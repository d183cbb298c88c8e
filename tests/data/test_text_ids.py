"""Numbers of caption texts follow the tokenizer's normalisation, and keep unknown words apart."""

import numpy as np
from helpers import tiny_tokenizer

from data.text_ids import number_texts
from data.tokenizer import tokenize
from data.unknown_words import unknown_ids


def numbers(captions, **options):
    tokens = tokenize(tiny_tokenizer(), captions, max_tokens=16)
    return number_texts(tokens, captions, **options).tolist()


def test_texts_are_equal_where_their_token_ids_are():
    captions = ["red on the left", "blue", "Red  on THE left", "red on the left blue", "BLUE", "red on the left"]
    assert numbers(captions) == [0, 1, 0, 2, 1, 0]
    assert number_texts(tokenize(tiny_tokenizer(), [], max_tokens=16), []).dtype == np.int64


def test_different_unknown_words_are_different_texts():
    captions = ["red 狗", "red 猫", "Red 狗", "red"]
    assert len(set(numbers(captions[:2]))) == 1  # both are "red [UNK]"
    assert numbers(captions, unknown_ids=unknown_ids(tiny_tokenizer())) == [0, 1, 0, 2]
