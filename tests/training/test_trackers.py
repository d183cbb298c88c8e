"""--report-to: what TensorBoard and Trackio have stored is read back; a tracker that fails ends no run."""

import dataclasses
import json
import sqlite3

import pytest
from helpers import one_line_error, open_data_of, run_in_process

from config import Config
from runtime.run_dir import read_config, read_log
from training import step_log, trackers, trainer
from training.trackers import Trackers, require_packages
from training.trainer import Path, train


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(trainer, "plot_curves", lambda *_, **__: None)


@pytest.fixture
def config(tiny_config):
    return tiny_config(epochs=2, freeze_image=True, freeze_text=True, log_every_steps=1)


@pytest.fixture
def with_tensorboard(config):
    pytest.importorskip("tensorboard")
    return dataclasses.replace(config, report_to=("tensorboard",))


@pytest.fixture
def trackio_folder(tmp_path, monkeypatch):
    """A folder in which Trackio stores its data, and nothing that it measures on its own."""
    trackio = pytest.importorskip("trackio")
    folder = tmp_path / "trackio"
    for module in (trackio, trackio.utils, trackio.sqlite_storage, trackio.media.utils, trackio.media.media):
        for name, path in (("TRACKIO_DIR", folder), ("MEDIA_DIR", folder / "media")):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, path)
    init = trackio.init
    monkeypatch.setattr(trackio, "init", lambda *a, **k: init(*a, **k, auto_log_cpu=False, auto_log_gpu=False))
    return folder


def read_tensorboard(folder):
    """Read tag -> list of (step, value), and the tags of images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}


def read_trackio(folder):
    """Read the stored (run, step, values) of all runs, and run -> configuration."""
    with sqlite3.connect(folder / f"{trackers.PROJECT}.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = dict(base.execute("select run_name, config from configs").fetchall())
    return [(name, step, json.loads(values)) for name, step, values in rows], configs


def test_tensorboard_has_every_value_of_both_logs_the_settings_and_pictures(with_tensorboard):
    config = with_tensorboard
    folder = train(config, open_data_of(config), None)
    scalars, images = read_tensorboard(folder)
    log, steps = read_log(folder), [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    for key in log[0]:
        group = "val" if key[:4] in ("i2t_", "t2i_", "rsum") else "train"
        expected = [(3 * record["epoch"], pytest.approx(record[key], rel=1e-5)) for record in log]
        assert scalars[f"{group}/{key.replace('@', '_at_')}"] == expected, key
    for key in steps[0].keys() - {"step"}:
        assert scalars[f"step/{key}"] == [(r["step"], pytest.approx(r[key], rel=1e-5)) for r in steps], key
    assert images == {"val/matches": [3, 6]}
    (settings,) = (folder / "tensorboard").glob("*/hparams.yml")
    assert "lr_heads: " in settings.read_text() and f"dataset: {config.dataset}" in settings.read_text()
    assert read_config(folder) == config


def test_picture_shows_the_same_validation_captions_and_their_best_photos(with_tensorboard, monkeypatch):
    from reporting import match_picture

    drawn = []
    monkeypatch.setattr(match_picture, "draw_photos", lambda answers: drawn.append(answers))
    config = with_tensorboard
    train(config, open_data_of(config), None)
    val, (first, second) = open_data_of(config).split("val"), drawn
    assert [answer[0] for answer in first] == [answer[0] for answer in second] == list(val.captions)
    for _, _, matches in (*first, *second):
        assert sorted(match.item for match in matches) == sorted(val.paths)
        assert matches[0].score >= matches[1].score


def test_trackio_continues_the_curve_of_a_killed_run_with_each_step_once(config, trackio_folder, monkeypatch):
    config = dataclasses.replace(config, report_to=("trackio",))
    original = step_log.StepLog.add

    def add(self, step, values, **options):
        if step == 6:
            raise SystemError("killed")
        return original(self, step, values, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(step_log.StepLog, "add", add)
        train(config, open_data_of(config), None)
    folder = train(config, open_data_of(config), Path(config.runs_dir) / "run")
    rows, configs = read_trackio(trackio_folder)
    ((name, settings),) = configs.items()
    assert name.startswith("run-") and {row[0] for row in rows} == {name}
    assert json.loads(settings)["batch_size"] == 8 and json.loads(settings)["micro_batch_size"] == "None"
    assert [step for _, step, values in rows if "step/loss" in values] == [1, 2, 3, 4, 5, 6]
    epochs = [(step, values) for _, step, values in rows if "val/rsum" in values]
    assert [(step, values["val/rsum"]) for step, values in epochs] == [
        (3 * record["epoch"], record["rsum"]) for record in read_log(folder)
    ]
    pictures = [values["val/matches"] for _, _, values in rows if "val/matches" in values]
    assert len(pictures) == 2 and all(picture["_type"] == "trackio.image" for picture in pictures)
    assert len(list(trackio_folder.rglob("*.png"))) == 2


def test_resumed_tensorboard_run_has_each_epoch_once(with_tensorboard):
    config = dataclasses.replace(with_tensorboard, epochs=1)
    folder = train(config, open_data_of(config), None)
    train(dataclasses.replace(config, epochs=2), open_data_of(config), folder)
    scalars, _ = read_tensorboard(folder)
    assert [step for step, _ in scalars["val/rsum"]] == [3, 6]
    assert [step for step, _ in scalars["step/loss"]] == [1, 2, 3, 4, 5, 6]


class Failing:
    """A tracker that fails `times` times."""

    def __init__(self, times):
        self.times, self.logged = times, []

    def log(self, values, step):
        if self.times:
            self.times -= 1
            raise ConnectionError("no route\nto host")
        self.logged.append((step, sorted(values)))

    def finish(self):
        raise OSError("gone")


def test_tracker_that_fails_is_reported_once_and_tried_again_after_the_epoch(tmp_path, monkeypatch, capsys):
    tracker = Failing(times=2)
    monkeypatch.setitem(trackers._START, "wandb", lambda *_: tracker)
    monkeypatch.setitem(trackers._LOG_PICTURE, "wandb", lambda *_: None)
    reported = Trackers(("wandb",), tmp_path, {})
    reported.log_step({"step": 1, "loss": 1.0})
    reported.log_step({"step": 2, "loss": 1.0})  # not tried: each attempt may wait for a timeout
    reported.log_epoch({"epoch": 1, "rsum": 2.0}, 2, lambda: None)
    reported.log_epoch({"epoch": 2, "rsum": float("nan"), "note": "x"}, 4, lambda: None)
    reported.log_step({"step": 5, "loss": 1.0})
    reported.finish()
    assert tracker.logged == [(4, ["train/epoch"]), (5, ["step/loss"])]
    assert capsys.readouterr().err == "wandb failed, and training continues: no route to host\n"


def test_run_whose_tracker_cannot_start_or_draw_is_trained_all_the_same(config, monkeypatch, capsys):
    def start(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(trackers, "_is_installed", lambda name: True)
    monkeypatch.setitem(trackers._START, "wandb", start)
    monkeypatch.setitem(trackers._START, "mlflow", lambda *_: Failing(times=0))
    monkeypatch.setattr(trainer, "draw_matches", lambda *_: [][0])
    config = dataclasses.replace(config, report_to=("wandb", "mlflow"))
    assert len(read_log(train(config, open_data_of(config), None))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines if "failed" in line] == [
        *("wandb failed", "val/matches failed", "mlflow failed")
    ]


def test_missing_package_is_one_line_before_anything_is_written(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "_is_installed", lambda name: name != "mlflow")
    line = one_line_error(run_in_process("train.py", "--report-to", "tensorboard", "mlflow"))
    assert line == "error: --report-to tensorboard mlflow: not installed; pip install mlflow"
    with pytest.raises(ValueError, match="pip install mlflow"):
        train(dataclasses.replace(config, report_to=("mlflow",)), open_data_of(config), None)
    assert not Path(config.runs_dir).exists()


def test_folder_named_like_a_package_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # what wandb leaves where it runs
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="pip install wandb"):
        require_packages(["wandb"])


def test_unknown_tracker_is_refused_and_repeated_ones_count_once(tmp_path):
    with pytest.raises(ValueError, match="tensorboard, wandb, trackio, mlflow, got neptune"):
        Config(report_to=("tensorboard", "neptune"))
    assert Config(report_to=["wandb", "wandb"]).report_to == ("wandb",)
    for damaged in ("wandb", [{}], [["wandb"]], {"wandb": 1}, None):
        (tmp_path / "config.json").write_text(json.dumps({"report_to": damaged}))
        with pytest.raises(ValueError, match="report_to"):
            read_config(tmp_path)


def test_damaged_trackers_file_begins_a_new_curve(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._START, "wandb", lambda *_: Failing(times=0))
    for content in ("", "[]", '{"id": 3}', '{"id": "x", "names": 5, "mlflow": null}', "\x00"):
        (tmp_path / "trackers.json").write_text(content)
        Trackers(("wandb",), tmp_path, {})
        state = json.loads((tmp_path / "trackers.json").read_text())
        assert len(state["id"]) == 8 and state["names"] == ["wandb"]
