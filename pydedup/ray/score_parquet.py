# SPDX-License-Identifier: Apache-2.0
"""Rows from Parquet files, and predictions into them: a file for each part of the work.

A part's file gets its name when it is complete, so whoever reads the folder sees whole parts. A
part that is done again gives the same file.
"""

from __future__ import annotations

import contextlib
import decimal
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from pydedup.adapter_options import RowColumn, RowStream
from pydedup.errors import ArgumentError, FormatError, NotFoundError, not_installed
from pydedup.ray.score_plan import FilePart, part_file
from pydedup.text import listed

__all__ = [
    "ParquetPart",
    "TableRows",
    "check_apart",
    "cut_files",
    "files_of",
    "is_url",
    "key_kind",
    "key_type_of",
    "read_part",
    "url_of",
]

#: A row group ends where it has so many rows, or bytes: until then it is in memory.
_ROW_GROUP: Final = 131_072
_ROW_GROUP_BYTES: Final = 32 << 20


def _arrow() -> Any:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise ArgumentError(not_installed("Parquet", error, "ray")) from error
    return pyarrow


class TableRows:
    """Rows of a table of pyarrow as a `RowStream`."""

    def __init__(self, columns: Sequence[RowColumn], batches: Iterator[Any]) -> None:
        self.columns = columns
        self._batches = batches

    def __iter__(self) -> Iterator[list[tuple[object, ...]]]:
        for batch in self._batches:
            values = map(_values, batch.columns, self.columns)
            yield list(zip(*values, strict=True))


def _values(column: Any, about: RowColumn) -> list[object]:
    """Return a column as Python has it; of a key of a table in the units of databases."""
    pa = _arrow()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    coarser: Any = None
    if pa.types.is_time64(kind):  # pyarrow would cut off nanoseconds
        coarser = pa.time64("us")
    elif about.type is not None and pa.types.is_timestamp(kind) and kind.unit == "ns":
        coarser = pa.timestamp("us", kind.tz)
    try:
        column = column if coarser is None else column.cast(coarser)
    except pa.ArrowInvalid:
        raise ArgumentError(
            f"keys {about.name!r} differ in nanoseconds, and databases and Python have "
            "microseconds; round them, or make integers of them"
        ) from None
    try:
        values: list[object] = column.to_pylist()
    except (OverflowError, ValueError) as error:
        raise ArgumentError(
            f"column {about.name!r} has a value that Python does not have, such as a date beyond "
            f"the year 9999 or a text that is no UTF-8 ({error}); make it an integer or bytes, or "
            "leave out its row"
        ) from error
    if isinstance(kind, pa.BaseExtensionType):  # such as tensors of Ray Data
        values = [one.tolist() if isinstance(one, np.ndarray) else one for one in values]
    return values


def files_of(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the files that paths mean: of a folder those that end in .parquet, below it as well.

    Raises NotFoundError, and ArgumentError for a folder without any, or a URL. Names that begin
    with ``_`` or ``.`` are passed over.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if is_url(path):
            raise ArgumentError(
                f"{url_of(path)} is in an object store, and Parquet files are read by their paths "
                "here; mount it, or let Ray read it, into a table: pydedup.ray.score(ray.data."
                "read_parquet(...), ...), see docs/ray.md"
            )
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*.parquet")) if p.is_file()]
            found += [p for p in inside if not any(x[0] in "_." for x in p.relative_to(path).parts)]
        elif path.is_file():
            found.append(path)
        else:
            raise NotFoundError(f"there is no Parquet file {str(path)!r}")
    if not found:
        raise ArgumentError(
            f"there is no Parquet file in {', '.join(map(str, paths)) or 'nothing'}"
        )
    return [path.absolute() for path in found]


def check_apart(folder: Path, paths: Sequence[str | os.PathLike[str]]) -> None:
    """Raise ArgumentError where what is written to a folder would be read by the next run."""
    below = folder.resolve()
    for path in (Path(one).resolve() for one in paths):
        if path in below.parents and not any(x[0] in "_." for x in below.relative_to(path).parts):
            raise ArgumentError(
                f"predictions cannot go to {folder}: it is in {path}, of which all Parquet files "
                "are read, and a run that goes on would read them; name a folder beside it"
            )


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this is a URL, such as ``s3://...``, of which `Path` leaves one slash."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)) is not None


def url_of(path: str | os.PathLike[str]) -> str:
    """Return a URL for messages, with the slash that `Path` took."""
    return re.sub(":/+", "://", os.fspath(path), count=1)


def opened(path: Path | str) -> Any:
    """Open a file. Raises FormatError."""
    pa = _arrow()
    try:
        return pa.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{path} is no Parquet file that can be read: {error}") from error


def cut_files(
    files: Sequence[Path], columns: Sequence[str] | None, rows: int
) -> tuple[list[FilePart], Any]:
    """Return parts of so many rows at most, and the schema of the columns in their order.

    Raises ArgumentError when a file has not the columns of the first.
    """
    parts: list[FilePart] = []
    wanted: Any = None
    for path in files:
        with opened(path) as file:
            schema = file.schema_arrow
            names = list(schema.names if columns is None else columns)
            for name in names:
                if (count := schema.names.count(name)) != 1:
                    what = f"{count} columns" if count else "no column"
                    there = listed(schema.names)
                    raise ArgumentError(f"{path} has {what} {name!r}; it has: {there}")
            fields = _arrow().schema([schema.field(name).remove_metadata() for name in names])
            if wanted is not None and [(f.name, f.type) for f in fields] != [
                (f.name, f.type) for f in wanted
            ]:
                raise ArgumentError(
                    f"{path} and {files[0]} do not have the same columns of the same types; score "
                    "them one after the other, or name columns that they share"
                )
            wanted = fields
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                size = path.stat().st_size
                parts += [
                    FilePart(str(path), size, group, at, min(at + rows, count))
                    for at in range(0, count, rows)
                ]
    return parts, wanted


def key_kind(pa_type: Any) -> str:
    """Return what kind of key a type of pyarrow is, as `RangeAdapter.key_column` has it."""
    types = _arrow().types
    if types.is_dictionary(pa_type):  # as pandas writes categories
        pa_type = pa_type.value_type
    for kind, tests in {
        "integer": ("is_integer",),
        "number": ("is_decimal",),
        "text": ("is_string", "is_large_string", "is_string_view"),
        "bytes": ("is_binary", "is_large_binary", "is_binary_view", "is_fixed_size_binary"),
        "date": ("is_date",),
    }.items():
        if any(getattr(types, test)(pa_type) for test in tests):
            return kind
    if types.is_timestamp(pa_type):
        return "time" if pa_type.tz is None else "instant"
    return "other"


def key_type_of(key: object) -> Any:
    """Return the type of pyarrow for keys like this one of a query."""
    pa = _arrow()
    if isinstance(key, bytearray | memoryview):
        key = bytes(key)
    if isinstance(key, decimal.Decimal):
        places = -int(key.as_tuple().exponent) if key.is_finite() else 0
        return pa.decimal128(38, max(places, 0))
    try:
        return pa.string() if key is None else pa.scalar(key).type
    except pa.ArrowException as error:
        raise ArgumentError(
            f"keys like {key!r} cannot be written to Parquet ({error}); cast the key to an integer "
            "or a text in the query"
        ) from error


@contextlib.contextmanager
def read_part(
    part: FilePart, columns: Sequence[str], batch: int, key: RowColumn
) -> Iterator[RowStream]:
    """Stream the rows of a part. Raises FormatError, ArgumentError when the file is another one."""
    if not Path(part.path).is_file() or Path(part.path).stat().st_size != part.size:
        raise ArgumentError(
            f"{part.path} has changed since the work began, or is not the same on all machines"
        )
    with opened(part.path) as file:

        def batches() -> Iterator[Any]:
            pa, at = _arrow(), 0
            try:
                found = file.iter_batches(batch, row_groups=[part.group], columns=list(columns))
                for one in found:
                    begin, at = at, at + one.num_rows
                    if at <= part.start:
                        continue
                    if begin >= part.stop:
                        break
                    start = max(part.start - begin, 0)
                    rows = one.slice(start, min(part.stop, at) - begin - start)
                    yield rows.select(list(columns))
            except (pa.ArrowException, OSError) as error:
                raise FormatError(f"{part.path} cannot be read: {error}") from error

        yield TableRows(
            [RowColumn(c, key.type if c == key.name else None) for c in columns], batches()
        )


class ParquetPart:
    """The file of one part, as much of a `RowAdapter` as `Scoring` writes to.

    Within a part keys are told apart as in a table: of two rows with one key the first counts.
    """

    def __init__(self, folder: Path, number: int, key_type: Any, *, unique: bool) -> None:
        self._path = folder / part_file(number)
        self._written = folder / f".{self._path.name}.{uuid.uuid4().hex}.tmp"
        self._key_type, self._unique = key_type, unique
        self._seen: set[object] = set()
        self._schema: Any = None
        self._writer: Any = None
        self._waiting: list[Any] = []
        self._rows = self._bytes = 0

    def table_columns(self, table: str, key: str) -> tuple[str, ...] | None:
        """Return the columns, once they are known."""
        return None if self._schema is None else tuple(self._schema.names)

    def create_predictions(
        self, table: str, key: RowColumn, columns: Sequence[tuple[str, str]]
    ) -> None:
        """Begin the file."""
        pa = _arrow()
        kinds = {"float": pa.float64(), "text": pa.string(), "vector": pa.list_(pa.float32())}
        fields = [(key.name, self._key_type)]
        self._schema = pa.schema([*fields, *((name, kinds[kind]) for name, kind in columns)])
        self._writer = pa.parquet.ParquetWriter(self._written, self._schema, compression="zstd")

    def vector(self, payload: bytes) -> object:
        """Return float32 in little-endian order as a value of a list column."""
        return np.frombuffer(payload, "<f4")

    def present_keys(self, table: str, key: str, keys: Sequence[object]) -> set[object]:
        """Return those of the keys that this part has a row of."""
        return self._seen.intersection(keys) if self._unique else set()

    def insert_predictions(
        self, table: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> bool:
        """Take rows to be written."""
        pa = _arrow()
        values = dict(zip(columns, zip(*rows, strict=True), strict=True))
        try:
            arrays = [pa.array(values[f.name], f.type) for f in self._schema]
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"a key is not of the type {self._key_type} that those before it have ({error}); "
                "cast it to a text in the query"
            ) from error
        self._waiting.append(pa.record_batch(arrays, schema=self._schema))
        self._rows += len(rows)
        self._bytes += self._waiting[-1].nbytes
        if self._unique:
            self._seen.update(row[0] for row in rows)
        if self._rows >= _ROW_GROUP or self._bytes >= _ROW_GROUP_BYTES:
            self._flush()
        return True

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(_arrow().Table.from_batches(self._waiting))
        self._waiting, self._rows, self._bytes = [], 0, 0

    def finish(self) -> None:
        """Give the file its name, all of it on the disk; without a row there is none."""
        if self._writer is None:
            return
        self._flush()
        self._writer.close()
        self._writer = None
        try:
            with self._written.open("rb") as file:
                os.fsync(file.fileno())
            self._written.replace(self._path)
        except FileNotFoundError:  # another run ended, and with it took what it thought left over
            if not self._path.exists():
                raise

    def discard(self) -> None:
        """Leave nothing of a part that did not come to its end."""
        with contextlib.suppress(Exception):
            if self._writer is not None:
                self._writer.close()
        self._written.unlink(missing_ok=True)
