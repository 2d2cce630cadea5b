# SPDX-License-Identifier: Apache-2.0
"""What a path asks for.

Names of models may hold "/". Encoded as %2F it is a part of the name in any place; as it is, the
path is read from its end: ``a/b/versions/2/infer`` is version 2 of ``a/b``.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

from pydedup.http.problems import HttpError, bad

__all__ = ["Route", "route_of"]

_PLAIN = {
    "v2": ("server", "GET"),
    "v2/health/live": ("live", "GET"),
    "v2/health/ready": ("ready", "GET"),
    "v2/repository/index": ("index", "POST"),
    "metrics": ("metrics", "GET"),
}


@dataclass(frozen=True, slots=True)
class Route:
    """What is asked, and of which model: its address is as `Store.predict` takes it."""

    action: str
    address: str = ""


def route_of(method: str, raw_path: bytes) -> Route:
    """Return what a request asks for.

    Raises HttpError 404 for a path that is nothing, 405 for another method, 400 for bytes that are
    no UTF-8.
    """
    parts = [_decoded(part) for part in raw_path.partition(b"?")[0].split(b"/")[1:]]
    while len(parts) > 1 and parts[-1] == "":
        parts.pop()
    plain = _PLAIN.get("/".join(parts))
    if plain is not None:
        action, needed = plain
        return _checked(Route(action), method, needed)
    if parts[:2] == ["v2", "models"] and len(parts) > 2:
        rest, action = parts[2:], "model"
        if len(rest) > 1 and rest[-1] in ("infer", "ready", "config"):
            action = f"model_{rest.pop()}"
        version = None
        if len(rest) > 2 and rest[-2] == "versions":
            version = rest.pop()
            rest.pop()
        name = "/".join(rest)
        address = name if version is None else f"{name}@{version}"
        return _checked(Route(action, address), method, "POST" if "infer" in action else "GET")
    if len(parts) > 4 and parts[:3] == ["v2", "repository", "models"]:
        *_, action = parts
        if action in ("load", "unload"):
            return _checked(Route(action, "/".join(parts[3:-1])), method, "POST")
    known = "GET /v2/models/NAME, POST /v2/models/NAME/infer, POST /v2/repository/index"
    raise HttpError(404, f"there is nothing here, but at {known} and others", "not_found")


def _checked(route: Route, method: str, needed: str) -> Route:
    taken = ("GET", "HEAD") if needed == "GET" else (needed,)
    if method not in taken:
        allow = ((b"allow", ", ".join(taken).encode()),)
        # Of a path that is taken for a name, as with another verb at its end.
        way = "; predictions are at /v2/models/NAME/infer" if route.action == "model" else ""
        raise HttpError(405, f"this path takes {needed}, not {method}{way}", "bad_request", allow)
    return route


def _decoded(part: bytes) -> str:
    try:
        return unquote(part.decode("utf-8"), errors="strict")
    except UnicodeDecodeError:
        raise bad("path", "it is not UTF-8, percent-encoded") from None
