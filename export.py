"""Take a trained run elsewhere: `python export.py RUN --onnx`, `python export.py RUN --transformers`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from config import Config
from runtime import cli
from runtime.run_dir import newest_finished_run


@dataclass(frozen=True)
class Flags:
    """Write a run's model in a form that other programs load; what is written was compared with PyTorch."""

    run: Annotated[Path | None, tyro.conf.Positional] = None  # the run's folder; without it the newest finished one
    onnx: bool = False  # both towers as ONNX, with the tokenizer
    transformers: bool = False  # a folder for from_pretrained and push_to_hub, where transformers has such a model
    out: Path | None = None  # where to write; without it, onnx/ or transformers/ in the run's folder
    runs_dir: Path = Path(Config.runs_dir)  # where runs are looked for

    def __post_init__(self):
        if self.onnx == self.transformers:
            raise ValueError("choose one of --onnx and --transformers")


def main() -> None:
    flags = cli.parse_flags(Flags)
    folder = cli.existing_folder(flags.run, "a run") if flags.run else newest_finished_run(flags.runs_dir)
    out = flags.out or folder / ("onnx" if flags.onnx else "transformers")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: remove it, or name another folder with --out")
    from models.checkpoint import load_run
    from retrieval.model_export import write_onnx, write_transformers

    write = write_onnx if flags.onnx else write_transformers
    gap = write(load_run(folder), out)
    print(f"written to {out}; its embeddings differ from PyTorch's by {gap:.1e} at most")


if __name__ == "__main__":
    cli.run(main)
