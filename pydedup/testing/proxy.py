# SPDX-License-Identifier: Apache-2.0
"""A proxy in front of a server's Unix socket that cuts connections in the middle of an answer."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["CuttingProxy"]

_PIECE_BYTES = 1 << 16


class CuttingProxy:
    """Passes bytes between clients and a server, and cuts a connection when it is told to.

    A cut is the end of both connections, in the middle of whatever is under way.

    Parameters
    ----------
    path
        The socket to listen on.
    target
        The socket of the server.

    Attributes
    ----------
    connections, cuts
        How many connections were made so far, and how many of them cut.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.connections = 0
        self.cuts = 0
        self._path, self._target = path, target
        self._lock = threading.Lock()
        self._left: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def cut_after(self, *counts: int) -> None:
        """Cut once the server has sent so many bytes from now on; then after the next count."""
        with self._lock:
            self._left = list(counts)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        self._path.unlink()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            server.connect(str(self._target))
            threads = [
                threading.Thread(target=self._carry, args=(client, server, False), daemon=True),
                threading.Thread(target=self._carry, args=(server, client, True), daemon=True),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _carry(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE_BYTES):
                keep = self._kept(len(piece)) if counted else len(piece)
                sink.sendall(piece[:keep])
                if keep < len(piece):
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _kept(self, size: int) -> int:
        """Return how many of so many bytes may pass."""
        with self._lock:
            if not self._left:
                return size
            if size <= self._left[0]:
                self._left[0] -= size
                return size
            self.cuts += 1
            return self._left.pop(0)
