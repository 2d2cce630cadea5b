# SPDX-License-Identifier: Apache-2.0
"""Programs on a terminal of their own, for tests of how they look."""

from __future__ import annotations

import os
import pty
import struct
import subprocess
import termios
from collections.abc import Sequence
from fcntl import ioctl

from pydedup.testing.program import clean_environment

__all__ = ["environment", "read_all", "run_on_terminal"]


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a terminal that can do all, and says nothing of its size."""
    return clean_environment({"TERM": "xterm-256color", "COLORTERM": "", **extra})


def read_all(master: int) -> str:
    """Return what is written to a terminal until its last writer has gone."""
    written = bytearray()
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # EIO: Linux says so when the last writer is gone
            break
        if not piece:
            break
        written += piece
    os.close(master)
    return written.decode()


def run_on_terminal(
    command: Sequence[str], columns: int = 80, answer: str = "", **extra: str
) -> tuple[int, str]:
    """Run a command on a terminal of its own; returns its status and all that it wrote.

    ``answer`` is typed at its start, ``extra`` are environment variables.
    """
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment(**extra)
    )
    os.close(slave)
    if answer:
        os.write(master, answer.encode())
    shown = read_all(master)
    return process.wait(60), shown
