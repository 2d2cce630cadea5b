# SPDX-License-Identifier: Apache-2.0
"""From a URL to an adapter: schemes, plain paths, packages of others, and no password shown."""

from __future__ import annotations

import subprocess
import sys
import traceback
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pydedup
from pydedup import opening, registry
from pydedup.adapter import Adapter
from pydedup.errors import ArgumentError


def test_a_plain_path_is_a_file_of_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("relative.db", str(tmp_path / "absolute.db")):
        adapter = registry.connect(place, mode="a")
        assert isinstance(adapter, Adapter)
        assert adapter.schema_version() is None
        adapter.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["absolute.db", "relative.db"]


@pytest.mark.parametrize("name", ["a?b.db", "a?timeout=5", "a?b?", "?", "a:b.db"])
def test_a_path_is_no_url(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a path is the name of a file, for a store and for rows; its URL means the same."""
    monkeypatch.chdir(tmp_path)
    for path in (Path(name), tmp_path / name):
        with pydedup.open(path) as store, opening.open_rows(store._adapter, path) as rows:
            assert rows.table_columns("t", "id") is None
        with pydedup.open(store.url, mode="r") as again:
            assert again.models() == []
        assert [found.name for found in tmp_path.iterdir()] == [name]


def test_a_text_that_may_be_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like options at its end are some, as in a URL."""
    monkeypatch.chdir(tmp_path)
    for place, name in (("a?b.db", "a?b.db"), ("b.db?timeout=1", "b.db"), ("c?d?", "c?d?")):
        registry.connect(place, mode="a").close()
        assert (tmp_path / name).is_file()
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ArgumentError, match="option 'mode' is not known"):
        registry.connect("d.db?mode=ro", mode="a")
    # Of a text that is no URL, "end in one more" named another file.
    for place, option in (("sqlite:///a?b.db", "b.db"), ("a?b=c.db", "b")):
        said = rf"'{option}' is not known.* ends in one more: sqlite:///PATH\?\)$"
        with pytest.raises(ArgumentError, match=said):
            registry.connect(place, mode="r")
    registry.connect("sqlite:///a?b.db?", mode="r").close()


@pytest.mark.parametrize("url", ["oracle://host/db", "SQLITE3:///x.db", "://x", "http://x"])
def test_unknown_schemes_name_the_known_ones(url: str) -> None:
    with pytest.raises(
        ArgumentError, match=r"mariadb, mysql, postgres, postgresql, postgresql\+shards, sqlite"
    ):
        registry.connect(url, mode="a")


@pytest.mark.parametrize("url", ["postgresql+psycopg://h/d", "MySQL+pymysql://u:p@h/d"])
def test_a_url_of_sqlalchemy_is_told_how_to_write_it(url: str) -> None:
    scheme = url.partition("+")[0].lower()
    with pytest.raises(ArgumentError, match=rf"is not known; write {scheme}://, without a driver$"):
        registry.connect(url, mode="a")


@pytest.mark.parametrize("url", ["", "postgresql:host", "sqlite:x.db"])
def test_what_is_neither_url_nor_path(url: str) -> None:
    with pytest.raises(ArgumentError, match="write scheme://"):
        registry.connect(url, mode="a")


@pytest.mark.parametrize("mode", ["w", "", "ra", "A"])
def test_unknown_modes_are_refused(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ArgumentError, match="mode"):
        registry.connect(f"sqlite:///{tmp_path}/x.db", mode=mode)
    assert list(tmp_path.iterdir()) == []


def test_a_scheme_is_not_case_sensitive(tmp_path: Path) -> None:
    registry.connect(f"SQLite:///{tmp_path}/x.db", mode="a").close()
    assert (tmp_path / "x.db").exists()


@pytest.mark.parametrize(
    ("url", "extra"),
    [("postgresql://u:secret@h/d", "postgres"), ("mysql://u:secret@h/d", "mysql")],
)
def test_what_is_missing_comes_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, url: str, extra: str
) -> None:
    for module in ("psycopg", "mysql", f"pydedup.adapters.{extra}"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ArgumentError) as caught:
        registry.connect(url, mode="a")
    assert f"pip install 'pydedup[{extra}]'" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_python_without_sqlite_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice was to install pydedup again."""
    monkeypatch.setitem(sys.modules, "pydedup.adapters.sqlite", None)
    with pytest.raises(ArgumentError, match="needs a Python that has sqlite3, and this one lacks"):
        registry.connect("sqlite:///x.db", mode="r")


class Points:
    """Stands for what is installed."""

    def __init__(self, **points: str) -> None:
        self.points = [
            EntryPoint(name, target, registry.ENTRY_POINT_GROUP) for name, target in points.items()
        ]

    def __call__(self, *, group: str) -> list[EntryPoint]:
        assert group == "pydedup.adapters"
        return self.points


def fake_connect(url: str, *, mode: str, schema: str | None = None) -> Any:
    return url, mode, schema


def test_packages_of_others_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    here = type(sys)("their_module")
    here.connect = fake_connect  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_module", here)
    points = Points(duck="their_module:connect", sqlite="their_module:connect")
    monkeypatch.setattr(registry, "entry_points", points)
    found: Any = registry.connect("duck://x", mode="r", schema="s")
    assert found == ("duck://x", "r", "s")
    assert "duck" in registry.schemes()
    with pytest.raises(ArgumentError, match="memory"):
        registry.connect("sqlite://", mode="r")  # ours cannot be taken


@pytest.mark.parametrize("target", ["no_such_module:connect", "json:connect"])
def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr(registry, "entry_points", Points(duck=target))
    with pytest.raises(ArgumentError, match=r"duck://.*cannot be loaded"):
        registry.connect("duck://x", mode="r")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://user:pw@host:5432/db", "postgresql://user:***@host:5432/db"),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
        ("postgresql://:pw@host/db", "postgresql://:***@host/db"),
        ("mysql://u:p%40w@h/d?unix_socket=/x%40y", "mysql://u:***@h/d?unix_socket=/x%40y"),
        ("mysql://u@h/d?unix_socket=/x@y", "mysql://u@h/d?unix_socket=/x@y"),
        ("mysql://u:<pw?=>@h/d", "mysql://u:***@h/d"),
        ("mysql://u:<p@w?a=b>@h/d", "mysql://u:***@h/d"),
        ("mysql://u:p%40w@h/d?unix_socket=/x@y", "mysql://u:***@y"),  # might all be the password
        ("mysql://u:p@w/o?r#d@h/d", "mysql://u:***@h/d"),
        ("pg://h/d?user=u&password=pw&x=1", "pg://h/d?user=u&password=***&x=1"),
        ("pg://h/d?PassWord=pw", "pg://h/d?PassWord=***"),
        ("sqlite:////home/me@work:x/a.db", "sqlite:////home/me@work:x/a.db"),
        ("models.db", "models.db"),
        ("postgresql:/u:pw@h/d", "postgresql:***@h/d"),  # mistyped
        ("mysql:u:p@w@h/d", "mysql:***@h/d"),
        ("mysql:/u:pw@h/d?ssl_key_password=pw", "mysql:***@h/d"),  # no such option is known
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert registry.redact(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:/u:s3cret@h/x",
        "mysql:u:s3cret@h/x",
        "mysql//u:s3cret@h/x",
        "postgresql+shards//u:s3cret@h/x|h2/x",
        "sqlite://h/x.db?password=s3cret",
        "sqlite:///x.db?password=s3cret",
        "mysql:///u:s3cret@127.0.0.1:1/x",
        "sqlite://u:s3cret@h/x.db",
        "host=localhost password=s3cret dbname=x",
    ],
)
def test_mistyped_urls_create_nothing_and_show_no_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError) as caught:
        registry.connect(url, mode="a")
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))
    assert list(tmp_path.iterdir()) == []


@given(st.text(min_size=6, max_size=12), st.sampled_from(["", "?a=b", "?host=x@y&a=b"]))
def test_no_password_is_shown(password: str, query: str) -> None:
    # The worst case: it was not escaped. A prefix keeps it from being part of the rest.
    password = f"<{password}>"
    shown = registry.redact(f"postgresql://user:{password}@host/db{query}")
    assert password not in shown
    assert "user:***@" in shown


def test_no_driver_is_loaded_before_a_url_asks() -> None:
    code = (
        "import sys, pydedup.registry\n"
        "print([m for m in sys.modules if m.startswith(('pydedup.adapters', 'sqlite3'))])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
