# SPDX-License-Identifier: Apache-2.0
"""Exceptions as one line on standard error, and the exit status that goes with each.

``PYDEDUP_TRACEBACK=1`` shows the traceback as well. Credentials are taken out of both.
"""

from __future__ import annotations

import contextlib
import difflib
import enum
import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterable, Iterator

import click

from pydedup.errors import (
    ArgumentError,
    BudgetError,
    DuplicateError,
    EvaluationError,
    FormatError,
    MissingStoreError,
    NotFoundError,
    PydedupError,
    QuotaError,
)
from pydedup.text import clean, without_secrets

__all__ = ["TRACEBACK_VARIABLE", "Exit", "no_such", "report", "warn", "warnings_told"]

TRACEBACK_VARIABLE = "PYDEDUP_TRACEBACK"
#: Of what an unexpected exception says, a line shows no more than this; a traceback shows all.
_LONGEST_FAULT = 200
#: What Python says where the system gives no thread.
_NO_THREAD = "can't start new thread"
#: What ends writing, of standard output for one, which may be closed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF)


class Exit(enum.IntEnum):
    """The exit statuses, as ``pydedup --help`` lists them."""

    OK = 0
    DIFFERENT = 1
    USAGE = 2
    NOT_FOUND = 3
    STORE = 4
    BAD_FILE = 5
    DUPLICATE = 6
    QUOTA = 7
    FAULT = 70
    HUNG_UP = 129
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143

    @property
    def meaning(self) -> str:
        """What it means, in a few words."""
        return _MEANINGS[self]

    @classmethod
    def of_signal(cls, number: int) -> Exit:
        """Return that of a command that a signal ended, as shells have it."""
        return cls(128 + number)


_MEANINGS = {
    Exit.OK: "all went well",
    Exit.DIFFERENT: "verify or refill left damage, a copy or backup left it out, diff found "
    "differences, or rm was declined",
    Exit.USAGE: "the command line or a value on it is wrong",
    Exit.NOT_FOUND: "no such store, model, version, alias, tensor, or file to read",
    Exit.STORE: "the store, its database, the file system or Ray failed",
    Exit.BAD_FILE: "a file is damaged, unsafe or of no known format, or an extra is missing",
    Exit.DUPLICATE: "that name@version is in the store already",
    Exit.QUOTA: "the add would take more than a quota allows",
    Exit.FAULT: "a fault of pydedup's own",
    Exit.HUNG_UP: "interrupted by SIGHUP, as when the terminal is closed",
    Exit.INTERRUPTED: "interrupted by Ctrl-C",
    Exit.BROKEN_PIPE: "whoever read the output went away",
    Exit.TERMINATED: "interrupted by SIGTERM",
}


def report(error: BaseException) -> Exit:
    """Say in one line what went wrong and return the exit status for it."""
    status, text = _describe(error)
    if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
        lines = "".join(traceback.format_exception(error))
        _write("\n".join(clean(line) for line in without_secrets(lines).splitlines()))
    _write(f"pydedup: error: {_one_line(text)}")
    return status


def warn(text: str) -> None:
    """Say something on standard error that is no result."""
    _write(f"pydedup: {_one_line(text)}")


@contextlib.contextmanager
def warnings_told() -> Iterator[None]:
    """Say what the library logs as this program says things, unless someone else listens."""
    log, teller = logging.getLogger("pydedup"), _Teller(logging.WARNING)
    if not log.hasHandlers():
        log.addHandler(teller)
    try:
        yield
    finally:
        log.removeHandler(teller)


class _Teller(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and logging.lastResort is not None:  # a request that failed: whole
            logging.lastResort.handle(record)
        else:
            warn(record.getMessage())


def _describe(error: BaseException) -> tuple[Exit, str]:
    if isinstance(error, click.ClickException):
        return Exit.USAGE, _usage(error)
    if isinstance(error, MissingStoreError):
        return Exit.NOT_FOUND, error.told("`pydedup add` creates one")
    if isinstance(error, BudgetError):
        # The pool knows only stores that are opened in Python.
        return Exit.USAGE, str(error).replace(
            "open the store with more memory", "give more with --memory"
        )
    if isinstance(error, PydedupError):
        return _status(error), str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return Exit.NOT_FOUND, _os_error(error)
    if isinstance(error, OSError):
        return Exit.STORE, _os_error(error)
    if isinstance(error, MemoryError):
        return Exit.STORE, "there is not enough memory; give less of it to --memory, or free some"
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        return Exit.STORE, (
            "the system gives this process no more threads: raise `ulimit -u`, or the limits of "
            "its container or service, of memory too"
        )
    said = f"{type(error).__name__}: {error}"
    if len(said) > _LONGEST_FAULT:
        said = said[:_LONGEST_FAULT] + "..."
    return Exit.FAULT, (
        f"unexpected {said}; this is a fault of pydedup: please report it with what "
        f"{TRACEBACK_VARIABLE}=1 shows"
    )


def _status(error: PydedupError) -> Exit:
    if isinstance(error, NotFoundError) or isinstance(error.__cause__, MissingStoreError):
        return Exit.NOT_FOUND
    if isinstance(error, DuplicateError):
        return Exit.DUPLICATE
    if isinstance(error, QuotaError):
        return Exit.QUOTA
    if isinstance(error, FormatError) or isinstance(error.__cause__, ImportError):
        return Exit.BAD_FILE
    if isinstance(error, (ArgumentError, EvaluationError)):
        return Exit.USAGE
    return Exit.STORE


def no_such(what: str, word: str, known: Iterable[str]) -> str:
    """Say that there is no such option or command, and which one comes nearest."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"no {what} {word!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _usage(error: click.ClickException) -> str:
    text = error.format_message()
    if isinstance(error, click.NoSuchOption):
        text = no_such("option", error.option_name, error.possibilities or ())
    if not text.endswith("..."):  # a sentence of click, not "and so on"
        text = text.rstrip(".")
    context = getattr(error, "ctx", None)
    if context is None:
        return text
    see = " See" if text.endswith("?") else "; see"
    return f"{text}{see} '{context.command_path} --help'"


def _os_error(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None and error.errno in _FULL:  # of what is not the store
        return f"cannot write the output: {reason}; what was done before stays"
    return reason if error.filename is None else f"{reason}: {error.filename!r}"


def _one_line(text: str) -> str:
    return clean(" ".join(without_secrets(text).split()))


def _write(text: str) -> None:
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        # Nobody reads it, but the exit status still counts. Python must not try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
