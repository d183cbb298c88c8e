"""Batches of images with captions: their order, their micro-batches, and the loader processes that read them."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.tokenizer import pad
from dataset import CLIPDataset
from runtime.signals import leave_signals_to_parent
from training.gradcache import TEXT_IDS

MAX_PADDING, MAX_GROUPS = 1.1, 12  # padded tokens per token of a batch's captions, and groups of captions, on a GPU
MIN_GROUPED = 64  # fewer captions are encoded at once: more kernels would take longer than the padding
# Bytes of a batch's decoded images in this process; the images of a larger batch are decoded twice. For a GPU more are
# kept: the loader is slower than the step, and such machines have more memory.
MAX_BATCH_BYTES, MAX_GPU_BATCH_BYTES = 2**28, 2**31


def length_groups(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Divide captions of these lengths into groups with little padding -> (captions, tokens) of each, longest first.

    Each group is padded to its longest caption. The result has the fewest groups with at most MAX_PADDING times the
    tokens of the captions, at most MAX_GROUPS; for that number of groups the padding is the least (dynamic programming
    over the distinct lengths).
    """
    values, counts = np.unique(lengths, return_counts=True)
    if len(lengths) <= MIN_GROUPED:
        return [(len(lengths), int(values[-1]))]
    captions = np.concatenate([[0], np.cumsum(counts)])
    # padded[s, e]: tokens of one group that holds the distinct lengths s to e; infinite where it would be empty
    padded = np.where(np.tri(len(values), k=-1), np.inf, values * (captions[None, 1:] - captions[:-1, None]))
    least, starts = padded[0], []  # tokens of the distinct lengths up to e, in one group more with each pass
    while least[-1] > MAX_PADDING * (values @ counts) and len(starts) < min(MAX_GROUPS, len(values)) - 1:
        total = np.concatenate([[np.inf], least[:-1]])[:, None] + padded  # the last group starts at s
        starts.append(total.argmin(0))
        least = total.min(0)
    groups, end = [], len(values)
    for start in [*reversed(starts), np.zeros(len(values), int)]:
        first = int(start[end - 1])
        groups.append((int(captions[end] - captions[first]), int(values[end - 1])))
        end = first
    return groups


def collate(items: Sequence[dict], pad_id: int, *, group_lengths: bool = False) -> dict:
    """Collate the readable items into a batch.

    Returns pixels (B,3,H,W) uint8, input_ids and attention_mask (M,L), with group_lengths also length_groups,
    image_ids (B,), caption_image_ids (M,), with repeated captions also caption_text_ids (M,) and image_text_ids (B,K)
    (losses.PairIds), and "unreadable", a list of error messages; without a readable item only that list.
    """
    batch = {"unreadable": [item["unreadable"] for item in items if "unreadable" in item]}
    items = [item for item in items if "pixels" in item]
    if items:
        batch["pixels"] = torch.from_numpy(np.stack([item["pixels"] for item in items]))
        captions = [ids for item in items for ids in item["captions"]]
        batch["input_ids"], batch["attention_mask"] = pad(captions, pad_id)
        if group_lengths:
            batch["length_groups"] = length_groups([len(ids) for ids in captions])
        batch["image_ids"] = torch.tensor([item["image_id"] for item in items])
        batch["caption_image_ids"] = batch["image_ids"].repeat_interleave(
            torch.tensor([len(item["captions"]) for item in items])
        )
        if "caption_text_ids" in items[0]:
            batch |= {key: torch.from_numpy(np.concatenate([item[key] for item in items])) for key in TEXT_IDS}
    return batch


MicroBatchPasses = tuple[Iterable[dict], Iterable[dict] | None]


class ImageCaptionLoader:
    """The batches of an epoch: `loader.epoch(e)` iterates over them, len(loader) is their number.

    A batch is two passes over its micro-batches, or one pass and None if it is a single micro-batch. If the images of a
    batch exceed MAX_BATCH_BYTES (for a GPU MAX_GPU_BATCH_BYTES), the second pass reads them again; it yields the same,
    since an item depends only on its key (epoch, index).
    """

    def __init__(
        self,
        dataset: CLIPDataset,
        sampler: "EpochSampler",
        *,
        pad_id: int,
        num_workers: int,
        pin_memory: bool,
        epochs: int = 1,
    ):
        """pin_memory: whether the batches are for a GPU. epochs: epochs from 0 that are read in advance of `epoch`."""
        batch_bytes = 3 * dataset.preprocess.size**2 * sampler.images_per_process
        most_bytes = MAX_GPU_BATCH_BYTES if pin_memory else MAX_BATCH_BYTES
        self.sampler, self.reread = sampler, sampler.micro_batches > 1 and batch_bytes > most_bytes
        self.paths, self.repeats = dataset.paths, dataset.repeats is not None and dataset.repeats.has_texts
        self.micro_batch_sampler = MicroBatchSampler(sampler, repeat=2 if self.reread else 1, epochs=epochs)
        self._stream = self._next = None  # the running iteration; (epoch, number) of the batch that it yields next
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.micro_batch_sampler,
            collate_fn=partial(collate, pad_id=pad_id, group_lengths=pin_memory),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_parent,
        )

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[MicroBatchPasses]:
        """Iterate over the batches of an epoch, starting at number `first_batch`.

        After a complete epoch its successor continues the same iteration of the loader: while the caller validates, the
        loader processes read the first batches of the next epoch already.
        """
        count = self.sampler.micro_batches
        if self._next != (epoch, first_batch):
            self.micro_batch_sampler.start(epoch, first_batch)
            self._stream = iter(self.loader)
        following = (epoch + 1, 0) if epoch + 1 < self.micro_batch_sampler.epochs else None
        stream, self._next = self._stream, None if first_batch < len(self) else following
        for batch in range(first_batch, len(self)):
            if batch == len(self) - 1:
                self._next = following  # before the last batch: the caller need not ask for more
            if self.reread:
                yield islice(stream, count), islice(stream, count)
            else:
                micro_batches = list(islice(stream, count))
                yield micro_batches, (micro_batches if count > 1 else None)


def check_images_per_step(images: int, batch_size: int, processes: int) -> None:
    """Raise ValueError if the equal batches of an epoch contain a single photo, or fewer than one per process.

    Such a batch has no negatives: 3 photos in batches of at most 2 are two batches of 1.
    """

    def per_step(size):
        return images // -(-images // size) // processes * processes

    if per_step(batch_size) >= max(2, processes):
        return
    steps = -(-images // batch_size)
    usable = next(size for size in range(batch_size, images * processes + 1) if per_step(size) >= max(2, processes))
    raise ValueError(
        f"--batch-size {batch_size} divides {images} training photos into {steps} steps of {images // steps}, fewer "
        f"than {max(2, processes)}: use --batch-size {-(-usable // processes) * processes} or more training photos"
    )


class EpochSampler:
    """Shuffled batches of keys (epoch, index); each process gets its shard of a batch, split into micro-batches.

    An epoch has as few batches as batch_size allows, all of the same size. This keeps the number of negatives constant,
    and the shapes of a compiled model. The remaining images are dropped, different ones in each epoch. No image appears
    twice in an epoch.
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, *, micro_batch_size: int, process: int = 0, processes: int = 1
    ):
        self.images, self.seed, self.process = images, seed, process
        self.epoch_number, self.first_batch = 0, 0
        self.batches = -(-images // batch_size)
        self.images_per_process = images // self.batches // processes  # of a batch
        self.images_per_batch = self.images_per_process * processes
        self.micro_batches = -(-self.images_per_process // micro_batch_size)

    def __len__(self):
        return self.batches

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Make the next iteration yield the batches of `epoch`, starting at number `first_batch`."""
        self.epoch_number, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[list[tuple[int, int]]]]:
        """Yield this process's micro-batches of each batch; their sizes differ by at most 1."""
        return self.batches_of(self.epoch_number, self.first_batch)

    def batches_of(self, epoch: int, first_batch: int = 0) -> Iterator[list[list[tuple[int, int]]]]:
        """Yield the micro-batches of each batch of an epoch, as the iteration does."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
        for batch in range(first_batch, self.batches):
            start = batch * self.images_per_batch + self.process * self.images_per_process
            shard = np.array_split(order[start : start + self.images_per_process], self.micro_batches)
            yield [[(epoch, int(index)) for index in micro_batch] for micro_batch in shard]


class MicroBatchSampler:
    """The micro-batches of an EpochSampler in order, those of each batch `repeat` times, epoch after epoch.

    The iteration ends after epoch number `epochs` - 1, but never before the end of the epoch at which it starts.
    """

    def __init__(self, sampler: EpochSampler, *, repeat: int, epochs: int):
        self.sampler, self.repeat, self.epochs = sampler, repeat, epochs
        self.start(0)

    def start(self, epoch: int, first_batch: int = 0) -> None:
        """Make the next iteration start at this batch of this epoch."""
        self.first = epoch, first_batch

    def __iter__(self):
        epoch, first_batch = self.first
        for number in range(epoch, max(epoch + 1, self.epochs)):
            for micro_batches in self.sampler.batches_of(number, first_batch if number == epoch else 0):
                for _ in range(self.repeat):
                    yield from micro_batches
