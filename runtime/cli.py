"""What every script shares at the terminal: flags, and errors of one line."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse_flags(kind: type[T], *, default: T | None = None, argv: Sequence[str] | None = None) -> T:
    """Fill the dataclass `kind` from the command line; a wrong flag ends the program with one line and exit code 2."""
    options = {} if default is None else {"default": default}
    with _one_line_errors(kind):
        return tyro.cli(kind, args=argv, config=(tyro.conf.AvoidSubcommands,), **options)


def parse_known_flags(kind: type[T]) -> tuple[T, list[str]]:
    """Fill the dataclass `kind`, and return the words of the command line that are none of its flags."""
    with _one_line_errors(kind):
        return tyro.cli(kind, return_unknown_args=True)


@contextlib.contextmanager
def _one_line_errors(kind):
    errors = io.StringIO()
    flags = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)]
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as stop:
        if stop.code and _process() == 0:
            print(f"error: {_one_line(errors.getvalue(), flags)} (--help lists the flags)", file=sys.stderr)
        raise


def peek_flag(flag: str, argv: Sequence[str] | None = None) -> str | None:
    """The value of one flag, read ahead of all others, or None; of several the last, as they all are read later."""
    argv = sys.argv[1:] if argv is None else argv
    value = None
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if _flag(word) == flag:
            value = word.partition("=")[2] if "=" in word else following
    return value


def has_flag(flag: str) -> bool:
    """Whether the command line names a flag, with or without a value."""
    return any(_flag(word) == flag for word in sys.argv[1:])


def rename_flags(renamed: Mapping[str, str]) -> None:
    """Replace flags of an older version in sys.argv by their new names, and say so on stderr.

    renamed: old field name -> new field name, with underscores.
    """
    for place, word in enumerate(sys.argv[1:], start=1):
        flag, value = _flag(word), "=" + word.partition("=")[2] if "=" in word else ""
        no = "no-" if flag.startswith("--no-") else ""
        new = renamed.get(flag.removeprefix(f"--{no}").replace("-", "_")) if flag.startswith("--") else None
        if new is not None:
            sys.argv[place] = f"--{no}{new.replace('_', '-')}{value}"
            if _process() == 0:
                print(f"{flag} is now {sys.argv[place].partition('=')[0]}", file=sys.stderr)


def wants_help() -> bool:
    """Whether the command line asks for help."""
    return any(word in ("-h", "--help") for word in sys.argv[1:])


def print_help(kind: type, default: object, *, first: Sequence[str], note: str) -> None:
    """Print the flags of a dataclass in the groups of its source, those named in `first` before all others.

    A group is a comment line between the fields, a field's help the comment behind it. tyro knows no groups within one
    dataclass.
    """
    groups = _documented_fields(kind)
    known = {name: text for fields in groups.values() for name, text in fields.items()}
    groups = {"Most used": {name: known.pop(name) for name in first}} | {
        title: {name: text for name, text in fields.items() if name in known} for title, fields in groups.items()
    }
    print(f"usage: python {Path(sys.argv[0]).name} [--flag value ...]\n\n{kind.__doc__}\n{note}")
    for title, fields in groups.items():
        print(f"\n{title}:" if fields else "", end="\n" if fields else "")
        for name, text in fields.items():
            print(_help_line(name, getattr(default, name), text))


def _documented_fields(kind):
    """Group -> field -> help text of a dataclass and its bases, read from their source."""
    groups, title = {}, "Options"
    for base in reversed(kind.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if heading := re.fullmatch(r"    # (\w[\w ]*)\b.*", line):
                title = heading[1]
            elif field := re.fullmatch(r"    (\w+): .*?  # (.*)", line):
                groups.setdefault(title, {})[field[1]] = field[2]
    return groups


def _help_line(name, default, text):
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        flag = f"{flag}, --no-{name.replace('_', '-')}"
    shown = f"{default:.4g}" if isinstance(default, float) else default
    lines = textwrap.wrap(f"{text} [{shown}]", width=68)
    head = f"  {flag:<28}" if len(flag) <= 27 else f"  {flag}\n{'':30}"
    return head + f"\n{'':30}".join(lines)


def _flag(word: str) -> str:
    """The flag in a word of the command line, which may be written with underscores and have its value behind it."""
    return word.partition("=")[0].replace("_", "-")


def run(main: Callable[[], None]) -> None:
    """Run a script; a user's mistake ends it with one line and exit code 2 (`python -X dev` shows the traceback)."""
    # Both libraries look for news on the internet at import, and tokenizers warns when loader processes start.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DISABLE_KAGGLE_CACHE_UPDATE_CHECK", "1")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an old terminal shows ? for a letter it lacks
    if _process() > 0:
        # Of many processes the first one speaks; errors say whose they are.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        main()
    except KeyboardInterrupt as stop:
        if _process() == 0:
            print(f"\nstopped. {stop}", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more, and it need not wait for what is still open
        sys.exit(128 + getattr(stop, "signum", signal.SIGINT))
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        where = f"process {_process()}: " if _process() > 0 else ""
        print(f"{where}error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def existing_folder(path: str | Path, what: str) -> Path:
    """The path, if it is a folder; else an error that says what was looked for."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path} ({what})")
    return path


def _process() -> int:
    """The number that a launcher gave this process, or 0."""
    return int(os.environ.get("RANK", 0))


def _one_line(message: str, flags: Sequence[str]) -> str:
    """tyro's framed error, without the frame: its first part, and the flag that was probably meant."""
    lines = [re.sub(r"[│╭╮╰╯]|^\s*[|+]|[|+]\s*$", "", line).strip() for line in message.splitlines()]
    parts = " ".join("\n" if line and set(line) <= set("─-") else line for line in lines[1:]).split("\n")
    parts = [part for part in parts if part.strip()]
    text = re.sub(r"^Error parsing (?:\w+: )?", "", " ".join(parts[0].split()))
    if unknown := re.match(r"Unrecognized options: (--[\w-]+)", text):
        begins = [flag for flag in flags if flag.startswith(f"{unknown[1]}-")]
        meant = difflib.get_close_matches(unknown[1], flags, n=1, cutoff=0.5)
        if meant == [unknown[1]]:  # a field of the name, but one without a flag
            text += "; give what stands behind it alone, without the flag"
        elif begins:
            text += f"; did you mean {', '.join(sorted(begins))}?"
        elif meant:
            text += f"; did you mean {meant[0]}?"
    return text
