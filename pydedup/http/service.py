# SPDX-License-Identifier: Apache-2.0
"""What the server asks of the store, and the checks of a request against its model.

Runs in threads. Deliberately not here: HTTP, JSON, and who waits for whom (`batcher`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.errors import UnavailableError
from pydedup.http.problems import bad
from pydedup.http.served import Admit, Arrays, Served, ServedStore
from pydedup.serving.signature import TensorSpec

__all__ = ["Answer", "model_config", "model_metadata", "rows_of", "run_batch"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a prediction gave, or why there is none, and by which version."""

    model: Served
    outputs: dict[str, NDArray[Any]] | Exception


def run_batch(
    store: ServedStore, requests: Sequence[tuple[str, Arrays, Admit]]
) -> Iterator[tuple[int, Answer | Exception]]:
    """Predict for several requests, each an address, inputs, and what admits it by its size.

    An address that occurs more than once is resolved once. Yields of each request, as soon as it is
    there, its number and its answer, or why there is no such model.
    """
    models: dict[str, Served | Exception] = {}
    away: UnavailableError | None = None
    asks: list[tuple[Served, Arrays, Admit]] = []
    numbers: list[int] = []
    for number, (address, inputs, admit) in enumerate(requests):
        if address not in models:
            try:
                if away is not None:  # waiting for the database once is enough
                    raise away
                models[address] = store.served(address)
            except UnavailableError as error:
                models[address] = away = error
            except Exception as error:
                models[address] = error
        model = models[address]
        if isinstance(model, Exception):
            yield number, model
            continue
        try:
            _check_inputs(model, inputs)
        except Exception as error:
            yield number, Answer(model, error)
            continue
        numbers.append(number)
        # The native kernels want aligned arrays; those in a body lie where they lie.
        aligned = {name: np.require(one, requirements=["C", "A"]) for name, one in inputs.items()}
        asks.append((model, aligned, admit))
    for place, outcome in store.predict_served(asks):
        yield numbers[place], Answer(asks[place][0], outcome)


def rows_of(inputs: Arrays) -> int:
    """Return how many rows a request counts for: the first axis of its first input."""
    first = next(iter(inputs.values()))
    return max(int(first.shape[0]), 1) if first.ndim else 1


def _check_inputs(model: Served, inputs: Arrays) -> None:
    """Raise HttpError 400 for inputs that a model does not take, naming the field."""
    specs = {spec.name: spec for spec in model.signature.inputs}
    takes = f"{model.address} takes: {', '.join(specs)}"
    for number, (name, array) in enumerate(inputs.items()):
        spec = specs.get(name)
        where = f"inputs[{number}]"
        if spec is None:
            raise bad(f"{where}.name", f"there is no input {name[:100]!r}; {takes}")
        if spec.ids and array.dtype.kind not in "iu":
            raise bad(f"{where}.datatype", f"{name!r} takes integers, such as INT64")
        counted = spec.features or (spec.flat and array.ndim == 2)
        if counted and array.shape[-1:] != spec.shape[-1:]:
            raise bad(
                f"{where}.shape",
                f"{list(array.shape)} does not fit: the last axis of {name!r} has "
                f"{spec.shape[-1]} entries",
            )
    missing = [name for name in specs if name not in inputs]
    if missing:
        raise bad("inputs", f"input {missing[0]!r} is missing; {takes}")


def model_metadata(store: ServedStore, address: str) -> dict[str, Any]:
    """Return what the protocol says of a model. Raises NotFoundError."""
    model = store.served(address)
    named = "@" in address
    return {
        "name": model.name,
        "versions": [model.version] if named else store.version_names(model.name),
        "platform": _platform(model),
        "inputs": [_entry(spec) for spec in model.signature.inputs],
        "outputs": [_entry(spec) for spec in model.signature.outputs],
    }


def model_config(store: ServedStore, address: str, max_batch: int) -> dict[str, Any]:
    """Return what Triton's clients ask for beside the metadata. Raises NotFoundError."""
    model = store.served(address)
    return {
        "name": model.name,
        "platform": _platform(model),
        "backend": "pydedup",
        "max_batch_size": 0,  # shapes are given whole, with their first axis
        "dynamic_batching": {"preferred_batch_size": [max_batch]},
        "input": [_config_entry(spec) for spec in model.signature.inputs],
        "output": [_config_entry(spec) for spec in model.signature.outputs],
    }


def _platform(model: Served) -> str:
    return "onnx_onnxv1" if model.graph is None else "pydedup_graph"


def _entry(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _config_entry(spec: TensorSpec) -> dict[str, Any]:
    kind = "STRING" if spec.datatype == "BYTES" else spec.datatype  # as Triton calls it here
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": list(spec.shape)}
