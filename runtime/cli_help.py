"""The --help text of a dataclass with many fields, in groups; tyro supports no groups within one dataclass."""

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin

COLUMN = 30  # where the help texts begin
WIDTH = 68  # of the help texts


def print_help(cls: type, default: object, *, most_used: Sequence[str], note: str) -> None:
    """Print the flags of the dataclass `cls` with their choices, help texts and the values of `default`.

    The group "Most used" with the fields in `most_used` comes before the groups of the source code. In the source, a
    comment line between the fields begins a group, and the comment after a field is its help text.
    """
    print(f"usage: python {Path(sys.argv[0]).name} [--flag value ...]\n\n{cls.__doc__}\n{note}")
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    for title, fields in _move_to_front(_read_groups(cls), most_used).items():
        if fields:
            print(f"\n{title}:")
        for name, text in fields.items():
            print(_format_field(name, types[name], getattr(default, name), text))


def _read_groups(cls: type) -> dict[str, dict[str, str]]:
    """Read group title -> field name -> help text from the source of a dataclass and its bases."""
    groups, title = {}, "Options"
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if heading := re.fullmatch(r"    # (\w[\w ]*)\b.*", line):
                title = heading[1]
            elif field := re.fullmatch(r"    (\w+): .*?  # (.*)", line):
                groups.setdefault(title, {})[field[1]] = field[2]
    return groups


def _move_to_front(groups: Mapping[str, Mapping[str, str]], names: Sequence[str]) -> dict[str, dict[str, str]]:
    texts = {name: text for fields in groups.values() for name, text in fields.items()}
    return {"Most used": {name: texts[name] for name in names}} | {
        title: {name: text for name, text in fields.items() if name not in names} for title, fields in groups.items()
    }


def _format_field(name: str, annotation: object, default: object, text: str) -> str:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        flag = f"{flag}, --no-{name.replace('_', '-')}"
    elif get_origin(annotation) is Literal:
        flag = f"{flag} {{{','.join(map(str, get_args(annotation)))}}}"
    elif get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        choices = f"{{{','.join(get_args(item))}}}" if get_origin(item) is Literal else item.__name__.upper()
        flag, default = f"{flag} {choices} ...", " ".join(map(str, default)) or "none"
    value = f"{default:.4g}" if isinstance(default, float) else default
    lines = textwrap.wrap(f"{text} [{value}]", width=WIDTH)
    indent = " " * COLUMN
    head = f"  {flag:<{COLUMN - 2}}" if len(flag) <= COLUMN - 3 else f"  {flag}\n{indent}"
    return head + f"\n{indent}".join(lines)
