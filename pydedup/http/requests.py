# SPDX-License-Identifier: Apache-2.0
"""Bodies of inference requests as arrays.

Every field is checked, and an error names it. Deliberately not here: whether a model takes these
inputs (`service`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydedup.http.datatypes import BINARY_ONLY, DATATYPES
from pydedup.http.numbers import PIECE_BYTES, Lists, flat_array, outline
from pydedup.http.problems import bad
from pydedup.serving.signature import TensorSpec

__all__ = [
    "InferRequest",
    "Wanted",
    "header_length",
    "parameters_of",
    "parse_infer",
    "parse_object",
    "raw_infer",
]

_LARGEST_RANK = 32
#: Elements of an input, empty axes counted as 1.
_LARGEST_SIZE = 2**40
_LONGEST_ID = 4096
#: Parameters that would change what an answer means, and which we do not have.
_UNSUPPORTED = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output that is asked for."""

    name: str
    binary: bool


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request, apart from its address.

    ``outputs`` is None for all of them; ``binary`` says then in which form.
    """

    id: str | None
    inputs: Mapping[str, NDArray[Any]]
    outputs: tuple[Wanted, ...] | None
    binary: bool

    @property
    def wants_json(self) -> bool:
        """Whether an output is to be written as JSON."""
        if self.outputs is None:
            return not self.binary
        return not all(one.binary for one in self.outputs)


def header_length(text: str | None, body_bytes: int) -> int | None:
    """Return what ``Inference-Header-Content-Length`` says, None where it is not given."""
    if text is None:
        return None
    name = "Inference-Header-Content-Length"
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise bad(name, f"{text[:40]!r} is no number of bytes")
    length = int(text)
    if length > body_bytes:
        raise bad(name, f"the JSON cannot have {length} bytes of a body of {body_bytes}")
    return length


def parse_object(body: bytes | bytearray) -> dict[str, Any]:
    """Return a body that is a JSON object; an empty one is an empty object."""
    if not body.strip():
        return {}
    if len(body) > PIECE_BYTES:
        raise bad("body", f"it has {len(body)} bytes; at most {PIECE_BYTES} are allowed here", 413)
    return _object(outline(body, len(body))[0], "body")


def parse_infer(body: bytes | bytearray, json_bytes: int | None) -> InferRequest:
    """Return the request of a body.

    Parameters
    ----------
    body
        JSON, followed by binary tensors; arrays of the result may lie in it.
    json_bytes
        Length of the JSON; None when there is nothing else.

    Raises
    ------
    HttpError
        400 with the field that is wrong.
    """
    document, lists = outline(body, len(body) if json_bytes is None else json_bytes)
    document = _object(document, "body")
    identity = document.get("id")
    if identity is not None and not _is_text(identity, _LONGEST_ID):
        raise bad("id", f"it must be text of at most {_LONGEST_ID} characters")
    parameters = parameters_of(document, "parameters")
    items = document.get("inputs")
    if not isinstance(items, list) or not items:
        raise bad("inputs", "a list of at least one input is needed")
    reader = _Inputs(body, json_bytes, lists)
    inputs: dict[str, NDArray[Any]] = {}
    for number, item in enumerate(items):
        where = f"inputs[{number}]"
        name, array = reader.read(_object(item, where), where)
        if name in inputs:
            raise bad(f"{where}.name", f"input {name[:100]!r} is given twice")
        inputs[name] = array
    reader.check_end()
    binary = _flag(parameters, "binary_data_output", "parameters", False)
    return InferRequest(identity, inputs, _outputs(document, binary), binary)


def raw_infer(body: bytes | bytearray, specs: Sequence[TensorSpec]) -> InferRequest:
    """Return the request of a body without JSON: the bytes of a model's one input.

    Its shape follows from their number, where one size at most may be any. So it is in Triton's
    extension for binary tensors, by which the answer is binary, too.

    Raises HttpError 400 where that does not tell which input it is, or the bytes are not as many as
    it takes.
    """
    if len(specs) != 1 or specs[0].shape.count(-1) > 1:
        takes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in specs)
        raise bad("body", f"without JSON it does not say which shapes it has; inputs are: {takes}")
    spec = specs[0]
    if spec.datatype not in DATATYPES:
        raise bad("body", f"without JSON it would be {spec.datatype}, which is not supported")
    dtype = DATATYPES[spec.datatype]
    row = math.prod(size for size in spec.shape if size >= 0) * dtype.itemsize
    count, rest = divmod(len(body), row) if row else (0, len(body))
    if rest or (-1 not in spec.shape and count != 1):
        shape = list(spec.shape)
        raise bad("body", f"its {len(body)} bytes are no {spec.datatype} of shape {shape}")
    item: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype}
    item["shape"] = [count if size < 0 else size for size in spec.shape]
    item["parameters"] = {"binary_data_size": len(body)}
    name, array = _Inputs(body, 0, []).read(item, "inputs[0]")
    return InferRequest(None, {name: array}, None, binary=True)


class _Inputs:
    """Reads one input after the other; binary ones lie behind the JSON in their order."""

    def __init__(self, body: bytes | bytearray, json_bytes: int | None, lists: Lists) -> None:
        self._body = body
        self._lists = lists
        self._binary = json_bytes is not None
        self._at = len(body) if json_bytes is None else json_bytes

    def read(self, item: dict[str, Any], where: str) -> tuple[str, NDArray[Any]]:
        """Return name and array of an input."""
        name = _text(item, "name", where)
        datatype = _text(item, "datatype", where)
        if datatype not in DATATYPES:
            known = ", ".join(DATATYPES)
            raise bad(f"{where}.datatype", f"{datatype[:40]!r} is not one of {known}")
        shape = _shape(item.get("shape"), f"{where}.shape")
        parameters = parameters_of(item, f"{where}.parameters")
        size = parameters.get("binary_data_size")
        if size is not None:
            if "data" in item:
                raise bad(where, "it has both data and parameters.binary_data_size")
            return name, self._read_binary(size, DATATYPES[datatype], shape, where)
        if "data" not in item:
            raise bad(f"{where}.data", "it is missing, and so is parameters.binary_data_size")
        if datatype in BINARY_ONLY:
            raise bad(f"{where}.data", f"{datatype} has no form in JSON; send it as binary data")
        if math.prod(shape) > len(self._body):
            raise bad(f"{where}.data", f"it has fewer numbers than shape {list(shape)} needs")
        dtype = DATATYPES[datatype]
        return name, flat_array(
            item["data"], self._body, self._lists, dtype, shape, f"{where}.data"
        )

    def _read_binary(
        self, size: Any, dtype: np.dtype[Any], shape: tuple[int, ...], where: str
    ) -> NDArray[Any]:
        field = f"{where}.parameters.binary_data_size"
        if type(size) is not int or size < 0:
            raise bad(field, "it must be a number of bytes")
        if not self._binary:
            raise bad(field, "binary data needs the header Inference-Header-Content-Length")
        needed = math.prod(shape) * dtype.itemsize
        if size != needed:
            raise bad(field, f"shape {list(shape)} needs {needed} bytes, not {size}")
        left = len(self._body) - self._at
        if size > left:
            raise bad(field, f"it is {size}, but only {left} bytes of binary data are left")
        if not size:
            return np.empty(shape, dtype)
        found = np.frombuffer(self._body, np.uint8, size, self._at)
        self._at += size
        if dtype.kind == "b" and found.max() > 1:
            raise bad(where, "bytes of BOOL must be 0 or 1")
        return found.view(dtype).reshape(shape)

    def check_end(self) -> None:
        """Refuse bytes that belong to no input."""
        left = len(self._body) - self._at
        if left:
            raise bad(
                "body",
                f"{left} bytes of binary data belong to no input; say how many each has with "
                "parameters.binary_data_size",
            )


def _outputs(document: dict[str, Any], binary: bool) -> tuple[Wanted, ...] | None:
    items = document.get("outputs")
    if items is None or items == []:
        return None
    if not isinstance(items, list):
        raise bad("outputs", "a list is needed")
    wanted: dict[str, Wanted] = {}
    for number, item in enumerate(items):
        where = f"outputs[{number}]"
        item = _object(item, where)
        name = _text(item, "name", where)
        if name in wanted:
            raise bad(f"{where}.name", f"output {name[:100]!r} is asked for twice")
        parameters = parameters_of(item, f"{where}.parameters")
        if parameters.get("classification"):
            raise bad(f"{where}.parameters.classification", "it is not supported")
        flag = _flag(parameters, "binary_data", f"{where}.parameters", binary)
        wanted[name] = Wanted(name, flag)
    return tuple(wanted.values())


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad(where, "a JSON object is needed")
    return value


def parameters_of(holder: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the ``parameters`` of a body, or of an object in it."""
    value = holder.get("parameters")
    found = {} if value is None else _object(value, where)
    for name in _UNSUPPORTED:
        if name in found:
            raise bad(f"{where}.{name}", "shared memory is not supported; send the data itself")
    return found


def _flag(parameters: dict[str, Any], name: str, where: str, otherwise: bool) -> bool:
    value = parameters.get(name)
    if value is None:
        return otherwise
    if not isinstance(value, bool):
        raise bad(f"{where}.{name}", "it must be true or false")
    return value


def _is_text(value: object, longest: int) -> bool:
    if not isinstance(value, str) or len(value) > longest:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _text(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if value is None:
        raise bad(f"{where}.{name}", "it is missing")
    if not isinstance(value, str):
        raise bad(f"{where}.{name}", "it must be text")
    return value


def _shape(value: Any, where: str) -> tuple[int, ...]:
    if value is None:
        raise bad(where, "it is missing")
    if not isinstance(value, list) or not all(type(size) is int for size in value):
        raise bad(where, "a list of whole numbers is needed")
    if len(value) > _LARGEST_RANK:
        raise bad(where, f"it has {len(value)} axes; at most {_LARGEST_RANK} are allowed")
    for size in value:
        if size < 0:
            raise bad(where, f"{size} is negative; a request gives the real sizes")
    if math.prod(max(size, 1) for size in value) > _LARGEST_SIZE:
        raise bad(where, f"{value} is too large")
    return tuple(value)
