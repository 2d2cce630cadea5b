# SPDX-License-Identifier: Apache-2.0
"""Answers as bytes: JSON, or JSON followed by binary tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from pydedup.http.datatypes import BINARY_ONLY, TEXT, binary_texts, named
from pydedup.http.numbers import json_numbers
from pydedup.http.problems import HttpError, bad
from pydedup.http.requests import InferRequest, Wanted

__all__ = ["Reply", "error_reply", "infer_reply", "is_long", "json_reply", "wanted_outputs"]

_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
#: Numbers that are written as JSON within the event loop.
_SHORT_NUMBERS = 4096


@dataclass(slots=True)
class Reply:
    """A status, headers, and a body in parts."""

    status: int
    headers: list[tuple[bytes, bytes]]
    parts: list[bytes | memoryview]

    @property
    def nbytes(self) -> int:
        """Length of the body."""
        return sum(len(part) for part in self.parts)


def json_reply(value: Any, status: int = 200) -> Reply:
    """Return a document."""
    return Reply(status, [_JSON], [orjson.dumps(value)])


def error_reply(error: HttpError) -> Reply:
    """Return what is said of an error."""
    reply = json_reply({"error": error.message}, error.status)
    reply.headers += error.headers
    return reply


def wanted_outputs(request: InferRequest, names: Iterable[str]) -> tuple[Wanted, ...]:
    """Return the outputs to answer with. Raises HttpError 400 for one that there is not."""
    known = tuple(names)
    if request.outputs is None:
        return tuple(Wanted(name, request.binary) for name in known)
    for number, wanted in enumerate(request.outputs):
        if wanted.name not in known:
            raise bad(
                f"outputs[{number}].name",
                f"there is no output {wanted.name[:100]!r}; there is: {', '.join(known)}",
            )
    return request.outputs


def is_long(outputs: Mapping[str, NDArray[Any]], wanted: Iterable[Wanted]) -> bool:
    """Whether an answer takes so long to write that the event loop must not do it."""
    return sum(outputs[one.name].size for one in wanted if not one.binary) > _SHORT_NUMBERS


def infer_reply(
    name: str,
    version: str,
    request: InferRequest,
    wanted: Iterable[Wanted],
    outputs: Mapping[str, NDArray[Any]],
) -> Reply:
    """Return the answer to an inference request."""
    head: dict[str, Any] = {"model_name": name, "model_version": version}
    if request.id is not None:
        head["id"] = request.id
    parts: list[bytes] = [orjson.dumps(head)[:-1], b',"outputs":[']
    binary: list[memoryview] = []
    for number, one in enumerate(wanted):
        datatype, array = named(outputs[one.name])
        entry: dict[str, Any] = {"name": one.name, "datatype": datatype, "shape": array.shape}
        if number:
            parts.append(b",")
        if one.binary:
            payload = _binary(datatype, array)
            entry["parameters"] = {"binary_data_size": payload.nbytes}
            parts.append(orjson.dumps(entry))
            binary.append(payload)
            continue
        if datatype in BINARY_ONLY:
            raise bad("outputs", f"{datatype} has no form in JSON; ask for binary data")
        parts += [orjson.dumps(entry)[:-1], b',"data":[', *_json_values(datatype, array), b"]}"]
    parts.append(b"]}")
    document = b"".join(parts)
    if not binary:
        return Reply(200, [_JSON], [document])
    length = (b"inference-header-content-length", b"%d" % len(document))
    return Reply(200, [_BINARY, length], [document, *binary])


def _binary(datatype: str, array: NDArray[Any]) -> memoryview:
    if datatype == TEXT:
        return memoryview(binary_texts(array))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _json_values(datatype: str, array: NDArray[Any]) -> Iterable[bytes]:
    """Yield what is between the brackets of an array in JSON."""
    if datatype == TEXT:
        return (orjson.dumps(array.reshape(-1).tolist())[1:-1],)
    return json_numbers(array)
