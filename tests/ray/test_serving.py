# SPDX-License-Identifier: Apache-2.0
"""Applications on a real Ray Serve: two replicas, on PostgreSQL, by a URL with a password."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import pydedup
from pydedup.errors import ArgumentError, MissingStoreError, UnavailableError
from pydedup.graph import Graph, Node
from pydedup.http.scrape import parse
from pydedup.ray import app, deployment
from pydedup.ray.cluster import Secret, import_ray
from pydedup.ray.serving.running import parse_replicas
from pydedup.ray.serving.source import hindrance
from pydedup.registry import redact
from pydedup.testing.servers import unused_port
from pydedup.testing.serving import Server, serving

from .conftest import Sessions

serve = import_ray("ray.serve")
PASSWORD = "geheim-4711"
TOKEN = "token-0815"
LAYERS, DIM = 6, 256
FAMILIES, VARIANTS = 4, 3
#: Half of it is the pool's: one replica's holds five of the eight MiB that the store has.
MEMORY = "10MiB"


def family(seed: int) -> Iterator[dict[str, Any]]:
    """Variants of a model, each with one layer of its own: 2 MiB together."""
    rng = np.random.default_rng(seed)
    scale = np.float32(DIM**-0.5)
    base = {f"w{n}": scale * rng.standard_normal((DIM, DIM), np.float32) for n in range(LAYERS)}
    for n in range(VARIANTS):
        yield base if not n else {**base, f"w{n}": base[f"w{n}"][::-1].copy()}


def fill(url: str) -> None:
    values = ["x", *(f"h{n}" for n in range(LAYERS - 1)), "y"]
    nodes = (
        Node("linear", (values[n],), values[n + 1], {"weight": f"w{n}"}) for n in range(LAYERS)
    )
    graph = Graph(("x",), ("y",), tuple(nodes))
    with pydedup.open(url) as store:
        for seed in range(FAMILIES):
            for n, tensors in enumerate(family(seed)):
                store.add(f"family{seed}/variant{n}@1", tensors, graph=graph)


def asked(n: int = 1) -> dict[str, Any]:
    x = np.random.default_rng(n).standard_normal((n, DIM)).astype(np.float32)
    entry = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    return {"inputs": [entry]}


def with_password(url: str) -> str:
    """Return a URL of a server that trusts everybody, whatever the password."""
    place = url.partition("?")
    head, _, rest = place[0].partition("://")
    user, at, where = rest.rpartition("@")
    assert at, url
    return f"{head}://{user.partition(':')[0]}:{PASSWORD}@{where}{place[1]}{place[2]}"


@pytest.fixture(scope="module")
def url(postgres_url: str) -> Iterator[str]:
    """A store that is filled."""
    url = with_password(postgres_url)
    with pydedup.open(url) as store:
        for info in store.models():
            store.remove(f"{info.name}@{info.version}")
    fill(url)
    yield url
    with pydedup.open(url) as store:
        for info in store.models():
            store.remove(f"{info.name}@{info.version}")


@pytest.fixture(scope="module")
def port(connected: Any) -> Iterator[int]:
    """Where Ray Serve listens."""
    port = unused_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()


@pytest.fixture(scope="module")
def apps(port: int, url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Handles of the replicas of three applications: by families, by whatever replica, and as many
    as requests need. The first is that of the docs' config file, as `serve deploy` has it."""
    docs = (Path(__file__).parents[2] / "docs" / "ray.md").read_text()
    block = re.search(r"(?m)^    proxy_location:.*\n(?:    .*\n)+", docs)
    assert block
    config = yaml.safe_load(textwrap.dedent(block.group()))
    (application,) = config["applications"]
    assert application["args"]["store"] == "env:PYDEDUP_STORE"
    place = tmp_path_factory.mktemp("secrets") / "url"
    place.write_text(url)
    common = {"memory": MEMORY, "num_cpus": 0.1, "max_body": "1MiB", "max_answer": "1MiB"}
    application["args"] |= {"store": f"file:{place}", **common}
    schema = importlib.import_module("ray.serve.schema").ServeDeploySchema
    client = importlib.import_module("ray.serve.context")._get_global_client()
    client.deploy_apps(schema(**config))
    scale = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 1,
        "upscale_delay_s": 0,
    }
    options: dict[str, dict[str, Any]] = {
        "any": {"num_replicas": 2, "routing": "any"},
        "scaled": {"autoscaling_config": scale, "token": TOKEN},
    }
    serve.run_many(
        [
            serve.RunTarget(deployment(url, **common, **chosen), name, f"/{name}")
            for name, chosen in options.items()
        ]
    )
    eventually(lambda: serve.status().applications["models"].status == "RUNNING")
    return {name: serve.get_deployment_handle("Models", name) for name in ("models", *options)}


@pytest.fixture(scope="module")
def server(port: int, apps: dict[str, Any]) -> Server:
    return Server(None, f"http://127.0.0.1:{port}", [], port)  # type: ignore[arg-type]


def pools(handle: Any) -> dict[str, tuple[int, dict[str, int]]]:
    """Each replica's process and what its pool counts; those alone that live."""
    if not hasattr(type(handle), "broadcast"):  # an older Ray: whoever answers
        calls = [handle.pool_stats.remote() for _ in range(20)]
        return {name: (process, stats) for name, process, stats in (one.result() for one in calls)}
    told = handle.broadcast("pool_stats").results(timeout_s=100, return_exceptions=True)
    alive = [one for one in told if not isinstance(one, BaseException)]
    return {name: (process, stats) for name, process, stats in alive}


def total(handle: Any, what: str) -> int:
    return sum(stats[what] for _, stats in pools(handle).values())


def eventually(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


def test_the_config_file_of_the_docs_is_deployed(server: Server, apps: dict[str, Any]) -> None:
    """What `serve deploy` and `serve run FILE` do with it. (Before a test kills replicas.)"""
    assert serve.status().applications["models"].status == "RUNNING"
    assert server.infer("family0%2Fvariant0", asked()).status == 200
    assert len(pools(apps["models"])) == 2


def test_families_meet_in_one_pool(server: Server, apps: dict[str, Any]) -> None:
    names = [f"family{f}%2Fvariant{v}" for f in range(FAMILIES) for v in range(VARIANTS)]
    order = np.random.default_rng(0).permutation(names * 12)
    read = {}
    for name, prefix in (("models", ""), ("any", "/any")):
        with ThreadPoolExecutor(4) as threads:
            paths = [f"{prefix}/v2/models/{one}/infer" for one in order]
            answers = list(threads.map(lambda path: server.ask("POST", path, asked()), paths))
        assert {answer.status for answer in answers} == {200}
        read[name] = total(apps[name], "misses")
        assert all(stats["hits"] for _, stats in pools(apps[name]).values())  # both work
    # Each page of the store once, and a little where a family had help; else again and again.
    assert read["models"] < 0.5 * read["any"], read


def test_tritonclient(server: Server, url: str) -> None:
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=4)
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("family0/variant0", "1")
        assert not client.is_model_ready("none")
        assert len(client.get_model_repository_index()) == FAMILIES * VARIANTS
        assert client.get_model_config("family0/variant0")["input"][0]["dims"] == [-1, DIM]
        client.load_model("family0/variant0")
        client.unload_model("family0/variant0")
        x = np.random.default_rng(0).standard_normal((300, DIM)).astype(np.float32)  # 300 KiB
        tensor = triton.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        waiting = [client.async_infer(f"family{n}/variant1", [tensor]) for n in range(FAMILIES)]
        with pydedup.open(url, mode="r") as store:
            for n, one in enumerate(waiting):
                wanted = store.predict(f"family{n}/variant1", x)
                found = one.get_result()
                assert found.get_response()["model_version"] == "1"
                np.testing.assert_allclose(found.as_numpy("y"), wanted, 1e-3, 1e-5)
    finally:
        client.close()


def test_errors_are_those_of_pydedup_serve(server: Server, apps: dict[str, Any]) -> None:
    path = "/v2/models/family0%2Fvariant0/infer"
    assert "no model 'none' in the store" in server.ask("GET", "/v2/models/none").error
    assert server.ask("GET", path).status == 405
    assert server.ask("POST", path, b"x" * (2 << 20)).status == 413
    assert server.ask("POST", path, b"{}", {"content-encoding": "gzip"}).status == 415
    answer = server.ask("POST", path, {"inputs": []})
    assert (answer.status, answer.error[:6]) == (400, "inputs")
    size = 2000 * DIM  # and four times that of the answer
    entry = {"name": "x", "datatype": "INT8", "shape": [2000, DIM]}
    head = json.dumps({"inputs": [{**entry, "parameters": {"binary_data_size": size}}]}).encode()
    given = {"inference-header-content-length": str(len(head))}
    answer = server.ask("POST", path, head + bytes(size), given)
    assert (answer.status, "--max-answer" in answer.error) == (413, True)
    text = server.ask("GET", "/metrics").body.decode()
    assert 'pydedup_requests_total{model="family0/variant0@1",outcome="ok"}' in text
    if hasattr(type(apps["models"]), "broadcast"):
        assert text.count("\npydedup_pool_misses_total{replica=") == 2
        assert parse(text).pool["misses"] >= FAMILIES  # what `pydedup top` reads, of both


def test_what_changes_counts_at_once(server: Server, url: str) -> None:
    def version(address: str) -> str:
        answer = server.ask("POST", f"/v2/models/changing/versions/{address}/infer", asked())
        return str(answer.json["model_version"]) if answer.status == 200 else str(answer.status)

    with pydedup.open(url) as store:
        for seed in (100, 101):
            rng = np.random.default_rng(seed)
            graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
            tensors = {"w": rng.standard_normal((DIM, DIM), np.float32)}
            store.add(f"changing@{seed}", tensors, graph=graph)
        store.alias("changing", "prod", "100")
        assert (version("prod"), version("100"), version("101")) == ("100", "100", "101")
        store.alias("changing", "prod", "101")
        assert version("prod") == "101"
        store.remove("changing@100")
        assert (version("prod"), version("100")) == ("101", "404")
        store.remove("changing", all_versions=True)
        assert version("prod") == "404"


def test_a_killed_replica_costs_no_request(server: Server, apps: dict[str, Any]) -> None:
    before = pools(apps["models"])
    stop = threading.Event()
    statuses: list[int] = []

    def ask(n: int) -> None:
        while not stop.is_set():
            path = f"/v2/models/family{n}%2Fvariant0/infer"
            statuses.append(server.ask("POST", path, asked(4)).status)

    with ThreadPoolExecutor(FAMILIES) as threads:
        running = [threads.submit(ask, n) for n in range(FAMILIES)]
        try:
            eventually(lambda: len(statuses) > 20)
            victim, (process, _) = max(before.items(), key=lambda one: one[1][1]["hits"])
            os.kill(process, signal.SIGKILL)
            killed = len(statuses)
            eventually(lambda: len(statuses) > killed + 50)
        finally:
            stop.set()
        for one in running:
            one.result()
    assert set(statuses) == {200}
    assert victim not in pools(apps["models"])


@pytest.mark.long
def test_replicas_come_with_requests(server: Server, apps: dict[str, Any]) -> None:
    path = "/scaled/v2/models/family0%2Fvariant0/infer"
    assert server.ask("POST", path, asked()).status == 401
    handle = apps["scaled"]
    assert len(pools(handle)) == 1
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            assert server.ask("POST", path, asked(8), bearer).status == 200

    bearer = {"Authorization": f"Bearer {TOKEN}"}
    with ThreadPoolExecutor(6) as threads:
        running = [threads.submit(ask) for _ in range(6)]
        try:
            eventually(lambda: len(pools(handle)) == 2)
        finally:
            stop.set()
        for one in running:
            one.result()


@pytest.mark.long
def test_families_meet_by_the_routing_of_ray_as_well(server: Server, url: str) -> None:
    """Once Ray has heard where a family is, hardly any of its requests goes elsewhere.

    Some do where a replica is slow to say how much it has to do. Two replicas that were drawn by
    lot would have less than four fifths each, all but once in 100,000 times. A family that is
    asked for before Ray has heard of it is on both for good: so each try has its own, and waits.
    """
    options = {"memory": MEMORY, "num_cpus": 0.1, "num_replicas": 2, "routing": "multiplexed"}
    serve.run(deployment(url, **options), name="multiplexed", route_prefix="/multiplexed")
    handle = serve.get_deployment_handle("Models", "multiplexed")

    def used() -> dict[str, int]:
        """How often each replica used a page."""
        return {name: stats["hits"] + stats["misses"] for name, (_, stats) in pools(handle).items()}

    def ask(family: int, times: int) -> None:
        for n in range(times):
            path = f"/multiplexed/v2/models/family{family}%2Fvariant{n % VARIANTS}/infer"
            assert server.ask("POST", path, asked()).status == 200

    def most(family: int) -> float:
        """Ask for the models of a family; returns the part of the replica that did most of it."""
        ask(family, 1)
        time.sleep(2 + 5 * family)
        before = used()
        ask(family, 60)
        done = [count - before.get(name, 0) for name, count in used().items()]
        return max(done) / sum(done)

    try:
        assert len(pools(handle)) == 2
        assert any(most(family) >= 0.8 for family in range(FAMILIES))
    finally:
        serve.delete("multiplexed")


def logs(ray: Any) -> str:
    """All that Ray has written to files since it began."""
    folder = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any("replica_models_Models" in path.name for path in files)
    return "".join(path.read_bytes().decode("latin-1") for path in files)


def test_secrets_show_nowhere(connected: Any, apps: object) -> None:
    client = importlib.import_module("ray.serve.context")._get_global_client()
    told = str(serve.status()) + str(client.get_serve_details())  # what the dashboard shows
    assert "Models" in told
    told += logs(connected)
    assert PASSWORD not in told
    assert TOKEN not in told


def test_what_is_wrong_is_said_before_work_starts(connected: Any, tmp_path: Path) -> None:
    none = f"sqlite:///{tmp_path / 'none.db'}"
    with pytest.raises(MissingStoreError, match=r"none\.db"):
        deployment(none)
    away = f"postgresql://joe:{PASSWORD}@127.0.0.1:1/x"
    with pytest.raises(UnavailableError) as caught:
        deployment(away)
    assert PASSWORD not in str(caught.value)
    wrong: dict[str, dict[str, Any]] = {
        "routing": {"routing": "best"},
        "num_cpus": {"num_cpus": 0},
        "autoscaling_config": {"num_replicas": 2, "autoscaling_config": {"max_replicas": 3}},
        "token must be printable": {"token": "two words"},
    }
    for said, options in wrong.items():
        with pytest.raises(ArgumentError, match=said):
            deployment(none, check=False, **options)
    deployment(none, check=False)


def test_config_files_name_where_secrets_are(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connected: Any
) -> None:
    with pytest.raises(ArgumentError, match="env:NAME") as caught:
        app({"store": url})
    assert PASSWORD not in str(caught.value)
    with pytest.raises(ArgumentError, match="token"):
        app({"store": "env:PYDEDUP_STORE", "token": TOKEN})
    with pytest.raises(ArgumentError, match="'stroe'"):
        app({"stroe": url})
    with pytest.raises(ArgumentError, match="needs store"):
        app({})
    later = {"store": "env:PYDEDUP_STORE", "check": False}  # where it will be known
    assert app({**later, "token": "file:/run/token", "num_replicas": 3})
    # As `serve run pydedup.ray:app NAME=VALUE ...` has them.
    scale = "{min_replicas: 0, max_replicas: 3}"
    texts = {"num_cpus": "0.5", "max_batch": "8", "access_log": "true", "memory": "64MiB"}
    assert app({**later, "autoscaling_config": scale, **texts})
    with pytest.raises(
        ArgumentError, match=r"autoscaling_config is '\{min', which is no YAML: while .*$"
    ):
        app({"store": "env:PYDEDUP_STORE", "autoscaling_config": "{min"})

    assert "PYDEDUP_STORE is empty, or not set" in str(hindrance(Secret("env:PYDEDUP_STORE")))
    monkeypatch.setenv("PYDEDUP_STORE", url)
    assert hindrance(Secret("env:PYDEDUP_STORE")) is None
    path = tmp_path / "url"
    assert "cannot be read" in str(hindrance(Secret(f"file:{path}")))
    path.write_text(f"{url}\n")
    assert hindrance(Secret(f"file:{path}")) is None
    path.write_text(f"postgresql://joe:{PASSWORD}@127.0.0.1:1/x")
    said = str(hindrance(Secret(f"file:{path}")))
    assert "127.0.0.1" in said
    assert PASSWORD not in said


def test_a_missing_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("mysql", "pydedup.adapters.my"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mysql", None)  # as if it were not installed
    said = str(hindrance(Secret(f"mysql://joe:{PASSWORD}@127.0.0.1:1/x")))
    assert "pip install" in said
    assert PASSWORD not in said


def test_how_many_replicas() -> None:
    assert parse_replicas("2") == {"num_replicas": 2}
    scale = {"min_replicas": 0, "max_replicas": 8}
    assert parse_replicas("0:8") == {"autoscaling_config": scale}
    for wrong in ("0", "0:0", "3:2", "", "two", "1:", ":2", "-1", "1:2:3", "²"):
        with pytest.raises(ArgumentError, match=r"how many \(2\)"):
            parse_replicas(wrong)


def test_the_command_says_what_is_wrong(url: str) -> None:
    command = [sys.executable, "-P", "-m", "pydedup", "serve", url]
    for options, status, said in (
        (["--on", "127.0.0.1:1"], 4, "no Ray cluster answers at 127.0.0.1:1"),
        (["--replicas", "2"], 2, "--replicas goes with --on"),
        # It was taken, and nobody ever saw a line.
        (["--on", "local", "--access-log"], 2, "--access-log goes to Ray's log"),
    ):
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == status, done
        assert said in done.stderr
        assert PASSWORD not in done.stderr


def test_the_command_serves_on_a_cluster(
    cluster: Any, connected: Any, port: int, sessions: Sessions, apps: object
) -> None:
    serve.delete("models")
    url = with_password(sessions.url)
    # By Ray Client, as from a machine that is not of the cluster. What a router of Ray Serve's asks
    # there is given up at once, and answers that come all the same are shown as faults.
    deadline = {"RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "0.0001"}
    options = ("--on", cluster.client, "--replicas", "1:2", "--memory", MEMORY)
    with serving(url, *options, env=deadline) as server:
        assert f"1 model of {redact(url)} on Ray" in server.hello[0]
        assert server.port == port  # of Ray Serve, which ran already
        data = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
        assert server.infer("m", {"inputs": [data]}).status == 200
        assert sessions.others()
    assert "pydedup" not in serve.status().applications
    assert PASSWORD not in logs(connected)
    assert sessions.lost() == 0
