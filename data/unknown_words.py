"""Words that a text tower's tokenizer does not know: their share of the captions, examples, and a tower that fits.

An unknown word becomes a token that is the same for all unknown words ([UNK], <unk>). Byte-level tokenizers have none.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from runtime.text import display_text

if TYPE_CHECKING:  # a query that is encoded without PyTorch imports neither
    from transformers import PreTrainedTokenizerBase

    from data.tokenizer import Tokens

WARN_ABOVE, REFUSE_ABOVE = 0.1, 0.5  # share of the tokens
SAMPLE = 5_000  # captions that decide before a run's folder exists; of fewer, all
EXAMPLES, EXAMPLE_CAPTIONS, MAX_EXAMPLE = 3, 200, 20  # words, captions that are searched for them, characters of each
OTHER_SCRIPTS = (
    "sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
    "google/siglip-base-patch16-256-multilingual",
)
TOWERS = {  # script -> a text tower, a dual encoder; for all others OTHER_SCRIPTS
    "Chinese": ("bert-base-chinese", "OFA-Sys/chinese-clip-vit-base-patch16"),
    "Korean": ("klue/bert-base", OTHER_SCRIPTS[1]),
}
SCRIPT_OF_NAME = {  # first word of a character's Unicode name -> script; others are called as the word
    "CJK": "Chinese",
    "HANGUL": "Korean",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "HALFWIDTH": "Japanese",
}


def unknown_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids of the tokens that stand for unknown words; none if such a token has another purpose, as in CLIP.

    The tokenizer's own attribute and its vocabulary model may name different tokens.
    """
    names = {tokenizer.unk_token}
    if tokenizer.is_fast:
        names.add(getattr(tokenizer.backend_tokenizer.model, "unk_token", None))
    other_roles = {name for role, name in tokenizer.special_tokens_map.items() if role != "unk_token"}
    return set(tokenizer.convert_tokens_to_ids(sorted(names - {None} - other_roles))) - {None}


def count_unknown(tokenizer: "PreTrainedTokenizerBase", tokens: "Tokens") -> tuple[np.ndarray, int]:
    """Count each caption's unknown tokens (M,), and all tokens of the captions, without [CLS], [SEP] and the like."""
    unknown = unknown_ids(tokenizer)
    special = set(tokenizer.all_special_ids) - unknown
    counts = [_count_per_caption(tokens, ids)[tokens.rows] for ids in (unknown, special)]
    return counts[0], int(np.diff(tokens.starts)[tokens.rows].sum() - counts[1].sum())


def _count_per_caption(tokens, ids):
    """Return how often these ids occur in each of the K distinct captions, (K,)."""
    found = np.cumsum(np.isin(tokens.flat, list(ids)))
    return np.diff(np.concatenate([[0], found])[tokens.starts])


def describe_unknown_words(
    tokenizer: "PreTrainedTokenizerBase", captions: Sequence[str], tokens: "Tokens", *, dual_encoder: bool = False
) -> str | None:
    """Return a line about the captions' unknown words, None if there are none. Above 10 % it names a tower that fits.

    dual_encoder: whether the tower is part of a pretrained dual encoder (--model), which is then what to replace.
    """
    counts, total = count_unknown(tokenizer, tokens)
    if not counts.any():
        return None
    share, examples, script = _examine(tokenizer, captions, counts, total)
    line = f"{share:.1%} of the caption tokens are words that the text tower does not know{examples}"
    return line if share <= WARN_ABOVE else f"warning: {line}; for this text use {advice(script, dual_encoder)}"


def require_known_words(
    tokenizer: "PreTrainedTokenizerBase", captions: Sequence[str], *, max_tokens: int, dual_encoder: bool
) -> None:
    """Raise ValueError if more than half of the captions' tokens are unknown words.

    Of more than twice SAMPLE captions, evenly spaced ones are examined.
    """
    from data.tokenizer import tokenize

    sample = captions[:: max(1, len(captions) // SAMPLE)]
    counts, total = count_unknown(tokenizer, tokenize(tokenizer, sample, max_tokens=max_tokens))
    if counts.sum() > REFUSE_ABOVE * total:
        share, examples, script = _examine(tokenizer, sample, counts, total)
        raise ValueError(
            f"the text tower does not know {share:.0%} of the words in the training captions{examples}: use "
            f"{advice(script, dual_encoder)}, or train all the same with --allow-unknown-words"
        )


def _examine(tokenizer, captions, counts, total):
    """Return the share of unknown tokens, examples of them for a message, and their script."""
    affected = np.flatnonzero(counts)
    sample = [captions[index] for index in affected[:: -(-len(affected) // EXAMPLE_CAPTIONS)]]
    words = Counter(word for caption in sample for word in find_unknown_words(tokenizer, caption))
    examples = ", ".join(display_text(word, MAX_EXAMPLE) for word, _ in words.most_common(EXAMPLES))
    return counts.sum() / total, f", e.g. {examples}" if examples else "", script_of("".join(words), "".join(sample))


def find_unknown_words(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[str]:
    """Return the unknown words of a text, as they are written there."""
    unknown = unknown_ids(tokenizer)
    if not unknown:
        return []
    if tokenizer.is_fast:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        words = [text[start:stop].strip() for token, (start, stop) in spans if token in unknown]
    else:
        ids = {word: tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"] for word in text.split()}
        words = [word for word in text.split() if not unknown.isdisjoint(ids[word])]
    return [word for word in words if word]


def describe_unknown_query(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, kind: str = "sentence", dual_encoder: bool = False
) -> str | None:
    """Return a line about the words of a query or label that the model does not know, None if it knows all.

    Raises ValueError if it knows none: such a query would rank the photos by nothing that it says.
    """
    words = list(dict.fromkeys(find_unknown_words(tokenizer, text)))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    known = tokenizer.convert_ids_to_tokens([token for token in ids if token not in unknown_ids(tokenizer)])
    # Punctuation alone says nothing, unless the query is nothing else.
    known = [token for token in known if any(map(str.isalnum, token))] if words else known
    script = script_of("".join(words), text)
    hint = f"; {script or 'this text'} needs a model with {advice(script, dual_encoder)}" if words else ""
    if not known:
        raise ValueError(f"the model knows no word of the {kind} {text[:60]!r}{hint}")
    if not words:
        return None
    listed = ", ".join(display_text(word, MAX_EXAMPLE) for word in words[: 2 * EXAMPLES])
    more = f" and {len(words) - 2 * EXAMPLES} more" if len(words) > 2 * EXAMPLES else ""
    hint = hint if len(ids) - len(known) > WARN_ABOVE * len(ids) else ""
    return f"the model does not know these words of the {kind}: {listed}{more}{hint}"


def script_of(words: str, context: str = "") -> str | None:
    """Return the script of most letters in `words`: "Latin", "Chinese", "Cyrillic" ...; None without letters.

    Chinese characters are Japanese if the context contains kana.
    """
    script = max(counts := _count_scripts(words), key=counts.get, default=None)
    kana = _count_scripts(context)["Japanese"]
    return "Japanese" if script == "Chinese" and kana > WARN_ABOVE * len(context) else script


def _count_scripts(text):
    names = (unicodedata.name(character, "").split(" ")[0] for character in text if character.isalpha())
    return Counter(SCRIPT_OF_NAME.get(name, name.capitalize()) for name in names if name)


def advice(script: str | None, dual_encoder: bool = False) -> str:
    """Return the flags of a tower that knows a script, e.g. "--text-encoder scratch or bert-base-chinese"."""
    text_encoder, model = TOWERS.get(script, OTHER_SCRIPTS)
    if dual_encoder:
        return f"--model {model}, or two towers with --text-encoder scratch or {text_encoder}"
    return f"--text-encoder scratch or {text_encoder}"


def describe_language(captions: Sequence[str], *, text_encoder: str) -> str | None:
    """Return a line if many letters of the captions are not Latin: the default `text_encoder` knows English only.

    For a report without a tokenizer. Evenly spaced captions are examined.
    """
    text = "".join(captions[:: max(1, len(captions) // EXAMPLE_CAPTIONS)])
    counts = _count_scripts(text)
    share = 1 - counts["Latin"] / max(1, counts.total())
    if share <= WARN_ABOVE or not counts.total():
        return None
    foreign = "".join(character for character in text if not _count_scripts(character)["Latin"])
    script = script_of(foreign, text)
    return (
        f"{share:.0%} of the letters are not Latin, most are {script}: the default text tower {text_encoder} is for "
        f"English; train with {advice(script)}"
    )
