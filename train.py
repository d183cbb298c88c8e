"""Train an image-text retrieval model.

Examples: `python train.py`, `python train.py --dataset flickr8k`, `python train.py --resume runs/NAME`.
"""

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import config as defaults
from config import FLAGS_WITHOUT_RECIPE, MODEL_FIELDS, Config
from data.download import NAMES
from runtime import cli
from runtime.cli_help import print_help
from runtime.run_dir import read_config
from runtime.text import display_text, shell_argument, wrap

EXAMPLE_QUERIES = {"sample": "a yellow circle left of a red cross", "flickr8k": "a dog in snow"}
MOST_USED = (  # --help shows these first
    *("dataset", "data_dir", "text_encoder", "image_encoder", "model"),
    *("alpha", "batch_size", "epochs", "name", "resume"),
)


@dataclass(frozen=True)
class Flags(Config):
    """Train an image-text retrieval model. Edit the defaults in config.py, or pass flags."""

    resume: Path | None = None  # continue the run in this folder with its settings; other flags override them


def main() -> None:
    if cli.wants_help():
        return print_help(Flags, default_flags()[0], most_used=MOST_USED, note=_help_note())
    config, resume = parse_flags()
    # Importing torch takes seconds, so wrong flags are reported before.
    from data.loading import open_data
    from training.trackers import require_packages

    require_packages(config.report_to)  # before a download
    data = open_data(config)
    print(wrap(f"{data.describe_format()}\n{data.describe()}"), flush=True)
    if resume is None and (line := describe_preset(config)):
        print(wrap(line), flush=True)
    from training.trainer import train

    folder = train(config, data, resume)
    print(f"\nfinished: {display_text(folder)} (log.jsonl, curves.png, best.pt). Next:")
    print(f"  python evaluate.py {shell_argument(folder)} --split test")
    query = EXAMPLE_QUERIES.get(config.dataset) or data.split("test").captions[0]
    print(f"  python infer.py {shell_argument(query)} --run {shell_argument(folder)}")
    from retrieval.onnx_text import export_run_in_background

    export_run_in_background(folder, Path(config.cache_dir))


def parse_flags() -> tuple[Config, Path | None]:
    """Parse the command line into a configuration and the folder of --resume.

    Flags override the settings of the resumed run, or the defaults for the data set.
    """
    default, _ = default_flags()
    flags = cli.parse_flags(Flags, default=default)
    config = Config(**{field.name: getattr(flags, field.name) for field in fields(Config)})
    if config.dataset not in NAMES and Path(config.dataset).expanduser().exists():
        config = replace(config, dataset=_absolute(config.dataset))
    if config.model is not None and Path(config.model).expanduser().is_dir():
        from models.hf_hub import dual_encoder_source

        config = replace(config, model=_absolute(dual_encoder_source(config.model)))
    if config.data_dir is not None:
        config = replace(config, data_dir=_absolute(config.data_dir))
    if flags.resume is None:
        _check_text_encoder(config)
    return config, flags.resume


def _check_text_encoder(config):
    """Raise ValueError if a named text tower would be replaced by a random one."""
    name = cli.peek_flag("--text-encoder")
    if name in (None, "scratch") or config.pretrained:
        return
    if cli.has_flag("--no-pretrained"):
        raise ValueError(f"--no-pretrained trains a small random tower instead of --text-encoder {name}: leave out one")
    raise ValueError(
        f"--text-encoder {name} would be ignored, because {Path(config.dataset).name} trains random towers: "
        "add --pretrained, or leave out --text-encoder"
    )


def default_flags() -> tuple[Flags, str | None]:
    """Return the default of each flag, and the name of the table of config.py that replaced defaults.

    The flags --resume, --start-from, --dataset, --model and those of FLAGS_WITHOUT_RECIPE decide the defaults. Raises
    ValueError if --model is combined with --image-encoder or --text-encoder.
    """
    cli.rename_flags(defaults.RENAMED)
    resumed, start_from = cli.peek_flag("--resume"), cli.peek_flag("--start-from")
    if cli.peek_flag("--model") and (cli.peek_flag("--image-encoder") or cli.peek_flag("--text-encoder")):
        raise ValueError("--model sets both towers: leave out --image-encoder and --text-encoder")
    if resumed is not None:
        return Flags(**asdict(read_config(cli.existing_folder(resumed, "--resume")))), None
    parent = read_config(cli.existing_folder(start_from, "--start-from")) if start_from is not None else None
    dataset, model = cli.peek_flag("--dataset") or Config.dataset, cli.peek_flag("--model") or (parent and parent.model)
    recipe = not any(cli.has_flag(flag) for flag in FLAGS_WITHOUT_RECIPE)
    default = defaults.default_config(dataset, model, recipe=recipe)
    if parent is not None:
        default = replace(default, **{name: getattr(parent, name) for name in MODEL_FIELDS})
    return Flags(**asdict(default)), defaults.preset_name(dataset, model, recipe=recipe)


def describe_preset(config: Config) -> str | None:
    """Describe in one line the values that come from a table of config.py; None if there are none."""
    _, preset = default_flags()
    replaced = {k: v for k, v in defaults.preset_values(preset).items() if getattr(config, k) == v}
    if not replaced:
        return None
    values = ", ".join(f"{name} {value}" for name, value in replaced.items())
    return f"{display_text(Path(config.dataset).name, 40)}: {values}; edit {preset} in config.py, or pass flags"


def _help_note():
    dataset = cli.peek_flag("--dataset") or Config.dataset
    return f"Defaults shown for --dataset {dataset}; `python train.py --dataset NAME --help` shows those of another."


def _absolute(path):
    """Return the absolute path without resolving links, because the suffix of a link's name is its file format."""
    return os.path.abspath(os.path.expanduser(path))


if __name__ == "__main__":
    cli.run(main)
