"""The lines of a text file of any size, split block by block: never all of them in memory at once."""

from bisect import bisect_right
from collections.abc import Iterator

BLOCK = 2**20  # characters or bytes that are split at once


class TextLines:
    """The lines of a text, by index: those of `text.split("\\n")`, without a list of them.

    text: a string, or bytes in UTF-8, which need a quarter of the memory if one character is outside the basic plane.
    """

    def __init__(self, text: str | bytes):
        self._text, self._newline = text, b"\n" if isinstance(text, bytes) else "\n"
        self._starts, self._first = [0], [0]  # of each block: its offset in the text, and the index of its first line
        lines = 0
        while (end := text.find(self._newline, self._starts[-1] + BLOCK)) >= 0:
            lines += text.count(self._newline, self._starts[-1], end) + 1
            self._starts.append(end + 1)
            self._first.append(lines)
        self._length = lines + text.count(self._newline, self._starts[-1]) + 1
        self._starts.append(len(text) + 1)
        self._block = (0, [])  # the block that was split last

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str:
        first, lines = self.block(index)
        return lines[index - first]

    def __iter__(self) -> Iterator[str]:
        index = 0
        while index < self._length:
            first, lines = self.block(index)
            yield from lines
            index = first + len(lines)

    def block(self, index: int) -> tuple[int, list[str]]:
        """Return a block of lines that contains the line `index`, and the index of its first line."""
        first, lines = self._block
        if not first <= index < first + len(lines):
            k = bisect_right(self._first, index) - 1
            text = self._text[self._starts[k] : self._starts[k + 1] - 1]
            first, lines = self._first[k], (text.decode("utf-8") if isinstance(text, bytes) else text).split("\n")
            self._block = first, lines
        return first, lines

    def contains(self, character: str) -> bool:
        """Return whether an ASCII character is anywhere in the text."""
        return (character.encode() if isinstance(self._text, bytes) else character) in self._text
