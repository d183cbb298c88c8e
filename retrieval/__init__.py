"""Embed photos and captions once, cache the embeddings on disk, rank them, and measure the ranking.

The public functions are `retrieval.top_k` and `retrieval.retrieval_metrics`; PyTorch is loaded at their first use.
"""

import importlib

_PUBLIC = {"top_k": "retrieval.exact_search", "retrieval_metrics": "retrieval.metrics"}
__all__ = ["retrieval_metrics", "top_k"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'retrieval' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
