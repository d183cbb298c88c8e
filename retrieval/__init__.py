"""Embed photos and captions once, keep the embeddings on disk, rank them, measure the ranking.

`retrieval.top_k` and `retrieval.retrieval_metrics` are public; they load PyTorch when first used.
"""

import importlib

_PUBLIC = {"top_k": "retrieval.exact_search", "retrieval_metrics": "retrieval.metrics"}
__all__ = ["retrieval_metrics", "top_k"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'retrieval' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
