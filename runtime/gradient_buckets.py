"""Sum the gradients of several processes in buckets, each sent while the backward pass still computes others."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from runtime.distributed import world_size

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel (arXiv 2006.15704, section 3.2)


class GradientBuckets:
    """Sums `grad` of the trainable parameters over all processes; in a single process this does nothing.

    Call `start` before the last backward pass of a step, and `finish` after it. A bucket is sent as soon as that pass
    has computed its gradients and the buckets before it were sent, so that the order is the same in all processes. A
    parameter without a gradient in this process counts as zero; one without a gradient in any process keeps None.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        replicated: Iterable[nn.Parameter] = (),
        bucket_bytes: int = BUCKET_BYTES,
    ):
        """replicated: those of which each process computes the full gradient, and not only its share: averaged."""
        self.parameters, self.replicated, self.bucket_bytes = list(parameters), set(replicated), bucket_bytes
        self._buckets: list[list[nn.Parameter]] = []
        self._number: dict[nn.Parameter, int] = {}  # parameter -> number of its bucket
        self._hooks, self._started = [], False

    def start(self) -> None:
        """Send buckets during the backward pass that follows, the last one of this step."""
        if world_size() > 1:
            self._arrange()
            self._started = True

    def finish(self) -> None:
        """Send the remaining buckets, and wait for all sums. On a GPU the host need not wait, unless this process lacks
        a gradient: it then reads whether others have it."""
        if world_size() == 1:
            return
        if not self._started:  # this process had no backward pass
            self._arrange()
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, (work, flat, complete) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            _assign(bucket, flat, complete)
        self._started, self._sent = False, []

    def _arrange(self):
        """Divide the parameters that train now into buckets, the last ones first, as a backward pass computes them."""
        trainable = [parameter for parameter in reversed(self.parameters) if parameter.requires_grad]
        if list(map(id, trainable)) != list(map(id, self._number)):
            for hook in self._hooks:
                hook.remove()
            self._buckets = list(_divide(trainable, self.bucket_bytes))
            self._number = {p: number for number, bucket in enumerate(self._buckets) for p in bucket}
            self._hooks = [p.register_post_accumulate_grad_hook(self._mark_ready) for p in trainable]
        self._waiting, self._sent = [set(bucket) for bucket in self._buckets], []

    def _mark_ready(self, parameter):
        """Called by a backward pass once it has added to this gradient: send the buckets that are complete."""
        if not self._started:
            return
        number = self._number[parameter]
        if number < len(self._sent):
            raise RuntimeError("a gradient changed after it was sent to the other processes")
        self._waiting[number].discard(parameter)
        while len(self._sent) < len(self._buckets) and not self._waiting[len(self._sent)]:
            self._send()

    @torch.no_grad()
    def _send(self):
        """Copy the gradients of the next bucket into one tensor, and begin to sum it over the processes."""
        bucket = self._buckets[len(self._sent)]
        present = [parameter.grad is not None for parameter in bucket]
        numbers = sum(parameter.numel() for parameter in bucket)
        size = numbers + len(bucket)  # the end counts the processes that have each gradient
        flat = bucket[0].new_empty(size).fill_(1) if all(present) else bucket[0].new_zeros(size)
        ready = [
            (parameter, view, flag)
            for parameter, view, flag in zip(bucket, _views(bucket, flat), flat[numbers:], strict=True)
            if parameter.grad is not None
        ]
        if ready:
            parameters, views, flags = zip(*ready, strict=True)
            torch._foreach_copy_(list(views), [parameter.grad for parameter in parameters])
            if not all(present):
                torch._foreach_add_(list(flags), 1)
        for parameter, view, _ in ready:
            if parameter in self.replicated:
                view.div_(world_size())
            parameter.grad = None  # its memory can be used again; `_assign` sets the sum
        self._sent.append((dist.all_reduce(flat, async_op=True), flat, all(present)))


def _assign(bucket, flat, complete):
    """Set the gradients to the sums; complete: whether this process has all of them, so that no count is read."""
    counts = [1] * len(bucket) if complete else flat[-len(bucket) :].tolist()
    for parameter, view, count in zip(bucket, _views(bucket, flat), counts, strict=True):
        parameter.grad = view if count else None


def _divide(parameters, bucket_bytes) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in buckets of at most this size, or of one; each of one dtype and device."""
    bucket, size = [], 0
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        if bucket and (size + parameter.nbytes > bucket_bytes or kind != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


def _views(bucket, flat):
    """Return for each parameter a part of `flat` with its shape and its order in memory, as fused optimizers need."""
    views, start = [], 0
    for parameter in bucket:
        stride = torch.empty_like(parameter, device="meta").stride()  # the parameter's, unless it has gaps
        views.append(flat.as_strided(parameter.shape, stride, start))
        start += parameter.numel()
    return views
