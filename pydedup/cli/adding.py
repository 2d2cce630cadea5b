# SPDX-License-Identifier: Apache-2.0
"""``pydedup add``: models in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import click

from pydedup import text
from pydedup.certificates import describe, guards_nothing, keeps_bits
from pydedup.cli import completing, options, output
from pydedup.cli.errors import warn
from pydedup.cli.progress import Watch
from pydedup.cli.tables import Column, print_table
from pydedup.errors import NotFoundError
from pydedup.names import parse_address
from pydedup.policies import Accuracy, Bounded, Exact, Lossless, Policy
from pydedup.types import AddReport

__all__ = ["add"]

_POLICIES = ("exact", "lossless", "bounded", "accuracy")

#: What is kept beside the weights is told from this on.
_MUCH_BESIDE = 1 << 20
_COLUMNS = (
    Column("Model", number=False, name=True, style="cyan"),
    Column("Size"),
    Column("New bytes"),
    Column("Saved", style="green"),
    Column("Blocks", rank=2),
    Column("Shared", rank=1),
    Column("Deltas", rank=2),
    Column("New pages", rank=3),
)


@click.command(short_help="Add models from files or folders.")
@options.store_argument
@click.argument(
    "pairs",
    metavar="NAME SOURCE [NAME SOURCE]...",
    nargs=-1,
    required=True,
    shell_complete=completing.complete_sources,
)
@click.option(
    "--policy",
    type=click.Choice(_POLICIES),
    default="lossless",
    show_default=True,
    help="exact: the same bits; identical blocks are shared, all others stored raw. lossless: the "
    "same bits; others become deltas on similar blocks, or are compressed. bounded: each block "
    "within --max-rel-error. accuracy: the metric of --evaluate falls by at most --max-drop.",
)
@click.option(
    "--max-rel-error",
    metavar="X",
    type=float,
    help="For bounded: how far a block may be from what is stored for it, as a share of its "
    "Euclidean norm.",
)
@click.option(
    "--evaluate",
    metavar="MODULE:FUNCTION",
    help="For accuracy: a Python function that maps tensors by name to a number, or to a score "
    "per validation example; higher is better.",
)
@click.option(
    "--max-drop",
    metavar="X",
    type=float,
    help="For accuracy: how far the metric may fall, in its own units.",
)
@click.option(
    "--confidence",
    metavar="P",
    type=float,
    help="For accuracy: the drop holds for data like the validation examples with this "
    "probability, such as 0.95.",
)
@click.option(
    "--metadata",
    metavar="KEY=VALUE|JSON",
    multiple=True,
    help="Kept with the models; may be repeated. VALUE stays text; a JSON object keeps its types.",
)
@click.option(
    "--block-shape",
    metavar="ROWSxCOLS",
    callback=lambda _context, _option, value: value and options.parse_block_shape(value),
    help="Shape of blocks, the unit of sharing.  [default: as the version before, else "
    "near-square, at most 16 KiB; whole rows of tables, as of words]",
)
@click.option(
    "--workers",
    metavar="N",
    type=int,
    help="Threads that work on it; the store is the same for any number.  [default: one per core "
    "up to 4]",
)
@click.option(
    "--weights-key",
    metavar="KEY",
    help="Of torch checkpoints with several sets of weights in them, in folders too, the key of "
    "those to add, such as params_ema.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be stored; write nothing.")
@options.memory_option
@options.json_option
@options.quiet_option
def add(
    url: str,
    pairs: tuple[str, ...],
    policy: str,
    max_rel_error: float | None,
    evaluate: str | None,
    max_drop: float | None,
    confidence: float | None,
    metadata: tuple[str, ...],
    block_shape: tuple[int, int] | None,
    workers: int | None,
    weights_key: str | None,
    dry_run: bool,
    memory: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Add models from files or folders, all of them or none.

    STORE is created if it does not exist. NAME may end in @VERSION; without it a model gets the
    next whole number as its version. SOURCE is a file of a known format (safetensors, torch, npz,
    npy, ONNX, Keras, word2vec, GloVe) or a Hugging Face folder. Several pairs get one joint layout.
    """
    from pydedup.formats.registry import open_source  # all formats, which no other command needs

    models = _named_sources(pairs)
    guarantee = parse_policy(policy, max_rel_error, evaluate, max_drop, confidence)
    kept = parse_metadata(metadata)
    opened = options.trial_store if dry_run else options.writable_store
    with contextlib.ExitStack() as stack:
        with Watch("reading", quiet=quiet):
            # Before the store is opened: what is no model, or part of one, creates none.
            sources = {
                name: stack.enter_context(open_source(path, weights_key))
                for name, path in models.items()
            }
        store = stack.enter_context(opened(url, memory))
        stack.enter_context(options.prints_apart())
        watch = stack.enter_context(Watch("reading", quiet=quiet))
        reports = store.add_many(
            sources,
            policy=guarantee,
            metadata=kept,
            block_shape=block_shape,
            dry_run=dry_run,
            progress=watch,
            workers=workers,
        )
    if reports[0].damaged_pages:
        pages = text.listed([str(page_id) for page_id in reports[0].damaged_pages])
        warn(
            f"{store.url} is damaged: nothing was shared with pages that cannot be read, so this "
            f"may take more space: {pages}; run verify on the store"
        )
    if as_json:
        output.emit_json(_document(reports, dry_run))
    else:
        _print(reports, dry_run, watch.seconds)


def parse_policy(
    name: str,
    max_rel_error: float | None,
    evaluate: str | None,
    max_drop: float | None,
    confidence: float | None,
) -> Policy:
    """Return the policy of that name, and refuse options that are not for it."""
    given = {
        "--max-rel-error": (max_rel_error, "bounded"),
        "--evaluate": (evaluate, "accuracy"),
        "--max-drop": (max_drop, "accuracy"),
        "--confidence": (confidence, "accuracy"),
    }
    for option, (value, owner) in given.items():
        if value is not None and owner != name:
            raise click.UsageError(f"{option} goes with --policy {owner}, not {name}")
    if name == "bounded":
        if max_rel_error is None:
            raise click.UsageError("--policy bounded needs --max-rel-error, such as 0.001")
        return Bounded(max_rel_error)
    if name == "accuracy":
        if evaluate is None or max_drop is None:
            raise click.UsageError("--policy accuracy needs --evaluate and --max-drop")
        return Accuracy(options.load_function(evaluate), max_drop, confidence=confidence)
    return Exact() if name == "exact" else Lossless()


def parse_metadata(items: Sequence[str]) -> dict[str, Any]:
    """Return what ``--metadata`` says, later items over earlier ones."""
    metadata: dict[str, Any] = {}
    for item in items:
        if item.lstrip().startswith("{"):
            try:
                metadata.update(json.loads(item))
            except ValueError as error:
                raise click.BadParameter(
                    f"--metadata {item!r} is no JSON object: {error}"
                ) from None
        else:
            key, equals, value = item.partition("=")
            if not equals or not key:
                raise click.BadParameter(
                    f"--metadata {item!r} is neither KEY=VALUE nor a JSON object"
                )
            metadata[key] = value
    return metadata


def _named_sources(pairs: Sequence[str]) -> dict[str, str]:
    if len(pairs) % 2:
        raise click.UsageError(
            f"models come as pairs NAME SOURCE; {text.plural(len(pairs), 'word')} is an odd number"
        )
    models: dict[str, str] = {}
    for name, source in zip(pairs[::2], pairs[1::2], strict=True):
        if name in models:
            raise click.UsageError(f"{name!r} is named twice; give each model its own name@version")
        # Before the store is opened: a mistyped name or path must not create one.
        parse_address(name)
        if options.is_missing(source):
            if os.path.lexists(name):
                raise click.UsageError(f"the name comes before the file: {source!r} {name!r}")
            if "://" in source:
                raise NotFoundError(f"{source!r} is a URL; download it, and give the file instead")
            raise NotFoundError(f"there is no file or folder {source!r} to add as {name!r}")
        models[name] = source
    return models


def _document(reports: Sequence[AddReport], dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "logical_bytes": sum(report.logical_bytes for report in reports),
        "stored_bytes": sum(report.stored_bytes for report in reports),
        "models": [dataclasses.asdict(report) for report in reports],
    }


def _print(reports: Sequence[AddReport], dry_run: bool, seconds: float) -> None:
    rows = [_row(report.model, [report]) for report in reports]
    if len(reports) > 1:
        rows.append(_row("together", reports))
    print_table(_COLUMNS, rows)
    for report in reports:
        if not report.logical_bytes:
            output.print_note(f"{report.model}: its source holds no weights", "yellow")
        if report.artifact_bytes >= _MUCH_BESIDE:
            size, new = text.size(report.artifact_bytes), text.size(report.stored_artifact_bytes)
            output.print_note(
                f"{report.model}: {size} beside its weights, such as a tokenizer, take {new} more",
                "dim",
            )
        if report.weights_key or report.left_out:
            said = []
            if report.weights_key:
                said.append(f"its weights are those under {report.weights_key!r}")
            if report.left_out:
                said.append(f"left out, not stored: {text.listed(report.left_out)}")
            output.print_note(f"{report.model}: {'; '.join(said)}", "yellow")
        if not keeps_bits(report.certificate["policy"], report.certificate):
            nothing = guards_nothing(report.certificate)
            for line in describe(report.certificate):
                style = "yellow" if line == nothing else "dim"
                output.print_note(f"{report.model}: {line}", style)
    if dry_run:
        output.print_note("dry run: nothing was written", "yellow")
    else:
        output.print_note(f"added in {text.duration(seconds)}", "dim")


def _row(title: str, reports: Sequence[AddReport]) -> list[str]:
    logical = sum(report.logical_bytes for report in reports)
    stored = sum(report.stored_bytes for report in reports)
    blocks = sum(report.blocks for report in reports)
    shared = sum(report.shared_blocks for report in reports)
    return [
        title,
        text.size(logical),
        text.size(stored),
        text.saved(1 - stored / logical) if logical else "-",
        text.count(blocks),
        text.count(shared),
        text.count(sum(report.delta_blocks for report in reports)),
        text.count(sum(report.pages for report in reports)),
    ]
