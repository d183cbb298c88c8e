"""Export a trained model: `python export.py RUN --onnx`, `--transformers`, `--share FOLDER`, `--hub OWNER/NAME`."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from config import Config
from models.hub_run import find_run, hub_name, output_folder
from retrieval.embed_dims import check_embed_dims
from runtime import cli
from runtime.run_dir import newest_finished_run
from runtime.text import display_text, shell_argument

if TYPE_CHECKING:
    from models.checkpoint import Run
    from reporting.model_card import Licenses


@dataclass(frozen=True)
class Flags:
    """Export a run's model to ONNX or transformers, and compare the exported embeddings with PyTorch's; or share it.

    A shared run is a folder, or a repository on the Hugging Face Hub, with the weights, the tokenizer and a model card.
    `--run` of every script takes it.
    """

    run: Annotated[Path | None, tyro.conf.Positional] = None  # a folder, or OWNER/NAME on the hub; default: newest run
    embed_dims: int | None = None  # with --onnx: the first values only, for a run trained with --nested-dims
    onnx: bool = False  # both towers as ONNX, with the tokenizer
    transformers: bool = False  # a folder for from_pretrained and push_to_hub, if transformers has this kind of model
    share: Path | None = None  # the folder to write a shared run to
    hub: str | None = None  # OWNER/NAME: upload a shared run to the Hugging Face Hub; log in before: hf auth login
    private: bool = False  # with --hub: create the repository as a private one
    overwrite: bool = False  # with --hub: replace the files of a repository that exists; its history keeps them
    license: str | None = None  # with --share, --hub: of the weights: apache-2.0, cc-by-nc-4.0 ..., or "other:NAME"
    data_license: str | None = None  # ... of the captions and photos that it was trained on
    out: Path | None = None  # the folder to write; by default onnx/ or transformers/ in the run's folder
    runs_dir: Path = Path(Config.runs_dir)  # the folder that contains the runs

    def __post_init__(self):
        if sum((self.onnx, self.transformers, self.share is not None, self.hub is not None)) != 1:
            raise ValueError("choose one of --onnx, --transformers, --share FOLDER and --hub OWNER/NAME")
        if self.out is not None and not (self.onnx or self.transformers):
            raise ValueError("--out is the folder of --onnx and --transformers: leave it out")
        if self.embed_dims is not None and not self.onnx:
            raise ValueError("--embed-dims needs --onnx: the other forms contain the whole model")
        if self.hub is None and (self.private or self.overwrite):
            raise ValueError("--private and --overwrite need --hub OWNER/NAME")
        if (self.onnx or self.transformers) and (self.license or self.data_license):
            raise ValueError("--license and --data-license need --share or --hub")


def main() -> None:
    flags = cli.parse_flags(Flags)
    folder = find_run(flags.run, "a run") if flags.run else newest_finished_run(flags.runs_dir)
    if flags.share is not None or flags.hub is not None:
        return share(folder, flags)
    embed_dims = check_embed_dims(folder, flags.embed_dims)
    name = "transformers" if flags.transformers else "onnx" if embed_dims is None else f"onnx-{embed_dims}"
    out = flags.out or output_folder(folder, flags.runs_dir) / name
    require_empty(out, "--out")
    from models.checkpoint import load_run
    from models.truncation import truncate
    from retrieval.model_export import write_onnx, write_transformers

    write = write_onnx if flags.onnx else write_transformers
    run = load_run(folder)
    if embed_dims is not None:
        truncate(run.model, embed_dims)
    max_difference = write(run, out)
    print(f"written to {display_text(out)}; its embeddings differ from PyTorch's by at most {max_difference:.1e}")


def require_empty(folder: Path, flag: str) -> None:
    """Raise ValueError if something is in the way: nothing of the user's is overwritten."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another folder with {flag}")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: delete it, or choose another folder with {flag}")


def share(folder: Path, flags: Flags) -> None:
    """Write a shared run to --share, or upload it to --hub."""
    from reporting.model_card import Licenses, check_license

    check_license(flags.license, "--license")
    check_license(flags.data_license, "--data-license")
    if flags.share is not None:
        require_empty(flags.share, "--share")
    else:
        from models.hub_upload import check_upload

        check_upload(flags.hub, private=flags.private, overwrite=flags.overwrite)
    licenses = Licenses(flags.license or ask_license(), flags.data_license)
    from models.checkpoint import load_run

    run = load_run(folder)
    if flags.share is not None:
        write_share(run, flags.share, hub_name(folder) or folder.resolve().name, flags.share.resolve().name, licenses)
        print(f"written to {display_text(flags.share)}; weights and tokens equal those of {display_text(folder)}")
        print(f'Next: python infer.py "a dog in snow" --gallery FOLDER --run {shell_argument(flags.share)}')
        return
    from models.hub_upload import upload_run

    with tempfile.TemporaryDirectory(prefix="shared-run-") as temporary:
        shared = Path(temporary) / "run"
        write_share(run, shared, flags.hub, flags.hub, licenses)
        address = upload_run(shared, flags.hub, private=flags.private)
    print(f"uploaded to {display_text(address)}. Next:")
    print(f'  python infer.py "a dog in snow" --gallery FOLDER --run {shell_argument(flags.hub)}')


def write_share(run: "Run", out: Path, name: str, command: str, licenses: "Licenses") -> None:
    """Write a shared run with its model card, whole or not at all, and print what the card lacks."""
    from models.shared_run import require_no_private_paths, write_shared_run
    from reporting.model_card import is_older_than_weights, recall_rows, split_sizes, write_model_card
    from runtime.atomic_io import new_folder

    sizes = split_sizes(run)
    with new_folder(out) as folder:
        write_shared_run(run, folder)
        write_model_card(run, folder, name, command=command, licenses=licenses, sizes=sizes)
        require_no_private_paths(run, folder)
    argument = shell_argument(run.folder)
    if not any(row["split"] == "test" for row in recall_rows(run)):
        print(f"its model card has no recall on the test split: python evaluate.py {argument}, then export again")
    elif is_older_than_weights(run.folder):
        print(f"metrics.json is older than best.pt: python evaluate.py {argument} measures these weights")
    if not sizes:
        print("its model card does not contain the sizes of the splits: the data set is not on this machine")
    if licenses.weights is None:
        print("its model card has no licence: --license apache-2.0, cc-by-nc-4.0 ... states one")


def ask_license() -> str | None:
    """Ask for the licence of the weights if a person can answer; return None for no answer."""
    from reporting.model_card import check_license

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    answer = input("licence of the weights, e.g. apache-2.0 or cc-by-nc-4.0 (Enter: not stated): ").strip()
    check_license(answer or None, "licence")
    return answer or None


if __name__ == "__main__":
    cli.run(main)
