# SPDX-License-Identifier: Apache-2.0
"""What a scoring on Ray is about: what is read, where it goes, and how it is cut into parts."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from pydedup.adapter_options import RangeAdapter, RowColumn
from pydedup.catalog import Catalog, StoredModel
from pydedup.errors import ArgumentError, PydedupError, SchemaVersionError
from pydedup.opening import connect_store
from pydedup.ray.cluster import Secret, import_ray
from pydedup.ray.score_parquet import (
    ParquetPart,
    check_apart,
    cut_files,
    files_of,
    is_url,
    key_kind,
    key_type_of,
    url_of,
)
from pydedup.ray.score_plan import (
    FilePart,
    FolderNotes,
    Notes,
    PartResult,
    QueryPart,
    Settings,
    TableNotes,
    from_json,
    to_json,
)
from pydedup.ray.score_worker import Scorer, rows_of
from pydedup.registry import redact
from pydedup.serving.pin import Pin
from pydedup.serving.score import Scoring, key_place
from pydedup.serving.score_table import PredictionTable, comparable

__all__ = ["MOST_ROWS", "Job"]

#: Rows of a part: few parts cost little to begin, many are soon done again and end together.
MOST_ROWS: Final = 65_536
_PARTS_PER_WORKER: Final = 8
_MOST_PARTS: Final = 1_000
_BOUND_EVERY: Final = 4_096


class Job:
    """One scoring: what is asked, and the databases that the driver has open for it."""

    def __init__(
        self, dataset: Any, url: str, source: Any, model: str, into: str | os.PathLike[str]
    ) -> None:
        self._url, self._model = url, model
        self._source = None if source is None else str(os.fspath(source))
        self.query = dataset if isinstance(dataset, str) else None
        self.files: list[Path] | None = None
        self.dataset: Any = None
        paths = [dataset] if isinstance(dataset, os.PathLike) else dataset
        if isinstance(paths, list | tuple):
            self.files = files_of(paths)
        elif self.query is None:
            if not isinstance(dataset, import_ray("ray.data").Dataset):
                raise ArgumentError(
                    f"dataset is a {type(dataset).__name__}; give a SELECT, the path of Parquet "
                    "files, or a ray.data.Dataset"
                )
            self.dataset = dataset
        if not isinstance(into, str | os.PathLike):
            raise ArgumentError(
                f"into must be a table's name or the path of a folder, not {type(into).__name__}"
            )
        self.into = into if isinstance(into, str) else None
        if not isinstance(into, str) and is_url(into):
            raise ArgumentError(
                f"predictions cannot go to {url_of(into)}: an object store cannot give a file "
                "its name when it is complete; name a folder that all machines share, or a table"
            )
        self.folder = None if isinstance(into, str) else Path(into).absolute()
        if self.folder is not None and self.files is not None:
            check_apart(self.folder, paths)
        self.rows: RangeAdapter | None = None
        self.pin: Pin | None = None
        self.notes: Notes | None = None
        self.table = ""
        self.resumed = False
        if self.dataset is not None and self.folder is not None:
            raise ArgumentError(
                "a ray.data.Dataset has no parts that are the same when it is read again, so its "
                "predictions go into a table; give the paths of Parquet files, or name a table"
            )

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the store, and the database of the rows."""
        with contextlib.suppress(SchemaVersionError):  # of an older one: to be migrated
            connect_store(self._url, mode="r").close()  # one that is missing is not created
        adapter = connect_store(self._url, mode="r" if self.into is None else "a")
        with contextlib.ExitStack() as left:
            left.callback(adapter.close)
            self._adapter, self._catalog = adapter, Catalog(adapter)
            if self.query is not None or self.into is not None:
                self.rows = left.enter_context(rows_of(adapter, self._source, self.into))
            yield

    # ---- planning -----------------------------------------------------------------------------

    def settled(self, key: str | None, columns: Sequence[str] | None, **others: Any) -> Settings:
        """Look at what is asked, take the version that the work stays on, and see that both fit."""
        named, types = self._columns(columns)
        place = key_place([RowColumn(name, None) for name in named], key)
        name = named[place]
        stored = self._take()
        settings = Settings(
            store=Secret(self._url),
            source=None if self._source is None else Secret(self._source),
            model_id=stored.row.id,
            address=stored.address,
            query=self.query,
            parts=(),
            into=None if self.into is None else self.table,
            folder=None if self.folder is None else str(self.folder),
            key=name,
            key_type=self._key_type(types[place]),
            file_key_type=None if self.folder is None else self._file_key_type(name, types[place]),
            columns=named,
            **others,
        )
        with contextlib.closing(Scorer(settings)) as scorer:
            self.scoring(scorer)
        return settings

    def take_back(self) -> None:
        """Forget what was noted of a work that could not begin, unless another run began it."""
        if self.notes is not None and not (self.resumed and self.folder is not None):
            with contextlib.suppress(PydedupError, OSError):
                self.notes.forget()

    def take_back_unwritten(self) -> None:
        """Forget what was noted of a work whose table is not there: nothing was written."""
        if self.pin is not None and self.rows is not None:
            with contextlib.suppress(PydedupError):
                if self.rows.table_columns(self.table, "") is None:
                    self.pin.take_back()

    def scoring(self, scorer: Scorer) -> Scoring:
        """Return a scoring that nothing was given yet."""
        told = scorer.settings
        columns = [RowColumn(name, None) for name in told.columns]
        columns[told.columns.index(told.key)] = RowColumn(told.key, told.key_type)
        if self.folder is None:
            return scorer.scoring(self.rows, self.table, columns)
        unused = ParquetPart(self.folder, 0, told.file_key_type, unique=False)
        return scorer.scoring(unused, self.table, columns)

    def cut(self, settings: Settings, part_rows: int, workers: int) -> Settings:
        """Cut the work, or find how it was cut."""
        if self.dataset is not None:
            return settings
        kind: Any = QueryPart if self.query is not None else FilePart
        head: list[object] = [settings.key, *settings.columns]
        assert self.notes is not None
        noted, *cut = self.notes.parts(
            lambda: [head, *self._cut(settings.key, settings.columns, part_rows, workers)]
        )
        if noted != head:
            raise ArgumentError(
                f"the work began with the key {noted[0]!r} and the columns {', '.join(noted[1:])}; "
                "name them as before, or a new table or folder"
            )
        parts = [kind(*map(from_json, part)) for part in cut]
        return dataclasses.replace(settings, parts=parts)

    def done(self, settings: Settings) -> dict[int, PartResult]:
        """Return the parts that are done, but for those whose rows somebody took away.

        Of each, one key is looked for: the table may have been emptied, or made anew.
        """
        assert self.notes is not None
        found = self.notes.done()
        if self.folder is not None or not found:
            return found
        assert self.rows is not None
        key = RowColumn(settings.key, settings.key_type)
        table = PredictionTable(self.rows, self.table, key, settings.address)
        table.look()
        if not table.is_there:
            return {}
        known = {comparable(result.key) for result in found.values()} - {None}
        gone = known - table.present(list(known))
        return {n: result for n, result in found.items() if comparable(result.key) not in gone}

    def _columns(self, columns: Sequence[str] | None) -> tuple[list[str], list[Any]]:
        """Return the columns of a row, and their types: of a database or of pyarrow."""
        if self.query is not None:
            if columns is not None:
                raise ArgumentError("a query names its columns itself; leave out columns")
            assert self.rows is not None
            found = self.rows.query_columns(self.query)
            return [column.name for column in found], [column.type for column in found]
        if self.files is not None:
            _, schema = cut_files(self.files, columns, MOST_ROWS)
            return list(schema.names), list(schema.types)
        names = list(columns or self.dataset.columns() or ())
        return names, [None] * len(names)

    def _key_type(self, found: Any) -> str | None:
        if self.query is not None or self.files is None or self.into is None:
            return found if isinstance(found, str) else None
        assert isinstance(self.rows, RangeAdapter)
        return self.rows.key_column("key", key_kind(found)).type

    def _file_key_type(self, name: str, found: Any) -> Any:
        if self.query is None:
            return found
        assert self.rows is not None
        with self.rows.read_rows(self.query, 64) as stream:
            place = [column.name for column in stream.columns].index(name)
            first = next(iter(stream), [])
        return key_type_of(next((row[place] for row in first if row[place] is not None), None))

    def _take(self) -> StoredModel:
        """Return the model of the work, and know where to note how far it is."""
        # A file that has changed makes it another work, which is cut anew.
        files = [f"{path} ({path.stat().st_size} bytes)" for path in self.files or ()]
        what = self.query or "\n".join(files) or "a dataset"
        if self.into is not None:
            assert self.rows is not None
            self.table = self.rows.full_table_name(self.into)
            self.pin = Pin(self._adapter, self._catalog, self.rows, self.table, what, self._model)
            self.notes = TableNotes(self.pin)
            stored = self.pin.take(always=True)
            self.resumed = self.pin.resumed
            return stored
        assert self.folder is not None
        self.table = str(self.folder)
        row = self._catalog.resolve(self._model)
        folder = FolderNotes(self.folder)
        noted, self.resumed = folder.begin(
            {"what": what, "source": redact(self._source or ""), "asked": self._model}
            | {"model": row.id, "address": row.address}
            | {"store": self._adapter.meta().get("store_id")}
        )
        self.notes = folder
        if noted["store"] != self._adapter.meta().get("store_id"):
            raise ArgumentError(f"{self.folder} was begun with another store; name a new folder")
        live = self._adapter.model(noted["model"])
        if live is not None:
            return self._catalog.of_row(live)
        raise ArgumentError(
            f"the work began with {noted['address']}, which was removed; name a new folder"
        )

    def _cut(
        self, key: str, columns: Sequence[str], part_rows: int, workers: int
    ) -> list[list[object]]:
        if self.query is None:
            parts, _ = cut_files(self.files or [], columns, part_rows)
            total = sum(part.stop - part.start for part in parts)
            fewer = _rows_of_part(total, part_rows, workers)
            if fewer < part_rows:
                parts, _ = cut_files(self.files or [], columns, fewer)
            return [part.noted() for part in parts]
        assert isinstance(self.rows, RangeAdapter)
        every = min(_BOUND_EVERY, part_rows)
        bounds = self.rows.key_bounds(self.query, key, every)
        for one in bounds:
            to_json(one)  # for the better error about a type that has no hash
        wanted = _rows_of_part(len(bounds) * every, part_rows, workers)
        step = max(wanted // every, -(-len(bounds) // _MOST_PARTS), 1)
        # Keys that more rows have than a part has are one bound.
        edges = [None, *dict.fromkeys(bounds[step - 1 :: step]), None]
        return [QueryPart(*pair).noted() for pair in itertools.pairwise(edges)]


def _rows_of_part(total: int, most: int, workers: int) -> int:
    """Return how many rows a part has, so that workers end together."""
    return min(most, max(-(-total // (workers * _PARTS_PER_WORKER)), 1))
