"""Train a model: `python train.py`, `python train.py --dataset flickr8k`, `python train.py --resume runs/NAME`."""

import os
import shlex
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from config import FLAGS_WITHOUT_RECIPE, MODEL_FIELDS, Config, default_config
from data.download import NAMES
from runtime import cli
from runtime.run_dir import read_config

QUERIES = {"sample": "a yellow circle left of a red cross", "flickr8k": "a dog in snow"}


@dataclass(frozen=True)
class Flags(Config):
    """Train an image-text retrieval model. The defaults stand in config.py, with what differs for a data set."""

    resume: Path | None = None  # folder of a run to go on with, by its own settings; flags given beside it win


def main() -> None:
    config, resume = parse_flags()
    # torch and the libraries above it take seconds to load: what can be wrong without them is told before.
    data = cli.open_data(config)
    print(data.describe(), flush=True)
    from training.trainer import train

    folder = train(config, data, resume)
    print(f"\nfinished: {folder} (log.jsonl, curves.png, best.pt). Next:")
    print(f"  python evaluate.py {folder} --split test")
    query = QUERIES.get(config.dataset) or data.part("test").captions[0]
    print(f"  python infer.py {shlex.quote(query)} --run {folder}")


def parse_flags() -> tuple[Config, Path | None]:
    """The configuration: the flags given, over the resumed run's settings or the data set's defaults."""
    resumed, start_from = cli.given("--resume"), cli.given("--start-from")
    if cli.given("--model") and (cli.given("--image-encoder") or cli.given("--text-encoder")):
        raise ValueError("--model is both towers: leave out --image-encoder and --text-encoder")
    if resumed is None:
        parent = read_config(cli.existing_folder(start_from, "--start-from")) if start_from is not None else None
        pair = cli.given("--model") or (parent and parent.model)
        recipe = not any(cli.named(flag) for flag in FLAGS_WITHOUT_RECIPE)
        default = default_config(cli.given("--dataset") or Config.dataset, pair, recipe=recipe)
        if parent is not None:
            default = replace(default, **{name: getattr(parent, name) for name in MODEL_FIELDS})
    else:
        default = read_config(cli.existing_folder(resumed, "--resume"))
    flags = cli.parse_flags(Flags, default=Flags(**asdict(default)))
    config = Config(**{field.name: getattr(flags, field.name) for field in fields(Config)})
    if config.dataset not in NAMES and Path(config.dataset).expanduser().exists():
        config = replace(config, dataset=_from_anywhere(config.dataset))
    if config.model is not None and Path(config.model).expanduser().is_dir():
        config = replace(config, model=_from_anywhere(config.model))
    if config.data_dir is not None:
        config = replace(config, data_dir=_from_anywhere(config.data_dir))
    return config, flags.resume


def _from_anywhere(path):
    """A path that is found from any working folder. Of a link its own name, which says what kind of file it is."""
    return os.path.abspath(os.path.expanduser(path))


if __name__ == "__main__":
    cli.run(main)
