# SPDX-License-Identifier: Apache-2.0
"""``pydedup explain`` and ``diff``: who shares what with whom, and what differs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from pydedup import text
from pydedup.cli import completing, options, output
from pydedup.cli.errors import Exit
from pydedup.cli.looking import used_field
from pydedup.cli.progress import Watch
from pydedup.cli.tables import Column, NameList, print_table

if TYPE_CHECKING:
    from pydedup.report.compare import Diff, Explanation, TensorDiff, TensorSharing

__all__ = ["diff", "explain"]

_SHARING_COLUMNS = (
    Column("Tensor", number=False, name=True, style="cyan"),
    Column("Blocks", rank=2),
    Column("Distinct", rank=3),
    Column("Shared"),
    Column("Deltas", rank=2),
    Column("Largest error", rank=2),
    Column("Takes"),
    Column("Shared with", number=False, name=True, rank=1),
)

_NEIGHBOUR_COLUMNS = (
    Column("Shares with", number=False, name=True, style="cyan"),
    Column("Blocks"),
    Column("Size"),
    Column("Of its bytes", rank=1),
)

_DIFF_COLUMNS = (
    Column("Tensor", number=False, name=True, style="cyan"),
    Column("Status", number=False),
    Column("Changed blocks", rank=2),
    Column("Largest change", rank=1),
    Column("Relative L2"),
)


@click.command(short_help="Say which blocks are shared with whom, and what removing frees.")
@options.store_argument
@options.model_argument
@options.memory_option
@options.json_option
@options.quiet_option
def explain(url: str, name: str, memory: str, as_json: bool, quiet: bool) -> None:
    """Say which tensors and blocks of a model are shared with whom, and what removing it frees.

    It frees the blocks that no other model uses. `pydedup vacuum` gives their space back, except
    for less than a quarter of a page that others still use.

    Sizes, and who shares with whom, include the blocks that deltas are based on. "Shared" and
    "Deltas" count the blocks of the tensor alone: a fine-tune may share none, all being deltas.
    """
    with options.read_store(url, memory) as store, Watch("looking at pages", quiet=quiet):
        explanation, shown = store.explain(name), store.url
    if as_json:
        output.emit_json(_explanation_document(explanation))
    else:
        _print_explanation(explanation)
    output.refuse_damaged(shown, explanation.damaged)


def _print_explanation(explanation: Explanation) -> None:
    used = explanation.used_bytes
    output.print_heading(explanation.model)
    output.print_fields(
        [
            ("size", text.size(explanation.logical_bytes)),
            (
                "its blocks take",
                used_field(used, explanation.logical_bytes, has_files=bool(explanation.artifacts)),
            ),
            ("shared with others", _part(explanation.shared_bytes, used)),
            ("removing it frees", _part(explanation.removal_frees_bytes, used)),
        ]
    )
    output.print_line()
    if explanation.shared_with:
        print_table(
            _NEIGHBOUR_COLUMNS,
            [
                [
                    other.model,
                    text.count(other.blocks),
                    text.size(other.bytes),
                    text.percent(other.bytes / used) if used else "-",
                ]
                for other in explanation.shared_with
            ],
            summed=True,
        )
        output.print_line()
    in_blocks = [*explanation.tensors, *explanation.artifacts]
    print_table(_SHARING_COLUMNS, [_sharing_row(one) for one in in_blocks])


@click.command(short_help="Compare two models, tensor by tensor.")
@options.store_argument
@click.argument("first", metavar="FIRST", shell_complete=completing.complete_models)
@click.argument("second", metavar="SECOND", shell_complete=completing.complete_models)
@click.option("--all", "show_all", is_flag=True, help="List identical tensors, too.")
@options.memory_option
@options.json_option
@options.quiet_option
def diff(
    url: str,
    first: str,
    second: str,
    show_all: bool,
    memory: str,
    as_json: bool,
    quiet: bool,
) -> int:
    """Compare two models, tensor by tensor. The exit status is 1 when they differ.

    A tensor is same (the same bits), changed, reshaped (another shape or dtype), added (only in
    SECOND) or removed (only in FIRST). Relative L2 is the length of the difference over the length
    of FIRST's tensor. What differs beside the weights, such as a tokenizer, is named.
    """
    with options.read_store(url, memory) as store, Watch("comparing", quiet=quiet) as watch:
        found = store.diff(first, second, progress=watch)
    if as_json:
        output.emit_json(_diff_document(found))
    else:
        _print_diff(found, show_all)
    return Exit.OK if found.same else Exit.DIFFERENT


def _print_diff(found: Diff, show_all: bool) -> None:
    listed = [tensor for tensor in found.tensors if show_all or tensor.status != "same"]
    if listed:
        print_table(_DIFF_COLUMNS, [_diff_row(tensor) for tensor in listed])
    counts = Counter(tensor.status for tensor in found.tensors)
    states = ("same", "changed", "reshaped", "added", "removed")
    summary = ", ".join(f"{counts[state]:,} {state}" for state in states if counts[state])
    verdict = "the same bits" if found.same else "they differ"
    output.print_note(
        f"{found.first} and {found.second}: {verdict} ({summary or 'no tensors'})",
        "green" if found.same else "yellow",
    )
    beside = [f"{one.name} ({one.status})" for one in found.artifacts if one.status != "same"]
    if beside:
        output.print_note(f"they differ beside the weights: {text.listed(beside)}", "yellow")


def _part(part: int, whole: int) -> str:
    return f"{text.size(part)} ({text.percent(part / whole)})" if whole else text.size(part)


def _sharing_row(sharing: TensorSharing) -> list[str]:
    distinct = sharing.distinct_blocks
    return [
        sharing.tensor.name,
        text.count(sharing.blocks),
        text.count(distinct),
        text.percent(sharing.shared_blocks / distinct) if distinct else "-",
        text.count(sharing.delta_blocks),
        f"{sharing.largest_error:.2g}" if sharing.largest_error else "0",
        text.size(sharing.used_bytes),
        NameList(sharing.shared_with, "model"),
    ]


def _diff_row(tensor: TensorDiff) -> list[str]:
    if tensor.status != "changed":
        return [tensor.name, tensor.status, "", "", ""]
    return [
        tensor.name,
        tensor.status,
        f"{text.count(tensor.changed_blocks)} of {text.count(tensor.blocks)}",
        f"{tensor.max_abs:.3g}",
        f"{tensor.relative_l2:.3g}",
    ]


def _explanation_document(explanation: Explanation) -> dict[str, Any]:
    return {
        "model": explanation.model,
        "logical_bytes": explanation.logical_bytes,
        "used_bytes": explanation.used_bytes,
        "shared_bytes": explanation.shared_bytes,
        "removal_frees_bytes": explanation.removal_frees_bytes,
        "shared_with": [dataclasses.asdict(other) for other in explanation.shared_with],
        "tensors": [_sharing_document(sharing) for sharing in explanation.tensors],
        "artifacts": [_sharing_document(sharing) for sharing in explanation.artifacts],
        "damaged": list(explanation.damaged),
    }


def _sharing_document(sharing: TensorSharing) -> dict[str, Any]:
    document = dataclasses.asdict(sharing)
    del document["tensor"]
    return {"name": sharing.tensor.name, **document}


def _diff_document(found: Diff) -> dict[str, Any]:
    return {
        "first": found.first,
        "second": found.second,
        "same": found.same,
        "tensors": [dataclasses.asdict(tensor) for tensor in found.tensors],
        "artifacts": [dataclasses.asdict(artifact) for artifact in found.artifacts],
    }
