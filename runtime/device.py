"""Device, precision and number of loader processes."""

import ctypes
import os

import torch

from runtime.launcher import local_rank, num_processes, processes_on_this_machine

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def pick_device(name: str) -> torch.device:
    """Return the device with that name; "auto" selects the first available one of CUDA, MPS (Apple) and CPU.

    Raises ValueError if the device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_available in available.items() if is_available)
    if name not in available:
        kind, _, number = name.partition(":")
        choice = f"CUDA_VISIBLE_DEVICES={number} and --device cuda" if kind == "cuda" and number else "auto or cpu"
        raise ValueError(f"--device {name}: it takes auto, cuda, mps or cpu; use {choice}")
    if not available[name]:
        raise ValueError(f"--device {name}: {_reason_against(name)}; use auto or cpu")
    if name == "cpu":
        keep_freed_memory()
    elif name == "cuda":
        _set_cuda_backends()
    return torch.device(name)


def _reason_against(name):
    """Return why PyTorch finds no device with that name."""
    version = f"PyTorch {torch.__version__}"
    if name == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return f"this {version} was built without CUDA"
    if name == "cuda" and os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        value = os.environ["CUDA_VISIBLE_DEVICES"].strip()
        return f"CUDA_VISIBLE_DEVICES is {value or 'empty'}, which hides all GPUs: unset it"
    if name == "cuda":
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # no driver, or one that is too old
            reason = str(error).partition("\n")[0].partition(". Please")[0].rstrip(".")
            return f"{version} finds no such device ({reason})"
    return f"{version} finds no such device"


def _set_cuda_backends():
    """Compute float32 in full, where PyTorch's default mixes TF32 convolutions with exact products of matrices.

    Towers compute in bfloat16 or float16 anyway, unless --precision float32 asks for float32. cuDNN chooses its
    algorithms by rules: those that it would choose by timing can differ between two starts, and a resumed run then
    would not continue exactly.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


def use_own_gpu() -> None:
    """Let this process of a launcher use the GPU with its number; without a launcher or GPUs this does nothing."""
    if num_processes() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())


def keep_freed_memory() -> None:
    """Stop glibc from returning freed memory to the system; without glibc this does nothing.

    By default, the memory of every large tensor is returned, and the system clears it page by page before its next use.
    That takes a third of a training step on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # not Linux, or another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype with that name; "auto" selects bfloat16 if the hardware supports it.

    Otherwise "auto" selects float16 on older CUDA GPUs and float32 elsewhere.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_supports_bfloat16() else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return a context manager in which towers and heads compute in `precision`."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def pin(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor in pinned memory, from which a copy to a GPU needs no wait; on other devices unchanged."""
    if device.type != "cuda" or tensor.is_cuda or tensor.is_pinned():
        return tensor
    return tensor.pin_memory()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device; to a GPU from pinned memory, without a wait."""
    return pin(tensor, device).to(device, non_blocking=device.type == "cuda")


def pick_workers(num_workers: int, device: torch.device) -> int:
    """Return the number of DataLoader workers; a negative `num_workers` selects it automatically.

    On a CPU the training step needs the cores, and one worker loads images faster than the step consumes them.
    """
    if num_workers >= 0:
        return num_workers
    return 1 if device.type == "cpu" else max(1, min(8, usable_cores() // processes_on_this_machine()))


def usable_cores() -> int:
    """Return the number of cores that this process may use, which a container or a job scheduler can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_supports_bfloat16():
    # Without these instructions bfloat16 is emulated, which is slower than float32.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
