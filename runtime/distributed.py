"""One process or many (`accelerate launch`, `torchrun`): which one this is, and what they exchange.

Under a single process every function is free and gives back what it was given.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def init(device: torch.device) -> None:
    """Connect the processes that a launcher started, each with a GPU of its own; nothing without a launcher."""
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu")


def cleanup() -> None:
    """Part from the other processes, when all have finished: one that goes early would break the others' line."""
    if _many():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0; process 0 is the one that writes and speaks."""
    return dist.get_rank() if _many() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _many() else 1


def shard_slice(items: int) -> slice:
    """This process's contiguous part of a range of items."""
    return slice(items * rank() // world_size(), items * (rank() + 1) // world_size())


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes in their order, (n,) or (n, D), and where this one's begin; no gradient flows back.

    The processes may hold different numbers of rows, one without any needs no D. Rows stay on their device.
    """
    if not _many():
        return rows, 0
    from accelerate.utils import gather, pad_across_processes

    device = rows.device if dist.get_backend() == "gloo" else torch.device("cuda")
    shapes = gather(torch.tensor([[len(rows), *rows.shape[1:], 0][:2]], device=device)).tolist()
    if not len(rows) and (width := max(width for _, width in shapes)):
        rows = rows.new_empty(0, width)
    most = max(length for length, _ in shapes)
    padded = pad_across_processes(rows.detach().to(device).contiguous(), dim=0) if most else rows.detach()
    everyone = gather(padded).split(most) if most else [padded] * len(shapes)
    gathered = torch.cat([part[:length] for part, (length, _) in zip(everyone, shapes, strict=True)])
    return gathered.to(rows.device), sum(length for length, _ in shapes[: rank()])


def all_gather_list(items: list) -> list:
    """The items of all processes, in their order."""
    if not _many():
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def broadcast_object(value: Any) -> Any:
    """What process 0 passes; the others' values are ignored."""
    if not _many():
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def broadcast_parameters(model: nn.Module) -> None:
    """Give every process the weights of process 0."""
    if _many():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, 0)


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up what the processes found, parameter by parameter."""
    if _many():
        _wait([dist.all_reduce(_gradient(parameter), async_op=True) for parameter in parameters])


def all_reduce_max(value: Tensor) -> Tensor:
    """The largest value of all processes, in place."""
    if _many():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def gather_batch_norm_stats(model: nn.Module) -> list[dict[str, Tensor]]:
    """Every process's own running statistics, on the CPU; nothing from a single one, whose model holds them."""
    if not _many():
        return []
    return all_gather_list([{name: buffer.cpu() for name, buffer in _statistics(model).items()}])


def restore_batch_norm_stats(model: nn.Module, statistics: list[dict[str, Tensor]]) -> None:
    """Give every process its own of gather_statistics again, or the average where there were more or fewer of them.

    Raises ValueError where they are not those of the model.
    """
    if not statistics:
        return
    own = [statistics[rank()]] if len(statistics) == world_size() else statistics
    for name, buffer in _statistics(model).items():
        found = [some.get(name) for some in own]
        if not all(isinstance(tensor, Tensor) and tensor.shape == buffer.shape for tensor in found):
            raise ValueError(f"its running statistics lack {name}, or have it in another shape")
        buffer.copy_(torch.stack([tensor.to(buffer.device) for tensor in found]).mean(0))


def average_batch_norm_stats(model: nn.Module) -> None:
    """Average the batch norms' running statistics, which every process took from its own part of the batches."""
    if _many():
        statistics = _statistics(model).values()
        _wait([dist.all_reduce(buffer.div_(world_size()), async_op=True) for buffer in statistics])


def _many():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _statistics(model):
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def _gradient(parameter):
    if parameter.grad is None:  # none of this process's photos could be read
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _wait(works):
    for work in works:
        work.wait()
