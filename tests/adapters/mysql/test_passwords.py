# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: passwords that are not in the URL but in an option file, or in MYSQL_PWD."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mysql.connector import HAVE_CEXT

import pydedup
from pydedup.adapters._mysql_option_file import password_in
from pydedup.errors import ArgumentError, UnavailableError
from pydedup.testing._contract_base import with_option

#: What stands in a file -> what it means. All of this is what MariaDB's own programs make of it.
WRITTEN = {
    "password=secret": "secret",
    "password = a b\t": "a b",
    "password=a#b": "a",
    "password='a#b' # the old one": "a#b",
    'password="a#b"': "a#b",
    "password='it\\'s \"#\"'": 'it\'s "#"',
    "password=it's": "it's",
    "password='": "'",
    "password=\"a'": "\"a'",
    r"password=a\sb\tc\\n\d": "a b\tc\\n\\d",
    "password='a=b;c%d'": "a=b;c%d",
    "password=": "",
    "password=1\npassword=2\n#password=3\n;password=4": "2",
    "password=1\n[mysqld]\npassword=2": "1",
    "password=1\n[client-mariadb]\npassword=2\nuser=somebody": "2",
    "password=grün": "grün",
}


@pytest.fixture(params=["extension", "pure"] if HAVE_CEXT else ["pure"])
def driver(request: pytest.FixtureRequest) -> str:
    return f"use_pure={request.param == 'pure'}"


@pytest.fixture
def bare(user: Any, driver: str) -> str:
    """The URL of a user with a password, without it."""
    user.grant("ALL")
    login, at, place = str(user.url).rpartition("@")
    return with_option(login.rpartition(":")[0] + at + place, driver)


@pytest.fixture
def file(tmp_path: Path, user: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An option file with the user's password, in their home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "my.cnf"
    path.write_text(f"[client]\nuser = 'another'\npassword = '{user.secret}'\n")
    return path


@pytest.mark.parametrize("written", WRITTEN)
def test_what_is_written_in_a_file(written: str, tmp_path: Path) -> None:
    path = tmp_path / "my.cnf"
    path.write_text(f"[mysqldump]\npassword=0\n[client]\n{written}\n", "utf-8")
    assert password_in(str(path)) == WRITTEN[written]
    if (program := shutil.which("my_print_defaults")) is not None:
        command = [program, f"--defaults-file={path}", "client", "client-server", "client-mariadb"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert said.split("\n")[:-1][-1:] in (
            [f"--password={WRITTEN[written]}"],
            ["--user=somebody"],
        )


def test_a_password_in_an_option_file(bare: str, file: Path) -> None:
    for name in (str(file), "~/my.cnf"):
        with pydedup.open(with_option(bare, f"option_file={quote(name)}")) as store:
            assert store.models() == []
            assert "s3cret" not in f"{store!r} {store._adapter.__dict__}"


def test_a_password_in_the_environment(
    bare: str, file: Path, user: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match="of the URL, its option_file or MYSQL_PWD"):
        pydedup.open(bare)
    monkeypatch.setenv("MYSQL_PWD", user.secret)
    with pydedup.open(bare) as store:
        assert store.models() == []
    monkeypatch.setenv("MYSQL_PWD", "another")
    with pytest.raises(UnavailableError, match="check the user") as caught:
        pydedup.open(bare)
    assert "another" not in str(caught.value)
    # As for MySQL's own programs: what the environment says comes last.
    pydedup.open(with_option(bare, f"option_file={file}")).close()
    file.write_text("[client]\npassword=another\n")
    in_url = with_option(user.url, f"option_file={file}")
    pydedup.open(in_url).close()
    with pytest.raises(UnavailableError, match="check the user"):
        pydedup.open(with_option(bare, f"option_file={file}"))


def test_an_empty_password_in_the_url_is_one(
    mysql_user: tuple[str, str], driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYSQL_PWD", "another")
    name, url = mysql_user
    with pytest.raises(UnavailableError, match="let an administrator grant"):  # who was let in
        pydedup.open(with_option(url.replace(f"{name}@", f"{name}:@"), driver))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"a file that can be read, and '.*' cannot: .*No such file"),
        (
            b"[mysqld]\npassword=s3cret\n[client]\npasswords3cret\n",
            r"below \[client\], and '.*' has",
        ),
        (b"[client]\npassword=s3cret\xff\n", "an option file of MySQL, in UTF-8, and '.*' is none"),
    ],
)
def test_files_without_a_password_are_named(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "my.cnf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentError, match=f"option_file must be .*{said}") as caught:
        pydedup.open(f"mysql://me@localhost/models?option_file={path}")
    assert "s3cret" not in str(caught.value)
