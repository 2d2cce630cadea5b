# SPDX-License-Identifier: Apache-2.0
"""An application on a cluster, started and watched from here until a signal says to stop."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from pydedup.errors import ArgumentError, ClusterError
from pydedup.http.server import listen, stopping_signals, url_of
from pydedup.opening import connect_store
from pydedup.ray.cluster import LOST, Secret, attached, import_ray, is_lost, kill, on_each_node
from pydedup.ray.score_pool import words_of
from pydedup.ray.serving.application import deployment
from pydedup.ray.serving.source import models, reveal
from pydedup.registry import absolute

__all__ = ["parse_replicas", "run"]

_LOG = logging.getLogger("pydedup.ray")
#: What it is called in Ray's dashboard.
_APPLICATION: Final = "pydedup"
#: What Ray calls the actor that shows that a command serves.
_GUARD: Final = {"name": _APPLICATION, "namespace": f"{_APPLICATION}-serve"}
#: Seconds between looks at whether there is still a connection.
_LOOK_SECONDS: Final = 5.0


def parse_replicas(text: str) -> dict[str, Any]:
    """Return what ``2`` or ``1:8`` says of replicas, for `deployment`.

    Raises ArgumentError when it is neither.
    """
    low, colon, high = text.partition(":")
    if low.isascii() and low.isdigit() and (not colon or (high.isascii() and high.isdigit())):
        if not colon and int(low) > 0:
            return {"num_replicas": int(low)}
        if colon and int(low) <= int(high) and int(high) > 0:
            scale = {"min_replicas": int(low), "max_replicas": int(high)}
            return {"autoscaling_config": scale}
    raise ArgumentError(
        f"{text!r} is not a number of replicas; write how many (2), or from:to (1:8)"
    )


def run(
    url: str,
    on: str,
    http: Mapping[str, Any],
    started: Callable[[str, list[str]], None],
    **chosen: Any,
) -> None:
    """Serve a store on a cluster until SIGTERM or SIGINT.

    Parameters
    ----------
    url
        Of the store, as `deployment` takes it.
    on
        Where the cluster is, as `attached` takes it.
    http
        Host, port and certificate of Ray's HTTP proxies. Where Ray Serve runs already, it keeps
        those that it has.
    started
        Called with the server's URL and the names of the models, one for each version.
    chosen
        What `deployment` takes.

    Raises
    ------
    ArgumentError, ClusterError
        Something is wrong here, at the cluster, or with a worker.
    StoreError
        The store that a private Ray would serve cannot be opened.
    OSError
        Where the proxies would be of this machine alone: host and port cannot be listened on.
    """
    stop = threading.Event()
    url = absolute(url)
    if on == "local":
        # Ray's proxy shares its port with those of other Rays, who would get some of the requests.
        listen(http["host"], http["port"]).close()
        # Ray takes some seconds to begin, and what is wrong with the store is known here.
        connect_store(reveal(Secret(url)), mode="r").close()
    with contextlib.ExitStack() as left:
        ray = left.enter_context(attached(on))
        _refuse_second(ray)  # again below, when others had time to come first
        names = on_each_node(ray, models, Secret(url))[0]
        serve = import_ray("ray.serve")
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        application = deployment(url, check=False, **chosen)
        _check_cpus(ray, on, chosen)
        left.enter_context(_alone(ray))
        mine = not serve.status().proxies
        try:
            # It may wait for CPUs for ever; who is tired of that interrupts it.
            _start(serve, application, dict(http))
            taken = {
                number: signal.signal(number, lambda *_: stop.set())
                for number in stopping_signals()
            }
            try:
                # Not asked by a handle of Ray Serve's: its router gives up calls that take a tenth
                # of a second, and Ray Client then shows tracebacks of their late answers.
                started(_address(serve, http), names)
                while not stop.wait(_LOOK_SECONDS):
                    _check_connected(ray)
            finally:
                for number, before in taken.items():
                    signal.signal(number, before)
        except BaseException:
            with contextlib.suppress(ClusterError):  # the first error is reported
                _take_down(ray, serve, mine)
            raise
        _take_down(ray, serve, mine)


class _Guard:
    """An actor that lives as long as the command that began it, whatever ends that."""

    def ready(self) -> None:
        """Return when this is the one of its name."""


def _taken() -> ClusterError:
    return ClusterError(
        "a `pydedup serve --on` is serving on this Ray cluster already; stop that "
        "first (where its connection was lost, Ray may take half a minute to see it)"
    )


def _refuse_second(ray: Any) -> None:
    with contextlib.suppress(ValueError):
        ray.get_actor(**_GUARD)
        raise _taken()


@contextlib.contextmanager
def _alone(ray: Any) -> Iterator[None]:
    """Let no other command replace what this one serves. Raises ClusterError if one serves."""
    _refuse_second(ray)
    try:
        guard = ray.remote(num_cpus=0)(_Guard).options(**_GUARD).remote()
        ray.get(guard.ready.remote())
    except ValueError:  # another came first
        raise _taken() from None
    try:
        yield
    finally:
        kill(ray, guard)


def _check_connected(ray: Any) -> None:
    """Raise ClusterError where Ray Client has given up its connection, as `is_lost` has it.

    Ray Serve would begin a Ray of its own, and ask that.
    """
    try:
        if ray.is_initialized():
            ray.cluster_resources()  # of what was lost in silence, that tells
            return
    except Exception as error:
        if not is_lost(error):  # such as a head that begins anew, which Ray waits for
            return
    raise ClusterError(
        f"{LOST}; if the cluster lives, it goes on serving, and the same command takes that over"
    )


def _take_down(ray: Any, serve: Any, mine: bool) -> None:
    _check_connected(ray)
    try:
        serve.delete(_APPLICATION)
        if mine and not serve.status().applications:
            serve.shutdown()
    except Exception as error:
        said = words_of(error)
        raise ClusterError(f"the application {_APPLICATION} was not taken down: {said}") from error


def _check_cpus(ray: Any, on: str, chosen: Mapping[str, Any]) -> None:
    """Say where Ray would wait for CPUs: for ever, if it is a private one."""
    least = chosen.get("autoscaling_config", {}).get("min_replicas", 1)
    wanted = chosen.get("num_cpus", 1) * chosen.get("num_replicas", least)
    found = ray.cluster_resources().get("CPU", 0)
    if wanted <= found:
        return
    said = f"the replicas want {wanted:g} CPUs, and Ray has {found:g}"
    if on == "local":
        raise ClusterError(f"{said}; take fewer --replicas")
    _LOG.warning("%s; they start when it has more", said)


def _start(serve: Any, application: Any, http: dict[str, Any]) -> None:
    try:
        if http.get("port") == 0:
            with listen(http["host"], 0) as found:
                http["port"] = found.getsockname()[1]
        serve.start(http_options=http)
        serve.run(application, name=_APPLICATION, route_prefix="/")
    except Exception as error:
        raise ClusterError(f"Ray Serve does not start it: {words_of(error)}") from error


def _address(serve: Any, http: Mapping[str, Any]) -> str:
    """Return where it is served: as Ray Serve was started, which may have been by others."""
    client = serve.context._get_global_client()
    used = getattr(client, "http_config", None)
    host = getattr(used, "host", http["host"])
    port = getattr(used, "port", http["port"])
    secured = getattr(used, "ssl_certfile", http.get("ssl_certfile"))
    return url_of(host, port, secured=bool(secured))
