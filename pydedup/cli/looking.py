# SPDX-License-Identifier: Apache-2.0
"""``pydedup ls``, ``info``, ``stats``, ``kernels``: what there is, in numbers."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from pydedup import text
from pydedup.certificates import describe
from pydedup.cli import completing, options, output
from pydedup.cli.tables import Column, print_table
from pydedup.cli.tenants import print_usage
from pydedup.names import parse_address
from pydedup.types import ModelInfo, TensorInfo

if TYPE_CHECKING:
    from pydedup.report.figures import ModelFigures, StoreStats
    from pydedup.report.sizes import ModelSize

__all__ = ["info", "kernels", "ls", "stats", "tensor_document", "used_field"]

_MODEL_COLUMNS = (
    Column("Model", number=False, name=True, style="cyan"),
    Column("Aliases", number=False, rank=1),
    Column("Size"),
    Column("Takes"),
    Column("Saved", style="green"),
    Column("Pages", rank=4),
    Column("Policy", number=False, rank=3),
    Column("Added", number=False, rank=2),
)

_TENSOR_COLUMNS = (
    Column("Tensor", number=False, name=True, style="cyan"),
    Column("Dtype", number=False),
    Column("Shape"),
    Column("Size", rank=1),
    Column("Blocks of", rank=2),
)

_KERNEL_COLUMNS = (
    Column("Kernel", number=False, style="cyan"),
    Column("Built", number=False),
    Column("Runs here", number=False),
    Column("Note", number=False, rank=1),
)


@click.command(short_help="List models, versions, aliases and sizes.")
@options.store_argument
@click.argument("name", metavar="[NAME]", required=False, shell_complete=completing.complete_models)
@options.json_option
def ls(url: str, name: str | None, as_json: bool) -> None:
    """List models, their versions, aliases and sizes.

    With NAME, the versions of one model; with NAME@VERSION or NAME@ALIAS, that version.

    "Takes" divides each page among the models that read it, by how much of it they use, so it adds
    up to the size of all pages; "Saved" is how much less that is than the size of the weights.
    """
    with options.read_store(url) as store:
        figures, sizes = store.stats(), store.sizes()
        if name is not None:
            sizes = [size for size in sizes if _is_meant(size.info, name)]
            if not sizes:
                options.meant_by(store, name)  # or says why there is none
    if as_json:
        models = [_size_document(size) for size in sizes]
        output.emit_json({"url": figures.url, "models": models, "store": _totals(figures)})
    elif sizes:
        print_table(_MODEL_COLUMNS, [_model_row(size) for size in sizes])
        if name is None:
            output.print_note(_summary(figures), "dim")
    elif not figures.damaged:
        output.print_note("no models yet; `pydedup add` puts them in", "dim")
    output.refuse_damaged(figures.url, figures.damaged)


@click.command(short_help="Show one model: sizes, pages, guarantee, metadata.")
@options.store_argument
@options.model_argument
@click.option("--tensors", is_flag=True, help="List its tensors as well.")
@options.json_option
def info(url: str, name: str, tensors: bool, as_json: bool) -> None:
    """Show one model: sizes, what reading it costs, its guarantee, aliases and metadata.

    Read amplification is the number of pages that the model reads, divided by the fewest that could
    hold its blocks; `pydedup vacuum` lowers it.
    """
    with options.read_store(url) as store:
        figures = store.info(name)
    if as_json:
        output.emit_json(_figures_document(figures, tensors))
        return
    output.print_heading(figures.info.address)
    output.print_fields(_figure_fields(figures))
    if tensors:
        output.print_line()
        print_table(_TENSOR_COLUMNS, [_tensor_row(tensor) for tensor in figures.tensors])


@click.command(short_help="Show the store in numbers.")
@options.store_argument
@click.option(
    "--by",
    metavar="KEY",
    help="Show bytes for each value of a key of metadata instead, such as tenant.",
)
@options.json_option
def stats(url: str, by: str | None, as_json: bool) -> None:
    """Show the store in numbers: what is in it, and how much of its database it occupies.

    In SQLite that is the file, including tables of your own in it.

    With --by KEY, show for the models of each value: the size of their weights; "Shared", stored
    blocks that models of other values use too; and "Marginal", blocks that only they use, which is
    what removing them would free.
    """
    with options.read_store(url) as store:
        if by is not None:
            print_usage(store, by, as_json)
            return
        figures = store.stats()
    if as_json:
        output.emit_json({"url": figures.url, **_totals(figures)})
        output.refuse_damaged(figures.url, figures.damaged)
        return
    output.print_heading(figures.url)
    retired = f", and {text.count(figures.retired_pages)} not live" if figures.retired_pages else ""
    exact = figures.stored_bytes_exact
    output.print_fields(
        [
            (
                "models",
                f"{text.count(figures.models)} in {text.plural(figures.versions, 'version')}, "
                f"{text.plural(figures.tensors, 'tensor')}",
            ),
            ("weights", text.size(figures.logical_bytes)),
            ("database", _database(figures) + ("" if exact else _why_at_least(figures.url))),
            ("saved", _saved(figures)),
            ("pages", f"{text.count(figures.pages)} ({text.size(figures.page_bytes)}){retired}"),
            ("distinct blocks", text.count(figures.distinct_blocks)),
            ("schema", f"version {figures.schema_version}"),
        ]
    )
    output.refuse_damaged(figures.url, figures.damaged)


@click.command(short_help="Show which native kernels there are, and which is used.")
@options.json_option
def kernels(as_json: bool) -> None:
    """Show which native kernels this build has, which one is used, and why."""
    from pydedup import config

    found = config.kernels()
    if as_json:
        output.emit_json(dataclasses.asdict(found))
        return
    print_table(
        _KERNEL_COLUMNS,
        [
            [kernel.name, _yes(kernel.built), _yes(kernel.runnable), kernel.note]
            for kernel in found.available
        ],
    )
    output.print_note(f"in use: {found.in_use} ({found.reason})", "bold")


def used_field(used_bytes: int, logical_bytes: int, *, has_files: bool) -> str:
    """Return what the blocks of a model take, and why that may be more than its weights."""
    files = ", large files beside it" if has_files else ""
    more = f", bases of deltas{files} and headers of blocks included"
    return text.size(used_bytes) + (more if used_bytes > logical_bytes else "")


def tensor_document(tensor: TensorInfo) -> dict[str, Any]:
    """Return a tensor's description as JSON has it."""
    return {
        "name": tensor.name,
        "dtype": tensor.dtype.label,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "block_shape": list(tensor.block_shape),
        "row_axes": tensor.row_axes,
    }


def _is_meant(model: ModelInfo, name: str) -> bool:
    """Whether a version is what NAME means: all of a model, or the one of a version or an alias."""
    address = parse_address(name)
    selected = address.selector is None or address.selector in (model.version, *model.aliases)
    return model.name == address.name and selected


def _model_row(size: ModelSize) -> list[str]:
    model = size.info
    return [
        model.address,
        ", ".join(model.aliases),
        text.size(model.logical_bytes),
        text.size(size.share_bytes),
        text.saved(size.saved_share) if model.logical_bytes else "-",
        text.count(size.pages),
        model.policy,
        text.moment(model.created_at),
    ]


def _summary(figures: StoreStats) -> str:
    what = text.models(figures.models, figures.versions)
    share = text.percent(figures.saved_share)
    most = "" if figures.stored_bytes_exact else "at most "
    saved = f", {most}{share} saved" if figures.saved_share > 0 else ""
    return (
        f"{what}: {text.size(figures.logical_bytes)} of weights in a database of "
        f"{_database(figures)}{saved}"
    )


def _why_at_least(url: str) -> str:
    """Say why the size of a database is not known."""
    if "+shards://" in url:
        return " (a shard does not answer)"
    return " (the server shows the size only to users with the privilege PROCESS)"


def _saved(figures: StoreStats) -> str:
    """Say what is saved; of a small store, why nothing is."""
    said, exact = text.saved(figures.saved_share), figures.stored_bytes_exact
    if figures.saved_share >= 0:
        return said if exact else f"at most {said}"
    # Shards may hold each page twice.
    if exact and figures.page_bytes < figures.logical_bytes and "+shards://" not in figures.url:
        beside = text.size(max(figures.stored_bytes - figures.page_bytes, 0))
        said += f" yet: beside its pages the database has {beside}"
    return said


def _database(figures: StoreStats) -> str:
    return text.size_at_least(figures.stored_bytes, figures.stored_bytes_exact)


def _figure_fields(figures: ModelFigures) -> list[tuple[str, str]]:
    model = figures.info
    logical = model.logical_bytes
    certified = describe(figures.certificate)
    fields = [
        ("size", f"{text.size(logical)} in {text.plural(len(figures.tensors), 'tensor')}"),
        (
            "its blocks take",
            used_field(figures.used_bytes, logical, has_files=figures.has_artifacts_in_blocks),
        ),
        ("of it on own pages", text.size(figures.exclusive_bytes)),
        (
            "read amplification",
            f"{text.ratio(figures.read_amplification)} ({text.count(figures.pages)} read / "
            f"{text.count(figures.least_pages)} least possible)",
        ),
        ("policy", f"{model.policy}: {certified[0]}"),
        *(("", line) for line in certified[1:]),
        ("predicts", _predicts(figures)),
        ("added", text.moment(model.created_at)),
        ("digest", model.digest),
    ]
    if model.aliases:
        fields.insert(0, ("aliases", ", ".join(model.aliases)))
    if figures.artifacts:
        fields.append(("artifacts", text.listed(figures.artifacts)))
    fields += [(f"metadata {key}", _shown(value)) for key, value in model.metadata.items()]
    return fields


def _predicts(figures: ModelFigures) -> str:
    if not figures.has_graph:
        return "no, its layers are not known"
    return "yes, by ONNX Runtime" if figures.by_onnx_runtime else "yes"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tensor_row(tensor: TensorInfo) -> list[str]:
    return [
        tensor.name,
        tensor.dtype.label,
        text.shape(tensor.shape),
        text.size(tensor.nbytes),
        text.shape(tensor.block_shape),
    ]


def _model_document(model: ModelInfo) -> dict[str, Any]:
    return {
        "model": model.address,
        "name": model.name,
        "version": model.version,
        "aliases": list(model.aliases),
        "policy": model.policy,
        "created_at": model.created_at,
        "logical_bytes": model.logical_bytes,
        "digest": model.digest,
        "metadata": dict(model.metadata),
    }


def _size_document(size: ModelSize) -> dict[str, Any]:
    return {
        **_model_document(size.info),
        "pages": size.pages,
        "page_bytes": size.page_bytes,
        "exclusive_bytes": size.exclusive_bytes,
        "share_bytes": size.share_bytes,
        "saved_share": size.saved_share,
    }


def _figures_document(figures: ModelFigures, tensors: bool) -> dict[str, Any]:
    document = {
        **_model_document(figures.info),
        "certificate": dict(figures.certificate),
        "artifacts": list(figures.artifacts),
        "has_graph": figures.has_graph,
        "by_onnx_runtime": figures.by_onnx_runtime,
        "n_tensors": len(figures.tensors),
        "used_bytes": figures.used_bytes,
        "exclusive_bytes": figures.exclusive_bytes,
        "pages": figures.pages,
        "least_pages": figures.least_pages,
        "read_amplification": figures.read_amplification,
    }
    if tensors:
        document["tensors"] = [tensor_document(tensor) for tensor in figures.tensors]
    return document


def _totals(figures: StoreStats) -> dict[str, Any]:
    """Return the numbers of a store; its pool is left out: it dies with this process."""
    return {
        "models": figures.models,
        "versions": figures.versions,
        "tensors": figures.tensors,
        "logical_bytes": figures.logical_bytes,
        "stored_bytes": figures.stored_bytes,
        "stored_bytes_exact": figures.stored_bytes_exact,
        "saved_share": figures.saved_share,
        "pages": figures.pages,
        "page_bytes": figures.page_bytes,
        "retired_pages": figures.retired_pages,
        "distinct_blocks": figures.distinct_blocks,
        "schema_version": figures.schema_version,
        "damaged": list(figures.damaged),
    }


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"
