# SPDX-License-Identifier: Apache-2.0
"""A proxy in front of a database server that cuts connections in the middle of an answer."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from pathlib import Path
from typing import Self
from urllib.parse import parse_qsl, quote, urlsplit

__all__ = ["CuttingProxy"]

_PIECE_BYTES = 1 << 16
_PORTS = {"mysql": 3306, "mariadb": 3306}

#: A Unix socket, or a host and a port.
_Place = str | tuple[str, int]


class CuttingProxy:
    """Passes bytes between clients and a server, and cuts a connection when it is told to.

    A cut is the end of both connections, in the middle of whatever is under way.

    Parameters
    ----------
    url
        Of PostgreSQL or MySQL; the server may be named by its socket or by host and port.

    Attributes
    ----------
    url
        The same database, through the proxy.
    connections, cuts
        How many connections were made so far, and how many of them cut.
    """

    def __init__(self, url: str) -> None:
        self.connections = 0
        self.cuts = 0
        # A socket's path has at most 107 bytes, which pytest's folders may exceed.
        self._folder = tempfile.TemporaryDirectory()
        self._lock = threading.Lock()
        self._left: list[int] = []
        self._listen(url)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _listen(self, url: str) -> None:
        """Take the server's place, by the same kind of socket."""
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        login, at, _ = parts.netloc.rpartition("@")
        host, port = parts.hostname or "localhost", parts.port or _PORTS.get(parts.scheme, 5432)
        if parts.scheme in _PORTS:
            path = options.get("unix_socket")
        else:
            host, port = options.get("host", host), int(options.pop("port", port))
            path = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else None
            options["host"] = "127.0.0.1" if path is None else self._folder.name
        self._target: _Place = (host, port) if path is None else path
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            login += f"{at}127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            own = Path(self._folder.name) / Path(path).name
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(own))
            self._listener.listen()
            login += at
            options |= {"unix_socket": str(own)} if parts.scheme in _PORTS else {"port": str(port)}
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items())
        self.url = parts._replace(netloc=login, query=query).geturl()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
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
        self._folder.cleanup()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), _connection(self._target) as server:
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


def _connection(place: _Place) -> socket.socket:
    if not isinstance(place, str):
        return socket.create_connection(place)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(place)
    except BaseException:
        connection.close()
        raise
    return connection
