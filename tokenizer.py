"""Captions to token ids: with a pretrained text tower's tokenizer, or a WordPiece vocabulary learned from captions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
VOCABULARY_SIZE = 8192  # at most; 30,000 captions of Flickr8k hold about as many distinct words


def load_tokenizer(folder_or_name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a transformers text model, from a folder or from the hub."""
    return AutoTokenizer.from_pretrained(str(folder_or_name))


def train_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """An uncased WordPiece tokenizer whose vocabulary is learned from the captions; needs no network."""
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
        show_progress=False,
        special_tokens=[*SPECIAL_TOKENS.values(), *(f"##{letter}" for letter in letters if not letter.isspace())],
    )
    # Built anew from the vocabulary, it also frames each caption with [CLS] and [SEP].
    wordpiece = BertWordPieceTokenizer(vocab=trained.get_vocab(), lowercase=True)
    return PreTrainedTokenizerFast(tokenizer_object=wordpiece._tokenizer, **SPECIAL_TOKENS)


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], *, max_tokens: int) -> list[np.ndarray]:
    """One array of token ids (int32, special tokens included) per caption, unpadded, at most `max_tokens` long."""
    if not len(captions):
        return []
    encoded = tokenizer(list(captions), truncation=True, max_length=max_tokens, return_attention_mask=False)
    return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def pad(token_ids: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, both (M, L), with L the longest caption of this batch and not of the data set."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    input_ids = torch.full((len(token_ids), int(lengths.max())), pad_id)
    for row, ids in enumerate(token_ids):
        input_ids[row, : len(ids)] = torch.from_numpy(ids)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return input_ids, attention_mask
