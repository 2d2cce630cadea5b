# SPDX-License-Identifier: Apache-2.0
"""Reading a file by position, and replacing a file or folder in one step.

Tensors are copied with ``pread``: who writes to a file while it is read, as a job that saves its
checkpoint again, would change a mapped tensor between its hash and its blocks, or end the process
where the file is cut short (SIGBUS). Up to 32 MiB that takes no longer, as the heap's memory is
used again. Only what might not fit into memory is mapped, for exactly as long as there is an array
over it: one mapping of the whole file would end with all of it resident.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import math
import mmap
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np

from pydedup.errors import (
    ArgumentError,
    FormatError,
    NotFoundError,
    StorageFullError,
    UnsupportedFormatError,
)
from pydedup.formats.base import Array
from pydedup.sets import in_parts

__all__ = [
    "RawFile",
    "atomic_file",
    "atomic_folder",
    "full_disk",
    "is_store",
    "is_used_by_sqlite",
    "open_raw",
    "refuse_foreign",
    "room_for_copy",
    "sync",
    "write_array",
    "write_errors",
]

#: Tensors of so many bytes are not copied.
_MAP_FROM = 1 << 30
#: One system call moves less than 2 GiB on Linux.
_IO_CHUNK = 1 << 30
_WRITE_CHUNK = 8 << 20
#: The beginning of every SQLite database.
_SQLITE = b"SQLite format 3\0"
#: What a store has there, as adapters/_sqlite_file.py marks it.
_OF_A_STORE, _OURS = slice(68, 72), b"pydd"
#: What SQLite has beside a database that is open.
_BESIDE = ("-wal", "-shm")
#: What the folder that is written in first ends in until it is locked; it is empty so long.
_UNLOCKED = ".new"
_IS_DATABASE = "is a SQLite database, maybe a store, and no file of a model"
#: Beginnings of files that people mistake for models, or that are models we cannot read.
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "is a Git LFS pointer; run: git lfs pull"),
    (b"<!DOCTYPE html", "is a web page, not a model; download the file itself"),
    (b"<html", "is a web page, not a model; download the file itself"),
    (_SQLITE, _IS_DATABASE),
    (b"GGUF", "is a GGUF file, which is not supported; use the safetensors of that model"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it first"),
    (b"BZh", "is compressed by bzip2; unpack it first"),
    (b"\xfd7zXZ\x00", "is compressed by xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstandard; unpack it first"),
)


class RawFile:
    """A regular file opened for reading by position. Safe between threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        if is_used_by_sqlite(path):
            raise UnsupportedFormatError(f"{path} {_IS_DATABASE}")
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer before fstat can refuse it.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._fd)
        except FileNotFoundError as exc:
            raise NotFoundError(f"{path} does not exist") from exc
        except OSError as exc:
            raise FormatError(f"{path} cannot be read: {exc.strerror}") from exc
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FormatError(f"{path} is no regular file; give the path of a model file")
        self.size = status.st_size

    def close(self) -> None:
        """Close the file; arrays from it stay valid."""
        fd, self._fd = (
            self._fd,
            -1,
        )  # before it is closed: an interrupt between would close it twice
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor, for a child process to inherit."""
        return self._fd

    def read_at(self, offset: int, n_bytes: int) -> bytes:
        """Return exactly ``n_bytes`` from ``offset``.

        Raises
        ------
        FormatError
            When the file ends before.
        """
        return self._copy(offset, n_bytes).tobytes()

    def array(self, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """Return the elements at ``offset`` in native byte order, read-only.

        A copy, but for a very large one.
        """
        n_bytes = math.prod(shape) * dtype.itemsize
        native = dtype.newbyteorder("=")
        if n_bytes >= _MAP_FROM and dtype == native and offset % dtype.itemsize == 0:
            mapped = self._map(offset, n_bytes)
            if mapped is not None:
                return mapped.view(dtype).reshape(shape)
        array = self._copy(offset, n_bytes).view(dtype).reshape(shape)
        if dtype != native:
            array = array.astype(native)
        array.flags.writeable = False
        return array

    def _check(self, offset: int, n_bytes: int) -> None:
        if self._fd < 0:
            raise ArgumentError(f"{self.path} is closed; read its tensors before leaving it")
        size = os.fstat(self._fd).st_size
        if offset < 0 or n_bytes < 0 or offset + n_bytes > size:
            raise FormatError(
                f"{self.path} is truncated: bytes {offset} to {offset + n_bytes} are needed, "
                f"it has {size}"
            )

    def _map(self, offset: int, n_bytes: int) -> Array | None:
        self._check(offset, n_bytes)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        try:
            mapping = mmap.mmap(
                self._fd, offset - start + n_bytes, access=mmap.ACCESS_READ, offset=start
            )
        except (OSError, ValueError):
            return None  # file systems without mappings, and a process that used all of its own
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_SEQUENTIAL)
        return np.frombuffer(mapping, np.uint8, n_bytes, offset - start)

    def _copy(self, offset: int, n_bytes: int) -> Array:
        self._check(offset, n_bytes)
        buffer = np.empty(n_bytes, np.uint8)
        view = buffer.data
        done = 0
        while done < n_bytes:
            try:
                got = os.preadv(self._fd, [view[done : done + _IO_CHUNK]], offset + done)
            except OSError as exc:
                raise FormatError(f"{self.path} cannot be read: {exc.strerror}") from exc
            if got == 0:
                raise FormatError(f"{self.path} ended early, at byte {offset + done}")
            done += got
        return buffer


@contextlib.contextmanager
def open_raw(path: Path) -> Iterator[RawFile]:
    """Open for the length of a ``with`` block."""
    raw = RawFile(path)
    try:
        yield raw
    finally:
        raw.close()


def is_used_by_sqlite(path: Path) -> bool:
    """Return whether a file is a database that is open, or what lies beside one.

    Nobody else may open one: as it is closed again, the locks that SQLite holds on it for a store
    of this process are gone (a rule of POSIX). Other processes then take away its log.
    """
    real = os.path.realpath(path)
    for end in _BESIDE:
        if real.endswith(end) and os.path.lexists(real.removesuffix(end)):
            return True
    return any(os.path.lexists(real + end) for end in _BESIDE)


def is_store(path: Path) -> bool:
    """Return whether a file is a store, or must not be opened to tell (`is_used_by_sqlite`)."""
    if is_used_by_sqlite(path):
        return True
    with open_raw(path) as raw:
        head = raw.read_at(0, min(raw.size, _OF_A_STORE.stop))
    return head.startswith(_SQLITE) and head[_OF_A_STORE] == _OURS


def refuse_foreign(path: Path, head: bytes) -> None:
    """Raise UnsupportedFormatError for a file that begins like one that is no model."""
    for magic, message in _FOREIGN:
        if head[:64].lower().startswith(magic.lower()):
            raise UnsupportedFormatError(f"{path} {message}")


def write_array(file: IO[bytes], array: Array) -> None:
    """Write the elements of a C-contiguous array in pieces, so that the file keeps no copy."""
    data = array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
    for part in in_parts(data, _WRITE_CHUNK):
        file.write(part)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it becomes ``path`` in one step.

    Raises
    ------
    ArgumentError
        When the target cannot be written there.
    StorageFullError
        When there is no room.
    """
    with write_errors(path):
        target = path.resolve() if path.is_symlink() else path
        if target.is_dir():
            raise ArgumentError(f"{path} is a folder; give the path of a file")
        if target.exists() and not target.is_file():
            # Renaming onto /dev/null would take it away from everybody.
            raise ArgumentError(f"{path} is no regular file; choose another path")
        _refuse_database(target)
        _refuse_missing_folder(path, target)
        with _folder_beside(target) as folder:
            scratch = folder / target.name
            # A file that is replaced keeps its mode, and nobody else reads the new one before; for
            # a new file the umask of the user applies, unlike with mkstemp.
            kept = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
            mode = 0o666 if kept is None else 0o600
            os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
            yield scratch
            sync(scratch)
            if kept is not None:
                scratch.chmod(kept)
            scratch.replace(target)
            sync(target.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``; on success it becomes ``path`` in one step.

    Raises
    ------
    ArgumentError
        When ``path`` is a file or a folder with something in it.
    StorageFullError
        When there is no room.
    """
    with write_errors(path):
        target = path.resolve() if path.is_symlink() else path
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ArgumentError(f"{path} exists and is no empty folder; choose another path")
        _refuse_missing_folder(path, target)
        with _folder_beside(target) as folder:
            scratch = folder / target.name
            scratch.mkdir()
            yield scratch
            for walked, _, names in os.walk(scratch):
                for name in names:
                    sync(Path(walked, name))
                sync(Path(walked))
            # Renaming onto an empty folder replaces it; onto one filled meanwhile it fails.
            scratch.rename(target)
            sync(target.parent)


def _refuse_database(path: Path) -> None:
    """Raise ArgumentError where a SQLite database is: by `-o STORE` a store was lost."""
    try:
        is_database = is_used_by_sqlite(path)
        if not is_database:
            with path.open("rb") as file:
                is_database = file.read(len(_SQLITE)) == _SQLITE
    except OSError:
        return  # nothing is there, or what this user cannot use as a store either
    if is_database:
        raise ArgumentError(f"{path} is a SQLite database, maybe a store; choose another path")


def _refuse_missing_folder(path: Path, target: Path) -> None:
    """Raise ArgumentError where there is no folder for ``target``, which ``path`` names."""
    if not target.parent.is_dir():
        raise ArgumentError(f"{path} cannot be written: folder {target.parent} does not exist")


@contextlib.contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """Yield a folder to write in first what is to be ``target``; in the end it is not there.

    Who writes has it locked: so what one left who was killed is known, and goes with the next one.
    """
    hidden = f".{target.name[:50]}."  # of so many characters, the longest have 200 bytes
    removers: dict[str, Callable[[Path], None]] = {".tmp": shutil.rmtree, _UNLOCKED: os.rmdir}
    for left in target.parent.glob(f"{glob.escape(hidden)}{'[0-9a-f]' * 12}.*"):
        if remove := removers.get(left.suffix):
            with contextlib.suppress(OSError), _opened(left) as fd:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(left)
    folder = target.with_name(f"{hidden}{secrets.token_hex(6)}.tmp")
    unlocked = folder.with_suffix(_UNLOCKED)
    try:
        with contextlib.ExitStack() as stack:
            while not folder.exists():
                unlocked.mkdir()
                with contextlib.suppress(FileNotFoundError):  # taken for one that was left
                    fd = stack.enter_context(_opened(unlocked))
                    with contextlib.suppress(OSError):  # file systems without locks
                        fcntl.flock(fd, fcntl.LOCK_EX)
                    unlocked.rename(folder)
            yield folder
    finally:
        for made in (unlocked, folder):
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def full_disk(said: str) -> Iterator[None]:
    """Raise StorageFullError with these words where a disk, or a limit of files, leaves no room."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(said) from exc
        if exc.errno == errno.EFBIG:
            raise StorageFullError(f"{said} ({exc.strerror}: see `ulimit -f`)") from exc
        raise


def room_for_copy(path: Path) -> AbstractContextManager[None]:
    """Return a context in which a file is unpacked to a temporary one; see `full_disk`."""
    return full_disk(
        f"no space left for a temporary copy of {path} in {tempfile.gettempdir()}; free some or "
        "set TMPDIR to a folder with room for what is in it"
    )


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise ArgumentError or StorageFullError for what the system says of a path to write to."""
    try:
        with full_disk(f"no space left while writing {path}"):
            yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise ArgumentError(f"{path} cannot be written: {reason}; choose another path") from exc


def sync(path: Path) -> None:
    """Have a file or folder written to its disk."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # which we may write to and not read; the data is in the file
            return
        raise
    try:
        os.fsync(fd)
    except OSError as exc:
        # Some network file systems refuse fsync on folders; the data itself is in the file.
        if exc.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)
