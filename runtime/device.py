"""Where to compute, and in which precision."""

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first of CUDA, MPS (Apple) and CPU that is there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees no such device here; use auto or cpu")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let what is freed stay with the process (glibc; elsewhere this does nothing).

    By default every large tensor's memory goes back to the system, which clears it page by page before the next one
    may have it: a third of a training step on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # not Linux, or another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 where the hardware has it, float16 on older GPUs, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_computes_bfloat16() else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which towers and heads compute in `precision`."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def pick_workers(num_workers: int, device: torch.device) -> int:
    """How many loader processes; on a CPU the step itself wants the cores, and one process keeps ahead of it."""
    if num_workers >= 0:
        return num_workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # that a launcher started on this machine
    return 1 if device.type == "cpu" else max(1, min(8, (os.cpu_count() or 1) // processes))


def memory_advice(error: Exception, images: int) -> str | None:
    """What to do about a lack of memory with so many images at a time; None where the error is another one."""
    # torch.OutOfMemoryError is that of a GPU; the CPU allocator raises a plain RuntimeError.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return (
            f"out of memory with {images} images at a time: lower --micro-batch-size (the loss stays that of "
            f"--batch-size) to {max(1, images // 2)} or less"
        )
    if "DataLoader worker" in str(error):
        return "a process that loads photos was killed, as a lack of memory does: lower --num-workers"
    return None


def _cpu_computes_bfloat16():
    # Without these instructions bfloat16 is emulated and slower than float32.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
