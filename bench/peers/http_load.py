# SPDX-License-Identifier: Apache-2.0
"""A real `pydedup serve` under load, beside predictions in process; and the soak of `make soak`.

    python bench/peers/http_load.py [--seconds S] [--rate R] [--connections C] [--arrivals KIND]
                                    [--rows N] [--json]
    python bench/peers/http_load.py --soak --seconds S

Open loop: requests are due at times drawn beforehand, whether answers come or not, and a latency
counts from when its request was due, so a server that falls behind is not spared. Each connection
is a thread; a request that is due when all are busy waits for one. The same arrivals are predicted
in process before and after, and the medians of both turns are reported beside those of HTTP.
"small" is 784 -> 256 -> 10 in float32, binary tensors.

The soak mixes twelve variants, JSON and binary tensors, 1 to 8 rows, metadata, metrics, requests
that are wrong, loading and unloading, and an alias that moves. Each answer is compared with what
the weights give. It fails at any answer that is not as it must be, and when the server's memory at
the end (median of the last tenth) is more than 24 MiB above that of the third tenth.

Not called http.py: that name would hide the module of the standard library from all files here.
"""

from __future__ import annotations

import argparse
import json
import queue
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import pydedup
from pydedup.graph import Graph, Node
from pydedup.testing.serving import serving

GROWTH_BYTES = 24 * 2**20
VARIANTS = 12
SIZES = (784, 256, 10)
HEADER = "Inference-Header-Content-Length"


def mlp(seed: int, variant: int = 0) -> tuple[dict[str, Any], Graph]:
    """Two dense layers; variants differ in the second."""
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((SIZES[1], SIZES[0]), np.float32) * 0.05
    second = np.random.default_rng(100 + variant).standard_normal((SIZES[2], SIZES[1]), np.float32)
    nodes = (
        Node("linear", ("x",), "h", {"weight": "a"}),
        Node("relu", ("h",), "r"),
        Node("linear", ("r",), "y", {"weight": "b"}),
    )
    return {"a": first, "b": second * 0.1}, Graph(("x",), ("y",), nodes)


def answer_of(tensors: dict[str, Any], x: Any) -> Any:
    """Return what a model gives, by numpy."""
    return np.maximum(x @ tensors["a"].T, 0) @ tensors["b"].T


def message(path: str, x: Any, *, binary: bool) -> bytes:
    """Return a whole request."""
    entry: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": list(x.shape)}
    extra = ""
    if binary:
        entry["parameters"] = {"binary_data_size": x.nbytes}
        whole = {"inputs": [entry], "parameters": {"binary_data_output": True}}
        head = json.dumps(whole).encode()
        body, extra = head + x.tobytes(), f"{HEADER}: {len(head)}\r\n"
    else:
        body = json.dumps({"inputs": [{**entry, "data": x.reshape(-1).tolist()}]}).encode()
    return plain("POST", path, body, extra)


def plain(method: str, path: str, body: bytes = b"", extra: str = "") -> bytes:
    start = f"{method} {path} HTTP/1.1\r\nHost: bench\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
    return start.encode() + body


class Connection:
    """One kept connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> tuple[int, bytes, int | None]:
        """Return status, body, and the length of its JSON where there is more."""
        self._socket.sendall(request)
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more()
        head = data[:end].lower().split(b"\r\n")
        fields = dict(line.split(b": ", 1) for line in head[1:])
        need = end + 4 + int(fields[b"content-length"])
        while len(data) < need:
            data += self._more()
        length = fields.get(HEADER.lower().encode())
        return int(head[0].split()[1]), data[end + 4 :], None if length is None else int(length)

    def _more(self) -> bytes:
        part = self._socket.recv(1 << 16)
        if not part:
            raise ConnectionError("the server closed the connection")
        return part

    def close(self) -> None:
        self._socket.close()


@dataclass
class Task:
    """A request, and how to judge what comes back: the judge returns what is wrong, or None."""

    request: bytes
    judge: Callable[[int, bytes, int | None], str | None]


def outputs(status: int, body: bytes, length: int | None, wanted: Any) -> str | None:
    """Judge a prediction."""
    if status != 200:
        return f"status {status}: {body[:200]!r}"
    if length is None:
        found = np.array(json.loads(body)["outputs"][0]["data"], np.float32)
    else:
        found = np.frombuffer(body, np.float32, offset=length)
    if found.size != wanted.size:
        return f"{found.size} numbers instead of {wanted.size}"
    good = np.allclose(found.reshape(wanted.shape), wanted, rtol=1e-3, atol=1e-4)
    return None if good else "other numbers than the weights give"


@dataclass
class Result:
    """Latencies in seconds, and what went wrong."""

    latencies: list[float] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)

    def figures(self) -> dict[str, float]:
        """Return the median and the tail in milliseconds."""
        ms = np.array(self.latencies) * 1000
        p50, p99 = np.percentile(ms, [50, 99])
        figures = {"p50": p50, "p99": p99, "most": ms.max()}
        return {name: round(float(value), 3) for name, value in figures.items()}


def due_times(rate: float, seconds: float, arrivals: str, seed: int) -> Iterator[float]:
    """Yield when requests are due, in seconds from the beginning."""
    rng, at = np.random.default_rng(seed), 0.0
    while at < seconds:
        yield at
        at += float(rng.exponential(1 / rate)) if arrivals == "poisson" else 1 / rate


def in_process(predict: Callable[[Any], Any], xs: Sequence[Any], times: Iterator[float]) -> Result:
    """Predict when it is due; one that is late keeps the next one waiting."""
    result, begin = Result(), time.perf_counter() + 0.05
    for number, at in enumerate(times):
        wait_until(begin + at)
        predict(xs[number % len(xs)])
        result.latencies.append(time.perf_counter() - begin - at)
    return result


def over_http(port: int, connections: int, tasks: Iterator[Task], times: Iterator[float]) -> Result:
    """Send requests when they are due, each on the first connection that is free."""
    result, lock = Result(), threading.Lock()
    due: queue.SimpleQueue[tuple[float, Task] | None] = queue.SimpleQueue()

    def work() -> None:
        connection = Connection(port)
        while (item := due.get()) is not None:
            at, task = item
            try:
                reply = connection.ask(task.request)
                took = time.perf_counter() - at
                problem = task.judge(*reply)
            except (OSError, ValueError, KeyError) as error:
                took, problem = time.perf_counter() - at, f"{type(error).__name__}: {error}"
                connection.close()
                connection = Connection(port)
            with lock:
                result.latencies.append(took)
                if problem is not None:
                    result.wrong[problem] += 1
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    begin = time.perf_counter() + 0.05
    for at in times:
        wait_until(begin + at)
        due.put((begin + at, next(tasks)))
    for _ in threads:
        due.put(None)
    for thread in threads:
        thread.join()
    return result


def wait_until(when: float) -> None:
    while (left := when - time.perf_counter()) > 0:
        time.sleep(left)


# ---- measuring ----------------------------------------------------------------------------------


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return figures of HTTP and of predictions in process."""
    url = f"sqlite:///{folder / 'small.db'}"
    tensors, graph = mlp(0)
    with pydedup.open(url) as store:
        store.add("small@1", tensors, graph=graph)
    rng = np.random.default_rng(1)
    xs = [rng.standard_normal((options.rows, SIZES[0]), np.float32) for _ in range(64)]
    wanted = [answer_of(tensors, x) for x in xs]
    tasks = [
        Task(
            message("/v2/models/small/infer", x, binary=True),
            lambda status, body, length, y=y: outputs(status, body, length, y),
        )
        for x, y in zip(xs, wanted, strict=True)
    ]

    def endless() -> Iterator[Task]:
        while True:
            yield from tasks

    def times(seconds: float, seed: int) -> Iterator[float]:
        return due_times(options.rate, seconds, options.arrivals, seed)

    turn = max(options.seconds / 4, 1.0)
    with pydedup.open(url, mode="r") as store:
        in_process(lambda x: store.predict("small", x), xs, times(1.0, 0))
        before = in_process(lambda x: store.predict("small", x), xs, times(turn, 1))
    with serving(url) as server:
        over_http(server.port, options.connections, endless(), times(1.0, 0))
        process = psutil.Process(server.process.pid)
        rss = process.memory_info().rss
        http = over_http(server.port, options.connections, endless(), times(options.seconds, 2))
        grown = process.memory_info().rss - rss
    with pydedup.open(url, mode="r") as store:
        in_process(lambda x: store.predict("small", x), xs, times(1.0, 0))
        after = in_process(lambda x: store.predict("small", x), xs, times(turn, 3))
    inside = Result(before.latencies + after.latencies)
    ours, theirs = http.figures(), inside.figures()
    return {
        "requests": len(http.latencies),
        "errors": dict(http.wrong),
        "http_ms": ours,
        "in_process_ms": theirs,
        "added_ms": {name: round(ours[name] - theirs[name], 3) for name in ("p50", "p99")},
        "rss_growth_bytes": grown,
    }


# ---- soak ---------------------------------------------------------------------------------------


def soak_tasks(models: list[dict[str, Any]]) -> Iterator[Task]:
    """Yield a mixture of requests without end."""
    rng = np.random.default_rng(5)
    xs = [rng.standard_normal((1 + n % 8, SIZES[0]), np.float32) for n in range(16)]
    wanted = {
        (m, n): answer_of(tensors, x) for m, tensors in enumerate(models) for n, x in enumerate(xs)
    }

    def prediction() -> Task:
        m, n = int(rng.integers(len(models))), int(rng.integers(len(xs)))
        request = message(f"/v2/models/variant-{m}/infer", xs[n], binary=bool(rng.integers(4)))
        return Task(request, lambda *reply: outputs(*reply, wanted[m, n]))

    def by_alias() -> Task:
        n = int(rng.integers(len(xs)))
        request = message("/v2/models/moving/versions/live/infer", xs[n], binary=True)

        def judge(status: int, body: bytes, length: int | None) -> str | None:
            if status != 200:
                return f"alias: status {status}: {body[:200]!r}"
            version = int(json.loads(body[:length])["model_version"])
            return outputs(status, body, length, wanted[version - 1, n])

        return Task(request, judge)

    def expect(status: int, request: bytes) -> Callable[[], Task]:
        def judge(found: int, body: bytes, length: int | None) -> str | None:
            return None if found == status else f"{request[:60]!r}: status {found}"

        task = Task(request, judge)
        return lambda: task

    wrong = plain("POST", "/v2/models/variant-0/infer", b'{"inputs":[{"name":"x"}]}')
    kinds: list[tuple[int, Callable[[], Task]]] = [
        (80, prediction),
        (10, by_alias),
        (2, expect(200, plain("GET", "/v2/models/variant-3"))),
        (1, expect(200, plain("GET", "/metrics"))),
        (1, expect(200, plain("GET", "/v2/health/ready"))),
        (1, expect(200, plain("POST", "/v2/repository/index"))),
        (1, expect(200, plain("POST", "/v2/repository/models/variant-5/load"))),
        (1, expect(200, plain("POST", "/v2/repository/models/variant-5/unload"))),
        (1, expect(400, wrong)),
        (1, expect(404, message("/v2/models/none/infer", xs[0], binary=True))),
        (1, expect(400, message("/v2/models/variant-1/infer", xs[0][:, :9], binary=True))),
    ]
    shares = np.array([share for share, _ in kinds], float)
    shares /= shares.sum()
    while True:
        for kind in rng.choice(len(kinds), 1024, p=shares):
            yield kinds[kind][1]()


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what a long run did; `wrong` says why it failed."""
    url = f"sqlite:///{folder / 'soak.db'}"
    made = [mlp(0, variant) for variant in range(VARIANTS)]
    with pydedup.open(url) as store:
        for number, (tensors, graph) in enumerate(made):
            store.add(f"variant-{number}@1", tensors, graph=graph)
        for version in (1, 2):
            tensors, graph = made[version - 1]
            store.add(f"moving@{version}", tensors, graph=graph)
        store.alias("moving", "live", "1")
    samples: list[int] = []
    stop = threading.Event()

    def watch(process: psutil.Process) -> None:
        """Look at the server's memory, and move the alias."""
        with pydedup.open(url) as store:
            while not stop.wait(max(options.seconds / 400, 0.25)):
                samples.append(process.memory_info().rss)
                store.alias("moving", "live", str(1 + len(samples) % 2))

    with serving(url, "--memory", "64MiB") as server:
        watcher = threading.Thread(target=watch, args=(psutil.Process(server.process.pid),))
        watcher.start()
        try:
            times = due_times(options.rate, options.seconds, options.arrivals, 7)
            tensors_of = [tensors for tensors, _ in made]
            result = over_http(server.port, options.connections, soak_tasks(tensors_of), times)
        finally:
            stop.set()
            watcher.join()
        held = server.metric("pydedup_body_bytes"), server.metric("pydedup_queue_requests")
        said = list(server.errors)
    tenth = max(1, len(samples) // 10)
    grown = int(np.median(samples[-tenth:]) - np.median(samples[2 * tenth : 3 * tenth]))
    wrong = [f"{count} x {text}" for text, count in result.wrong.most_common(20)]
    if grown > GROWTH_BYTES:
        wrong.append(f"the server's memory grew by {grown} bytes; {GROWTH_BYTES} are allowed")
    if held != (0, 0):
        wrong.append(f"bytes and requests that are still held: {held}")
    if said:
        wrong.append(f"on standard error: {said[0]}")
    return {
        "requests": len(result.latencies),
        "wrong": wrong,
        "http_ms": result.figures(),
        "rss_mib_by_tenth": [
            round(float(np.median(part)) / 2**20, 1)
            for part in np.array_split(samples, 10)
            if len(part)
        ],
        "rss_growth_bytes": grown,
    }


def main() -> int:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--arrivals", choices=("poisson", "fixed"), default="poisson")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)  # so that the threads of this load generator are punctual
    with tempfile.TemporaryDirectory(prefix="pydedup-") as folder:
        found = (soak if options.soak else measure)(options, Path(folder))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name:18} {value}")
    if found.get("wrong") or found.get("errors"):
        print("FAILED", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
