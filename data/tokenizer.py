"""Tokenize captions with a pretrained tokenizer, or with a WordPiece vocabulary learned from the captions."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from runtime.atomic_io import replace_file
from runtime.cache import load_cached, require
from runtime.text import HAN

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
CHUNK = 10_000  # captions tokenized at a time: the tokenizer returns much more data per caption than the ids
VOCABULARY_SIZE = 8192  # at most; the 30,000 training captions of Flickr8k have about as many distinct words
HAN_CHARACTER = re.compile(f"[{HAN}]")


def load_tokenizer(folder_or_name: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a transformers text model from a folder or from the hub."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder_or_name), trust_remote_code=False)
    # Unused, and older transformers save each template to a file whose name comes from the tokenizer's own files.
    tokenizer.chat_template = None
    return tokenizer


def train_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train an uncased WordPiece tokenizer on the captions, without network access.

    Every Chinese character is a token of its own, and every one that occurs in the captions is in the vocabulary.
    """
    from tokenizers import BertWordPieceTokenizer

    trained = BertWordPieceTokenizer(lowercase=True)  # splits Chinese into characters
    # As special tokens, because the trainer numbers the characters that it finds in an order that varies.
    characters = sorted(
        {character for caption in captions for character in trained._tokenizer.normalizer.normalize_str(caption)}
    )
    trained.train_from_iterator(
        captions,
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        limit_alphabet=VOCABULARY_SIZE,  # with the default of 1,000, most Chinese characters would be unknown
        show_progress=False,
        special_tokens=[*SPECIAL_TOKENS.values(), *(f"##{c}" for c in characters if _can_continue_word(c))],
    )
    # A tokenizer built from the vocabulary also adds [CLS] and [SEP] to each caption.
    wordpiece = BertWordPieceTokenizer(vocab=trained.get_vocab(), lowercase=True)
    return PreTrainedTokenizerFast(tokenizer_object=wordpiece._tokenizer, **SPECIAL_TOKENS)


def _can_continue_word(character):
    """Return False for spaces and for Chinese characters, each of which is a word of its own."""
    return not character.isspace() and not HAN_CHARACTER.match(character)


@dataclass(frozen=True, eq=False)
class Tokens(Sequence):
    """Token ids of M captions, without padding: tokens[m] is int32, (L,). Equal captions share their ids."""

    flat: np.ndarray  # int32, the ids of all K distinct captions, concatenated
    starts: np.ndarray  # (K + 1,) int64, offset of each distinct caption in `flat`
    rows: np.ndarray  # (M,) int64, the index of each caption among the distinct ones

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, caption):
        row = self.rows[caption]
        return self.flat[self.starts[row] : self.starts[row + 1]]


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    *,
    max_tokens: int,
    cache_dir: str | Path | None = None,
) -> Tokens:
    """Return the token ids of captions, truncated to `max_tokens`, which include the special tokens.

    With `cache_dir`, they are saved there and loaded the next time.
    """
    row_of_caption = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    rows = np.array([row_of_caption[caption] for caption in captions], dtype=np.int64)
    if cache_dir is None:
        return Tokens(*_encode(tokenizer, list(row_of_caption), max_tokens), rows)
    file = Path(cache_dir) / "tokens" / f"{fingerprint(tokenizer, row_of_caption, max_tokens)}.npz"
    if cached := load_cached(file, lambda file: _load(file, len(row_of_caption), len(tokenizer))):
        return Tokens(*cached, rows)
    flat, starts = _encode(tokenizer, list(row_of_caption), max_tokens)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda temporary: _save(temporary, flat, starts))
    return Tokens(flat, starts, rows)


def _load(path, captions, vocabulary_size):
    """Load the ids and offsets (captions + 1,). Raises an exception if the file is damaged."""
    with np.load(path, allow_pickle=False) as cached:
        flat, starts = cached["flat"], cached["starts"]
    require(flat.ndim == 1 and flat.dtype == np.int32, f"ids are {flat.dtype}{flat.shape}")
    require(starts.shape == (captions + 1,) and starts.dtype == np.int64, f"offsets are {starts.dtype}{starts.shape}")
    require(starts[0] == 0 and starts[-1] == len(flat) and (np.diff(starts) >= 0).all(), "offsets do not fit the ids")
    require(not len(flat) or (flat.min() >= 0 and flat.max() < vocabulary_size), "ids are not in the vocabulary")
    return flat, starts


def _save(path, flat, starts):
    with path.open("wb") as file:  # np.savez would append .npz to a path, but not to an open file
        np.savez(file, flat=flat, starts=starts)


def _encode(tokenizer, captions, max_tokens):
    """Return the concatenated ids and the offsets (N + 1,) of N captions."""
    chunks, lengths = [np.empty(0, np.int32)], [0]
    with _parallel_tokenizer():
        for first in range(0, len(captions), CHUNK):
            chunk = captions[first : first + CHUNK]
            ids = tokenizer(chunk, truncation=True, max_length=max_tokens, return_attention_mask=False)["input_ids"]
            lengths.extend(map(len, ids))
            chunks.append(np.fromiter(chain.from_iterable(ids), np.int32))
    return np.concatenate(chunks), np.cumsum(lengths)


@contextmanager
def _parallel_tokenizer():
    """Let tokenizers use all cores. Scripts disable its threads, because they cause warnings in loader processes."""
    previous = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = previous or "false"


def fingerprint(tokenizer: PreTrainedTokenizerBase, captions: Iterable[str], max_tokens: int) -> str:
    """Return a hash of the captions and of everything in the tokenizer that affects their ids."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Each call sets truncation and padding.
        state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    else:
        state = sorted(tokenizer.get_vocab().items()), repr(tokenizer)
    digest = hashlib.sha256(json.dumps([state, max_tokens], sort_keys=True).encode())
    digest.update("\0".join(captions).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def describe_truncation(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], token_ids: Sequence[np.ndarray], *, max_tokens: int
) -> str | None:
    """Return a message about captions that are longer than `max_tokens` and truncated, or None if there are none."""
    candidates = [caption for caption, ids in zip(captions, token_ids, strict=True) if len(ids) == max_tokens]
    truncated = [caption for caption in candidates if len(tokenizer(caption)["input_ids"]) > max_tokens]
    if not truncated:
        return None
    example = truncated[0][:60]
    return f"{len(truncated):,} captions are longer than {max_tokens} tokens and are truncated, e.g. {example!r}"


def pad(token_ids: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad M captions to the longest one, L tokens. Return input_ids and attention_mask, both (M, L)."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    input_ids = torch.full((len(token_ids), int(lengths.max())), pad_id)
    for row, ids in enumerate(token_ids):
        input_ids[row, : len(ids)] = torch.from_numpy(ids)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return input_ids, attention_mask
