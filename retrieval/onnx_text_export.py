"""Export a text tower with its head for onnx_text.py, so that later searches start without PyTorch."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from data.tokenizer import pad, tokenize
from modules import CLIPModel
from retrieval.encoder import Encoder
from retrieval.model_export import TOLERANCE, tower_to_onnx
from retrieval.onnx_text import (
    EXPORT_LIBRARIES,
    INPUTS,
    MODEL,
    SETTINGS,
    TOKENIZER,
    VERSION,
    OnnxTextEncoder,
    refusal_file,
)
from retrieval.searcher import Searcher, searcher_for_pretrained, searcher_for_run
from runtime import cli
from runtime.atomic_io import new_folder
from runtime.cache import load_cached
from runtime.run_dir import BEST, TOWERS, is_shared_run

PROBES = ("a dog in snow", "two people", "a red car parks beside a very old house with a green door and flowers")


def export_text_encoder(encoder: Encoder, model: CLIPModel, folder: Path) -> bool:
    """Write the folder for OnnxTextEncoder; return whether that was possible.

    It is not for slow tokenizers, for towers that PyTorch cannot export, without the libraries `onnx` and `onnxscript`,
    and if an embedding differs from PyTorch's by more than TOLERANCE: queries are then encoded with PyTorch.
    """
    if not (encoder.tokenizer.is_fast and all(map(importlib.util.find_spec, EXPORT_LIBRARIES))):
        return False
    model = model.float().cpu().eval()
    token_ids = tokenize(encoder.tokenizer, PROBES, max_tokens=encoder.max_tokens)
    inputs = pad(list(token_ids), encoder.tokenizer.pad_token_id)
    try:
        with new_folder(folder) as temporary:
            shapes = [{0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}] * 2
            path = temporary / MODEL
            tower_to_onnx(model.encode_text, inputs, list(INPUTS), "text_emb", shapes, path, external_weights=True)
            encoder.tokenizer.backend_tokenizer.save(str(temporary / TOKENIZER))
            settings = {
                "version": VERSION,
                "max_tokens": encoder.max_tokens,
                "csls": encoder.query_bank is not None,
                "dual_encoder": model.text_encoder.pooling == "own",
                "special_tokens": {role: str(token) for role, token in encoder.tokenizer.special_tokens_map.items()},
            }
            (temporary / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
            _require_equal(OnnxTextEncoder(temporary), model, token_ids, encoder.tokenizer.pad_token_id)
    except ValueError:
        return False
    return True


def _require_equal(onnx_encoder, model, token_ids, pad_id):
    """Raise ValueError unless the exported tower gives PyTorch's embeddings of PROBES."""
    exported = onnx_encoder.encode(PROBES)
    with torch.no_grad():
        expected = np.concatenate([model.encode_text(*pad([ids], pad_id)).numpy() for ids in token_ids])
    if not np.abs(exported - expected).max() <= TOLERANCE:
        raise ValueError("the exported text tower differs from PyTorch's")


def prepare(searcher: Searcher) -> bool:
    """Export the text tower of a searcher's model into its cache, unless it is there; return whether it is there."""
    folder = searcher.text_encoder_folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.is_dir() and load_cached(folder, OnnxTextEncoder):
            return True
        shutil.rmtree(folder, ignore_errors=True)
        searcher.text_only = True
        exported = export_text_encoder(*searcher.text_model(), folder)
        if not exported:
            refusal_file(folder).touch()
        return exported


def main() -> None:
    """Prepare a run or a pretrained model: `python -m retrieval.onnx_text_export RUN_OR_MODEL CACHE_DIR [DIMS]`."""
    source, cache_dir, *dims = sys.argv[1:]
    options = {"device": "cpu", "precision": "float32", "cache_dir": Path(cache_dir)}
    folder = Path(source)
    is_run = (folder / BEST).is_file() or (is_shared_run(folder) and (folder / TOWERS).is_dir())
    if is_run:
        prepare(searcher_for_run(folder, embed_dims=int(dims[0]) if dims else None, **options))
    else:
        prepare(searcher_for_pretrained(source, **options))


if __name__ == "__main__":
    cli.run(main)
