"""Fuzz everything that the program reads from strangers, and watch time, memory and the disk.

    python -m benchmarks.fuzz --tries 20000 --seed 0
    python -m benchmarks.fuzz --areas runs captions --tries 500

A try damages one file, or makes a hostile one, and reads it. The only errors allowed are ValueError and OSError in one
line that names the file. A try may take 10 seconds and 1 GB, opens no connection, starts no process and writes only
below its own folder. Each area runs in a process of its own; the exit code is 1 if anything was found. A try depends
only on the seed, the area and its number: `--areas runs --first 117 --tries 1` repeats one.
"""

import contextlib
import json
import os
import random
import selectors
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

MAX_SECONDS, MAX_GROWTH = 10, 2**30  # per try
START_SECONDS = 180  # for imports and for the files that an area starts from
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
REFUSED = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.posix_spawn", "pty.spawn"}
SHOWN = 5  # findings per area; the others are counted


@dataclass(frozen=True)
class Flags:
    """Read damaged and hostile files, and report each traceback, hang, growth and write elsewhere."""

    tries: int = 20_000  # in total, divided evenly among the areas
    seed: int = 0  # of all tries
    first: int = 0  # number of the first try
    areas: tuple[str, ...] = ()  # default: all of them
    child: Path | None = None  # internal: the folder of the process of one area


def main(flags: Flags) -> int:
    from benchmarks.fuzz_areas import AREAS

    if unknown := set(flags.areas) - AREAS.keys():
        raise SystemExit(f"unknown area {', '.join(sorted(unknown))}: choose from {', '.join(AREAS)}")
    if flags.child is not None:
        run_child(flags, AREAS[flags.areas[0]])
        return 0
    names, found = flags.areas or tuple(AREAS), 0
    before = list_files(*watched_folders())
    for position, name in enumerate(names):
        tries = flags.tries // len(names) + (position < flags.tries % len(names))
        found += run_area(name, tries, flags.seed, flags.first)
    changed = sorted(path for path, stamp in list_files(*watched_folders()).items() if before.get(path) != stamp)
    print(f"disk: {len(changed)} files written in {', '.join(map(str, watched_folders()))} {changed[:SHOWN] or ''}")
    return int(bool(found or changed))


def run_area(name: str, tries: int, seed: int, first: int) -> int:
    """Run the tries of one area in child processes, print a line about it, and return the number of findings."""
    started, number, end, findings, slowest = time.perf_counter(), first, first + tries, [], 0.0
    while number < end:
        with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
            done, found, seconds = watch_child(name, Path(folder), number, end - number, seed)
        number, slowest = done, max(slowest, seconds)
        findings += found
        if len(findings) > 200:
            break
    seconds = time.perf_counter() - started
    print(
        f"{name}: {number - first:,} tries, {len(findings)} findings, slowest {slowest:.1f} s, {seconds:.0f} s in all"
    )
    groups: dict[str, list] = {}
    for finding in findings:
        groups.setdefault(finding["problem"], []).append(finding["try"])
    for problem, numbers in sorted(groups.items(), key=lambda group: -len(group[1])):
        print(f"  {len(numbers)} x {problem} (try {', '.join(map(str, numbers[:SHOWN]))})", flush=True)
    return len(findings)


def watch_child(name, folder, first, tries, seed):
    """Run one child until it ends, hangs or dies; return the number of the next try, findings, and slowest seconds."""
    (folder / "home").mkdir()
    environment = {
        **os.environ,
        **{"HOME": str(folder / "home"), "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
        **{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"},
    }
    command = [sys.executable, "-m", "benchmarks.fuzz", "--areas", name, "--child", str(folder)]
    command += ["--tries", str(tries), "--first", str(first), "--seed", str(seed)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        number, findings, slowest, problem = first, [], 0.0, None
        for line in _lines(child.stdout, MAX_SECONDS + 5):
            if line is None:
                problem = "hangs"
                child.kill()
                break
            message = json.loads(line)
            number, slowest = message.get("next", number), max(slowest, message.get("seconds", 0.0))
            findings += [message] if "problem" in message else []
        code = child.wait()
    if problem is None and code:
        problem = f"the process ended with {code}"
    if problem:
        findings.append({"try": number, "problem": problem})
        number += 1
    return number, findings, slowest


def _lines(stream, timeout):
    """Yield the lines of a pipe, and None if there is none in `timeout` seconds (more before the first one)."""
    os.set_blocking(stream.fileno(), False)
    buffer, wait = b"", START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(wait):
                yield None
                return
            if not (content := os.read(stream.fileno(), 65536)):
                return
            *lines, buffer = (buffer + content).split(b"\n")
            wait = timeout if lines else wait
            yield from lines


def watched_folders() -> list[Path]:
    """Return folders in which no try may write: the user's programs and keys, and the installed packages."""
    folders = (Path.home() / ".local", Path.home() / ".ssh", Path(sysconfig.get_paths()["purelib"]))
    return [folder for folder in folders if folder.is_dir()]


def list_files(*folders: Path) -> dict[str, tuple[int, int]]:
    """Return {path: (size, modification time)} of all files below the folders, without compiled Python."""
    files = {}
    for folder in folders:
        for parent, names, entries in os.walk(folder):
            names[:] = [name for name in names if name != "__pycache__"]
            for path in (os.path.join(parent, entry) for entry in entries):
                with contextlib.suppress(FileNotFoundError):  # deleted by another process in the meantime
                    stat = os.lstat(path)
                    files[path] = stat.st_size, stat.st_mtime_ns
    return files


# In the child


def run_child(flags: Flags, make_area: Callable[[Path], Callable]) -> None:
    """Run the tries of one area, and write one line of JSON per try or finding to stdout."""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    folder = flags.child.resolve()
    attempt = make_area(folder)
    watch = DiskWatch(folder)
    print(json.dumps({"next": flags.first}), file=report)
    for number in range(flags.first, flags.first + flags.tries):
        rng, started, before = random.Random(f"{flags.seed}-{flags.areas[0]}-{number}"), time.perf_counter(), _peak()
        problems = [describe(attempt, rng, folder), *watch.take()]
        seconds, growth = time.perf_counter() - started, _peak() - before
        problems += [f"takes more than {MAX_SECONDS} s"] if seconds > MAX_SECONDS else []
        problems += [f"takes more than {MAX_GROWTH / 1e9:.1f} GB"] if growth > MAX_GROWTH else []
        for problem in filter(None, problems):
            print(json.dumps({"try": number, "problem": problem}), file=report)
        print(json.dumps({"next": number + 1, "seconds": seconds}), file=report)


def describe(attempt: Callable[[random.Random], None], rng: random.Random, folder: Path) -> str | None:
    """Run one try; return None if it succeeds or raises what a person can use, else a description."""
    try:
        attempt(rng)
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, UnicodeError | json.JSONDecodeError):
            return _describe_error(error)
        if not any(name in message for name in (str(folder), *getattr(attempt, "names", ()))):
            return "names no file: " + _describe_error(error)
        return "more than one line: " + _describe_error(error) if "\n" in message else None
    except BaseException as error:  # includes panics of Rust
        return _describe_error(error)
    return None


def _describe_error(error):
    """Return the type, the first words of the message and the last line of the project in the traceback."""
    root, place, traceback = str(Path(__file__).parents[1]), "?", error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if file.startswith(root) and "benchmarks" not in file:
            place = f"{file.removeprefix(root)[1:]}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f"{place} {type(error).__name__}: {' '.join(str(error).split())[:90]}"


class DiskWatch:
    """Record, through Python's audit events, each write outside a folder, each connection and each new process."""

    def __init__(self, folder: Path):
        self.folder, self.events = f"{folder}{os.sep}", []
        sys.addaudithook(self._hook)

    def take(self) -> list[str]:
        """Return the events since the last call."""
        events, self.events = self.events, []
        return events

    def _hook(self, event, args):
        if event in REFUSED:
            self.events.append(f"{event} {str(args)[:240]}")
        elif event in WRITES or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_ACCMODE | os.O_CREAT)
        ):
            paths = args[: 2 if event in ("os.rename", "os.link") else 1]
            for path, parent in zip(paths, (None,) if event == "open" else args[-len(paths) :], strict=True):
                if isinstance(path, str | bytes | os.PathLike) and self._is_outside(os.fsdecode(path), parent):
                    self.events.append(f"{event} writes {os.fsdecode(path)[-120:]!r}")

    def _is_outside(self, path, parent):
        if isinstance(parent, int) and parent > 2:  # path is relative to an open folder, as in shutil.rmtree
            with contextlib.suppress(OSError):
                path = os.path.join(os.readlink(f"/proc/self/fd/{parent}"), path)
        return not os.path.abspath(path).startswith((self.folder, "/dev/null", "/dev/shm/"))


def _peak():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Flags)))
