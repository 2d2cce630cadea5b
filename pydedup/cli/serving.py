# SPDX-License-Identifier: Apache-2.0
"""``pydedup serve``: predictions over HTTP."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import click

from pydedup import config, text
from pydedup.cli import options, output
from pydedup.cli.errors import Exit, warn
from pydedup.cli.progress import Watch
from pydedup.errors import UnsupportedFormatError, not_installed
from pydedup.registry import redact
from pydedup.replacement import DEFAULT_POLICY, POLICIES
from pydedup.words import Replacement

if TYPE_CHECKING:
    from pydedup.http.options import ServeOptions

__all__ = ["TOKEN_VARIABLE", "serve"]

TOKEN_VARIABLE = "PYDEDUP_TOKEN"


def _without_brackets(context: click.Context, option: click.Parameter, value: str) -> str:
    """Return an IPv6 address without those that it has in a URL; a callback."""
    return value[1:-1] if value.startswith("[") and value.endswith("]") else value


@click.command(short_help="Predict over HTTP, by the Open Inference Protocol v2.")
@options.store_argument
@click.option(
    "--host",
    metavar="HOST",
    callback=_without_brackets,
    default="127.0.0.1",
    show_default=True,
    help="Name or address to listen on; 0.0.0.0 is all of them.",
)
@options.number_option("--port", "N", click.IntRange(0, 65535), 8000, "0 takes any free port.")
@options.memory_option
@click.option(
    "--replacement",
    type=click.Choice(POLICIES),
    default=DEFAULT_POLICY,
    show_default=True,
    help="Which page goes when memory is full.",
)
@options.number_option(
    "--max-batch", "ROWS", click.IntRange(1), 64, "Most rows that are predicted together."
)
@options.number_option(
    "--max-wait-ms",
    "MS",
    click.FloatRange(0, 60_000),
    2.0,
    "How long a request waits for others while another is predicted and a thread is free.",
)
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(1, 256),
    help="Batches that are predicted at once.  [default: one per core, at most 4]",
)
@options.size_option(
    "--max-body",
    "64MiB",
    "Largest body of a request; all requests together may have four times as much.",
)
@options.size_option(
    "--max-answer",
    "64MiB",
    "What a request may take on top of --memory until it is answered; all requests together, "
    "four times as much.",
)
@options.number_option(
    "--max-queue",
    "N",
    click.IntRange(1),
    512,
    "Requests that may wait; others are told to try again.",
)
@options.number_option(
    "--timeout", "SECONDS", click.FloatRange(0.001), 30.0, "How long a request may take."
)
@options.number_option(
    "--grace",
    "SECONDS",
    click.FloatRange(0),
    30.0,
    "How long requests under way may take after SIGTERM.",
)
@options.file_option(
    "--token-file",
    f"File with the token that clients must send; else {TOKEN_VARIABLE}, if set.",
)
@options.file_option("--tls-cert", "Certificate with its chain, PEM.")
@options.file_option("--tls-key", "Its key, PEM, without a password.")
@click.option(
    "--record",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Record uses of pages, a million at most, and write them there (.npz) at the end.",
)
@options.on_option("Serve on")
@click.option(
    "--replicas",
    metavar="N|MIN:MAX",
    help="With --on: how many processes, each with --memory of its own; or, with MIN:MAX, as many "
    "as requests need.",
)
@click.option(
    "--access-log",
    is_flag=True,
    help="Log requests to standard error, in JSON lines; with --on, to Ray's log.",
)
def serve(
    url: str,
    host: str,
    port: int,
    memory: str,
    replacement: Replacement,
    threads: int | None,
    max_body: str,
    max_answer: str,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    record: Path | None,
    on: str | None,
    replicas: str | None,
    **limits: Any,
) -> int:
    """Serve the models of a store over HTTP until SIGTERM or Ctrl-C.

    The paths are those of the Open Inference Protocol v2 (KServe, Triton), with binary tensors and
    the model repository; /metrics is for Prometheus. For the details see docs/http.md.
    """
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if replicas is not None and on is None:
        raise click.UsageError("--replicas goes with --on; without it, there is one process")
    if record is not None and on is not None:
        raise click.UsageError("--record records one process: leave out --on")
    if limits["access_log"] and on == "local":
        raise click.UsageError(
            "--access-log goes to Ray's log, and that of a private Ray is deleted"
        )
    try:
        import pydedup.http.server  # noqa: F401 (what it lacks is told here)
        from pydedup.http.access import read_token
        from pydedup.http.options import ServeOptions as Chosen
    except ModuleNotFoundError as error:
        raise UnsupportedFormatError(not_installed("serving", error, "serve")) from None
    # ``limits`` are what a server here and replicas on a cluster call as the options are called.
    limits["max_body"] = config.parse_bytes(max_body)
    limits["max_answer"] = config.parse_bytes(max_answer)
    chosen = Chosen(
        host=host,
        port=port,
        threads=Chosen().threads if threads is None else threads,
        token=read_token(token_file, os.environ, TOKEN_VARIABLE),
        tls_cert=tls_cert,
        tls_key=tls_key,
        **limits,
    )
    token = _in_shell(chosen, token_file)
    if on is None:
        _serve_here(url, memory, replacement, chosen, record, token)
    else:
        pool = {"memory": memory, "replacement": replacement}
        _serve_on(on, url, chosen, replicas, token, threads=threads, **pool, **limits)
    return Exit.OK


def _serve_here(
    url: str,
    memory: str,
    replacement: Replacement,
    chosen: ServeOptions,
    record: Path | None,
    token: str,
) -> None:
    """Serve in this process; ends it where a request may never end. ``token`` is for `curl`."""
    from pydedup.http.served import NO_GRAPH, ServedStore
    from pydedup.http.server import serve as run

    with contextlib.ExitStack() as opened:
        with Watch("opening the store"):
            store = opened.enter_context(ServedStore.connect(url, memory, replacement))
        entries = store.index()
        names = [entry.name for entry in entries if not entry.hindrance]
        others = (entry for entry in entries if entry.hindrance not in ("", NO_GRAPH))
        why = next((f"{one.name}@{one.version}: {one.hindrance}" for one in others), "")

        def started(address: str) -> None:
            _say_hello(address, store.url, names, why, token=token)

        _warn_if_open(chosen.host, chosen.token)
        if record is not None:
            _check_record(record)
            store.record()
        left = run(store, chosen, started)
        if record is not None:
            store.recorded().save(record)
        if left:
            warn(f"stopped, and cut off {text.plural(left, 'request')} under way")
            sys.stdout.flush()
            # A thread may wait for the database for ever, and Python would wait for the thread.
            os._exit(Exit.INTERRUPTED)


class _OnlyTriedError(Exception):
    """Nothing is to be written yet."""


def _check_record(path: Path) -> None:
    """Say now, and not at the end, that the record cannot be written."""
    from pydedup.formats._files import atomic_file

    with contextlib.suppress(_OnlyTriedError), atomic_file(path):
        raise _OnlyTriedError  # so that what is there stays


def _serve_on(
    on: str, url: str, chosen: ServeOptions, replicas: str | None, token: str, **options: Any
) -> None:
    """Serve on a cluster; ``options`` are those of each replica, ``token`` is for `curl`."""
    from pydedup.ray.serving.running import parse_replicas, run

    http: dict[str, object] = {"host": chosen.host, "port": chosen.port}
    if chosen.tls_cert is not None:
        http |= {"ssl_certfile": str(chosen.tls_cert), "ssl_keyfile": str(chosen.tls_key)}

    def started(address: str, names: list[str]) -> None:
        place = f"{redact(url)} on Ray"
        _say_hello(address, place, names, token=token)
        # Where Ray Serve ran before, it listens where it was told to then.
        _warn_if_open(urlsplit(address).hostname or chosen.host, chosen.token)

    run(
        url,
        on,
        http,
        started,
        token=None if chosen.token is None else chosen.token.decode(),
        **({} if replicas is None else parse_replicas(replicas)),
        **options,
    )


def _warn_if_open(host: str, token: bytes | None) -> None:
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, of which this one alone is for certain
        is_loopback = host == "localhost"
    if token is None and not is_loopback:
        warn(f"anybody who can reach {host} may use this server; {TOKEN_VARIABLE} sets a token")


def _in_shell(chosen: ServeOptions, token_file: Path | None) -> str:
    """Return how a shell says the token without showing it; empty where none is needed."""
    if chosen.token is None:
        return ""
    return f"${TOKEN_VARIABLE}" if token_file is None else f"$(cat {shlex.quote(str(token_file))})"


def _say_hello(address: str, store: str, names: list[str], why: str = "", *, token: str) -> None:
    """Say what is served, and where; ``why`` is for when nothing is, though layers are known."""
    if sys.__stdout__ is None:
        return  # closed, as where a server is started in the background: it serves all the same
    models = text.models(len(set(names)), len(names))
    output.print_line(f"pydedup serves {models} of {store}")
    output.print_line(f"on {address}, by the Open Inference Protocol v2; Ctrl-C stops it. Try:")
    bearer = f' -H "Authorization: Bearer {token}"' if token else ""
    path = f"/v2/models/{quote(names[0], safe='')}" if names else "/v2"
    insecure = " -k" if address.startswith("https") else ""
    output.print_line(f"  curl{insecure}{bearer} {address}{path}")
    if not names:
        output.print_line(
            f"No model there can predict; {output.printable(why)}"
            if why
            else "No model there says what its layers are: add one from ONNX, Keras or "
            "nn.Sequential, or with graph=; it is served as soon as it is there"
        )
    sys.stdout.flush()
