"""The runs and galleries on offer in the web page, each loaded at first use."""

import os
import re
import threading
from collections.abc import Sequence
from functools import cache
from itertools import chain, count
from pathlib import Path, PurePosixPath

from models.hub_run import find_run, hub_name
from retrieval.embedding_store import Gallery, list_images, list_split_images
from retrieval.searcher import Searcher, searcher_for_pretrained, searcher_for_run
from runtime import cli
from runtime.run_dir import finished_runs, read_shared_config
from runtime.text import display_text
from webui.encoding import EncodingProgress

RUN_PHOTOS = {"all": "all photos of the run's data set"} | {
    split: f"the {split} photos of the run's data set" for split in ("train", "val", "test")
}  # split -> the name of the gallery that depends on the chosen run
MAX_MESSAGE = 500  # characters
EXAMPLES, EXAMPLE_LENGTH = 3, 60  # captions that are shown as example queries, and their characters
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
        self._searchers, self.examples = cache(self._searcher), cache(self._examples)
        self.encoding = EncodingProgress()
        self._galleries: dict[tuple[str, str], Gallery] = {}  # by run and name; emptied by `refresh`
        self._photos: dict[tuple[str, str], tuple[Path, frozenset[str]]] = {}  # root and names of each one opened
        self._lock, self._locks = threading.Lock(), {}

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
        self._galleries.clear()

    def is_open(self, run: str, gallery: str) -> bool:
        """Return whether a gallery is encoded and open since the last `refresh`."""
        return (run, gallery) in self._galleries

    @property
    def first(self) -> tuple[str, str]:
        """Return the run and the gallery that the page starts with."""
        return next(iter(self.runs)), self.galleries[0]

    def warm_up(self) -> None:
        """Load the first run and list the first gallery's photos, so that mistakes end the program at its start."""
        run, name = self.first
        self._list_photos(run, name)
        self.searcher(run).embed_sentences(["a photo"])

    def searcher(self, run: str) -> Searcher:
        """Return the Searcher of a run, the same one for all threads."""
        with self._lock:
            return self._searchers(run)

    def gallery(self, run: str, name: str) -> Gallery:
        """Open a gallery, and encode its new photos; a second caller waits for the first one."""
        key = run, name
        if (gallery := self._galleries.get(key)) is not None:
            return gallery
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if (gallery := self._galleries.get(key)) is None:
                gallery = self._open(key)
                self._photos[key] = gallery.root, frozenset(gallery.names)
                self._galleries[key] = gallery
        return gallery

    def _open(self, key):
        run, name = key
        try:
            return self.searcher(run).gallery(self._list_photos(run, name), self.encoding.reporter(key, name))
        finally:
            self.encoding.finish(key)

    def photo(self, run: object, gallery: object, name: object) -> tuple[Path, str]:
        """Return the root of a gallery that was opened, and the name of one of its photos.

        Raises KeyError for any other name, and for a gallery that no visitor has searched.
        """
        root, names = self._photos[run, gallery]
        if name not in names:
            raise KeyError(name)
        return root, name

    def folder_of(self, gallery: str, root: Path, name: str) -> str:
        """Return the folder of a photo for visitors: the gallery's name, and the path of the folder in it."""
        parent = PurePosixPath(name).parent
        first = root.name if gallery == RUN_PHOTOS[self.split] else gallery
        inside = "" if str(parent) == "." or ".." in parent.parts else f"/{parent}"
        return display_text(f"{first}{inside}", 200)

    def _searcher(self, run: str) -> Searcher:
        folder = self.runs[run]
        if folder is None:
            searcher = searcher_for_pretrained(self.model, **self.options)
        else:
            searcher = searcher_for_run(folder, **self.options)
        searcher.load = _load_once(searcher.load)
        return searcher

    def _list_photos(self, run, name):
        if name == RUN_PHOTOS[self.split]:
            return list_split_images(self._data(run), self.split)
        return list_images(self.folders[name])

    def _examples(self, run: str) -> list[str]:
        """Return three captions of the run's data set as example queries; [] if it has none, or no longer exists."""
        if self.runs[run] is None:
            return []
        try:
            captions = [text for text in self.captions(run) if 0 < len(text.strip()) <= EXAMPLE_LENGTH]
        except (OSError, ValueError):
            return []
        # Evenly spaced ones: neighbours are often captions of the same photo.
        chosen = captions[:: max(1, len(captions) // EXAMPLES)][:EXAMPLES]
        return [display_text(text.strip()) for text in chosen]

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


def _load_once(load):
    """Return `load` with one result for all threads: a gallery is encoded while visitors search."""
    lock, loaded = threading.Lock(), []

    def load_once():
        with lock:
            if not loaded:
                loaded.append(load())
            return loaded[0]

    return load_once


def _unique_names(folders, reserved=()):
    """Map display names to folders, after the `reserved` entries; a name that is taken gets a number."""
    named = dict(reserved)
    for folder in dict.fromkeys(folders):
        name = display_name(folder)
        numbered = (f"{name} ({number})" for number in count(2))
        named[next(candidate for candidate in chain([name], numbered) if candidate not in named)] = folder
    return named
