# SPDX-License-Identifier: Apache-2.0
"""The program ``pydedup``, run by tests: in a process of its own, or in theirs.

`run_process` is what users do: half a second to start, most of it to import. `run_here` gives the
same in the process of the test, in a hundredth of that, where only what is printed and the status
count. What concerns processes wants the former: signals, terminals, streams that are closed or
full, what is imported, environment variables that are read when pydedup is loaded.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

__all__ = ["PROGRAM", "clean_environment", "run_here", "run_process"]

#: The program as a process.
PROGRAM = (sys.executable, "-P", "-m", "pydedup")
#: What would change how something looks or, with the last, is written to a pipe that breaks.
_STYLE = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED")


def clean_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment without what changes how output looks, and with ``env``."""
    kept = {name: value for name, value in os.environ.items() if name not in _STYLE}
    return {**kept, **(env or {})}


def run_process(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    input: str = "",
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, which shows warnings."""
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        env=clean_environment({"PYTHONWARNINGS": "default", **(env or {})}),
        cwd=cwd,
        input=input,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_here(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    input: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run the program in this process; what warns there is an error, if it is one in the test."""
    words = [*map(str, arguments)]
    out, err = _stream(), _stream()
    status: object = 0
    with (
        mock.patch.dict(os.environ, clean_environment(env), clear=True),
        contextlib.chdir(cwd or Path.cwd()),
        _own_imports(),
        mock.patch.multiple(sys, argv=["pydedup", *words], stdin=_stream(input)),
        # With options of its user's, the program leaves warnings as they are.
        mock.patch.object(sys, "warnoptions", ["default"]),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _own_interrupts(),
    ):
        try:
            runpy.run_module("pydedup", run_name="__main__")
        except SystemExit as done:
            status = done.code
    assert isinstance(status, int), status
    return subprocess.CompletedProcess(words, status, _text(out), _text(err))


def _stream(text: str = "") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8", newline="")


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """Have Ctrl-C do what it did before, where it would end the process at the program's end."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _own_imports() -> Iterator[None]:
    """Forget what is imported from the working folder, as ``--evaluate`` does."""
    here = Path.cwd()
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == here:
                del sys.modules[name]
