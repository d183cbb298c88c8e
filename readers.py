"""From a folder or a name to one table of captions, split by image."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

CAPTION_FILES = ("captions.txt", "captions.csv")
IMAGE_FOLDERS = ("Images", "images", ".")
SPLITS = ("train", "val", "test")
FLICKR8K_LISTS = {
    split: f"Flickr_8k.{name}Images.txt" for split, name in zip(SPLITS, ("train", "dev", "test"), strict=True)
}
SHOWN = 5  # examples in a message


@dataclass(frozen=True)
class Part:
    """One split: N images and their M captions, flat; caption m belongs to image row `caption_image_ids[m]`."""

    paths: list[Path]
    captions: list[str]
    caption_image_ids: np.ndarray  # (M,) int64, ascending


@dataclass(frozen=True)
class CaptionData:
    """A data set: one row per caption, with its image and its split."""

    name: str
    image_root: Path
    table: pd.DataFrame  # columns image (relative to image_root), caption, split (or NaN: on no list)
    split_source: str
    missing: list[str]  # images that have captions and a place in a split, but no file

    def part(self, split: str) -> Part:
        """The images and captions of "train", "val" or "test"."""
        rows = self.table[self.table.split == split]
        ids, images = pd.factorize(rows.image)
        order = np.argsort(ids, kind="stable")
        return Part([self.image_root / image for image in images], list(rows.caption.iloc[order]), ids[order])

    def describe(self) -> str:
        """What was read, for the terminal: the split and the size of each part."""
        counts = self.table.groupby("split").agg(images=("image", "nunique"), captions=("caption", "size"))
        parts = [
            f"{s} {counts.images[s]:,} images / {counts.captions[s]:,} captions" for s in SPLITS if s in counts.index
        ]
        lines = [f"{self.name}: {', '.join(parts)} ({self.split_source})"]
        unlisted = self.table.image[self.table.split.isna()].nunique()
        if unlisted:
            lines.append(f"{unlisted} images are on no list and are not used")
        if self.missing:
            lines.append(f"{len(self.missing)} images have captions but no file, left out: {few(self.missing)}")
        return "\n".join(lines)


def open_dataset(dataset: str, *, data_dir: str | Path | None, cache_dir: str, split_seed: int) -> CaptionData:
    """Find a data set by its name or folder, read its captions and split it by image."""
    folder = _locate(dataset, data_dir, cache_dir)
    table = read_captions(folder)
    image_root, present = _find_images(folder, table.image.unique())
    table["split"], source = _split(table.image, folder, split_seed)
    missing = sorted(set(table.image[table.split.notna()]) - present)
    data = CaptionData(dataset, image_root, table[table.image.isin(present)], source, missing)
    empty = [split for split in SPLITS if not (data.table.split == split).any()]
    if empty:
        raise ValueError(f"no images left for {' and '.join(empty)} in {folder} ({source}): add photos with captions")
    return data


def read_captions(path: str | Path) -> pd.DataFrame:
    """Read a caption file, or the one in a folder, into the columns image (forward slashes) and caption.

    The file is CSV with the header `image,caption` and one caption per row. Raises FileNotFoundError without a file,
    ValueError with file and line where a row cannot be used.
    """
    path = _caption_file(Path(path))
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(_rows(csv.reader(lines), path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if not rows:
        raise ValueError(f"{path}: holds no captions; expected the header 'image,caption' and a row per caption")
    return pd.DataFrame(rows, columns=["image", "caption"])


def few(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(map(str, names[:SHOWN])) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def _rows(reader, path):
    """(image, caption) of each row; the first row must be the header."""
    header = [cell.strip().lower() for cell in next(reader, [])]
    if header and header != ["image", "caption"]:
        raise ValueError(f"{path}, line 1: expected the header 'image,caption', found {','.join(header)[:80]!r}")
    start = reader.line_num + 1
    try:
        for row in reader:
            if row:
                yield _row(row, f"{path}, line {start}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: cannot be read as CSV: {error}; is a quote left open?") from None


def _row(row, where):
    if len(row) != 2:
        hint = "a file name and a caption" if len(row) < 2 else 'put a caption that holds commas into "quotes"'
        raise ValueError(f"{where}: expected 2 columns, found {len(row)}; {hint}")
    image, caption = row[0].strip().replace("\\", "/"), row[1].strip()
    if not image or not caption:
        raise ValueError(f"{where}: the {'caption' if image else 'file name'} is empty; fill it in or delete the row")
    if "\n" in caption:
        raise ValueError(f"{where}: the caption runs over several lines; a quote was opened and not closed")
    return image, caption


def _caption_file(path):
    if path.is_dir():
        found = [path / name for name in CAPTION_FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"no caption file in {path}: expected {' or '.join(CAPTION_FILES)}")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"no such caption file: {path}")
    return path


def _locate(dataset, data_dir, cache_dir):
    """The folder of a data set; the sample set is made and flickr8k downloaded where it is not there yet."""
    if data_dir is not None:
        if not Path(data_dir).expanduser().is_dir():
            raise FileNotFoundError(f"no such folder: {data_dir} (--data-dir)")
        return Path(data_dir).expanduser()
    if dataset == "sample":
        from sample import write_sample

        folder = Path(cache_dir) / "sample"
        with _one_at_a_time(cache_dir):
            write_sample(folder)
        return folder
    if dataset == "flickr8k":
        with _one_at_a_time(cache_dir):
            return _download("adityajn105/flickr8k")
    if Path(dataset).expanduser().is_dir():
        return Path(dataset).expanduser()
    raise FileNotFoundError(
        f"no data set or folder {dataset!r}: expected sample, flickr8k, or a folder with images and captions.txt"
    )


def _one_at_a_time(folder):
    """Of several processes one makes or downloads a data set; the others wait and find it there."""
    from filelock import FileLock

    Path(folder).mkdir(parents=True, exist_ok=True)
    return FileLock(Path(folder) / "data.lock")


def _download(handle):
    import kagglehub

    try:
        return Path(kagglehub.dataset_download(handle))
    except Exception as error:  # kagglehub passes on whatever its network library raises
        reason = f"{type(error).__name__}: {error}"[:80]
        raise ConnectionError(
            f"could not download {handle} from Kaggle ({reason}); try again, or fetch it by hand from "
            f"kaggle.com/datasets/{handle} and pass its folder with --data-dir"
        ) from None


def _find_images(folder, images):
    """The folder that image names are relative to, and the names that have a file there."""
    roots = [folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()]
    root, present = max(((root, _present(root, images)) for root in roots), key=lambda found: len(found[1]))
    if not present:
        places = ", ".join(map(str, roots))
        raise FileNotFoundError(
            f"none of the {len(images):,} images with captions was found; looked for {images[0]!r} in {places}"
        )
    return root, present


def _present(root, images):
    """One listing per folder instead of one question per file: a network disk answers 30,000 of those in minutes."""
    listed = {parent: _files(root / parent) for parent in {os.path.dirname(image) for image in images}}
    return {image for image in images if os.path.basename(image) in listed[os.path.dirname(image)]}


def _files(folder):
    try:
        return {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except OSError:
        return set()


def _split(images, folder, seed):
    """The split of every row, and where it comes from: the official lists if they are there, else 4:1 by image."""
    lists = {split: folder / name for split, name in FLICKR8K_LISTS.items()}
    if all(path.is_file() for path in lists.values()):
        split_of = {
            line.strip(): split for split, path in lists.items() for line in path.read_text("utf-8").splitlines()
        }
        return images.map(split_of), "official split lists"
    return images.map(
        _random_split(sorted(set(images)), seed)
    ), f"train:test 4:1 by image, seed {seed}, val out of train"


def _random_split(images, seed):
    """A fifth of the images is test; a tenth of the others is val."""
    shuffled = np.random.RandomState(seed).permutation(images)
    n_test = max(1, len(images) // 5)
    n_val = max(1, (len(images) - n_test) // 10)
    names = np.repeat(["test", "val", "train"], [n_test, n_val, max(0, len(images) - n_test - n_val)])
    return dict(zip(shuffled, names, strict=False))
