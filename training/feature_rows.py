"""Rows of cached features for batches: on the GPU if they fit, else gathered into pinned memory by a thread."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from runtime.device import pin, to_device

MAX_FREE_SHARE = 0.5  # of a GPU's free memory; the rest is for gradients, optimizer state and activations
MAX_BYTES_ELSEWHERE = 2**30  # on MPS, which does not report its free memory
AHEAD = 3  # micro-batches that `prefetch` prepares

Item, Result = TypeVar("Item"), TypeVar("Result")


class FeatureRows:
    """Features (rows, ...) from which batches take rows in two parts: `gather` in any thread, then `finish`.

    For a GPU, `gather` returns pinned memory: the numbers of the rows if the features are on the GPU, where `finish`
    takes the rows, else the rows themselves. On a CPU `gather` returns the rows.
    """

    def __init__(self, rows: Tensor, device: torch.device):
        self.device, self.rows = device, _place(rows, device)
        self.is_placed = self.rows.device.type != "cpu"

    def gather(self, numbers: np.ndarray) -> Tensor:
        """Return the rows with these numbers, or what `finish` needs to return them."""
        numbers = torch.from_numpy(numbers)
        if self.is_placed:
            return pin(numbers, self.device)
        if self.device.type != "cuda":
            return self.rows[numbers]
        # A new buffer each time: PyTorch uses its memory again once the copy to the GPU has ended.
        buffer = torch.empty(len(numbers), *self.rows.shape[1:], dtype=self.rows.dtype, pin_memory=True)
        return torch.index_select(self.rows, 0, numbers, out=buffer)

    def finish(self, gathered: Tensor) -> Tensor:
        """Return the rows for what `gather` has returned."""
        return self.rows[to_device(gathered, self.device)] if self.is_placed else gathered


def prefetch(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) for each item in order, computed by a thread up to AHEAD items in advance."""
    items = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as executor:
        pending = deque(executor.submit(function, item) for item in islice(items, AHEAD))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(executor.submit(function, item) for item in islice(items, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()


def _place(rows, device):
    """Copy rows to the device if they leave enough of its memory free."""
    size = rows.numel() * rows.element_size()
    if device.type == "cpu":
        return rows
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if size > MAX_FREE_SHARE * free:
            return rows
    elif size >= MAX_BYTES_ELSEWHERE:
        return rows
    try:
        return rows.to(device)
    except torch.OutOfMemoryError:  # in pieces that are too small
        return rows
