"""The training benchmark runs its three loops and counts their pairs correctly."""

import itertools

import pytest
from helpers import open_data_of

from benchmarks.training import full_loop, notebook_batches, notebook_loop, pairs_per_second, step_only_loop


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_each_loop_yields_the_number_of_pairs_per_step(tiny_config, micro_batch_size):
    config = tiny_config(micro_batch_size=micro_batch_size)
    data = open_data_of(config)
    for loop in (full_loop(config, data), step_only_loop(config, data, 2)):
        counts = list(itertools.islice(loop, 5))
        assert counts == [config.captions_per_image * (counts[0] // config.captions_per_image)] * 5 and counts[0] > 0


def test_notebook_recipe_has_one_row_per_caption_padded_to_the_longest(tiny_config):
    config = tiny_config(captions_per_image=1)
    data = open_data_of(config)
    from models.factory import build_model

    _, tokenizer, _ = build_model(config, data)
    pixels, tokens = next(notebook_batches(config, data.split("train"), tokenizer))
    longest = max(len(ids) for ids in tokenizer(list(data.split("train").captions))["input_ids"])
    assert pixels.shape == (32, 3, 32, 32)
    assert tokens["input_ids"].shape == (32, longest)
    assert next(notebook_loop(config, data)) == 32


def test_rate_is_pairs_over_time(monkeypatch):
    times = iter([10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert pairs_per_second(iter([99, 5, 7, 8]), 3) == 20 / 4
