"""Export a trained model for other programs: `python export.py RUN --onnx`, `python export.py RUN --transformers`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from config import Config
from runtime import cli
from runtime.run_dir import newest_finished_run
from runtime.text import display_text


@dataclass(frozen=True)
class Flags:
    """Export a run's model to ONNX or transformers, and compare the exported embeddings with PyTorch's."""

    run: Annotated[Path | None, tyro.conf.Positional] = None  # the run's folder; by default the newest finished run
    onnx: bool = False  # both towers as ONNX, with the tokenizer
    transformers: bool = False  # a folder for from_pretrained and push_to_hub, if transformers has this kind of model
    out: Path | None = None  # the folder to write; by default onnx/ or transformers/ in the run's folder
    runs_dir: Path = Path(Config.runs_dir)  # the folder that contains the runs

    def __post_init__(self):
        if self.onnx == self.transformers:
            raise ValueError("choose either --onnx or --transformers")


def main() -> None:
    flags = cli.parse_flags(Flags)
    folder = cli.existing_folder(flags.run, "a run") if flags.run else newest_finished_run(flags.runs_dir)
    out = flags.out or folder / ("onnx" if flags.onnx else "transformers")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: delete it, or choose another folder with --out")
    from models.checkpoint import load_run
    from retrieval.model_export import write_onnx, write_transformers

    write = write_onnx if flags.onnx else write_transformers
    max_difference = write(load_run(folder), out)
    print(f"written to {display_text(out)}; its embeddings differ from PyTorch's by at most {max_difference:.1e}")


if __name__ == "__main__":
    cli.run(main)
