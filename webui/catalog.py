"""The runs and galleries on offer in the web page, each loaded at first use."""

import os
import re
from collections.abc import Sequence
from functools import cache
from itertools import chain, count
from pathlib import Path

from models.hub_run import find_run, hub_name
from retrieval.embedding_store import Gallery, list_images, list_split_images
from retrieval.searcher import Searcher, searcher_for_pretrained, searcher_for_run
from runtime import cli
from runtime.run_dir import finished_runs, read_shared_config
from runtime.text import display_text

RUN_PHOTOS = {"all": "all photos of the run's data set"} | {
    split: f"the {split} photos of the run's data set" for split in ("train", "val", "test")
}  # split -> the name of the gallery that depends on the chosen run
MAX_MESSAGE = 500  # characters
ABSOLUTE = re.compile(r"(?<![\w./])(?:~?/|[A-Za-z]:[\\/]|\\\\)[^\s/]")  # the start of an absolute path
ADDRESS = re.compile(r"\b\w+://")
# The folder of an upload, of which only the file's name is shown.
UPLOADED = re.compile(r"[^\s'\"]*[/\\]search-page-[^\s/\\]*(?:[/\\]files)?(?:[/\\][0-9a-f]{20,})?[/\\]")


class Catalog:
    """Runs and galleries by the names that visitors choose from. Visitors cannot access any other file or folder.

    run, model: the run's folder or the pretrained model to start with; if both are None, the newest finished run.
    options: the device, precision and cache_dir of searcher_for_run.
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
        first = [] if run is None else [find_run(run, "--run")]
        try:
            others = finished_runs(runs_dir)
        except FileNotFoundError:
            if run is None and model is None:
                raise
            others = []
        pretrained = {} if model is None else {display_name(model): None}  # None: it has no run folder
        self.runs = _unique_names([*first, *others], pretrained)
        self.folders = _unique_names([cli.existing_folder(folder, "--gallery") for folder in folders])
        self.searcher, self.gallery = cache(self._searcher), cache(self._gallery)

    @property
    def galleries(self) -> list[str]:
        """Return the names of the galleries: the folders, and the data set of the chosen run."""
        return [*self.folders, RUN_PHOTOS[self.split]]

    def captions(self, run: str) -> list[str]:
        """Return the distinct captions of the run's split. Raises ValueError for a pretrained model, which has none."""
        return list(dict.fromkeys(self._data(run).split(self.split).captions))

    def public_error(self, message: object) -> str | None:
        """Return an error message on one line, with the names that visitors know in place of absolute paths.

        Returns None if another path of this machine remains in it.
        """
        text = display_text(" ".join(str(message).split()), MAX_MESSAGE)
        folders = [*self.runs.items(), *self.folders.items()]
        folders += [] if self.data_dir is None else [(RUN_PHOTOS[self.split], self.data_dir)]
        paths = [(str(path), name) for name, folder in folders if folder for path in (folder, folder.resolve())]
        for path, name in sorted(paths, key=lambda item: len(item[0]), reverse=True):
            text = re.sub(rf"(?<![\w./\\-]){re.escape(path)}(?![\w.-])", lambda _, name=name: name, text)
        text = UPLOADED.sub("", text)
        cache_dir = self.options.get("cache_dir")
        hidden = cache_dir is not None and f"{cache_dir}{os.sep}" in text
        return None if hidden or ABSOLUTE.search(ADDRESS.sub("", text)) else text

    def refresh(self) -> None:
        """Forget the open galleries, so that the next search finds photos that were added, changed or deleted."""
        self.gallery.cache_clear()

    def warm_up(self) -> None:
        """Load the first run and gallery, so that the first visitor does not wait."""
        run = next(iter(self.runs))
        self.gallery(run, self.galleries[0])
        self.searcher(run).embed_sentences(["a photo"])

    def _searcher(self, run: str) -> Searcher:
        folder = self.runs[run]
        if folder is None:
            return searcher_for_pretrained(self.model, **self.options)
        return searcher_for_run(folder, **self.options)

    def _gallery(self, run: str, name: str) -> Gallery:
        if name == RUN_PHOTOS[self.split]:
            photos = list_split_images(self._data(run), self.split)
        else:
            photos = list_images(self.folders[name])
        return self.searcher(run).gallery(photos)

    def _data(self, run):
        if self.runs[run] is None:
            raise ValueError(f"{run} is a pretrained model without a data set: choose other photos, or a trained run")
        from data.loading import open_run_data

        return open_run_data(self.runs[run], read_shared_config(self.runs[run]), self.data_dir, self.split)


def display_name(path: str | Path) -> str:
    """Return a path or a model's name as visitors see it: of an absolute path only the last part.

    A run in the hub's cache has its name on the hub.
    """
    path = Path(path).expanduser()
    if name := hub_name(path):
        return name
    return path.name if path.is_absolute() else str(path)


def _unique_names(folders, reserved=()):
    """Map display names to folders, after the `reserved` entries; a name that is taken gets a number."""
    named = dict(reserved)
    for folder in dict.fromkeys(folders):
        name = display_name(folder)
        numbered = (f"{name} ({number})" for number in count(2))
        named[next(candidate for candidate in chain([name], numbered) if candidate not in named)] = folder
    return named
