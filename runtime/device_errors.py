"""Errors of GPUs, of memory, of compilers and of lost processes, as one line each that says what to do."""

import re

import torch

# A GPU raises torch.OutOfMemoryError; PyTorch's CPU allocator raises a plain RuntimeError.
ALLOCATORS = "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "out of memory"
NO_CODE = "no kernel image is available"  # the PyTorch package has no code for this GPU
LOST = (  # what gloo, NCCL and PyTorch's store report when another process has gone
    *("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Socket Timeout", "NCCL"),
    *("ncclSystemError", "ncclRemoteError", "failed to recv", "wait timeout after", "Timed out waiting"),
)
COMPILERS = "BackendCompilerFailed", "InductorError", "InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton"

COMPILE_NEEDS = "it needs a C++ compiler on a CPU, and Triton on a GPU (on Windows: pip install triton-windows)"


def describe_failure(error: BaseException) -> str | None:
    """Return what to do about an error of the machine, as one line, or None if `error` is another one."""
    reason = " ".join(str(error).partition("\n")[0].split())[:200]
    kind, message = type(error).__name__, str(error)
    if is_out_of_memory(error):
        found = f" ({reason})" if reason else ""
        return f"out of memory{found}: close other programs that use this memory, or take a smaller model or batch"
    if isinstance(error, NotImplementedError) and "MPS device" in message:
        operator = message.partition("'")[2].partition("'")[0] or "an operator"
        return (
            f"PyTorch {torch.__version__} has no {operator} for Apple's GPUs: set PYTORCH_ENABLE_MPS_FALLBACK=1, which "
            "computes it on the CPU, or pass --device cpu"
        )
    if kind in COMPILERS:
        return f"--compile failed ({reason}): {COMPILE_NEEDS}, or leave it out"
    if NO_CODE in message:
        return f"this PyTorch {torch.__version__} has no code for this GPU: install one that has, or pass --device cpu"
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or reason.startswith(("CUDA error", "CUDA driver")):
        return f"the GPU failed ({reason}): check that no other program uses it, and its driver, or pass --device cpu"
    if isinstance(error, RuntimeError) and any(sign in message for sign in LOST):
        reason = re.sub(r"^\[[^]]*\] ", "", reason.partition(". This is")[0])
        return f"the connection to another process was lost ({reason}): see what that one printed"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, that of the computer or that of a GPU."""
    kinds = MemoryError | torch.OutOfMemoryError
    is_text = isinstance(error, RuntimeError) and any(name in str(error) for name in ALLOCATORS)
    return isinstance(error, kinds) or is_text


def memory_advice(error: Exception, images: int) -> str | None:
    """Return what to do if `error` means that memory ran out with this many images at a time, else None."""
    if is_out_of_memory(error):
        return (
            f"out of memory with {images} images at a time: lower --micro-batch-size (the loss still covers all images "
            f"of --batch-size) to {max(1, images // 2)} or less"
        )
    if "DataLoader worker" in str(error):
        return "a process that loads photos was killed, probably because memory ran out: lower --num-workers"
    return None
