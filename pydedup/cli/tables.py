# SPDX-License-Identifier: Apache-2.0
"""Tables that fit: into a terminal of any width, and whole into a pipe.

Where a table is too wide, names are shortened in their middle, as far as they stay different, then
columns that say least are left out, and when that is not enough each row is printed as a list of
its values. Nothing is wrapped. A pipe gets all columns, whatever their width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Self

from pydedup.cli.output import console, print_fields, print_line, print_note, printable, width
from pydedup.text import count, listed, plural

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Column", "NameList", "print_table", "shorten", "table_lines"]

_GAP = "  "
#: A name is shortened to no less than this; below, nobody could tell it from its siblings.
_SHORTEST_NAME = 20
#: Lines that rich prints in one go, which takes half the time of one by one.
_AT_ONCE = 500
#: What a terminal shows of a table that says little beyond its sums.
_MOST_ROWS = 40


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes
    ----------
    title
        Its heading.
    number
        Aligned to the right.
    name
        May be shortened in the middle.
    rank
        Columns of rank 0 stay; of the others the highest rank is left out first.
    style
        Style of its values.
    """

    title: str
    number: bool = True
    name: bool = False
    rank: int = 0
    style: str = ""


class NameList(str):
    """Names in a cell. Where they do not fit, whole ones are left out, and counted.

    ``what`` is what one of them names, for when none fits.
    """

    names: tuple[str, ...]
    what: str

    def __new__(cls, names: Iterable[str], what: str) -> Self:
        """Make a cell of names, of many some."""
        cleaned = tuple(map(printable, names))
        made = super().__new__(cls, listed(cleaned))
        made.names, made.what = cleaned, what
        return made


def print_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], *, summed: bool = False
) -> None:
    """Print a table; every row has one value per column.

    A terminal gets the first rows of one that is ``summed`` up elsewhere, as what is printed
    around it would be out of sight.
    """
    limit = width()
    most = _MOST_ROWS if summed and limit is not None else len(rows)
    _print_cells(columns, rows[:most], limit)
    if len(rows) > most:
        print_note(f"and {count(len(rows) - most)} more, in a pipe or with --json", "dim")


def table_lines(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], limit: int
) -> list[Text] | None:
    """Return the lines of a table, its titles first; None where it does not fit as one."""
    cells = _cells(rows)
    fitted = _fitted(columns, cells, limit)
    return None if fitted is None else list(_lines(columns, cells, *fitted))


def _print_cells(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], limit: int | None
) -> None:
    cells = _cells(rows)
    fitted = _fitted(columns, cells, limit)
    if fitted is None:
        _print_cards(columns, cells)
        return
    from rich.text import Text

    screen = console()
    lines = _lines(columns, cells, *fitted)
    while some := list(islice(lines, _AT_ONCE)):
        screen.print(Text("\n").join(some))


def _cells(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[v if isinstance(v, NameList) else printable(v) for v in row] for row in rows]


def _fitted(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], limit: int | None
) -> tuple[list[int], list[int]] | None:
    """Return the columns that are kept, and their widths."""
    kept = list(range(len(columns)))
    while True:
        widths = _fit(columns, cells, kept, limit)
        if widths is not None:
            return kept, widths
        spare = max(kept, key=lambda index: (columns[index].rank, index))
        if columns[spare].rank == 0:
            return None
        kept.remove(spare)


def _fit(
    columns: Sequence[Column],
    cells: Sequence[Sequence[str]],
    kept: Sequence[int],
    limit: int | None,
) -> list[int] | None:
    """Return the widths of the kept columns, ``None`` when they do not fit."""
    from rich.cells import cell_len

    widths = [
        max(cell_len(text) for text in (columns[index].title, *(row[index] for row in cells)))
        for index in kept
    ]
    if limit is None:
        return widths
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - limit
    for place, index in enumerate(kept):
        if excess > 0 and columns[index].name:
            cut = min(excess, max(widths[place] - _SHORTEST_NAME, 0))
            widths[place] -= cut
            excess -= cut
    return widths if excess <= 0 and _differ(columns, cells, kept, widths) else None


def _differ(
    columns: Sequence[Column],
    cells: Sequence[Sequence[str]],
    kept: Sequence[int],
    widths: Sequence[int],
) -> bool:
    """Whether names that are not the same are still not when they are shortened."""
    for index, room in zip(kept, widths, strict=True):
        names = {row[index] for row in cells if not isinstance(row[index], NameList)}
        if columns[index].name and len({shorten(name, room) for name in names}) < len(names):
            return False
    return True


def _lines(
    columns: Sequence[Column],
    cells: Sequence[Sequence[str]],
    kept: Sequence[int],
    widths: Sequence[int],
) -> Iterator[Text]:
    yield _line(columns, [column.title for column in columns], kept, widths, "bold")
    for row in cells:
        yield _line(columns, row, kept, widths, None)


def _line(
    columns: Sequence[Column],
    row: Sequence[str],
    kept: Sequence[int],
    widths: Sequence[int],
    style: str | None,
) -> Text:
    from rich.cells import cell_len
    from rich.text import Text

    line = Text()
    for place, (index, room) in enumerate(zip(kept, widths, strict=True)):
        text = shorten(row[index], room)
        padding = " " * (room - cell_len(text))
        if place:
            line.append(_GAP)
        if columns[index].number:
            line.append(padding)
        line.append(text, style=style or columns[index].style)
        if not columns[index].number:
            line.append(padding)
    line.rstrip()
    return line


def _print_cards(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> None:
    for row in cells:
        print_line(row[0], columns[0].style or "bold")
        print_fields(
            (column.title.lower(), value)
            for column, value in zip(columns[1:], row[1:], strict=True)
            if value
        )


def shorten(text: str, room: int) -> str:
    """Return text of at most so many terminal cells, its middle replaced by an ellipsis."""
    from rich.cells import cell_len

    if cell_len(text) <= room:
        return text
    if isinstance(text, NameList) and len(text.names) > 1:
        fitting = plural(len(text.names), text.what)
        for shown in range(1, len(text.names)):
            longer = f"{', '.join(text.names[:shown])} and {count(len(text.names) - shown)} more"
            if cell_len(longer) > room:
                break
            fitting = longer
        return fitting
    mark = "…" if printable("…") == "…" else "..."[:room]
    head, tail = 0, 0
    used = len(mark)
    # Beginnings tell the layer, ends the role of a tensor: keep as much of both.
    while head + tail < len(text):
        front = head <= tail
        char = text[head] if front else text[-1 - tail]
        used += cell_len(char)
        if used > room:
            break
        head, tail = (head + 1, tail) if front else (head, tail + 1)
    return text[:head] + mark + (text[-tail:] if tail else "")
