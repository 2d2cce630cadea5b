# SPDX-License-Identifier: Apache-2.0
"""Results on standard output: styled lines for people, one JSON document for programs.

JSON is ASCII, so it is the same under every locale and no name in it can steer a terminal. Where a
number is not finite, JSON has ``null``: it knows neither NaN nor infinity.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pydedup.errors import CorruptStoreError
from pydedup.text import clean

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "array_text",
    "console",
    "emit_json",
    "jsonable",
    "plain_array",
    "print_fields",
    "print_heading",
    "print_line",
    "print_note",
    "printable",
    "refuse_damaged",
    "width",
]

#: A line of fields is folded at this width where the terminal is wider or unknown.
_FOLD = 100
#: Several lines beside a label have at least so much room.
_BESIDE = 16
#: Which no text has that is printed, and textwrap does not take for a blank.
_NO_BREAK = "\0"
#: The blank between a number and its unit.
_UNIT = re.compile(r"(?<=\d) (?=(?:%|B|[KMGTPE]iB|ms|s|min|h)(?!\w))")


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Return a console that prints text as it is given, into a terminal or elsewhere."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the program here, with its own exit status

    return Output(
        stderr=stderr, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True
    )


def width() -> int | None:
    """Return how wide a line may be: the terminal, or COLUMNS; ``None`` for a pipe or a file."""
    named = os.environ.get("COLUMNS", "")
    if named.isdigit() and int(named) > 0:
        return int(named)
    if sys.stdout.isatty():
        return console().width
    return None


def print_line(text: str = "", style: str | None = None) -> None:
    """Print one line."""
    from rich.text import Text

    console().print(Text(text, style=style or ""))


def printable(text: str) -> str:
    """Return text as it will be shown: clean, with escapes for what the encoding lacks."""
    encoding = sys.stdout.encoding or "ascii"
    return clean(text).encode(encoding, "backslashreplace").decode(encoding)


def print_heading(text: str) -> None:
    """Print the line above a table or a list of fields."""
    print_line(printable(text), "bold")


def print_note(text: str, style: str | None = None) -> None:
    """Print a sentence, folded where the terminal is narrower."""
    limit = width()
    text = printable(text)
    for line in [text] if limit is None else _fold(text, limit):
        print_line(line, style)


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print labelled values, one a line; long values are folded below themselves."""
    from rich.text import Text

    rows = [(printable(label), printable(value)) for label, value in fields]
    indent = max((len(label) for label, _ in rows), default=0) + 4
    limit = width() or _FOLD
    room = max(limit - indent, 1)
    screen = console()
    for label, value in rows:
        folded = _fold(value, room)
        head = f"  {label}".ljust(indent)
        if any(len(line) > room for line in folded) or (room < _BESIDE and len(folded) > 1):
            # What does not fit beside its label gets lines of its own.
            screen.print(Text(head.rstrip(), "dim"))
            head, folded = "    ", _fold(value, max(limit - 4, 1))
        for line in folded:
            screen.print(Text.assemble((head, "dim"), line))
            head = " " * len(head)


def array_text(array: NDArray[Any]) -> str:
    """Return an array's values, the middle of a large one left out, to fit the terminal."""
    with np.printoptions(precision=6, threshold=200, edgeitems=4, linewidth=width() or _FOLD):
        return str(array)


def plain_array(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array in a dtype that JSON has values for; those of ml_dtypes become f32."""
    return array if array.dtype.kind in "biufO" else array.astype(np.float32)


def _fold(text: str, room: int) -> list[str]:
    together = _UNIT.sub(_NO_BREAK, text)
    lines = textwrap.wrap(together, room, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_NO_BREAK, " ") for line in lines] or ["-"]


def emit_json(value: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def refuse_damaged(url: str, damaged: Sequence[str]) -> None:
    """Raise CorruptStoreError, behind what was shown, where that is not all there is."""
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise CorruptStoreError(f"{url} is damaged: {damaged[0]}{more}")


def jsonable(value: Any) -> Any:
    """Return a value as JSON has it; numbers that are not finite become ``null``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [jsonable(item) for item in value]
    return value
