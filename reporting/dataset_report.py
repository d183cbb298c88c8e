"""What the program understands of a data set: `python dataset.py PATH`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from config import Config
from runtime import cli

EXAMPLES = 8
CAPTIONS_SHOWN = 5
MOST_TOKENS = 4096  # of a caption that is measured


@dataclass(frozen=True)
class Flags:
    """Read a data set as training would, say what was understood, and save a picture of a few examples."""

    dataset: Annotated[str | None, tyro.conf.Positional] = None  # a folder, a caption file or a name, as for train.py
    data_dir: str | None = None  # where the data set lies; without it a named one is downloaded with kagglehub
    split_seed: int = Config.split_seed  # which images are held out where the data set brings no split
    text_encoder: str | None = None  # whose tokens are counted; without it, a vocabulary learned from the captions
    out: Path | None = None  # the picture to write; without it, a file in runs/data_sets/
    cache_dir: str = Config.cache_dir  # where a data set that is made or unpacked is kept

    def __post_init__(self):
        if self.dataset is None:
            raise ValueError("give a data set: python dataset.py my_photos/")
        if self.out is not None and self.out.suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
            raise ValueError(f"--out must end in .png, .jpg, .pdf or .svg, got {self.out}")


def main() -> None:
    flags = cli.parse_flags(Flags)
    from data.loading import open_dataset

    data = open_dataset(
        flags.dataset,
        data_dir=flags.data_dir,
        cache_dir=flags.cache_dir,
        split_seed=flags.split_seed,
        allow_bad_rows=True,
    )
    print(summary(data), flush=True)
    print(f"longest caption: {longest_caption(data, flags.text_encoder)}", flush=True)
    picture = flags.out or default_picture(data)
    draw_examples(data, picture)
    print(f"picture: {picture}")


def summary(data) -> str:
    """Format, counts, split and what cannot be used, a line each."""
    from data.loading import MAX_BAD_FRACTION
    from runtime.text import format_examples

    per_image = data.table.groupby("image").size()
    rows = len(data.table) + len(data.bad_rows)
    lines = [
        f"format: {data.format}, {format_examples([file.name for file in data.files])}",
        f"images: {len(per_image):,} in {data.image_root}",
        f"captions: {len(data.table):,}; per image at least {per_image.min()}, on average {per_image.mean():.1f}, "
        f"at most {per_image.max()}",
        f"split: {data.describe()}",
    ]
    if not data.bad_rows:
        lines.append("bad rows: none")
    elif len(data.bad_rows) > MAX_BAD_FRACTION * rows:
        share = f"{100 * len(data.bad_rows) / rows:.0f} %"
        lines.append(f"bad rows: {len(data.bad_rows):,}, {share}: training will stop here unless --allow-bad-rows")
    else:
        lines.append(f"bad rows: {len(data.bad_rows):,} of {rows:,}, left out")
    return "\n".join(lines)


def longest_caption(data, text_encoder: str | None) -> str:
    """Its length in tokens, its words, and how many captions training would cut."""
    from data.tokenizer import load_tokenizer, tokenize, train_tokenizer

    captions = data.table.caption.tolist()
    tokenizer = train_tokenizer(captions) if text_encoder is None else load_tokenizer(text_encoder)
    lengths = np.array([len(ids) for ids in tokenize(tokenizer, captions, max_tokens=MOST_TOKENS)])
    whose = text_encoder or "a vocabulary learned from these captions; --text-encoder NAME counts with that one's"
    cut = (lengths > Config.max_tokens).sum()
    more = f"; {cut:,} are longer than --max-tokens {Config.max_tokens} and will be cut" if cut else ""
    longest = captions[lengths.argmax()]
    return f"{lengths.max()} tokens ({whose}): {longest[:100]}{'…' if len(longest) > 100 else ''}{more}"


def draw_examples(data, picture: Path) -> None:
    """Photos from all parts, drawn by chance but the same each time; those that cannot be read are left out."""
    from data.image_io import load_image
    from reporting.plots import plot_examples

    examples, broken = [], 0
    for path, split, captions in _shuffled(data):
        try:
            load_image(path, 64)
        except OSError:
            broken += 1
            continue
        examples.append((path, f"{split}: {path.name[-34:]}", captions[:CAPTIONS_SHOWN]))
        if len(examples) == EXAMPLES:
            break
    if not examples:
        raise ValueError(f"none of the {broken:,} photos in {data.image_root} can be read")
    plot_examples(f"{Path(data.name).name}: {data.format}", examples, picture)


def _shuffled(data):
    table = data.table.dropna(subset="split")
    groups = {image: rows for image, rows in table.groupby("image", sort=True).indices.items()}
    images = list(groups)
    for place in np.random.default_rng(0).permutation(len(images)):
        rows = table.iloc[groups[images[place]]]
        yield data.image_root / images[place], rows.split.iloc[0], rows.caption.tolist()


def default_picture(data) -> Path:
    """A file below runs/, or in a temporary folder where that would lie in the data set's own."""
    path = Path(Config.runs_dir) / "data_sets" / f"{Path(data.name).stem or 'here'}.png"
    if data.image_root.resolve() in path.resolve().parents:
        return Path(tempfile.mkdtemp()) / path.name
    return path
