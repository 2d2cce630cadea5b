# SPDX-License-Identifier: Apache-2.0
"""What is wrong with an application, said before Ray is given it.

Ray Serve replaces the replicas of a deployment that runs by those of a new one under its name, and
has stopped the first when the new ones turn out not to start. So nothing is left to their start
that can be seen before.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydedup.errors import ArgumentError, PydedupError, UnavailableError
from pydedup.ray.cluster import Secret, import_ray, on_each_node
from pydedup.ray.serving.source import hindrance, is_here

__all__ = [
    "as_arguments",
    "check_actors",
    "check_nodes",
    "check_scale",
    "check_types",
    "said_at_once",
]

_MANY: Final = 1 << 20


def check_types(token: object, **mappings: object) -> None:
    """Raise ArgumentError for a token that is no text, and for what is no mapping."""
    if not isinstance(token, str | None):
        raise ArgumentError(f"token must be a string, not {type(token).__name__}")
    for name, value in mappings.items():
        if not isinstance(value, Mapping | None):
            raise ArgumentError(f"{name} is {value!r}; it must be a mapping of names to values")


def check_scale(
    num_replicas: object,
    autoscaling_config: Mapping[str, Any] | None,
    num_cpus: object,
    **whole: object,
) -> None:
    """Raise ArgumentError for what cannot be numbers of replicas and CPUs; ``whole`` are counts."""
    if num_replicas is not None and num_replicas != "auto":
        whole["num_replicas"] = num_replicas
        if autoscaling_config is not None:
            raise ArgumentError(
                f"num_replicas is {num_replicas!r} beside autoscaling_config; leave it out, and "
                "say min_replicas and max_replicas there"
            )
    for name, value in whole.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MANY:
            raise ArgumentError(f"{name} is {value!r}; it must be a whole number, 1 to {_MANY}")
    is_number = isinstance(num_cpus, int | float) and not isinstance(num_cpus, bool)
    if not is_number or not 0 < float(str(num_cpus)) < math.inf:
        raise ArgumentError(f"num_cpus is {num_cpus!r}; use a number above 0")
    if autoscaling_config is None:
        return
    config = import_ray("ray.serve.config").AutoscalingConfig
    known = list(getattr(config, "model_fields", None) or config.__fields__)
    unknown = [name for name in autoscaling_config if name not in known]
    if unknown:
        raise ArgumentError(
            f"autoscaling_config has {unknown[0]!r}; Ray knows {', '.join(sorted(known))}"
        )


@contextlib.contextmanager
def as_arguments() -> Iterator[None]:
    """Tell what Ray says of arguments, when an application is made, as ArgumentError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        said = " ".join(str(error).split()).partition(" For further information")[0]
        raise ArgumentError(f"Ray Serve does not take the arguments: {said}") from error


@contextlib.contextmanager
def said_at_once() -> Iterator[None]:
    """Have Ray Serve, when it builds the application of a config file, tell errors as they are.

    Of what is no exception of its own it shows a traceback, and before that it tries three times
    more, each in a process of its own. An error keeps its class, and becomes one of Ray's besides.
    """
    try:
        yield
    except UnavailableError:  # that may be over at the next try
        raise
    except PydedupError as error:
        kind, its_own = type(error), import_ray("ray.serve.exceptions").RayServeException
        both: Any = type(kind.__name__, (kind, its_own), {})
        told = both.__new__(both, *error.args)
        vars(told).update(vars(error))
        raise told from error


def check_actors(options: Mapping[str, Any]) -> None:
    """Raise ArgumentError for an environment of processes that Ray would refuse when it starts."""
    environment = options.get("runtime_env")
    if environment is not None:
        with as_arguments():
            importlib.import_module("ray.runtime_env").RuntimeEnv(**environment)


def check_nodes(store: Secret, token: Secret | None, options: Mapping[str, Any]) -> None:
    """See that replicas can begin on the cluster that this process is connected to, if it is.

    Raises ClusterError, which names the machine that hinders, and how.
    """
    ray = import_ray()
    if ray.is_initialized():
        on_each_node(
            ray,
            _hindrances,
            store,
            token,
            resources=options.get("resources") or {},
            runtime_env=options.get("runtime_env"),
        )


def _hindrances(store: Secret, token: Secret | None) -> str | None:
    """Return what keeps a process from serving a store, and from asking for the token."""
    return hindrance(store) or (None if token is None else _of_token(token))


def _of_token(token: Secret) -> str | None:
    from pydedup.http.access import check_token
    from pydedup.ray.serving.source import reveal

    try:
        check_token(reveal(token), "token" if is_here(token.reveal()) else token.reveal())
    except ArgumentError as error:
        return str(error)
    return None
