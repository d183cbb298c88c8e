"""Locate a data set: draw the sample set, download a named data set, or use a folder or file on disk."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from data.storage import is_folder, single_folder
from runtime.launcher import process_rank
from runtime.text import display_text

KAGGLE = {
    "flickr8k": "adityajn105/flickr8k",
    "flickr30k": "hsankesara/flickr-image-dataset",
    "coco": "awsaf49/coco-2017-dataset",
}
NAMES = ("sample", *KAGGLE)
NOT_SHARED = "not-shared:"  # before the name of a data set that a shared run came without (models/shared_settings.py)
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,3}(?=[^/\\])")  # pathlib turns https:// into https:/
HUB_ADDRESS = re.compile(r"(?:hf://|https?://[\w.-]*(?:huggingface|hf-mirror)[\w.-]*/)datasets/([\w-][\w.-]*/[\w.-]+)")
KAGGLE_ADDRESS = re.compile(r"https?://(?:www\.)?kaggle\.com/datasets/([\w-]+/[\w-]+)")


@dataclass(frozen=True)
class Source:
    """Where to read a data set: a folder, a caption file, or a name on the Hugging Face Hub."""

    path: Path
    hub_name: str | None = None


def find_source(dataset: str, data_dir: str | Path | None, cache_dir: str | Path) -> Source:
    """Return where the captions and photos of `dataset` are stored, and download or draw them first if necessary.

    Raises FileNotFoundError if there is no such data set or folder, ConnectionError if a download fails, and ValueError
    for an address.
    """
    refuse_address(dataset, "--dataset")
    refuse_address(data_dir, "--data-dir")
    if data_dir is not None:
        return Source(_existing_path(data_dir, dataset))
    if dataset.startswith(NOT_SHARED):
        raise FileNotFoundError(
            f"this shared run was trained on {dataset.removeprefix(NOT_SHARED)!r}, which is not part of it: pass your "
            "copy with --data-dir FOLDER (evaluate.py can measure on other data too: --dataset NAME_OR_FOLDER)"
        )
    _say_which(dataset)
    if dataset == "sample":
        return Source(_draw_sample(cache_dir))
    if dataset in KAGGLE:
        with dataset_lock(cache_dir):
            return Source(_download(dataset))
    path = Path(dataset).expanduser()
    if path.exists() or is_folder(path):
        return Source(single_folder(path) if path.is_file() and is_folder(path) else path)
    # If the parent folder exists, the argument is a mistyped path and not a name on the hub.
    if HUB_NAME.fullmatch(dataset) and not path.parent.exists():
        return Source(path, hub_name=dataset)
    raise FileNotFoundError(
        f"no data set or folder {dataset!r}: expected {', '.join(NAMES)}, a folder with images and "
        "captions.txt, a caption file, or owner/name on the Hugging Face Hub"
    )


def refuse_address(value: str | Path | None, flag: str) -> None:
    """Raise ValueError if the value of a flag is an address (https://, s3://, hf://): nothing is fetched from it."""
    text = str(value or "")
    if (address := ADDRESS.match(text)) is None or Path(text).exists():
        return
    hub, kaggle = HUB_ADDRESS.match(text), KAGGLE_ADDRESS.match(text)
    if flag == "--dataset" and hub:
        advice = f"pass the name on the hub: --dataset {hub[1]}"
    elif flag == "--dataset" and kaggle:
        names = [name for name, handle in KAGGLE.items() if handle == kaggle[1]]
        advice = f"pass --dataset {names[0]}" if names else "download it and pass its folder or archive"
    else:
        what = "photo and pass its file" if flag == "--image" else "data and pass its folder or archive"
        advice = f"download the {what}"
    raise ValueError(f"{flag} {text}: addresses ({address[1]}:) are not fetched; {advice}")


def _say_which(dataset):
    """Print which of the two is used if a folder has the name of a data set, before a download begins."""
    if dataset in NAMES and Path(dataset).exists() and process_rank() == 0:
        what = "drawn here" if dataset == "sample" else "downloaded from Kaggle"
        copy = "" if dataset == "sample" else f", or --data-dir {dataset} to use it as a copy of {dataset}"
        message = (
            f"--dataset {dataset} is the data set of that name, {what}, not {Path(dataset).resolve()}: pass "
            f"./{dataset} to use the folder as any other{copy}"
        )
        print(display_text(message), file=sys.stderr, flush=True)


def _existing_path(data_dir, dataset):
    path = Path(data_dir).expanduser()
    if not path.exists() and not is_folder(path):
        raise FileNotFoundError(f"no such folder: {data_dir} (--data-dir)")
    if path.is_file() and is_folder(path):
        return single_folder(path)
    name = Path(dataset.removeprefix(NOT_SHARED)).name
    caption_file = path / name  # --dataset was a caption file, whose folder has moved to --data-dir
    return caption_file if Path(dataset).suffix and caption_file.is_file() else path


def _draw_sample(cache_dir):
    from data.sample_set import write_sample_set

    folder = Path(cache_dir) / "sample"
    with dataset_lock(cache_dir):
        write_sample_set(folder)
    return folder


def dataset_lock(folder: str | Path):
    """Return a file lock, so that one process draws or downloads a data set while the others wait for it."""
    from filelock import FileLock

    Path(folder).mkdir(parents=True, exist_ok=True)
    return FileLock(Path(folder) / "data.lock")


def download_from_kaggle(handle: str, file: str | None = None) -> Path:
    """Download a data set of Kaggle, or one of its files. Raises whatever kagglehub's network library raises."""
    import kagglehub

    return Path(kagglehub.dataset_download(handle, **({"path": file} if file else {})))


def short_reason(error: Exception) -> str:
    """Return the type and the start of the message of a library's exception, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:80]


def _download(dataset):
    handle = KAGGLE[dataset]
    try:
        return download_from_kaggle(handle)
    except Exception as error:  # kagglehub does not wrap the exceptions of its network library
        raise ConnectionError(
            f"could not download {dataset} from Kaggle ({short_reason(error)}); try again, or download it manually "
            f"from kaggle.com/datasets/{handle} and pass its folder with --data-dir"
        ) from None
