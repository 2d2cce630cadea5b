# SPDX-License-Identifier: Apache-2.0
"""From the URL of a store to the adapter that opens it.

Adapters are named by strings and imported when a URL asks for them, so neither a driver nor
:mod:`pydedup.adapters` is loaded before. Packages of others register theirs in the entry-point
group ``pydedup.adapters``: the scheme of the URL as the name, and a function like
``connect(url, *, mode, schema=None) -> Adapter`` as the object. Names of ours cannot be taken.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, SupportsIndex, cast, get_args

from pydedup.adapter import Adapter
from pydedup.adapter_options import RowAdapter
from pydedup.errors import ArgumentError, not_installed
from pydedup.text import is_cut
from pydedup.words import OpenMode, check_word

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

__all__ = [
    "ENTRY_POINT_GROUP",
    "Connect",
    "absolute",
    "connect",
    "connect_rows",
    "file_url",
    "inside_postgres",
    "opened",
    "place_of",
    "redact",
    "replace_lost",
    "schemes",
    "sqlite_functions",
]

ENTRY_POINT_GROUP: Final = "pydedup.adapters"


class _Url(str):
    """The URL of a store, which may hold a password: what shows variables shows none."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(redact(str(self)))

    def __getitem__(self, part: SupportsIndex | slice) -> _Url:
        return _Url(super().__getitem__(part))  # what is shown of a long one


class Connect(Protocol):
    """What an adapter's package gives: a function that opens a database."""

    def __call__(self, url: str, *, mode: OpenMode, schema: str | None = None) -> Adapter:
        """Open the database at ``url``; ``mode`` is ``"a"`` or ``"r"``."""


@dataclass(frozen=True, slots=True)
class _BuiltIn:
    """An adapter of ours: where it is, and the extra that has its driver, where Python has none."""

    target: str
    extra: str = ""


_POSTGRES = _BuiltIn("pydedup.adapters.postgres:connect", "postgres")
_MYSQL = _BuiltIn("pydedup.adapters.mysql:connect", "mysql")
_BUILT_IN: Final = {
    "sqlite": _BuiltIn("pydedup.adapters.sqlite:connect"),
    "postgresql": _POSTGRES,
    "postgres": _POSTGRES,
    "postgresql+shards": _BuiltIn("pydedup.adapters.postgres_shards:connect", _POSTGRES.extra),
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}

#: What replaces a part of a store that is lost, where stores have parts.
_REPLACING: Final = {
    "postgresql+shards": _BuiltIn("pydedup.adapters.postgres_shards:replace_lost", _POSTGRES.extra),
}

#: A SQLite file that need be no store.
_USER_FILE: Final = _BuiltIn("pydedup.adapters._sqlite_user_file:connect")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
# A URL without its colon, or what libpq and others take for a connection: never a file to create.
_MISTYPED = re.compile(
    r"(?i)(postgres(ql)?(\+shards)?|mysql|mariadb|sqlite)//|(.*\s)?(password|dbname)\s*="
)
_OPTIONS = re.compile(r"\?\w+=[^?]*$")
_SECRETS = re.compile(r"(?i)([?&;](?:password|passwd|pwd|passphrase|sslpassword|token)=)[^&;#]*")


def entry_points(*, group: str) -> EntryPoints:
    """Return what packages registered. Reading that takes time, which schemes of ours need not."""
    from importlib import metadata

    return metadata.entry_points(group=group)


def schemes() -> list[str]:
    """Return the URL schemes that are known, those of other packages included."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def connect(url: str, *, mode: OpenMode, schema: str | None = None) -> Adapter:
    """Open a database.

    Parameters
    ----------
    url
        ``scheme://...``, or a plain path, which is a SQLite file.
    mode
        ``"a"`` to read and write, ``"r"`` only to read.
    schema
        Schema to live in, where the database has such a thing.

    Raises
    ------
    ArgumentError
        For an unknown scheme or mode, or when what the scheme needs is not installed; the
        message says how to install it.
    StoreError
        Whatever the adapter finds wrong, see :mod:`pydedup.errors`.
    """
    check_word("mode", mode, get_args(OpenMode))
    _check_schema(schema)
    scheme, url = _with_scheme(place_of(url))
    open_it = _find(scheme)
    try:
        return open_it(url, mode=mode, schema=schema)
    except ArgumentError as error:  # it was taking the URL apart
        raise error.with_traceback(None) from error.__cause__


@contextlib.contextmanager
def opened(url: str, *, mode: OpenMode) -> Iterator[Adapter]:
    """Open a database and close it again; raises what `connect` does."""
    adapter = connect(url, mode=mode)
    try:
        yield adapter
    finally:
        adapter.close()


def connect_rows(url: str) -> RowAdapter:
    """Open a database whose tables are a user's, and in which there need be no store.

    Raises what `connect` does, and ArgumentError where an adapter knows no tables of users.
    """
    scheme, url = _with_scheme(url)
    adapter = (_load(scheme, _USER_FILE) if scheme == "sqlite" else _find(scheme))(url, mode="a")
    if isinstance(adapter, RowAdapter):
        return adapter
    adapter.close()
    raise ArgumentError(f"the adapter for {scheme}:// knows no tables of users")


def replace_lost(url: str, *, schema: str | None = None) -> tuple[str, str] | None:
    """Let a new, empty place in the URL of a store with copies take over from one that is lost.

    Returns where the lost one was, and what has its place, ``None`` when there is nothing to
    replace. Raises ArgumentError when that cannot be, or the store has no such places.
    """
    _check_schema(schema)
    scheme, url = _with_scheme(url)
    if scheme not in _REPLACING:
        _find(scheme)
        raise ArgumentError(
            f"a store of {scheme}:// is in one place: it has no part that could be replaced"
        )
    replace = cast(Callable[..., tuple[str, str] | None], _load(scheme, _REPLACING[scheme]))
    return replace(url, schema=schema)


def inside_postgres(plpy: object, schema: str) -> tuple[Adapter, str | None, Callable[[], str]]:
    """Return the store in a schema of the PostgreSQL database that this runs in, by PL/Python.

    With it come the setting ``pydedup.memory`` of the session, ``None`` where there is none, and
    what tells who asks, as far as that decides which models there are.
    """
    module = importlib.import_module("pydedup.adapters._postgres_spi")
    return module.connect(plpy, schema), module.memory_setting(plpy), module.viewer(plpy, schema)


class SqliteFunctions(Protocol):
    """What there is for functions of ours on a connection of a user's to SQLite."""

    def bind(
        self, connection: object, functions: Sequence[tuple[str, int, bool, Callable[..., Any]]]
    ) -> None:
        """Make functions known: name, arguments, whether once per statement, what is called."""

    def main_file(self, connection: object) -> str:
        """Return the file of a connection."""

    def state(self, connection: object) -> tuple[str, str]:
        """Return id and epoch of the store in that file, as a statement under way sees it."""

    def as_seen(self, connection: object, url: str) -> Adapter:
        """Return the store in that file, to look models up as a statement under way sees them."""


def sqlite_functions() -> SqliteFunctions:
    """Return what there is for functions on a connection of a user's to SQLite."""
    module = importlib.import_module("pydedup.adapters._sqlite_functions")
    return cast(SqliteFunctions, module)


def _with_scheme(url: str) -> tuple[str, str]:
    """Return the scheme of a URL, and the URL; a plain path becomes one of SQLite."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        found = _SCHEME.match(url)
        if found or not url:
            raise ArgumentError(
                f"{redact(url)!r} is no URL of a store; write scheme://... (known: "
                f"{', '.join(schemes())}) or the path of a SQLite file"
            )
        if _MISTYPED.match(url):
            raise ArgumentError(
                "this is neither the URL of a store nor the path of one; write "
                "postgresql://user@host/database, mysql://user@host/database or the path of a "
                "SQLite file"
            )
        scheme, url = "sqlite", file_url(url)
    return scheme.lower(), url


def _check_schema(schema: object) -> None:
    """Raise ArgumentError for a schema that is no text."""
    if not isinstance(schema, str | None):
        raise ArgumentError(f"schema must be a text, not {schema!r}")
    try:
        (schema or "").encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"schema must be a text, not {schema!r}") from None


def place_of(given: str | os.PathLike[str]) -> str:
    """Return a URL or plain path as a text, whose repr shows no password.

    Functions that are given a URL put this in its place, so that tracebacks with variables show
    none, either. Raises ArgumentError for what is neither.
    """
    if isinstance(given, os.PathLike):
        return file_url(given)
    if not isinstance(given, str):
        raise ArgumentError(
            f"{given!r} is no store; give a URL such as 'sqlite:///models.db', or the path of a "
            "file"
        )
    try:
        os.fsencode(given)
    except UnicodeEncodeError:
        raise ArgumentError(f"{redact(given)!r} is no text that can name a store") from None
    return _Url(given)


def file_url(path: str | os.PathLike[str]) -> str:
    """Return the URL of a SQLite file.

    A text may end in options, ``models.db?timeout=5``; a path object is a file name as it is.
    """
    text = os.fsdecode(path)
    if "?" not in text or (isinstance(path, str) and _OPTIONS.search(text)):
        return f"sqlite:///{text}"
    return f"sqlite:///{text}?"  # with no options after it


def absolute(place: str | os.PathLike[str]) -> str:
    """Return a URL that means the same in other folders, where it is a file of SQLite."""
    url = place_of(place)
    found = re.fullmatch(r"sqlite:///(?!:memory:)([^/?].*)", url)
    if url and ":" not in url:
        return file_url(str(Path(url).absolute()))
    return f"sqlite:///{Path(found.group(1)).absolute()}" if found else url


def redact(url: str) -> str:
    """Return the URL with any password replaced by ``***``, for messages.

    A password that holds ``@``, ``/`` or ``?`` unescaped is hidden, too, at worst with the host.
    """
    head, separator, rest = url.partition("://")
    if head.lower().endswith("+shards") and "|" in rest:
        return f"{head}://{_redact_list(rest.split('|'))}"
    if not separator and "@" in url and ":" in url:  # mistyped; options may be secret, too
        return f"{url.partition(':')[0]}:***@{url.rpartition('@')[2].partition('?')[0]}"
    if separator and not rest.startswith("/"):
        location, mark, query = rest.partition("?")
        if "@" in query and ":" in location:
            # The "?" may be part of the password; an option with an "@" goes with it.
            location, mark, query = rest, "", ""
        user, at, place = location.rpartition("@")
        if at and ":" in user:
            location = f"{user.partition(':')[0]}:***@{place}"
        rest = f"{location}{mark}{query}"
    return _SECRETS.sub(r"\1***", f"{head}{separator}{rest}")


def _redact_list(parts: Sequence[str]) -> str:
    """Return the databases of a sharded store without passwords; none if one may hold ``|``."""
    if is_cut(parts):
        return "***"
    return "|".join(
        redact(part) if "://" in part else redact(f"x://{part}")[len("x://") :] for part in parts
    )


def _find(scheme: str) -> Connect:
    built_in = _BUILT_IN.get(scheme)
    if built_in is not None:
        return _load(scheme, built_in)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == scheme:
            return _load_point(point)
    known, _, driver = scheme.partition("+")
    if driver and known in _BUILT_IN:  # as SQLAlchemy has it
        raise ArgumentError(f"{scheme}:// is not known; write {known}://, without a driver")
    raise ArgumentError(f"{scheme}:// is not known; there are adapters for: {', '.join(schemes())}")


def _load(scheme: str, built_in: _BuiltIn) -> Connect:
    module, _, name = built_in.target.partition(":")
    try:
        return cast(Connect, getattr(importlib.import_module(module), name))
    except ImportError as error:
        if not built_in.extra:
            raise ArgumentError(
                f"{scheme}:// needs a Python that has sqlite3, and this one lacks it ({error})"
            ) from error
        raise ArgumentError(not_installed(f"{scheme}://", error, built_in.extra)) from error


def _load_point(point: EntryPoint) -> Connect:
    try:
        return cast(Connect, point.load())
    except (ImportError, AttributeError) as error:
        package = point.dist.name if point.dist is not None else point.value
        raise ArgumentError(
            f"the adapter for {point.name}:// of package {package} cannot be loaded ({error}); "
            "install it again, with what it needs"
        ) from error
