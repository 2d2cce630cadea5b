# SPDX-License-Identifier: Apache-2.0
"""Calls that are ended when they take too long."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable

import pytest

from pydedup.ingest import overtime
from pydedup.ingest.overtime import Overtime, ended_after


def endless() -> None:
    while True:
        time.sleep(0.001)


def test_what_returns_in_time_is_given_back_and_what_it_raises_is_raised() -> None:
    def fails() -> None:
        raise KeyError("mine")

    assert ended_after(600, lambda: 7, "it") == 7
    with pytest.raises(KeyError, match="mine"):
        ended_after(600, fails, "it")


def test_it_is_ended_in_any_thread_and_nothing_comes_later() -> None:
    ended: list[object] = []

    def work() -> None:
        for _ in range(20):
            try:
                ended.append(ended_after(0.001, endless, "it"))
            except Overtime:
                ended.append("over")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == ["over"] * 20


def test_an_end_at_the_very_last_moment_raises_here_or_not_at_all() -> None:
    """Never behind the call, in the hands of whoever runs next."""
    for round_number in range(300):
        seconds = round_number % 10 / 20_000
        try:
            ended_after(seconds, lambda: sum(range(1000)), "it")
        except Overtime:
            continue


def test_a_call_is_not_made_before_it_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that ran only after its call had ended was sent what the next one sent."""
    begun: list[str] = []

    def late(run: Callable[[], None], arguments: tuple[()]) -> int:
        def body() -> None:
            time.sleep(0.05)
            begun.append("the watch")
            run(*arguments)

        return start_new_thread(body, ())

    monkeypatch.setattr(overtime, "start_new_thread", late)
    assert ended_after(600, begun.copy, "it") == ["the watch"]


def test_what_went_to_another_thread_is_sent_again() -> None:
    """Who had called waited for it for ever."""
    code = """
import contextlib
from pydedup.ingest import overtime

def endless():
    while True:
        pass

send, sent = overtime._send, []

def send_all_but_one(thread):
    sent.append(thread)
    if len(sent) != 2:
        send(thread)

overtime._send = send_all_but_one
with contextlib.suppress(overtime.Overtime):
    overtime.ended_after(0.01, endless, "it")
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=100)


def test_who_catches_it_is_sent_it_again_and_it_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(overtime, "_PAUSE_SECONDS", 0.02)
    caught = []

    def stubborn() -> None:
        while len(caught) < 3:
            try:
                endless()
            except Overtime:
                caught.append(1)
        endless()

    with caplog.at_level(logging.WARNING, "pydedup"), pytest.raises(Overtime):
        ended_after(0.01, stubborn, "evaluate")
    (record,) = caplog.records
    assert record.getMessage().startswith("evaluate takes longer than 0 seconds, and does not")


@pytest.mark.parametrize("call", ["ended_after(600, int, 'it')", "over()"])
def test_the_interpreter_looks_for_nothing_afterwards(call: str) -> None:
    """An error that was taken back was looked for at each step: under a profiler that hung."""
    code = f"""
import contextlib, sys
from pydedup.ingest.overtime import Overtime, ended_after

def endless():
    while True:
        pass

def over():
    with contextlib.suppress(Overtime):
        ended_after(0.01, endless, "it")

def numbers():
    yield 1

{call}
sys.setprofile(lambda *event: None)
list(numbers())
sys.setprofile(None)
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=100)
