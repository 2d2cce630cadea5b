# SPDX-License-Identifier: Apache-2.0
"""Front and replicas as one application of Ray Serve."""

from __future__ import annotations

import importlib
import inspect
import math
import os
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from pydedup import config
from pydedup.errors import ArgumentError
from pydedup.http.access import check_token
from pydedup.http.options import ServeOptions
from pydedup.opening import connect_store, pool_bytes
from pydedup.ray.cluster import Secret, import_ray
from pydedup.ray.serving.checks import (
    as_arguments,
    check_actors,
    check_nodes,
    check_scale,
    check_types,
    said_at_once,
)
from pydedup.ray.serving.source import is_here
from pydedup.registry import absolute, redact
from pydedup.replacement import DEFAULT_POLICY, check_policy
from pydedup.words import Replacement, Routing, check_word

__all__ = ["ROUTINGS", "app", "deployment"]

#: How a replica is chosen: by families and our router, by families as Ray does it with multiplexed
#: models, or as Ray does it without.
ROUTINGS: Final = get_args(Routing)
#: Requests that a replica has at once before others help: enough for a batch, and few enough that
#: a model that everybody asks gets the help of others.
_MAX_ONGOING = 16
#: Requests that a front has at once; the bytes of their bodies are limited.
_MAX_ONGOING_FRONT = 4096
#: Arguments that are texts.
_TEXTS: Final = frozenset(
    ("store", "memory", "replacement", "routing", "token", "max_body", "max_answer")
)
#: How often, in seconds, a stopping replica looks for requests under way; Ray's default is 2.
_STOPS_SOON: Final = {"graceful_shutdown_wait_loop_s": 0.2}
_ROUTER: Final = "pydedup.ray.serving.router:FamilyRouter"


def deployment(
    store: str | os.PathLike[str],
    *,
    memory: str | int = "512MiB",
    replacement: Replacement = DEFAULT_POLICY,
    num_replicas: int | Literal["auto"] | None = None,
    autoscaling_config: Mapping[str, Any] | None = None,
    max_ongoing_requests: int = _MAX_ONGOING,
    num_cpus: float = 1,
    ray_actor_options: Mapping[str, Any] | None = None,
    num_fronts: int = 1,
    routing: Routing | None = None,
    token: str | None = None,
    max_batch: int = 64,
    max_wait_ms: float = 2.0,
    threads: int | None = None,
    max_body: str | int = "64MiB",
    max_answer: str | int = "64MiB",
    max_queue: int = 512,
    timeout: float = 30.0,
    grace: float = 30.0,
    access_log: bool = False,
    check: bool = True,
) -> Any:
    """Return an application for ``ray.serve.run`` that serves all models of a store.

    Parameters
    ----------
    store
        URL of the store as the replicas reach it; or ``env:NAME`` or ``file:PATH``, an environment
        variable or a file of theirs that holds it. A URL with a password shows in no log and no
        dashboard, but Ray keeps it to start replicas with; of ``env:`` and ``file:`` it has none.
    memory, replacement
        Of the buffer pool of each replica, as for `pydedup.open`.
    num_replicas, autoscaling_config, max_ongoing_requests, ray_actor_options
        Of the replicas, as for ``ray.serve.deployment``. The fronts have their ``runtime_env`` too.
    num_cpus
        CPUs of a replica, and so threads of its computations.
    num_fronts
        Processes that take requests and hand them on. They compute nothing, and count as no CPU.
    routing
        ``"families"``: models that share pages have a home, the same replica, and another one's
        help while that is full. ``"multiplexed"``: the same families, placed by Ray's own routing
        of multiplexed models. ``"any"``: any replica. By default the first, or the second where Ray
        is too old for it.
    token
        What clients must send, itself or as ``env:NAME`` or ``file:PATH`` of the front.
    max_batch, max_wait_ms, threads, max_body, max_answer, max_queue, timeout, grace, access_log
        As for ``pydedup serve`` (docs/http.md). ``max_queue`` are requests that wait for a replica
        in one front.
    check
        Whether the store is opened here, if its URL is given, and on each machine of the cluster,
        if this process is connected to one. So a deployment that runs is not replaced by one that
        cannot start.

    Raises
    ------
    ArgumentError
        Ray is missing or does not fit, or an argument is wrong.
    StoreError
        The store cannot be opened here.
    ClusterError
        It cannot be opened on a machine of the cluster, or the token is not there.
    """
    import_ray("ray.serve")  # where it is missing, the error says that
    check_types(token, autoscaling_config=autoscaling_config, ray_actor_options=ray_actor_options)
    budget = config.parse_memory(memory)
    check_policy(replacement)
    chosen = _routing(routing)
    check_scale(
        num_replicas,
        autoscaling_config,
        num_cpus,
        max_ongoing_requests=max_ongoing_requests,
        num_fronts=num_fronts,
    )
    actors = {"num_cpus": num_cpus, **dict(ray_actor_options or {})}
    check_actors(actors)
    if token is not None and is_here(token):
        check_token(token, "token")
    source = Secret(absolute(store))
    secret = None if token is None else Secret(token)
    cores = max(1, math.floor(num_cpus))
    options = ServeOptions(
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        # One may wait for the database while another computes.
        threads=min(4, cores + 1) if threads is None else threads,
        max_body=config.parse_bytes(max_body),
        max_answer=config.parse_bytes(max_answer),
        max_queue=max_queue,
        timeout=timeout,
        grace=grace,
        access_log=access_log,
    )
    if check:
        _try(source, secret, actors)
    scale = {"num_replicas": num_replicas, "autoscaling_config": autoscaling_config}
    with as_arguments():
        replicas = _models(
            max_ongoing_requests=max_ongoing_requests,
            max_queued_requests=max_queue,
            ray_actor_options=actors,
            graceful_shutdown_timeout_s=grace,
            **{name: value for name, value in scale.items() if value is not None},
            **_router(chosen),
        )
        front = _front(actors, num_replicas=num_fronts, graceful_shutdown_timeout_s=grace)
    # So large that a pool holds two at least.
    family_bytes = None if chosen == "any" else pool_bytes(budget) // 2
    return front.bind(
        replicas.bind(source, budget, replacement, options, cores),
        source,
        secret,
        options,
        family_bytes,
    )


def _models(**options: Any) -> Any:
    """Return the deployment of the replicas."""
    from pydedup.ray.serving.replica import Replica

    return import_ray("ray.serve").deployment(Replica, name="Models", **_STOPS_SOON, **options)


def _front(actors: Mapping[str, Any], **options: Any) -> Any:
    """Return the deployment of the fronts, in the environment of the replicas.

    A front opens the store as well, to see which models share pages.
    """
    from pydedup.ray.serving.front import Answering, Ingress

    serve = import_ray("ray.serve")
    there = {name: value for name, value in actors.items() if name == "runtime_env"}
    return serve.deployment(
        serve.ingress(Answering())(Ingress),
        name="Front",
        max_ongoing_requests=_MAX_ONGOING_FRONT,
        ray_actor_options={"num_cpus": 0, **there},
        **_STOPS_SOON,
        **options,
    )


def app(arguments: Mapping[str, Any]) -> Any:
    """Build the application of a config file of Ray Serve, or of ``serve run pydedup.ray:app``.

    With ``import_path: pydedup.ray:app`` and, as ``args``, the arguments of `deployment`; of the
    command, ``NAME=VALUE``, whose values are read like those of the file. Ray shows ``args`` in its
    dashboard, so the URL of a store that needs a password, and a token, come from ``env:NAME`` or
    ``file:PATH``.

    Raises
    ------
    ArgumentError
        For an argument that there is not, and a password or token in clear.
    StoreError
        The store cannot be opened.
    """
    with said_at_once():
        return _built(arguments)


def _built(arguments: Mapping[str, Any]) -> Any:
    known = list(inspect.signature(deployment).parameters)
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ArgumentError(f"args has {unknown[0]!r}; it takes {', '.join(known)}")
    if not isinstance(arguments.get("store"), str):
        raise ArgumentError("args needs store, the URL of a store, or env:NAME or file:PATH")
    url, token = arguments["store"], arguments.get("token")
    if is_here(url) and redact(url) != url:
        raise ArgumentError(
            f"args has the store {redact(url)!r} with its password, which Ray's dashboard shows; "
            "write env:NAME or file:PATH, where the replicas find it"
        )
    if token is not None and is_here(str(token)):
        raise ArgumentError(
            "args has a token, which Ray's dashboard shows; write env:NAME or file:PATH, where the "
            "front finds it"
        )
    return deployment(**{name: _read(name, value) for name, value in arguments.items()})


def _read(name: str, value: Any) -> Any:
    """Return an argument as a config file has it, when it is the text of a command line."""
    if name in _TEXTS or not isinstance(value, str):
        return value
    yaml = importlib.import_module("yaml")
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ArgumentError(f"{name} is {value!r}, which is no YAML: {said}") from error


def _routing(wanted: Routing | None) -> Routing:
    """Return which of the routings is used. Raises ArgumentError for what is none."""
    if wanted is None:
        return "families" if _has_routers() else "multiplexed"
    check_word("routing", wanted, ROUTINGS)
    return wanted


def _has_routers() -> bool:
    return hasattr(import_ray("ray.serve.config"), "RequestRouterConfig")


def _router(routing: str) -> dict[str, Any]:
    if routing != "families":
        return {}
    if not _has_routers():
        version = import_ray().__version__
        raise ArgumentError(
            f"Ray {version} does not let you choose how requests are routed; update it, or use "
            'routing="multiplexed"'
        )
    found = import_ray("ray.serve.config").RequestRouterConfig
    return {"request_router_config": found(request_router_class=_ROUTER)}


def _try(source: Secret, token: Secret | None, actors: Mapping[str, Any]) -> None:
    """See that the store opens: here, if its URL is here, and where replicas may begin."""
    if is_here(source.reveal()):
        connect_store(source.reveal(), mode="r").close()
    check_nodes(source, token, actors)
