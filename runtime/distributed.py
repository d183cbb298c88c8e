"""Collective operations for training with several processes (`accelerate launch`, `torchrun`).

In a single process, each function returns its input without communication.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.launcher import num_processes, processes_on_this_machine

MAX_WAIT = timedelta(minutes=30)  # in training; no step, validation or checkpoint takes as long


def init(device: torch.device) -> None:
    """Initialize the process group and assign each process its own GPU; without a launcher this does nothing.

    Raises ValueError if the processes of this machine are more than its GPUs, or if GPUs cannot communicate.
    """
    from accelerate import PartialState

    if device.type == "cuda" and num_processes() > 1:
        _check_gpus(processes_on_this_machine(), torch.cuda.device_count())
    # Rank 0 may wait for hours until another run has cached the features that this one needs too.
    PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=12))


def limit_waiting(limit: timedelta = MAX_WAIT) -> None:
    """Let a process fail that has waited this long for the others: a machine without power sends no message."""
    if _is_distributed():
        # older versions of PyTorch have only the private function
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(limit, None)


def _check_gpus(processes, gpus):
    if processes > gpus:
        raise ValueError(
            f"the launcher started {processes} processes on this machine, which has {gpus} "
            f"{'GPU' if gpus == 1 else 'GPUs'}: start as many as GPUs, or pass --device cpu"
        )
    if not (dist.is_available() and dist.is_nccl_available()):
        raise ValueError(
            "several GPUs need NCCL, which this PyTorch does not have (on Windows none has): use Linux or WSL 2, or "
            "start one process without a launcher"
        )


def cleanup() -> None:
    """Wait for all processes, then destroy the process group, so that no rank exits during a collective."""
    if _is_distributed():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0; only rank 0 prints and writes files."""
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if _is_distributed() else 1


def shard_slice(items: int) -> slice:
    """Return this process's contiguous slice of a range of items."""
    return slice(items * rank() // world_size(), items * (rank() + 1) // world_size())


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Gather the rows (n,) or (n, D) of all processes: `gather_tensors` of a single tensor."""
    return gather_tensors([rows])[0]


def gather_tensors(tensors: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Gather several tensors of rows, (n,) or (n, D) each, from all processes in rank order; no gradient flows back.

    Returns for each tensor the gathered rows, on its device, and the index of this process's first row among them. n
    may differ between processes; a process without rows may pass an empty tensor without D. Sizes are exchanged once
    for all tensors, which is the only time that the host waits for the device.
    """
    if not _is_distributed():
        return [(tensor, 0) for tensor in tensors]
    sizes = _gather_sizes(tensors)
    return [_gather_padded(tensor, [of_rank[k] for of_rank in sizes]) for k, tensor in enumerate(tensors)]


def _gather_sizes(tensors):
    """Length and number of columns (0: one-dimensional) of each tensor on each rank: rank -> tensor -> (n, D)."""
    own = torch.tensor([[len(tensor), *tensor.shape[1:], 0][:2] for tensor in tensors])
    own = (own.pin_memory() if dist.get_backend() == "nccl" else own).to(_device(own), non_blocking=True)
    everyone = own.new_empty(world_size(), *own.shape)
    dist.all_gather(list(everyone.unbind()), own)
    return everyone.tolist()


def _gather_padded(tensor, sizes):
    longest, columns = max(length for length, _ in sizes), max(columns for _, columns in sizes)
    shape = (columns,) if columns else ()
    # collectives know no bool
    rows = tensor.detach().view(torch.uint8) if tensor.dtype == torch.bool else tensor.detach()
    padded = rows.new_zeros(longest, *shape, device=_device(rows))
    if len(rows):
        padded[: len(rows)] = rows
    everyone = padded.new_empty(len(sizes), longest, *shape)
    if longest:
        dist.all_gather(list(everyone.unbind()), padded)
    gathered = torch.cat([shard[:length] for shard, (length, _) in zip(everyone, sizes, strict=True)])
    start = sum(length for length, _ in sizes[: rank()])
    return gathered.to(tensor.device).view(tensor.dtype), start


def _device(tensor):
    """Where a collective takes a tensor from: NCCL knows GPUs only."""
    return tensor.device if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())


def all_gather_list(items: list) -> list:
    """Concatenate the lists of all processes in rank order."""
    if not _is_distributed():
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def broadcast_object(value: Any) -> Any:
    """Return the value that rank 0 passes; the values of the other ranks are ignored."""
    if not _is_distributed():
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def broadcast_parameters(model: nn.Module) -> None:
    """Copy the parameters and buffers of rank 0 to all processes."""
    if _is_distributed():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, 0)


def all_reduce_max(value: Tensor) -> Tensor:
    """Replace `value` in place by its maximum over all processes, and return it."""
    if _is_distributed():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def all_reduce_sum(value: Tensor) -> Tensor:
    """Replace `value` in place by its sum over all processes, and return it."""
    if _is_distributed():
        dist.all_reduce(value)
    return value


def gather_batch_norm_stats(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return the running statistics of each process, on the CPU.

    Returns [] in a single process, where the state dict of the model already contains them.
    """
    if not _is_distributed():
        return []
    return all_gather_list([{name: buffer.cpu() for name, buffer in _running_stats(model).items()}])


def restore_batch_norm_stats(model: nn.Module, statistics: list[dict[str, Tensor]]) -> None:
    """Restore the running statistics that `gather_batch_norm_stats` returned.

    With the same number of processes each gets its own, with another number each gets the average; [] changes nothing.
    Raises ValueError if a buffer of the model is missing or has another shape.
    """
    if not statistics:
        return
    sources = [statistics[rank()]] if len(statistics) == world_size() else statistics
    for name, buffer in _running_stats(model).items():
        tensors = [source.get(name) for source in sources]
        if not all(isinstance(tensor, Tensor) and tensor.shape == buffer.shape for tensor in tensors):
            raise ValueError(
                f"its running statistics lack {name}, or contain it in another shape: use an intact checkpoint"
            )
        buffer.copy_(torch.stack([tensor.to(buffer.device) for tensor in tensors]).mean(0))


def average_batch_norm_stats(model: nn.Module) -> None:
    """Average the running statistics over the processes, each of which computed them from its own shard of batches."""
    if _is_distributed():
        statistics = _running_stats(model).values()
        _wait([dist.all_reduce(buffer.div_(world_size()), async_op=True) for buffer in statistics])


def _is_distributed():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _running_stats(model):
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def _wait(works):
    for work in works:
        work.wait()
