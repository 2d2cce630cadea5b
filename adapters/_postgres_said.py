# SPDX-License-Identifier: Apache-2.0
"""What an error says, in one line, and the SQLSTATE of a server that refuses a connection.

What such a server says in words may be in any language. libpq keeps no code of a connection that
failed, but writes it into the message when told to, and can be told so between the beginning of a
connection and its end. psycopg has no such moment, nor the function; so once a connection was
refused, libpq itself is asked to make another.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import select
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import psycopg
from psycopg import pq

__all__ = ["said", "sqlstate_of"]

#: Of libpq.h, since PostgreSQL 12: a message is its severity and the code.
PQERRORS_SQLSTATE: Final = 3
#: A server that refuses does so at once. One that takes longer is not asked again, or waited for.
SECONDS: Final = 1.0
_PURE: Final = "psycopg.pq._pq_ctypes"
#: What psycopg puts before what libpq says, and before what it says of each of several hosts.
_BEFORE: Final = re.compile(r"(- host: .*?: )?connection (failed|is bad): ")
_CODE: Final = re.compile(r":  ([0-9A-Z]{5})\s*$")


def said(error: Exception) -> str:
    """Return what an error says, in one line."""
    diagnosis = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    lines = [_BEFORE.sub("", line, 1) for line in (diagnosis or str(error)).splitlines()]
    # libpq says the same of each of its attempts, with TLS and without, psycopg of the last of
    # several hosts twice. Hints, which are indented, are for people at a shell; there is our own
    # advice.
    told = (
        " ".join(line.split()).rstrip(".")
        for line in lines
        if not line.startswith(("\t", "Multiple connection attempts failed"))
    )
    return "; ".join(dict.fromkeys(filter(None, told))) or type(error).__name__


def sqlstate_of(conninfo: str, refused_after: float) -> str | None:
    """Return with which SQLSTATE a server refuses a connection.

    Parameters
    ----------
    conninfo
        With which one was refused.
    refused_after
        How many seconds that took.

    Returns
    -------
    ``None`` where no server answers, it does not refuse this time, or libpq is out of reach.
    """
    set_verbosity = _set_verbosity()
    if refused_after > SECONDS or set_verbosity is None:
        return None
    pgconn: Any = pq.PGconn.connect_start(conninfo.encode())
    try:
        if pgconn.status == pq.ConnStatus.BAD:
            return None
        set_verbosity(pgconn.pgconn_ptr, PQERRORS_SQLSTATE)
        if not _fails(pgconn):
            return None
        found = _CODE.search(pgconn.get_error_message())
        return None if found is None else found.group(1)
    finally:
        pgconn.finish()


def _fails(pgconn: Any) -> bool:
    """See a connection to its end; whether that is an error, and comes soon."""
    end = time.monotonic() + SECONDS
    while (state := pgconn.connect_poll()) not in (pq.PollingStatus.OK, pq.PollingStatus.FAILED):
        poll = select.poll()
        reads = state == pq.PollingStatus.READING
        poll.register(pgconn.socket, select.POLLIN if reads else select.POLLOUT)
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            return False
    return bool(state == pq.PollingStatus.FAILED)


@functools.cache
def _set_verbosity() -> Callable[[Any, int], int] | None:
    """Return PQsetErrorVerbosity of the libpq that psycopg uses."""
    # Never another libpq: it would not know the connections of this one. Of the compiled psycopg a
    # module is linked to it; the other one has loaded it like this.
    with contextlib.suppress(AttributeError, KeyError, OSError):
        file = str(sys.modules[pq.PGconn.__module__].__file__)
        library = ctypes.CDLL(file) if file.endswith(".so") else sys.modules[_PURE].pq
        function = library.PQsetErrorVerbosity
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int], ctypes.c_int
        return function
    return None
