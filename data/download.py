"""Locate a data set: draw the sample set, download a named data set, or use a folder or file on disk."""

import re
from dataclasses import dataclass
from pathlib import Path

KAGGLE = {
    "flickr8k": "adityajn105/flickr8k",
    "flickr30k": "hsankesara/flickr-image-dataset",
    "coco": "awsaf49/coco-2017-dataset",
}
NAMES = ("sample", *KAGGLE)
KARPATHY_SPLITS = "shtvkumar/karpathy-splits"  # the splits that papers report on, for all three data sets
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name


@dataclass(frozen=True)
class Source:
    """Where to read a data set: a folder, a caption file, or a name on the Hugging Face Hub."""

    path: Path
    hub_name: str | None = None
    karpathy_file: Path | None = None  # the published split of a named data set, if it is not in the folder


def find_source(dataset: str, data_dir: str | Path | None, cache_dir: str | Path) -> Source:
    """Return where the captions and photos of `dataset` are stored, and download or draw them first if necessary.

    Raises FileNotFoundError if there is no such data set or folder, and ConnectionError if a download fails.
    """
    if data_dir is not None:
        path = _existing_path(data_dir, dataset)
        return Source(path, karpathy_file=_published_split(dataset, path, cache_dir))
    if dataset == "sample":
        return Source(_draw_sample(cache_dir))
    if dataset in KAGGLE:
        with dataset_lock(cache_dir):
            path = _download(KAGGLE[dataset], dataset)
        return Source(path, karpathy_file=_published_split(dataset, path, cache_dir))
    path = Path(dataset).expanduser()
    if path.exists():
        return Source(path)
    # If the parent folder exists, the argument is a mistyped path and not a name on the hub.
    if HUB_NAME.fullmatch(dataset) and not path.parent.exists():
        return Source(path, hub_name=dataset)
    raise FileNotFoundError(
        f"no data set or folder {dataset!r}: expected {', '.join(NAMES)}, a folder with images and "
        "captions.txt, a caption file, or owner/name on the Hugging Face Hub"
    )


def _existing_path(data_dir, dataset):
    path = Path(data_dir).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no such folder: {data_dir} (--data-dir)")
    caption_file = path / Path(dataset).name  # --dataset was a caption file, whose folder has moved to --data-dir
    return caption_file if Path(dataset).suffix and caption_file.is_file() else path


def _draw_sample(cache_dir):
    from data.sample_set import write_sample_set

    folder = Path(cache_dir) / "sample"
    with dataset_lock(cache_dir):
        write_sample_set(folder)
    return folder


def _published_split(dataset, path, cache_dir):
    """Return the downloaded split file of a named data set, or None if its folder contains the published split.

    A named data set always has its published split: from a file in its folder, else from Kaggle.
    """
    from data.format_detection import has_published_split  # imports numpy, but train.py --help needs NAMES only

    name = f"dataset_{dataset}.json"
    if dataset not in KAGGLE or has_published_split(path, name):
        return None
    with dataset_lock(cache_dir):
        return _download(KARPATHY_SPLITS, dataset, name)


def dataset_lock(folder: str | Path):
    """Return a file lock, so that one process draws or downloads a data set while the others wait for it."""
    from filelock import FileLock

    Path(folder).mkdir(parents=True, exist_ok=True)
    return FileLock(Path(folder) / "data.lock")


def _download(handle, dataset, file=None):
    import kagglehub

    try:
        return Path(kagglehub.dataset_download(handle, **({"path": file} if file else {})))
    except Exception as error:  # kagglehub does not wrap the exceptions of its network library
        reason = f"{type(error).__name__}: {error}"[:80]
        next_step = (
            f"put {file} next to the captions, or pass the folder as --dataset to split it at random"
            if file
            else "pass its folder with --data-dir"
        )
        raise ConnectionError(
            f"could not download {file or dataset} from Kaggle ({reason}); try again, or download it manually from "
            f"kaggle.com/datasets/{handle} and {next_step}"
        ) from None
