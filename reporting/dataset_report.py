"""Report on a data set: `python dataset.py PATH`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from config import Config
from runtime import cli
from runtime.text import display_text

N_EXAMPLES = 8  # images in the figure
N_CAPTIONS = 5  # captions shown for each image
MAX_TOKENS = 4096  # longer captions are counted as this long


@dataclass(frozen=True)
class Flags:
    """Read a data set as training does, print a report, and save a figure with a few examples."""

    dataset: Annotated[str | None, tyro.conf.Positional] = None  # a folder, a caption file or a name, as for train.py
    data_dir: str | None = None  # where the data set is on disk; without it a named one is downloaded with kagglehub
    image_column: str | None = None  # name of the column (or JSON key) with the photos' file names; default: found
    caption_column: str | None = None  # ... with the captions
    split_column: str | None = None  # ... with train, val or test
    split: Literal["auto", "random"] = Config.split  # auto: the split that the data set has, else a random one
    split_seed: int = Config.split_seed  # seed of the random split, if the data set has no split of its own
    limit: int | None = Config.limit  # photos, as --limit of train.py draws them; default: all
    text_encoder: str | None = None  # counts tokens with this model's tokenizer; default: one trained on the captions
    out: Path | None = None  # the figure's file; default: a file in runs/data_sets/
    cache_dir: str = Config.cache_dir  # folder for data sets that are generated or extracted

    def __post_init__(self):
        if self.dataset is None:
            raise ValueError("no data set given: run python dataset.py my_photos/")
        Config(limit=self.limit)  # raises ValueError
        if self.out is not None and self.out.suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
            raise ValueError(f"--out must end in .png, .jpg, .pdf or .svg, got {self.out}")


def main() -> None:
    flags = cli.parse_flags(Flags)
    from data.limit import limit_data
    from data.loading import open_dataset
    from data.records import ColumnNames

    data = open_dataset(
        flags.dataset,
        data_dir=flags.data_dir,
        cache_dir=flags.cache_dir,
        split_seed=flags.split_seed,
        split=flags.split,
        allow_bad_rows=True,
        columns=ColumnNames(flags.image_column, flags.caption_column, flags.split_column),
    )
    data = limit_data(data, flags.limit, seed=flags.split_seed)
    print(summary(data), flush=True)
    tokenizer, tokens = tokenize_captions(data, flags.text_encoder)
    print(f"longest caption: {longest_caption(data, flags.text_encoder, tokens)}", flush=True)
    print(quality(data, tokenizer, tokens), flush=True)
    print(f"unknown words: {unknown_words(data, flags.text_encoder, tokenizer, tokens)}", flush=True)
    path = flags.out or default_figure_path(data)
    plot_random_examples(data, path)
    print(f"picture: {display_text(path)}")


def summary(data) -> str:
    """Summarize the format, counts, split and unusable rows of a data set, one line each."""
    from data.loading import MAX_BAD_FRACTION

    per_image = data.table.groupby("image").size()
    rows = len(data.table) + len(data.bad_rows)
    split, *notes = data.description_lines()
    lines = [
        data.describe_format(),
        f"images: {len(per_image):,} in {data.image_root}",
        f"captions: {len(data.table):,}; per image at least {per_image.min()}, on average {per_image.mean():.1f}, "
        f"at most {per_image.max()}",
        f"split: {split}",
        *notes,
    ]
    if not data.bad_rows:
        lines.append("bad rows: none")
    elif len(data.bad_rows) > MAX_BAD_FRACTION * rows:
        share = f"{100 * len(data.bad_rows) / rows:.0f} %"
        lines.append(f"bad rows: {len(data.bad_rows):,}, {share}: training stops here without --allow-bad-rows")
    else:
        lines.append(f"bad rows: {len(data.bad_rows):,} of {rows:,}, skipped")
    return "\n".join(map(display_text, lines))


def tokenize_captions(data, text_encoder: str | None):
    """Return the tokenizer of a text tower, or one trained on the captions, and the token ids of all captions."""
    from data.tokenizer import load_tokenizer, tokenize, train_tokenizer

    captions = data.table.caption.tolist()
    tokenizer = train_tokenizer(captions) if text_encoder is None else load_tokenizer(text_encoder)
    return tokenizer, tokenize(tokenizer, captions, max_tokens=MAX_TOKENS)


def quality(data, tokenizer, tokens) -> str:
    """Describe repeated captions, equal photos and photos that cannot be opened, one line each."""
    from data.text_ids import number_texts
    from data.unknown_words import unknown_ids
    from reporting.dataset_quality import describe_equal_photos, describe_repeated, describe_unreadable

    text_ids = number_texts(tokens, data.table.caption.tolist(), unknown_ids(tokenizer))
    return "\n".join(
        [
            f"repeated captions: {describe_repeated(data, text_ids)}",
            f"equal photos: {describe_equal_photos(data)}",
            f"unreadable photos: {describe_unreadable(data)}",
        ]
    )


def longest_caption(data, text_encoder: str | None, tokens) -> str:
    """Describe the longest caption: its length in tokens, its text, and how many captions --max-tokens truncates."""
    captions = data.table.caption.tolist()
    lengths = np.array([len(ids) for ids in tokens])
    name = text_encoder or "tokenizer trained on these captions; use another one with --text-encoder NAME"
    n_truncated = (lengths > Config.max_tokens).sum()
    limit = f"--max-tokens {Config.max_tokens}"
    warning = f"; {n_truncated:,} captions are longer than {limit} and will be truncated" if n_truncated else ""
    longest = captions[lengths.argmax()]
    return f"{lengths.max()} tokens ({name}): {display_text(longest, 100)}{warning}"


def unknown_words(data, text_encoder: str | None, tokenizer, tokens) -> str:
    """Describe the words that a text tower does not know; without its name, the captions' script if it is not Latin."""
    from config import OWN_PHOTOS
    from data.unknown_words import describe_language, describe_unknown_words

    captions = data.table.caption.tolist()
    if text_encoder is None:
        line = describe_language(captions, text_encoder=OWN_PHOTOS["text_encoder"][1])
        return line or "not counted; name a text tower with --text-encoder NAME"
    return describe_unknown_words(tokenizer, captions, tokens) or f"none ({text_encoder} knows all)"


def plot_random_examples(data, figure_path: Path) -> None:
    """Plot images of all splits, sampled with a fixed seed. Unreadable images are skipped.

    Raises ValueError if no image can be read.
    """
    from data.image_io import load_image
    from reporting.list_picture import plot_examples

    examples, n_unreadable = [], 0
    for path, split, captions in _shuffled(data):
        try:
            load_image(path, 64)
        except OSError:
            n_unreadable += 1
            continue
        examples.append((path, f"{split}: {path.name[-34:]}", captions[:N_CAPTIONS]))
        if len(examples) == N_EXAMPLES:
            break
    if not examples:
        raise ValueError(f"none of the {n_unreadable:,} photos in {data.image_root} could be read")
    plot_examples(f"{Path(data.name).name}: {data.format}", examples, figure_path)


def _shuffled(data):
    """Yield (path, split, captions) of each image, in random but reproducible order."""
    table = data.table.dropna(subset="split")
    groups = {image: rows for image, rows in table.groupby("image", sort=True).indices.items()}
    images = list(groups)
    for index in np.random.default_rng(0).permutation(len(images)):
        rows = table.iloc[groups[images[index]]]
        yield data.image_root / images[index], rows.split.iloc[0], rows.caption.tolist()


def default_figure_path(data) -> Path:
    """Return a path in runs/data_sets/, or in a temporary folder if runs/ is inside the data set's folder."""
    path = Path(Config.runs_dir) / "data_sets" / f"{Path(data.name).stem or 'here'}.png"
    if data.image_root.resolve() in path.resolve().parents:
        return Path(tempfile.mkdtemp()) / path.name
    return path
