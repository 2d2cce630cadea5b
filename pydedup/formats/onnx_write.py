# SPDX-License-Identifier: Apache-2.0
"""Writing ONNX models: the stored graph with its tensors put back.

Writing streams: everything except the tensors is known, hence every length. A model beyond
protobuf's 2 GiB gets its tensors in a file of external data beside it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from pydedup.errors import ArgumentError, UnsupportedFormatError
from pydedup.formats._files import write_array
from pydedup.formats._onnx_places import GRAPH_INITIALIZER, MODEL_GRAPH, RAW_DATA
from pydedup.formats._onnx_tensors import (
    DTYPES,
    EXTERNAL,
    PACKED,
    has_values,
    import_onnx,
    nested_tensors,
    parse,
    refuse_external,
    stored_as,
)
from pydedup.formats._protobuf import tag, varint
from pydedup.formats.base import Outgoing, TensorEntry, find_artifact
from pydedup.formats.onnx import GRAPH
from pydedup.formats.ties import copies

__all__ = ["write"]

#: protobuf messages end here; tests lower it.
_MAX_MESSAGE = (1 << 31) - 1
_EXTERNAL_ALIGNMENT = 4096
#: Smaller tensors stay inside the model: runtimes want shapes and axes there.
_EXTERNAL_FROM = 1024


def write(path: Path, outgoing: Outgoing, *, final_path: Path) -> list[str]:
    """Write the model with its tensors put back, streaming.

    Returns the names of tied tensors that were written once more, which those in a file of
    external data are not.

    ``path`` is where to write, ``final_path`` what it will be called: a file of external data,
    when one is needed, is named after that and written beside it first.
    """
    onnx = import_onnx()
    payload = find_artifact(outgoing.artifacts, GRAPH)
    if payload is None:
        raise UnsupportedFormatError(
            "an ONNX file needs the graph, which is kept for models that were added from ONNX; "
            "export to safetensors"
        )
    model = parse(onnx.ModelProto, payload, "the stored ONNX graph")
    refuse_external(model, "the stored ONNX graph")
    by_name = {entry.name: entry for entry in outgoing.entries}
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in by_name]
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in by_name]
    nested = {name: t for name, t in nested_tensors(model.graph) if not has_values(t)}
    _check_complete({**{t.name: t for t in initializers}, **nested}, kept, by_name)
    for name, tensor in nested.items():
        tensor.raw_data = outgoing.fetch(by_name[name]).tobytes()
    sizes = {tensor.name: by_name[tensor.name].nbytes for tensor in initializers}
    data_path: Path | None = None
    outside: set[str] = set()
    try:
        if model.ByteSize() + sum(sizes.values()) + 32 * len(sizes) > _MAX_MESSAGE:
            data_path = _external_path(final_path)
            large = [tensor for tensor in initializers if sizes[tensor.name] >= _EXTERNAL_FROM]
            _write_external(data_path, outgoing, by_name, large)
            sizes = {name: size for name, size in sizes.items() if size < _EXTERNAL_FROM}
            outside = {tensor.name for tensor in large}
        _write_model(path, outgoing, by_name, model, kept, initializers, sizes)
    except BaseException:
        if data_path is not None:
            data_path.unlink(missing_ok=True)
        raise
    return copies(entry for entry in outgoing.entries if entry.name not in outside)


def _write_model(
    path: Path,
    outgoing: Outgoing,
    by_name: dict[str, TensorEntry],
    model: Any,
    kept: Sequence[Any],
    initializers: Sequence[Any],
    sizes: dict[str, int],
) -> None:
    """Write the message; ``sizes`` names the tensors whose bytes go inside."""
    heads = {tensor.name: _initializer_head(tensor, sizes) for tensor in initializers}
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    bodies = [len(heads[name]) + sizes.get(name, 0) for name in heads]
    framed = [len(tag(GRAPH_INITIALIZER)) + len(varint(n)) + n for n in bodies]
    with path.open("wb") as file:
        file.write(model.SerializeToString())
        file.write(tag(MODEL_GRAPH) + varint(len(graph) + sum(framed)))
        file.write(graph)
        for (name, head), body in zip(heads.items(), bodies, strict=True):
            file.write(tag(GRAPH_INITIALIZER) + varint(body) + head)
            if name in sizes:
                write_array(file, outgoing.fetch(by_name[name]))


def _initializer_head(tensor: Any, sizes: dict[str, int]) -> bytes:
    head: bytes = tensor.SerializeToString()
    if tensor.name in sizes:
        head += tag(RAW_DATA) + varint(sizes[tensor.name])
    return head


def _check_complete(
    wanted: dict[str, Any], kept: Sequence[Any], by_name: dict[str, TensorEntry]
) -> None:
    """Check that the tensors are exactly those that the graph wants."""
    for name, tensor in wanted.items():
        entry = by_name.get(name)
        if entry is None:
            continue
        if stored_as(tensor) != (entry.dtype, entry.shape):
            raise ArgumentError(
                f"tensor {entry.name!r} is {entry.dtype.label} {entry.shape}, which the stored "
                "ONNX graph does not expect; export without converting"
            )
    # A model that was stored by an older pydedup has packed values within its graph.
    missing = [
        tensor.name
        for tensor in kept
        if tensor.data_type in DTYPES or (tensor.data_type in PACKED and not has_values(tensor))
    ]
    wrong = sorted({*missing, *(set(wanted) ^ set(by_name))})
    if wrong:
        name = wrong[0]
        raise ArgumentError(f"tensors and the stored ONNX graph do not belong together: {name!r}")


def _external_path(final_path: Path) -> Path:
    path = final_path.with_name(final_path.name + ".data")
    if path.exists():
        # The model that is there now may use it until it is replaced.
        path = final_path.with_name(f"{final_path.name}.{secrets.token_hex(4)}.data")
    return path


def _write_external(
    path: Path, outgoing: Outgoing, by_name: dict[str, TensorEntry], large: Sequence[Any]
) -> None:
    places: dict[Hashable, int] = {}
    with path.open("xb") as file:
        for tensor in large:
            entry = by_name[tensor.name]
            if entry.key not in places:  # tied tensors have one place
                file.write(bytes(-file.tell() % _EXTERNAL_ALIGNMENT))
                places[entry.key] = file.tell()
                write_array(file, outgoing.fetch(entry))
            _place_external(tensor, path.name, places[entry.key], entry.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _place_external(tensor: Any, location: str, offset: int, n_bytes: int) -> None:
    tensor.data_location = EXTERNAL
    place = {"location": location, "offset": str(offset), "length": str(n_bytes)}
    for key, value in place.items():
        item = tensor.external_data.add()
        item.key, item.value = key, value
