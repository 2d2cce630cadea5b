# SPDX-License-Identifier: Apache-2.0
"""``pydedup top``, and ``pydedup serve --record``, on real servers and real terminals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

import pydedup
from pydedup.errors import ArgumentError, UnavailableError
from pydedup.http.metrics import MOST_MODELS, Metrics
from pydedup.http.scrape import Histogram, Rates, Source, parse
from pydedup.replacement import Trace
from pydedup.testing.disks import SmallDisk
from pydedup.testing.program import run_here
from pydedup.testing.servers import unused_port
from pydedup.testing.serving import Server, Start

BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


def top(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_here("top", *words, env=environment)


@contextlib.contextmanager
def load(server: Server, name: str = "dense") -> Iterator[None]:
    """Ask one request after the other meanwhile."""
    done = threading.Event()

    connection = server.connect()

    def ask() -> None:
        while not done.is_set():
            assert server.infer(name, BODY, connection=connection).status == 200

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        connection.close()


def test_numbers_are_those_of_the_server(start: Start, store_url: str) -> None:
    server = start(store_url)
    assert server.infer("dense", BODY).status == 200  # its page is read before anybody looks
    with load(server):
        done = top(server.url, "--once", "--json", "--interval", 1)
        asked = server.metric("pydedup_requests_total", model="dense@2", outcome="ok")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["url"] == server.url
    assert shown["interval_seconds"] > 0.9
    assert 0 < shown["requests"]["per_second"] * shown["interval_seconds"] < asked
    assert shown["requests"]["failed_per_second"] == 0
    assert 0 < shown["latency_seconds"]["p50"] <= shown["latency_seconds"]["p99"] < 30
    assert not shown["latency_seconds"]["since_start"]
    assert shown["batches"]["mean_requests"] == 1
    assert shown["batches"]["mean_rows"] == 1
    assert shown["pool"]["hit_ratio"] == 1
    budget = server.metric("pydedup_pool_budget_bytes")
    assert 0 < shown["pool"]["bytes"] <= shown["pool"]["budget_bytes"] == budget
    (model,) = shown["models"]
    assert model["model"] == "dense@2"
    assert model["requests_per_second"] == pytest.approx(shown["requests"]["per_second"])

    # With nobody asking, rates are 0 and latencies are those since the start.
    server.infer("dense", {"inputs": []})
    quiet = json.loads(top(server.url, "--json", "--interval", 0.2).stdout)
    assert quiet["requests"]["per_second"] == 0
    assert quiet["requests"]["under_way"] == 0
    assert quiet["latency_seconds"]["since_start"]
    assert quiet["requests"]["total"] == server.metric("pydedup_request_seconds_count")
    asked = server.metric("pydedup_requests_total", model="dense@2", outcome="ok")
    assert [m["requests"] for m in quiet["models"] if m["model"] == "dense@2"] == [asked]
    assert [m["failed"] for m in quiet["models"] if m["model"] == ""] == [1]


def test_a_table_into_a_pipe_and_names_that_would_steer(start: Start, tmp_path: Path) -> None:
    import numpy as np

    from pydedup.graph import Graph, Node

    url = f"sqlite:///{tmp_path / 's.db'}"
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    with pydedup.open(url) as store:
        store.add("up\u202eside@1", {"w": np.ones((3, 4), np.float32)}, graph=graph)
    server = start(url)
    assert server.infer("up%E2%80%AEside", BODY).status == 200
    done = top(server.url, "--interval", 0.1)  # a pipe is as --once
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == server.url
    labels = ["requests", "latency", "batches", "pool", "pages", "waits", "process"]
    assert [line.split()[0] for line in lines[1:8]] == labels
    assert "1 in all" in lines[1]
    assert "(since the start)" in lines[2]
    assert lines[-1].split() == ["up\\u202eside@1", "0.0", "0.0", "1", "0"]


def test_a_token_and_tls(start: Start, store_url: str, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    tls = ["--tls-cert", cert, "--tls-key", key]
    server = start(store_url, *tls, env={"PYDEDUP_TOKEN": "s3cret"})
    words = [server.url, "--json", "--interval", 0.1]
    done = top(*words, "--tls-ca", cert, PYDEDUP_TOKEN="s3cret")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["requests"]["total"] == 0
    wrong = top(*words, "--tls-ca", cert, PYDEDUP_TOKEN="guess")
    assert wrong.returncode == 4
    assert "token" in wrong.stderr
    assert "guess" not in wrong.stderr
    untrusted = top(*words, PYDEDUP_TOKEN="s3cret")
    assert untrusted.returncode == 4
    assert f"the certificate of {server.url} is not trusted: self" in untrusted.stderr
    assert "--tls-ca" in untrusted.stderr
    # It was told to trust what it trusts.
    other_name = server.url.replace("127.0.0.1", "127.1")
    misnamed = top(other_name, *words[1:], "--tls-ca", cert, PYDEDUP_TOKEN="s3cret")
    assert misnamed.returncode == 4
    assert "by a name that the certificate has" in misnamed.stderr
    assert "--tls-ca" not in misnamed.stderr
    none = top(*words, "--tls-ca", __file__)
    assert none.returncode == 2
    assert f"no certificate (PEM) in {__file__}" in none.stderr


def test_what_is_no_server_is_said(server: Server, store_url: str) -> None:
    for url, status, said in (
        ("http://127.0.0.1:9", 4, "does not answer"),
        (f"{server.url}/v2", 4, "status 404"),
        (f"{server.url}/é t", 4, "/%C3%A9%20t/metrics answers with status 404"),
        (store_url, 2, "no URL of a server"),
        ("http://127.0.0.1:99999", 2, "no URL of a server"),
        ("http://", 2, "no URL of a server"),
        ("http://a b", 2, "no URL of a server"),
        ("http://a..b", 2, "no URL of a server"),
    ):
        done = top(url, "--once", "--interval", 0.1)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    done = top(server.url, "--once", "--interval", "nan")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--interval must be a number" in done.stderr


class Terminal:
    """The program on a terminal of its own."""

    def __init__(
        self,
        *words: object,
        columns: int = 100,
        lines: int = 30,
        term: str = "xterm-256color",
        by: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.master, self.slave = pty.openpty()
        ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        dropped = ("COLUMNS", "LINES", "NO_COLOR", "PYDEDUP_TOKEN")
        kept = {key: value for key, value in os.environ.items() if key not in dropped}
        self.process = subprocess.Popen(
            [*by, sys.executable, "-P", "-m", "pydedup", "top", *map(str, words)],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env={**kept, "TERM": term, **(env or {})},
            start_new_session=True,
        )
        self.text = ""

    def read_until(self, wanted: str, seconds: float = 100) -> str:
        """Return what is written up to some words; what was returned before is not looked at."""
        end = time.monotonic() + seconds
        written = ""
        while wanted not in written:
            left = end - time.monotonic()
            assert left > 0, f"no {wanted!r} in {written[-3000:]!r}"
            if select.select([self.master], [], [], left)[0]:
                written += os.read(self.master, 65536).decode(errors="replace")
        self.text += written
        return written

    def close(self) -> int:
        status = self.process.wait(100)
        # As it was: lines, an echo, the cursor, and the screen that was there before.
        assert termios.tcgetattr(self.slave) == self.before
        self.read_until("\x1b[?1049l")
        os.close(self.master)
        os.close(self.slave)
        assert "Traceback" not in self.text
        return status


def test_it_is_watched_until_q(start: Start, store_url: str) -> None:
    server = start(store_url)
    terminal = Terminal(server.url, "--interval", 0.2)
    with load(server):
        terminal.read_until("dense@2")
        shown = terminal.read_until("p99")
        assert "requests" in shown
        terminal.read_until("dense@2")
    os.write(terminal.master, b"xq")
    assert terminal.close() == 0
    # Nothing is wrapped: each screen has no more lines than the terminal.
    assert max(screen.count("\n") for screen in terminal.text.split("\x1b[H")) < 30


@pytest.mark.parametrize("by", [(), ("sh", "-c", 'exec "$@" <&-', "sh")], ids=["input", "no input"])
def test_it_is_watched_until_ctrl_c_on_a_narrow_terminal(
    start: Start, store_url: str, by: Sequence[str]
) -> None:
    server = start(store_url)
    server.infer("dense", BODY)
    terminal = Terminal(server.url, "--interval", 0.2, columns=40, lines=12, by=by)
    terminal.read_until("dense@2")
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.close() == 0


def test_names_stay_different_on_a_narrow_terminal(start: Start, tmp_path: Path) -> None:
    """All were `custom...ion@1`, with a column of zeros beside them and dots for an ellipsis."""
    import numpy as np

    from pydedup.graph import Graph, Node

    url = f"sqlite:///{tmp_path / 's.db'}"
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    names = [f"customer-{number:03d}/sentiment-analysis-production" for number in range(3)]
    with pydedup.open(url) as store:
        for name in names:
            store.add(name, {"w": np.ones((3, 4), np.float32)}, graph=graph)
    server = start(url)
    for name in names:
        assert server.infer(name.replace("/", "%2F"), BODY).status == 200
    terminal = Terminal(server.url, "--interval", 0.2, columns=40, env={"LC_ALL": "C.UTF-8"})
    shown = terminal.read_until("customer-002/")
    assert "customer-000/s…-production@1" in shown
    assert re.search(r"pool .* of 464\.0 MiB in .*…", shown)  # it was cut off without a sign
    assert "Failed/s" not in shown
    os.write(terminal.master, b"q")
    assert terminal.close() == 0


def test_a_dumb_terminal_gets_a_table(start: Start, store_url: str) -> None:
    """It was shown nothing, for ever."""
    server = start(store_url)
    server.infer("dense", BODY)
    terminal = Terminal(server.url, "--interval", 0.2, term="dumb")
    terminal.read_until("dense@2")
    assert terminal.process.wait(100) == 0
    assert "\x1b" not in terminal.text
    os.close(terminal.master)
    os.close(terminal.slave)


def test_a_server_that_goes_away_is_shown_and_asked_again(start: Start, store_url: str) -> None:
    port = unused_port()  # which no connection is given while nobody listens there
    server = start(store_url, "--port", port)
    terminal = Terminal(server.url, "--interval", 0.2)
    terminal.read_until("requests")
    assert server.stop() == 0
    terminal.read_until("does not answer")
    again = start(store_url, "--port", port)
    again.infer("dense", BODY)
    shown = terminal.read_until("dense@2")
    assert "does not answer" not in shown.rpartition("\x1b[H")[2]
    os.write(terminal.master, b"q")
    assert terminal.close() == 0


def test_a_server_that_is_not_there_yet_is_waited_for(start: Start, store_url: str) -> None:
    port = unused_port()
    terminal = Terminal(f"http://127.0.0.1:{port}", "--interval", 0.2)
    terminal.read_until("does not answer")
    server = start(store_url, "--port", port)
    server.infer("dense", BODY)
    terminal.read_until("dense@2")
    os.write(terminal.master, b"Q")
    assert terminal.close() == 0


# ---- the numbers themselves ---------------------------------------------------------------------


def test_quantiles_are_those_of_prometheus() -> None:
    seconds = Histogram((0.1, 0.2, 0.4, math.inf), (10, 30, 40, 40), 8.0)
    assert seconds.quantile(0.5) == pytest.approx(0.15)  # 20 of 40: half of the second bucket
    assert seconds.quantile(0.25) == pytest.approx(0.1)
    assert seconds.quantile(0.99) == pytest.approx(0.2 + 0.2 * 0.96)
    assert seconds.quantile(1.0) == pytest.approx(0.4)
    assert seconds.mean == pytest.approx(0.2)
    beyond = Histogram((0.1, math.inf), (1, 10), 50.0)
    assert beyond.quantile(0.99) == pytest.approx(0.1)  # all that is known: it is above
    assert Histogram().quantile(0.5) is None
    assert Histogram().mean is None
    later = Histogram((0.1, 0.2, 0.4, math.inf), (10, 40, 50, 50), 11.0)
    assert later.since(seconds).counts == (0, 10, 10, 10)
    assert later.since(seconds).quantile(0.5) == pytest.approx(0.15)
    assert later.since(Histogram()) is later  # another server's


def test_a_server_that_was_started_again_counts_from_its_start(server: Server) -> None:
    source = Source(server.url, None)
    first = source.scrape()
    second = source.scrape()
    source.close()
    rates = Rates(first, second)
    assert rates.span == second.at - first.at > 0
    assert rates.per_second(rates.span * 3) == pytest.approx(3)
    gauges = {**first.gauges, "process_start_time_seconds": 1.0}
    other: Any = type(first)(first.at, first.models, gauges=gauges, pool=first.pool)
    restarted = Rates(other, second)
    assert restarted.span is None
    assert restarted.per_second(5) is None
    assert restarted.seconds.count == second.seconds.count


def test_a_server_whose_clock_is_ahead_is_not_up_for_less_than_no_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.0)
    assert json.loads(run_here("top", server.url, "--once", "--json").stdout)["up_seconds"] == 0
    assert "up 0.00 s" in run_here("top", server.url, "--once").stdout


def test_what_is_no_metrics_is_refused() -> None:
    for text in ("", "up 1\n", "<html>", "pydedup_pool_hits_total one\n"):
        with pytest.raises(ValueError, match=r"."):
            parse(text)


def test_histograms_are_of_one_moment() -> None:
    metrics = Metrics(dict, {})
    over = threading.Event()

    def count() -> None:
        while not over.is_set():
            metrics.batch(1, 2)
            metrics.request("m@1", "ok", 0.5)

    counting = threading.Thread(target=count)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    counting.start()
    try:
        for _ in range(300):
            seen = parse(metrics.text().decode() + "pydedup_pool_hits 0\n")
            assert seen.batch_requests.mean in (None, 1)
            assert seen.batch_rows.mean in (None, 2)
            assert seen.batch_rows.count == seen.batch_requests.count
            assert seen.seconds.mean in (None, 0.5)
    finally:
        over.set()
        counting.join()
        sys.setswitchinterval(switch)


def test_models_that_come_and_go_are_not_told_for_ever() -> None:
    """A server whose models are trained anew each hour told of all that there ever were."""
    metrics = Metrics(dict, {})
    for number in range(MOST_MODELS):
        metrics.request(f"m@{number}", "ok", 0.5)
    metrics.request("m@1", "bad_request", 0.5)
    metrics.request("m@0", "ok", 0.5)
    metrics.request("new@1", "ok", 0.5)  # m@2 goes
    metrics.request("new@2", "timeout", 0.5)  # m@3
    text = metrics.text().decode()
    assert text.count("m@9999") == 1  # as nobody asks when each of thousands was counted first
    seen = parse(text + "pydedup_pool_hits 0\n")
    assert seen.models[("m@0", "ok")] == 2
    assert seen.models[("new@2", "timeout")] == 1
    assert {model for model, _ in seen.models} == {
        "m@0",
        "m@1",
        "new@1",
        "new@2",
        *(f"m@{number}" for number in range(4, MOST_MODELS)),
    }
    for number in range(4, MOST_MODELS):
        metrics.request(f"m@{number}", "ok", 0.5)
    metrics.request("new@3", "ok", 0.5)  # m@1 goes, with both its outcomes
    seen = parse(metrics.text().decode() + "pydedup_pool_hits 0\n")
    assert not any(model == "m@1" for model, _ in seen.models)
    metrics.request("m@0", "ok", 0.5)  # it had 2
    for number in range(MOST_MODELS):
        metrics.request(f"other@{number}", "ok", 0.5)
    metrics.request("m@0", "ok", 0.5)
    later = parse(metrics.text().decode() + "pydedup_pool_hits 0\n")
    before = dataclasses.replace(seen, models={("m@0", "ok"): 2.0})
    assert Rates(before, later).models["m@0"] == 1
    assert seen.seconds.count == 2 * MOST_MODELS + 1


def test_a_source_says_what_it_wants() -> None:
    with pytest.raises(ArgumentError, match="ftp"):
        Source("ftp://127.0.0.1", None)
    with pytest.raises(UnavailableError, match="does not answer"):
        Source("http://127.0.0.1:9", None).scrape()


# ---- recording ----------------------------------------------------------------------------------


def test_a_server_records_what_it_used(start: Start, store_url: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    server = start(store_url, "--record", path)
    for _ in range(7):
        assert server.infer("dense", BODY).status == 200
    assert server.infer("dense/versions/1", BODY).status == 200
    assert server.stop() == 0
    trace = Trace.load(path)
    assert len(trace.owners) == 8
    assert len(trace) >= 8
    with pydedup.open(store_url, mode="r") as store:
        numbers = {info.id: info.address for info in store.models()}
        page = store.report(trace=trace)
    called = [numbers[owner] for owner in trace.owners.tolist()]
    assert called == ["dense@2"] * 7 + ["dense@1"]
    assert "in 8 calls" in page


def test_a_trace_for_which_there_is_no_room_leaves_the_earlier_one(
    start: Start, store_url: str, new_disk: Callable[[Path, int], SmallDisk], tmp_path: Path
) -> None:
    folder = new_disk(tmp_path / "disk", 1).folder
    path = folder / "trace.npz"
    path.write_bytes(b"an earlier one")
    server = start(store_url, "--record", path, status=4)
    assert server.infer("dense", BODY).status == 200
    with contextlib.suppress(OSError):
        (folder / "ballast").write_bytes(bytes(2 << 20))
    assert server.stop() == 4
    assert any(f"no space left while writing {path}" in line for line in server.errors)
    assert path.read_bytes() == b"an earlier one"
    assert sorted(one.name for one in folder.iterdir()) == ["ballast", "trace.npz"]


def test_a_server_that_does_not_start_writes_no_trace(store_url: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["serve", store_url, "--port", port, "--record", tmp_path / "trace.npz"]
        done = run_here(*words)
    assert done.returncode == 4
    assert f"cannot listen on 127.0.0.1, port {port}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_is_said_at_once(store_url: str, tmp_path: Path) -> None:
    trace = tmp_path / "missing" / "trace.npz"
    done = run_here("serve", store_url, "--port", "0", "--record", trace)
    assert done.returncode == 2, done.stderr
    assert "missing/trace.npz" in done.stderr
    assert done.stdout == ""
