# SPDX-License-Identifier: Apache-2.0
"""When a read is tried again whose connection is lost, by a clock of the tests' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pydedup.adapters import _again
from pydedup.adapters._errors import ConnectionLostError


class Server:
    """A server that is away from a moment on for a while, and what reads of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, away: tuple[float, float]) -> None:
        self.now, self.tries, self.away = 1000.0, 0, away
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(_again, "time", clock)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def read(self, reader: Any, seconds: float, *, connected: bool = True) -> str:
        """Read for so long at the first try; what fails does so at once."""
        pool = SimpleNamespace(scope=lambda: None, has_own=lambda: connected)

        def read() -> str:
            self.tries += 1
            if self.tries == 1:
                self.now += seconds
            if self.away[0] <= self.now < self.away[1]:
                raise ConnectionLostError("gone")
            return "read"

        reader._pool = pool
        return _again.ReadsAgain._again(reader, read)


@pytest.mark.parametrize(
    ("gave_up_at", "connected"), [(1050.0, True), (1050.0, False), (999.5, True)]
)
def test_a_read_that_ran_for_long_waits_whatever_another_thread_gave_up(
    monkeypatch: pytest.MonkeyPatch, gave_up_at: float, connected: bool
) -> None:
    """While it ran, or just before it: it was tried once more, and failed at once."""
    server = Server(monkeypatch, away=(1060, 1065))
    reader = SimpleNamespace(_gave_up_at=gave_up_at)
    assert server.read(reader, 60, connected=connected) == "read"
    assert server.tries > 3


@pytest.mark.parametrize(("connected", "tries"), [(True, 2), (False, 1)])
def test_who_asks_soon_after_a_wait_in_vain_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, connected: bool, tries: int
) -> None:
    server = Server(monkeypatch, away=(0, 9999))
    with pytest.raises(ConnectionLostError):
        server.read(SimpleNamespace(_gave_up_at=999.5), 0, connected=connected)
    assert (server.tries, server.now) == (tries, 1000)


def test_a_read_is_tried_for_ten_seconds_from_its_failure_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(monkeypatch, away=(1030, 9999))
    reader = SimpleNamespace(_gave_up_at=0.0)
    with pytest.raises(ConnectionLostError):
        server.read(reader, 30)
    assert 1039 <= server.now <= 1040
    assert reader._gave_up_at == server.now
