# SPDX-License-Identifier: Apache-2.0
"""The program interrupted, terminated, kept waiting, and with nobody who reads what it writes."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup.cli import options, progress
from pydedup.testing.program import PROGRAM, clean_environment, run_here

from .conftest import path_of

#: Run the program where nothing but its output and its status counts.
run_program = run_here


#: The program that says how far it is at once, and not after seconds.
_EAGER = """
import sys
from pydedup.cli import main, progress, signals
progress._DELAY_SECONDS, progress._LINE_SECONDS, signals._PATIENCE_SECONDS = 0, 0.1, 0.1
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_leaves_the_store_as_it_was(url: str, model: Path) -> None:
    blocker = sqlite3.connect(path_of(url), isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")  # the add has to wait for this one, so it is under way
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _EAGER, "add", f"{url}?timeout=60", "n@1", str(model)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = ""
    while "matching 100.0 %" not in line:  # then comes what has to wait
        line = process.stderr.readline()
        assert re.match(r"pydedup: \w+", line), line  # progress: not on a terminal, lines
    process.send_signal(signal.SIGINT)
    # It tidies up, for which it must wait for the blocker as well; who is impatient asks again.
    for _ in range(20):
        try:
            out, err = process.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
    blocker.execute("ROLLBACK")
    blocker.close()
    # The last may come when all but the exit of Python is done.
    assert process.returncode in (130, -signal.SIGINT)
    assert err.splitlines()[-1].startswith(
        "pydedup: interrupted, either everything was added or nothing"
    )
    assert "Traceback" not in err
    assert out == ""
    assert run_program("verify", url).returncode == 0
    listed = json.loads(run_program("ls", url, "--json").stdout)["models"]
    assert [found["model"] for found in listed] == ["m@1", "m@2"]


@pytest.mark.parametrize(
    "url", ["mysql://ann@HOST/db?connect_timeout=1000", "postgresql://HOST/db"]
)
def test_a_database_that_does_not_answer_is_seen_and_can_be_left(url: str) -> None:
    """Nothing was said for ten seconds, and a driver that waits in C let no Ctrl-C through."""
    pytest.importorskip("mysql.connector" if url.startswith("mysql") else "psycopg")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = url.replace("HOST", f"127.0.0.1:{silent.getsockname()[1]}")
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _EAGER, "ls", place], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        try:
            with silent.accept()[0], process.stderr:
                assert process.stderr.readline().startswith("pydedup: opening the store")
                process.send_signal(signal.SIGINT)
                for line in process.stderr:
                    if "Ctrl-C once more" in line:
                        process.send_signal(signal.SIGINT)
                assert line == "pydedup: interrupted, the store is as it was before\n"
            assert process.wait() == 130
        finally:
            process.kill()
            process.wait()


def test_a_signal_while_mysql_is_connected_to_is_noticed_at_once() -> None:
    """MySQL's driver let none through, and crashed where it came a moment earlier or later."""
    pytest.importorskip("mysql.connector")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"mysql://ann@127.0.0.1:{silent.getsockname()[1]}/db?connect_timeout=1000"
        with subprocess.Popen(
            [*PROGRAM, "ls", place], stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                with silent.accept()[0]:
                    process.terminate()
                    assert process.wait(50) == 143
            finally:
                process.kill()
            assert process.stderr is not None
            last = process.stderr.read().splitlines()[-1]
    assert last == "pydedup: interrupted, the store is as it was before"


def test_what_notices_ctrl_c_may_take_its_time_to_end() -> None:
    code = f"""
import os, signal, threading, time
from pydedup.cli import app, signals

def work(**_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)  # as a rollback does; nothing is said of it
        print("tidied up", flush=True)
        raise

app.looking.kernels.callback = work
words = ["kernels"]
{_EAGER.replace("sys.argv[1:]", "words")}
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=50
    )
    said = "pydedup: interrupted, the store is as it was before\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "tidied up\n", said)


def _program_of(work: str, main: str) -> list[str]:
    """Return the program with ``work`` in the place of a command."""
    code = f"""
import atexit, os, signal, sys, time, weakref
from pydedup.cli import app, main

{work}

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have it ignored
app.looking.kernels.callback = work
sys.argv = ["pydedup", "kernels"]
sys.exit({main})
"""
    return [sys.executable, "-P", "-c", code]


def _run_work(work: str, main: str = "main(['kernels'])") -> subprocess.CompletedProcess[str]:
    return subprocess.run(_program_of(work, main), capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize(("name", "status"), [("SIGHUP", 129), ("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_within_a_callback_is_neither_lost_nor_a_traceback(name: str, status: int) -> None:
    """Python ignores what is raised there; it showed that, and the command went on."""
    done = _run_work(f"""
class Thing:
    pass

def struck(_):
    os.kill(os.getpid(), signal.{name})
    for _ in range(1_000_000):  # the signal's exception comes at some step of these
        pass

def work(**_):
    thing = Thing()
    seen = weakref.ref(thing, struck)
    del thing
    time.sleep(60)
""")
    said = "pydedup: interrupted, the store is as it was before\n"
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)


@pytest.mark.parametrize(("name", "status"), [("SIGHUP", 129), ("SIGINT", 130), ("SIGTERM", 143)])
def test_what_an_object_raises_that_was_left_half_made_is_not_shown(name: str, status: int) -> None:
    """As the archive of an `export` was: "Exception ignored in: <function ZipFile.__del__"."""
    done = _run_work(f"""
class Archive:
    def __init__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(60)
        self.file = None

    def __del__(self):
        if self.file is None:
            print("never")

def work(**_):
    Archive()
""")
    said = "pydedup: interrupted, the store is as it was before\n"
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)


def test_what_raises_its_own_interrupt_for_a_signal_ends_as_the_signal_has_it() -> None:
    """As Ray's core does: after SIGTERM the status was that of Ctrl-C."""
    done = _run_work("""
def work(**_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        pass
    raise KeyboardInterrupt
""")
    assert done.returncode == 143


@pytest.mark.parametrize(("name", "status"), [("SIGHUP", 129), ("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_does_not_interrupt_the_tidying_up(name: str, status: int) -> None:
    """A terminal that is closed may send two: files stayed, and the command ended in silence."""
    done = _run_work(f"""
def work(**_):
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(60)
    finally:
        for number in (signal.{name}, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        print("tidied up", file=sys.stderr)
""")
    said = "tidied up\npydedup: interrupted, the store is as it was before\n"
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)


def test_a_signal_that_comes_out_as_another_error_is_still_a_signal() -> None:
    """Compiled code may make an error of its own of it, which was told as a fault of pydedup."""
    done = _run_work("""
def work(**_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt as error:
        raise ImportError("numpy.core.multiarray failed to import") from error
""")
    said = "pydedup: interrupted, the store is as it was before\n"
    assert (done.returncode, done.stdout, done.stderr) == (143, "", said)


def test_a_signal_that_comes_out_as_an_error_raised_from_itself_is_told() -> None:
    """As Ray raises some: the search for what had led to it went round for ever."""
    done = _run_work("""
def work(**_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt:
        error = RuntimeError("of the dashboard")
        raise error from error
""")
    said = "pydedup: interrupted, the store is as it was before\n"
    assert (done.returncode, done.stdout, done.stderr) == (143, "", said)


@pytest.mark.parametrize(
    ("place", "name", "status"),
    [
        ("app._prepare_streams", "SIGINT", 130),
        ("_thread.start_new_thread", "SIGINT", 130),
        ("_thread.start_new_thread", "SIGTERM", 143),
    ],
)
def test_a_signal_before_a_command_begins_is_no_traceback(
    place: str, name: str, status: int
) -> None:
    done = _run_work(f"""
import _thread

def begin(*_):
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(60)
    finally:
        raise RuntimeError("as of a lock that was interrupted")

def work(**_):
    raise AssertionError

{place} = begin
""")
    said = "pydedup: interrupted, the store is as it was before\n"
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_when_a_command_has_ended_does_not_deny_it(name: str, status: int) -> None:
    """It was said to be interrupted, once more or with the store as it was before."""
    for status_of_work, said in (
        (0, ""),
        (status, "pydedup: interrupted, the store is as it was before\n"),
    ):
        done = _run_work(
            f"""
closed = os.close

def close(number):
    if sys._getframe(1).f_code.co_name == "__exit__":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
    closed(number)

def work(**_):
    os.close = close
    if {status_of_work}:
        os.kill(os.getpid(), signal.{name})
        time.sleep(60)
"""
        )
        assert (done.returncode, done.stdout, done.stderr) == (status_of_work, "", said)


def test_ctrl_c_while_python_ends_is_no_traceback() -> None:
    done = _run_work(
        """
def late():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1_000_000):  # what is raised for it comes at some step of these
        pass

def work(**_):
    atexit.register(late)
""",
        main="main()",
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_command_whose_reader_does_not_read_ends_at_the_first_signal() -> None:
    """It then waited to write out what was left."""
    program = _program_of(
        """
def work(**_):
    os.set_blocking(1, False)
    try:
        while True:
            os.write(1, b".")
    except BlockingIOError:
        os.set_blocking(1, True)
    sys.stdout.write("this is left")
    os.kill(os.getpid(), signal.SIGTERM)
""",
        main="main()",
    )
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(50) == 143
        finally:
            process.kill()
        assert process.stderr is not None
        assert process.stderr.read() == b"pydedup: interrupted, the store is as it was before\n"


@pytest.mark.parametrize("words", ["alias URL m prod 1", "rm URL m@2 -y", "add URL m@3 FILE"])
def test_ctrl_c_when_all_is_done_does_not_deny_it(words: str, url: str, model: Path) -> None:
    """It said that the store was as before, while what prints the result was loaded."""
    code = """
import sys

class Finder:
    def find_spec(self, name, *more):
        if name == "rich":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
from pydedup.cli import main
sys.exit(main(sys.argv[1:]))
"""
    given = {"URL": url, "FILE": str(model)}
    arguments = [given.get(word, word) for word in words.split()]
    before = run_program("ls", url, "--json").stdout
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    said = r"pydedup: interrupted, .*(or nothing|may have changed); `pydedup ls` shows \w+\n"
    assert re.fullmatch(said, done.stderr)
    assert run_program("ls", url, "--json").stdout != before


def test_ctrl_c_when_a_store_was_just_opened_closes_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty log stayed beside the file."""

    class Interrupted(progress.Watch):
        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            raise KeyboardInterrupt

    monkeypatch.setattr(options, "Watch", Interrupted)
    assert run_here("ls", url).returncode == 130
    assert [path.name for path in path_of(url).parent.iterdir()] == [path_of(url).name]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_command_that_is_terminated_leaves_nothing_behind(
    tmp_path: Path, number: int, status: int
) -> None:
    """A file as large as the model stayed, under a hidden name."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as store:
        store.add("m", {"w": np.random.default_rng(0).standard_normal((8000, 1000))})
    out = tmp_path / "out"
    out.mkdir()
    # Whoever runs the tests may have SIGHUP ignored.
    words = ["env", "--default-signal=HUP", *PROGRAM, "export", url, "m", str(out / "m.npz")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not any(out.iterdir()):
            time.sleep(0.001)
        process.send_signal(number)
        _, said = process.communicate()
    if process.returncode:  # it may have been done by then
        assert process.returncode == status
        assert said == "pydedup: interrupted, the store is as it was before\n"
        assert list(out.iterdir()) == []


@pytest.mark.parametrize("words", ["alias m prod 1", "rm m@2 -y", "quota t=a 5"])
def test_a_change_that_waits_for_another_writer_says_so(
    words: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was silent for half a minute."""
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.1)
    command, *rest = words.split()
    with contextlib.closing(sqlite3.connect(path_of(url), isolation_level=None)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        done = run_here(command, f"{url}?timeout=1", *rest)
    assert done.returncode == 4
    *said, last = done.stderr.splitlines()
    # A busy machine may take long enough over that to say it, too.
    waited = [line for line in said if not line.startswith("pydedup: opening the store, ")]
    assert waited
    for line in waited:
        assert line.startswith(
            "pydedup: waiting for the database, which others may be writing to, "
        )
    assert "database is locked" in last


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of a model whose list of tensors is longer than a pipe holds."""
    url = f"sqlite:///{tmp_path_factory.mktemp('long') / 'long.db'}"
    with pydedup.open(url) as store:
        layers = {f"layer.{n}.weight": np.zeros(1, np.float32) for n in range(2000)}
        store.add("many", {**layers, "big": np.arange(100_000, dtype=np.float32)})
    return url


@pytest.mark.parametrize("command", ["--help", "info", "info --json", "ls", "load"])
def test_a_reader_that_goes_away_is_no_error(command: str, long: str) -> None:
    url = long
    words = {
        "info": f"info {url} many --tensors",
        "info --json": f"info {url} many --tensors --json",
        "ls": f"ls {url}",
        "load": f"load {url} many -q",
    }.get(command, command)
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(PROGRAM)} {words} | head -n 1; exit ${{PIPESTATUS[0]}}"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode in (0, 141)
    assert done.stdout.count("\n") == 1
    if command in ("info", "info --json", "load"):
        assert done.returncode == 141


@pytest.mark.parametrize("words", ["info {} many --tensors --json", "load {} many -t big -o -"])
def test_what_is_printed_is_whole_or_an_error_where_python_does_not_buffer(
    words: str, long: str
) -> None:
    """Half a document on a full disk, or in a pipe, was status 0 then, as in most containers."""
    unbuffered = clean_environment({"PYTHONUNBUFFERED": "1"})
    line = f"{' '.join(PROGRAM)} {words.format(long)}"
    broken = subprocess.run(
        ["bash", "-c", f"{line} | head -c 9; exit ${{PIPESTATUS[0]}}"],
        env=unbuffered,
        capture_output=True,
        check=False,
    )
    assert (broken.returncode, broken.stderr, len(broken.stdout)) == (141, b"", 9)
    printed = [
        subprocess.run(["bash", "-c", line], env=env, capture_output=True, check=True).stdout
        for env in (unbuffered, clean_environment())
    ]
    assert printed[0] == printed[1]


def test_standard_error_that_cannot_be_written(kept: str) -> None:
    """The status was 1 then, as if `verify` had found damage."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*PROGRAM, "info", kept, "x"], stderr=full, check=False)
    assert done.returncode == 3
    gone = f"{' '.join(PROGRAM)} info {kept} x 2>&1 | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", gone], check=False).returncode == 3


def test_standard_output_that_cannot_be_written(kept: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, "ls", kept], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 4
    assert done.stderr == (
        "pydedup: error: cannot write the output: No space left on device; what was done "
        "before stays\n"
    )


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", ">&- 2>&-"])
@pytest.mark.parametrize("words", ["ls {}", "ls {} --json", "--version"])
def test_standard_output_that_is_closed(kept: str, words: str, closed: str) -> None:
    """The status was 0, though whoever reads it has nothing."""
    line = f"{' '.join(PROGRAM)} {words.format(kept)} {closed}"
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4
    said = "cannot write the output: Bad file descriptor; what was done before stays"
    assert done.stderr == ("" if "2>" in closed else f"pydedup: error: {said}\n")


def test_no_file_gets_the_number_of_a_stream_that_is_closed(kept: str) -> None:
    """What a library says there would go into the store."""
    code = f"import os; from pydedup.cli import main; main(['ls', {kept!r}]); os._exit(os.dup(4))"
    line = f'exec {sys.executable} -P -c "$0" <&- >&- 2>&- 4</dev/null'
    assert subprocess.run(["bash", "-c", line, code], check=False).returncode > 2
