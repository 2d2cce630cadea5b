# SPDX-License-Identifier: Apache-2.0
"""A trial run of the HDF5 library over a file, in a process that may die of it.

The library follows addresses in a file without checking all of them: a single flipped bit can
make it crash or run for ever (HDF5 2.0 does, for instance, on a heap object of size 0). So before
this process opens a file, another one looks at everything in it. Only that the trial ends is
asked; what is wrong with a file is said by whoever opens it afterwards.

The lower half runs as a script and must not import pydedup, whose import costs more than the
trial itself.
"""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Window", "survives"]

#: CPU time for any file, and the bytes for which it gets another second. Walking a file with
#: 10,000 datasets takes about 4 s, and those take at least 5 MB.
_SECONDS, _BYTES_PER_SECOND = 5, 4 << 20


def survives(fd: int, offset: int, size: int) -> bool:
    """Return whether the HDF5 library gets through the file in a range of an open descriptor.

    Where no interpreter can be started (Python embedded in another program), it is taken for
    granted.
    """
    if not Path(sys.executable or "").name.startswith("python"):
        return True
    seconds = _SECONDS + size // _BYTES_PER_SECOND
    # -P: this file's folder has modules called torch and onnx.
    command = [sys.executable, "-P", __file__, *map(str, (fd, offset, size, seconds))]
    try:
        done = subprocess.run(
            command,
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    except OSError:
        return True
    return done.returncode >= 0  # negative: killed by a signal


class Window(io.RawIOBase):
    """A seekable file over a range of bytes that ``read(offset, count)`` gives."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        """Return true."""
        return True

    def seekable(self) -> bool:
        """Return true."""
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Move, as files do."""
        self._at = max(0, (0, self._at, self._size)[whence] + position)
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as the range goes."""
        n_bytes = max(0, min(len(buffer), self._size - self._at))
        buffer[:n_bytes] = self._read(self._at, n_bytes)
        self._at += n_bytes
        return n_bytes


def _look(item: Any) -> None:
    """Make the library decode everything that it knows of one object, and its contents."""
    import h5py  # type: ignore[import-untyped]
    import numpy as np

    for name in item.attrs:
        attribute = item.attrs.get_id(name)
        if attribute.shape is not None:
            attribute.read(np.empty(attribute.shape, attribute.dtype))
    if not isinstance(item, h5py.Dataset) or item.shape is None:
        return
    plain = item.chunks is None and item.dtype.kind not in "OS" and not item.dtype.fields
    item.id.get_offset()
    stored = item.id.get_storage_size()
    if not plain and not item.external and not item.is_virtual:
        n_bytes = item.dtype.itemsize
        for extent in item.shape:
            n_bytes *= extent
        if n_bytes <= (1 << 20) + 1100 * stored:
            item[()]


def _walk(group: Any, seen: set[int]) -> None:
    import h5py

    pending = [group]
    while pending:
        current = pending.pop()
        try:
            _look(current)
            names = list(current) if isinstance(current, h5py.Group) else []
        except Exception:
            continue
        for name in names:
            try:
                if not isinstance(current.get(name, getlink=True), h5py.HardLink):
                    continue
                item = current[name]
                address = int(h5py.h5o.get_info(item.id).addr)
            except Exception:
                continue
            if address not in seen:
                seen.add(address)
                pending.append(item)


def _main(fd: int, offset: int, size: int, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    import h5py

    def read(at: int, n_bytes: int) -> bytes:
        return os.pread(fd, n_bytes, offset + at).ljust(n_bytes, b"\0")

    try:
        with h5py.File(io.BufferedReader(Window(read, size), 1 << 16), "r") as file:
            _walk(file, set())
    except Exception:
        return


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:5]))
