"""The runs and galleries that the page offers, each loaded when it is first asked for."""

from collections.abc import Sequence
from functools import cache
from itertools import chain, count
from pathlib import Path

from retrieval.embedding_store import Gallery, list_images, list_split_images
from retrieval.searcher import Searcher, searcher_for_pretrained, searcher_for_run
from runtime import cli
from runtime.run_dir import finished_runs, read_config

OWN_PHOTOS = "the run's data set"


class Catalog:
    """Runs and galleries by the names that visitors choose from; nothing else can be reached through it.

    run, or a pretrained pair's name: the one to start with; None for the newest finished run. options: the device,
    precision and cache_dir of search_with_run.
    """

    def __init__(
        self,
        run: Path | None,
        folders: Sequence[Path],
        *,
        split: str,
        model: str | None = None,
        runs_dir: Path,
        data_dir: Path | None,
        options: dict,
    ):
        self.split, self.data_dir, self.options, self.model = split, data_dir, options, model
        first = [] if run is None else [cli.existing_folder(run, "--run")]
        try:
            others = finished_runs(runs_dir)
        except FileNotFoundError:
            if run is None and model is None:
                raise
            others = []
        pairs = {} if model is None else {display_name(model): None}  # has no folder of its own
        self.runs = _by_label([*first, *others], pairs)
        self.folders = _by_label([cli.existing_folder(folder, "--gallery") for folder in folders])
        self.searcher, self.gallery = cache(self._searcher), cache(self._gallery)

    @property
    def galleries(self) -> list[str]:
        """The names of the galleries: the folders, and the data set of whichever run is chosen."""
        return [*self.folders, OWN_PHOTOS]

    def captions(self, run: str) -> list[str]:
        """The captions of a run's data set."""
        return self._data(run).split(self.split).captions

    def public_error(self, message: object) -> str:
        """A message for visitors: on one line, with the labels of folders in place of their paths."""
        text = " ".join(str(message).split())
        places = [*self.runs.items(), *self.folders.items()]
        places += [] if self.data_dir is None else [(OWN_PHOTOS, self.data_dir)]
        for label, folder in sorted(places, key=lambda place: len(str(place[1])), reverse=True):
            text = text if folder is None else text.replace(str(folder), label)
        return text

    def refresh(self) -> None:
        """Notice photos that were added, changed or deleted, at the next search."""
        self.gallery.cache_clear()

    def warm_up(self) -> None:
        """Load what the page shows first, so that its first visitor need not wait."""
        run = next(iter(self.runs))
        self.gallery(run, self.galleries[0])
        self.searcher(run).sentences(["a photo"])

    def _searcher(self, run: str) -> Searcher:
        folder = self.runs[run]
        return (
            searcher_for_run(folder, **self.options) if folder else searcher_for_pretrained(self.model, **self.options)
        )

    def _gallery(self, run: str, name: str) -> Gallery:
        photos = (
            list_split_images(self._data(run), self.split) if name == OWN_PHOTOS else list_images(self.folders[name])
        )
        return self.searcher(run).gallery(photos)

    def _data(self, run):
        if self.runs[run] is None:
            raise ValueError(f"{run} was not trained here and has no data set: choose other photos, or a run")
        from data.loading import open_data

        return open_data(read_config(self.runs[run]), self.data_dir)


def display_name(path: str | Path) -> str:
    """What visitors see of a path, or of a name: itself, or without its way from the machine's root."""
    path = Path(path).expanduser()
    return path.name if path.is_absolute() else str(path)


def _by_label(folders, others=()):
    """Folders by what visitors see of them, numbered where that is the same; behind others that have labels already."""
    labels = dict(others)
    for folder in dict.fromkeys(folders):
        own = display_name(folder)
        numbered = (f"{own} ({number})" for number in count(2))
        labels[next(label for label in chain([own], numbered) if label not in labels)] = folder
    return labels
