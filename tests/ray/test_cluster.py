# SPDX-License-Identifier: Apache-2.0
"""Reaching Ray: where there is none, none that fits, and none that answers; and what it is told."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pydedup.errors import ArgumentError, ClusterError
from pydedup.ray import attached, cluster

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


@pytest.mark.parametrize("on", ["http://host:1", "host", "ray://", "ray://host:99999", "", URL])
def test_what_is_no_address_is_said(on: str) -> None:
    with pytest.raises(ArgumentError, match="is no address of Ray") as raised, attached(on):
        pass
    assert "pa55word" not in str(raised.value)


@pytest.mark.parametrize("on", ["ray://127.0.0.1:1", "127.0.0.1:1"])
def test_where_nobody_listens_is_said_at_once(on: str) -> None:
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {on}"), attached(on):
        pass


def test_a_secret_travels_and_does_not_show() -> None:
    secret = cluster.Secret(URL)
    assert pickle.loads(pickle.dumps(secret)).reveal() == URL  # noqa: S301 (made here)
    for shown in (repr(secret), str(secret), f"{secret}", repr({"url": [secret]})):
        assert "pa55word" not in shown


def test_a_private_ray_leaves_nothing_and_is_not_told_passwords(tmp_path: Path) -> None:
    code = """
import glob
from pydedup.ray.cluster import attached
with attached("local", cpus=1) as ray:
    (job,) = ray._private.worker.global_worker.gcs_client.get_all_job_info().values()
    print(job.entrypoint)
    print(ray.cluster_resources()["CPU"], ray.get_runtime_context().gcs_address != "")
    session = ray._private.worker._global_node.get_session_dir_path()
    print(*[folder for folder in glob.glob("/tmp/pydedup-ray-*") if folder in session])
"""
    arguments = [sys.executable, "-P", "-c", code, URL, f"--source={URL}"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *told, resources, folder = done.stdout.splitlines()
    assert "pa55word" not in "\n".join(told)
    assert "db.example" in told[-1]
    assert resources == "1.0 True"
    assert not Path(folder).exists()


def test_folders_of_killed_processes_are_swept() -> None:
    folder = Path("/tmp/pydedup-ray-left-over")
    folder.mkdir(exist_ok=True)
    (folder / "lock").touch()
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


def test_each_node_is_asked(connected: Any) -> None:
    cluster.on_each_node(connected, os.getenv, "PYDEDUP_NOTHING")
    with pytest.raises(ClusterError, match=r"worker on [\d.]+: no driver"):
        cluster.on_each_node(connected, os.getenv, "PYDEDUP_NOTHING", "no driver")
    with pytest.raises(ClusterError, match=r"cannot run pydedup \(ModuleNotFoundError"):
        cluster.on_each_node(connected, _broken)
    with pytest.raises(ArgumentError, match="connected to Ray already"), attached("local"):
        pass
