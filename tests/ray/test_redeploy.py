# SPDX-License-Identifier: Apache-2.0
"""Deployed again with something wrong, what serves stays as it is, and the error comes first."""

from __future__ import annotations

import importlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, ClusterError
from pydedup.graph import Graph, Node
from pydedup.ray import app, deployment
from pydedup.ray.cluster import import_ray
from pydedup.testing.servers import unused_port
from pydedup.testing.serving import Server, serving

serve = import_ray("ray.serve")
ASKED = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('redeploy') / 'store.db'}"
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    with pydedup.open(url) as store:
        store.add("m@1", {"w": np.ones((2, 3), np.float32)}, graph=graph)
    return url


@pytest.fixture(scope="module")
def server(connected: Any, url: str) -> Iterator[Server]:
    """Ray Serve with an application."""
    port = unused_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(deployment(url, num_cpus=0.1), name="again", route_prefix="/again")
    yield Server(None, f"http://127.0.0.1:{port}", [], port)  # type: ignore[arg-type]
    serve.shutdown()


def replica(name: str = "again") -> int:
    """The process that serves an application."""
    handle = serve.get_deployment_handle("Models", name)
    found: int = handle.pool_stats.remote().result(timeout_s=100)[1]
    return found


#: What Ray Serve would take, or refuse when it has stopped the replica that runs.
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("max_batch is 0; it must be a whole number, 1 to", {"max_batch": 0}),
    ("max_batch is '8'", {"max_batch": "8"}),
    ("max_wait_ms is -1.0; it must be a number, 0 to 60000", {"max_wait_ms": -1.0}),
    ("threads is 0", {"threads": 0}),
    ("threads is True", {"threads": True}),
    ("max_queue is -3", {"max_queue": -3}),
    ("timeout is -1.0", {"timeout": -1.0}),
    ("timeout is nan", {"timeout": float("nan")}),
    ("timeout is 'soon'", {"timeout": "soon"}),
    ("grace is -1.0", {"grace": -1.0}),
    ("num_fronts is 0", {"num_fronts": 0}),
    ("num_replicas is 'two'", {"num_replicas": "two"}),
    ("max_ongoing_requests is 0", {"max_ongoing_requests": 0}),
    ("num_cpus is 'many'", {"num_cpus": "many"}),
    ("autoscaling_config has 'mn'; Ray knows", {"autoscaling_config": {"mn": 3}}),
    (
        "does not take the arguments: .*max_replicas",
        {"autoscaling_config": {"min_replicas": 3, "max_replicas": 1}},
    ),
    ("autoscaling_config is 'mn'; it must be a mapping", {"autoscaling_config": "mn"}),
    ("ray_actor_options is 3; it must be a mapping", {"ray_actor_options": 3}),
    ("token must be a string, not int", {"token": 4711}),
    ("does not take the arguments: .*'nothing'", {"ray_actor_options": {"nothing": 1}}),
    (
        "does not take the arguments: .*env_vars",
        {"ray_actor_options": {"runtime_env": {"env_vars": {"A": 1}}}},
    ),
]


@pytest.mark.parametrize(("said", "wrong"), WRONG)
def test_a_wrong_argument_is_told(url: str, said: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=said):
        deployment(url, check=False, **wrong)


@pytest.mark.long
def test_a_wrong_argument_changes_nothing(server: Server, url: str) -> None:
    """With some of these the replica was replaced by one that answers nothing, or by none."""
    before = replica()
    for said, wrong in WRONG:
        with pytest.raises(ArgumentError, match=said):
            serve.run(deployment(url, **wrong), name="again", route_prefix="/again")
    assert replica() == before
    assert server.ask("POST", "/again/v2/models/m/infer", ASKED).status == 200


@pytest.mark.long
def test_what_replicas_would_lack_is_said_first(
    server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were started, could not begin, and the one that ran was gone."""
    before = replica()
    missing: dict[str, dict[str, Any]] = {
        "PYDEDUP_NONE is empty, or not set": {"store": "env:PYDEDUP_NONE"},
        "none cannot be read": {"store": f"file:{tmp_path / 'none'}"},
        "PYDEDUP_NO_TOKEN is empty": {"store": url, "token": "env:PYDEDUP_NO_TOKEN"},
        "env:PYDEDUP_BAD must be printable": {
            "store": url,
            "token": "env:PYDEDUP_BAD",
            "ray_actor_options": {"runtime_env": {"env_vars": {"PYDEDUP_BAD": "two words"}}},
        },
    }
    monkeypatch.setenv("PYDEDUP_NONE", url)  # here, and not there
    for said, arguments in missing.items():
        for make in (lambda given: deployment(**given), app):
            with pytest.raises(ClusterError, match=f"the Ray worker on .*{said}"):
                serve.run(make(arguments), name="again", route_prefix="/again")
    assert replica() == before
    there = {"runtime_env": {"env_vars": {"PYDEDUP_NONE": url}}}
    arguments = {"store": "env:PYDEDUP_NONE", "ray_actor_options": there, "num_cpus": 0.1}
    serve.run(deployment(**arguments), name="again", route_prefix="/again")
    assert replica() != before
    assert server.ask("POST", "/again/v2/models/m/infer", ASKED).status == 200
    # Replicas that begin on none of the machines that there are cannot be tried.
    somewhere = {"resources": {"gold": 1}}
    assert deployment("env:PYDEDUP_NOT_HERE", ray_actor_options=somewhere)


@pytest.mark.long
def test_a_config_file_with_something_wrong_leaves_what_runs(server: Server, url: str) -> None:
    schema = importlib.import_module("ray.serve.schema").ServeDeploySchema
    client = importlib.import_module("ray.serve.context")._get_global_client()

    def deployed(**args: object) -> Any:
        """Deploy as `serve deploy` does, and return the application's status at the end."""
        entry = {"name": "filed", "route_prefix": "/filed", "import_path": "pydedup.ray:app"}
        arguments = {"store": url, "num_cpus": 0.1, **args}
        client.deploy_apps(schema(applications=[{**entry, "args": arguments}]))
        end = time.monotonic() + 60
        while True:
            found = serve.status().applications["filed"]
            if found.status in ("RUNNING", "DEPLOY_FAILED", "UNHEALTHY"):
                return found
            assert time.monotonic() < end, found
            time.sleep(0.1)

    assert deployed().status == "RUNNING"
    before = replica("filed")
    for said, args in (
        (r"threads is 0; .*", {"threads": 0}),
        (
            r"the Ray worker on [\d.]+: .* PYDEDUP_NONE is empty, or not set, where a replica runs",
            {"store": "env:PYDEDUP_NONE"},
        ),
    ):
        # As it is, at once. Of an error that is not Ray's, it tries four times, and shows frames.
        assert re.fullmatch(rf"Deploying app 'filed' failed .*:\n{said}", deployed(**args).message)
        assert replica("filed") == before
        assert server.ask("POST", "/filed/v2/models/m/infer", ASKED).status == 200


def guarded() -> bool:
    """Whether a command serves."""
    try:
        return import_ray().get_actor("pydedup", namespace="pydedup-serve") is not None
    except ValueError:
        return False


@pytest.mark.long
def test_a_second_command_leaves_the_first_alone(cluster: Any, server: Server, url: str) -> None:
    """It replaced what the first serves; and what was wrong with it took that down."""
    command = [sys.executable, "-P", "-m", "pydedup", "serve", url, "--on", cluster.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert "pydedup serves 1 model" in first.stdout.readline()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 4, done
        assert "is serving on this Ray cluster already" in done.stderr
        assert server.infer("m", ASKED).status == 200
        first.send_signal(signal.SIGKILL)
    # One that was killed is in nobody's way: what it left is taken over.
    assert "pydedup" in serve.status().applications
    end = time.monotonic() + 60
    while guarded():  # until Ray has seen it
        assert time.monotonic() < end
        time.sleep(0.1)
    with serving(url, "--on", cluster.address) as last:
        assert last.infer("m", ASKED).status == 200
    assert "pydedup" not in serve.status().applications
