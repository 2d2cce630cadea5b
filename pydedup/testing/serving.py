# SPDX-License-Identifier: Apache-2.0
"""A real ``pydedup serve`` as a child process, and plain requests to it. For tests of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any, Final

__all__ = ["Answer", "Busy", "Server", "Start", "serving", "until"]

#: What does not come within so many seconds does not come on a slow machine either.
_PATIENCE_SECONDS: Final = 100


@dataclass
class Answer:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an error, whose form is checked here."""
        assert self.status >= 400, self.body
        assert self.headers["content-type"] == "application/json"
        assert list(self.json) == ["error"]
        text = self.json["error"]
        assert isinstance(text, str)
        assert text
        return text


@dataclass
class Server:
    """A child process that serves."""

    process: subprocess.Popen[str]
    url: str
    hello: list[str]
    port: int = 0
    errors: list[str] = field(default_factory=list)
    #: Fills ``errors``.
    reader: threading.Thread | None = field(default=None, repr=False)

    def connect(
        self, timeout: float = _PATIENCE_SECONDS, trust: Path | None = None
    ) -> HTTPConnection:
        """Return a connection; ``trust`` is the certificate to expect of TLS."""
        if trust is None:
            return HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        context = ssl.create_default_context(cafile=str(trust))
        return HTTPSConnection("127.0.0.1", self.port, timeout=timeout, context=context)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        connection: HTTPConnection | None = None,
    ) -> Answer:
        """Send one request, on a connection of its own unless one is given."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        using = self.connect() if connection is None else connection
        try:
            using.request(method, path, body, dict(headers or {}))
            answer = using.getresponse()
            lower = {key.lower(): value for key, value in answer.getheaders()}
            return Answer(answer.status, lower, answer.read())
        finally:
            if connection is None:
                using.close()

    def infer(self, name: str, body: bytes | dict[str, Any], **options: Any) -> Answer:
        """Ask a model."""
        return self.ask("POST", f"/v2/models/{name}/infer", body, **options)

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of one line of /metrics, 0 where there is none."""
        wanted = ",".join(f'{key}="{value}"' for key, value in labels.items())
        line = f"{name}{{{wanted}}}" if labels else name
        for text in self.ask("GET", "/metrics").body.decode().splitlines():
            if text.startswith(line + " "):
                return float(text.rpartition(" ")[2])
        return 0.0

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process; returns its exit status. ``errors`` is complete then."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(_PATIENCE_SECONDS)
        if self.reader is not None:
            self.reader.join(_PATIENCE_SECONDS)
        return status


Start = Callable[..., Server]
#: Keeps a thread of a server busy until a block ends, and gives the answer to come.
Busy = Callable[[Server], contextlib.AbstractContextManager[Future[Answer]]]


def until(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(
    url: str,
    *options: object,
    env: Mapping[str, str] | None = None,
    status: int = 0,
    open_files: int | None = None,
) -> Iterator[Server]:
    """Serve a store on a free port until the block ends; it must stop with ``status``.

    ``open_files`` is a limit for the process.
    """
    limited = [] if open_files is None else ["sh", "-c", f'ulimit -n {open_files}; exec "$@"', "sh"]
    command = [sys.executable, "-P", "-m", "pydedup", "serve", url, "--port", "0"]
    clean = {key: value for key, value in os.environ.items() if key != "PYDEDUP_TOKEN"}
    process = subprocess.Popen(
        [*limited, *command, *map(str, options)],
        env={**clean, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    errors: list[str] = []
    assert process.stderr is not None
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        hello = [process.stdout.readline().rstrip("\n") for _ in range(3)]
        found = re.search(r"https?://127\.0\.0\.1:(\d+)", hello[1])
        if found is None:
            process.wait(_PATIENCE_SECONDS)
            reader.join(_PATIENCE_SECONDS)
            raise AssertionError(f"the server did not start: {hello} {errors}")
        server = Server(process, found.group(), hello, int(found.group(1)), errors, reader)
        yield server
        assert server.stop() == status, errors
        assert "Traceback" not in "".join(errors), "".join(errors)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        reader.join(_PATIENCE_SECONDS)
        process.stderr.close()
