# SPDX-License-Identifier: Apache-2.0
"""What a scoring on Ray is cut into, and what is noted of the parts that are done.

A part is a range of the keys of a query, or rows of one row group of a Parquet file. How the work
was cut is noted when it begins, so that who goes on with it finds the same parts: in the row of
``jobs`` that keeps the version, or beside the files that are written. A note that a part is done
saves reading it again, and nothing else: doing it twice changes nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import ipaddress
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from pydedup.errors import ArgumentError, StorageFullError
from pydedup.formats._files import full_disk
from pydedup.ray.cluster import Secret
from pydedup.serving.pin import Pin
from pydedup.types import RowFailure
from pydedup.words import OnError

__all__ = [
    "FilePart",
    "FolderNotes",
    "Notes",
    "PartResult",
    "QueryPart",
    "Settings",
    "TableNotes",
    "from_json",
    "part_file",
    "room_in",
    "to_json",
]

#: Folder of notes beside Parquet files; who reads those skips names that begin so.
NOTES: Final = "_pydedup"
#: Of a key in a message, so many characters.
_SHOWN: Final = 80
_MICROSECOND: Final = datetime.timedelta(microseconds=1)
_ADDRESSES: Final[tuple[type[Any], ...]] = (
    *(ipaddress.IPv4Address, ipaddress.IPv4Interface, ipaddress.IPv4Network),
    *(ipaddress.IPv6Address, ipaddress.IPv6Interface, ipaddress.IPv6Network),
)
_TAGGED: Final[dict[type, tuple[str, Callable[[Any], str], Callable[[str], Any]]]] = {
    bytes: ("bytes", bytes.hex, bytes.fromhex),
    datetime.datetime: ("time", datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    datetime.date: ("date", datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: ("clock", datetime.time.isoformat, datetime.time.fromisoformat),
    datetime.timedelta: (
        "microseconds",
        lambda span: str(span // _MICROSECOND),
        lambda count: int(count) * _MICROSECOND,
    ),
    float: ("float", repr, float),  # one that JSON has not
    decimal.Decimal: ("decimal", str, decimal.Decimal),
    uuid.UUID: ("uuid", str, uuid.UUID),
} | {kind: (kind.__name__, str, kind) for kind in _ADDRESSES}


def to_json(key: object) -> object:
    """Return a key as JSON has it. Raises ArgumentError for a type that is none of ours."""
    if key is None or type(key) in (int, str, bool) or (type(key) is float and math.isfinite(key)):
        return key
    if type(key) not in _TAGGED:
        raise ArgumentError(
            f"the key {key!r} is of type {type(key).__name__}, by which the work cannot be "
            "divided; cast it to an integer or a text in the query"
        )
    tag, write, _ = _TAGGED[type(key)]
    return {tag: write(key)}


def from_json(value: Any) -> object:
    """Return the key that `to_json` was given."""
    if isinstance(value, dict):
        ((tag, text),) = value.items()
        for name, _, read in _TAGGED.values():
            if name == tag:
                return read(text)
    return value


@dataclass(frozen=True, slots=True)
class QueryPart:
    """Rows of the query whose key is above one value and up to another, see `KeyRange`."""

    above: object | None
    up_to: object | None

    def __str__(self) -> str:
        told = [
            f"{said} {_short(key)}"
            for said, key in (("above", self.above), ("up to", self.up_to))
            if key is not None
        ]
        return f"keys {' and '.join(told)}" if told else "all keys"

    def noted(self) -> list[object]:
        """Return it as JSON has it."""
        return [to_json(self.above), to_json(self.up_to)]


@dataclass(frozen=True, slots=True)
class FilePart:
    """Rows ``start`` to ``stop`` of a row group of a Parquet file of ``size`` bytes."""

    path: str
    size: int
    group: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"rows {self.start} to {self.stop - 1} of row group {self.group} of {self.path}"

    def noted(self) -> list[object]:
        """Return it as JSON has it."""
        return [self.path, self.size, self.group, self.start, self.stop]


@dataclass(frozen=True)
class Settings:
    """What a worker is given: all that it needs, and no password that shows.

    Attributes
    ----------
    into, folder
        The table, or the folder of Parquet files, that predictions go to.
    key, columns
        Of Parquet: the columns to read, and which of them is the key.
    key_type, file_key_type
        The type of the key, as the database spells it, and as pyarrow has it.
    """

    store: Secret
    source: Secret | None
    model_id: int
    address: str
    query: str | None
    parts: Sequence[QueryPart | FilePart]
    into: str | None
    folder: str | None
    key: str
    key_type: str | None
    file_key_type: Any
    columns: Sequence[str]
    batch: int
    memory: str | int
    threads: int
    on_error: OnError


@dataclass
class PartResult:
    """What became of a part: rows written, there already, failed, and the first that did.

    ``key`` is that of a row that was there when it was done.
    """

    rows: int = 0
    skipped: int = 0
    failed: int = 0
    failures: list[RowFailure] = field(default_factory=list)
    key: object = None

    def noted(self) -> dict[str, Any]:
        """Return it as JSON has it; keys of other types than JSON's as Python writes them."""
        failures = [[_plain(one.key), one.reason] for one in self.failures]
        key = None
        with contextlib.suppress(ArgumentError):
            key = to_json(self.key)
        return {
            "rows": self.rows,
            "skipped": self.skipped,
            "failed": self.failed,
            "failures": failures,
            "key": key,
        }

    @classmethod
    def of(cls, noted: Mapping[str, Any]) -> PartResult:
        """Return what was noted."""
        failures = [RowFailure(from_json(key), reason) for key, reason in noted["failures"]]
        key = from_json(noted.get("key"))
        return cls(noted["rows"], noted["skipped"], noted["failed"], failures, key)


def _short(key: object) -> str:
    """Return a key as Python writes it, not all of a long one."""
    said = repr(key)
    return said if len(said) <= _SHOWN else f"{said[: _SHOWN - 3]}..."


def _plain(key: object) -> object:
    try:
        return to_json(key)
    except ArgumentError:
        return repr(key)


class Notes(Protocol):
    """What is noted of a work while it is under way."""

    def parts(self, cut: Callable[[], list[list[object]]]) -> list[list[Any]]:
        """Return how the work was cut, which is done now when it was not."""

    def done(self) -> dict[int, PartResult]:
        """Return the parts that are done."""

    def mark(self, number: int, result: PartResult) -> None:
        """Note that a part is done."""

    def forget(self) -> None:
        """Take back all that was noted."""


class TableNotes:
    """Notes in the store, beside the version that the work stays on."""

    def __init__(self, pin: Pin) -> None:
        self._pin = pin

    def parts(self, cut: Callable[[], list[list[object]]]) -> list[list[Any]]:
        """Return how the work was cut, which is done now when it was not."""
        noted = self._pin.noted(lambda spec: None)
        if "parts" not in noted:
            parts = cut()
            # Of two that begin at once, the first says how.
            noted = self._pin.noted(lambda spec: spec.setdefault("parts", parts) and None)
        return list(noted["parts"])

    def done(self) -> dict[int, PartResult]:
        """Return the parts that are done."""
        noted = self._pin.noted(lambda spec: None).get("done", {})
        return {int(number): PartResult.of(result) for number, result in noted.items()}

    def mark(self, number: int, result: PartResult) -> None:
        """Note that a part is done."""

        def change(spec: dict[str, Any]) -> None:
            spec.setdefault("done", {})[str(number)] = result.noted()

        self._pin.noted(change)

    def forget(self) -> None:
        """Take back all that was noted, unless other runs go by it."""
        self._pin.take_back()


class FolderNotes:
    """Notes beside Parquet files: what the work is, and a file for each part that is done.

    The worker that writes a part marks it, once its file has its name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / NOTES

    def begin(self, work: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """Note what the work is, and return what is noted, and whether it was there.

        Raises ArgumentError when the folder is of another work, or holds something else.
        """
        parent, noted = self._folder.parent, self._folder / "work.json"
        if not noted.exists():
            if parent.is_dir() and any(p.name != NOTES for p in parent.iterdir()):
                raise ArgumentError(
                    f"{parent} is not empty and holds no predictions of ours; name a new folder"
                )
            try:
                with room_in(parent):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    if _write_first(noted, json.dumps(dict(work))):
                        return dict(work), False
            except StorageFullError:
                self._remove_empty()
                raise
            except OSError as error:
                self._remove_empty()
                raise ArgumentError(
                    f"predictions cannot go to {parent}: {error.strerror}; name a new folder that "
                    "can be written"
                ) from error
        found = dict(json.loads(noted.read_text()))
        # What an older pydedup noted says nothing of the source.
        if any(found.get(name, work[name]) != work[name] for name in ("what", "source", "asked")):
            of = f" in {found['source']}" if found.get("source") else ""
            raise ArgumentError(
                f"{parent} holds predictions of another work ({found['asked']} of "
                f"{found['what'][:200]!r}{of}); name a new folder"
            )
        return found, True

    def forget(self) -> None:
        """Take back all that was noted, of a work that cannot be done."""
        for name in ("work.json", "parts.json"):
            (self._folder / name).unlink(missing_ok=True)
        self._remove_empty()

    def _remove_empty(self) -> None:
        for empty in (self._folder, self._folder.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()

    def parts(self, cut: Callable[[], list[list[object]]]) -> list[list[Any]]:
        """Return how the work was cut, which is done now when it was not."""
        noted = self._folder / "parts.json"
        if not noted.exists():
            _write_first(noted, json.dumps(cut()))
        return list(json.loads(noted.read_text()))

    def done(self) -> dict[int, PartResult]:
        """Return the parts that are done, but for those whose file somebody took away."""
        found = {
            int(path.stem.removeprefix("done-")): PartResult.of(json.loads(path.read_text()))
            for path in self._folder.glob("done-*.json")
        }
        there = {path.name for path in self._folder.parent.iterdir()}
        return {
            number: result
            for number, result in found.items()
            if not result.rows or part_file(number) in there
        }

    def mark(self, number: int, result: PartResult) -> None:
        """Note that a part is done."""
        written = _write(self._folder, json.dumps(result.noted()))
        with contextlib.suppress(FileNotFoundError):  # another run has ended: see `end`
            written.replace(self._folder / f"done-{number:05d}.json")

    def end(self) -> None:
        """Remove what runs that were killed had begun to write; all parts are done."""
        for pattern in (".part-*.tmp", f"{NOTES}/.*.tmp"):
            for left_over in self._folder.parent.glob(pattern):
                left_over.unlink(missing_ok=True)


def part_file(number: int) -> str:
    """Return the name of the Parquet file of a part."""
    return f"part-{number:05d}.parquet"


def room_in(folder: Path) -> AbstractContextManager[None]:
    """Return a context in which predictions are written to a folder; see `full_disk`."""
    return full_disk(
        f"no space left for predictions in {folder}; free some, and the same command goes on"
    )


def _write_first(path: Path, text: str) -> bool:
    """Write a file unless it is there: of two that begin at once, the first one's stays.

    Returns whether this was the first.
    """
    written = _write(path.parent, text)
    try:
        os.link(written, path)
    except FileExistsError:
        return False
    finally:
        written.unlink()
    return True


def _write(folder: Path, text: str) -> Path:
    """Write a file of no name yet, all of it on the disk."""
    path = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        with room_in(folder.parent), path.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path
