# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium that opens pages and says what it made of them. For tests.

Driven by its own DevTools protocol over two pipes, so nothing but the browser is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["Browser", "BrowserMissingError", "Page", "chromium"]

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 60
#: Where the browser expects its pipes.
_READS, _WRITES = 3, 4


class BrowserMissingError(Exception):
    """There is no Chromium here."""


class Browser:
    """A running browser."""

    def __init__(self, pid: int, reads: int, writes: int) -> None:
        self._pid = pid
        self._reads, self._writes = reads, writes
        self._number = 0
        self._rest = b""
        #: What it told without being asked, oldest first.
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **given: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come first are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": given}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writes, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def wait_for(self, method: str, session: str) -> None:
        """Wait for an event of a page, unless it was there already."""
        while not any(
            event.get("method") == method and event.get("sessionId") == session
            for event in self.events
        ):
            self.events.append(self._next())

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Open a page in a window of this size."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.ask("Emulation.setEmulatedMedia", features=[scheme])
        page.ask("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired", session)
        return page

    def stop(self) -> None:
        """End it."""
        with contextlib.suppress(OSError, AssertionError):
            self.ask("Browser.close")
        end = time.monotonic() + 10
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(self._pid, signal.SIGKILL)
            time.sleep(0.05)
        os.close(self._reads)
        os.close(self._writes)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reads], [], [], max(end - time.monotonic(), 0))
            assert ready, f"the browser said nothing for {_SECONDS} s"
            piece = os.read(self._reads, 1 << 20)
            assert piece, "the browser went away"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told


class Page:
    """An open page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def ask(self, method: str, **given: Any) -> dict[str, Any]:
        """Send a command about this page."""
        return self._browser.ask(method, self._session, **given)

    def resize(self, width: int, height: int) -> None:
        """Give the window another size; up to 500 points wide it is a phone."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width <= 500,
        )

    def run(self, script: str) -> Any:
        """Return the value of an expression of JavaScript."""
        done = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    @property
    def complaints(self) -> list[str]:
        """What was written to the console, by the page or the browser."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._told(*kinds)]

    @property
    def requests(self) -> list[str]:
        """The URLs that were asked for, the page itself first."""
        told = self._told("Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in told]

    def _told(self, *methods: str) -> Iterator[dict[str, Any]]:
        self.ask("Runtime.evaluate", expression="0")  # what is under way comes before the answer
        for event in self._browser.events:
            if event.get("sessionId") == self._session and event["method"] in methods:
                yield event


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser until the block ends. Raises BrowserMissingError."""
    program = next((found for found in map(shutil.which, _NAMES) if found), None)
    if program is None:
        raise BrowserMissingError("there is no Chromium here; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory(
        prefix="pydedup-browser-", ignore_cleanup_errors=True
    ) as folder:
        commands, writes = (_out_of_the_way(end) for end in os.pipe())
        reads, answers = (_out_of_the_way(end) for end in os.pipe())
        quiet = os.open(os.devnull, os.O_RDWR)
        words = [
            program,
            "--headless",
            "--no-sandbox",  # which root cannot have; the pages are ours
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            "about:blank",
        ]
        moves = [(commands, _READS), (answers, _WRITES), (quiet, 0), (quiet, 1), (quiet, 2)]
        pid = os.posix_spawn(
            program,
            words,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, end, place) for end, place in moves],
        )
        for end in (commands, answers, quiet):
            os.close(end)
        browser = Browser(pid, reads, writes)
        try:
            yield browser
        finally:
            browser.stop()


def _out_of_the_way(end: int) -> int:
    """Return a file descriptor that is none of those that the browser gets."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved
