# SPDX-License-Identifier: Apache-2.0
"""A store on Ray Serve, beside `pydedup serve` and beside what one would write for Ray by hand.

    python bench/peers/ray_serving.py [--rates R,R] [--seconds S] [--requests N] [--rounds N]
                                      [--json]

**Latency**: one small model (784 -> 256 -> 10, float32, binary tensors), requests at random times,
open loop as in `http_load.py`, and the CPU time of the processes that serve it, which says the same
on a busy machine: `pydedup serve`, `pydedup.ray.deployment` with one replica, and Ray
Serve with an ingress that answers the same bytes without doing anything: what Ray alone takes.

**Pages**: 8 families of 6 models that share five layers of six (1 MiB each), two replicas whose
pools (56 MiB each) together hold the store (88 MiB), and one alone does not. 8 clients ask models
drawn at random. Sides are the three routings of `deployment`, and the deployment that Ray's guide
to multiplexing shows: whole models from .npz files (288 MiB), in as much memory, multiplied by
numpy, the id of the model in a header. "MiB" is what a request had to read, from the database or
from files; a page counts as 1 MiB, a little more than it has.

Rounds of all sides take turns; figures are medians of rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from http_load import SIZES, Connection, Task, due_times, message, mlp, over_http, plain
from rich.console import Console
from rich.table import Table

import pydedup
from pydedup.graph import Graph, Node
from pydedup.ray.cluster import attached, import_ray
from pydedup.testing.serving import serving

FAMILIES, VARIANTS, LAYERS, DIM = 8, 6, 6, 512
#: 48 MiB of it are for other things than pages.
MEMORY, POOL_MIB = "104MiB", 56
CLIENTS = 8
PORT = 18_432
ROUTINGS = ("families", "multiplexed", "any")
WARM_REQUESTS = 300

serve = import_ray("ray.serve")


class Idle:
    """An ASGI application that answers at once."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        length = b"%d" % len(self._body)
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self._body})


class ByHand:
    """Whole models from files, the latest few of them, as Ray's guide to multiplexing has it."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._read = 0

    @serve.multiplexed(max_num_models_per_replica=POOL_MIB // LAYERS)
    async def load(self, name: str) -> dict[str, Any]:
        with np.load(self._folder / f"{name}.npz") as file:
            model = {key: file[key] for key in file}
        self._read += sum(array.nbytes for array in model.values())
        return model

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import Response

        x = np.frombuffer(await request.body(), np.float32).reshape(-1, DIM)
        model = await self.load(serve.get_multiplexed_model_id())
        for n in range(LAYERS):
            x = x @ model[f"w{n}"].T
        return Response(x.tobytes())

    def read(self) -> int:
        """Return how many bytes of models it has read."""
        return self._read


def fill(folder: Path) -> None:
    """Make the models, as a store and as files."""
    values = ["x", *(f"h{n}" for n in range(LAYERS - 1)), "y"]
    nodes = (
        Node("linear", (values[n],), values[n + 1], {"weight": f"w{n}"}) for n in range(LAYERS)
    )
    graph = Graph(("x",), ("y",), tuple(nodes))
    rng = np.random.default_rng(0)
    scale = np.float32(DIM**-0.5)
    with pydedup.open(f"sqlite:///{folder / 'families.db'}") as store:
        for f in range(FAMILIES):
            base = {f"w{n}": scale * rng.standard_normal((DIM, DIM), np.float32) for n in range(6)}
            for v in range(VARIANTS):
                own = {} if not v else {f"w{v}": base[f"w{v}"][::-1].copy()}
                store.add(f"m{f}-{v}@1", {**base, **own}, graph=graph)
                np.savez(folder / f"m{f}-{v}.npz", **{**base, **own})
    tensors, small = mlp(0)
    with pydedup.open(f"sqlite:///{folder / 'small.db'}") as store:
        store.add("small@1", tensors, graph=small)


# ---- latency ------------------------------------------------------------------------------------


def small_tasks(prefix: str) -> Iterator[Task]:
    x = np.random.default_rng(1).standard_normal((1, SIZES[0]), np.float32)
    request = message(f"{prefix}/v2/models/small/infer", x, binary=True)

    def judge(status: int, body: bytes, length: int | None) -> str | None:
        return None if status == 200 else f"status {status}: {body[:200]!r}"

    while True:
        yield Task(request, judge)


def cpu_seconds(server: int, app: str) -> float:
    """Return what the processes of a side have computed: of Ray, its proxy and the replicas."""
    if not app:
        processes = [psutil.Process(server)]
    else:
        kinds = ("ray::ProxyActor", f"ray::ServeReplica:{app}:")
        children = psutil.Process().children(recursive=True)
        processes = [one for one in children if "".join(one.cmdline()).startswith(kinds)]
    return sum(sum(one.cpu_times()[:2]) for one in processes)


def latency(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the latencies of each side at each rate."""
    url = f"sqlite:///{folder / 'small.db'}"
    serve.run(pydedup.ray.deployment(url), name="small", route_prefix="/small")
    body = b'{"model_name":"small","outputs":[]}' + bytes(100)
    idle = serve.deployment(serve.ingress(Idle(body))(type("Empty", (), {})), name="Idle")
    serve.run(idle.options(max_ongoing_requests=1000).bind(), name="idle", route_prefix="/idle")
    with serving(url) as server:
        sides = {
            "pydedup serve": (server.port, ""),
            "pydedup on Ray Serve": (PORT, "/small"),
            "Ray Serve, nothing done": (PORT, "/idle"),
        }
        for rate in options.rates:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for turn in range(options.rounds + 1):
                for name, (port, prefix) in sides.items():
                    times = due_times(rate, options.seconds if turn else 2.0, "poisson", turn)
                    before = cpu_seconds(server.process.pid, prefix[1:])
                    result = over_http(port, 32, small_tasks(prefix), times)
                    spent = cpu_seconds(server.process.pid, prefix[1:]) - before
                    if result.wrong:
                        raise RuntimeError(f"{name}: {result.wrong}")
                    if turn:
                        cpu = round(1000 * spent / len(result.latencies), 2)
                        found[name].append({**result.figures(), "CPU a request": cpu})
            medians = {
                name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
                for name, rounds in found.items()
            }
            for name, figures in medians.items():
                ratio = figures["p50"] / medians["pydedup serve"]["p50"]
                yield {"requests/s": rate, "side": name, **figures, "p50 ratio": round(ratio, 2)}
    serve.delete("small")
    serve.delete("idle")


# ---- pages --------------------------------------------------------------------------------------


def load_by(ask: Callable[[Connection, str], int], names: list[str]) -> tuple[list[float], float]:
    """Ask for models, by a few clients, each as fast as it is answered."""
    left, lock = iter(names), threading.Lock()
    took: list[float] = []

    def work() -> None:
        connection = Connection(PORT)
        while True:
            with lock:
                name = next(left, None)
            if name is None:
                break
            begin = time.perf_counter()
            status = ask(connection, name)
            took.append(time.perf_counter() - begin)
            if status != 200:
                raise RuntimeError(f"{name}: status {status}")
        connection.close()

    begin = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took, time.perf_counter() - begin


def pages(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what each side reads, and how fast it is."""
    url = f"sqlite:///{folder / 'families.db'}"
    x = np.random.default_rng(1).standard_normal((1, DIM), np.float32)
    sides: dict[str, Callable[[Connection, str], int]] = {}
    count: dict[str, Callable[[], float]] = {}
    common: dict[str, Any] = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.2}}
    for routing in ROUTINGS:
        made = pydedup.ray.deployment(url, memory=MEMORY, routing=routing, **common)
        serve.run(made, name=routing, route_prefix=f"/{routing}")
        pools = serve.get_deployment_handle("Models", routing)
        side = f'routing="{routing}"'
        sides[side] = lambda connection, name, routing=routing: connection.ask(
            message(f"/{routing}/v2/models/{name}/infer", x, binary=True)
        )[0]
        count[side] = lambda pools=pools: sum(
            stats["misses"] for _, _, stats in pools.broadcast("pool_stats").results(timeout_s=30)
        )
    by_hand = serve.deployment(ByHand, name="ByHand", max_ongoing_requests=16, **common)
    files = serve.run(by_hand.bind(str(folder)), name="by-hand", route_prefix="/by-hand")
    sides["by hand, whole models"] = lambda connection, name: connection.ask(
        plain("POST", "/by-hand", x.tobytes(), f"serve_multiplexed_model_id: {name}\r\n")
    )[0]
    count["by hand, whole models"] = lambda: (
        sum(files.broadcast("read").results(timeout_s=30)) / 2**20
    )
    names = [f"m{f}-{v}" for f in range(FAMILIES) for v in range(VARIANTS)]
    rng = np.random.default_rng(0)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(options.rounds + 1):
        number = options.requests if turn else WARM_REQUESTS
        asked = [str(one) for one in rng.choice(names, number)]
        for name, ask in sides.items():
            before = count[name]()
            took, seconds = load_by(ask, asked)
            p50, p99 = np.percentile(np.array(took) * 1000, [50, 99])
            figures = {
                "MiB a request": (count[name]() - before) / number,
                "p50": float(p50),
                "p99": float(p99),
                "requests/s": number / seconds,
            }
            if turn:
                found[name].append(figures)
            else:
                found[name] = []
    best = statistics.median(one["requests/s"] for one in found['routing="families"'])
    for name, rounds in found.items():
        medians = {key: round(statistics.median(o[key] for o in rounds), 3) for key in rounds[0]}
        yield {"side": name, **medians, "ours is": f"{best / medians['requests/s']:.2f}x"}


# ---- all ----------------------------------------------------------------------------------------


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if key == "side" else "right")
    for row in rows:
        table.add_row(*(f"{one:g}" if isinstance(one, float) else str(one) for one in row.values()))
    Console().print(table)


def main() -> int:
    """Measure what the arguments say."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rates = lambda text: [float(one) for one in text.split(",")]  # noqa: E731
    parser.add_argument("--rates", type=rates, default=[20.0, 40.0, 200.0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round at one rate")
    parser.add_argument(
        "--requests", type=int, default=1000, help="of a round of the pages; 0 leaves them out"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="pydedup-") as text, contextlib.ExitStack() as stack:
        folder = Path(text)
        fill(folder)
        # As `pydedup serve` has it: else Ray gives way to whatever else the machine does.
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
        stack.enter_context(attached("local"))
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        stack.callback(serve.shutdown)
        found["Latency, ms"] = list(latency(folder, options))
        if options.requests:
            found["Pages"] = list(pages(folder, options))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for title, rows in found.items():
            show(title, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
