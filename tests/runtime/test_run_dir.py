"""The files of a run folder from another machine or a stranger: every error names the file, no cache is followed."""

import json
import os
import sys

import pytest

from config import Config
from runtime.run_dir import (
    finished_runs,
    is_cache,
    read_config,
    read_log,
    read_metrics,
    read_shared_config,
    write_config,
)


def one_line(call):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": "5"},
        {"epochs": 5.5},
        {"epochs": True},
        {"image_size": [224]},
        {"device": "tpu"},
        {"lr_image": None},
        {"lr_image": float("nan")},
        {"embed_dim": 10**5000 if sys.version_info < (3, 11) else 10**4000},
        {"dataset": "a\0b"},
        {"cache_dir": "x" * 10_000},
        {"augment": 1},
        {"made\nup": 1},
        {"x" * 5000: 1},
    ],
    ids=lambda settings: next(iter(settings))[:20],
)
def test_setting_of_another_kind_or_out_of_bounds_is_a_line_that_names_the_file(tmp_path, settings):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert str(tmp_path / "config.json") in one_line(lambda: read_config(tmp_path))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"1" * 6000, b'{"epochs":', b"[]", b"{}{}"])
def test_file_that_is_no_json_object_is_a_line_that_names_the_file(tmp_path, content):
    for name, read in (("config.json", read_config), ("log.jsonl", read_log), ("metrics.json", read_metrics)):
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in one_line(lambda read=read: read(tmp_path))


def test_file_that_is_much_larger_than_a_run_writes_is_refused_unread(tmp_path):
    for name, read in (("config.json", read_config), ("log.jsonl", read_log), ("metrics.json", read_metrics)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(2**30)  # sparse
        assert str(tmp_path / name) in one_line(lambda read=read: read(tmp_path))


@pytest.mark.parametrize("record", [{"loss": [1]}, {"epoch": "one"}, {"rsum": {}}, {"seconds": 10**30}])
def test_log_with_other_kinds_of_values_names_the_file_and_the_line(tmp_path, record):
    (tmp_path / "log.jsonl").write_text(json.dumps({"epoch": 1}) + "\n" + json.dumps(record) + "\n")
    assert "log.jsonl, line 2" in one_line(lambda: read_log(tmp_path))


@pytest.mark.parametrize("metrics", [{"test": 5}, {"test": {"rsum": []}}, {"test": [1.0]}])
def test_metrics_of_another_shape_name_the_file(tmp_path, metrics):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert "metrics.json" in one_line(lambda: read_metrics(tmp_path))


def test_cache_of_another_machine_is_replaced_by_the_default_one_and_reported_once(tmp_path, capsys):
    foreign, photos = tmp_path / "not" / "here", tmp_path / "photos"
    photos.mkdir()  # a folder that exists but is no cache: nothing may be written to it
    for number, named in enumerate((foreign, photos)):
        run = tmp_path / f"run{number}"
        run.mkdir()
        write_config(run, Config(cache_dir=str(named)))
        for _ in range(2):
            assert read_shared_config(run).cache_dir == Config.cache_dir
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and str(named) in lines[0] and str(run) in lines[0] and "cache/" in lines[0]
        assert read_config(run).cache_dir == str(named)  # --resume keeps it
    assert not foreign.exists() and not list(photos.iterdir())


def test_cache_that_exists_is_used(tmp_path, capsys):
    (tmp_path / "mine" / "tokens").mkdir(parents=True)
    write_config(tmp_path, Config(cache_dir=str(tmp_path / "mine")))
    assert read_shared_config(tmp_path).cache_dir == str(tmp_path / "mine") and not capsys.readouterr().err
    assert not is_cache(tmp_path / ("x" * 300))


def test_clock_that_jumps_does_not_hide_a_finished_run(tmp_path):
    for name, time in (("past", -(10**9)), ("now", 10**9), ("future", 10**11)):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, Config(epochs=1))
        (tmp_path / name / "best.pt").touch()
        (tmp_path / name / "log.jsonl").write_text('{"epoch": 1}\n')
        os.utime(tmp_path / name / "log.jsonl", (time, time))
    assert [run.name for run in finished_runs(tmp_path)] == ["future", "now", "past"]
