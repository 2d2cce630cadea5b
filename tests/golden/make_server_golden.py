# SPDX-License-Identifier: Apache-2.0
"""Writes store_v1.{postgres,mysql,mysql8}.sql.gz: the golden store, as servers dump it.

    python tests/golden/make_server_golden.py postgresql://postgres@/db?host=/socket/folder
    python tests/golden/make_server_golden.py mariadb://root@localhost/empty?unix_socket=/path
    python tests/golden/make_server_golden.py mysql://root@localhost/empty?unix_socket=/path

Wants, on the PATH, pg_dump (as new as the server), mariadb-dump (for ``mysql``, which MySQL
refuses), or mysqldump (for ``mysql8``; of MySQL 8.0, the oldest that is taken, which
``make test-mysql`` unpacks into build/mysql/8.0/run). Run only for a NEW schema version: old files
stay.
"""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from make_store_golden import fill

#: The schema of PostgreSQL's dump; tests put the name of theirs in its place.
SCHEMA = "pydedup_golden"


def dump_postgres(url: str) -> str:
    """Return what restores the schema, as statements that any client can run."""
    command = ["pg_dump", "--inserts", "--no-owner", "--no-privileges", f"--schema={SCHEMA}", url]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Commands of psql begin with a backslash; the setting is one that older servers do not know.
    skipped = ("\\", "SET transaction_timeout")
    return "".join(line for line in text.splitlines(True) if not line.startswith(skipped))


def dump_mysql(url: str, *program: str) -> str:
    """Return what restores the tables and views, as statements that any client can run."""
    parts = urlsplit(url)
    where = f"--socket={parse_qs(parts.query)['unix_socket'][0]}"
    command = [program[0], "--no-defaults", where, f"--user={parts.username}", "--hex-blob"]
    command += ["--skip-comments", "--skip-add-locks", "--default-character-set=utf8mb4"]
    command += [*program[1:], parts.path.lstrip("/")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Fill an empty place, dump it and write the file, unless there is one."""
    url = sys.argv[1]
    scheme = url.partition(":")[0]
    kind = {"postgresql": "postgres", "mariadb": "mysql", "mysql": "mysql8"}[scheme]
    target = Path(__file__).with_name(f"store_v1.{kind}.sql.gz")
    if target.exists():
        sys.exit(f"{target} exists; golden files are never rewritten")
    fill(f"{url}&schema={SCHEMA}" if kind == "postgres" else url)
    if kind == "postgres":
        text = dump_postgres(url)
    elif kind == "mysql":
        text = dump_mysql(url, "mariadb-dump")
    else:
        text = dump_mysql(url, "mysqldump", "--set-gtid-purged=OFF")
    target.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
