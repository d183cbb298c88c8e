"""Rows (image, caption, split) of millions of captions, stored as three columns."""

from collections.abc import Iterable, Iterator

Row = tuple[str, str, str | None]


class CaptionRows:
    """A list of (image, caption, split) that needs three pointers per row, and no tuple.

    `columns` contains the three lists. A row that is read is a new tuple; to change one, assign new rows.
    """

    __slots__ = ("columns",)

    def __init__(self, rows: Iterable[Row] = ()):
        self.columns: tuple[list[str], list[str], list[str | None]] = [], [], []
        self.extend(rows)

    def append(self, row: Row) -> None:
        """Add one row at the end."""
        image, caption, split = row
        images, captions, splits = self.columns
        images.append(image)
        captions.append(caption)
        splits.append(split)

    def extend(self, rows: Iterable[Row]) -> None:
        """Add rows at the end."""
        if isinstance(rows, CaptionRows):
            for column, more in zip(self.columns, rows.columns, strict=True):
                column.extend(more)
        else:
            for row in rows:
                self.append(row)

    def pop_columns(self) -> tuple[list[str], list[str], list[str | None]]:
        """Return images, captions and splits, and empty the rows: the caller decides how long they use memory."""
        columns, self.columns = self.columns, ([], [], [])
        return columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __iter__(self) -> Iterator[Row]:
        return zip(*self.columns, strict=True)

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        found = tuple(column[index] for column in self.columns)
        return list(zip(*found, strict=True)) if isinstance(index, slice) else found

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, CaptionRows | list) else NotImplemented

    def __repr__(self) -> str:
        return repr(list(self))
