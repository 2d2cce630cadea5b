# SPDX-License-Identifier: Apache-2.0
"""Ray itself: whether it is here and fits, and how a cluster is reached, or a private one started.

A URL with its password must reach the workers and show nowhere. So it travels as a `Secret`, whose
text is without; a command line, which Ray notes as the entry point of a job, is told without; and
what goes wrong on a worker comes back as text that `without_secrets` has seen, not as an exception
with frames.

Deliberately not here: what workers do.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, TypeVar

from pydedup.errors import ArgumentError, ClusterError, not_installed
from pydedup.ray.probe import probe
from pydedup.registry import redact
from pydedup.text import without_secrets

__all__ = [
    "LOST",
    "PROXY_SECONDS",
    "Secret",
    "attached",
    "import_ray",
    "is_lost",
    "kill",
    "on_each_node",
    "use_threads",
]

#: Names how long Ray Serve waits for its proxy of HTTP.
PROXY_SECONDS: Final = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"
LOST: Final = "the connection to the Ray cluster was lost"
#: The oldest that tests were run with (of 2.31, datasets and dying replicas fail), and the first
#: that may lack what is called here.
_OLDEST, _TOO_NEW = (2, 44), (3,)
_PREFIX: Final = "pydedup-ray-"
#: A folder without a lock for longer than this is left over: who begins makes one at once.
_UNLOCKED_SECONDS: Final = 600.0
#: Of what a private Ray may keep in shared memory; little passes through it.
_OBJECT_STORE_BYTES: Final = 128 * 1024 * 1024
#: What a function tells of a node.
_Told = TypeVar("_Told")


class Secret:
    """A text that its own text, and so logs and dashboards, do not show."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return f"Secret({redact(self._text)!r})"

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return Secret, (self._text,)

    def reveal(self) -> str:
        """Return the text."""
        return self._text


def import_ray(module: str = "ray") -> Any:
    """Return Ray, or a module of it. Raises ArgumentError where it is missing or does not fit."""
    # What Ray does when a task asks for no GPU, said to be about to change; nobody here has one.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Ray's own code
            ray = importlib.import_module("ray")
            found = importlib.import_module(module)
            if module == "ray.data":
                found.DataContext.get_current()  # made at first use
    except ImportError as error:
        raise ArgumentError(not_installed("pydedup.ray", error, "ray")) from error
    numbers = tuple(int(part) for part in re.findall(r"\d+", str(ray.__version__))[:2])
    if not _OLDEST <= numbers < _TOO_NEW:
        raise ArgumentError(
            f"Ray {ray.__version__} is installed, and pydedup needs {_OLDEST[0]}.{_OLDEST[1]} or "
            f"newer, below {_TOO_NEW[0]}; install one that fits with: pip install "
            "'pydedup[ray]'"
        )
    return found


@contextlib.contextmanager
def attached(on: str | None = None, *, cpus: int | None = None) -> Iterator[Any]:
    """Give Ray, connected to a cluster; a connection that was made here ends with the block.

    Parameters
    ----------
    on
        ``"ray://host:10001"`` (Ray Client), ``"host:6379"`` (from a machine of the cluster),
        ``"auto"`` (the cluster that this machine is of), or ``"local"``: a private one on this
        machine, which ends with the block. ``None``: the one that the process is connected to.
    cpus
        CPUs that a private one may use; those that there are by default.

    Raises
    ------
    ArgumentError
        Ray is missing or does not fit, ``on`` is no address, or the process is connected already.
    ClusterError
        No cluster answers at the address, or it does not fit.
    """
    ray = import_ray()
    if on is None:
        if not ray.is_initialized():
            raise ArgumentError(
                "this process is not connected to Ray; call ray.init(...), or say where with on: "
                "'local', 'auto' or 'ray://host:10001'"
            )
        yield ray
        return
    if ray.is_initialized():
        raise ArgumentError(
            f"this process is connected to Ray already; leave out on={redact(on)!r}, or call "
            "ray.shutdown() first"
        )
    with _private(ray, cpus) if on == "local" else _remote(ray, on):
        yield ray


@contextlib.contextmanager
def _private(ray: Any, cpus: int | None) -> Iterator[None]:
    """Start a Ray of our own, with a folder of its own, and end it."""
    _sweep()
    # Short, since sockets are in it, whose paths have at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
    try:
        # Held until this process ends, however it does: so `_sweep` knows what is left over.
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            options: dict[str, Any] = {
                "address": "local",
                "_temp_dir": str(folder),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
            if cpus is not None:
                options["num_cpus"] = cpus
            what = "a private Ray on this machine"
            with (
                _own_token(folder),
                _patience(),
                _own_group(),
                _connected(ray, what, options),
            ):
                yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Have the Ray Serve of a Ray that begins here wait for its proxy for as long as its caller.

    By itself it kills one that is not ready after 5 seconds, which it may take on a busy machine,
    and its caller gets the death of that one for an answer.
    """
    if os.environ.get(PROXY_SECONDS):
        yield
        return
    os.environ[PROXY_SECONDS] = "60"
    try:
        yield
    finally:
        os.environ.pop(PROXY_SECONDS, None)


@contextlib.contextmanager
def _own_token(folder: Path) -> Iterator[None]:
    """Give a private Ray a token in its own folder, and forget it afterwards.

    Ray would leave one in the home directory, and clusters that are started later would want it.
    """
    token, file, mode = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"
    if os.environ.get(token) or os.environ.get(file):
        yield
        return
    before = os.environ.get(mode)
    path = folder / "token"
    path.touch(0o600)
    path.write_text(secrets.token_hex(32))
    os.environ[file] = str(path)
    _read_environment()
    try:
        yield
    finally:
        os.environ.pop(file, None)
        if before is None:  # Ray has set it
            os.environ.pop(mode, None)
        _read_environment()


def _read_environment() -> None:
    """Have Ray look again for how it is asked for a token, and for the token."""
    with contextlib.suppress(Exception):  # of a Ray without tokens
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
        raylet.Config.initialize("")


def _sweep() -> None:
    """Remove folders of private Rays whose process was killed.

    A process of Ray's that outlived it for a while may have made its folder anew, without a lock.
    """
    for folder in Path("/tmp").glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if not (folder / "lock").exists():
                if time.time() - folder.stat().st_mtime > _UNLOCKED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            with (folder / "lock").open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _remote(ray: Any, on: str) -> Iterator[None]:
    if on != "auto":
        probe(on)
    with _connected(ray, f"the Ray cluster at {redact(on)}", {"address": on}):
        yield


@contextlib.contextmanager
def _connected(ray: Any, what: str, options: dict[str, Any]) -> Iterator[None]:
    try:
        with _quiet_entry_point(), _away_from_sources(), _own_sigterm():
            try:
                _init(ray, options)
            except Exception as error:
                # Ray's proxy forks while it speaks gRPC, and now and then what it starts dies.
                if "Starting Ray client server failed" not in str(error):
                    raise
                _init(ray, options)
    except Exception as error:
        said = " ".join(without_secrets(str(error)).split()) or type(error).__name__
        if "ersion mismatch" in said:
            raise ClusterError(
                f"{what} is of another version than the Ray here: {said}; install the Ray and the "
                "Python of the cluster"
            ) from error
        if "Could not find any running Ray instance" in said:
            raise ClusterError(
                "no Ray runs on this machine, or none that this user may find; start one "
                "(ray start), name its address, or take --on local"
            ) from error
        raise ClusterError(f"{what} cannot be used: {said}") from error
    with _quiet_output():
        try:
            yield
        finally:
            with contextlib.suppress(Exception):  # a cluster that is gone needs no goodbye
                ray.shutdown()


def _init(ray: Any, options: dict[str, Any]) -> None:
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


@contextlib.contextmanager
def _away_from_sources() -> Iterator[None]:
    """Leave a clone of pydedup while a job begins, unless it is what is installed.

    Workers look for modules in the folder that the job began in, before any other; sources there
    have no compiled core, and would hide what is installed.
    """
    sources = Path.cwd() / "pydedup"
    installed = Path(__file__).resolve().parent.parent
    if not (sources / "__init__.py").exists() or sources.resolve() == installed:
        yield
        return
    with contextlib.chdir("/"):
        yield


def _own_group() -> AbstractContextManager[None]:
    """Have Ray's processes be of no group of ours: a signal to all of that is for us to obey.

    As timeout, a shell's `kill %1` and supervisors send one. Ray, which it ended at once, would
    then be waited for for a minute.
    """
    module = "ray._private.services"
    real: Any = getattr(sys.modules.get(module), "ConsolePopen", subprocess.Popen)
    return _instead(module, "ConsolePopen", functools.partial(real, process_group=0))


def _quiet_output() -> AbstractContextManager[None]:
    """Have Ray not print what it notes of processes that died: our own output goes there."""
    return _instead("ray._private.worker", "print_to_stdstream", lambda *_, **__: None)


def _quiet_entry_point() -> AbstractContextManager[None]:
    """Have Ray note the command line, as the entry point of its job, without passwords."""
    told = subprocess.list2cmdline(without_secrets(redact(part)) for part in sys.orig_argv)
    return _instead("ray._private.utils", "get_entrypoint_name", lambda: told)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Have SIGTERM do what it does here, if that is something, and not what Ray begins with.

    That ends the process with 1, whatever its exit status should say, and its core writes frames
    to standard error before.
    """
    ours = signal.getsignal(signal.SIGTERM)
    if not callable(ours) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        with _instead("ray._private.utils", "set_sigterm_handler", lambda *_: None):
            yield
    finally:
        signal.signal(signal.SIGTERM, ours)  # in the place of what the core has put there


@contextlib.contextmanager
def _instead(module: str, name: str, ours: Callable[..., Any]) -> Iterator[None]:
    """Put a function in the place of one of Ray's, where this Ray has it."""
    where = sys.modules.get(module)
    real = getattr(where, name, None)
    if real is None:
        yield
        return
    setattr(where, name, ours)
    try:
        yield
    finally:
        setattr(where, name, real)


def is_lost(error: Exception) -> bool:
    """Whether Ray Client says so that it has given up its connection.

    Where there is another connection, to a cluster that this machine is of, Ray ends the process.
    """
    of_grpc = type(error).__module__.partition(".")[0] == "grpc"
    return of_grpc or isinstance(error, ConnectionError)


def kill(ray: Any, actor: Any) -> None:
    """End an actor if it is there; who has lost the connection would begin a Ray for that."""
    with contextlib.suppress(Exception):
        if ray.is_initialized():
            ray.kill(actor)


def use_threads(count: int) -> None:
    """Have computations of this process take so many threads; before the first of them."""
    os.environ["PYDEDUP_THREADS"] = str(count)


def on_each_node(
    ray: Any,
    function: Callable[..., _Told | str],
    *arguments: object,
    resources: Mapping[str, float] | None = None,
    runtime_env: Mapping[str, Any] | None = None,
) -> list[_Told]:
    """Call a function once on each node that has CPUs, and see that nothing hinders its work.

    Returns what it returned on each.

    Parameters
    ----------
    function
        Of a module of pydedup. Returns what hinders, which is a text; else whatever is no text.
    resources
        Nodes without these of Ray's are left out.
    runtime_env
        What the processes get from Ray.

    Raises
    ------
    ClusterError
        Which names the node.
    """
    strategies = importlib.import_module("ray.util.scheduling_strategies")
    options = {} if runtime_env is None else {"runtime_env": dict(runtime_env)}
    remote = ray.remote(num_cpus=0, max_retries=2, **options)(function)
    asked: list[tuple[str, Any]] = []
    for node in ray.nodes():
        there = node["Resources"]
        if node["Alive"] and there.get("CPU") and (resources or {}).keys() <= there.keys():
            strategy = strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            call = remote.options(scheduling_strategy=strategy).remote(*arguments)
            asked.append((str(node["NodeManagerAddress"]), call))
    if not asked and not resources:
        raise ClusterError("no node of the Ray cluster has a CPU to work with")
    found: list[_Told] = []
    for address, call in asked:
        try:
            told: _Told | str = ray.get(call)
        except Exception as error:
            said = without_secrets(str(error)).strip().splitlines()
            raise ClusterError(
                f"the Ray worker on {address} cannot run pydedup "
                f"({said[-1].strip() if said else type(error).__name__}); install the same pydedup "
                "there, with the extra of its database"
            ) from error
        if isinstance(told, str):
            raise ClusterError(f"the Ray worker on {address}: {told}")
        found.append(told)
    return found
