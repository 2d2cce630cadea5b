# SPDX-License-Identifier: Apache-2.0
"""What an adapter may be able to do beyond :class:`pydedup.adapter.Adapter`.

Each of these protocols is optional: code that needs one asks whether the adapter is an instance of
it, and raises an error or does without where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

from pydedup.errors import CorruptStoreError, PydedupError

__all__ = [
    "ChangeMarkAdapter",
    "CopiesAdapter",
    "ExpectingAdapter",
    "FunctionsAdapter",
    "HiddenRowsAdapter",
    "KeyRange",
    "NumberingAdapter",
    "PlacesAdapter",
    "RangeAdapter",
    "ReadIntoAdapter",
    "RecordedPagesAdapter",
    "RefillAdapter",
    "RowAdapter",
    "RowColumn",
    "RowStream",
    "SoundRowsAdapter",
    "StagingAdapter",
    "TellRow",
    "hidden_rows",
    "only_sound_rows",
    "page_copies",
    "tell_hidden",
    "telling_rows",
    "tells_hidden",
    "told_damage",
]

#: Told of a row that is damaged: its table, what is left of its key, and a sentence about it.
TellRow = Callable[[str, Mapping[str, object], str], None]


@dataclass(frozen=True, slots=True)
class RowColumn:
    """A column of a user's query; ``type`` is how a definition spells it, for a key of a table.

    An empty ``type`` means that this database needs none, ``None`` that it can be no key.
    """

    name: str
    type: str | None


class RowStream(Protocol):
    """The rows of a user's query, in the order in which the database gives them."""

    columns: Sequence[RowColumn]

    def __iter__(self) -> Iterator[list[tuple[object, ...]]]:
        """Yield rows in batches."""


@runtime_checkable
class RowAdapter(Protocol):
    """Tables of users beside a store, optional for an adapter: rows to predict, and predictions.

    Names of tables and columns come from users: they are checked (ArgumentError) and quoted here.
    An error of the database about a user's query or table is an ArgumentError with its words.
    """

    @property
    def url(self) -> str:
        """The URL, without credentials."""

    def close(self) -> None:
        """Close all connections of this process. Idempotent."""

    def read_rows(self, query: str, batch: int) -> AbstractContextManager[RowStream]:
        """Run one SELECT of a user in a read-only transaction of its own, and stream its rows.

        This thread may make other calls meanwhile. Raises ArgumentError for anything but a single
        SELECT.
        """

    def full_table_name(self, table: str) -> str:
        """Return the full name of a table that a user named, independent of any setting."""

    def table_columns(self, table: str, key: str) -> tuple[str, ...] | None:
        """Return the columns of a table, ``None`` when there is none.

        Raises ArgumentError when no index makes its column ``key`` unique.
        """

    def create_predictions(
        self, table: str, key: RowColumn, columns: Sequence[tuple[str, str]]
    ) -> None:
        """Create a table with this key and columns of (name, kind), unless it exists.

        Kinds: ``float``, ``text`` and ``vector``, for which :meth:`vector` makes values.
        """

    def vector(self, payload: bytes) -> object:
        """Return float32 in little-endian order as a value of kind ``vector``."""

    def present_keys(self, table: str, key: str, keys: Sequence[object]) -> set[object]:
        """Return those of the keys that have a row, as they were given.

        The column decides what is equal: it may hold the text 7 as a number.
        """

    def insert_predictions(
        self, table: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> bool:
        """Insert rows in a transaction of their own; ``False``, and none, when a key is taken.

        The first column is the key. Raises ArgumentError when the table then lacks one of these
        keys, for example because a trigger drops rows.
        """


@dataclass(frozen=True, slots=True)
class KeyRange:
    """A part of the rows of a query, by a column that is their key.

    Attributes
    ----------
    key
        The column, as the query has it.
    above, up_to
        Keys are greater than ``above`` and at most ``up_to``, as the database orders them. ``None``
        for ``above``: from the first key on, rows without a key included; for ``up_to``: to the
        last.
    """

    key: RowColumn
    above: object | None
    up_to: object | None


@runtime_checkable
class RangeAdapter(RowAdapter, Protocol):
    """Queries of users in parts, optional for an adapter: several workers can share one then."""

    def query_columns(self, query: str) -> Sequence[RowColumn]:
        """Return the columns that `read_rows` gives for a query, without reading rows."""

    def key_bounds(self, query: str, key: str, every: int) -> list[object]:
        """Return every ``every``-th key of a query, in the order of the database."""

    def read_range(
        self, query: str, batch: int, within: KeyRange
    ) -> AbstractContextManager[RowStream]:
        """Stream those rows of a query whose keys are within a range, as `read_rows` does.

        Adjoining ranges together have all rows of the query, each in one of them.
        """

    def key_column(self, name: str, kind: str) -> RowColumn:
        """Return a column for keys that come from elsewhere.

        Kinds: ``integer``, ``number``, ``text``, ``bytes``, ``date``, ``time``,
        ``instant`` (a time with its zone).
        """


@runtime_checkable
class ChangeMarkAdapter(Protocol):
    """Whether anything was changed, asked for much less than a query, optional for an adapter."""

    def change_mark(self) -> Hashable | None:
        """Return a value that is another one after each change of the database, whoever makes it.

        One mark may stand for a state on this thread alone. ``None`` where none is to be had now:
        in a transaction or snapshot, and where damaged rows are left out.
        """


@runtime_checkable
class HiddenRowsAdapter(Protocol):
    """Rows that are there and that a user does not see, optional for an adapter."""

    def hidden_rows(self) -> list[str]:
        """Return what there is to say of tables of which this user may not see all rows."""


def hidden_rows(adapter: object) -> list[str]:
    """Return what there is to say of rows that this user may not see."""
    return adapter.hidden_rows() if isinstance(adapter, HiddenRowsAdapter) else []


def tell_hidden(adapter: object, error: CorruptStoreError) -> None:
    """Let an error of damage say, too, that rows may be there that this user does not see."""
    hidden: list[str] = []
    with suppress(PydedupError):  # that of a connection tells less
        hidden = hidden_rows(adapter)
    for said in hidden:
        if said not in str(error):
            error.args = (f"{error}; but {said}", *error.args[1:])


def told_damage(adapter: object, damaged: Sequence[str]) -> tuple[str, ...]:
    """Return sentences about damage, if any behind what there is to say of rows not to be seen."""
    return (*hidden_rows(adapter), *damaged) if damaged else ()


class _OfAdapter(Protocol):
    _adapter: Any


_Self = TypeVar("_Self", bound=_OfAdapter)
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def tells_hidden(
    method: Callable[Concatenate[_Self, _Given], _Result],
) -> Callable[Concatenate[_Self, _Given], _Result]:
    """Decorate a method of what has an ``_adapter``: errors of damage are told as `tell_hidden`."""

    @wraps(method)
    def told(self: _Self, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        try:
            return method(self, *args, **kwargs)
        except CorruptStoreError as error:
            tell_hidden(self._adapter, error)
            raise
        finally:
            del args, kwargs  # a URL may be one, whose password a traceback would show

    return told


@runtime_checkable
class ReadIntoAdapter(Protocol):
    """Payloads read straight into the caller's memory, optional: `read_pages` makes copies."""

    def read_pages_into(
        self, ids: Sequence[int], memory: Callable[[int], memoryview]
    ) -> Iterator[tuple[int, bytes, memoryview]]:
        """Yield id, checksum and payload of pages, as far as they can be read so.

        The checksum is that of the page's row. The caller checks whether the payload matches it;
        where it does not, and for pages that are left out, it asks for the page itself.
        ``memory(n)`` gives ``n`` bytes for a payload, which must not change once it was yielded.
        """


@runtime_checkable
class RecordedPagesAdapter(Protocol):
    """Pages with what their rows record of them, optional: the database is asked twice else."""

    def read_recorded_pages(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield (id, checksum, payload) once for each of the ids that exists.

        The checksum is that of the page's row, which the caller holds against the payload.
        """


@runtime_checkable
class SoundRowsAdapter(Protocol):
    """Reading around damaged rows, optional for an adapter.

    Without it, one value that its column cannot have is an error of everything that reads its row.
    """

    def sound_rows(self, tell: TellRow) -> AbstractContextManager[None]:
        """Within it, this thread does not see rows with a value that their column cannot have.

        Each is reported, every time that it is read. What was not seen may not be deleted for that.
        """


def only_sound_rows(
    adapter: object, tell: TellRow = lambda table, key, said: None
) -> AbstractContextManager[None]:
    """Leave out damaged rows, where an adapter can; silently, unless ``tell`` is given."""
    return adapter.sound_rows(tell) if isinstance(adapter, SoundRowsAdapter) else nullcontext()


@contextmanager
def telling_rows(adapter: object, said: list[str]) -> Iterator[None]:
    """Leave out damaged rows, where an adapter can; ``said`` gets a sentence about each, once."""

    def tell(table: str, key: Mapping[str, object], what: str) -> None:
        to_do = "remove that model, or restore a backup"
        sentence = f"{what}; {to_do if table == 'models' else 'run verify on the store'}"
        if sentence not in said:
            said.append(sentence)

    with only_sound_rows(adapter, tell):
        yield


@runtime_checkable
class StagingAdapter(Protocol):
    """Transactions that need not outlive a loss of power, optional for an adapter.

    Only for a database that lives and dies with its writer's machine: one that restarts while a
    writer goes on would let it publish what was lost.
    """

    def staging(self) -> AbstractContextManager[None]:
        """Like `Adapter.transaction`, but a loss of power may undo it.

        That ends once a later ``transaction()`` or ``publishing()`` is committed: never is an
        earlier one lost and a later one kept.
        """

    def publishing(self) -> AbstractContextManager[None]:
        """Like `Adapter.transaction`; may leave work to `settle`, as ``staging()`` does."""

    def settle(self) -> None:
        """Do the work that such transactions left; may be called while others leave more.

        What cannot be done now is left for later.
        """


@runtime_checkable
class ExpectingAdapter(Protocol):
    """A database that is told how much will be written, optional for an adapter."""

    def expect(self, nbytes: int) -> None:
        """Prepare for payloads of so many bytes; outside of transactions. May do nothing."""


@runtime_checkable
class NumberingAdapter(Protocol):
    """Ids of pages before the pages are written, optional for an adapter.

    With it several threads write pages, each in transactions of its own, whichever ends first.
    """

    def new_page_ids(self, count: int) -> list[int]:
        """Return ids for `insert_pages`, ascending; nobody else ever gets them."""

    def insert_pages(
        self, pages: Sequence[tuple[bytes, bytes]], *, state: str, ids: Sequence[int] | None = None
    ) -> list[int]:
        """Insert (checksum, payload), with these ids if there are any, and return the ids."""


@runtime_checkable
class FunctionsAdapter(Protocol):
    """Functions of ours inside the server of a database, optional for an adapter."""

    def function_statements(self, python_path: str | None) -> list[str]:
        """Return the SQL that makes the functions."""

    def install_functions(self, python_path: str | None) -> str:
        """Make the functions, all or none, and return the version of pydedup in the server.

        ``python_path`` is where the Python of the server finds pydedup. Raises ReadOnlyError when
        the user may not, StoreError when the server cannot.
        """

    def drop_functions(self) -> None:
        """Take the functions out again."""


@runtime_checkable
class CopiesAdapter(Protocol):
    """Pages that are kept in more than one place, optional for an adapter."""

    @property
    def copies(self) -> int:
        """In how many places each page is; 1 where this store keeps only one."""

    def page_copies(self, page_id: int) -> Iterator[bytes]:
        """Yield the copy of a page at each place that answers, whole or damaged."""


@runtime_checkable
class PlacesAdapter(Protocol):
    """Pages that are on servers of their own, optional for an adapter."""

    def unreachable_places(self) -> list[str]:
        """Return a sentence about each place that does not answer now, with its name."""


@runtime_checkable
class RefillAdapter(CopiesAdapter, Protocol):
    """Copies that can be looked at and put back one by one, optional for an adapter.

    A place is named by a string that is opaque to callers. One that does not answer within the
    adapter's patience is an UnavailableError.
    """

    def begin_refill(self) -> None:
        """Get ready to put copies back; called first by whoever does so.

        Raises ReadOnlyError, ConflictError, and StoreError when the store was given other places
        since it was opened.
        """

    def copy_places(self, page_ids: Sequence[int]) -> dict[str, list[int]]:
        """Return by place which of the pages should have a copy there."""

    def place_name(self, place: str) -> str:
        """Return where a place is, for people."""

    def present_copies(self, place: str, page_ids: Sequence[int]) -> set[int]:
        """Return those of the pages that have a copy there, whole or not, without reading any."""

    def read_copies(
        self, wanted: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, dict[int, bytes]], dict[str, PydedupError]]:
        """Return by place the copies that are there, and what is wrong with places that fail.

        A copy that the database itself refuses to read counts as missing.
        """

    def write_copies(self, place: str, copies: Mapping[int, bytes]) -> None:
        """Put copies in their place, over what is there, in a transaction of their own.

        Called outside of any other transaction. Copies of pages that were deleted meanwhile are
        never read, and `compact` collects them.
        """


def page_copies(adapter: object) -> Callable[[int], Iterable[bytes]] | None:
    """Return what gives the copies of a page, ``None`` where a store keeps one of each."""
    if isinstance(adapter, CopiesAdapter) and adapter.copies > 1:
        return adapter.page_copies
    return None
