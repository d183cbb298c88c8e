"""Search with a trained run: `python infer.py "a dog in snow"` finds photos, `--image photo.jpg` finds captions."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import cli
from config import Config
from run_folder import newest_finished_run, read_config

SLUG_LENGTH = 60


@dataclass(frozen=True)
class Flags:
    """Find the photos of a data set that fit a sentence, or the captions that fit a photo."""

    query: Annotated[str | None, tyro.conf.Positional] = None  # a sentence: the photos that fit it are searched
    image: Path | None = None  # a photo: the captions that fit it are searched
    run: Path | None = None  # the run's folder; without it the newest finished one
    split: Literal["train", "val", "test"] = "test"  # the part of the run's data set to search in
    top_k: int = 8  # how many matches
    out: Path | None = None  # the picture to write; without it, one per query in the run's folder
    data_dir: Path | None = None  # where the data set lies now, if it has moved since training
    runs_dir: Path = Path(Config.runs_dir)  # where runs are looked for
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # "auto" takes the GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the encoders

    def __post_init__(self):
        if (self.query is None) == (self.image is None):
            raise ValueError('give one of a sentence ("a dog in snow") and --image PHOTO')
        if self.query is not None and not self.query.strip():
            raise ValueError("the sentence is empty")
        if self.top_k < 1:
            raise ValueError(f"--top-k must be at least 1, got {self.top_k}")
        if self.out is not None and self.out.suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
            raise ValueError(f"--out must end in .png, .jpg, .pdf or .svg, got {self.out}")


def main() -> None:
    flags = cli.parse_flags(Flags)
    if flags.image is not None and not flags.image.is_file():
        raise FileNotFoundError(f"no such photo: {flags.image} (--image)")
    folder = cli.existing_folder(flags.run, "--run") if flags.run else newest_finished_run(flags.runs_dir)
    config = read_config(folder)
    part = cli.open_data(config, flags.data_dir).part(flags.split)
    from encode import load_encoder
    from features import stored_features

    encoder, model = load_encoder(folder, device=flags.device, precision=flags.precision)
    gallery = stored_features(encoder, model, part, flags.split, cache_dir=config.cache_dir)
    search = find_photos if flags.image is None else find_captions
    search(flags, encoder, gallery, part, flags.out or default_picture(folder, flags))


def find_photos(flags: Flags, encoder, gallery, part, picture: Path) -> None:
    """Print and draw the photos that fit the sentence."""
    from plots import plot_photos
    from retrieval import top_k

    query = encoder.captions([flags.query], "query")
    scores, indices = top_k(query, gallery.images, flags.top_k)
    photos = [part.paths[gallery.kept_images[row]] for row in indices[0]]
    report(flags.query, scores[0].tolist(), photos)
    plot_photos(flags.query, photos, scores[0].tolist(), picture)
    print(f"picture: {picture}")


def find_captions(flags: Flags, encoder, gallery, part, picture: Path) -> None:
    """Print and draw the captions that fit the photo."""
    from dataset import load_image
    from plots import plot_captions
    from retrieval import top_k

    load_image(flags.image, encoder.image_size)  # a broken photo says here what is wrong with it
    query, _ = encoder.images([flags.image], "photo")
    scores, indices = top_k(query, gallery.texts, flags.top_k)
    captions = [part.captions[gallery.kept_captions[row]] for row in indices[0]]
    report(str(flags.image), scores[0].tolist(), captions)
    plot_captions(flags.image, captions, scores[0].tolist(), picture)
    print(f"picture: {picture}")


def report(query: str, scores: list[float], matches: list) -> None:
    """The matches in the terminal: rank, cosine, and what it is."""
    print(query)
    for rank, (score, match) in enumerate(zip(scores, matches, strict=True), start=1):
        print(f"{rank:>4}  {score:6.3f}  {match}")


def default_picture(folder: Path, flags: Flags) -> Path:
    """A file of its own for each query, in the run's folder."""
    name = flags.query if flags.image is None else flags.image.stem
    slug = re.sub(r"\W+", "-", name)[:SLUG_LENGTH].strip("-")
    return folder / "matches" / f"{slug or 'query'}.png"


if __name__ == "__main__":
    cli.run(main)
