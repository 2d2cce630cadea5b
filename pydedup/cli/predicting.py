# SPDX-License-Identifier: Apache-2.0
"""``pydedup predict``: answers from a stored model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from pydedup import text
from pydedup.cli import completing, options, output
from pydedup.cli.progress import Watch
from pydedup.errors import ArgumentError, FormatError
from pydedup.types import DType

__all__ = ["predict"]

Array = NDArray[Any]


@click.command(short_help="Predict with a model whose layers the store knows.")
@options.store_argument
@options.model_argument
@click.argument(
    "inputs",
    metavar="[INPUT=]FILE...",
    nargs=-1,
    required=True,
    shell_complete=completing.complete_files,
)
@click.option(
    "-o",
    "--output",
    "target",
    metavar="PATH",
    shell_complete=completing.complete_files,
    help="Write the result to a .npy, .npz or .json file instead of printing it.",
)
@options.memory_option
@options.json_option
@options.quiet_option
def predict(
    url: str,
    name: str,
    inputs: tuple[str, ...],
    target: str | None,
    memory: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Predict with a model whose layers the store knows, streaming its weights from its pages.

    FILE is .npy, .npz or .json (nested lists, or an object with one for each input), or '-' for any
    of these on standard input. Several inputs are given as INPUT=FILE each. In JSON, numbers with a
    decimal point become f32, others i64; null is NaN.
    """
    suffix = None if target is None else Path(target).suffix.lower()
    if suffix not in (None, ".npy", ".npz", ".json"):
        raise click.UsageError(f"{target!r} must end in .npy, .npz or .json")
    given = _read_inputs(inputs)
    with options.read_store(url, memory) as store, Watch("predicting", quiet=quiet):
        address = store.info(name).info.address  # an alias may move, and --json says which it was
        found = store.predict(address, given)
        graph = store.graph(address)
    outputs: dict[str, Array] = (
        {str(key): np.asarray(value) for key, value in found.items()}
        if isinstance(found, Mapping)
        else {"output" if graph is None else graph.outputs[0]: np.asarray(found)}
    )
    if target is not None:
        _write(Path(target), outputs)
    if as_json:
        if target is None:
            output.emit_json({"model": address, "outputs": _document(outputs)})
        else:
            output.emit_json({"model": address, "path": target, "outputs": _shapes(outputs)})
    elif target is not None:
        output.print_note(f"wrote {', '.join(outputs)} to {target}")
    else:
        for key, array in outputs.items():
            output.print_heading(f"{key}: {_label(array)} {text.shape(array.shape)}")
            output.print_line(output.array_text(array))


def _read_inputs(items: Sequence[str]) -> Array | dict[str, Array]:
    """Return one array, or arrays by input name."""
    if len(items) == 1 and _named(items[0]) is None:
        return _read(items[0])
    values: dict[str, Array] = {}
    for item in items:
        named = _named(item)
        if named is None:
            raise click.UsageError(f"several inputs need names: write INPUT={item}")
        key, path = named
        if key in values:
            raise click.UsageError(f"input {key!r} is given twice")
        value = _read(path)
        if isinstance(value, dict):
            raise click.UsageError(f"{path!r} holds several arrays; {key!r} takes one")
        values[key] = value
    return values


def _named(item: str) -> tuple[str, str] | None:
    """Split ``INPUT=FILE``; a file whose own name has a '=' is a file."""
    key, equals, path = item.partition("=")
    return (key, path) if equals and key and path and not os.path.lexists(item) else None


def _read(path: str) -> Array | dict[str, Array]:
    if path == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError("'-' reads standard input: send a file or a program's output")
        return _parse(sys.stdin.buffer.read(), "standard input")
    try:
        if Path(path).is_dir():
            raise FormatError(f"{path} is a folder; give a .npy, .npz or .json file")
        payload = Path(path).read_bytes()
    except OSError as error:
        if path.lstrip().startswith(("[", "{")):  # the numbers themselves
            raise click.UsageError(
                f"inputs come from files: {path[:40]!r} is none; give '-' and send it to standard "
                "input, or write it to a .json file"
            ) from None
        if isinstance(error, FileNotFoundError):
            raise
        raise FormatError(f"{path!r:.200} cannot be read: {error.strerror}") from error
    return _parse(payload, path)


def _parse(payload: bytes, where: str) -> Array | dict[str, Array]:
    """Tell .npy, .npz and JSON apart by their first bytes, and read them without unpickling."""
    if payload[:6] == b"\x93NUMPY" or payload[:2] == b"PK":
        try:
            loaded = np.load(io.BytesIO(payload), allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            return {key: loaded[key] for key in loaded.files}
        except Exception as error:  # zipfile, zlib and numpy raise what they like at bad bytes
            raise FormatError(f"{where} is a damaged .npy or .npz file: {error}") from error
    try:
        value = json.loads(payload)
    except UnicodeDecodeError as error:  # it names an encoding that nobody asked for
        raise FormatError(f"{where} is neither .npy, .npz nor JSON: it is no text") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is neither .npy, .npz nor JSON: {error}") from error
    if isinstance(value, dict):
        return {key: _array(item, f"{where}, {key!r}") for key, item in value.items()}
    return _array(value, where)


def _array(value: Any, where: str) -> Array:
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:  # in numpy's words, of "inhomogeneous shapes"
        raise ArgumentError(f"{where} is no array: its lists differ in length or depth") from error
    kinds = set(map(type, np.asarray(value, object).flat))
    if bool in kinds and len(kinds) > 1:  # numpy takes them for 0 and 1
        raise ArgumentError(f"{where} has true or false beside other values; make them all alike")
    if array.dtype == object and kinds <= {type(None), float, int}:
        with contextlib.suppress(OverflowError):  # an integer beyond all floats
            array = array.astype(np.float64)
    if array.dtype.kind not in "biuf":
        raise ArgumentError(f"{where} is no array of numbers")
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _write(path: Path, outputs: Mapping[str, Array]) -> None:
    """Write what was predicted, all of it or nothing."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix == "npy" and len(outputs) > 1:
        raise ArgumentError(
            f"a .npy file holds one array, there are: {', '.join(outputs)}; use .npz"
        )
    if suffix == "json":
        from pydedup.formats._files import atomic_file

        document = json.dumps(output.jsonable(_document(outputs))) + "\n"
        with atomic_file(path) as scratch:
            scratch.write_text(document, encoding="utf-8")
        return
    texts = [key for key, array in outputs.items() if _label(array) == "text"]
    if texts:
        raise ArgumentError(f"{texts[0]!r} is text, which .{suffix} files cannot hold; use .json")
    from pydedup.formats.base import TensorEntry
    from pydedup.formats.registry import write_model

    entries = [
        TensorEntry(key, DType.of(array.dtype), array.shape, key) for key, array in outputs.items()
    ]
    write_model(path, outputs, entries, format=suffix)


def _label(array: Array) -> str:
    """Return what the type of an array is called; that of names of classes is text."""
    return "text" if array.dtype.kind == "O" else DType.of(array.dtype).label


def _shapes(outputs: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    return {
        key: {"dtype": _label(array), "shape": list(array.shape)} for key, array in outputs.items()
    }


def _document(outputs: Mapping[str, Array]) -> dict[str, Any]:
    return {
        key: {**shape, "values": output.plain_array(outputs[key]).tolist()}
        for key, shape in _shapes(outputs).items()
    }
