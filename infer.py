"""Search with a trained run: `python infer.py "a dog in snow"` finds photos, `--image photo.jpg` finds captions."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from config import Config
from data.records import UNDECODED, decode_text
from retrieval.embedding_store import list_images, list_split_images
from retrieval.searcher import (
    Kind,
    Searcher,
    check_index,
    combine_queries,
    search_captions,
    search_images,
    searcher_for_pretrained,
    searcher_for_run,
)
from runtime import cli
from runtime.run_dir import newest_finished_run, read_config
from runtime.text import slug

PICTURES = (".png", ".jpg", ".pdf", ".svg")


@dataclass(frozen=True)
class Flags:
    """Find the photos that fit a sentence or resemble a photo, or the captions or labels that fit a photo."""

    query: Annotated[str | None, tyro.conf.Positional] = None  # a sentence: the photos that fit it are searched
    image: Path | None = None  # a photo; with a sentence beside it ("in snow"), photos like it in which that is so
    labels: tuple[str, ...] = ()  # with --image: which of these fits, without training for it
    queries: Path | None = None  # a text file with a sentence per line
    gallery: Path | None = None  # search the photos in this folder and below, not those of the run's data set
    find: Kind | None = None  # default: photos, but captions for a photo without --gallery
    run: Path | None = None  # the run's folder; without it the newest finished one
    model: str | None = None  # instead of a run a pretrained pair as it is (CLIP, SigLIP ...): a folder or a hub's name
    split: Literal["train", "val", "test"] = "test"  # the part of the run's data set to search in
    top_k: int = 8  # how many matches
    index: str | None = None  # for large galleries: "faiss", "milvus", a file FILE.db, or a cluster's http address
    json: bool = False  # print a line of JSON per query, for other programs
    out: Path | None = None  # the picture to write; without it, one query's matches are drawn in the run's folder
    data_dir: Path | None = None  # where the data set lies now, if it has moved since training
    runs_dir: Path = Path(Config.runs_dir)  # where runs are looked for
    cache_dir: Path | None = None  # where embeddings are kept; without it, where the run keeps its own
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # "auto" takes the GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the encoders

    def __post_init__(self):
        if self.query is None and self.image is None and self.queries is None:
            raise ValueError('give a sentence ("a dog in snow"), --image PHOTO, both, or --queries FILE')
        if self.queries is not None and (self.query is not None or self.image is not None):
            raise ValueError("--queries FILE stands alone: put the sentence into the file")
        if self.query is not None and not self.query.strip():
            raise ValueError("the sentence is empty")
        if self.query is not None and UNDECODED.search(self.query):
            raise ValueError("the sentence holds bytes that are not UTF-8 text")
        if self.gallery is not None and self.find == "captions":
            raise ValueError("a folder of photos has no captions: leave out --gallery or --find captions")
        if self.labels and (self.image is None or self.query is not None or self.gallery is not None or self.find):
            raise ValueError("--labels describe one photo: give --image PHOTO and nothing else to search")
        if self.index is not None:
            check_index(self.index)
        if self.index is not None and finds_captions(self):
            raise ValueError("--index is for photos: add --find photos")
        if self.model is not None and (self.run is not None or (self.gallery is None and not self.labels)):
            raise ValueError("--model stands instead of --run, and searches the photos of --gallery FOLDER")
        if self.top_k < 1:
            raise ValueError(f"--top-k must be at least 1, got {self.top_k}")
        if self.out is not None and self.out.suffix.lower() not in PICTURES:
            raise ValueError(f"--out must end in {', '.join(PICTURES)}, got {self.out}")


class Query(NamedTuple):
    """A sentence, a photo, or both."""

    sentence: str | None
    image: Path | None

    def __str__(self):
        return " + ".join(str(part) for part in (self.image, self.sentence) if part is not None)


def main() -> None:
    flags = cli.parse_flags(Flags)
    queries = read_queries(flags)
    options = {"device": flags.device, "precision": flags.precision, "cache_dir": flags.cache_dir}
    run = None if flags.model else chosen_run(flags)
    searcher = searcher_for_run(run, **options) if run else searcher_for_pretrained(flags.model, **options)
    # What is asked is read before photos are encoded, which may take hours, and where they are is known before that.
    if flags.labels:
        answers = [searcher.classify(flags.image, flags.labels)]
    else:
        search = among_captions(flags, run, searcher) if finds_captions(flags) else among_photos(flags, run, searcher)
        answers = search(encode_queries(searcher, queries, "captions" if finds_captions(flags) else "photos"))
    for query, matches in zip(queries, answers, strict=True):
        print(as_json(flags, query, matches) if flags.json else as_table(query, matches))
    draw(flags, run or searcher.store.parent, queries, answers)


def read_queries(flags: Flags) -> list[Query]:
    """What is asked; a missing photo or an empty file is told at once."""
    if flags.image is not None and not flags.image.is_file():
        raise FileNotFoundError(f"no such photo: {flags.image} (--image)")
    if flags.queries is None:
        return [Query(flags.query, flags.image)]
    if not flags.queries.is_file():
        raise FileNotFoundError(f"no such file: {flags.queries} (--queries)")
    queries = []
    for number, line in enumerate(decode_text(flags.queries).splitlines(), start=1):
        if UNDECODED.search(line):
            raise ValueError(f"{flags.queries}, line {number}: bytes that are not UTF-8 text; save the file as UTF-8")
        if line.strip():
            queries.append(Query(line.strip(), None))
    if not queries:
        raise ValueError(f"{flags.queries} is empty: write a sentence per line")
    return queries


def chosen_run(flags: Flags) -> Path:
    """The run's folder that was named, or the newest finished one."""
    return cli.existing_folder(flags.run, "--run") if flags.run else newest_finished_run(flags.runs_dir)


def finds_captions(flags: Flags) -> bool:
    """A photo alone finds captions where there are any, everything else photos; --find says otherwise."""
    photo_alone = flags.image is not None and flags.query is None and flags.gallery is None
    return flags.find == "captions" or (flags.find is None and photo_alone)


def among_photos(flags: Flags, run: Path | None, searcher: Searcher) -> Callable:
    """List the photos to search; the function that is returned finds matches among them for queries (Q, F)."""
    if flags.gallery is not None:
        photos = list_images(flags.gallery.expanduser())
    else:
        from data.loading import open_data

        photos = list_split_images(open_data(read_config(run), flags.data_dir), flags.split)
    return lambda queries: search_images(queries, searcher.gallery(photos), flags.top_k, flags.index)


def among_captions(flags: Flags, run: Path, searcher: Searcher) -> Callable:
    """Read the captions to search; the function that is returned finds matches among them for queries (Q, F)."""
    from data.loading import open_data

    captions = open_data(read_config(run), flags.data_dir).split(flags.split).captions
    return lambda queries: search_captions(queries, searcher.embed_captions(captions), captions, flags.top_k)


def encode_queries(searcher: Searcher, queries: list[Query], among: Kind):
    """The queries for a search among photos or captions, (Q, F); a sentence longer than the model reads is told of."""
    sentences = [query.sentence for query in queries if query.sentence is not None]
    for line in filter(None, map(searcher.describe_truncation, sentences)):
        print(line, file=sys.stderr)
    sentence_emb = searcher.embed_sentences(sentences, among=among) if sentences else None
    photo = queries[0].image
    return combine_queries(sentence_emb, None if photo is None else searcher.embed_images([photo], among=among))


def as_table(query: Query, matches: list) -> str:
    """The matches for the terminal: rank, score, and what it is."""
    lines = [f"{rank:>4}  {match.score:6.3f}  {match.item}" for rank, match in enumerate(matches, start=1)]
    return "\n".join([str(query), *lines])


def as_json(flags: Flags, query: Query, matches: list) -> str:
    """The matches as one line of JSON."""
    noun = "label" if flags.labels else "caption" if finds_captions(flags) else "photo"
    asked = {"query": query.sentence, "image": query.image and str(query.image)}
    found = [{"score": round(match.score, 6), noun: str(match.item)} for match in matches]
    return json.dumps({name: value for name, value in asked.items() if value is not None} | {"matches": found})


def draw(flags: Flags, folder: Path, queries: list[Query], answers: list) -> None:
    """Write the picture of the matches, where one was asked for or a single query was put by a person."""
    if flags.out is None and (flags.json or len(queries) > 1):
        return
    from reporting.plots import plot_captions, plot_photos
    from runtime.text import display_text

    name = queries[0].sentence or queries[0].image.stem
    picture = flags.out or folder / "matches" / f"{slug(name, max_length=40) or 'query'}.png"
    plot = plot_captions if finds_captions(flags) else plot_photos
    plot(
        [(display_text(str(query)), query.image, found) for query, found in zip(queries, answers, strict=True)], picture
    )
    print(f"picture: {picture}", file=sys.stderr if flags.json else sys.stdout)


if __name__ == "__main__":
    cli.run(main)
