# SPDX-License-Identifier: Apache-2.0
"""What a worker of a scoring does: one part of the work after another, with one store open.

Whatever goes wrong comes back as text. An exception would show in Ray's logs with its frames, and
with what drivers of databases write into theirs.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, cast

from pydedup import config, errors
from pydedup.adapter import Adapter
from pydedup.adapter_options import KeyRange, RangeAdapter, RowAdapter, RowColumn, RowStream
from pydedup.catalog import Catalog, StoredModel
from pydedup.errors import (
    ArgumentError,
    ClusterError,
    ConflictError,
    PydedupError,
    UnavailableError,
)
from pydedup.opening import connect_store, open_rows
from pydedup.ray.cluster import import_ray, use_threads
from pydedup.ray.score_parquet import ParquetPart, TableRows, key_kind, read_part
from pydedup.ray.score_plan import (
    FilePart,
    FolderNotes,
    PartResult,
    QueryPart,
    Settings,
    room_in,
)
from pydedup.serving.features import InputKind, kind_of
from pydedup.serving.score import MOST_FAILURES, Scoring, removed
from pydedup.store import Store
from pydedup.text import it_has, without_secrets

__all__ = ["ScoreWorker", "Scorer", "hindrance", "rows_of"]

#: How often a part is begun again when the database is away or others are in the way.
_TRIES: Final = 6
_PAUSE_SECONDS: Final = 0.25


@contextlib.contextmanager
def rows_of(adapter: Adapter, source: str | None, into: str | None) -> Iterator[RangeAdapter]:
    """Give the database of the rows: the one of the store, which may be read only, or another."""
    with contextlib.ExitStack() as left:
        rows: object = adapter
        if source is not None or into is not None:
            rows = left.enter_context(open_rows(adapter, source))
        if not isinstance(rows, RangeAdapter):
            raise ArgumentError(f"queries of {adapter.url} cannot be cut into parts")
        yield rows


class _StoppedError(Exception):
    """The driver wants no more of it."""


class Scorer:
    """A store open for one model, and what its rows are read from and written to.

    Set ``stopped``, and it ends before the next batch.
    """

    def __init__(self, settings: Settings, stopped: threading.Event | None = None) -> None:
        self.settings = settings
        self._stopped = stopped or threading.Event()
        self._opened = contextlib.ExitStack()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        told = self.settings
        source = None if told.source is None else told.source.reveal()
        writes = told.into is not None and source is None
        adapter = connect_store(told.store.reveal(), mode="a" if writes else "r")
        self._store = self._opened.enter_context(Store(adapter, config.parse_bytes(told.memory)))
        self._catalog = Catalog(adapter, self._store._pool)
        self._rows: RangeAdapter | None = None
        if told.query is not None or told.into is not None:
            self._rows = self._opened.enter_context(rows_of(adapter, source, told.into))
        self.model = self._model(adapter)
        self._kind: InputKind = kind_of(self.model, adapter)

    def _model(self, adapter: Adapter) -> StoredModel:
        told = self.settings
        row = adapter.model(told.model_id)
        if row is not None:
            return self._catalog.of_row(row)
        raise removed(told.address, told.into or str(told.folder), files=told.folder is not None)

    def close(self) -> None:
        """Close all that is open."""
        self._opened.close()

    def scoring(self, target: Any, table: str, columns: Sequence[RowColumn]) -> Scoring:
        """Return a scoring into a target that may be a part of one."""
        work = Scoring(
            cast(RowAdapter, target),
            table,
            columns,
            self.settings.key,
            self.model,
            self._catalog,
            self._kind,
            lambda stored, x: self._store.predict(stored.address, x),
            self.settings.on_error,
            is_part=True,
            to_files=self.settings.folder is not None,
            keys_repeat=self.settings.folder is not None and self.settings.query is None,
        )
        work.begin()
        return work

    def part(self, number: int, result: PartResult) -> None:
        """Score a part of the work, and add to the result what was done."""
        with contextlib.ExitStack() as left:
            told, part = self.settings, self.settings.parts[number]
            target: Any = self._rows
            if told.folder is not None:
                # Rows of a query with one key are in one part; of files, any row is scored.
                unique = isinstance(part, QueryPart)
                target = ParquetPart(Path(told.folder), number, told.file_key_type, unique=unique)
                result.rows = 0  # of what was begun before, nothing is left
                left.callback(target.discard)
                left.enter_context(room_in(Path(told.folder)))
            stream = left.enter_context(self._read(part))
            work = self.scoring(target, told.into or str(told.folder), stream.columns)
            self._run(work, stream, result)
            if told.folder is not None:
                target.finish()
                FolderNotes(Path(told.folder)).mark(number, result)

    def table(self, table: Any, result: PartResult) -> None:
        """Score the rows of a table of pyarrow, and add to the result what was done."""
        assert isinstance(self._rows, RangeAdapter)
        told = self.settings
        if not table.num_rows:  # a block without rows need have no columns
            return
        if missing := [name for name in told.columns if name not in table.column_names]:
            raise ArgumentError(
                f"a block of the dataset has no column {missing[0]!r}"
                f"{it_has(missing[0], table.column_names)}"
            )
        key = self._rows.key_column(told.key, key_kind(table.schema.field(told.key).type))
        columns = [key if name == told.key else RowColumn(name, None) for name in told.columns]
        batches = iter(table.select(list(told.columns)).to_batches(told.batch))
        work = self.scoring(self._rows, str(told.into), columns)
        self._run(work, TableRows(columns, batches), result)

    def _run(self, work: Scoring, stream: RowStream, result: PartResult) -> None:
        written = result.rows
        try:
            for found in stream:
                if self._stopped.is_set():
                    raise _StoppedError
                work.score(found)
        finally:  # what is written stays, also when the part is begun again
            report = work.report(resumed=False)
            result.rows += report.rows
        result.skipped += max(report.skipped - written, 0)
        result.failed += report.failed
        result.failures += report.failures[: MOST_FAILURES - len(result.failures)]
        result.key = work.last_key

    def _read(self, part: QueryPart | FilePart) -> AbstractContextManager[RowStream]:
        told = self.settings
        if isinstance(part, QueryPart):
            assert isinstance(self._rows, RangeAdapter)
            within = KeyRange(RowColumn(told.key, told.key_type), part.above, part.up_to)
            return self._rows.read_range(told.query or "", told.batch, within)
        key = RowColumn(told.key, told.key_type)
        return read_part(part, told.columns, told.batch, key)


class ScoreWorker:
    """The actor: opens when there is work, and tells errors as text.

    Who ends it lets it close first: a server of a database takes a session for lost whose process
    is gone, says so in its log, and may keep it for long. `stop` runs beside the work
    (``max_concurrency``), all else after it.
    """

    def __init__(self, settings: Settings) -> None:
        use_threads(settings.threads)
        self._settings = settings
        self._scorer: Scorer | None = None
        self._stopped = threading.Event()
        self._at_work = threading.Lock()

    def ready(self) -> None:
        """Return when this is up."""

    def stop(self) -> None:
        """Have the work that is under way end before its next batch."""
        self._stopped.set()

    def close(self) -> None:
        """Close all that is open, after the work that is under way."""
        with self._at_work:
            self._close()

    def _close(self) -> None:
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            with contextlib.suppress(Exception):  # there is nobody to be told
                scorer.close()

    def part(self, number: int) -> str:
        """Score a part, and return JSON of its result."""
        return self._told(lambda scorer, result: scorer.part(number, result))

    def block(self, block: Any) -> str:
        """Score the rows of a block of Ray Data, and return JSON of the result."""
        table = import_ray("ray.data.block").BlockAccessor.for_block(block).to_arrow()
        return self._told(lambda scorer, result: scorer.table(table, result))

    def _told(self, work: Callable[[Scorer, PartResult], None]) -> str:
        """Do something with a scorer, which adds to a result, and return JSON of it."""
        with self._at_work:
            return self._done(work)

    def _done(self, work: Callable[[Scorer, PartResult], None]) -> str:
        result = PartResult()
        try:
            for again in range(_TRIES):
                try:
                    if self._scorer is None:
                        self._scorer = Scorer(self._settings, self._stopped)
                    work(self._scorer, result)
                    break
                except (UnavailableError, ConflictError):
                    self._close()
                    if again + 1 == _TRIES or self._stopped.wait(_PAUSE_SECONDS * 2**again):
                        raise
        except _StoppedError:
            return _failure(ClusterError.__name__, "stopped", result)
        except PydedupError as error:
            public = (one.__name__ for one in type(error).__mro__ if hasattr(errors, one.__name__))
            return _failure(next(public), str(error), result)
        except Exception as error:  # a fault: told like the others, without its frames
            return _failure("", f"{type(error).__name__}: {error}", result)
        return json.dumps(result.noted())


def _failure(kind: str, said: str, result: PartResult) -> str:
    return json.dumps({"error": [kind, without_secrets(said)], **result.noted()})


def hindrance(settings: Settings, versions: str) -> str | None:
    """Say what keeps this machine from working, ``None`` when nothing does."""
    import pydedup

    use_threads(settings.threads)
    if pydedup.__version__ != versions:
        return f"pydedup {pydedup.__version__} is there, and {versions} here; install the same"
    try:
        Scorer(settings).close()
        if settings.folder is not None and not Path(settings.folder).exists():
            return f"{settings.folder} is not there; it must be a folder that all machines share"
    except PydedupError as error:
        return without_secrets(str(error))
    except Exception as error:
        return without_secrets(f"{type(error).__name__}: {error}")
    return None
