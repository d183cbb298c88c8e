"""Encode a gallery with several processes: each one takes shards that no other process is encoding.

The photos that the gallery lacks are divided into shards of consecutive photos. A shard is a small gallery in a folder
of its own, and only the process that holds its lock writes to it. If that process is killed, another one continues the
shard. When all are complete, one process appends them to the gallery, in order, and deletes them:

    shards/plan.json        the first photo of each shard but the first
    shards/0000/            1.npy, 1.jsonl as in a gallery; lock

The processes exchange nothing but these files, so they may run on several machines that share the cache.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from runtime.atomic_io import write_text
from runtime.cache import load_cached, require
from runtime.launcher import num_processes, process_rank

FOLDER, PLAN = "shards", "plan.json"
TAKEN = "taken.json"  # what the plan is renamed to before the shards are appended to the gallery
SHARDS_PER_PROCESS = 4  # so that a process that is done early can take work of a slower one
BATCH, MAX_SHARD = 64, 16_384  # photos; shards of whole batches give the same batches as a single process
POLL_SECONDS = 0.2  # how often a process without work looks whether the last shards are complete

# Bring the shard in this folder up to date for the photos with these names.
UpdateShard = Callable[[Path, Sequence[str]], None]


def has_shards(store: Path) -> bool:
    """Return whether several processes are encoding the gallery in the folder `store`, or were interrupted."""
    return (store / FOLDER / PLAN).is_file()


def has_taken_shards(store: Path) -> bool:
    """Return whether `take_shards` was interrupted."""
    return (store / FOLDER / TAKEN).is_file()


def plan_shards(store: Path, names: Sequence[str]) -> None:
    """Divide the photos to encode into shards, unless another process did. The caller holds `planning_lock`."""
    if names and not has_taken_shards(store) and load_cached(store / FOLDER / PLAN, _read_plan) is None:
        per_shard = -(-len(names) // (SHARDS_PER_PROCESS * num_processes()))
        size = min(MAX_SHARD, -(-per_shard // BATCH) * BATCH)
        (store / FOLDER).mkdir(parents=True, exist_ok=True)
        write_text(store / FOLDER / PLAN, json.dumps([names[start] for start in range(size, len(names), size)]))


def planning_lock(store: Path):
    """Return the lock under which shards are planned, and later appended to the gallery."""
    from filelock import FileLock

    return FileLock(store / "shards.lock")


def encode_shards(store: Path, names: Sequence[str], update: UpdateShard) -> None:
    """Encode shards until all of them are complete, those of other processes included.

    names: the photos that the gallery lacks. Returns at once if there is no plan, or when another process has appended
    all shards to the gallery.
    """
    shards = list(_divide(store, names))
    first = len(shards) * process_rank() // num_processes()  # neighbours: archives and disks are read in order
    pending = shards[first:] + shards[:first]
    while pending:
        pending = [(folder, names) for folder, names in pending if not _encode_shard(store, folder, names, update)]
        if pending:
            time.sleep(POLL_SECONDS)


def shard_folders(store: Path) -> list[Path]:
    """Return the folders of the shards, in the order of their photos."""
    return sorted(path.parent for path in (store / FOLDER).glob("*/lock"))


def take_shards(store: Path) -> Iterator[Path]:
    """Yield the folder of each shard, in the order of their photos, and delete it when the next one is asked for.

    From the first one on, no process begins to encode a shard. The caller holds `planning_lock` and the gallery's lock.
    """
    from filelock import FileLock

    folder = store / FOLDER
    if has_shards(store):
        (folder / PLAN).replace(folder / TAKEN)
    for shard in shard_folders(store):
        with FileLock(shard / "lock"):  # waits for a process that adds a photo to a complete shard
            yield shard
            shutil.rmtree(shard, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _divide(store, names) -> Iterator[tuple[Path, list[str]]]:
    """Yield for each shard of the plan its folder and its photos; a photo added after the plan follows the previous."""
    starts = load_cached(store / FOLDER / PLAN, _read_plan)
    if starts is None:
        return
    numbers, shards, number = {name: number for number, name in enumerate(starts, 1)}, [[] for _ in [0, *starts]], 0
    for name in names:
        number = numbers.get(name, number)
        shards[number].append(name)
    for number, shard in enumerate(shards):
        yield store / FOLDER / f"{number:06d}", shard


def _encode_shard(store, folder, names, update):
    """Complete a shard and return True, or return False if another process is encoding it."""
    from filelock import FileLock, Timeout

    if not has_shards(store):  # another process has appended all of them to the gallery
        return True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock").acquire(timeout=0):
            if has_shards(store):  # other processes delete shards only with this lock
                update(folder, names)
            return True
    except Timeout:
        return False


def _read_plan(path):
    starts = json.loads(path.read_text("utf-8"))
    require(isinstance(starts, list) and all(isinstance(name, str) for name in starts), "it is no list of names")
    return starts
