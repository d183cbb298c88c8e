"""Items to batches: in which order they come, in how many pieces, and from how many loader processes."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.tokenizer import pad
from dataset import CLIPDataset
from runtime.signals import leave_signals_to_parent

HELD_BYTES = 2**28  # of a batch's photos, decoded; a batch with more is read twice instead of held


def collate(items: Sequence[dict], pad_id: int) -> dict:
    """One batch of the readable items: pixels (B,3,H,W) uint8, input_ids and attention_mask (M,L), image_ids (B,),
    caption_image_ids (M,), and the list of what was "unreadable". Without a readable item only that list.
    """
    batch = {"unreadable": [item["unreadable"] for item in items if "unreadable" in item]}
    items = [item for item in items if "pixels" in item]
    if items:
        batch["pixels"] = torch.from_numpy(np.stack([item["pixels"] for item in items]))
        batch["input_ids"], batch["attention_mask"] = pad([ids for item in items for ids in item["captions"]], pad_id)
        batch["image_ids"] = torch.tensor([item["image_id"] for item in items])
        batch["caption_image_ids"] = batch["image_ids"].repeat_interleave(
            torch.tensor([len(item["captions"]) for item in items])
        )
    return batch


MicroBatchPasses = tuple[Iterable[dict], Iterable[dict] | None]


class ImageCaptionLoader:
    """The batches of an epoch: `batches.epoch(e)` iterates over them, len(batches) counts them.

    A batch comes as two passes over its micro-batches, or as one and None where it is a single one. A batch whose
    photos would fill memory is read again for the second pass, which gives the same: an item depends on its key alone.
    """

    def __init__(
        self, dataset: CLIPDataset, sampler: "EpochSampler", *, pad_id: int, num_workers: int, pin_memory: bool
    ):
        pixels = 3 * dataset.preprocess.size**2 * sampler.own_images  # bytes of a batch
        self.sampler, self.reread = sampler, sampler.micro_batches > 1 and pixels > HELD_BYTES
        self.paths = dataset.paths
        self.loader = DataLoader(
            dataset,
            batch_sampler=MicroBatchSampler(sampler, repeat=2 if self.reread else 1),
            collate_fn=partial(collate, pad_id=pad_id),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_parent,
        )

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[MicroBatchPasses]:
        """The batches of an epoch from number `first` on."""
        self.sampler.go_to(epoch, first)
        parts, micro_batches = iter(self.loader), self.sampler.micro_batches
        for _ in range(first, len(self)):
            if self.reread:
                yield islice(parts, micro_batches), islice(parts, micro_batches)
            else:
                held = list(islice(parts, micro_batches))
                yield held, (held if micro_batches > 1 else None)


class EpochSampler:
    """Shuffled batches of keys (epoch, index), this process's share of them cut into micro-batches.

    The epoch is cut into as few batches as batch_size allows, all of one size: that keeps the number of negatives, and
    the shapes a compiled model sees, the same. The few images that are left over stay out of an epoch, others each
    time. No image comes twice in an epoch.
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, *, micro_batch_size: int, process: int = 0, processes: int = 1
    ):
        self.images, self.seed, self.process = images, seed, process
        self.epoch_number, self.first_batch = 0, 0
        self.batches = -(-images // batch_size)
        self.own_images = images // self.batches // processes
        self.batch_images = self.own_images * processes
        self.micro_batches = -(-self.own_images // micro_batch_size)

    def __len__(self):
        return self.batches

    def go_to(self, epoch: int, first_batch: int = 0) -> None:
        """Iterate over that epoch next, from that batch on."""
        self.epoch_number, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[list[tuple[int, int]]]]:
        """For each batch this process's micro-batches, of sizes that differ by at most 1."""
        order = np.random.default_rng((self.seed, self.epoch_number)).permutation(self.images)
        for batch in range(self.first_batch, self.batches):
            start = batch * self.batch_images + self.process * self.own_images
            own = np.array_split(order[start : start + self.own_images], self.micro_batches)
            yield [[(self.epoch_number, int(index)) for index in part] for part in own]


class MicroBatchSampler:
    """The micro-batches of an EpochSampler one after another, those of each batch `repeat` times."""

    def __init__(self, sampler: EpochSampler, repeat: int):
        self.sampler, self.repeat = sampler, repeat

    def __len__(self):
        return len(self.sampler) * self.sampler.micro_batches * self.repeat

    def __iter__(self):
        for parts in self.sampler:
            for _ in range(self.repeat):
                yield from parts
