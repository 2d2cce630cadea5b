# SPDX-License-Identifier: Apache-2.0
"""URLs of PostgreSQL: what is libpq's, what is ours, and what may be shown of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from pydedup.errors import ArgumentError

from ._url import seconds_of

__all__ = ["SCHEMA", "Place", "locate"]

#: Where a store lives unless told otherwise.
SCHEMA: Final = "pydedup"
#: Unless the URL says otherwise: an address that does not answer is given up after 10 seconds, a
#: server that falls silent, as when its host lost its power, after a minute.
_DEFAULTS: Final = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",  # where it was sent something; else the system tries 15 minutes
}

#: Parameters of libpq that say where a database is, and so are shown.
_SHOWN: Final = ("host", "hostaddr", "port", "dbname", "user", "service")
#: A host, perhaps an IPv6 address in brackets, and a port; both may be missing.
_HOST: Final = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:[0-9]*)?")
#: Letters and digits of ASCII alone: it is written into statements.
_SCHEMA_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")

_UNREADABLE: Final = (
    "the URL of the PostgreSQL database cannot be read; write "
    "postgresql://user:password@host:port/database, with %40 for @, %2F for / and %3F for ? in "
    "the user, password and database, and name=value&name=value after the ?"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a store is.

    Attributes
    ----------
    conninfo
        What libpq is given; it may hold a password.
    shown
        The same for people: without passwords and keys.
    schema
        The schema that the tables are in.
    timeout
        Seconds to wait for another writer; ``None`` leaves it to the server where that has a
        limit.
    """

    conninfo: str
    shown: str
    schema: str
    timeout: float | None

    def __repr__(self) -> str:
        return f"Place({self.shown!r})"


def locate(
    url: str, schema: str | None, known: Collection[str], also: Collection[str] = ()
) -> Place:
    """Take a URL apart: ``?schema=`` and ``?timeout=`` are ours, all the rest is libpq's.

    Parameters
    ----------
    known
        The parameters that libpq knows.
    also
        Those that the caller has taken, which may be meant by one that nobody knows.

    Raises
    ------
    ArgumentError
        For what is no URL of libpq, or one whose password is not percent-encoded, a parameter
        that nobody knows, or a schema or timeout that cannot be.
    """
    rest, _, query = url.partition("://")[2].partition("?")
    location, _, database = rest.partition("/")
    parameters = [part for part in query.split("&") if part]
    user, at, host = location.rpartition("@")
    # An "@" elsewhere than before the host, or a port that is none, means that a "/" or "?" was
    # part of the password; so nothing of such a URL is ever shown.
    if (
        "@" in user + database
        or not all(_HOST.fullmatch(one) for one in host.split(","))
        or any("=" not in part for part in parameters)
    ):
        raise ArgumentError(_UNREADABLE)
    ours: dict[str, str] = {}
    theirs, shown = [], []
    for part in parameters:
        name, _, value = part.partition("=")
        if name in ("schema", "timeout"):
            ours[name] = unquote(value)
            continue
        if unquote(name) not in known and name != "ssl":  # ssl=true is JDBC's sslmode=require
            # With an "@" behind it, or beside a password, it may be a piece of one.
            may_be = "@" in query or "password=" in query
            raise ArgumentError(_UNREADABLE if may_be else _unknown(name, [*also, *known]))
        if name == "connect_timeout" and not re.fullmatch("[0-9]{1,9}", value):
            raise ArgumentError(f"connect_timeout={value} must be a whole number of seconds")
        theirs.append(part)
        if name in _SHOWN:
            shown.append(part)
    given = {part.partition("=")[0] for part in theirs}
    theirs += [f"{name}={value}" for name, value in _DEFAULTS.items() if name in {*known} - given]
    schema = _checked_schema(schema, ours.get("schema"))
    if schema != SCHEMA:
        shown.append(f"schema={schema}")
    return Place(
        # Without the "/", libpq would take what stands before an "@" in an option for the user.
        conninfo=f"postgresql://{location}/{database}?{'&'.join(theirs)}",
        shown=f"postgresql://{user.partition(':')[0]}{at}{host}/{database}"
        + (f"?{'&'.join(shown)}" if shown else ""),
        schema=schema,
        timeout=_checked_timeout(ours.get("timeout")),
    )


def _unknown(name: str, known: Collection[str]) -> str:
    """Say of a parameter that it is not known, and which one may be meant."""
    close = difflib.get_close_matches(name, ["schema", "timeout", *known], n=1)
    hint = f"did you mean {close[0]}?" if close else "there are schema, timeout and those of libpq"
    return f"the URL of the PostgreSQL database has an option {name!r} that is not known; {hint}"


def _checked_schema(argument: str | None, parameter: str | None) -> str:
    if argument is not None and parameter is not None and argument != parameter:
        raise ArgumentError(
            f"schema={argument!r} was given, and schema={parameter} in the URL; give one of them"
        )
    name = argument if argument is not None else parameter
    name = SCHEMA if name is None else name
    reserved = name.lower().startswith("pg_") or name.lower() == "information_schema"
    if reserved or not _SCHEMA_NAME.fullmatch(name):
        raise ArgumentError(
            f"schema {name!r} cannot hold a store; take up to 63 letters, digits and underscores, "
            "not beginning with a digit or pg_"
        )
    return name


def _checked_timeout(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return seconds_of(value)
    except ValueError as error:
        raise ArgumentError(f"timeout={value} must be {error}") from None
