# SPDX-License-Identifier: Apache-2.0
"""MySQL and MariaDB: a store in tables of their own in a database of a server.

Here: all that needs the driver, mysql-connector-python, which is connecting and its errors.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final, cast

import mysql.connector
from mysql.connector.constants import ClientFlag

from pydedup.adapter import Adapter, Capabilities
from pydedup.errors import ArgumentError, PydedupError, without_frames

from ._connection import closed_on_error
from ._errors import CrowdedError
from ._mysql_base import MysqlBase
from ._mysql_cursors import PreparedConnection
from ._mysql_errors import meaning
from ._mysql_server import check_server, session_statements
from ._mysql_url import Place, locate
from ._mysql_waiting import interruptible
from ._sessions import Connection, SessionPool

__all__ = ["MysqlAdapter", "connect"]

#: What a URL cannot change.
ALWAYS: Final = {
    "autocommit": True,
    "allow_local_infile": False,  # a server could ask for any file of this machine
    "charset": "utf8mb4",
    "collation": "utf8mb4_bin",
    # An UPDATE counts what it found, changed or not; and one statement is sent at a time.
    "client_flags": [ClientFlag.FOUND_ROWS, -ClientFlag.MULTI_STATEMENTS],
    # A key 0 stays one in a user's table that counts its keys itself (AUTO_INCREMENT).
    "sql_mode": "STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,NO_AUTO_VALUE_ON_ZERO",
}

#: Of a connection that was used so lately, nobody asks whether it still stands.
TRUSTED_SECONDS: Final = 1.0

#: Placeholders in one statement: their number has 16 bits.
MOST_PARAMETERS: Final = 65535


def connect(url: str, *, mode: str, schema: str | None = None) -> Adapter:
    """Open ``mysql://user:password@host:port/database`` (or ``mariadb://``), which must exist.

    Options in the URL are ``timeout``, seconds to wait for another writer, ``prefix``, what the
    names of tables begin with (``pydedup_`` unless told otherwise), ``option_file``, which has the
    password, and those of the driver that ``_mysql_url`` lists, ``unix_socket`` and ``ssl_ca``
    among them.

    Parameters
    ----------
    schema
        The database, instead of the one in the URL: MySQL has one word for both.

    Raises
    ------
    ArgumentError
        For another form of URL.
    MissingStoreError
        With mode ``"r"``, when there are no tables.
    UnavailableError
        When the server cannot be reached, refuses the user, or has no such database.
    StoreError
        When the server is too old, or its ``max_allowed_packet`` too small.
    """
    adapter = MysqlAdapter(locate(url, schema), read_only=mode == "r")
    with closed_on_error(adapter):
        if mode == "r" and adapter.schema_version() is None:
            raise adapter.missing()
    return adapter


class MysqlAdapter(MysqlBase):
    """A store in a database of MySQL or MariaDB."""

    driver_error = mysql.connector.Error

    def __init__(self, place: Place, *, read_only: bool) -> None:
        self._place = place
        self._is_maria = False
        self._max_payload_bytes = 0
        self._reads_only = read_only
        pool = SessionPool(
            self._connect,
            name=place.url,
            is_stale=_is_stale,
            crowded=CrowdedError,
            shares=read_only,
        )
        with pool.acquire_first() as session:
            read_only = read_only or self._cannot_write(session)
            capabilities = Capabilities(
                max_payload_bytes=self._max_payload_bytes,
                max_parameters=MOST_PARAMETERS,
                concurrent_writers=True,
                shrinks=False,
            )
        super().__init__(
            place.url,
            dialect=self._dialect(),
            read_only=read_only,
            capabilities=capabilities,
            pool=pool,
        )

    def _connect(self) -> Connection:
        connection = None
        try:
            connection = interruptible(lambda: _connected_to(self._place))
            cursor = connection.cursor()  # closing one before its result is read hides a Ctrl-C
            # A limit of its own, which one of the server's does not cut.
            cursor.execute("SELECT VERSION(), @@SESSION.max_allowed_packet LIMIT 1")
            version, packet_bytes = cast(tuple[str, int], cursor.fetchone())
            self._is_maria = "mariadb" in version.lower()
            self._max_payload_bytes = check_server(version, packet_bytes, self._place)
            for statement in session_statements(
                version, self._place.timeout, read_only=self._reads_only
            ):
                cursor.execute(statement)
            cursor.close()
            return PreparedConnection(connection)
        except BaseException as error:
            if connection is not None:
                with contextlib.suppress(mysql.connector.Error):
                    connection.close()
            if isinstance(error, mysql.connector.Error):
                cause = without_frames(error)
                raise meaning(error, self._place, connected=connection is not None) from cause
            if isinstance(error, AttributeError) and connection is None:
                raise ArgumentError(
                    f"{self._place.url}: the driver refuses an option of the URL: {error}"
                ) from without_frames(error)
            if isinstance(error, ImportError):
                raise ArgumentError(
                    f"use_pure=false asks for the C extension of mysql-connector-python, which "
                    f"cannot be loaded ({error}); import mysql.connector before torch or "
                    "onnxruntime, or leave the option out"
                ) from without_frames(error)
            raise

    def _translate(self, error: Exception) -> PydedupError:
        return meaning(error, self._place)


def _connected_to(place: Place) -> Any:
    """Connect to a server, in the database of a place.

    The C extension greets with a charset that MariaDB 10.11 does not know; that then reads names
    in its own one, of which ASCII alone is certain. Once connected, both mean utf8mb4.
    """
    options = {**place.options, **ALWAYS}
    if place.database.isascii():
        return mysql.connector.connect(**options)
    del options["database"]
    connection: Any = mysql.connector.connect(**options)
    with closed_on_error(connection):
        connection.database = place.database
    return connection


def _is_stale(connection: Connection) -> bool:
    return cast(PreparedConnection, connection).is_lost(TRUSTED_SECONDS)
