# SPDX-License-Identifier: Apache-2.0
"""What adapters tell each other beside :mod:`pydedup.errors`; to users they are errors of those."""

from __future__ import annotations

from pydedup.errors import ConflictError, StoreError, UnavailableError

__all__ = [
    "CancelledError",
    "ConnectionLostError",
    "CrowdedError",
    "DeniedError",
    "KeyTakenError",
]


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
