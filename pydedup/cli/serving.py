# SPDX-License-Identifier: Apache-2.0
"""``pydedup serve``: predictions over HTTP."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import click

from pydedup import config, text
from pydedup.cli import options, output
from pydedup.cli.errors import Exit, warn
from pydedup.errors import UnsupportedFormatError
from pydedup.registry import redact
from pydedup.replacement import DEFAULT_POLICY, POLICIES, Trace

if TYPE_CHECKING:
    from pydedup.http.options import ServeOptions

__all__ = ["serve"]

TOKEN_VARIABLE = "PYDEDUP_TOKEN"
_LOOPBACK = ("127.", "::1", "localhost")
_PATH = options.FileToRead()


@click.command(short_help="Predict over HTTP, by the Open Inference Protocol v2.")
@options.store_argument
@click.option(
    "--host",
    metavar="HOST",
    default="127.0.0.1",
    show_default=True,
    help="Name or address to listen on; 0.0.0.0 is all of them.",
)
@click.option(
    "--port",
    metavar="N",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes any free port.",
)
@options.memory_option
@click.option(
    "--replacement",
    type=click.Choice(POLICIES),
    default=DEFAULT_POLICY,
    show_default=True,
    help="Which page goes when memory is full.",
)
@click.option(
    "--max-batch",
    metavar="ROWS",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Most rows that are predicted together.",
)
@click.option(
    "--max-wait-ms",
    metavar="MS",
    type=click.FloatRange(0, 60_000),
    default=2.0,
    show_default=True,
    help="How long a request waits for others while another is predicted and a thread is free.",
)
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(1, 256),
    help="Batches that are predicted at once.  [default: one per core, at most 4]",
)
@click.option(
    "--max-body",
    metavar="SIZE",
    default="64MiB",
    show_default=True,
    callback=options.check_size,
    help="Largest body of a request; all requests together may have four times as much.",
)
@click.option(
    "--max-answer",
    metavar="SIZE",
    default="64MiB",
    show_default=True,
    callback=options.check_size,
    help="What a request may take on top of --memory until it is answered; all requests together, "
    "four times as much.",
)
@click.option(
    "--max-queue",
    metavar="N",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Requests that may wait; others are told to try again.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(0.001),
    default=30.0,
    show_default=True,
    help="How long a request may take.",
)
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="How long requests under way may take after SIGTERM.",
)
@click.option(
    "--token-file",
    metavar="FILE",
    type=_PATH,
    help=f"File with the token that clients must send; else {TOKEN_VARIABLE}, if set.",
)
@click.option("--tls-cert", metavar="FILE", type=_PATH, help="Certificate with its chain, PEM.")
@click.option("--tls-key", metavar="FILE", type=_PATH, help="Its key, PEM, without a password.")
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
@click.option("--access-log", is_flag=True, help="Log requests to standard error, in JSON lines.")
@click.pass_context
def serve(
    context: click.Context,
    url: str,
    host: str,
    port: int,
    memory: str,
    replacement: str,
    max_batch: int,
    max_wait_ms: float,
    threads: int | None,
    max_body: str,
    max_answer: str,
    max_queue: int,
    timeout: float,
    grace: float,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    record: Path | None,
    on: str | None,
    replicas: str | None,
    access_log: bool,
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
    try:
        import pydedup.http.server  # noqa: F401 (what it lacks is told here)
        from pydedup.http.access import read_token
        from pydedup.http.options import ServeOptions as Chosen
    except ModuleNotFoundError as error:
        raise UnsupportedFormatError(
            f"serving needs the package {error.name!r}: pip install 'pydedup[serve]'"
        ) from None
    chosen = Chosen(
        host=host,
        port=port,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        threads=Chosen().threads if threads is None else threads,
        max_body=config.parse_bytes(max_body),
        max_answer=config.parse_bytes(max_answer),
        max_queue=max_queue,
        timeout=timeout,
        grace=grace,
        token=read_token(token_file, os.environ, TOKEN_VARIABLE),
        tls_cert=tls_cert,
        tls_key=tls_key,
        access_log=access_log,
    )
    if on is not None:
        _serve_on(on, url, memory, replacement, chosen, threads, replicas)
    else:
        _serve_here(url, memory, replacement, chosen, record)
    context.exit(Exit.OK)


def _serve_here(
    url: str,
    memory: str,
    replacement: str,
    chosen: ServeOptions,
    record: Path | None,
) -> None:
    """Serve in this process; ends it where a request may never end."""
    from pydedup.http.served import ServedStore
    from pydedup.http.server import serve as run

    with ServedStore.connect(url, memory, replacement) as store:
        names = [entry.name for entry in store.index() if entry.has_graph]

        def started(address: str) -> None:
            _say_hello(address, store.url, names, secured=chosen.token is not None)

        _warn_if_open(chosen.host, chosen.token)
        if record is not None:
            _check_record(record)
            store.record()
        left = run(store, chosen, started)
        if record is not None:
            _write_record(store.recorded(), record)
        if left:
            warn(f"stopped; {left} requests under way were cut off")
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


def _write_record(trace: Trace, path: Path) -> None:
    from pydedup.formats._files import atomic_file

    with atomic_file(path) as scratch:
        trace.save(scratch)


def _serve_on(
    on: str,
    url: str,
    memory: str,
    replacement: str,
    chosen: ServeOptions,
    threads: int | None,
    replicas: str | None,
) -> None:
    from pydedup.ray.serving.running import parse_replicas, run

    http: dict[str, object] = {"host": chosen.host, "port": chosen.port}
    if chosen.tls_cert is not None:
        http |= {"ssl_certfile": str(chosen.tls_cert), "ssl_keyfile": str(chosen.tls_key)}

    def started(address: str, names: list[str]) -> None:
        place = f"{redact(url)} on Ray"
        _say_hello(address, place, names, secured=chosen.token is not None)
        # Where Ray Serve ran before, it listens where it was told to then.
        _warn_if_open(urlsplit(address).hostname or chosen.host, chosen.token)

    run(
        url,
        on,
        http,
        started,
        **({} if replicas is None else parse_replicas(replicas)),
        memory=memory,
        replacement=replacement,
        token=None if chosen.token is None else chosen.token.decode(),
        max_batch=chosen.max_batch,
        max_wait_ms=chosen.max_wait_ms,
        threads=threads,
        max_body=chosen.max_body,
        max_answer=chosen.max_answer,
        max_queue=chosen.max_queue,
        timeout=chosen.timeout,
        grace=chosen.grace,
        access_log=chosen.access_log,
    )


def _warn_if_open(host: str, token: bytes | None) -> None:
    if token is None and not host.startswith(_LOOPBACK):
        warn(f"anybody who can reach {host} may use this server; {TOKEN_VARIABLE} sets a token")


def _say_hello(address: str, store: str, names: list[str], *, secured: bool) -> None:
    count = len(set(names))
    models = text.plural(count, "model")
    if len(names) != count:
        models += f" in {text.plural(len(names), 'version')}"
    output.print_line(f"pydedup serves {models} of {store}")
    output.print_line(f"on {address}, by the Open Inference Protocol v2; Ctrl-C stops it. Try:")
    token = f' -H "Authorization: Bearer ${TOKEN_VARIABLE}"' if secured else ""
    path = f"/v2/models/{quote(names[0], safe='')}" if names else "/v2"
    insecure = " -k" if address.startswith("https") else ""
    output.print_line(f"  curl{insecure}{token} {address}{path}")
    if not names:
        output.print_line(
            "No model there says what its layers are: add one from ONNX, Keras or nn.Sequential, "
            "or with graph=; it is served as soon as it is there"
        )
    sys.stdout.flush()
