# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: what a server complains of, and what users are told."""

from __future__ import annotations

import dataclasses
import re
import secrets
import socket
import threading
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from mysql.connector import HAVE_CEXT

import pydedup
from pydedup import registry
from pydedup.adapter import Adapter
from pydedup.adapter_options import RowColumn
from pydedup.adapters import _mysql_url
from pydedup.adapters._errors import (
    CancelledError,
    ConnectionLostError,
    CrowdedError,
    DeniedError,
    KeyTakenError,
)
from pydedup.adapters._mysql_errors import DefinedError
from pydedup.errors import (
    ArgumentError,
    ConflictError,
    CorruptStoreError,
    NotAStoreError,
    PydedupError,
    ReadOnlyError,
    StorageFullError,
    StoreError,
    UnavailableError,
)
from pydedup.testing._contract_base import with_option
from pydedup.testing.mysql_servers import mysql_connection

both_drivers = pytest.mark.parametrize("pure", [True, False] if HAVE_CEXT else [True])
PASSWORD = "s3cret%40%2F%3A%26%3F%23%25"


def at(url: str, database: str) -> str:
    """Another database of the same server."""
    return urlsplit(url)._replace(path=f"/{database}").geturl()


def told(error: BaseException) -> str:
    """All that a traceback shows."""
    return "".join(traceback.format_exception(error))


def test_a_wrong_password_is_told_and_not_shown(user: Any) -> None:
    user.grant("ALL")
    adapter = registry.connect(user.url, mode="a")
    assert adapter.schema_version() is None
    assert "s3cret" not in f"{adapter.url} {adapter!r} {adapter.__dict__}"
    adapter.close()
    wrong = secrets.token_hex(8)
    with pytest.raises(UnavailableError, match="check the user and the password") as caught:
        registry.connect(user.url_with(wrong), mode="a")
    assert wrong not in told(caught.value)


@both_drivers
def test_who_must_come_by_tls_is_told(url: str, user: Any, run: Any, pure: bool) -> None:
    """The server itself says no more than of a wrong password."""
    user.grant("ALL")
    ((_, port),) = run(url, f"ALTER USER {user.name} REQUIRE SSL", "SHOW VARIABLES LIKE 'port'")

    def by_tcp(url: str) -> str:
        parts = urlsplit(url)
        login, database = parts.netloc.rpartition("@")[0], parts.path
        return f"mysql://{login}@127.0.0.1:{port}{database}?use_pure={pure}"

    place = by_tcp(user.url)
    registry.connect(place, mode="a").close()
    with pytest.raises(UnavailableError, match=r"REQUIRE SSL .* leave out ssl_disabled"):
        registry.connect(f"{place}&ssl_disabled=true", mode="a")
    with pytest.raises(UnavailableError, match=r"the user may do$"):
        registry.connect(by_tcp(user.url_with("wrong")), mode="a")


@both_drivers
def test_a_missing_database_comes_with_what_creates_it(url: str, pure: bool) -> None:
    with pytest.raises(UnavailableError, match=r"CREATE DATABASE `not_there` CHARACTER SET utf8"):
        registry.connect(with_option(at(url, "not_there"), f"use_pure={pure}"), mode="a")


def test_schema_names_the_database(url: str, mysql_url: str, run: Any) -> None:
    name = urlsplit(url).path.strip("/")
    for place in (mysql_url, at(mysql_url, "")):
        adapter = registry.connect(place, mode="a", schema=name)
        try:
            adapter.create_schema({})
            assert f"/{name}" in adapter.url
        finally:
            adapter.close()
    assert ("pydedup_meta",) in run(url, "SHOW TABLES")


@both_drivers
def test_a_server_that_is_not_there(tmp_path: Path, pure: bool) -> None:
    place = f"mysql://ann:{PASSWORD}@localhost/db?use_pure={pure}"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        port = closed.getsockname()[1]
        for there in (
            f"{place}&unix_socket={tmp_path}/none.sock",
            place.replace("localhost", f"127.0.0.1:{port}"),
        ):
            with pytest.raises(UnavailableError, match="check that the server runs") as caught:
                registry.connect(there, mode="a")
            assert "s3cret" not in told(caught.value)


@both_drivers
def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch, pure: bool) -> None:
    """It was waited for without end."""
    monkeypatch.setattr(_mysql_url, "CONNECT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"mysql://ann@127.0.0.1:{silent.getsockname()[1]}/db?use_pure={pure}"
        with pytest.raises(UnavailableError, match="check that the server runs"):
            registry.connect(place, mode="a")


@both_drivers
def test_a_statement_that_takes_longer_than_read_timeout(
    url: str, monkeypatch: pytest.MonkeyPatch, pure: bool
) -> None:
    """The driver without its C extension gave several lines, and we a limit of the server's."""
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.0)
    pydedup.open(url).close()
    with pydedup.open(with_option(url, f"use_pure={pure}&read_timeout=1"), mode="r") as store:
        assert store.models() == []
        with mysql_connection(url) as other, other.cursor() as cursor:
            cursor.execute("LOCK TABLES pydedup_models WRITE")
            with pytest.raises(UnavailableError, match="check that the server runs") as caught:
                store.models()
        said = str(caught.value)
        assert "\n" not in said
        assert not pure or "did not answer in time; where it is slow, raise read_timeout" in said
        assert store.models() == []


@both_drivers
def test_users_that_are_not_let_in_are_told_why(url: str, user: Any, run: Any, pure: bool) -> None:
    place = with_option(user.url, f"use_pure={pure}")
    with pytest.raises(UnavailableError, match=r"to database '.*grant this user SELECT"):
        registry.connect(place, mode="a")
    user.grant("ALL")
    run(url, f"ALTER USER {user.name} WITH MAX_USER_CONNECTIONS 1")
    adapter = registry.connect(place, mode="a")
    try:
        with pytest.raises(UnavailableError, match="raise max_connections") as caught:
            registry.connect(place, mode="a")
        assert "server runs" not in str(caught.value)
    finally:
        adapter.close()
    with pytest.raises(UnavailableError, match="check the user"):
        registry.connect(place.replace(user.name, "nobody"), mode="a")
    with pytest.raises(UnavailableError, match="check the host") as caught:
        # Of any name, also one that looks like a complaint of TLS.
        registry.connect(f"mysql://me@certificate.SSL.invalid/db?use_pure={pure}", mode="a")
    assert "server runs" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("mysql://u:s3cret@host", "no database"),
        ("mysql://u:s3cret@host/", "no database"),
        ("mysql://u:s3cret@host/a/b", "no database"),
        ("mysql://u:s3cret@host:port/db", "no URL of a MySQL database"),
        ("mysql://u:s3cret@[host/db", "no URL of a MySQL database"),
        ("mysql://u:a@s3cret/b@host/db", "no URL of a MySQL database"),
        ("mysql://u:a@s3cret/b@host", "no URL of a MySQL database"),
        ("mysql://u:a@s3cret?b@host/db", "no URL of a MySQL database"),
        ("mysql://u:a@s3cret/b#c@host/db", "no URL of a MySQL database"),
        ("mysql:///u:s3cret@host/db", "no URL of a MySQL database"),
        ("mysql://u:s3cret%00@host/db", "no URL of a MySQL database"),
        ("mysql://u@host/db?password=s3cret%00", "no URL of a MySQL database"),
        ("mysql://u@host/db?password=a&s3cret=b", "no URL of a MySQL database"),
        ("mysql://u@host/db?password=a&s3cret", "no URL of a MySQL database"),
        ("mysql://u:s3cret@host/db?tmeout=1", "'tmeout' is not known; did you mean timeout"),
        ("mysql://u:s3cret@host/db?colour=1", "'colour' is not known; there are: auth_plugin, .*"),
        ("mysql://u:s3cret@host/db?timeout=soon", "soon"),
        ("mysql://u:s3cret@host/db?ssl_verify_cert=maybe", "maybe"),
        ("mysql://u@host/db?password=s3cret&timeout=-1", "-1"),
        ("mysql://u:s3cret@host/db#1", "percent-encoded"),
        ("mysql://u@host/db?password=1#s3cret", "percent-encoded"),
        ("mysql://u:s3cret@host/db?ssl_ca=/no/such/file", "ssl_ca names no file"),
        ("mysql://u:s3cret@host/db?ssl_verify_cert=true", "needs ssl_ca"),
        ("mysql://u:s3cret@host/db?ssl_verify_identity=true", "needs ssl_ca"),
        ("mysql://u:s3cret@host/db?ssl_key=/no/such+%66ile", "'/no/such\\+file'"),
        ("mysql://u:s3cret@host/db?ssl_cert=/no/such/file", "ssl_cert names no file"),
        (f"mysql://u:s3cret@host/db?ssl_ca={__file__}&ssl_disabled=true", "ssl_ca asks for TLS"),
        ("mysql://u:s3cret@host/db?tls_versions=TLSv1.1", r"no longer allowed[^()]*\([^()]*\)\.$"),
        ("mysql://u:s3cret@host/db?tls_versions=bogus", "refuses an option"),
    ],
)
def test_wrong_urls_are_told_without_the_password(place: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said) as caught:
        registry.connect(place, mode="a")
    assert "s3cret" not in told(caught.value)


#: Numbers of the server's errors -> what they are to a user, and what he is told to do.
NUMBERS: dict[int, tuple[type[PydedupError], str]] = {
    **dict.fromkeys((1020, 1213, 1412, 1613, 1614), (CancelledError, "try again")),
    **dict.fromkeys((1205, 3572), (ConflictError, "timeout=seconds")),
    **dict.fromkeys((1021, 1114), (StorageFullError, "free some space")),
    **dict.fromkeys((1036, 1290, 1792, 1836, 3100), (ReadOnlyError, "make this one writable")),
    **dict.fromkeys((1040, 1203), (CrowdedError, "raise max_connections")),
    **dict.fromkeys((1044, 1227), (DeniedError, "grant it to this user")),
    **dict.fromkeys((1045, 1698, 1820), (UnavailableError, "check the user and the password")),
    1130: (UnavailableError, "let this user connect from this host"),
    **dict.fromkeys((3118, 3955, 4151), (UnavailableError, "ALTER USER ... ACCOUNT UNLOCK")),
    4150: (UnavailableError, "FLUSH PRIVILEGES"),
    3032: (ConnectionLostError, "SET GLOBAL offline_mode = OFF"),
    **dict.fromkeys((4082, 4083), (UnavailableError, "raise connection_memory_limit")),
    **dict.fromkeys((1969, 3024), (UnavailableError, "raise max_statement_time")),
    **dict.fromkeys((1053, 1927, 4031), (ConnectionLostError, "check that the server runs")),
    1047: (UnavailableError, "wsrep_cluster_status"),
    1129: (ConnectionLostError, "FLUSH HOSTS .* TRUNCATE TABLE performance_schema.host_cache"),
    1226: (UnavailableError, "wait for the hour to pass, .* raise this limit"),
    1317: (UnavailableError, "it was stopped"),
    1461: (UnavailableError, "raise max_prepared_stmt_count"),
    1135: (CrowdedError, "raise its limits .* or use fewer clients"),
    **dict.fromkeys((1037, 1041), (UnavailableError, "no memory left: let it have more")),
    1038: (UnavailableError, "raise sort_buffer_size"),
    1206: (UnavailableError, "raise innodb_buffer_pool_size"),
    3159: (UnavailableError, "begin with ssl_"),
    **dict.fromkeys((1050, 1060, 1061), (DefinedError, "drop it")),
    **dict.fromkeys((1054, 1146, 1356), (NotAStoreError, "restore a backup")),
    **dict.fromkeys((1062, 1586), (KeyTakenError, "there is a row of this key")),
    **dict.fromkeys((1032, 1034, 1194, 1195, 1712, 1877), (CorruptStoreError, "pydedup verify")),
    **dict.fromkeys((1048, 1264, 1366, 1406), (ArgumentError, "does not take this value")),
    **dict.fromkeys((1153, 1162, 1301), (StoreError, "raise the server's max_allowed_packet")),
    1644: (StoreError, "1644"),
}


def test_numbers_of_errors_have_meanings(adapter: Adapter) -> None:
    for number, (kind, advice) in NUMBERS.items():
        fields = f"MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'as the server'"
        statement = f"SIGNAL SQLSTATE '45000' SET {fields}"
        with pytest.raises(kind, match=f"as the server.*{advice}") as caught, adapter.transaction():
            adapter._write(statement)  # type: ignore[attr-defined]
        assert type(caught.value) is kind
        assert type(caught.value.__cause__).__module__.startswith("mysql.connector")
        with adapter.transaction():
            adapter.bump_epoch()


@pytest.mark.parametrize(
    ("number", "said", "is_full"),
    [
        (3, """Error writing file '/tmp/ML1' (Errcode: 28 "No space left on device")""", True),
        (1026, "Error writing file 'a' (OS errno 122 - Disk quota exceeded)", True),
        (1030, 'Got error 28 "No space left on device" from storage engine InnoDB', True),
        (1030, "Got error 28 - 'No space left on device' from storage engine", True),
        (3, """Error writing file '/tmp/ML28 - 1' (Errcode: 5 "Input/output error")""", False),
        (1026, "Error writing file 'ML122' (OS errno 5 - Input/output error)", False),
        (1030, "Got error 122 - 'Internal (unspecified) error in handler'", False),
        (1030, 'Got error 128 "Out of memory in engine" from storage engine InnoDB', False),
    ],
)
def test_an_error_of_a_file_is_no_full_disk_because_of_its_name(
    adapter: Adapter, number: int, said: str, is_full: bool
) -> None:
    text = said.replace("'", "''")
    statement = f"SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = '{text}'"
    with pytest.raises(StoreError, match=re.escape(said)) as caught, adapter.transaction():
        adapter._write(statement)  # type: ignore[attr-defined]
    assert isinstance(caught.value, StorageFullError) == is_full


def test_half_of_a_character_is_refused(adapter: Adapter) -> None:
    """The C extension ended the process."""
    with pytest.raises(ArgumentError, match="no valid Unicode"):
        adapter.model_called("m", "a\ud800")
    with pytest.raises(ArgumentError, match="no valid Unicode"), adapter.transaction():
        adapter.set_meta("x", "\udfff")
    with adapter.transaction():
        adapter.set_meta("x", "\uffff")
    assert adapter.meta()["x"] == "\uffff"


@pytest.mark.parametrize(
    ("number", "said", "advice"),
    [
        (1071, "Specified key was too long", "innodb_page_size of 16384"),
        (1290, "running with the NO_ENGINE_SUBSTITUTION option", "see enforce_storage_engine"),
        (1290, "running with the --read-only option", "write to the primary server"),
    ],
)
def test_what_to_do_about_a_server_that_cannot_have_a_store(
    adapter: Adapter, number: int, said: str, advice: str
) -> None:
    """That it was to be set writable was said of one that takes no InnoDB."""
    fields = f"MYSQL_ERRNO = {number}, MESSAGE_TEXT = '{said}'"
    with pytest.raises(StoreError, match=f"{said}; .*{advice}") as caught, adapter.transaction():
        adapter._write(f"SIGNAL SQLSTATE '45000' SET {fields}")  # type: ignore[attr-defined]
    assert isinstance(caught.value, ReadOnlyError) == ("primary" in advice)


@pytest.mark.usefixtures("of_mariadb")
def test_a_server_that_makes_tables_of_another_engine_is_refused(url: str, run: Any) -> None:
    run(url, "SET GLOBAL enforce_storage_engine = Aria")
    try:
        with pytest.raises(StoreError, match="a store needs InnoDB"):
            pydedup.open(url)
    finally:
        run(url, "SET GLOBAL enforce_storage_engine = DEFAULT")
    pydedup.open(url).close()


def test_a_server_that_logs_statements_alone_is_told_what_to_set(adapter: Adapter) -> None:
    """One writes none of InnoDB's at our level; ours has no log to write to."""
    statement = "SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = 1665"
    with pytest.raises(StoreError, match="MIXED or ROW"), adapter.transaction():
        adapter._write(statement)  # type: ignore[attr-defined]


def test_a_deadlock_is_a_conflict(adapter: Adapter) -> None:
    with adapter.transaction():
        adapter.set_meta("a", "")
        adapter.set_meta("b", "")
    barrier = threading.Barrier(2)
    errors: list[PydedupError] = []

    def change(first: str, second: str) -> None:
        try:
            with adapter.transaction():
                adapter.set_meta(first, first)
                barrier.wait(30)
                adapter.set_meta(second, first)
        except ConflictError as error:
            errors.append(error)

    threads = [threading.Thread(target=change, args=names) for names in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(errors) == 1
    meta = adapter.meta()
    assert meta["a"] == meta["b"] != ""


@pytest.mark.usefixtures("of_mariadb")
def test_a_serialisation_failure_is_a_conflict(adapter: Adapter, url: str, run: Any) -> None:
    """Of the server's own making, at a level and with a setting where it has them."""
    if not run(url, "SHOW VARIABLES LIKE 'innodb_snapshot_isolation'"):
        pytest.skip("MariaDB has this setting since 10.11.8")
    statements = adapter._sql  # type: ignore[attr-defined]
    begin = (
        "SET SESSION innodb_snapshot_isolation = ON",
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "START TRANSACTION",
    )
    statements.dialect = dataclasses.replace(statements.dialect, begin_write=begin)

    def change_beside_another() -> None:
        assert adapter.epoch() == 0
        run(url, "UPDATE pydedup_meta SET value = '5' WHERE name = 'epoch'")
        adapter.put_job("mine", "", "", "")
        adapter.bump_epoch()

    said = r"Record has changed since last read.*try again"
    with pytest.raises(ConflictError, match=said), adapter.transaction():
        change_beside_another()
    assert (adapter.epoch(), adapter.jobs()) == (5, [])
    with adapter.transaction():
        assert adapter.bump_epoch(5)


@pytest.mark.usefixtures("of_mariadb")
def test_a_statement_timeout_says_so(adapter: Adapter, url: str, user: Any, run: Any) -> None:
    """MySQL has one of reads alone, none of ours waits in."""
    user.grant("ALL")
    run(url, f"ALTER USER {user.name} WITH MAX_STATEMENT_TIME 0.2")
    hasty = registry.connect(user.url, mode="a")
    with adapter.transaction():
        adapter.bump_epoch()
        with pytest.raises(UnavailableError, match="max_statement_time"), hasty.transaction():
            hasty.bump_epoch()
    assert hasty.epoch() == 1
    hasty.close()


def test_a_database_of_a_table_that_is_missing_is_named(url: str) -> None:
    """And not that of the URL, which is there."""
    rows = registry.connect_rows(url)
    try:
        with pytest.raises(ArgumentError, match="Unknown database 'nosuchdb'") as caught:
            rows.create_predictions("nosuchdb.t", RowColumn("id", "BIGINT"), [("p", "float")])
        assert "CREATE DATABASE" not in str(caught.value)
    finally:
        rows.close()
