# SPDX-License-Identifier: Apache-2.0
"""The server: its socket, its event loop, and how it stops.

SIGTERM, SIGINT or SIGHUP: new requests are answered with 503, those under way finish, the process
ends. A second signal, or the end of the grace period, cuts off what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn

from pydedup.errors import ArgumentError
from pydedup.http.access import AccessLog, Gate
from pydedup.http.app import App
from pydedup.http.options import ServeOptions
from pydedup.http.protocol import LimitedProtocol
from pydedup.http.served import ServedStore
from pydedup.http.tls import Loop, certificate

__all__ = ["SWITCH_SECONDS", "listen", "serve", "stopping_signals", "url_of"]

#: How long Python lets one thread run while others wait: at its 5 ms, threads that predict would
#: hold up the event loop.
SWITCH_SECONDS = 0.0005
_IDLE_SECONDS = 75
_BACKLOG = 1024
#: Of the connections, where they are of TLS, this part may be at the handshake.
_AT_HANDSHAKE = 1 / 4
#: Files of a connection to a store in SQLite: the database, its log, what readers share.
_FILES_OF_A_READER = 3


def serve(store: ServedStore, options: ServeOptions, started: Callable[[str], None]) -> int:
    """Serve a store until a signal says to stop.

    Parameters
    ----------
    store
        Closed by the caller.
    started
        Called with the server's URL as soon as it answers.

    Returns
    -------
    int
        How many requests were cut off when it stopped.

    Raises
    ------
    ArgumentError
        When the certificate or its key cannot be used, or the host has no possible name.
    OSError
        When the address cannot be had.
    """
    log = AccessLog() if options.access_log else None
    app = App(store, options, Gate(options.token), log)
    _quiet_loggers()
    seconds = min(LimitedProtocol.head_seconds, options.timeout)
    secured = certificate(options)
    most = _most_connections(options.threads)
    handshakes = max(1, int(most * _AT_HANDSHAKE)) if secured else 0
    limits = {"head_seconds": seconds, "most_connections": most - handshakes}
    protocol = type("Protocol", (LimitedProtocol,), limits)
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=1,
        **secured,
    )
    switch = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        with listen(options.host, options.port) as listener:
            url = url_of(*listener.getsockname()[:2], secured=bool(secured))
            server = _Server(config, app, options.grace, lambda: started(url))
            loop = functools.partial(Loop, seconds, handshakes)
            with asyncio.Runner(loop_factory=loop) as runner:
                runner.run(server.serve(sockets=[listener]))
    finally:
        sys.setswitchinterval(switch)
        app.close()
        if log is not None:
            log.close()
    return server.cut_off


class _Server(uvicorn.Server):
    """uvicorn's server, which stops as the module says."""

    def __init__(
        self, config: uvicorn.Config, app: App, grace: float, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._app = app
        self._grace = grace
        self._started = started
        self._stopping: asyncio.Task[None] | None = None
        #: Requests that had no answer yet when the time was up.
        self.cut_off = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the loop, and do not raise them again when all is done."""
        loop = asyncio.get_running_loop()
        for number in stopping_signals():
            loop.add_signal_handler(number, self._stop)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._started()

    def _stop(self) -> None:
        if self._app.draining:
            self._end(force=True)
            return
        self._app.draining = True
        self._stopping = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace
        while self._app.under_way and loop.time() < end and not self.should_exit:
            await asyncio.sleep(0.02)
        self._end(force=False)

    def _end(self, *, force: bool) -> None:
        self.cut_off = self._app.under_way
        if self.cut_off:
            self.config.timeout_graceful_shutdown = 0
        self.force_exit = force
        self.should_exit = True


def stopping_signals() -> list[int]:
    """Return the signals that stop a server: SIGHUP is one unless it is ignored, as by `nohup`."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


def listen(host: str, port: int) -> socket.socket:
    """Take a port, which nobody else may share. Raises OSError, and ArgumentError for the host."""
    place = f"{host}, port {port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {place}: {error.strerror}") from error
    except UnicodeError:  # an empty label, or one that is too long
        raise ArgumentError(f"{host!r} is no name of a host") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        other = "; choose another port" if error.errno == errno.EADDRINUSE else ""
        raise OSError(error.errno, f"cannot listen on {place}: {error.strerror}{other}") from error
    return listener


def url_of(host: str, port: int, *, secured: bool) -> str:
    """Return the URL of a server."""
    return f"http{'s' if secured else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def _most_connections(threads: int) -> int:
    """Raise the limit of open files as far as it goes, and return how many are for connections.

    Kept for the process are those of the store's readers (docs/http.md: five, and three a thread),
    and as many for all else; of a very low limit half.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        limit = most
    if limit == resource.RLIM_INFINITY:
        return LimitedProtocol.most_connections
    kept = 2 * _FILES_OF_A_READER * (5 + 3 * threads)
    return max(limit - kept, limit // 2)


def _quiet_loggers() -> None:
    """Say nothing of what clients do wrong; faults of ours go to standard error."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
