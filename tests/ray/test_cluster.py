# SPDX-License-Identifier: Apache-2.0
"""Reaching Ray: where there is none, none that fits, and none that answers; and what it is told."""

from __future__ import annotations

import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pydedup.errors import ArgumentError, ClusterError
from pydedup.ray import attached, cluster, probe

from .conftest import Cluster, started

URL = "postgresql://me:pa55word@db.example/prod"


def test_missing_ray_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ArgumentError, match=r"pip install 'pydedup\[ray\]'"):
        cluster.import_ray()


@pytest.mark.parametrize("version", ["2.9.3", "2.43.0", "3.0.0"])
def test_ray_that_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__=version))
    with pytest.raises(ArgumentError, match=rf"Ray {version} is installed, and pydedup needs 2.44"):
        cluster.import_ray()


def test_importing_us_does_not_import_ray() -> None:
    code = "import sys, pydedup.ray; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("on", ["http://host:1", "host", "ray://", "ray://host:99999", "", URL])
def test_what_is_no_address_is_said(on: str) -> None:
    with pytest.raises(ArgumentError, match="is no address of Ray") as raised, attached(on):
        pass
    assert "pa55word" not in str(raised.value)


@pytest.mark.usefixtures("unconnected")
def test_where_no_ray_runs_is_said_in_our_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own speak of a flag that no command of ours has."""
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(set))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    said = r"^no Ray runs on this machine.*--on local$"
    with pytest.raises(ClusterError, match=said), attached("auto"):
        pass


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("on", ["ray://127.0.0.1:1", "127.0.0.1:1"])
def test_where_nobody_listens_is_said_at_once(on: str) -> None:
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {on}"), attached(on):
        pass


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("on", ["ray://127.0.0.1:{}", "127.0.0.1:{}"])
def test_what_is_no_cluster_is_said_soon(monkeypatch: pytest.MonkeyPatch, on: str) -> None:
    """Ray tries for half a minute, or for more than five where it is no Ray Client."""
    monkeypatch.setattr(probe, "_SECONDS", 0.7)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        serving = threading.Thread(target=other.serve_forever)
        serving.start()
        on = on.format(other.server_port)
        try:
            with pytest.raises(ClusterError, match=f"what listens at {on} is no Ray"), attached(on):
                pass
        finally:
            other.shutdown()
            serving.join()


@pytest.mark.usefixtures("unconnected")
def test_the_other_port_of_a_cluster_is_said(cluster: Cluster) -> None:
    by_client, by_head = f"ray://{cluster.address}", cluster.client.removeprefix("ray://")
    for on, said in ((by_client, "is not Ray Client"), (by_head, "is not the head of a cluster")):
        with pytest.raises(ClusterError, match=f"what answers at {on} {said}"), attached(on):
            pass


@pytest.mark.long
def test_a_cluster_that_wants_a_token_says_so_at_once(tmp_path: Path) -> None:
    """Newer Rays do where ``ray start`` finds one; their clients send none unless told to.

    At once: they try for half a minute, or for more than five.
    """
    pytest.importorskip("ray._private.authentication", reason="this Ray knows no tokens")
    token, other = tmp_path / "token", tmp_path / "other"
    token.write_text("a" * 32)
    other.write_text("b" * 32)
    code = """
import json, os, sys, time
from pydedup.errors import ClusterError
from pydedup.ray import cluster
cluster.import_ray()
for environment in json.loads(sys.argv[1]):
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    os.environ.update(environment)
    cluster._read_environment()
    for on in sys.argv[2:]:
        begun = time.monotonic()
        try:
            with cluster.attached(on) as ray:
                print(sorted(ray.cluster_resources()).count("CPU"))
        except ClusterError as error:
            print(f"{time.monotonic() - begun < 20} {error}")
"""
    asked: list[dict[str, str]] = [
        {},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(other)},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
    ]
    with started(cpus=1, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)) as made:
        command = [sys.executable, "-P", "-c", code, json.dumps(asked), made.address, made.client]
        without = {name: os.environ[name] for name in os.environ if "RAY_AUTH" not in name}
        environment = without | {"HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        said = done.stdout.splitlines()
        for one in said[:2]:
            assert one.startswith("True the Ray cluster at ")
            assert "wants a token; set RAY_AUTH_MODE=token" in one
        for one in said[2:4]:
            assert "True" in one
            assert "does not take the token" in one
        assert said[4:] == ["1", "1"]


def test_a_secret_travels_and_does_not_show() -> None:
    secret = cluster.Secret(URL)
    assert pickle.loads(pickle.dumps(secret)).reveal() == URL  # noqa: S301 (made here)
    for shown in (repr(secret), str(secret), f"{secret}", repr({"url": [secret]})):
        assert "pa55word" not in shown


def test_folders_of_killed_processes_are_swept() -> None:
    folder = Path("/tmp/pydedup-ray-left-over")
    folder.mkdir(exist_ok=True)
    (folder / "lock").touch()
    cluster._sweep()
    assert not folder.exists()


def test_folders_that_are_made_anew_when_their_process_is_gone_are_swept() -> None:
    """By a process of Ray's that ended later; without a lock they stayed for good."""
    folder = Path("/tmp/pydedup-ray-made-anew")
    folder.mkdir(exist_ok=True)
    (folder / "session").touch()
    cluster._sweep()
    assert folder.exists()  # who made it just now has no lock yet
    os.utime(folder, (0, 0))
    cluster._sweep()
    assert not folder.exists()


def test_a_version_that_differs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = cluster.import_ray()

    def differs(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1.0")

    monkeypatch.setattr(ray, "init", differs)
    with (
        pytest.raises(ClusterError, match=r"another version than the Ray here: .*2\.1\.0"),
        cluster._connected(ray, "the Ray cluster at x:1", {"address": "x:1"}),
    ):
        pass


def test_a_client_server_that_starts_slowly_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray, calls = cluster.import_ray(), []

    def slow(**_: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionAbortedError("RuntimeError: Starting Ray client server failed. See x")

    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with cluster._connected(ray, "the Ray cluster at x:1", {"address": "x:1"}):
        assert len(calls) == 2


def _broken() -> str | None:
    raise ModuleNotFoundError("No module named 'pydedup'")


#: Ends when Ray has given what it notes of a death to the function that prints it.
DYING = """
import os, signal, sys, threading
from pydedup.ray.cluster import attached

class Dying:
    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

with attached(sys.argv[1]) as ray:
    worker, noted = sys.modules["ray._private.worker"], threading.Event()
    printing = worker.print_to_stdstream

    def observed(*arguments, **options):
        printing(*arguments, **options)
        if "died" in str(arguments):
            noted.set()

    worker.print_to_stdstream = observed
    died = ray.remote(num_cpus=0, max_restarts=0)(Dying).remote().die.remote()
    try:
        ray.get(died)
    except ray.exceptions.RayActorError:
        print("died", noted.wait(60))
"""


def test_what_died_is_not_in_our_output(cluster: Cluster) -> None:
    """Ray printed it there, before the JSON of a scoring."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", DYING, cluster.address], capture_output=True, text=True
    )
    assert done.stdout == "died True\n", done.stderr


_PRIVATE = """
import os
from pydedup.ray.cluster import PROXY_SECONDS, attached
with attached("local", cpus=1) as ray:
    print(ray.get(ray.remote(num_cpus=0)(os.getenv).remote(PROXY_SECONDS)))
print(os.getenv(PROXY_SECONDS))
"""


@pytest.mark.long
def test_a_private_ray_gives_a_proxy_time() -> None:
    """On a busy machine `serve --on local` ended: its proxy was killed, not being ready in 5 s."""
    environment = {k: v for k, v in os.environ.items() if k != cluster.PROXY_SECONDS}
    words = [sys.executable, "-P", "-c", _PRIVATE]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "60\nNone\n"


def test_each_node_is_asked(connected: Any) -> None:
    cluster.on_each_node(connected, os.getenv, "PYDEDUP_NOTHING")
    with pytest.raises(ClusterError, match=r"worker on [\d.]+: no driver"):
        cluster.on_each_node(connected, os.getenv, "PYDEDUP_NOTHING", "no driver")
    with pytest.raises(ClusterError, match=r"cannot run pydedup \(ModuleNotFoundError"):
        cluster.on_each_node(connected, _broken)
    with pytest.raises(ArgumentError, match="connected to Ray already"), attached("local"):
        pass
