"""Split the text of a table into rows and cells: quoted cells over several lines, unclosed quotes."""

import csv
import re
from collections.abc import Callable, Iterator

NO_QUOTES = "|"  # tables with pipes do not use quotes
MAX_CELL = 2**31 - 1  # characters; the csv module's own limit is 131,072


def split_cells(row: str, delimiter: str) -> list[str]:
    """Return the cells of a row; `a, "b"` without a closing quote gives the rest of the row as one cell."""
    if delimiter == NO_QUOTES or '"' not in row:
        return row.split(delimiter)
    csv.field_size_limit(MAX_CELL)
    return next(csv.reader([row], delimiter=delimiter), [])


class RowScanner:
    """Iterate over the rows of a table. A quoted cell may span any number of lines; an unclosed quote loses its line.

    is_row: whether the cells of a line are those of a whole row; such a line within quotes shows that the closing quote
    is missing. release: empty the lines that were read, to free their memory. `unclosed` contains (line number, text)
    of the lines with an unclosed quote.
    """

    def __init__(self, lines: list[str], delimiter: str, is_row: Callable[[list[str]], bool], *, release: bool = False):
        self.release = release
        self.lines, self.delimiter, self.is_row = lines, delimiter, is_row
        self.unclosed = []
        self._no_quote_before = 0  # the lines up to here were searched: a quote that opens in them is not closed
        cell, quoted = rf'[^"{delimiter}]*', ' *"(?:[^"]|"")*" *'
        self._whole_row = re.compile(rf"(?:{quoted}|{cell})(?:{re.escape(delimiter)}(?:{quoted}|{cell}))*")

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield (line number, text) of each row that is not blank."""
        start = 0
        while start < len(self.lines):
            row, n_lines = self.lines[start], 1
            if row.count('"') % 2 and self.delimiter != NO_QUOTES and self._ends_in_quotes(row, False):
                n_lines = self._find_end(start) - start
                if n_lines > 0:
                    row = "\n".join(self.lines[start : start + n_lines])
                else:
                    self.unclosed.append((start + 1, row))
                    row, n_lines = "", 1
            if row and not row.isspace():
                yield start + 1, row
            if self.release:
                self.lines[start : start + n_lines] = [""] * n_lines
            start += n_lines

    def _find_end(self, start):
        """Return the index after the last line of the row in lines[start], or -1 if its quote is not closed."""
        if start < self._no_quote_before:
            return -1
        for index in range(start + 1, len(self.lines)):
            line = self.lines[index]
            if self.delimiter in line and self._is_whole_row(line):
                break
            if '"' in line:
                in_quotes = self._ends_in_quotes(line, True)
                if in_quotes is None:
                    break
                if not in_quotes:
                    return index + 1
        else:
            index = len(self.lines)
        self._no_quote_before = index
        return -1

    def _is_whole_row(self, line):
        return self._whole_row.fullmatch(line) is not None and self.is_row(split_cells(line, self.delimiter))

    def _ends_in_quotes(self, line, in_quotes):
        """Return whether a line ends within quotes; None for a quote in a quoted cell that is not doubled.

        in_quotes: whether the line starts within quotes, as part of a cell that began in an earlier line.
        """
        line = line.rstrip()
        at, length, started_in_quotes = 0, len(line), in_quotes
        while True:
            if not in_quotes:  # at the start of a cell
                if line[at : at + 1] == '"':
                    at, in_quotes = at + 1, True
                else:
                    at = line.find(self.delimiter, at) + 1
                    if at == 0:
                        return False
                continue
            at = line.find('"', at) + 1
            if at == 0:
                return True
            following = line[at : at + 1]
            if following == '"':
                at += 1
            elif at == length:
                return False
            elif following == self.delimiter:
                at, in_quotes, started_in_quotes = at + 1, False, False
            elif started_in_quotes:
                return None
