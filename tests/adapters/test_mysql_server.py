# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: what a server may do to a store, and what users are told. (The contract is in
test_mysql.py.)
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from mysql.connector import HAVE_CEXT

from pydedup import registry
from pydedup.adapter import LIVE, SCHEMA_VERSION, Adapter
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
from pydedup.testing._contract_base import add_pages, model_row

MIB = 1 << 20
SECRET = "s3cret@/:&?#%"


Run = Callable[..., list[tuple[Any, ...]]]


def with_options(url: str, **options: Any) -> str:
    added = "&".join(f"{name}={value}" for name, value in options.items())
    return f"{url}{'&' if urlsplit(url).query else '?'}{added}"


def at(url: str, *, database: str | None = None, user: str | None = None) -> str:
    """The same server; another database, or another user (and password)."""
    parts = urlsplit(url)
    if user is not None:
        parts = parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}")
    return (parts if database is None else parts._replace(path=f"/{database}")).geturl()


@pytest.fixture
def url(mysql_database: str) -> str:
    return mysql_database


@pytest.fixture
def run(mysql_run: Run) -> Run:
    return mysql_run


@pytest.fixture(params=["extension", "pure"] if HAVE_CEXT else ["pure"])
def adapter(url: str, request: pytest.FixtureRequest) -> Iterator[Adapter]:
    adapter = registry.connect(with_options(url, use_pure=request.param == "pure"), mode="a")
    adapter.create_schema({})
    yield adapter
    adapter.close()


@pytest.fixture
def user(url: str, run: Run) -> Iterator[str]:
    """A user with a password and no privilege."""
    name = f"u{secrets.token_hex(6)}"
    run(url, f"CREATE USER {name} IDENTIFIED BY '{SECRET}'")
    yield name
    run(url, f"DROP USER {name}")


def as_user(url: str, user: str, password: str = SECRET) -> str:
    return at(url, user=f"{user}:{quote(password, safe='')}")


def grant(run: Run, url: str, user: str, privileges: str) -> None:
    database = urlsplit(url).path.strip("/")
    run(url, f"GRANT {privileges} ON {database}.* TO {user}")


# ---- max_allowed_packet -------------------------------------------------------------------------


@pytest.fixture
def packet(url: str, run: Run) -> Iterator[Callable[[int], None]]:
    ((before,),) = run(url, "SELECT @@GLOBAL.max_allowed_packet")

    def set_to(size: int) -> None:
        run(url, f"SET GLOBAL max_allowed_packet = {size}")

    yield set_to
    set_to(before)


def test_a_server_of_small_packets_is_refused(url: str, packet: Callable[[int], None]) -> None:
    packet(MIB)
    with pytest.raises(StoreError, match=r"1048576 bytes .* max_allowed_packet to 16777216"):
        registry.connect(url, mode="a")


@pytest.mark.parametrize("size", [4 * MIB, 16 * MIB])
@pytest.mark.parametrize("pure", [True, False] if HAVE_CEXT else [True])
def test_payloads_as_large_as_the_packet(
    url: str, packet: Callable[[int], None], size: int, pure: bool
) -> None:
    packet(size)
    adapter = registry.connect(with_options(url, use_pure=pure), mode="a")
    try:
        adapter.create_schema({})
        limit = adapter.capabilities.max_payload_bytes
        assert size - 64 * 1024 == limit
        payload = os.urandom(limit)
        with adapter.transaction():
            ids = adapter.insert_pages([(bytes(16), payload)] * 2, state=LIVE)
            adapter.insert_block_maps([(1, i, 0, payload) for i in range(3)])
        assert dict(adapter.read_pages(ids)) == dict.fromkeys(ids, payload)
        assert adapter.block_map(1, 2) == [payload]
        with pytest.raises(ArgumentError, match=str(limit)) as caught, adapter.transaction():
            adapter.insert_pages([(bytes(16), bytes(limit + 1))], state=LIVE)
        # Where a larger packet would help, that is said.
        assert ("max_allowed_packet to 16777216" in str(caught.value)) == (size < 16 * MIB)
    finally:
        adapter.close()


def test_an_import_of_torch_before_the_driver_changes_nothing(url: str) -> None:
    pytest.importorskip("torch")
    code = """
import sys, torch
from pydedup import registry
adapter = registry.connect(sys.argv[1], mode="a")
adapter.create_schema({})
payload = bytes(range(256)) * (adapter.capabilities.max_payload_bytes // 256)
with adapter.transaction():
    ids = adapter.insert_pages([(bytes(16), payload)], state="live")
assert list(adapter.read_pages(ids)) == [(ids[0], payload)]
adapter.close()
"""
    subprocess.run([sys.executable, "-c", code, url], check=True)


# ---- what users are told ------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """All that a traceback shows."""
    return "".join(traceback.format_exception(error))


def test_a_wrong_password_is_told_and_not_shown(url: str, user: str, run: Run) -> None:
    grant(run, url, user, "ALL")
    adapter = registry.connect(as_user(url, user), mode="a")
    assert adapter.schema_version() is None
    assert "s3cret" not in f"{adapter.url} {adapter!r} {adapter.__dict__}"
    adapter.close()
    wrong = secrets.token_hex(8)
    with pytest.raises(UnavailableError, match="check the user and the password") as caught:
        registry.connect(as_user(url, user, wrong), mode="a")
    assert wrong not in told(caught.value)


@pytest.mark.parametrize("pure", [True, False] if HAVE_CEXT else [True])
def test_a_missing_database_comes_with_what_creates_it(url: str, pure: bool) -> None:
    with pytest.raises(UnavailableError, match=r"CREATE DATABASE `not_there` CHARACTER SET utf8"):
        registry.connect(with_options(at(url, database="not_there"), use_pure=pure), mode="a")


def test_schema_names_the_database(url: str, mysql_url: str, run: Run) -> None:
    name = urlsplit(url).path.strip("/")
    for place in (mysql_url, at(mysql_url, database="")):
        adapter = registry.connect(place, mode="a", schema=name)
        try:
            adapter.create_schema({})
            assert f"/{name}" in adapter.url
        finally:
            adapter.close()
    assert ("pydedup_meta",) in run(url, "SHOW TABLES")


@pytest.mark.parametrize("pure", [True, False] if HAVE_CEXT else [True])
def test_a_server_that_is_not_there(tmp_path: Path, pure: bool) -> None:
    place = f"mysql://ann:{quote(SECRET, safe='')}@localhost/db?use_pure={pure}"
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


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("mysql://u:s3cret@host", "no database"),
        ("mysql://u:s3cret@host/", "no database"),
        ("mysql://u:s3cret@host/a/b", "no database"),
        ("mysql://u:s3cret@host:port/db", "no URL of a MySQL database"),
        ("mysql://u:s3cret@[host/db", "no URL of a MySQL database"),
        ("mysql://u:s3cret@host/db?tmeout=1", "tmeout"),
        ("mysql://u:s3cret@host/db?timeout=soon", "soon"),
        ("mysql://u:s3cret@host/db?ssl_verify_cert=maybe", "maybe"),
        ("mysql://u@host/db?password=s3cret&timeout=-1", "-1"),
    ],
)
def test_wrong_urls_are_told_without_the_password(place: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said) as caught:
        registry.connect(place, mode="a")
    assert "s3cret" not in told(caught.value)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (1205, ConflictError),
        (1213, ConflictError),
        (1021, StorageFullError),
        (1114, StorageFullError),
        (1290, ReadOnlyError),
        (1045, UnavailableError),
        (1053, UnavailableError),
        (1146, NotAStoreError),
        (1194, CorruptStoreError),
        (1406, ArgumentError),
        (1644, StoreError),
    ],
)
def test_numbers_of_errors_have_meanings(
    adapter: Adapter, number: int, kind: type[PydedupError]
) -> None:
    fields = f"MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'as the server'"
    statement = f"SIGNAL SQLSTATE '45000' SET {fields}"
    with pytest.raises(kind, match="as the server") as caught, adapter.transaction():
        adapter._write(statement)  # type: ignore[attr-defined]
    assert type(caught.value) is kind or number in (1045, 1053)
    assert type(caught.value.__cause__).__module__.startswith("mysql.connector")
    with adapter.transaction():
        adapter.bump_epoch()


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


# ---- who may do what ----------------------------------------------------------------------------


def test_a_reader_needs_no_more_than_select(
    adapter: Adapter, url: str, user: str, run: Run
) -> None:
    ids = add_pages(adapter, 3, size=MIB)
    grant(run, url, user, "SELECT")
    reader = registry.connect(as_user(url, user), mode="r")
    try:
        assert len(list(reader.read_pages(ids))) == 3
        assert reader.view("model_sizes") == []
        assert reader.integrity_errors() == []
        # Without the privilege to look at files it is InnoDB's own estimate.
        assert reader.stored_bytes() > 0
    finally:
        reader.close()
    writer = registry.connect(as_user(url, user), mode="a")
    try:
        with pytest.raises(ReadOnlyError, match="denied"), writer.transaction():
            writer.bump_epoch()
    finally:
        writer.close()
    grant(run, url, user, "SELECT, INSERT, UPDATE, DELETE")
    writer = registry.connect(as_user(url, user), mode="a")
    try:
        writer.create_schema({})
        add_pages(writer, 1)
        with writer.transaction():
            writer.delete_pages(ids)
            writer.bump_epoch()
    finally:
        writer.close()


def test_a_creator_needs_no_more_than_is_documented(url: str, user: str, run: Run) -> None:
    grant(run, url, user, "CREATE, CREATE VIEW, DROP, INDEX, SELECT, INSERT, UPDATE, DELETE")
    creator = registry.connect(as_user(url, user), mode="a")
    try:
        creator.create_schema({})
        run(url, "DELETE FROM pydedup_meta")  # as if it had been cut short
        creator.create_schema({})
        assert creator.view("sharing") == []
    finally:
        creator.close()
    # Views are read with the rights of who reads, so they outlive their creator.
    run(url, f"RENAME USER {user} TO {user}_x", f"CREATE USER {user} IDENTIFIED BY '{SECRET}'")
    try:
        grant(run, url, user, "SELECT")
        run(url, f"DROP USER {user}_x")
        assert run(url, "SELECT COUNT(*) FROM pydedup_sharing") == [(0,)]
    finally:
        run(url, f"DROP USER IF EXISTS {user}_x")


def test_the_server_refuses_what_a_reader_would_change(adapter: Adapter, url: str) -> None:
    reader = registry.connect(url, mode="r")
    try:
        with pytest.raises(ReadOnlyError):
            reader._define("DELETE FROM pydedup_meta")  # type: ignore[attr-defined]
        assert reader.epoch() == 0
    finally:
        reader.close()


def test_a_server_that_is_read_only(adapter: Adapter, url: str, user: str, run: Run) -> None:
    grant(run, url, user, "ALL")
    writer = registry.connect(as_user(url, user), mode="a")
    run(url, "SET GLOBAL read_only = 1")
    try:
        with pytest.raises(ReadOnlyError), writer.transaction():
            writer.bump_epoch()
        assert writer.epoch() == 0
    finally:
        run(url, "SET GLOBAL read_only = 0")
        writer.close()


# ---- tables -------------------------------------------------------------------------------------


def test_tables_are_innodb_and_names_are_bytes(adapter: Adapter, url: str, run: Run) -> None:
    made = run(
        url,
        "SELECT DISTINCT CAST(engine AS CHAR), table_collation FROM information_schema.tables "
        "WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE'",
    )
    assert made == [("InnoDB", "utf8mb4_bin")]
    with adapter.transaction():
        ids = [adapter.insert_model(model_row(name)) for name in ("\xe9", "e", "E", "e ")]
    assert [row.name for row in adapter.models(state=None)] == ["\xe9", "e", "E", "e "]
    assert [row.id for row in adapter.models(name="e", state=None)] == ids[1:2]


def test_a_creation_that_was_cut_short_is_begun_again(adapter: Adapter, url: str, run: Run) -> None:
    run(url, "DELETE FROM pydedup_meta", "DROP TABLE pydedup_jobs", "DROP VIEW pydedup_sharing")
    assert adapter.schema_version() is None
    adapter.create_schema({"x": "y"})
    assert adapter.schema_version() == SCHEMA_VERSION
    assert adapter.meta()["x"] == "y"
    add_pages(adapter, 1)
    run(url, "DELETE FROM pydedup_meta")  # with something in it, it was no creation
    with pytest.raises(NotAStoreError, match="pydedup_meta"):
        adapter.schema_version()
    assert adapter.count_blocks() == 2


def test_tables_of_others_are_left_alone(url: str, run: Run) -> None:
    run(url, "CREATE TABLE pydedup_meta (a INT)", "CREATE TABLE theirs (a INT)")
    adapter = registry.connect(url, mode="a")
    try:
        with pytest.raises(NotAStoreError, match="pydedup_meta"):
            adapter.create_schema({})
    finally:
        adapter.close()
    assert run(url, "SHOW TABLES") == [("pydedup_meta",), ("theirs",)]


def test_a_driver_without_its_extension_is_explained() -> None:
    code = (
        "import sys; sys.modules['_mysql_connector'] = None\n"
        "from pydedup import registry, errors\n"
        "try: registry.connect('mysql://me@localhost/db?use_pure=false', mode='r')\n"
        "except errors.ArgumentError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert "C extension of mysql-connector-python" in done.stdout, done.stderr
    assert "leave the option out" in done.stdout
