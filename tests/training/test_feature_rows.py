"""Cached features on a GPU or in memory: where they go, and that batches prepared by a thread are the same."""

import threading

import numpy as np
import pytest
import torch
from test_feature_cache import cached_loader

from training import feature_rows
from training.feature_rows import AHEAD, FeatureRows, prefetch

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with 1,000 free bytes whose copies stay on the CPU; returns the sizes that were copied to it."""
    copied = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    monkeypatch.setattr(torch.Tensor, "to", lambda rows, *_, **__: copied.append(rows.nbytes) or rows)
    return copied


@pytest.mark.parametrize(("rows", "placed"), [(125, True), (126, False)])
def test_features_take_at_most_half_of_the_free_gpu_memory(gpu, rows, placed):
    FeatureRows(torch.zeros(rows, 1), CUDA)
    assert gpu == ([4 * rows] if placed else [])


def test_features_that_do_not_fit_in_one_piece_stay_in_memory(gpu, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "to", fail)
    assert not FeatureRows(torch.zeros(3, 2), CUDA).is_placed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_on_the_gpu_are_gathered_into_buffers(monkeypatch, dtype):
    rows = torch.arange(24.0).view(6, 2, 2).to(dtype)
    features, empty, pinned = FeatureRows(rows, torch.device("cpu")), torch.empty, []

    def allocate(*shape, pin_memory=False, **options):
        pinned.append(pin_memory)
        return empty(*shape, **options)

    numbers = np.array([4, 0, 4])
    plain = features.gather(numbers)
    monkeypatch.setattr(features, "device", CUDA)
    monkeypatch.setattr(torch, "empty", allocate)
    assert torch.equal(features.finish(features.gather(numbers)), plain) and pinned == [True]
    assert torch.equal(plain, rows[[4, 0, 4]]) and plain.dtype == dtype


def test_rows_on_the_gpu_are_taken_by_number(monkeypatch):
    rows = torch.arange(12.0).view(6, 2)
    features = FeatureRows(rows, torch.device("cpu"))
    features.is_placed = True  # the device is the CPU, but the path is that of a GPU
    gathered = features.gather(np.array([5, 1]))
    assert gathered.tolist() == [5, 1] and torch.equal(features.finish(gathered), rows[[5, 1]])


def test_prefetch_keeps_the_order_and_runs_a_few_items_ahead():
    started, main = [], threading.get_ident()

    def function(item):
        started.append(item)
        assert threading.get_ident() != main
        return item * 10

    results = prefetch(function, range(20))
    assert next(results) == 0
    assert len(started) <= AHEAD + 1
    assert [0, *results] == [item * 10 for item in range(20)] and started == list(range(20))
    assert list(prefetch(function, [])) == []


def test_error_of_the_thread_is_raised_at_its_item_and_the_thread_ends():
    def function(item):
        if item == 2:
            raise OSError("the disk has failed")
        return item

    results = prefetch(function, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="the disk has failed"):
        next(results)
    unfinished = prefetch(function, range(2))
    next(unfinished)
    unfinished.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("micro_batch_size", [2, 4])
@pytest.mark.parametrize("frozen_epochs", [0, 2])
def test_batches_prepared_by_a_thread_are_those_of_the_main_thread(micro_batch_size, frozen_epochs, monkeypatch):
    threads, gather = set(), FeatureRows.gather

    def spy(self, numbers):
        threads.add(threading.current_thread().name.partition("_")[0])
        return gather(self, numbers)

    monkeypatch.setattr(feature_rows.FeatureRows, "gather", spy)
    loader = cached_loader(micro_batch_size=micro_batch_size, views=2, frozen_epochs=frozen_epochs)
    for epoch, first_batch in ((0, 0), (3, 0), (3, 1)):
        plain = flatten(loader.epoch(epoch, first_batch))
        assert threads <= {"MainThread"}
        threads.clear()
        loader.on_gpu = True
        prepared = flatten(loader.epoch(epoch, first_batch))
        loader.on_gpu = False
        assert len(plain) == len(prepared) and threads <= {"prefetch"}
        threads.clear()
        for micro_batch, other in zip(plain, prepared, strict=True):
            assert micro_batch.keys() == other.keys() - {"length_groups"}
            for key, value in micro_batch.items():
                assert torch.equal(other[key], value) if isinstance(value, torch.Tensor) else other[key] == value


def flatten(batches):
    return [
        micro_batch for passes in batches for micro_batches in passes if micro_batches for micro_batch in micro_batches
    ]
