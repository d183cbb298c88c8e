"""The benchmarks run on what the program is now."""

import itertools

import pytest
from helpers import open_data_of

from benchmarks.training import pairs_per_second, plain_batches, plain_loop, step_alone, whole_loop


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_each_loop_counts_the_pairs_it_trains_on(tiny_config, micro_batch_size):
    config = tiny_config(micro_batch_size=micro_batch_size)
    data = open_data_of(config)
    for loop in (whole_loop(config, data), step_alone(config, data, 2)):
        counts = list(itertools.islice(loop, 5))
        assert counts == [config.captions_per_image * (counts[0] // config.captions_per_image)] * 5 and counts[0] > 0


def test_plain_recipe_has_a_row_for_each_caption_padded_to_the_longest(tiny_config):
    config = tiny_config(captions_per_image=1)
    data = open_data_of(config)
    from models.factory import build_model

    _, tokenizer, _ = build_model(config, data)
    pixels, tokens = next(plain_batches(config, data.split("train"), tokenizer))
    longest = max(len(ids) for ids in tokenizer(list(data.split("train").captions))["input_ids"])
    assert pixels.shape == (32, 3, 32, 32)
    assert tokens["input_ids"].shape == (32, longest)
    assert next(plain_loop(config, data)) == 32


def test_rate_is_pairs_over_time(monkeypatch):
    clock = iter([10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert pairs_per_second(iter([99, 5, 7, 8]), 3) == 20 / 4
