"""Write the checkpoints and the log of a run in a background thread, while training continues."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import save_state
from runtime.atomic_io import write_text
from runtime.run_dir import BEST, LAST, LOG


class CheckpointWriter:
    """Writes best.pt, last.pt and log.jsonl of a run in this order, in one thread; a crash in between loses no epoch.

    `save` copies all tensors and returns, on a GPU without waiting for the copies. Each file is replaced atomically, as
    by save_state, so that a kill at any time leaves the previous checkpoint or the new one. An error of the thread, for
    example a full disk, is raised by the next `check`, `wait` or `save`.
    """

    def __init__(self, folder: Path, saved: str | None = None):
        """saved: the position of training in the last checkpoint, in words; None if there is none."""
        self.folder, self.saved = folder, saved
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._buffers: dict[tuple, Tensor] = {}  # of the last snapshot, used again by the next one

    def save(self, position: str, *, last: dict, best: dict | None = None, log: str | None = None) -> None:
        """Write these dicts of tensors and plain values, and the text of the log; None leaves a file as it is.

        Waits for the previous checkpoint. Raises OSError if that one could not be written.
        """
        self.wait()
        best, last = self._snapshot((best, last))
        copied = torch.cuda.Event() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        if copied:
            copied.record()
        self._pending = self._executor.submit(self._write, copied, position, best, last, log)

    def check(self) -> None:
        """Raise the error of the last checkpoint if its writing has failed already; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises OSError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def describe(self) -> str:
        """Wait for the thread, and describe the last complete checkpoint and how to continue, for a message."""
        failed = ""
        try:
            self.wait()
        except OSError as error:
            failed = f"; {error}"
        if self.saved is None:
            return f"nothing was saved yet{failed}"
        return f"{self.saved} is saved; continue with: python train.py --resume {self.folder}{failed}"

    def close(self) -> None:
        """Wait for the thread and end it; an error that `wait` did not raise yet is ignored."""
        self._executor.shutdown()

    def _write(self, copied, position, best, last, log):
        if copied:
            copied.synchronize()
        if best is not None:
            save_state(self.folder / BEST, best)
        save_state(self.folder / LAST, last)
        if log is not None:
            write_text(self.folder / LOG, log)
        self.saved = position

    def _snapshot(self, value: Any) -> Any:
        """Copy nested dicts, lists and tuples with their tensors to the CPU, those of a GPU to pinned memory."""
        previous, self._buffers = self._buffers, {}
        return self._copy(value, previous)

    def _copy(self, value, previous):
        if isinstance(value, dict):
            return {key: self._copy(item, previous) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, previous) for item in value)
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        # Both checkpoints contain the model, and towers may share weights: what is one memory is copied once.
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in self._buffers or not value.numel():
            buffer = previous.get(key)
            self._buffers[key] = (_empty_copy(value) if buffer is None else buffer).copy_(
                value, non_blocking=value.is_cuda
            )
        return self._buffers[key]


def _empty_copy(tensor):
    """Allocate a tensor like this one on the CPU, in pinned memory for one of a GPU if there is enough of it."""
    if tensor.is_cuda:
        try:
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError:
            pass  # the system limits pinned memory; copies to other memory are slower
    return torch.empty_like(tensor, device="cpu")
