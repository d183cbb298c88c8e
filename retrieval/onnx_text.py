"""Encode a query with ONNX Runtime: a sentence becomes an embedding without importing PyTorch or transformers.

`onnx_text_export.py` writes the folder that is read here: text.onnx with its weights in text.onnx.data, which are
memory-mapped, tokenizer.json and settings.json.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.launcher import process_rank

SETTINGS, TOKENIZER, MODEL = "settings.json", "tokenizer.json", "text.onnx"
VERSION = 1  # of the folder's content
INPUTS = ("input_ids", "attention_mask")
# ONNX Runtime rearranges the weights for faster products when it opens a file. That takes as long as it saves in ten
# sentences, and a command has one.
PREPACK_AFTER = 10
EXPORT_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def text_encoder_folder(cache_dir: Path, key: str) -> Path:
    """Return the folder of the text encoder with these weights (`model_key.py`), whether it exists or not."""
    return cache_dir / "text_encoders" / key[:24]


def is_available() -> bool:
    """Return whether the libraries that read an exported text encoder are installed."""
    return all(importlib.util.find_spec(name) for name in ("onnxruntime", "tokenizers"))


def export_in_background(
    source: Path | str, cache_dir: Path, folder: Path, *, is_damaged: bool = False, embed_dims: int | None = None
) -> None:
    """Start a process that writes `folder` for the next search, unless it exists or cannot be written.

    source: the run's folder, or the name or folder of a pretrained model. is_damaged: replace a folder that exists.
    embed_dims: the first values of a run's embeddings that are used, None for all. The process has a low priority, and
    goes on if this one ends. The environment variable NO_BACKGROUND_EXPORT prevents it.
    """
    can_export = all(importlib.util.find_spec(name) for name in EXPORT_LIBRARIES)
    is_done = (folder.is_dir() and not is_damaged) or refusal_file(folder).is_file()
    if is_done or not can_export or os.environ.get("NO_BACKGROUND_EXPORT"):
        return
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_suffix(".lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # another process exports it already, or the cache cannot be written to
        return
    lock.release()
    source = os.path.abspath(source) if os.path.exists(source) else source
    dims = [] if embed_dims is None else [str(embed_dims)]
    process = subprocess.Popen(
        [sys.executable, "-m", "retrieval.onnx_text_export", str(source), os.path.abspath(cache_dir), *dims],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, process.pid, 15)


def export_run_in_background(folder: Path, cache_dir: Path) -> None:
    """Start `export_in_background` for a run that has finished training; never raises an exception.

    Of several processes that have trained it, the first one does.
    """
    from retrieval.model_key import weights_key

    if process_rank() > 0:
        return
    try:
        export_in_background(folder, cache_dir, text_encoder_folder(cache_dir, weights_key(folder)))
    except Exception:  # the run is complete without it, and the first search tries again
        return


def refusal_file(folder: Path) -> Path:
    """Return the file that exists if the text encoder of `folder` cannot be exported."""
    return folder.with_suffix(".refused")


class OnnxTextEncoder:
    """A text tower with its head, run on the CPU. Raises an exception of any type if `folder` is damaged."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
        if settings["version"] != VERSION:
            raise ValueError(f"{folder} was written by another version")
        self.max_tokens, self.csls = int(settings["max_tokens"]), bool(settings["csls"])
        self.dual_encoder = bool(settings["dual_encoder"])
        self.tokenizer = QueryTokenizer(Tokenizer.from_file(str(folder / TOKENIZER)), settings["special_tokens"])
        self.folder, self.remaining = folder, PREPACK_AFTER
        self.session = self._open_session(prepacked=False)

    def _open_session(self, *, prepacked):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if not prepacked:
            options.add_session_config_entry("session.disable_prepacking", "1")
        path = str(self.folder / MODEL)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def _count(self, sentences):
        """Open the session anew with rearranged weights before the sentence with which that pays."""
        if self.remaining > 0:
            self.remaining -= sentences
            if self.remaining <= 0:
                self.session = self._open_session(prepacked=True)

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Encode sentences, truncated to max_tokens -> unit rows (Q, D) float32."""
        self._count(len(sentences))
        rows = []
        for sentence in sentences:  # one at a time: padding would cost more than the few calls
            ids = np.array([self.tokenizer.ids(sentence, self.max_tokens)], np.int64)
            rows.append(self.session.run(None, dict(zip(INPUTS, (ids, np.ones_like(ids)), strict=True)))[0])
        return np.concatenate(rows)


class QueryTokenizer:
    """The part of transformers' tokenizer interface that describes a query, on the tokenizers library alone."""

    is_fast = True

    def __init__(self, backend_tokenizer, special_tokens: dict[str, str]):
        backend_tokenizer.no_padding()
        self.backend_tokenizer, self.special_tokens_map = backend_tokenizer, special_tokens
        self.unk_token = special_tokens.get("unk_token")

    def ids(self, text: str, max_tokens: int) -> list[int]:
        """Return the token ids of a text with special tokens, truncated to max_tokens."""
        self.backend_tokenizer.enable_truncation(max_tokens)
        return self.backend_tokenizer.encode(text).ids

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_) -> dict:
        self.backend_tokenizer.no_truncation()
        encoding = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": encoding.ids, "offset_mapping": encoding.offsets}

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        """Return the ids of tokens; None for a token that is not in the vocabulary."""
        return [self.backend_tokenizer.token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ids."""
        return [self.backend_tokenizer.id_to_token(token) for token in ids]
