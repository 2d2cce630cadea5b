# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: what a URL may say, and that no password is ever shown."""

from __future__ import annotations

from typing import Any

import pytest

from pydedup import registry
from pydedup.adapters._postgres_url import locate
from pydedup.adapters.postgres import known_options
from pydedup.errors import ArgumentError, PydedupError, StoreError, UnavailableError
from pydedup.testing._contract_base import open_store, with_option

SECRET = "tops3cret"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{SECRET}/{SECRET}@localhost/db",
        f"postgresql://u:1/{SECRET}@localhost/db",
        f"postgresql://u:{SECRET}@{SECRET}@localhost/db",
        f"postgresql://u:x?{SECRET}@localhost/db",
        f"postgresql://u:x?{SECRET}=@localhost/db",
        f"postgresql://u:%zz{SECRET}@localhost/db",
        f"postgresql://u@localhost:{SECRET}/db",
        f"postgresql://u@localhost,other:{SECRET}/db",
        f"postgresql://u:{SECRET}@localhost/db?passwort={SECRET}",
        f"postgresql://localhost/db?password=a&{SECRET}=b",
        f"postgresql://?host=/nowhere&password={SECRET}@{'x' * 64}",
        f"postgresql://u:{SECRET}",
        f"postgresql://u:{SECRET}@localhost/db?timeout",
        f"postgresql://u:{SECRET}@localhost/db?schema=a%20b",
        f"postgresql://u:{SECRET}@localhost/db?timeout=soon",
        f"postgresql://u:{SECRET}@[::1/db",
    ],
)
def test_urls_that_mean_nothing_show_no_secret(url: str) -> None:
    with pytest.raises(PydedupError) as caught:
        registry.connect(url, mode="a")
    error: BaseException | None = caught.value
    assert isinstance(error, ArgumentError | UnavailableError)
    while error is not None:
        assert SECRET not in f"{error} {error!r}"
        error = error.__cause__


def test_what_says_where_a_store_is_is_shown() -> None:
    place = locate(
        f"postgresql://me:{SECRET}@/db?host=/run/pg&port=5433&sslkey={SECRET}&timeout=3&schema=x",
        None,
        known_options(),
    )
    assert place.shown == "postgresql://me@/db?host=/run/pg&port=5433&schema=x"
    assert (place.schema, place.timeout) == ("x", 3.0)
    assert f"sslkey={SECRET}" in place.conninfo
    assert SECRET not in repr(place)


def test_what_libpq_is_given() -> None:
    """What is named is taken, also percent-encoded; what is not is settled for it."""
    known = known_options()
    given = "connect_timeout=7&%73slmode=require&ssl=true"
    place = locate(f"postgresql://h/db?{given}&schema=a%5Fb&timeout=2%2E5", "a_b", known)
    assert (place.schema, place.timeout) == ("a_b", 2.5)
    assert place.conninfo.startswith(f"postgresql://h/db?{given}&")
    assert "connect_timeout=10" not in place.conninfo
    place = locate("postgresql://h/db", None, known)
    assert (place.schema, place.timeout) == ("pydedup", None)
    assert "connect_timeout=10" in place.conninfo
    assert locate("postgresql://h/db", None, ()).conninfo == "postgresql://h/db?"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("sslmod=require", r"'sslmod' that is not known; did you mean sslmode\?"),
        ("shcema=models", r"'shcema' that is not known; did you mean schema\?"),
        ("colour=tops3cret", "'colour' that is not known; there are schema, timeout and those"),
        ("sslmode=bogus", 'invalid sslmode value: "bogus"; correct this option'),
        ("port=99999", 'invalid port number: "99999"; correct the port'),
        ("service=nosuch", 'definition of service "nosuch" not found; name one that'),
        ("connect_timeout=soon", "connect_timeout=soon must be a whole number"),
        ("options=-c%20nosuch%3D1", 'unrecognized configuration parameter "nosuch".*options='),
        ("options=-c%20work_mem%3Dx", 'invalid value for parameter "work_mem"'),
    ],
)
def test_options_that_cannot_be_are_named(postgres_url: str, option: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said) as caught:
        registry.connect(with_option(postgres_url, option), mode="a")
    assert "server runs" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_password_that_looks_like_an_option_is_not_named() -> None:
    """The password is ``5?tops3cret=``, and was not percent-encoded."""
    with pytest.raises(ArgumentError, match="%40 for @") as caught:
        registry.connect(f"postgresql://u:5?{SECRET}=@localhost/db", mode="a")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a b",
        'a"b',
        "a'b",
        "1a",
        "Pg_mine",
        "Information_schema",
        "pg_mine",
        "information_schema",
        "x" * 64,
        "ä",
        "a%s",
    ],
)
def test_schemas_that_cannot_be(postgres_url: str, name: str) -> None:
    with pytest.raises(ArgumentError, match="cannot hold a store"):
        registry.connect(postgres_url, mode="a", schema=name)


def test_one_schema_is_meant(url: str) -> None:
    with pytest.raises(ArgumentError, match="other"):
        registry.connect(url, mode="a", schema="other")


@pytest.mark.parametrize("timeout", ["soon", "-1", "nan", "", "1e9"])
def test_timeouts_that_cannot_be(url: str, timeout: str) -> None:
    with pytest.raises(ArgumentError, match="timeout="):
        registry.connect(with_option(url, f"timeout={timeout}"), mode="a")


def test_a_password_is_never_shown(url: str, role: str, sql: Any, schema: str) -> None:
    sql(f"ALTER ROLE {role} PASSWORD '{SECRET}'")
    sql(f"CREATE SCHEMA {schema} AUTHORIZATION {role}")
    login = f"user={role}&password={SECRET}&sslpassword={SECRET}"
    adapter = open_store(with_option(url, login))
    try:
        assert SECRET not in f"{adapter.url} {adapter!r} {vars(adapter)}"
        with pytest.raises(StoreError) as caught:
            adapter.bump_epoch()
        assert SECRET not in str(caught.value)
    finally:
        adapter.close()


def test_parameters_reach_libpq(url: str) -> None:
    options = "application_name=mine&options=-c%20work_mem%3D7MB%20-c%20lock_timeout%3D1234"
    adapter = open_store(with_option(url, options))
    shown = "SELECT current_setting('application_name'), current_setting('work_mem'), "
    shown += "current_setting('lock_timeout')"
    assert adapter._query(shown) == [("mine", "7MB", "1234ms")]  # type: ignore[attr-defined]
    adapter.close()
    adapter = open_store(with_option(url, "timeout=2.5"))
    assert adapter._query(shown)[0] == ("pydedup", "4MB", "2500ms")  # type: ignore[attr-defined]
    adapter.close()
