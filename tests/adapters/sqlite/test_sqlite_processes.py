# SPDX-License-Identifier: Apache-2.0
"""SQLite among threads and processes: connections, locks, forks, writers that are killed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pydedup import registry
from pydedup.adapter import Adapter
from pydedup.adapters import _sqlite_connect
from pydedup.errors import ConflictError, UnavailableError
from pydedup.testing._contract_processes import in_fork

from .conftest import add_pages, open_store

MIB = 1 << 20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - pathlib would make 100 paths


def test_threads_that_end_leave_no_connection(adapter: Adapter) -> None:
    add_pages(adapter, 1)
    before = open_files()
    for _ in range(30):
        thread = threading.Thread(target=adapter.models)
        thread.start()
        thread.join()
    assert open_files() <= before + 3


def test_an_adapter_that_is_dropped_leaves_no_connection(path: Path) -> None:
    open_store(path).close()
    before = open_files()
    for _ in range(5):
        open_store(path).models()
    gc.collect()
    assert open_files() <= before


def test_a_second_writer_waits_as_long_as_told(adapter: Adapter, path: Path) -> None:
    code = (
        "import sys\n"
        "from pydedup import errors, registry\n"
        "adapter = registry.connect(sys.argv[1], mode='a')\n"
        "try:\n"
        "    with adapter.transaction(): adapter.bump_epoch()\n"
        "except errors.ConflictError as error: print(error)\n"
    )
    with adapter.transaction():
        adapter.bump_epoch()
        url = f"sqlite:///{path}?timeout=0.2"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, url], capture_output=True, text=True, check=True
        )
        assert str(path) in done.stdout
        assert "timeout" in done.stdout
        hasty = registry.connect(f"sqlite:///{path}?timeout=0", mode="a")
        start = time.monotonic()
        with pytest.raises(ConflictError), hasty.transaction():
            pass
        assert time.monotonic() - start < 2
        hasty.close()
    assert adapter.epoch() == 1


def test_ctrl_c_ends_the_wait_for_a_lock(adapter: Adapter, path: Path) -> None:
    patient = registry.connect(f"sqlite:///{path}?timeout=60", mode="a")
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        with adapter.transaction():
            begun.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert begun.wait(30)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    start = time.monotonic()

    def interrupted() -> None:
        timer.start()
        with patient.transaction():
            pass

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert time.monotonic() - start < 30
    finally:
        timer.join()
        done.set()
        holder.join()
    with patient.transaction():
        patient.bump_epoch()
    patient.close()


def test_a_killed_writer_leaves_whole_transactions(path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pydedup import registry\n"
        "adapter = registry.connect(sys.argv[1], mode='a')\n"
        "adapter.create_schema({})\n"
        "for i in range(3):\n"
        "    with adapter.transaction():\n"
        "        adapter.bump_epoch()\n"
        "        adapter.insert_pages([(bytes(16), bytes(1 << 20))] * 30, state='live')\n"
        "        if i == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    url = f"sqlite:///{path}"
    done = subprocess.run([sys.executable, "-P", "-c", code, url], check=False)
    assert done.returncode == -signal.SIGKILL
    log = Path(f"{path}-wal")
    assert log.stat().st_size > MIB
    # Reading recovers without writing to either file; writing goes on from there.
    before = path.read_bytes(), log.read_bytes()
    reader = registry.connect(url, mode="r")
    assert (reader.epoch(), len(reader.page_rows())) == (2, 60)
    reader.close()
    assert (path.read_bytes(), log.read_bytes()) == before
    adapter = open_store(path)
    assert (adapter.epoch(), len(adapter.page_rows())) == (2, 60)
    assert adapter.integrity_errors() == []
    adapter.close()
    assert not log.exists()


def test_a_child_holds_locks_of_its_own(path: Path) -> None:
    # SQLite counts the locks of a process in memory. A child that inherited the count would take
    # none, and its parent, believing to be alone, would fold the log in under the child's feet.
    adapter = open_store(path)
    (page,) = add_pages(adapter, 1)
    adapter.models()
    to_child, to_parent = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with adapter.snapshot():
                seen = [row.id for row in adapter.page_rows()]
                os.write(to_parent[1], b"r")
                os.read(to_child[0], 1)
                same = [row.id for row in adapter.page_rows()] == seen == [page]
                same = same and len(list(adapter.read_pages(seen))) == 1
            os.write(to_parent[1], b"y" if same else b"n")
        finally:
            os._exit(0)
    try:
        assert os.read(to_parent[0], 1) == b"r"
        with adapter.transaction():
            adapter.delete_pages([page])
        adapter.checkpoint()
        adapter.close()
        assert Path(f"{path}-wal").exists(), "the parent believed to be the last one"
        os.write(to_child[1], b"g")
        assert os.read(to_parent[0], 1) == b"y"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in (*to_child, *to_parent):
            os.close(end)


def test_a_child_of_a_transaction_does_not_trust_its_locks(path: Path) -> None:
    """SQLite remembers in memory that the parent has the lock, and takes it for the child's."""
    adapter = open_store(path)
    (page,) = add_pages(adapter, 1)
    with adapter.transaction():
        adapter.delete_pages([page])
        for call in (adapter.count_blocks, lambda: open_store(path).count_blocks()):
            with pytest.raises(UnavailableError, match="in a transaction when this process was fo"):
                in_fork(call)
    assert adapter.page_rows() == []
    assert in_fork(adapter.count_blocks) == 0
    adapter.close()


def test_a_fork_waits_for_a_thread_that_looks_at_a_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child inherited a lock of SQLite's own, and waited for it without end."""
    open_store(path).close()
    looking, go_on = threading.Event(), threading.Event()
    look = _sqlite_connect.is_ours

    def slowly(connection: object) -> bool:
        looking.set()
        assert go_on.wait(60)
        return look(connection)

    monkeypatch.setattr(_sqlite_connect, "is_ours", slowly)
    opened: list[Adapter] = []
    thread = threading.Thread(target=lambda: opened.append(open_store(path)))
    thread.start()
    assert looking.wait(60)
    later = threading.Timer(0.3, go_on.set)
    later.start()
    assert in_fork(go_on.is_set)
    thread.join(60)
    opened[0].close()
