"""Search with a trained run: `python infer.py "a dog in snow"` finds photos, `--image dog.jpg` finds captions."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from config import Config
from retrieval.search_flags import MAX_LABEL, Target, check_index
from runtime import cli
from runtime.launcher import process_rank
from runtime.run_dir import newest_finished_run, read_shared_config
from runtime.text import display_text, slug

if TYPE_CHECKING:
    from retrieval.embedding_store import ImageList
    from retrieval.searcher import Searcher

EXPORT_FROM = 1000  # photos of a gallery; for smaller ones the text tower is exported only on a terminal
PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


@dataclass(frozen=True)
class Flags:
    """Find the photos that match a sentence or a photo, or the captions or labels that match a photo.

    Without a query, a terminal asks for sentences one after another.
    """

    query: Annotated[str | None, tyro.conf.Positional] = None  # a sentence that describes the photos to find
    image: Path | None = None  # query by a photo; with a sentence ("in snow"), find photos that match both
    labels: tuple[str, ...] = ()  # with --image: rank these labels (or a folder's class folders) by probability
    queries: Path | None = None  # a text file with one sentence per line
    gallery: Path | None = None  # search the photos of this folder and its subfolders instead of the run's data set
    find: Target | None = None  # default: captions for --image alone (no sentence, no --gallery), otherwise photos
    run: Path | None = None  # the run's folder, or OWNER/NAME on the hub; default: the newest finished run
    model: str | None = None  # search with a pretrained model (CLIP, SigLIP ...) instead of a run: a folder or hub name
    embed_dims: int | None = None  # search with the first values of embeddings, for a run trained with --nested-dims
    split: Literal["train", "val", "test", "all"] | None = None  # part of the run's data set; default: test
    duplicates: bool = False  # with --gallery: list the photos that are the same picture; nothing is deleted
    duplicate_cosine: float = 0.96  # with --duplicates: photos with at least this cosine are the same picture
    top_k: int = 8  # number of matches
    index: str | None = (
        None  # for large galleries: faiss, int8, binary, milvus, a file FILE.db, or a server's http(s) address
    )
    json: bool = False  # print one line of JSON per query, for other programs
    out: Path | None = None  # where to save the picture of the matches; default: for one query, in the run's folder
    data_dir: Path | None = None  # where the data set is stored, if it has moved since training
    runs_dir: Path = Path(Config.runs_dir)  # the folder that contains the runs
    cache_dir: Path | None = None  # where embeddings are cached; default: the run's cache
    mirrored: Literal["auto", "yes", "no"] = "auto"  # read each photo mirrored too, at twice the time; auto: as trained
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto uses the GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision of the encoders

    def __post_init__(self):
        has_query = self.query is not None or self.image is not None or self.queries is not None
        if not has_query and not self.duplicates and not is_terminal():
            raise ValueError('no query: give a sentence ("a dog in snow"), --image PHOTO, both, or --queries FILE')
        if not has_query and (self.labels or self.find == "captions" or self.json or self.out is not None):
            raise ValueError("--labels, --find captions, --json and --out need a query")
        if self.duplicates and (has_query or self.gallery is None or self.index is not None):
            raise ValueError("--duplicates compares the photos of --gallery FOLDER: give no query and no --index")
        if not 0.5 <= self.duplicate_cosine <= 1:
            raise ValueError(f"--duplicate-cosine must be from 0.5 to 1, got {self.duplicate_cosine}")
        if self.queries is not None and (self.query is not None or self.image is not None):
            raise ValueError("--queries FILE must be used alone: put the sentence into the file")
        if self.query is not None and not self.query.strip():
            raise ValueError("the sentence is empty")
        if self.query is not None and has_undecoded(self.query):
            raise ValueError("the sentence contains bytes that are not UTF-8 text")
        if self.gallery is not None and self.find == "captions":
            raise ValueError("--gallery has no captions: remove --gallery or --find captions")
        if self.split is not None and (self.gallery is not None or self.labels):
            raise ValueError("--split is a part of the run's data set: remove it, or --gallery and --labels")
        if self.labels and (self.image is None or self.query is not None or self.gallery is not None or self.find):
            raise ValueError("--labels classify one photo: give --image PHOTO, without a sentence, --gallery or --find")
        if self.index is not None:
            check_index(self.index)
        if self.index is not None and searches_captions(self):
            raise ValueError("--index searches photos only: add --find photos")
        if self.model is not None and (self.run is not None or (self.gallery is None and not self.labels)):
            raise ValueError("--model replaces --run and has no data set: give --gallery or --labels, and no --run")
        if self.model is not None and self.embed_dims is not None:
            raise ValueError("--embed-dims needs a run that was trained with --nested-dims: leave out --model")
        if self.top_k < 1:
            raise ValueError(f"--top-k must be at least 1, got {self.top_k}")
        if self.out is not None and self.out.suffix.lower() not in PICTURE_SUFFIXES:
            raise ValueError(f"--out must end in {', '.join(PICTURE_SUFFIXES)}, got {self.out}")


class Query(NamedTuple):
    """A sentence, a photo, or both."""

    sentence: str | None
    image: Path | None

    def __str__(self):
        return " + ".join(str(value) for value in (self.image, self.sentence) if value is not None)


def has_undecoded(text: str) -> bool:
    """Return whether a text contains bytes that are not UTF-8."""
    from data.records import UNDECODED

    return UNDECODED.search(text) is not None


def is_terminal() -> bool:
    """Return whether a person can be asked for queries."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def main() -> None:
    flags = cli.parse_flags(Flags)
    # PyTorch's threads then sleep while they wait, instead of taking the cores from the processes that decode photos.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    has_query = flags.query is not None or flags.image is not None or flags.queries is not None
    queries = read_queries(flags) if has_query else []
    options = {"device": flags.device, "precision": flags.precision, "cache_dir": flags.cache_dir}
    options["mirrored"] = {"auto": None, "yes": True, "no": False}[flags.mirrored]
    from retrieval.searcher import searcher_for_pretrained, searcher_for_run

    run = None if flags.model else select_run(flags)
    if run:
        searcher = searcher_for_run(run, embed_dims=flags.embed_dims, **options)
    else:
        searcher = searcher_for_pretrained(flags.model, **options)
    if process_rank() > 0:  # of torchrun or accelerate launch: the first process answers
        return encode_share(flags, run, searcher)
    # Encoding a gallery may take hours: list it and encode the queries first, so that mistakes are reported before it.
    if flags.duplicates:
        return list_duplicates(flags, run, searcher)
    if not has_query:
        return ask_for_queries(flags, run, searcher)
    if flags.labels:
        labels = read_labels(flags.labels)
        report(flags, f"choosing one of {len(labels)} labels with {model_name(flags, run)}")
        results = [searcher.classify(flags.image, labels)]
    elif searches_captions(flags):
        search = caption_search(flags, run, searcher)
        results = search(encode_queries(searcher, queries, "captions"))
    else:
        search = photo_search(flags, run, searcher)
        results = search(encode_queries(searcher, queries, "photos"))
    for query, matches in zip(queries, results, strict=True):
        print(format_json(flags, query, matches) if flags.json else format_table(query, matches))
    save_picture(flags, pictures_folder(flags, run, searcher), queries, results)
    if any(query.sentence for query in queries):
        prepare_next_search(run or flags.model, searcher, flags.embed_dims)


def prepare_next_search(source: Path | str, searcher: "Searcher", embed_dims: int | None) -> None:
    """Export the text tower in the background, where someone waits for the next search."""
    if searcher.use_onnx and (is_terminal() or searcher.gallery_size >= EXPORT_FROM):
        from retrieval.onnx_text import export_in_background

        folder, is_damaged = searcher.text_encoder_folder, searcher.export_is_damaged
        options = {"is_damaged": is_damaged, "embed_dims": embed_dims}
        export_in_background(source, searcher.store.parent, folder, **options)


def encode_share(flags: Flags, run: Path | None, searcher: "Searcher") -> None:
    """Encode a share of the photos that the first process searches, and print nothing."""
    if not flags.labels and not searches_captions(flags):
        searcher.gallery(list_photos(flags, run))


def ask_for_queries(flags: Flags, run: Path | None, searcher: "Searcher") -> None:
    """Ask for sentences on the terminal and print the photos of each, until Ctrl-D."""
    from retrieval.prompt import ask, terminal_lines

    search = photo_search(flags, run, searcher)

    def answer(sentence: str | None, photo: Path | None) -> list[Path]:
        query = Query(sentence, photo)
        (matches,) = search(encode_queries(searcher, [query], "photos"))
        print(format_table(query, matches).partition("\n")[2])
        save_picture(flags, pictures_folder(flags, run, searcher), [query], [matches])
        return [match.item for match in matches]

    ask(answer, terminal_lines())
    prepare_next_search(run or flags.model, searcher, flags.embed_dims)


def list_duplicates(flags: Flags, run: Path | None, searcher: "Searcher") -> None:
    """Print the groups of photos of a gallery that are the same picture."""
    from retrieval.duplicates import duplicate_groups
    from retrieval.embedding_store import list_images

    photos = list_images(flags.gallery.expanduser())
    report(flags, f"comparing the {len(photos.stamps):,} photos of {flags.gallery} with {model_name(flags, run)}")
    encoder, model = searcher.model()
    dims = model.embed_dim
    searcher.dim = dims + (encoder.query_bank is not None)
    gallery = searcher.gallery(photos)
    groups = duplicate_groups(gallery, dims, flags.duplicate_cosine)
    for group in groups:
        kind = "equal files" if group.is_exact else f"cosine {group.cosine:.3f}"
        if flags.json:
            print(json.dumps({"cosine": round(group.cosine, 6), "photos": [str(path) for path in group.photos]}))
        else:
            print(f"{len(group.photos)} photos, {kind}:", *map(display_text, group.photos), sep="\n  ")
    extra = sum(len(group.photos) - 1 for group in groups)
    found = f"{len(groups):,} groups of equal pictures, {extra:,} photos more than pictures; nothing was deleted"
    report(flags, found if groups else "no equal pictures")


def read_queries(flags: Flags) -> list[Query]:
    """Read the queries. Raises FileNotFoundError for a missing photo or file, ValueError for an unusable file."""
    from data.download import refuse_address
    from data.records import decode_text

    refuse_address(flags.image, "--image")
    refuse_address(flags.gallery, "--gallery")
    if flags.image is not None and not flags.image.is_file():
        raise FileNotFoundError(f"no such photo: {flags.image} (--image)")
    if flags.queries is None:
        return [Query(flags.query, flags.image)]
    if not flags.queries.is_file():
        raise FileNotFoundError(f"no such file: {flags.queries} (--queries)")
    queries = []
    for number, line in enumerate(decode_text(flags.queries).splitlines(), start=1):
        if has_undecoded(line):
            raise ValueError(f"{flags.queries}, line {number}: bytes that are not UTF-8 text; save the file as UTF-8")
        if line.strip():
            queries.append(Query(line.strip(), None))
    if not queries:
        raise ValueError(f"{flags.queries} is empty: write one sentence per line")
    return queries


def select_run(flags: Flags) -> Path:
    """Return the folder given with --run, or that of the newest finished run."""
    from models.hub_run import find_run

    return find_run(flags.run, "--run") if flags.run else newest_finished_run(flags.runs_dir)


def model_name(flags: Flags, run: Path | None) -> str | Path:
    """Return the name of the model for messages: the run's folder or its name on the hub, or that of --model."""
    from models.hub_run import hub_name

    return flags.model if run is None else hub_name(run) or run


def pictures_folder(flags: Flags, run: Path | None, searcher: "Searcher") -> Path:
    """Return the folder that contains matches/: that of the run, or the cache for a pretrained model."""
    from models.hub_run import output_folder

    return output_folder(run, flags.runs_dir) if run else searcher.store.parent


def read_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the labels, or the class names of one folder of class folders.

    Raises ValueError if it has none, and for a label that is longer than a class name.
    """
    folder = Path(labels[0]).expanduser()
    try:
        is_folder = len(labels) == 1 and folder.is_dir()
    except OSError:  # a name that is too long
        is_folder = False
    if not is_folder:
        for number, label in enumerate(labels, start=1):
            if len(label) > MAX_LABEL:
                found = f"label {number} has {len(label):,} characters: {display_text(label, 60)}"
                raise ValueError(f"{found}; --labels are names of at most {MAX_LABEL} characters")
        return labels
    from retrieval.zero_shot import class_folders

    return tuple(class_folders(folder)[0])


def report(flags: Flags, line: str) -> None:
    """Print what is searched and with which run, in the first process; to stderr if stdout is JSON."""
    if process_rank() == 0:
        print(display_text(line), file=sys.stderr if flags.json else sys.stdout, flush=True)


def describe_split(split: str, kind: str, count: int, total: int, run: Path, others: str) -> str:
    """Describe how many of the photos or captions of a run's data set are searched, and how to search others."""
    from models.hub_run import hub_name

    run = hub_name(run) or run
    if split == "all":
        return f"searching all {total:,} {kind} of {run}"
    return f"searching the {count:,} {split} {kind} of {total:,} of {run}; {others} for others"


def searches_captions(flags: Flags) -> bool:
    """Return whether to search captions: with --find captions, or by default for a photo alone without --gallery."""
    photo_alone = flags.image is not None and flags.query is None and flags.gallery is None
    return flags.find == "captions" or (flags.find is None and photo_alone)


def photo_search(flags: Flags, run: Path | None, searcher: "Searcher") -> Callable:
    """List the photos to search, and return a function from queries (Q, F) to their matches."""
    from retrieval.searcher import search_images

    photos = list_photos(flags, run)
    gallery = searcher.encoded_gallery(photos)
    searcher.text_only = gallery is not None and flags.image is None and (flags.query or flags.queries) is not None

    def search(queries):
        nonlocal gallery
        if gallery is None or gallery.embeddings.shape[1] != queries.shape[1]:
            gallery = searcher.gallery(photos)
        return search_images(queries, gallery, flags.top_k, flags.index)

    return search


def list_photos(flags: Flags, run: Path | None) -> "ImageList":
    """List the photos of --gallery, or of a split of the run's data set, and report how many they are."""
    from retrieval.embedding_store import list_images, list_split_images

    if flags.gallery is not None:
        photos = list_images(flags.gallery.expanduser())
        report(flags, f"searching the {len(photos.stamps):,} photos of {flags.gallery} with {model_name(flags, run)}")
        return photos
    from data.loading import open_run_data

    data = open_run_data(run, read_shared_config(run), flags.data_dir, flags.split or "test")
    split, total = flags.split or "test", data.table.image.nunique()
    photos = list_split_images(data, split)
    others = "--split all or --gallery FOLDER"
    report(flags, describe_split(split, "photos", len(photos.stamps), total, run, others))
    return photos


def caption_search(flags: Flags, run: Path, searcher: "Searcher") -> Callable:
    """Read the captions to search, and return a function from queries (Q, F) to their matches."""
    from data.loading import open_run_data
    from retrieval.searcher import search_captions

    data = open_run_data(run, read_shared_config(run), flags.data_dir, flags.split or "test")
    split, total = flags.split or "test", data.table.caption.nunique()
    captions = list(dict.fromkeys(data.split(split).captions))  # equal captions would be equal matches
    report(flags, describe_split(split, "captions", len(captions), total, run, "--split all"))
    return lambda queries: search_captions(queries, searcher.embed_captions(captions), captions, flags.top_k)


def encode_queries(searcher: "Searcher", queries: list[Query], target: Target):
    """Encode queries to search photos or captions -> (Q, F). Prints the searcher's warnings about the sentences."""
    from retrieval.searcher import combine_queries

    sentences = [query.sentence for query in queries if query.sentence is not None]
    for line in chain.from_iterable(map(searcher.warnings, sentences)):
        print(display_text(line), file=sys.stderr)
    sentence_emb = searcher.embed_sentences(sentences, target=target) if sentences else None
    photo = queries[0].image
    return combine_queries(sentence_emb, None if photo is None else searcher.embed_images([photo], target=target))


def format_table(query: Query, matches: list) -> str:
    """Format the matches for the terminal: rank, score, and photo, caption or label."""
    names = [display_text(match.item) for match in matches]
    lines = [f"{rank:>4}  {m.score:6.3f}  {name}" for rank, (m, name) in enumerate(zip(matches, names, strict=True), 1)]
    return "\n".join([display_text(query), *lines])


def format_json(flags: Flags, query: Query, matches: list) -> str:
    """Format the matches as one line of JSON."""
    key = "label" if flags.labels else "caption" if searches_captions(flags) else "photo"
    query_fields = {"query": query.sentence, "image": query.image and str(query.image)}
    found = [{"score": round(match.score, 6), key: str(match.item)} for match in matches]
    return json.dumps({name: value for name, value in query_fields.items() if value is not None} | {"matches": found})


def save_picture(flags: Flags, folder: Path, queries: list[Query], results: list) -> None:
    """Save a picture of the matches with --out, and by default for a single query without --json."""
    if flags.out is None and (flags.json or len(queries) > 1):
        return
    if flags.labels:
        from reporting.list_picture import plot_labels as plot
    elif searches_captions(flags):
        from reporting.list_picture import plot_captions as plot
    else:
        from reporting.match_picture import plot_photos as plot

    from retrieval.searcher import SLUG_LENGTH

    name = queries[0].sentence or queries[0].image.stem
    picture = flags.out or folder / "matches" / f"{slug(name, max_length=SLUG_LENGTH) or 'query'}.png"
    rows = [(display_text(query), query.image, matches) for query, matches in zip(queries, results, strict=True)]
    plot(rows, picture)
    print(f"picture: {display_text(picture)}", file=sys.stderr if flags.json else sys.stdout)


if __name__ == "__main__":
    cli.run(main)
