# SPDX-License-Identifier: Apache-2.0
"""Writes store_v1.postgres.sql.gz and store_v1.mysql.sql.gz: the golden store, as servers dump it.

    python tests/golden/make_server_golden.py postgresql://postgres@/db?host=/socket/folder
    python tests/golden/make_server_golden.py mysql://root@localhost/empty?unix_socket=/path

Wants the programs pg_dump (as new as the server, on the PATH) and mariadb-dump. Run only
for a NEW schema version: old files stay.
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


def dump_mysql(url: str) -> str:
    """Return what restores the tables and views, as statements that any client can run."""
    parts = urlsplit(url)
    where = f"--socket={parse_qs(parts.query)['unix_socket'][0]}"
    command = ["mariadb-dump", "--no-defaults", where, f"--user={parts.username}", "--hex-blob"]
    command += ["--skip-comments", "--skip-add-locks", "--default-character-set=utf8mb4"]
    command += [parts.path.lstrip("/")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Fill an empty place, dump it and write the file, unless there is one."""
    url = sys.argv[1]
    is_postgres = url.startswith("postgres")
    kind = "postgres" if is_postgres else "mysql"
    target = Path(__file__).with_name(f"store_v1.{kind}.sql.gz")
    if target.exists():
        sys.exit(f"{target} exists; golden files are never rewritten")
    fill(f"{url}&schema={SCHEMA}" if is_postgres else url)
    text = dump_postgres(url) if is_postgres else dump_mysql(url)
    target.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
