"""Limit the memory that building a model takes, before it is allocated: its sizes may be from a stranger's file."""

import math

from torch.utils._python_dispatch import TorchDispatchMode

CREATED = ("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "randint", "arange", "linspace", "eye")


class LimitAllocation(TorchDispatchMode):
    """A context in which new tensors may have `max_bytes` bytes in total, and be `max_tensors` in number.

    Raises ValueError before the allocation that would exceed a limit. All operations are otherwise unchanged.
    """

    def __init__(self, max_bytes: int, max_tensors: int):
        super().__init__()
        self.bytes_left, self.tensors_left = max_bytes, max_tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in CREATED:
            self.tensors_left -= 1
            self.bytes_left -= _bytes(name, args, kwargs or {})
            if self.bytes_left < 0 or self.tensors_left < 0:
                raise ValueError("its settings describe a model that is larger than the weights in the checkpoint")
        return func(*args, **(kwargs or {}))


def _bytes(name, args, kwargs):
    """Return the bytes of the tensor that a call creates."""
    itemsize = getattr(kwargs.get("dtype"), "itemsize", 4)
    numbers = [arg for arg in args if isinstance(arg, int | float)]
    if name in ("arange", "eye"):
        start, end, step = ([0, *numbers, 1] if len(numbers) == 1 else [*numbers, 1])[:3]
        elements = (end - start) / step if name == "arange" and step else math.prod(numbers[:2] or [1])
    elif name == "linspace":
        elements = numbers[2] if len(numbers) > 2 else 0
    else:
        sizes = next((arg for arg in args if isinstance(arg, list | tuple)), ())
        elements = math.prod(sizes)
    return max(0, elements) * itemsize
