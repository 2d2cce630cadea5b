# SPDX-License-Identifier: Apache-2.0
"""Whether a Ray cluster is at an address, lets us in, and fits: asked before Ray, which tries long.

Newer Rays may want a token: a cluster does where ``ray start`` found ``~/.ray/auth_token`` (2.60),
or was told to. Ray sends its token to no address that it was given unless told to, and then does
not say that this is what it waits for.

Deliberately not here: connecting.
"""

from __future__ import annotations

import os
import re
import socket
import time
from typing import Final

from pydedup.errors import ArgumentError, ClusterError
from pydedup.ray.versions import check_versions, generated, open_channel
from pydedup.registry import redact

__all__ = ["probe"]

_CLIENT_PORT: Final = 10001
_SECONDS: Final = 5.0
_PAUSE_SECONDS: Final = 0.5
#: A machine that has much else to do answers late.
_ANSWER_SECONDS: Final = 15.0


def probe(on: str) -> None:
    """Raise unless a cluster may be at ``ray://host:port`` or ``host:port``.

    Raises ArgumentError for what is no address; ClusterError where nobody listens, or who does is
    no cluster, is one of another version, or wants a token and gets none that fits.
    """
    client = on.startswith("ray://")
    place = on.removeprefix("ray://").partition("?")[0]
    found = re.fullmatch(r"(\[[^\]]+\]|[^:/@\s]+)(?::(\d{1,5}))?", place)
    if found is None or not (client or found.group(2)) or int(found.group(2) or 1) > 65535:
        raise ArgumentError(
            f"{redact(on)!r} is no address of Ray; write ray://host:{_CLIENT_PORT}, host:6379, "
            "'auto' or 'local'"
        )
    host, port = found.group(1), int(found.group(2) or _CLIENT_PORT)
    start = f"ray start --head{f' --ray-client-server-port {port}' if client else ''}"
    to_do = f"see that it runs there ({start}), or take --on local"
    try:
        socket.create_connection((host.strip("[]"), port), timeout=_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {on} ({error.strerror or error}); {to_do}"
        ) from error
    code = _asked(f"{host}:{port}", client)
    if code == "UNAUTHENTICATED":
        sent = os.environ.get("RAY_AUTH_MODE") == "token"
        what = "does not take the token that it is sent" if sent else "wants a token"
        raise ClusterError(
            f"the Ray cluster at {on} {what}; set RAY_AUTH_MODE=token, and its token as "
            "RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
        )
    if code == "UNIMPLEMENTED":
        wanted = f"Ray Client ({_CLIENT_PORT}" if client else "the head of a cluster (6379"
        raise ClusterError(
            f"what answers at {on} is not {wanted} unless told otherwise); write "
            f"ray://host:{_CLIENT_PORT} to come by Ray Client, and host:6379 from a machine of the "
            "cluster"
        )
    if code is not None:
        raise ClusterError(f"what listens at {on} is no Ray cluster ({code}); {to_do}")
    check_versions(on, f"{host}:{port}", client=client)


def _asked(place: str, client: bool) -> str | None:
    """Return the status of gRPC with which a cluster hinders us; ``None`` where nothing does."""
    end = time.monotonic() + _SECONDS
    while True:
        try:
            _ask(place, client)
            return None
        except Exception as error:  # of what is no status, Ray has better words
            code = getattr(error, "code", None)
            said = str(code().name) if callable(code) else ""
        # Where it is just being started, it listens before it answers.
        waits = said == "UNAVAILABLE" and time.monotonic() + _PAUSE_SECONDS < end
        if not waits:
            telling = ("UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
            return said if said in telling else None
        time.sleep(_PAUSE_SECONDS)


def _ask(place: str, client: bool) -> None:
    """Ask a cluster for what changes nothing, as Ray would."""
    messages, stubs = generated("ray_client" if client else "gcs_service")
    with open_channel(place) as channel:
        if client:
            ping = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
            stubs.RayletDriverStub(channel).ClusterInfo(ping, timeout=_ANSWER_SECONDS)
        else:
            request = messages.GetClusterIdRequest()
            stub = stubs.NodeInfoGcsServiceStub(channel)
            stub.GetClusterId(request, timeout=_ANSWER_SECONDS)
