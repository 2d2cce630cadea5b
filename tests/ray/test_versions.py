# SPDX-License-Identifier: Apache-2.0
"""Clusters of another Ray or Python: told from what they say of themselves, before Ray connects.

They are servers of gRPC here, which answer what heads and proxies do; Ray itself would wait.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from pydedup.errors import ClusterError
from pydedup.ray import cluster, probe, versions

NODE = b"DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX:" + b"0123456789abcdef" * 3


def generated(service: str) -> tuple[Any, Any]:
    cluster.import_ray()
    name = f"ray.core.generated.{service}_pb2"
    return importlib.import_module(name), importlib.import_module(f"{name}_grpc")


@contextlib.contextmanager
def answering(service: str, *names: str, **answers: Any) -> Iterator[int]:
    """A server of a service of Ray's, which answers some calls; gives its port."""
    _, stubs = generated(service)
    server = grpc.server(ThreadPoolExecutor(2))
    for name in names:
        made = getattr(stubs, f"{name}Servicer")()
        for method, answer in answers.items():
            if hasattr(made, method):
                setattr(made, method, lambda request, context, answer=answer: answer)
        getattr(stubs, f"add_{name}Servicer_to_server")(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def head(ray: str, python: str, node: bytes = NODE) -> Iterator[int]:
    messages, _ = generated("gcs_service")
    value = json.dumps({"ray_version": ray, "python_version": python}).encode()
    with answering(
        "gcs_service",
        "NodeInfoGcsService",
        "InternalKVGcsService",
        GetClusterId=messages.GetClusterIdReply(),
        InternalKVGet=messages.InternalKVGetReply(value=value),
        InternalKVKeys=messages.InternalKVKeysReply(results=[b"gcs_pid", node]),
    ) as port:
        yield port


@contextlib.contextmanager
def proxy(*keys: bytes) -> Iterator[int]:
    messages, _ = generated("ray_client")
    with answering(
        "ray_client",
        "RayletDriver",
        ClusterInfo=messages.ClusterInfoResponse(json="{}"),
        KVList=messages.KVListResponse(keys=keys),
    ) as port:
        yield port


@pytest.mark.parametrize(
    ("ray", "python", "named"),
    [
        ("2.1.0", platform.python_version(), ["Ray 2.1.0 on"]),
        (None, "3.1.4", ["on Python 3.1.4 there"]),
    ],
)
def test_a_head_of_another_version_is_named_at_once(
    ray: str | None, python: str, named: list[str]
) -> None:
    ours = str(cluster.import_ray().__version__)
    begun = time.monotonic()
    with (
        head(ray or ours, python) as port,
        pytest.raises(ClusterError, match=f"127.0.0.1:{port} is of another version") as raised,
    ):
        probe.probe(f"127.0.0.1:{port}")
    assert time.monotonic() - begun < 20
    here = f"Ray {ours} on Python {platform.python_version()} here"
    for said in [*named, here, "install the Ray and the Python of the cluster"]:
        assert said in str(raised.value)


def test_a_cluster_is_known_by_ray_client_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    with head("2.1.0", "3.11.1") as port, proxy(b"gcs_pid", NODE) as client:
        monkeypatch.setattr(versions, "_HEAD_PORT", port)
        begun = time.monotonic()
        with pytest.raises(ClusterError, match=r"Ray 2\.1\.0 on Python 3\.11\.1 there, Ray"):
            probe.probe(f"ray://127.0.0.1:{client}")
        assert time.monotonic() - begun < 20


def test_the_head_of_another_cluster_on_that_machine_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with head("2.1.0", "3.11.1", NODE[:-1] + b"0") as port, proxy(b"gcs_pid", NODE) as client:
        monkeypatch.setattr(versions, "_HEAD_PORT", port)
        probe.probe(f"ray://127.0.0.1:{client}")


def test_a_version_that_fits_or_is_not_told_hinders_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = str(cluster.import_ray().__version__)
    with head(ours, platform.python_version()) as port, proxy(NODE) as client:
        monkeypatch.setattr(versions, "_HEAD_PORT", port)
        for on in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{client}"):
            probe.probe(on)
    with proxy(NODE) as client:  # and no head
        probe.probe(f"ray://127.0.0.1:{client}")
