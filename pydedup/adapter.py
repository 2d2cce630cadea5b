# SPDX-License-Identifier: Apache-2.0
"""The contract between pydedup and one kind of database.

An adapter moves rows and page bytes; it knows SQL and nothing of tensors. A store holds one
adapter. Adapters are thread-safe (one connection per thread, or a pool) and usable after a fork
(a child never touches its parent's connections). Errors of the driver are raised as
:mod:`pydedup.errors`, with the original as their cause.

Every read method called outside ``snapshot()`` or ``transaction()`` sees the newest committed
state. Methods that change rows must be called inside ``transaction()``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = [
    "LIVE",
    "RETIRED",
    "SCHEMA_VERSION",
    "STAGING",
    "Adapter",
    "BlockRow",
    "Capabilities",
    "ModelRow",
    "PageRow",
    "TensorRow",
]

#: Version of the tables. A store of a newer version is refused, an older one is migrated.
SCHEMA_VERSION = 1

# States of models and pages.
STAGING = "staging"
LIVE = "live"
RETIRED = "retired"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a database can do; tests and callers ask for these, never for its name."""

    max_payload_bytes: int
    """Largest value of a payload column that this connection can write and read."""
    max_parameters: int
    """Bound parameters in one statement."""
    concurrent_writers: bool
    """Whether two transactions that write different rows can run at once."""
    shrinks: bool
    """Whether ``compact()`` gives space back to the file system."""
    many_processes: bool = True
    """Whether several processes can have it open at once, forked ones among them; otherwise all but
    one are refused (UnavailableError)."""
    page_readers: int = 1
    """How many threads read pages faster side by side than one does."""


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A row of ``models``. ``id`` is 0 before it is inserted."""

    id: int
    name: str
    version: str
    state: str
    created_at: float
    policy: str
    certificate: str
    metadata: str
    logical_bytes: int
    digest: bytes

    @property
    def address(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A row of ``tensors``; shapes are JSON arrays."""

    model_id: int
    ordinal: int
    name: str
    dtype: str
    shape: str
    block_shape: str


@dataclass(frozen=True, slots=True)
class PageRow:
    """A row of ``pages`` without its payload."""

    id: int
    state: str
    retired_at: float | None
    checksum: bytes
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class BlockRow:
    """A row of ``distinct_blocks``.

    ``base_id`` is the place of the block that this one is a delta of (`pydedup.layout.block_places`
    of its page and slot), ``None`` for a block that is no delta.
    """

    id: int
    hash128: bytes
    page_id: int
    slot: int
    base_id: int | None = None


@runtime_checkable
class Adapter(Protocol):
    """One open database. See the module docstring for threads, forks and errors."""

    @property
    def url(self) -> str:
        """The URL, without credentials."""

    @property
    def read_only(self) -> bool:
        """Whether changes are refused (opened with mode ``"r"``, or read-only media)."""

    @property
    def capabilities(self) -> Capabilities:
        """What this database can do."""

    def close(self) -> None:
        """Close all connections of this process. Idempotent."""

    # ---- schema -------------------------------------------------------------------------------

    def schema_version(self) -> int | None:
        """Return the version of the store's tables, or ``None`` when there are none.

        Raises NotAStoreError when the database is not one of this kind, or has tables of these
        names that are not ours.
        """

    def create_schema(self, meta: Mapping[str, str]) -> None:
        """Create tables and views and fill ``meta``, in one transaction.

        A no-op when another process was faster.
        """

    def migrate_schema(self) -> None:
        """Make tables of an older `SCHEMA_VERSION` those of this one; a no-op when they are.

        In one transaction where the database takes definitions into one. Elsewhere, what fails
        halfway leaves the version and all rows as they were. Whoever comes second waits, and finds
        nothing to do. Raises ReadOnlyError, ConflictError, StoreError.
        """

    # ---- transactions -------------------------------------------------------------------------

    def transaction(self) -> AbstractContextManager[None]:
        """Write transaction of the calling thread; commits, or rolls back on any exception.

        Neither a transaction nor a snapshot may begin inside (StoreError). Let an error of the
        adapter end it: some databases accept nothing more after one. Raises ReadOnlyError,
        ConflictError (lock wait ran out), StorageFullError.
        """

    def snapshot(self) -> AbstractContextManager[None]:
        """Read transaction: all reads of this thread inside see one committed state.

        It is the state of the moment when the snapshot begins. A snapshot inside a snapshot is
        part of the outer one.
        """

    # ---- meta ---------------------------------------------------------------------------------

    def meta(self) -> dict[str, str]:
        """Return all of ``meta``."""

    def set_meta(self, name: str, value: str) -> None:
        """Insert or replace one value."""

    def epoch(self) -> int:
        """Return the epoch: it grows with every publish, removal, alias and vacuum."""

    def bump_epoch(self, expected: int | None = None) -> bool:
        """Add one to the epoch, the first statement of any publishing transaction.

        Its row lock is the fence between writers. With ``expected``, only if the epoch is that;
        returns whether it was.
        """

    # ---- models -------------------------------------------------------------------------------

    def insert_model(self, row: ModelRow, *, replaces: int = 0) -> int:
        """Insert and return the id.

        Raises DuplicateError when a *live* model has this name and version (a staged one may
        coexist; publishing decides), unless it is the one that ``replaces`` names and that will be
        deleted by then.
        """

    def update_model(
        self,
        model_id: int,
        *,
        state: str | None = None,
        certificate: str | None = None,
        logical_bytes: int | None = None,
        digest: bytes | None = None,
        created_at: float | None = None,
    ) -> bool:
        """Change what is given; returns whether the row existed.

        Raises DuplicateError when ``state="live"`` would make two live models of one name and
        version.
        """

    def models(
        self, *, name: str | None = None, state: str | None = LIVE, newest: int | None = None
    ) -> list[ModelRow]:
        """Return model rows by ascending id; ``state=None`` means all states.

        With ``newest`` only so many, those with the largest ids, without looking at all others.
        """

    def model(self, model_id: int) -> ModelRow | None:
        """Return one live model."""

    def model_called(self, name: str, selector: str) -> ModelRow | None:
        """Return the live model of a name with a version, or an alias where none has the version.

        Without looking at all other versions of the name.
        """

    def delete_model(self, model_id: int) -> None:
        """Delete the row and all that hangs on it.

        That is aliases, artifacts, tensors, block maps, source hashes and model_pages.
        """

    def aliases(self, name: str | None = None) -> list[tuple[str, str, int]]:
        """Return (name, alias, model_id), ordered."""

    def set_alias(self, name: str, alias: str, model_id: int) -> None:
        """Insert or move an alias."""

    def delete_alias(self, name: str, alias: str) -> bool:
        """Delete; returns whether it existed."""

    def insert_artifacts(self, model_id: int, items: Iterable[tuple[str, str, bytes]]) -> None:
        """Insert (name, media_type, payload); large payloads are the adapter's to split."""

    def artifacts(self, model_id: int) -> list[tuple[str, str]]:
        """Return (name, media_type), ordered by name."""

    def artifact(self, model_id: int, name: str) -> bytes | None:
        """Return one payload."""

    # ---- tensors and block maps ---------------------------------------------------------------

    def insert_tensors(self, rows: Iterable[TensorRow]) -> None:
        """Insert tensor rows."""

    def tensors(self, model_id: int) -> list[TensorRow]:
        """Return tensor rows by ordinal."""

    def tensors_of(self, model_ids: Sequence[int]) -> list[TensorRow]:
        """Return tensor rows of several models, by model and ordinal."""

    def insert_block_maps(self, rows: Iterable[tuple[int, int, int, bytes]]) -> None:
        """Insert (model_id, ordinal, part, payload)."""

    def replace_block_maps(self, model_id: int, maps: Mapping[int, Sequence[bytes]]) -> None:
        """Replace all parts of some tensors, by ordinal."""

    def block_map(self, model_id: int, ordinal: int) -> list[bytes]:
        """Return the parts of one tensor in order."""

    def block_maps(self, model_id: int) -> list[tuple[int, bytes]]:
        """Return (ordinal, payload) of all parts of a model, by ordinal and part."""

    def block_maps_of(self, model_ids: Sequence[int]) -> list[tuple[int, int, bytes]]:
        """Return (model_id, ordinal, payload) of all parts of several models, in that order."""

    def insert_source_hashes(self, rows: Iterable[tuple[int, int, int, bytes]]) -> None:
        """Insert (model_id, ordinal, part, payload)."""

    def source_hashes(self, model_id: int, first: int, stop: int) -> list[tuple[int, bytes]]:
        """Return (ordinal, payload) of the parts of ``first <= ordinal < stop``, in order."""

    # ---- pages --------------------------------------------------------------------------------

    def insert_pages(self, pages: Sequence[tuple[bytes, bytes]], *, state: str) -> list[int]:
        """Insert (checksum, payload) and return their ids, in order."""

    def read_pages(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield (id, payload) once for each of the ids that exists, in any order."""

    def page_rows(
        self,
        *,
        ids: Sequence[int] | None = None,
        state: str | None = None,
        after: int = 0,
        limit: int | None = None,
    ) -> list[PageRow]:
        """Return page rows by ascending id, only those with id > ``after``."""

    def page_ids(self, state: str) -> list[int]:
        """Return the ids of all pages in a state, ascending; their rows are not looked at."""

    def set_page_state(
        self, ids: Sequence[int], state: str, retired_at: float | None = None
    ) -> None:
        """Change the state of pages."""

    def delete_pages(self, ids: Sequence[int]) -> None:
        """Delete pages and the distinct blocks on them."""

    def orphan_pages(self, among: Sequence[int] | None = None) -> list[int]:
        """Return ids, ascending, of pages that no row of ``model_pages`` names, in any state.

        With ``among`` only those of these, without looking at all others.
        """

    # ---- who reads what -----------------------------------------------------------------------

    def insert_model_pages(self, rows: Iterable[tuple[int, int, int, int]]) -> None:
        """Insert (model_id, page_id, blocks, bytes)."""

    def model_pages(self, model_id: int | None = None) -> list[tuple[int, int, int, int]]:
        """Return (model_id, page_id, blocks, bytes) ordered by model and page."""

    def readers_of(self, page_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return (model_id, page_id), ordered, of *live* models that read one of these pages."""

    def delete_model_pages(self, model_id: int) -> None:
        """Delete the rows of one model."""

    # ---- distinct blocks ----------------------------------------------------------------------

    def insert_blocks(self, rows: Iterable[tuple[bytes, int, int, int | None]]) -> None:
        """Insert (hash128, page_id, slot, base place or ``None``)."""

    def delete_blocks(self, ids: Sequence[int]) -> None:
        """Delete rows by id."""

    def find_blocks(self, hashes: Sequence[bytes]) -> list[BlockRow]:
        """Return rows on *live* pages whose hash is one of these, in any order."""

    def blocks_on_pages(self, page_ids: Sequence[int]) -> list[BlockRow]:
        """Return rows on these pages, ordered by page and slot, whatever the pages' state."""

    def count_blocks(self) -> int:
        """Return the number of distinct blocks on live pages."""

    # ---- signatures ---------------------------------------------------------------------------

    def insert_signatures(self, rows: Iterable[tuple[int, int, bytes]]) -> None:
        """Insert (segment, grp, payload)."""

    def segments(self, grp: int) -> list[int]:
        """Return the segments of one group, ascending, without reading payloads."""

    def signatures(
        self, grp: int, segments: Sequence[int] | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (segment, payload) of one group, by ascending segment.

        With ``segments`` only those of these that are there, in ascending order if they are.
        """

    def signatures_of(self, segments: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
        """Yield (segment, grp, payload) of these segments, in any order."""

    def delete_signatures(self, segments: Sequence[int]) -> None:
        """Delete all groups of these segments."""

    # ---- jobs ---------------------------------------------------------------------------------

    def put_job(self, job_id: str, spec: str, cursor: str, state: str) -> None:
        """Insert or replace a job."""

    def jobs(self) -> list[tuple[str, str, str, str]]:
        """Return (id, spec, cursor, state) ordered by id."""

    def delete_job(self, job_id: str) -> None:
        """Delete a job."""

    # ---- views and upkeep ---------------------------------------------------------------------

    def view(self, name: str) -> list[dict[str, object]]:
        """Return all rows of ``model_sizes``, ``sharing`` or ``page_owners``, in order.

        That is of names and versions, byte by byte, or of pages.
        """

    def stored_bytes(self) -> int:
        """Return what the store occupies in its database, in bytes (the file size on SQLite).

        Never less than the payloads of its pages.
        """

    def size_is_exact(self) -> bool:
        """Whether the user may know what the store occupies; else it is at least `stored_bytes`."""

    def checkpoint(self) -> None:
        """Do what is due after much was written, which is committed: moving a log, statistics.

        Where the database is in the way, it is left undone.
        """

    def compact(self) -> None:
        """Give freed space back where the database can."""

    def integrity_errors(self) -> list[str]:
        """Return what the database's own consistency check complains about."""
