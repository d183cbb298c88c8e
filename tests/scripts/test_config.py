"""Settings and flags: each field is a flag; a wrong flag is a one-line error, reported before slow imports."""

import dataclasses
import json
import math
import re
import shutil
import typing

import pytest
from helpers import ROOT, one_line_error, run_script

import config as defaults
import evaluate
import train
from config import FLAGS_WITHOUT_RECIPE, OWN_PHOTOS, SAMPLE, Config, default_config
from runtime import cli

DEFAULTS = default_config("my_photos")


def parse(*argv):
    return cli.parse_flags(train.Flags, default=train.Flags(**dataclasses.asdict(DEFAULTS)), argv=list(argv))


def error_line(capsys, *argv):
    with pytest.raises(SystemExit) as error:
        parse(*argv)
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_defaults_are_a_valid_configuration():
    assert Config() == Config(**dataclasses.asdict(Config()))


REQUIRED_FLAGS = {"cached_views": {"freeze_image": True}}  # field -> other fields without which it is an error


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
def test_every_field_is_a_flag_of_its_name(field):
    flag, default = f"--{field.name.replace('_', '-')}", getattr(DEFAULTS, field.name)
    if isinstance(default, bool):
        argv, value = [flag if not default else f"--no-{flag[2:]}"], not default
    elif isinstance(default, float):
        argv, value = [flag, "0.5"], 0.5
    elif field.type == tuple[int, ...]:
        argv, value = [flag, "17", "19"], (17, 19)
    elif isinstance(default, int) or "int" in str(field.type):
        argv, value = [flag, "17"], 17
    elif isinstance(default, tuple):
        value = typing.get_args(typing.get_args(field.type)[0])[:2]
        argv = [flag, *value]
    else:
        value = typing.get_args(field.type)[-1] if typing.get_origin(field.type) is typing.Literal else "word"
        argv = [flag, value]
    required = REQUIRED_FLAGS.get(field.name, {})
    parsed = parse(*argv, *(f"--{name.replace('_', '-')}" for name in required))
    expected = dataclasses.asdict(DEFAULTS) | {field.name: value, "resume": None} | required
    assert dataclasses.asdict(parsed) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("captions_per_image", 0),
        ("embed_dim", 0),
        ("image_size", 15),
        ("eval_image_scale", 0.4),
        ("eval_image_scale", math.nan),
        ("max_tokens", 2),
        ("num_workers", -2),
        ("seed", -1),
        ("split_seed", -1),
        ("min_crop", 0.0),
        ("min_crop", 1.5),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("image_feature_dropout", 1.0),
        ("word_dropout", 1.0),
        ("temperature", 0.0),
        ("temperature", math.inf),
        ("max_grad_norm", 0.0),
        ("alpha", -0.1),
        ("alpha", math.inf),
        ("alpha", math.nan),
        ("alpha_warmup_epochs", -1.0),
        ("margin", -1.0),
        ("lr_image", math.nan),
        ("lr_text", -1e-5),
        ("lr_heads", math.inf),
        ("weight_decay", -0.1),
        ("warmup_epochs", -1.0),
        ("image_size", 100_000),
        ("embed_dim", 70_000),
        ("epochs", 10_000_000),
        ("batch_size", 10**8),
        ("captions_per_image", 10**6),
        ("max_tokens", 10**6),
        ("num_workers", 5000),
        ("seed", 2**64),
        ("lora", 10_000),
        ("cached_views", 10**6),
        ("freeze_epochs", 10**8),
        ("save_every_steps", 10**10),
        ("temperature", 1e9),
        ("max_grad_norm", 1e300),
        ("lr_heads", 1e4),
        ("weight_decay", 1e3),
        ("warmup_epochs", 1e9),
        ("name", "a/b"),
        ("name", ".."),
        ("name", ""),
    ],
)
def test_value_out_of_range_is_an_error_with_flag_and_value(name, value):
    with pytest.raises(ValueError) as error:
        Config(**{name: value})
    assert f"--{name.replace('_', '-')} " in str(error.value)
    assert str(error.value).endswith(f"got {value!r}")


def test_message_about_a_number_with_thousands_of_digits_is_short():
    with pytest.raises(ValueError, match=r"--seed must be .*, got a number of \d+ bits"):
        Config(seed=10**4000)


@pytest.mark.parametrize(("name", "value"), [("cache_dir", "a\0b"), ("dataset", "x" * 5000), ("text_encoder", "\0")])
def test_name_or_path_that_no_system_accepts_is_an_error_that_names_the_flag(name, value):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} "):
        Config(**{name: value})


def test_image_size_in_search_is_bounded():
    with pytest.raises(ValueError, match="--eval-image-scale"):
        Config(image_size=1024, eval_image_scale=4.0)


def test_preset_of_a_data_set_replaces_defaults():
    own, sample = default_config("my_photos"), default_config("sample")
    assert own.text_encoder == OWN_PHOTOS["text_encoder"][1] != Config.text_encoder
    assert not sample.pretrained and sample.image_encoder == SAMPLE["image_encoder"][1] != Config.image_encoder


@pytest.mark.parametrize("name", ["OWN_PHOTOS", "SAMPLE", "PRETRAINED_DUAL_ENCODER"])
def test_preset_lists_the_current_defaults(name):
    """With an outdated default, an entry would be taken for one that the user edited, and never apply."""
    assert {field: shipped for field, (shipped, _) in getattr(defaults, name).items()} == {
        field: getattr(Config, field) for field in getattr(defaults, name)
    }


DATASETS = {"sample": "sample", "flickr8k": "flickr8k", "own photos": "my_photos", "pretrained": "my_photos"}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize(("field", "edited"), [("alpha", 0.5), ("batch_size", 64), ("epochs", 7), ("tta_flip", "x")])
def test_edited_default_applies_to_every_data_set(tmp_path, dataset, field, edited):
    """Edit one default in the config.py of a copy of the program."""
    edited = {"x": not Config.tta_flip}.get(edited, edited)
    for name in ("train.py", "config.py", "losses.py", "runtime", "data"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    text, count = re.subn(
        rf"(    {field}: \w+ = )\S+", rf"\g<1>{edited}", (ROOT / "config.py").read_text("utf-8"), count=1
    )
    assert count == 1
    (tmp_path / "config.py").write_text(text, "utf-8")
    flags = ["--dataset", DATASETS[dataset], *(["--model", "openai/clip"] if dataset == "pretrained" else [])]
    code = f"import sys, train; sys.argv = ['train.py', *{flags!r}]; print(train.parse_flags()[0].{field})"
    done = run_script("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == str(edited)


def test_run_prints_which_defaults_the_preset_replaced(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--batch-size", "16"])
    line = train.describe_preset(train.parse_flags()[0])
    assert line.startswith("sample: ") and "epochs 40" in line and "image_encoder resnet10t" in line
    assert "batch_size" not in line and "edit SAMPLE in config.py, or pass flags" in line
    monkeypatch.setattr("sys.argv", ["train.py", "--dataset", "flickr8k"])
    assert train.describe_preset(train.parse_flags()[0]) is None


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--image-stages", "2"], "unfreeze_image_stages", 2),
        (["--text_layers=3"], "unfreeze_text_layers", 3),
        (["--stored-views", "0"], "cached_views", 0),
        (["--search-scale", "2"], "eval_image_scale", 2.0),
        (["--no-search-mirrored"], "tta_flip", False),
        (["--search-mirrored"], "tta_flip", True),
    ],
)
def test_flags_of_version_1_work_and_print_their_new_names(monkeypatch, capsys, argv, name, value):
    monkeypatch.setattr("sys.argv", ["train.py", "--dataset", "flickr8k", *argv])
    assert getattr(train.parse_flags()[0], name) == value
    stderr = capsys.readouterr().err
    assert f"is now --{'no-' if value is False else ''}{name.replace('_', '-')}\n" in stderr
    assert stderr.count("\n") == 1


def test_help_lists_most_used_flags_first_then_groups_with_choices_and_defaults_of_the_data_set(tmp_path):
    text = run_script("train.py", "--help", "--dataset", "flickr8k", cwd=tmp_path).stdout
    order = ["--dataset flickr8k", "Most used:", "--alpha", "Data:", "Model:", "Evaluation", "Objective:"]
    order += ["Optimisation:", "Run:"]
    positions = [text.index(heading) for heading in order]
    assert positions == sorted(positions) and "[256]" in text
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(train.Flags)}
    assert flags == {flag for flag in re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)}
    assert all(re.search(rf"^  {flag}\b", text, re.MULTILINE) for flag in flags)
    literals = [field for field in dataclasses.fields(Config) if typing.get_origin(field.type) is typing.Literal]
    assert {field.name for field in literals} >= {"device", "precision", "negatives", "distance"}
    for field in literals:
        choices = "{" + ",".join(typing.get_args(field.type)) + "}"
        assert re.search(rf"^  --{field.name.replace('_', '-')} {re.escape(choices)}(?:$|  )", text, re.MULTILINE)
    assert text.count("{") == len(literals) + 1  # --report-to takes several
    assert "--report-to {tensorboard,wandb,trackio,mlflow} ...\n" in text and "trackers [none]" in text
    assert "--nested-dims INT ..." in text


def test_prefix_of_several_flags_suggests_all_of_them(capsys):
    line = error_line(capsys, "--lr", "1e-3")
    assert "did you mean --lr-heads, --lr-image, --lr-text?" in line


@pytest.mark.parametrize("argv", [["--dataset", "flickr8k"], ["--dataset=flickr8k"]])
def test_dataset_flag_decides_the_defaults(monkeypatch, argv):
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    config, _ = train.parse_flags()
    assert config == default_config("flickr8k") == Config(dataset="flickr8k")


def test_flags_without_recipe_are_fields_of_config():
    names = [flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in FLAGS_WITHOUT_RECIPE]
    assert all(hasattr(Config, name) for name in names)


@pytest.mark.parametrize(
    "argv",
    [
        ["--freeze-text"],
        ["--freeze_text"],
        ["--no-pretrained"],
        ["--lora", "4"],
        ["--lora=4"],
        ["--freeze-image", "--lora", "4"],
    ],
)
def test_flags_that_decide_what_trains_replace_the_recipe_of_the_data_set(monkeypatch, argv):
    monkeypatch.setattr("sys.argv", ["train.py", "--dataset", "flickr8k", "--alpha", "0.7", *argv])
    config, _ = train.parse_flags()
    expected = {"freeze_text": "text" in argv[0], "freeze_image": "--freeze-image" in argv}
    expected |= {"pretrained": "--no-pretrained" not in argv, "lora": 4 if "lora" in " ".join(argv) else 0}
    defaults_without_recipe = default_config("flickr8k", recipe=False)
    assert defaults_without_recipe.batch_size == OWN_PHOTOS["batch_size"][1]
    assert config == dataclasses.replace(defaults_without_recipe, alpha=0.7, **expected)


def test_flag_overrides_the_preset(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--epochs", "3"])
    config, _ = train.parse_flags()
    assert config == dataclasses.replace(default_config("sample"), epochs=3)


def test_resumed_run_keeps_its_settings_except_for_flags(monkeypatch, tmp_path):
    settings = dataclasses.asdict(Config(dataset="flickr8k", alpha=0.3, margin=0.4))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(tmp_path), "--margin", "0.5"])
    config, resume = train.parse_flags()
    assert resume == tmp_path
    assert config == Config(dataset="flickr8k", alpha=0.3, margin=0.5)


def test_data_set_folder_is_stored_as_an_absolute_path(monkeypatch, tmp_path):
    (tmp_path / "my_photos").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "--dataset", "my_photos", "--data-dir", "elsewhere"])
    config, _ = train.parse_flags()
    assert (config.dataset, config.data_dir) == (str(tmp_path / "my_photos"), str(tmp_path / "elsewhere"))


def test_linked_caption_file_keeps_the_name_of_the_link(monkeypatch, tmp_path):
    (tmp_path / "0f3a").write_text("image,caption\n")
    (tmp_path / "captions.csv").symlink_to(tmp_path / "0f3a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "--dataset", "captions.csv"])
    assert train.parse_flags()[0].dataset == str(tmp_path / "captions.csv")


def test_unknown_flag_is_a_one_line_error_that_suggests_a_similar_flag(capsys):
    line = error_line(capsys, "--alhpa", "0.2")
    assert "--alhpa" in line and "did you mean --alpha?" in line


def test_flag_of_a_positional_argument_is_an_error_that_explains_it(capsys):
    with pytest.raises(SystemExit):
        cli.parse_flags(evaluate.Flags, argv=["--run", "runs/x"])
    line = capsys.readouterr().err
    assert "--run" in line and "positional: pass its value without the flag" in line


def test_value_of_the_wrong_type_is_a_one_line_error_with_flag_and_value(capsys):
    line = error_line(capsys, "--epochs", "many")
    assert "--epochs" in line and "many" in line


def test_invalid_choice_is_a_one_line_error_with_the_choices(capsys):
    line = error_line(capsys, "--device", "tpu")
    assert "--device" in line and "tpu" in line and "cuda" in line


def test_flag_out_of_range_is_a_one_line_error_with_flag_and_value(capsys):
    line = error_line(capsys, "--epochs", "0")
    assert "--epochs" in line and line.count("got 0") == 1


def test_missing_value_is_a_one_line_error_with_the_flag(capsys):
    assert "--epochs" in error_line(capsys, "--epochs")


def test_error_lines_contain_no_frame(capsys):
    for argv in (["--alhpa", "1"], ["--epochs", "many"], ["--device", "tpu"], ["--epochs", "0"], ["word"]):
        assert not re.search("[│╭╮╰╯─]|---", error_line(capsys, *argv))


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--a", "1"], "1"),
        (["--b", "--a=2"], "2"),
        (["--a="], ""),
        (["--ab", "3"], None),
        (["--a"], None),
        ([], None),
        (["--a", "1", "--a=2"], "2"),  # as tyro reads them
        (["--a", "1", "--b", "--a", "3", "4"], "3"),
    ],
)
def test_peek_flag_reads_the_last_value_of_one_flag(argv, value):
    assert cli.peek_flag("--a", argv) == value


def test_data_set_name_takes_precedence_over_a_folder_with_that_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flickr8k").mkdir()
    monkeypatch.setattr("sys.argv", ["train.py", "--dataset", "flickr8k", "--data-dir", "flickr8k"])
    config, _ = train.parse_flags()
    assert config.dataset == "flickr8k" and config.data_dir == str(tmp_path / "flickr8k")


def test_last_of_several_dataset_flags_decides_the_defaults(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--dataset", "sample", "--dataset", "my_photos"])
    config, _ = train.parse_flags()
    assert config == default_config("my_photos")


def test_typo_is_reported_without_importing_torch(tmp_path):
    check = "import sys; heavy = {'torch', 'transformers', 'timm', 'pandas', 'matplotlib'} & set(sys.modules)"
    script = f"""
import sys, train
from runtime import cli
sys.argv = ["train.py", "--alhpa", "1"]
try:
    cli.run(train.main)
finally:
    {check}; print("heavy:", sorted(heavy))
"""
    done = run_script("-c", script, cwd=tmp_path, check=False)
    assert "heavy: []" in done.stdout
    assert "did you mean --alpha?" in one_line_error(done)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "infer.py"])
def test_help_lists_the_flags_without_slow_imports(script, tmp_path):
    done = run_script("-X", "importtime", script, "--help", cwd=tmp_path)
    assert "--runs-dir" in done.stdout
    assert "import time" in done.stderr and not re.search(r"\| +(torch|pandas|transformers)$", done.stderr, re.M)


@pytest.mark.parametrize("flag", ["--help", "--qeury"])
def test_help_and_a_wrong_flag_of_infer_import_neither_numpy_nor_asyncio(flag, tmp_path):
    done = run_script("-X", "importtime", "infer.py", flag, cwd=tmp_path, check=False)
    assert "import time" in done.stderr and done.returncode == (0 if flag == "--help" else 2)
    assert not re.search(r"\| +(numpy|asyncio)$", done.stderr, re.M)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("wrong\n  twice"), 2, "error: wrong twice"),
        (FileNotFoundError("no such folder: x"), 2, "error: no such folder: x"),
        (KeyboardInterrupt("Epoch 1 is saved"), 130, "stopped. Epoch 1 is saved"),
    ],
)
def test_script_ends_with_one_line_and_an_exit_code(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_error:
        cli.run(main)
    assert exit_error.value.code == code
    assert capsys.readouterr().err.strip() == line


def test_bug_in_the_program_keeps_its_traceback():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        cli.run(main)
