"""--limit draws a part of the photos, in proportion to the splits, the same ones in training and in evaluation."""

import dataclasses
import json

import pandas as pd
import pytest
from helpers import UNUSED_CACHE, one_line_error, open_data_of, run_in_process, write_image_folder

from config import Config
from data.limit import limit_photos, split_counts
from data.loading import open_data, open_run_data
from reporting import dataset_report
from runtime import cli
from runtime.run_dir import read_config, read_launches, write_config
from training import feature_cache
from training.trainer import train


def table(**sizes):
    """A table of photos with two captions each; None is a photo in no split."""
    rows = [
        (f"{split}/{number}.jpg", f"caption {k}", split if split != "unlisted" else None)
        for split, size in sizes.items()
        for number in range(size)
        for k in range(2)
    ]
    return pd.DataFrame(rows, columns=["image", "caption", "split"], dtype=object)


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ((6000, 1000, 1000), 800, (600, 100, 100)),
        ((6000, 1000, 1000), 500, (375, 63, 62)),  # 62.5 each: one of them gets the half
        ((290, 3, 7), 30, (26, 2, 2)),
        ((8, 1, 1), 9, (7, 1, 1)),  # a split of one photo keeps it
        ((20, 4, 6), 6, (2, 2, 2)),
        ((1000, 30, 1000), 11, (4, 2, 5)),
    ],
)
def test_photos_are_shared_in_proportion_with_two_in_each_split(sizes, limit, expected):
    splits = ("train", "val", "test")
    counts = split_counts(dict(zip(splits, sizes, strict=True)), limit)
    assert sum(counts.values()) == limit
    assert all(abs(counts[split] - number) <= 1 for split, number in zip(splits, expected, strict=True))
    assert all(min(2, size) <= counts[split] <= size for split, size in zip(splits, sizes, strict=True))


def test_all_sizes_up_to_ten_have_a_share():
    for train_size in range(2, 11):
        for val in range(1, 11):
            sizes = {"train": train_size, "val": val, "test": 3}
            for limit in range(sum(min(2, size) for size in sizes.values()), sum(sizes.values()) + 1):
                counts = split_counts(sizes, limit)
                assert sum(counts.values()) == limit
                assert all(min(2, sizes[split]) <= counts[split] <= sizes[split] for split in sizes)


def test_too_few_photos_are_an_error_with_the_least_number():
    with pytest.raises(ValueError, match=r"--limit must be at least 6 \(train 2, val 2, test 2\), got 5"):
        split_counts({"train": 60, "val": 10, "test": 10}, 5)


def test_the_draw_depends_on_the_seed_and_a_larger_one_contains_a_smaller_one():
    photos = table(train=60, val=20, test=20, unlisted=5)
    drawn = {n: set(limit_photos(photos, n, seed=3, name="x")[0].image) for n in (10, 25, 50)}
    assert drawn[10] < drawn[25] < drawn[50]
    assert {image.partition("/")[0] for image in drawn[50]} == {"train", "val", "test"}
    rows, note = limit_photos(photos, 50, seed=4, name="x")
    assert set(rows.image) != drawn[50] and len(rows) == 100
    assert note.startswith("limit: 50 of 100 photos (train 30, val 10, test 10), drawn with split seed 4; ")
    assert note.endswith("not comparable with results on all of them")


def test_a_named_data_set_is_no_longer_comparable_with_published_results():
    assert limit_photos(table(train=60, val=20, test=20), 50, seed=0, name="coco")[1].endswith(
        "; not comparable with published results"
    )


@pytest.mark.parametrize("limit", [30, 31, 10**6])
def test_a_limit_that_leaves_out_no_photo_is_reported(photos, limit):
    config = Config(dataset=str(photos), cache_dir=UNUSED_CACHE, limit=limit)
    data = open_data(config)
    assert f"limit: all 30 photos, as the data set has no more than --limit {limit:,}" in data.describe()
    assert data.fingerprint() == open_data(dataclasses.replace(config, limit=None)).fingerprint()


def test_evaluation_of_a_limited_run_uses_the_photos_of_its_training(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(limit=15)
    folder = train(config, open_data_of(config), None)
    recorded = read_launches(folder)[-1]["data"]
    assert read_config(folder).limit == 15
    assert open_run_data(folder, read_config(folder), None, "test").fingerprint() == recorded
    assert len(open_run_data(folder, read_config(folder), None, "all").split("all").paths) == 15

    monkeypatch.chdir(tmp_path)
    done = run_in_process("evaluate.py", folder, "--device", "cpu", "--precision", "float32")
    assert "3 images, 6 captions" in done.stdout and "limit: 15 of 30 photos (train 10, val 2, test 3)" in done.stdout
    done = run_in_process(
        "evaluate.py", folder, "--dataset", config.dataset, "--device", "cpu", "--precision", "float32"
    )
    assert "6 images, 12 captions" in done.stdout and "limit:" not in done.stdout  # another data set is measured whole


def test_photos_that_were_added_since_training_are_reported(tmp_path, capsys):
    folder, run = write_image_folder(tmp_path / "photos", 20), tmp_path / "run"
    config = Config(dataset=str(folder), cache_dir=UNUSED_CACHE, limit=10)
    run.mkdir()
    write_config(run, config, {"data": open_data(config).fingerprint()})
    open_run_data(run, config, None, "val")
    assert capsys.readouterr().err == ""
    lines = (folder / "captions.txt").read_text("utf-8").splitlines()
    (folder / "captions.txt").write_text("\n".join(lines[:-6]) + "\n", "utf-8")
    open_run_data(run, config, None, "val")
    assert "--limit may have drawn other photos than in training" in capsys.readouterr().err


def test_limited_run_copies_the_cached_features_of_the_whole_data_set(tiny_config, monkeypatch):
    frozen = {"freeze_image": True, "freeze_text": True, "cached_views": 2}
    whole, limited = tiny_config(name="whole", **frozen), tiny_config(name="limited", limit=15, **frozen)
    alone = tiny_config(name="alone", limit=15, cache_dir=f"{whole.cache_dir}-2", **frozen)
    expected = train(alone, open_data_of(alone), None)
    train(whole, open_data_of(whole), None)

    def compute(*arguments):
        raise AssertionError("the photos were encoded again")

    monkeypatch.setattr(feature_cache, "_compute", compute)
    folder = train(limited, open_data_of(limited), None)
    logs = [json.loads((run / "log.jsonl").read_text("utf-8")) for run in (expected, folder)]
    assert logs[0]["loss"] == logs[1]["loss"] and logs[0]["rsum"] == logs[1]["rsum"]


def test_report_of_a_limited_data_set(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dataset.py", str(photos), "--limit", "12", "--out", str(tmp_path / "x.png")])
    cli.run(dataset_report.main)
    assert "limit: 12 of 30 photos" in capsys.readouterr().out


def test_a_limit_below_six_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--limit must be from 6" in one_line_error(run_in_process("train.py", "--limit", 5))
