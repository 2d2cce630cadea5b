# SPDX-License-Identifier: Apache-2.0
"""TLS: its certificate, and a bound on connections that are still at their handshake.

Each of them has a file, and is no connection to uvicorn yet, which counts those it knows.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from pydedup.errors import ArgumentError
from pydedup.http.options import ServeOptions

__all__ = ["Loop", "certificate"]

#: How long an end of TLS waits for the client's.
_GOODBYE_SECONDS = 1.0
#: Before a connection is taken again where there was no file for one.
_PAUSE_SECONDS = 0.1


class Loop(uvloop.Loop):
    """An event loop whose TLS connections keep their files no longer than others do.

    Parameters
    ----------
    handshake_seconds
        How long a handshake may take.
    most_handshakes
        How many may be under way; of more, the oldest is given up.
    """

    def __init__(self, handshake_seconds: float, most_handshakes: int) -> None:
        super().__init__()
        self._handshake_seconds = handshake_seconds
        self._most_handshakes = most_handshakes

    async def create_server(
        self, protocol_factory: Callable[[], Any], *args: Any, **options: Any
    ) -> Any:
        """Listen, for TLS on the socket that is given."""
        context = options.get("ssl")
        if context is None:
            return await super().create_server(protocol_factory, *args, **options)
        handshake = functools.partial(
            self.connect_accepted_socket,
            protocol_factory,
            ssl=context,
            # For a silent client others wait 60 s as it begins, and 30 s as it ends.
            ssl_handshake_timeout=self._handshake_seconds,
            ssl_shutdown_timeout=_GOODBYE_SECONDS,
        )
        return _Greeter(self, options["sock"], handshake, self._most_handshakes)


class _Greeter:
    """What takes connections of TLS; to uvicorn, one of its servers."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        handshake: Callable[..., Coroutine[Any, Any, object]],
        most: int,
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._handshake = handshake
        self._most = most
        #: The handshakes under way, and their connections; the oldest come first.
        self._under_way: dict[asyncio.Task[object], socket.socket] = {}
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._take)

    def _take(self) -> None:
        try:
            taken, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # its client is gone
        except OSError:  # as where no file is left; it would be tried again at once, and on end
            self._loop.remove_reader(self._listener)
            self._pause = self._loop.call_later(_PAUSE_SECONDS, self._listen)
            return
        taken.setblocking(False)
        task = self._loop.create_task(self._handshake(sock=taken))
        self._under_way[task] = taken
        task.add_done_callback(self._greeted)
        if len(self._under_way) > self._most:
            oldest = next(iter(self._under_way))
            self._under_way.pop(oldest).close()  # as soon as its transport is closed
            oldest.cancel()

    def _greeted(self, task: asyncio.Task[object]) -> None:
        taken = self._under_way.pop(task, None)
        if (task.cancelled() or task.exception() is not None) and taken is not None:
            taken.close()

    def close(self) -> None:
        """Take no more connections, and give up those that are not there yet."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)
        for task in self._under_way:
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait until all handshakes have ended."""
        while self._under_way:
            await asyncio.wait(list(self._under_way))


def certificate(options: ServeOptions) -> dict[str, Any]:
    """Return the certificate and its key as uvicorn takes them; nothing where TLS is not wanted.

    Raises ArgumentError when they cannot be used.
    """
    if options.tls_cert is None and options.tls_key is None:
        return {}
    if options.tls_cert is None or options.tls_key is None:
        raise ArgumentError("TLS needs both a certificate and its key")
    asked: list[bool] = []

    def password() -> bytes:
        asked.append(True)
        return b""

    try:
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trial.load_cert_chain(options.tls_cert, options.tls_key, password=password)
    except (OSError, ValueError) as error:
        if asked:
            raise ArgumentError(
                f"the key {options.tls_key} has a password; write it without: openssl pkey -in "
                f"{options.tls_key} -out NEW"
            ) from error
        places = f"{options.tls_cert} and {options.tls_key}"
        raise ArgumentError(f"no certificate with its key in {places}: {error}") from error
    return {"ssl_certfile": str(options.tls_cert), "ssl_keyfile": str(options.tls_key)}
