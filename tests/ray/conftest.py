# SPDX-License-Identifier: Apache-2.0
"""One Ray cluster for all of these tests, of two CPUs, with a folder and ports of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_PATIENCE_SECONDS = 90.0


@dataclass(frozen=True)
class Cluster:
    """Where a cluster is: for a process of its machine, and for Ray Client."""

    address: str
    client: str


def free_ports(count: int) -> list[int]:
    opened = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in opened]
    for one in opened:
        one.close()
    return ports


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster that runs while the tests do."""
    port, client, *others = free_ports(7)
    named = ("node-manager", "object-manager", "dashboard-agent-grpc", "metrics-export")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as tmp:
        environment = os.environ | {"RAY_TMPDIR": tmp, "RAY_AUTH_MODE": "disabled"}
        os.environ["RAY_AUTH_MODE"] = "disabled"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={tmp}"]
        command += [f"--ray-client-server-port={client}", "--num-cpus=2", "--disable-usage-stats"]
        command += ["--include-dashboard=false", f"--object-store-memory={128 << 20}"]
        options = zip((f"--{name}-port" for name in named), others[:3] + others[4:], strict=True)
        command += [f"{name}={number}" for name, number in options]
        log = Path(tmp) / "start.log"
        with log.open("w") as out:
            head = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            for number in (port, client):
                _wait_for(number, head, log)
            yield Cluster(f"127.0.0.1:{port}", f"ray://127.0.0.1:{client}")
        finally:
            head.terminate()
            head.wait(30)


def _wait_for(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end and head.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"Ray did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, this process connected to the cluster."""
    from pydedup.ray.cluster import attached

    with attached(cluster.address) as ray:
        yield ray
