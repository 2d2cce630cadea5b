# SPDX-License-Identifier: Apache-2.0
"""The URL of a MySQL or MariaDB database: what it names, and the options that it may hold.

Nothing here connects, and nothing here repeats a password. One that the URL lacks is that of the
option file which it names, or of ``MYSQL_PWD``, as for MySQL's own programs.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, quote, unquote, urlsplit

from pydedup.errors import ArgumentError

from ._mysql_option_file import password_in
from ._schema import PREFIX
from ._url import TIMEOUT_SECONDS, seconds_of

__all__ = ["Place", "locate"]

#: An address that does not answer is given up then, unless the URL says otherwise: the driver
#: would wait for ever.
CONNECT_SECONDS: Final = 10

#: Names on a server that ignores case are in lower case.
_A_PREFIX: Final = re.compile(r"[a-z][a-z0-9_]{0,19}")

FORM: Final = "mysql://user:password@host:port/database"
_UNREADABLE: Final = (
    f"this is no URL of a MySQL database; write {FORM}, with special characters of the names and "
    "the password percent-encoded"
)


@dataclass(frozen=True, slots=True)
class Place:
    """A database, and how to get there."""

    url: str
    """Without the password and the options, for messages."""
    database: str
    timeout: float
    """Seconds to wait for another writer."""
    prefix: str
    """What the names of tables and views begin with."""
    options: Mapping[str, Any] = field(repr=False)
    """Arguments of ``mysql.connector.connect``, the password among them."""


def locate(url: str, schema: str | None = None) -> Place:
    """Return the place that a URL names; ``schema``, if given, is the database.

    User, password, database and options are percent-decoded. Raises ArgumentError for another form,
    or an option that is not known.
    """
    parts, port = _split(url)
    database = unquote(parts.path.removeprefix("/")) if schema is None else schema
    user = unquote(parts.username or "")
    host = parts.hostname or "localhost"
    place = f"[{host}]" if ":" in host else host
    if user:
        place = f"{user}@{place}"
    shown = f"{parts.scheme}://{place}{f':{port}' if port else ''}/{quote(database)}"
    if not database or "\0" in database or (schema is None and "/" in database):
        raise ArgumentError(f"{shown} names no database; write {FORM}")
    options: dict[str, Any] = {"host": unquote(host), "database": database}
    options |= {"port": port} if port else {}
    options |= {"user": user} if user else {}
    options |= {} if parts.password is None else {"password": unquote(parts.password)}
    timeout, prefix = TIMEOUT_SECONDS, PREFIX
    for part in filter(None, parts.query.split("&")):
        name, _, value = map(unquote, part.partition("="))
        if name == "timeout":
            timeout = _option(shown, name, value, _seconds)
        elif name == "prefix":
            prefix = _option(shown, name, value, _prefix)
        elif name == "option_file":
            options.setdefault("password", _option(shown, name, value, password_in))
        elif name in _OPTIONS:
            key, parse = _OPTIONS[name]
            options[key] = _option(shown, name, value, parse)
        elif "password=" in parts.query:  # it may be a piece of that
            raise ArgumentError(_UNREADABLE)
        else:
            known = sorted({"option_file", "prefix", "timeout", *_OPTIONS})
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
            raise ArgumentError(f"{shown}: option {name!r} is not known; {hint}")
    options.setdefault("connection_timeout", CONNECT_SECONDS)
    if "MYSQL_PWD" in os.environ:
        options.setdefault("password", os.environ["MYSQL_PWD"])
    _settle_tls(shown, options)
    told = [f"unix_socket={options['unix_socket']}"] if "unix_socket" in options else []
    told += [f"prefix={prefix}"] if prefix != PREFIX else []
    shown = f"{shown}?{'&'.join(told)}" if told else shown
    return Place(shown, database, timeout, prefix, options)


def _split(url: str) -> tuple[SplitResult, int | None]:
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        port = parts.port
        # After a password with a special character, or one "/" too many, comes a piece of it.
        misplaced = "@" in parts.path + parts.query.partition("=")[0]
        # Behind a "#" would be a part of a name or option that nobody read.
        if not (misplaced or parts.fragment or "\0" in unquote(url)):
            return parts, port
    # What is wrong may be a part of the password.
    raise ArgumentError(_UNREADABLE)


def _settle_tls(shown: str, options: dict[str, Any]) -> None:
    """Check certificates where the URL names an authority; the driver alone would not."""
    for name in ("ssl_ca", "ssl_cert", "ssl_key"):
        if name in options and not Path(options[name]).is_file():
            raise ArgumentError(f"{shown}: {name} names no file: {options[name]!r}")
    asked = [name for name in options if name.startswith("ssl_") and options[name]]
    if options.get("ssl_disabled") and len(asked) > 1:
        asked.remove("ssl_disabled")
        raise ArgumentError(f"{shown}: {asked[0]} asks for TLS, and ssl_disabled=true forbids it")
    if "ssl_ca" in options:
        options.setdefault("ssl_verify_cert", True)
        return
    for name in ("ssl_verify_cert", "ssl_verify_identity"):
        if options.get(name):
            raise ArgumentError(f"{shown}: {name} needs ssl_ca, the file of an authority")


def _option(shown: str, name: str, value: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise ArgumentError(f"{shown}: {name} must be {error}") from None


def _prefix(value: str) -> str:
    if not _A_PREFIX.fullmatch(value):
        raise ValueError(
            "1 to 20 lower-case letters, digits and underscores, a letter first, as in acme_"
        )
    return value


def _seconds(value: str) -> float:
    try:
        return seconds_of(value)
    except ValueError as error:
        raise ValueError(f"{error}, not {value!r}") from None


def _whole_seconds(value: str) -> int:
    return max(1, round(_seconds(value)))


def _flag(value: str) -> bool:
    if value.lower() in ("1", "true", "yes"):
        return True
    if value.lower() in ("0", "false", "no"):
        return False
    raise ValueError(f"true or false, not {value!r}")


def _words(value: str) -> list[str]:
    return value.split(",")


#: Option of the URL -> argument of the driver, and how its value is read.
_OPTIONS: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "auth_plugin": ("auth_plugin", str),
    "compress": ("compress", _flag),
    "connect_timeout": ("connection_timeout", _whole_seconds),
    "password": ("password", str),
    "read_timeout": ("read_timeout", _whole_seconds),
    "ssl_ca": ("ssl_ca", str),
    "ssl_cert": ("ssl_cert", str),
    "ssl_disabled": ("ssl_disabled", _flag),
    "ssl_key": ("ssl_key", str),
    "ssl_verify_cert": ("ssl_verify_cert", _flag),
    "ssl_verify_identity": ("ssl_verify_identity", _flag),
    "tls_versions": ("tls_versions", _words),
    "unix_socket": ("unix_socket", str),
    "use_pure": ("use_pure", _flag),
    "write_timeout": ("write_timeout", _whole_seconds),
}
