"""Captions to token ids: with a pretrained text tower's tokenizer, or a WordPiece vocabulary learned from captions."""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from runtime.atomic_io import replace_file
from runtime.text import HAN

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
CHUNK = 10_000  # captions tokenised at a time: the library keeps much more of each than its ids
VOCABULARY_SIZE = 8192  # at most; 30,000 captions of Flickr8k hold about as many distinct words
CHINESE = re.compile(f"[{HAN}]")


def load_tokenizer(folder_or_name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a transformers text model, from a folder or from the hub."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder_or_name), trust_remote_code=False)
    tokenizer.chat_template = None  # unused; older transformers write each one to a file of the name it brings
    return tokenizer


def train_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """An uncased WordPiece tokenizer whose vocabulary is learned from the captions; needs no network.

    Chinese is read character by character, so that every character of the captions is in the vocabulary.
    """
    from tokenizers import BertWordPieceTokenizer

    trained = BertWordPieceTokenizer(lowercase=True)  # splits Chinese into characters
    # The trainer numbers the letters it meets in an order that changes from call to call, those given here do not.
    letters = sorted(
        {letter for caption in captions for letter in trained._tokenizer.normalizer.normalize_str(caption)}
    )
    trained.train_from_iterator(
        captions,
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        limit_alphabet=VOCABULARY_SIZE,  # the default of 1,000 would leave most of Chinese unknown
        show_progress=False,
        special_tokens=[*SPECIAL_TOKENS.values(), *(f"##{letter}" for letter in letters if _continues(letter))],
    )
    # Built anew from the vocabulary, it also frames each caption with [CLS] and [SEP].
    wordpiece = BertWordPieceTokenizer(vocab=trained.get_vocab(), lowercase=True)
    return PreTrainedTokenizerFast(tokenizer_object=wordpiece._tokenizer, **SPECIAL_TOKENS)


def _continues(letter):
    """Whether a word may go on with it; a Chinese character is a word of its own."""
    return not letter.isspace() and not CHINESE.match(letter)


@dataclass(frozen=True, eq=False)
class Tokens(Sequence):
    """The token ids of M captions, unpadded: tokens[m] is int32, (L,). Captions of the same words share theirs."""

    flat: np.ndarray  # int32, those of all distinct captions one after another
    starts: np.ndarray  # (K + 1,) int64, where each distinct caption begins in it
    rows: np.ndarray  # (M,) int64, which distinct caption each caption is

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
    """The token ids of captions, special tokens included, at most `max_tokens` each; kept in `cache_dir` if given."""
    place = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    rows = np.array([place[caption] for caption in captions], dtype=np.int64)
    if cache_dir is None:
        return Tokens(*_encode(tokenizer, list(place), max_tokens), rows)
    file = Path(cache_dir) / "tokens" / f"{fingerprint(tokenizer, place, max_tokens)}.npz"
    try:
        with np.load(file) as kept:
            return Tokens(kept["flat"], kept["starts"], rows)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        pass  # not there yet, or left incomplete by a full disk
    flat, starts = _encode(tokenizer, list(place), max_tokens)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda unfinished: _save(unfinished, flat, starts))
    return Tokens(flat, starts, rows)


def _save(path, flat, starts):
    with path.open("wb") as file:  # given a name, NumPy would add .npz to it
        np.savez(file, flat=flat, starts=starts)


def _encode(tokenizer, captions, max_tokens):
    parts, lengths = [np.empty(0, np.int32)], [0]
    with _all_cores():
        for first in range(0, len(captions), CHUNK):
            chunk = captions[first : first + CHUNK]
            ids = tokenizer(chunk, truncation=True, max_length=max_tokens, return_attention_mask=False)["input_ids"]
            lengths.extend(map(len, ids))
            parts.append(np.fromiter(chain.from_iterable(ids), np.int32))
    return np.concatenate(parts), np.cumsum(lengths)


@contextmanager
def _all_cores():
    """Scripts keep tokenizers from starting threads, which loader processes would warn of; here are none yet."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


def fingerprint(tokenizer: PreTrainedTokenizerBase, captions: Iterable[str], max_tokens: int) -> str:
    """Changes with the captions and with anything of the tokenizer that changes their ids."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state = {key: part for key, part in state.items() if key not in ("truncation", "padding")}  # set by each call
    else:
        state = sorted(tokenizer.get_vocab().items()), repr(tokenizer)
    digest = hashlib.sha256(json.dumps([state, max_tokens], sort_keys=True).encode())
    digest.update("\0".join(captions).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def describe_truncation(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], token_ids: Sequence[np.ndarray], *, max_tokens: int
) -> str | None:
    """A line about captions that are longer than `max_tokens`, whose end is not read, or None without any."""
    full = [caption for caption, ids in zip(captions, token_ids, strict=True) if len(ids) == max_tokens]
    cut = [caption for caption in full if len(tokenizer(caption)["input_ids"]) > max_tokens]
    if not cut:
        return None
    return f"{len(cut):,} captions are longer than {max_tokens} tokens and lose their end, e.g. {cut[0][:60]!r}"


def pad(token_ids: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, both (M, L), with L the longest caption of this batch and not of the data set."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    input_ids = torch.full((len(token_ids), int(lengths.max())), pad_id)
    for row, ids in enumerate(token_ids):
        input_ids[row, : len(ids)] = torch.from_numpy(ids)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return input_ids, attention_mask
