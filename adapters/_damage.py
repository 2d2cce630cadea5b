# SPDX-License-Identifier: Apache-2.0
"""Rows of a store's tables with a value that their column cannot have: told about, or left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Final

from pydedup.adapter_options import TellRow

from ._schema import TABLES, VIEWS, Dialect
from ._values import Row, WrongValueError, as_recorded, shown

__all__ = ["damage", "leaving_out", "sound", "who_is_told"]

#: What to do about a damaged row of a table, where that is not to restore a backup.
_REMEDIES: Final[Mapping[str, str]] = {
    "models": "remove that model, or restore a backup",
    "jobs": "a vacuum deletes it",
    # What a repair makes anew.
    **dict.fromkeys(("pages", "model_pages", "distinct_blocks"), "run verify on the store"),
}
#: Within `leaving_out`: of which adapter, and what to call.
_TOLD: ContextVar[tuple[object, TellRow] | None] = ContextVar("_TOLD", default=None)


@contextlib.contextmanager
def leaving_out(adapter: object, tell: TellRow) -> Iterator[None]:
    """Let an adapter's calls, in this thread or task, leave out damaged rows; ``tell`` of each."""
    token = _TOLD.set((adapter, tell))
    try:
        yield
    finally:
        _TOLD.reset(token)


def who_is_told(adapter: object) -> TellRow | None:
    """Return what is called about rows that are left out, ``None`` where they are an error."""
    within = _TOLD.get()
    return within[1] if within is not None and within[0] is adapter else None


def damage(dialect: Dialect, table: str, names: Sequence[str], rows: Sequence[Row]) -> str:
    """Return what is wrong with the first damaged one of the rows, and what to do about it."""
    told: list[str] = []
    sound(dialect, table, names, rows, lambda _table, _key, said: told.append(said))
    return f"{told[0]}; {_REMEDIES.get(table, 'restore a backup')}"


def sound(
    dialect: Dialect, table: str, names: Sequence[str], rows: Sequence[Row], tell: TellRow
) -> list[Row]:
    """Return the rows, with columns of these names, without those that are damaged."""
    spec, found = TABLES.get(table) or VIEWS[table], list[Row]()
    of_key = set(spec.key or ("id", "name", "version"))
    for row in rows:
        try:
            found += as_recorded([row], spec.kinds(names))
        except WrongValueError as error:
            number, said = error.args
            wrong = names[number]
            key = {
                name: shown(value)
                for name, value in zip(names, row, strict=True)
                if name in of_key and name != wrong
            }
            said = f"column {wrong} of {dialect.name(table)} has {said}"
            if key:
                parts = (f"{name} {value!r:.60}" for name, value in key.items())
                said += f", in the row of {', '.join(parts)}"
            tell(table, key, said)
    return found
