"""Where a data set lies: the sample set is drawn, a named one is downloaded, a folder or file is taken as it is."""

import re
from dataclasses import dataclass
from pathlib import Path

KAGGLE = {
    "flickr8k": "adityajn105/flickr8k",
    "flickr30k": "hsankesara/flickr-image-dataset",
    "coco": "awsaf49/coco-2017-dataset",
}
NAMES = ("sample", *KAGGLE)
KARPATHY = "shtvkumar/karpathy-splits"  # the splits that papers report on, of all three
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name


@dataclass(frozen=True)
class Source:
    """A folder or caption file, or the name of a data set of the Hugging Face hub; of a named one its split file."""

    path: Path
    hub_name: str | None = None
    karpathy: Path | None = None


def find_source(dataset: str, data_dir: str | Path | None, cache_dir: str | Path) -> Source:
    """Where the captions and photos of `dataset` lie; FileNotFoundError or ConnectionError where they cannot be had."""
    if data_dir is not None:
        path = _existing(data_dir, dataset)
        return Source(path, karpathy=_published_split(dataset, path, cache_dir))
    if dataset == "sample":
        return Source(_draw_sample(cache_dir))
    if dataset in KAGGLE:
        with dataset_lock(cache_dir):
            path = _download(KAGGLE[dataset], dataset)
        return Source(path, karpathy=_published_split(dataset, path, cache_dir))
    path = Path(dataset).expanduser()
    if path.exists():
        return Source(path)
    if HUB_NAME.fullmatch(dataset) and not path.parent.exists():  # else it is a folder's name, mistyped
        return Source(path, hub_name=dataset)
    raise FileNotFoundError(
        f"no data set or folder {dataset!r}: expected {', '.join(NAMES)}, a folder with images and "
        "captions.txt, a caption file, or owner/name on the Hugging Face hub"
    )


def _existing(data_dir, dataset):
    path = Path(data_dir).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no such folder: {data_dir} (--data-dir)")
    has_flag = path / Path(dataset).name  # the caption file that --dataset named, where its folder lies now
    return has_flag if Path(dataset).suffix and has_flag.is_file() else path


def _draw_sample(cache_dir):
    from data.sample_set import write_sample_set

    folder = Path(cache_dir) / "sample"
    with dataset_lock(cache_dir):
        write_sample_set(folder)
    return folder


def _published_split(dataset, path, cache_dir):
    """A data set by its name always has the published split: from a file beside it, else from Kaggle."""
    from data.format_detection import has_published_split  # numpy; train.py wants no more than the names above

    name = f"dataset_{dataset}.json"
    if dataset not in KAGGLE or has_published_split(path, name):
        return None
    with dataset_lock(cache_dir):
        return _download(KARPATHY, dataset, name)


def dataset_lock(folder: str | Path):
    """Of several processes one makes or downloads a data set; the others wait and find it there."""
    from filelock import FileLock

    Path(folder).mkdir(parents=True, exist_ok=True)
    return FileLock(Path(folder) / "data.lock")


def _download(handle, dataset, file=None):
    import kagglehub

    try:
        return Path(kagglehub.dataset_download(handle, **({"path": file} if file else {})))
    except Exception as error:  # kagglehub passes on whatever its network library raises
        reason = f"{type(error).__name__}: {error}"[:80]
        by_hand = (
            f"put {file} beside the captions, or pass the folder as --dataset to split it at random"
            if file
            else "pass its folder with --data-dir"
        )
        raise ConnectionError(
            f"could not download {file or dataset} from Kaggle ({reason}); try again, or fetch it by hand from "
            f"kaggle.com/datasets/{handle} and {by_hand}"
        ) from None
