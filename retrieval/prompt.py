"""Ask for queries on the terminal, one after another: sentences, and commands that use the last answer."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from runtime.text import display_text

HELP = """\
a dog in snow    find photos for a sentence
:photo PATH      find photos like this one
:more 3          find photos like number 3 of the last answer
:open 3          open number 3 in the system's viewer
:quit            end; Ctrl-D does too"""
PROMPT = "search> "

# Finds the photos for a sentence or a photo, prints them, and returns their paths, best first.
Search = Callable[[str | None, Path | None], list[Path]]


def ask(search: Search, lines: Iterable[str], *, open_file: Callable[[Path], None] | None = None) -> None:
    """Answer every line until `:quit` or the end. A mistake is printed in one line, and the next line is asked for."""
    found: list[Path] = []
    for line in lines:
        command, _, argument = line.strip().partition(" ")
        try:
            if command in (":quit", ":q", ":exit"):
                return
            if command in (":help", ":h", ":?", "?"):
                print(HELP)
            elif command == ":photo":
                found = search(None, _photo(argument.strip()))
            elif command == ":more":
                found = search(None, _numbered(found, argument))
            elif command == ":open":
                (open_file or open_in_viewer)(_photo(str(_numbered(found, argument))))
            elif command.startswith(":"):
                raise ValueError(f"no such command: {command}; :help lists them")
            elif line.strip():
                found = search(line.strip(), None)
        except (ValueError, OSError) as error:
            print(display_text(" ".join(str(error).split())), file=sys.stderr)


def terminal_lines() -> Iterable[str]:
    """Yield the lines that are typed at the prompt, with the arrow keys for earlier ones where readline exists."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history
    print("a sentence, or :help; Ctrl-D ends")
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return


def open_in_viewer(path: Path) -> None:
    """Open a photo in the program that the system has for it. Raises ValueError if it has none."""
    if sys.platform == "win32":
        import os

        os.startfile(path)
        return
    command = "open" if sys.platform == "darwin" else "xdg-open"
    try:
        subprocess.Popen(
            [command, str(path.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise ValueError(f"there is no {command} on this system to open {path}") from None


def _photo(argument):
    path = Path(argument.strip("'\"")).expanduser()
    if not argument:
        raise ValueError("name a photo: :photo PATH")
    if not path.is_file():
        raise ValueError(f"no such photo: {path}")
    return path


def _numbered(found, argument):
    if not found:
        raise ValueError("search first: there is no last answer")
    if not argument.strip().isdecimal() or not 1 <= int(argument) <= len(found):
        raise ValueError(f"give a number from 1 to {len(found)}")
    return found[int(argument) - 1]
