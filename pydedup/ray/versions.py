# SPDX-License-Identifier: Apache-2.0
"""Which Ray and which Python a cluster runs, learned from itself before Ray connects.

Ray asks as well, but late: by Ray Client when it has had a server started for us, for which it
waits half a minute where its proxy met a fault. The head of a cluster tells at once what it is. The
proxy for clients cannot; but it can list keys, by which a head on its machine is known as its own.

Deliberately not here: whether anybody is at the address.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import re
import socket
import uuid
from typing import Any, Final

from pydedup.errors import ClusterError

__all__ = ["check_versions", "generated", "open_channel"]

_HEAD_PORT: Final = 6379
_SECONDS: Final = 3.0
_CONNECT_SECONDS: Final = 1.0
#: Keys with the id of a node, which no two clusters share.
_OF_NODE: Final = re.compile(rb"[0-9a-f]{40}")


def check_versions(on: str, place: str, *, client: bool) -> None:
    """Raise ClusterError where a cluster is of another version; return where nothing is known.

    Parameters
    ----------
    on, place
        Its address as it was given, and as ``host:port``.
    client
        Whether there is the proxy for clients, or the head.
    """
    if client and "RAY_IGNORE_VERSION_MISMATCH" in os.environ:  # Ray's own
        return
    told: Any = None
    with contextlib.suppress(Exception):  # Ray asks again, and has its own words
        told = _of_proxy(place) if client else _of_head(place)
    if not told:
        return
    theirs = str(told.get("ray_version")), str(told.get("python_version"))
    ours = str(importlib.import_module("ray").__version__), platform.python_version()
    if theirs[0] == ours[0] and _minor(theirs[1]) == _minor(ours[1]):
        return
    raise ClusterError(
        f"the Ray cluster at {on} is of another version than the Ray here: Ray {theirs[0]} on "
        f"Python {theirs[1]} there, Ray {ours[0]} on Python {ours[1]} here; install the Ray "
        "and the Python of the cluster"
    )


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _of_head(place: str) -> Any:
    messages, stubs = generated("gcs_service")
    with open_channel(place) as channel:
        asked = messages.InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
        found = stubs.InternalKVGcsServiceStub(channel).InternalKVGet(asked, timeout=_SECONDS)
        return json.loads(found.value) if found.value else None


def _of_proxy(place: str) -> Any:
    """Ask the head on the machine of a proxy, if it is where heads are, and the proxy's own."""
    host = place.rpartition(":")[0]
    socket.create_connection((host.strip("[]"), _HEAD_PORT), timeout=_CONNECT_SECONDS).close()
    head = f"{host}:{_HEAD_PORT}"
    messages, stubs = generated("ray_client")
    with open_channel(place) as channel:
        nobody = [("client_id", uuid.uuid4().hex)]
        found = stubs.RayletDriverStub(channel).KVList(
            messages.KVListRequest(prefix=b""), timeout=_SECONDS, metadata=nobody
        )
        ours = {key for key in found.keys if _OF_NODE.search(key)}
    messages, stubs = generated("gcs_service")
    with open_channel(head) as channel:
        service = stubs.InternalKVGcsServiceStub(channel)
        theirs = service.InternalKVKeys(messages.InternalKVKeysRequest(), timeout=_SECONDS)
    return None if ours.isdisjoint(theirs.results) else _of_head(head)


def open_channel(place: str) -> Any:
    """Return a channel of gRPC to ``host:port``, as Ray makes it: with its TLS, and its token."""
    try:
        utils = importlib.import_module("ray._private.grpc_utils")
    except ImportError:  # of Rays before tokens
        utils = importlib.import_module("ray._private.utils")
    return utils.init_grpc_channel(place)


def generated(service: str) -> tuple[Any, Any]:
    """Return Ray's messages and stubs of a service of gRPC."""
    name = f"ray.core.generated.{service}_pb2"
    return importlib.import_module(name), importlib.import_module(f"{name}_grpc")
