# SPDX-License-Identifier: Apache-2.0
"""What the library logs, as users of the program see it."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: The program with one more command, which logs as the library does.
PROGRAM = """
import logging
from pydedup.cli import app

{before}

@app.program.command()
def logging_one():
    {logs}

raise SystemExit(app.main(["logging-one"]))
"""


def said(logs: str, before: str = "") -> str:
    """Return what the program says of that on standard error."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(logs=logs, before=before)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert ended.stdout == ""
    return ended.stderr


@pytest.mark.parametrize("logger", ["pydedup", "pydedup.ray"])
def test_a_warning_is_a_line_of_the_program(logger: str) -> None:
    """It stood there without the program's name, which docs/cli.md promises."""
    logs = f"logging.getLogger({logger!r}).warning('one %s:\\n%s', 'connection', 'refused')"
    assert said(logs) == "pydedup: one connection: refused\n"


def test_a_traceback_stays_whole() -> None:
    """A request that failed is looked for by who runs the server."""
    logs = "logging.getLogger('pydedup.http').error('failed', exc_info=KeyError('x'))"
    assert said(logs).splitlines() == ["failed", "KeyError: 'x'"]


def test_what_others_log_is_not_the_programs() -> None:
    assert said("logging.getLogger('other').warning('theirs')") == "theirs\n"


def test_who_listens_gets_it_alone() -> None:
    before = "logging.basicConfig(format='%(name)s %(message)s')"
    assert said("logging.getLogger('pydedup').warning('one')", before) == "pydedup one\n"
