# SPDX-License-Identifier: Apache-2.0
"""``pydedup load`` and ``export``: tensors and models out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from pydedup import Store, text
from pydedup.arguments import as_dtype
from pydedup.cli import completing, options, output
from pydedup.cli.looking import tensor_document
from pydedup.cli.progress import Watch
from pydedup.cli.tables import Column, print_table
from pydedup.errors import ArgumentError
from pydedup.formats.base import WRITABLE, TensorEntry
from pydedup.sets import in_parts
from pydedup.types import DType, TensorInfo
from pydedup.words import FileFormat

__all__ = ["export", "load"]

#: Elements of which extremes and mean are taken at a time: bounds what converting them costs.
_CHUNK = 1 << 20

_COLUMNS = (
    Column("Tensor", number=False, name=True, style="cyan"),
    Column("Dtype", number=False),
    Column("Shape"),
    Column("Size", rank=4),
    Column("Min", rank=1),
    Column("Mean", rank=3),
    Column("Max", rank=2),
)


def _only_one(
    context: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> str | None:
    """Refuse a second one, of which click would take the last without a word."""
    if len(given) > 1:
        raise click.BadParameter(
            f"{len(given)} are given; name one, or leave it out for all", context, option
        )
    return given[0] if given else None


@click.command(short_help="Read tensors: print them, or write .npz, .npy, .safetensors.")
@options.store_argument
@options.model_argument
@click.option(
    "-t",
    "--tensor",
    "tensor",
    metavar="TENSOR",
    multiple=True,
    callback=_only_one,
    shell_complete=completing.complete_tensors,
    help="Only this tensor.",
)
@click.option(
    "-o",
    "--output",
    "target",
    metavar="PATH",
    shell_complete=completing.complete_files,
    help="Write the tensors to a .npz or .safetensors file, or one tensor to .npy; '-' writes one "
    "tensor as .npy to standard output.",
)
@click.option(
    "--dtype", metavar="DTYPE", help="Convert floating-point tensors, e.g. to f32, f16 or bf16."
)
@options.memory_option
@options.json_option
@options.quiet_option
def load(
    url: str,
    name: str,
    tensor: str | None,
    target: str | None,
    dtype: str | None,
    memory: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read the tensors of a model.

    Without -o, print what they are and the range of their values, and with --tensor also the values
    themselves. One tensor at a time is held in memory.
    """
    wanted = None if dtype is None else DType.of_floats(dtype)
    _check_target(target, tensor, as_json)
    with options.read_store(url, memory) as store, Watch("reading", quiet=quiet) as watch:
        figures = store.info(name)
        # Pinned: the alias or the newest version may change while its tensors are read.
        address = figures.info.address
        infos = [info for info in figures.tensors if tensor in (None, info.name)]
        if not infos and tensor is not None:
            store.tensor(address, tensor)  # raises, and names those that are like it
        read = _Reader(store, address, infos, wanted, watch)
        if target == "-":
            array = read[infos[0].name]
        elif target is not None:
            _write(Path(target), read)
        else:
            values = read[infos[0].name] if tensor is not None else None
            rows = [_figures(info, read[info.name]) for info in infos]
    if target == "-":
        _write_to_stdout(array)
    elif target is not None:
        done = {"model": address, "path": target, "tensors": len(infos), "bytes": read.done}
        _say_written(done, as_json)
    elif as_json:
        document: dict[str, Any] = {"model": address, "tensors": rows}
        if values is not None:
            document["values"] = output.plain_array(values).tolist()
        output.emit_json(document)
    else:
        print_table(_COLUMNS, [_row(row) for row in rows])
        if values is not None:
            output.print_line(output.array_text(values))


@click.command(short_help="Write a model to a file or folder of any known format.")
@options.store_argument
@options.model_argument
@options.target_argument("PATH")
@click.option(
    "--format",
    "kind",
    type=click.Choice(WRITABLE),
    metavar="FORMAT",
    help=f"One of {', '.join(WRITABLE)}.  [default: by the suffix of PATH; none means a folder]",
)
@options.memory_option
@options.json_option
@options.quiet_option
def export(
    url: str, name: str, path: str, kind: FileFormat | None, memory: str, as_json: bool, quiet: bool
) -> None:
    """Write a model to a file or folder of any known format, tensor by tensor.

    What came with the model (config, tokenizer) goes along where the format has a place for it. A
    file that exists is replaced once the new one is complete; on failure nothing is left behind.
    """
    with options.read_store(url, memory) as store, Watch("reading", quiet=quiet) as watch:
        figures = store.info(name)
        copies = store.export(figures.info.address, path, format=kind, progress=watch)
    done = {
        "model": figures.info.address,
        "path": path,
        "tensors": len(figures.tensors),
        "bytes": figures.info.logical_bytes,
        "tied_copies": copies,
    }
    _say_written(done, as_json)
    if copies and not as_json:
        output.print_note(f"the format knows no ties: {text.listed(copies)} is written once more")


class _Reader:
    """Tensors by name, read when they are asked for."""

    def __init__(
        self,
        store: Store,
        address: str,
        infos: Sequence[TensorInfo],
        dtype: DType | None,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self._store, self._address, self._progress = store, address, progress
        self.entries = [
            TensorEntry(info.name, _stored_as(info.dtype, dtype), info.shape, info.name)
            for info in infos
        ]
        self._dtype = {entry.name: entry.dtype for entry in self.entries}
        self._total = sum(entry.nbytes for entry in self.entries)
        self.done = 0

    def __getitem__(self, name: str) -> NDArray[Any]:
        stored = self._store.tensor(self._address, name).numpy()
        array = as_dtype(stored, self._dtype[name].numpy)
        self.done += array.nbytes
        self._progress("reading", self.done, self._total)
        return array


def _stored_as(dtype: DType, wanted: DType | None) -> DType:
    return wanted if wanted is not None and dtype.is_float else dtype


def _check_target(target: str | None, tensor: str | None, as_json: bool) -> None:
    """Refuse what cannot be written before anything is read."""
    if target is None:
        return
    if target == "-":
        if tensor is None:
            raise click.UsageError("'-o -' writes one tensor: name it with --tensor")
        if as_json:
            raise click.UsageError("'-o -' writes bytes, and --json a document: name a file")
        if sys.stdout.isatty():
            raise click.UsageError("'-o -' writes bytes: send them to a file or a program")
        return
    suffix = Path(target).suffix.lower()
    if suffix not in (".npz", ".safetensors", ".npy"):
        raise click.UsageError(
            f"{target!r} must end in .npz, .safetensors or .npy; `pydedup export` writes others"
        )
    if suffix == ".npy" and tensor is None:
        raise click.UsageError("a .npy file holds one tensor: name it with --tensor, or use .npz")


def _write(path: Path, read: _Reader) -> None:
    from pydedup.formats.registry import write_model

    write_model(path, read, read.entries, format=path.suffix.lower().removeprefix("."))


def _write_to_stdout(array: NDArray[Any]) -> None:
    """Write an array as .npy, piece by piece."""
    if array.dtype.kind == "V":
        label = DType.of(array.dtype).label
        raise ArgumentError(
            f".npy files cannot name {label}: add --dtype f32, or write .safetensors"
        )
    # Not the stream itself: numpy would ask it for its position, which a pipe does not have.
    np.save(SimpleNamespace(write=sys.stdout.buffer.write), array, allow_pickle=False)


def _say_written(done: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.emit_json(done)
    else:
        what = f"{text.plural(done['tensors'], 'tensor')}, {text.size(done['bytes'])}"
        output.print_note(f"wrote {done['model']} to {done['path']}: {what}")


def _figures(info: TensorInfo, array: NDArray[Any]) -> dict[str, Any]:
    """Return a tensor's description with the extremes and the mean of its values."""
    flat = array.reshape(-1)
    low, high, total = math.inf, -math.inf, 0.0
    with np.errstate(all="ignore"):
        for part in in_parts(flat, _CHUNK):
            chunk = part.astype(np.float64)
            # np.minimum hands NaN on: a tensor that holds one says so.
            low = float(np.minimum(low, chunk.min()))
            high = float(np.maximum(high, chunk.max()))
            total += float(chunk.sum())
    described = tensor_document(info)
    described.update(dtype=DType.of(array.dtype).label, bytes=array.nbytes)
    empty = flat.size == 0
    described.update(
        min=None if empty else low,
        mean=None if empty else total / flat.size,
        max=None if empty else high,
    )
    return described


def _row(described: dict[str, Any]) -> list[str]:
    numbers = (described["min"], described["mean"], described["max"])
    low, mean, high = ("-" if number is None else f"{number:.4g}" for number in numbers)
    return [
        described["name"],
        described["dtype"],
        text.shape(described["shape"]),
        text.size(described["bytes"]),
        low,
        mean,
        high,
    ]
