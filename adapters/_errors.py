# SPDX-License-Identifier: Apache-2.0
"""What adapters tell each other beside :mod:`pydedup.errors`; to users they are errors of those."""

from __future__ import annotations

from typing import TypeVar

from pydedup.errors import ConflictError, StoreError, UnavailableError

__all__ = [
    "CancelledError",
    "ConnectionLostError",
    "CrowdedError",
    "DeniedError",
    "KeyTakenError",
    "without_frames",
]

_E = TypeVar("_E", bound=BaseException)


class KeyTakenError(StoreError):
    """A row of this key exists already; what a unique index reports."""


class CancelledError(ConflictError):
    """The database gave up a transaction for another; it may be run again."""


class DeniedError(StoreError):
    """The user lacks a privilege."""


class ConnectionLostError(UnavailableError):
    """The connection is gone, or there never was one: what was read may be read again."""


class CrowdedError(ConnectionLostError):
    """The server gives no more connections, to anybody or to this user."""


def without_frames(error: _E) -> _E:
    """Return an error, and what led to it, without frames, whose variables it would keep.

    Of what a driver raised as it connected these hold passwords, which tracebacks that show
    variables, as those of rich and pytest do, would show. Of an error that is kept, frames of who
    called have pages in use.
    """
    ahead: list[BaseException | None] = [error]
    seen = set[int]()  # a cause is most often the context as well
    while ahead:
        one = ahead.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            ahead += [one.__cause__, one.__context__]
    return error
