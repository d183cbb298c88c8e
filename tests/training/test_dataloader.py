"""Captions of a step are grouped by length with little padding; one iteration of the loader serves all epochs."""

import itertools
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import open_data_of, tiny_model

from models.factory import build_model
from retrieval.encoder import build_training_encoder, embed_split
from training.dataloader import (
    MAX_GROUPS,
    MAX_PADDING,
    MIN_GROUPED,
    EpochSampler,
    ImageCaptionLoader,
    collate,
    length_groups,
)
from training.dataloader_factory import build_batches


def caption_lengths(captions, seed=0):
    """Draw numbers of tokens as skewed as those of Flickr8k's captions: most near 14, a few beyond 40."""
    return (5 + np.random.default_rng(seed).gamma(4.0, 2.4, captions)).astype(int).clip(5, 64).tolist()


def padded_tokens(groups):
    return sum(captions * tokens for captions, tokens in groups)


@pytest.mark.parametrize("images", [26, 64, 256, 1000])
def test_padding_of_a_step_is_at_most_a_tenth_of_its_tokens(images):
    lengths = caption_lengths(images * 5)
    assert max(lengths) * len(lengths) > 2 * sum(lengths)  # what padding to the longest costs
    groups = length_groups(lengths)
    assert padded_tokens(groups) <= MAX_PADDING * sum(lengths) and len(groups) <= MAX_GROUPS
    assert all(type(number) is int for group in groups for number in group)
    start, descending = 0, sorted(lengths, reverse=True)
    for captions, tokens in groups:
        assert descending[start] == tokens  # each group is padded to its longest caption
        start += captions
    assert start == len(lengths)


def least_padding(lengths, count):
    """Try all divisions of the sorted lengths into `count` groups: the oracle in plain loops."""
    ordered, best = sorted(lengths, reverse=True), np.inf
    for cuts in itertools.combinations(range(1, len(ordered)), count - 1):
        bounds = [0, *cuts, len(ordered)]
        best = min(best, sum(ordered[a] * (b - a) for a, b in itertools.pairwise(bounds)))
    return best


@pytest.mark.parametrize("lengths", [[9, 3, 3, 7, 8, 30, 4, 5], [5] * 6, [1, 64], [2, 2, 50, 50, 50, 3]])
def test_groups_are_the_fewest_with_little_padding_and_pad_least(lengths, monkeypatch):
    monkeypatch.setattr("training.dataloader.MIN_GROUPED", 0)
    groups = length_groups(lengths)
    assert padded_tokens(groups) == least_padding(lengths, len(groups)) <= MAX_PADDING * sum(lengths)
    assert len(groups) == 1 or least_padding(lengths, len(groups) - 1) > MAX_PADDING * sum(lengths)


def test_few_captions_are_a_single_group_and_many_distinct_lengths_at_most_the_limit():
    assert length_groups([3, 9, 4]) == [(3, 9)]
    lengths = [2**k for k in range(15) for _ in range(2 ** (14 - k))]  # each length has as many tokens
    assert len(lengths) > MIN_GROUPED and len(length_groups(lengths)) == MAX_GROUPS


@pytest.mark.parametrize("pooling", ["mean", "cls", "gpo"])
def test_embeddings_and_gradients_in_groups_equal_those_of_all_captions_at_once_in_their_order(pooling):
    model, _ = tiny_model(pooling=pooling)
    tower = model.text_encoder.eval()
    generator = torch.Generator().manual_seed(0)
    captions = [torch.randint(5, 30, (n,), generator=generator).numpy() for n in caption_lengths(130)]
    pixels = np.zeros((3, 2, 2), np.uint8)
    items = [{"pixels": pixels, "captions": captions[k : k + 5], "image_id": k} for k in range(0, 130, 5)]
    batch, plain = collate(items, 0, group_lengths=True), collate(items, 0)
    assert batch.keys() - plain.keys() == {"length_groups"} and len(batch["length_groups"]) > 1
    assert all(torch.equal(batch[key], plain[key]) for key in plain if key != "unreadable")
    inputs = batch["input_ids"], batch["attention_mask"]
    results = []
    for groups in (batch["length_groups"], [(130, inputs[0].shape[1])]):
        tower.zero_grad()
        rows = tower(*inputs, groups)
        rows.square().sum().backward()
        results.append([rows.detach(), *(p.grad for p in tower.parameters() if p.grad is not None)])
    for grouped, at_once in zip(*results, strict=True):
        torch.testing.assert_close(grouped, at_once, atol=1e-4, rtol=1e-4)


class Numbers:
    """Items that depend on their key alone, with the process that read them."""

    paths, repeats = (), None
    preprocess = SimpleNamespace(size=2)

    def __len__(self):
        return 10

    def __getitem__(self, key):
        epoch, index = key
        captions = [np.array([epoch + 1, index, os.getpid()])]
        return {"pixels": np.zeros((3, 2, 2), np.uint8), "captions": captions, "image_id": index}


def numbers_loader(num_workers, epochs):
    sampler = EpochSampler(10, 4, seed=3, micro_batch_size=2)
    return ImageCaptionLoader(Numbers(), sampler, pad_id=0, num_workers=num_workers, pin_memory=False, epochs=epochs)


def keys_and_processes(batches):
    """Return [epoch, index] of all items in order, and the ids of the processes that read them."""
    rows = torch.cat([micro_batch["input_ids"] for first, _ in batches for micro_batch in first])
    return rows[:, :2].tolist(), set(rows[:, 2].tolist())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_iteration_of_the_loader_over_all_epochs_yields_the_batches_of_separate_ones(num_workers):
    loader, processes, starts = numbers_loader(num_workers, epochs=4), set(), []
    original = loader.micro_batch_sampler.start
    loader.micro_batch_sampler.start = lambda *position: starts.append(position) or original(*position)
    # complete epochs, a repeated one, a resumed one, one after the last step, and one beyond the last epoch
    for position in [(0,), (1,), (2,), (0,), (1, 2), (2,), (2, 3), (3,), (4,), (5,)]:
        keys, read_by = keys_and_processes(loader.epoch(*position)) if position != (2, 3) else ([], set())
        if position == (2, 3):
            assert list(loader.epoch(*position)) == []
        else:
            assert keys == keys_and_processes(numbers_loader(0, 1).epoch(*position))[0]
        processes |= read_by
    assert starts == [(0, 0), (0, 0), (1, 2), (2, 3), (4, 0), (5, 0)]  # the others continue the iteration before
    assert len(processes) == max(1, num_workers)  # the same from the first epoch to the last


def test_epoch_that_is_left_early_is_read_anew():
    loader = numbers_loader(1, epochs=3)
    expected = keys_and_processes(numbers_loader(0, 1).epoch(0))[0]
    for _ in range(2):
        next(loader.epoch(0))
    assert keys_and_processes(loader.epoch(0))[0] == expected
    batches = loader.epoch(1)  # as the trainer does, which stops at the last batch
    for _ in range(len(loader)):
        next(batches)
    assert keys_and_processes(loader.epoch(2))[0] == keys_and_processes(numbers_loader(0, 1).epoch(2))[0]


def test_validation_uses_the_same_loader_processes_in_every_epoch(tiny_config):
    config = tiny_config(num_workers=1)
    data = open_data_of(config)
    model, tokenizer, _ = build_model(config, data)
    encoder = build_training_encoder(config, model, tokenizer)
    _, embed = build_batches(config, model.eval(), encoder, data)
    (loader,) = [argument for argument in embed.args if isinstance(argument, torch.utils.data.DataLoader)]
    first = embed()
    processes = [worker.pid for worker in loader._iterator._workers]
    second = embed()
    assert [worker.pid for worker in loader._iterator._workers] == processes and len(processes) == 1
    expected = embed_split(encoder, data.split("val"))
    assert all(torch.equal(a, c) and torch.equal(b, c) for a, b, c in zip(first, second, expected, strict=True))
