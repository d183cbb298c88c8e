"""Split the text of a table into rows and cells: quoted cells over several lines, unclosed quotes."""

import csv
import re
from collections.abc import Callable, Iterator

from data.text_lines import TextLines

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
    is missing. `unclosed` contains (line number, text) of the lines with an unclosed quote.
    """

    def __init__(self, lines: TextLines, delimiter: str, is_row: Callable[[list[str]], bool]):
        self.lines, self.delimiter, self.is_row = lines, delimiter, is_row
        self.unclosed = []
        self._no_quote_before = 0  # the lines up to here were searched: a quote that opens in them is not closed
        cell, quoted = rf'[^"{delimiter}]*', ' *"(?:[^"]|"")*" *'
        self._whole_row = re.compile(rf"(?:{quoted}|{cell})(?:{re.escape(delimiter)}(?:{quoted}|{cell}))*")

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield (line number, text) of each row that is not blank."""
        start, quoted = 0, self.delimiter != NO_QUOTES
        while start < len(self.lines):
            first, block = self.lines.block(start)
            for k in range(start - first, len(block)):
                number, row = first + k + 1, block[k]
                if quoted and '"' in row and row.count('"') % 2 and self._ends_in_quotes(row, False):
                    end = self._find_end(number - 1)
                    if end > 0:
                        yield number, "\n".join([self.lines[index] for index in range(number - 1, end)])
                        start = end
                        break
                    self.unclosed.append((number, row))
                elif row and not row.isspace():
                    yield number, row
            else:
                start = first + len(block)

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
