# SPDX-License-Identifier: Apache-2.0
"""Members of a zip archive as byte ranges of its file, with their checksums verified once.

npz, torch and Keras files are zip archives whose members are usually stored as they are, so a
tensor inside is a range of the outer file. The zip checksum is the only one that these formats
have; it is checked before a member's bytes are first given out.
"""

from __future__ import annotations

import contextlib
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from pydedup.errors import FormatError, UnsupportedFormatError
from pydedup.formats._files import RawFile
from pydedup.formats.base import Array

__all__ = ["ZipMembers", "zip_to_write"]

_CHUNK = 4 << 20
_ENCRYPTED = 0x1
#: deflate cannot shrink by more; a member that claims so is a bomb or damaged.
_MAX_EXPANSION = 1100


@contextlib.contextmanager
def zip_to_write(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive to write, and leave it unfinished where that fails.

    Closing it would raise in place of an interrupt that came as a member was opened.
    """
    with path.open("wb") as file:
        archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        try:
            yield archive
        except BaseException:
            archive.fp = None
            raise
        archive.close()


class ZipMembers:
    """An open zip archive. Reading is safe between threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = RawFile(path)
        self._verified: set[str] = set()
        self._offsets: dict[str, int] = {}
        # Threads may read members of one ZipFile at once; the two caches are ours to guard.
        self._lock = threading.Lock()
        try:
            with _zip_errors(path):
                self._zip = zipfile.ZipFile(path)
        except BaseException:
            self.raw.close()
            raise
        try:
            self.members = self._checked()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the archive; arrays from it stay valid."""
        self._zip.close()
        self.raw.close()

    def is_stored(self, name: str) -> bool:
        """Return whether the member's bytes lie in the file as they are."""
        return self.members[name].compress_type == zipfile.ZIP_STORED

    def offset(self, name: str) -> int:
        """Return where the bytes of a stored member begin in the file.

        Raises
        ------
        FormatError
            When the header before them is damaged.
        """
        with self._lock:
            known = self._offsets.get(name)
        if known is not None:
            return known
        info = self.members[name]
        header = self.raw.read_at(info.header_offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise FormatError(f"{self.path}: the header of member {name!r} is damaged")
        lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        start = info.header_offset + 30 + sum(lengths)
        if start + info.file_size > self.raw.size:
            raise FormatError(f"{self.path} is truncated: member {name!r} is not all there")
        with self._lock:
            self._offsets[name] = start
        return start

    def verify(self, name: str, *, trust_zero: bool = False) -> None:
        """Compare a stored member's bytes with its checksum, the first time it is asked.

        ``trust_zero`` accepts a checksum of 0 as "not computed", which torch can write.
        """
        info = self.members[name]
        with self._lock:
            if name in self._verified:
                return
        if not (trust_zero and info.CRC == 0):
            data = self.raw.array(self.offset(name), np.dtype(np.uint8), (info.file_size,))
            checksum = 0
            for start in range(0, info.file_size, _CHUNK):
                checksum = zlib.crc32(data[start : start + _CHUNK].data, checksum)
            if checksum != info.CRC:
                raise FormatError(
                    f"{self.path}: member {name!r} does not match its checksum; it is damaged"
                )
        with self._lock:
            self._verified.add(name)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[IO[bytes]]:
        """Open a member of any compression; damage becomes a FormatError."""
        with _zip_errors(self.path), self._zip.open(self.members[name]) as file:
            yield file

    def read(self, name: str, limit: int) -> bytes:
        """Return a small member whole, checksum verified.

        Raises
        ------
        FormatError
            When it has more than ``limit`` bytes or is damaged.
        """
        if self.members[name].file_size > limit:
            raise FormatError(
                f"{self.path}: member {name!r} has {self.members[name].file_size} bytes; "
                f"{limit} are allowed there"
            )
        with self.stream(name) as file:
            return file.read()

    def inflate(self, name: str, skip: int, out: Array) -> None:
        """Fill ``out`` (uint8, 1-D) with the member's bytes after the first ``skip``."""
        with self.stream(name) as file:
            file.read(skip)
            view = out.data
            done = 0
            while done < len(view):
                got = file.readinto(view[done : done + _CHUNK])  # type: ignore[attr-defined]
                if not got:
                    raise FormatError(f"{self.path}: member {name!r} ended early")
                done += got
            if file.read(1):  # reaching the end is what makes zipfile compare the checksum
                raise FormatError(f"{self.path}: member {name!r} is longer than its array")

    def _checked(self) -> dict[str, zipfile.ZipInfo]:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if not info.filename:
                raise FormatError(f"{self.path} is a damaged zip archive: a member has no name")
            if info.is_dir():
                continue
            if info.filename in members:
                raise FormatError(f"{self.path}: member {info.filename!r} occurs twice")
            if info.flag_bits & _ENCRYPTED:
                raise UnsupportedFormatError(
                    f"{self.path}: member {info.filename!r} is encrypted; unpack it first"
                )
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UnsupportedFormatError(
                    f"{self.path}: member {info.filename!r} is compressed by method "
                    f"{info.compress_type}; write the file with deflate or without compression"
                )
            stored = info.compress_type == zipfile.ZIP_STORED
            if (stored and info.compress_size != info.file_size) or (
                info.file_size > 64 + _MAX_EXPANSION * info.compress_size
            ):
                raise FormatError(
                    f"{self.path}: member {info.filename!r} claims {info.file_size} bytes out of "
                    f"{info.compress_size}; the archive is damaged"
                )
            members[info.filename] = info
        return members


@contextlib.contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """Turn what :mod:`zipfile` raises on damaged archives into FormatError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as exc:
        reason = str(exc) or type(exc).__name__
        raise FormatError(f"{path} is a damaged or truncated zip archive: {reason:.200}") from exc
    except (OSError, ValueError, KeyError, UnicodeDecodeError) as exc:
        if isinstance(exc, FormatError):
            raise
        raise FormatError(f"{path} cannot be read as a zip archive: {exc}") from exc
