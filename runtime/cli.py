"""Command-line handling shared by all scripts: flags, one-line errors and exit codes."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

import tyro

from runtime.deferred_import import deferred_import
from runtime.launcher import process_rank
from runtime.text import CONTROL, display_text

T = TypeVar("T")
# What may reach the terminal besides text: new lines, tabs and colours; on stderr also what progress bars need.
ON_STDOUT = re.compile(r"[\n\t]|\x1b\[[0-9;]*m")
ON_STDERR = re.compile(r"[\n\t\r]|\x1b\[(?:[0-9;]*m|A|K)")


def parse_flags(cls: type[T], *, default: T | None = None, argv: Sequence[str] | None = None) -> T:
    """Parse the command line into an instance of the dataclass `cls`, starting from `default`.

    An invalid flag prints a one-line error and exits with code 2.
    """
    options = {} if default is None else {"default": default}
    _import_typeguard()
    with _one_line_errors(cls):
        return tyro.cli(cls, args=argv, config=(tyro.conf.AvoidSubcommands,), **options)


def _import_typeguard():
    """Import a library of tyro without unittest.mock and asyncio, which it imports for classes that are not used here.

    This is a sixth of the time that --help takes.
    """
    with deferred_import(("unittest",)), contextlib.suppress(ImportError):
        import typeguard  # noqa: F401


def parse_known_flags(cls: type[T]) -> tuple[T, list[str]]:
    """Parse the known flags into an instance of the dataclass `cls`; return it and the unknown arguments."""
    with _one_line_errors(cls):
        return tyro.cli(cls, return_unknown_args=True)


@contextlib.contextmanager
def _one_line_errors(cls):
    errors = io.StringIO()
    flags = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(cls)]
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as error:
        if error.code and process_rank() == 0:
            print(f"error: {_to_one_line(errors.getvalue(), flags)} (--help lists the flags)", file=sys.stderr)
        raise


def peek_flag(flag: str, argv: Sequence[str] | None = None) -> str | None:
    """Return the value of one flag before all flags are parsed, or None if it is absent.

    Of several occurrences the last one counts, as in the full parse.
    """
    argv = sys.argv[1:] if argv is None else argv
    value = None
    for argument, following in itertools.zip_longest(argv, argv[1:]):
        if _flag_name(argument) == flag:
            value = argument.partition("=")[2] if "=" in argument else following
    return value


def has_flag(flag: str) -> bool:
    """Return whether the command line contains a flag, with or without a value."""
    return any(_flag_name(argument) == flag for argument in sys.argv[1:])


def rename_flags(renamed: Mapping[str, str]) -> None:
    """Replace old flags in sys.argv by their new names, and print each replacement to stderr.

    renamed: old field name -> new field name, with underscores.
    """
    for index, argument in enumerate(sys.argv[1:], start=1):
        flag, value = _flag_name(argument), "=" + argument.partition("=")[2] if "=" in argument else ""
        no = "no-" if flag.startswith("--no-") else ""
        new = renamed.get(flag.removeprefix(f"--{no}").replace("-", "_")) if flag.startswith("--") else None
        if new is not None:
            sys.argv[index] = f"--{no}{new.replace('_', '-')}{value}"
            if process_rank() == 0:
                print(f"{flag} is now {sys.argv[index].partition('=')[0]}", file=sys.stderr)


def wants_help() -> bool:
    """Return whether the command line contains --help or -h."""
    return any(argument in ("-h", "--help") for argument in sys.argv[1:])


def existing_folder(path: str | Path, description: str) -> Path:
    """Return `path` with ~ expanded. Raises FileNotFoundError with `description` if it is not a folder."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path} ({description})")
    return path


def run(main: Callable[[], None]) -> None:
    """Run a script; print ValueError and OSError as one line and exit with code 2.

    Ctrl-C and SIGTERM exit with 128 plus the signal's number. `python -X dev` shows the traceback of an error.
    """
    # albumentations and kagglehub check for updates online at import; tokenizers warns when loader processes start.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DISABLE_KAGGLE_CACHE_UPDATE_CHECK", "1")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # so that a terminal without Unicode shows ? instead of failing
    if process_rank() > 0:
        _discard_stdout()  # only rank 0 prints; errors of other ranks begin with their number
    stdout, stderr = SafeStream(sys.stdout, ON_STDOUT), SafeStream(sys.stderr, ON_STDERR)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        _run(main)


def _run(main):
    try:
        main()
    except KeyboardInterrupt as interrupt:
        if process_rank() == 0:
            print(f"\nstopped. {display_text(interrupt)}", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process without cleaning up
        sys.exit(128 + getattr(interrupt, "signum", signal.SIGINT))
    except BrokenPipeError:  # the reader of the output has exited, for example `| head`
        _discard_stdout()
        sys.exit(141)
    except (ValueError, OSError) as error:
        _exit_with_line(error, str(error))
    except (RuntimeError, MemoryError) as error:  # NotImplementedError too
        _exit_with_line(error, _describe_failure(error))


def _describe_failure(error):
    """Describe an error of a GPU, of memory and the like; None for others, and without PyTorch."""
    if "torch" not in sys.modules:
        return "out of memory: close other programs" if isinstance(error, MemoryError) else None
    from runtime.device_errors import describe_failure

    return describe_failure(error)


def _exit_with_line(error, line):
    if line is None or sys.flags.dev_mode:
        raise error
    prefix = f"process {process_rank()}: " if process_rank() > 0 else ""
    print(f"{prefix}error: {display_text(' '.join(line.split()))}", file=sys.stderr)
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        sys.stderr.flush()
        os._exit(2)  # the usual end would wait for the other processes, or be aborted while a message is under way
    sys.exit(2)


class SafeStream:
    """A text stream that escapes control characters, also those that a library prints, except matches of `allowed`.

    The second line of defence: what prints names or captions escapes them itself, new lines included (display_text).
    """

    def __init__(self, stream: TextIO, allowed: re.Pattern):
        self._stream, self._pattern = stream, re.compile(f"({allowed.pattern})|{CONTROL.pattern}")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, escaped; returns the number of its characters."""
        self._stream.write(self._pattern.sub(lambda match: match[1] or display_text(match[0]), text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of the lines, escaped."""
        for line in lines:
            self.write(line)


def _discard_stdout():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flag_name(argument: str) -> str:
    """Return the flag of a command-line argument, with hyphens and without a value: "--top_k=3" gives "--top-k"."""
    return argument.partition("=")[0].replace("_", "-")


def _to_one_line(message: str, flags: Sequence[str]) -> str:
    """Reduce tyro's framed error message to its first section, and add the flag that was probably meant."""
    lines = [re.sub(r"[│╭╮╰╯]|^\s*[|+]|[|+]\s*$", "", line).strip() for line in message.splitlines()]
    sections = " ".join("\n" if line and set(line) <= set("─-") else line for line in lines[1:]).split("\n")
    sections = [section for section in sections if section.strip()]
    text = re.sub(r"^Error parsing (?:\w+: )?", "", " ".join(sections[0].split()))
    if gpu := re.search(r"invalid choice 'cuda:(\d+)'", text):
        text += f"; choose a GPU with CUDA_VISIBLE_DEVICES={gpu[1]} and --device cuda"
    if unknown := re.match(r"Unrecognized options: (--[\w-]+)", text):
        extended = [flag for flag in flags if flag.startswith(f"{unknown[1]}-")]
        closest = difflib.get_close_matches(unknown[1], flags, n=1, cutoff=0.5)
        if closest == [unknown[1]]:
            text += "; this argument is positional: pass its value without the flag"
        elif extended:
            text += f"; did you mean {', '.join(sorted(extended))}?"
        elif closest:
            text += f"; did you mean {closest[0]}?"
    return text
