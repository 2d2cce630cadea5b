# SPDX-License-Identifier: Apache-2.0
"""MariaDB servers as administrators set them up, with stores in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import ConflictError, MissingStoreError, ReadOnlyError, StoreError
from pydedup.testing._contract_base import with_option
from pydedup.testing.mysql_servers import MysqlServer
from pydedup.testing.servers import as_user


@pytest.fixture
def restarted(own_mysql: MysqlServer) -> Iterator[Callable[..., None]]:
    """Start the server anew with more options, which it has until the end of the test."""

    def restart(*options: str) -> None:
        own_mysql.stop()
        own_mysql.start(*options)

    yield restart
    restart()


def test_a_server_whose_engine_only_reads_is_served_from_and_left_alone(
    own_mysql: MysqlServer, restarted: Callable[..., None]
) -> None:
    """It crashed when it was asked for sizes, and took indexes for corrupt once they were checked.

    It keeps what a change left in an index until that is purged, so here is some to be purged.
    """
    url = own_mysql.new_place()
    weights = {n: {"w": np.full(70_000, n, np.float32)} for n in range(3)}
    with pydedup.open(url) as store:
        for n, model in weights.items():
            store.add(f"m{n}", model)
        store.remove("m0")
    restarted("--innodb-read-only")
    with pydedup.open(url) as store:
        assert store.read_only
        for _ in range(2):
            assert store.verify().errors == []
            stats = store.stats()
            assert (stats.models, stats.stored_bytes_exact) == (2, False)
            assert stats.stored_bytes > 0
        for change in (
            lambda: store.add("new", weights[0]),
            lambda: store.remove("m1"),
            store.vacuum,
            lambda: store.alias("m1", "prod", "1"),
        ):
            with pytest.raises(ReadOnlyError, match="cannot be written to"):
                change()
    with pydedup.open(url, mode="r") as store:
        assert [one.name for one in store.models()] == ["m1", "m2"]
        for n in (1, 2):
            np.testing.assert_array_equal(store.load(f"m{n}")["w"], weights[n]["w"])
    restarted()
    with pydedup.open(url) as store:
        store.add("new", weights[0])
        store.vacuum()
        assert store.verify().ok


def test_a_server_whose_engine_becomes_one_that_only_reads(
    own_mysql: MysqlServer, restarted: Callable[..., None]
) -> None:
    url = own_mysql.new_place()
    weights = np.arange(70_000, dtype=np.float32)
    with pydedup.open(url) as store:
        store.add("m", {"w": weights})
        restarted("--innodb-read-only")
        np.testing.assert_array_equal(store.load("m")["w"], weights)
        assert store.stats().models == 1
        assert store.verify().ok
        for change in (lambda: store.add("n", {"w": -weights}), lambda: store.remove("m")):
            with pytest.raises(ReadOnlyError, match="write to the primary server"):
                change()
        restarted()
        store.add("n", {"w": -weights})
        np.testing.assert_array_equal(store.load("n")["w"], -weights)


@pytest.mark.usefixtures("of_mariadb")  # MySQL keeps how it was from its first start on
def test_names_that_a_server_makes_lower_case(
    own_mysql: MysqlServer, restarted: Callable[..., None], mysql_run: Callable[..., object]
) -> None:
    """Who might create a store was told that he might not: grants have the server's spelling."""
    restarted("--lower-case-table-names=1")
    url = own_mysql.url.replace("/pydedup?", "/Models?")
    mysql_run(own_mysql.url, "CREATE DATABASE Models", "CREATE USER maker")
    try:
        mysql_run(own_mysql.url, "GRANT ALL ON Models.* TO maker")
        with pytest.raises(MissingStoreError) as caught:
            pydedup.open(as_user(url, "maker"), mode="r")
        assert "holds no store" in str(caught.value)
        assert "GRANT" not in str(caught.value)
        with pydedup.open(as_user(url, "maker")) as store:
            store.add("m", {"w": np.arange(70_000, dtype=np.float32)})
            assert store.verify().ok
    finally:
        mysql_run(own_mysql.url, "DROP DATABASE Models", "DROP USER maker")


def test_a_store_opened_on_a_replica_is_written_when_that_is_the_primary(
    mysql_user: tuple[str, str], mysql_database: str, mysql_run: Callable[..., object]
) -> None:
    name, url = mysql_user
    database = mysql_database.partition("?")[0].rpartition("/")[2]
    mysql_run(mysql_database, f"GRANT ALL ON {database}.* TO {name}")
    weights = np.arange(70_000, dtype=np.float32)
    with pydedup.open(url) as store:
        store.add("m", {"w": weights})
    mysql_run(mysql_database, "SET GLOBAL read_only = ON")
    try:
        with pydedup.open(url) as store:
            assert store.read_only
            with pytest.raises(ReadOnlyError):
                store.add("n", {"w": -weights})
            mysql_run(mysql_database, "SET GLOBAL read_only = OFF")
            store.add("n", {"w": -weights})
            np.testing.assert_array_equal(store.load("n")["w"], -weights)
    finally:
        mysql_run(mysql_database, "SET GLOBAL read_only = OFF")


@pytest.mark.usefixtures("of_mariadb")  # MySQL takes no other version
def test_servers_that_are_too_old_are_refused(
    own_mysql: MysqlServer, restarted: Callable[..., None]
) -> None:
    url = own_mysql.new_place()
    for version in ("10.10.7-MariaDB", "5.7.44-log"):
        restarted(f"--version={version}")
        with pytest.raises(StoreError, match=f"server {version} is too old; MariaDB 10.11 or"):
            pydedup.open(url)
    restarted("--version=10.11.2-MARIADB")
    pydedup.open(url).close()


def test_a_backup_of_the_server_is_not_taken_for_damage(
    url: str, mysql_connect: Callable[[str], Any], of_mysql: bool
) -> None:
    """It keeps tables from being checked, and from nothing else."""
    if not of_mysql:
        pytest.skip("backups of MariaDB keep nobody from checking")
    with pydedup.open(with_option(url, "timeout=1")) as store:
        store.add("m", {"w": np.ones(3, np.float32)})
        with mysql_connect(url) as other, other.cursor() as cursor:
            cursor.execute("LOCK INSTANCE FOR BACKUP")
            with pytest.raises(ConflictError, match=r"LOCK INSTANCE FOR BACKUP.*try again"):
                store.verify()
            store.add("n", {"w": np.ones(4, np.float32)})
        assert store.verify().errors == []
