# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests: what is taken, and which field an error names."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydedup.http.datatypes import DATATYPES
from pydedup.http.numbers import PIECE_BYTES
from pydedup.http.problems import HttpError
from pydedup.http.requests import Wanted, header_length, parse_infer, parse_object

X = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}


def changed(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in {**X, **fields}.items() if value is not ...}


def parse(document: Any) -> Any:
    return parse_infer(json.dumps(document).encode(), None)


def binary(entries: list[tuple[dict[str, Any], bytes]], **more: Any) -> tuple[bytes, int]:
    head = json.dumps({"inputs": [entry for entry, _ in entries], **more}).encode()
    return head + b"".join(data for _, data in entries), len(head)


def entry_of(array: Any, datatype: str, name: str = "x") -> tuple[dict[str, Any], bytes]:
    size = {"binary_data_size": array.nbytes}
    entry = {"name": name, "datatype": datatype, "shape": list(array.shape), "parameters": size}
    return entry, array.tobytes()


@pytest.mark.parametrize("name", DATATYPES)
def test_binary_tensors_of_every_datatype(name: str) -> None:
    array = (np.arange(12).reshape(3, 4) % 2).astype(DATATYPES[name])
    body, length = binary([entry_of(array, name), entry_of(array[:1], name, "y")])
    for form in (body, bytearray(body)):
        inputs = parse_infer(form, length).inputs
        np.testing.assert_array_equal(inputs["x"], array)
        np.testing.assert_array_equal(inputs["y"], array[:1])
        assert inputs["x"].dtype == DATATYPES[name]


def test_bf16_is_what_ml_dtypes_has() -> None:
    body, length = binary([entry_of(np.ones(3, ml_dtypes.bfloat16), "BF16")])
    assert parse_infer(body, length).inputs["x"].dtype == ml_dtypes.bfloat16


def test_empty_and_scalar_tensors() -> None:
    assert parse({"inputs": [changed(shape=[0, 2], data=[])]}).inputs["x"].shape == (0, 2)
    assert parse({"inputs": [changed(shape=[], data=[5])]}).inputs["x"].shape == ()
    body, length = binary([entry_of(np.empty((0, 4), np.float32), "FP32")])
    assert parse_infer(body, length).inputs["x"].shape == (0, 4)


def test_outputs() -> None:
    asked = [{"name": "a"}, {"name": "b", "parameters": {"binary_data": True}}]
    found = parse({"inputs": [X], "outputs": asked})
    assert found.outputs == (Wanted("a", False), Wanted("b", True))
    found = parse({"inputs": [X], "outputs": asked[:1], "parameters": {"binary_data_output": True}})
    assert found.outputs == (Wanted("a", True),)
    assert parse({"inputs": [X]}).outputs is None


WRONG: list[tuple[str, Any]] = [
    ("body", []),
    ("body", 5),
    ("body", None),
    ("inputs", {}),
    ("inputs", {"inputs": []}),
    ("inputs", {"inputs": {"x": 1}}),
    ("id", {"id": 5, "inputs": [X]}),
    ("id", {"id": "a" * 5000, "inputs": [X]}),
    ("parameters", {"parameters": [], "inputs": [X]}),
    ("parameters.binary_data_output", {"parameters": {"binary_data_output": 1}, "inputs": [X]}),
    ("inputs[0]", {"inputs": [None]}),
    ("inputs[0].name", {"inputs": [changed(name=...)]}),
    ("inputs[0].name", {"inputs": [changed(name=5)]}),
    ("inputs[1].name", {"inputs": [X, X]}),
    ("inputs[0].datatype", {"inputs": [changed(datatype=...)]}),
    ("inputs[0].datatype", {"inputs": [changed(datatype="BYTES")]}),
    ("inputs[0].datatype", {"inputs": [changed(datatype="fp32")]}),
    ("inputs[0].shape", {"inputs": [changed(shape=...)]}),
    ("inputs[0].shape", {"inputs": [changed(shape=2)]}),
    ("inputs[0].shape", {"inputs": [changed(shape=[-1, 2])]}),
    ("inputs[0].shape", {"inputs": [changed(shape=[1.0, 2])]}),
    ("inputs[0].shape", {"inputs": [changed(shape=[True, 2])]}),
    ("inputs[0].shape", {"inputs": [changed(shape=["1", 2])]}),
    ("inputs[0].shape", {"inputs": [changed(shape=[2**63, 2**63])]}),
    ("inputs[0].shape", {"inputs": [changed(shape=[0, 2**62])]}),
    ("inputs[0].shape", {"inputs": [changed(shape=[1] * 40)]}),
    ("inputs[0].data", {"inputs": [changed(data=...)]}),
    ("inputs[0].data", {"inputs": [changed(data=None)]}),
    ("inputs[0].data", {"inputs": [changed(data="12")]}),
    ("inputs[0].data", {"inputs": [changed(data={"0": 1})]}),
    ("inputs[0].data", {"inputs": [changed(data=[1])]}),
    ("inputs[0].data", {"inputs": [changed(data=[1, 2, 3])]}),
    ("inputs[0].data", {"inputs": [changed(data=[[1], [2]])]}),
    ("inputs[0].data", {"inputs": [changed(data=[[[1, 2]]])]}),
    ("inputs[0].data", {"inputs": [changed(data=[1, "2"])]}),
    ("inputs[0].data", {"inputs": [changed(data=[1, True])]}),  # it was 1
    ("inputs[0].data", {"inputs": [changed(data=[1.5, False])]}),
    ("inputs[0].data", {"inputs": [changed(data=[True, True])]}),
    ("inputs[0].data", {"inputs": [changed(datatype="INT64", data=[5, False])]}),
    ("inputs[0].data", {"inputs": [changed(data=[None, True])]}),
    ("inputs[0].data", {"inputs": [changed(shape=[2**30], data=[1, 2])]}),
    ("inputs[0].data", {"inputs": [changed(datatype="BF16")]}),
    ("inputs[0].data", {"inputs": [changed(datatype="INT8", data=[1, 128])]}),
    ("inputs[0].data", {"inputs": [changed(datatype="UINT8", data=[-1, 1])]}),
    ("inputs[0].data", {"inputs": [changed(datatype="UINT64", data=[-1, 2**63])]}),
    ("inputs[0].data", {"inputs": [changed(datatype="BOOL", data=[2, 1])]}),
    ("inputs[0].data", {"inputs": [changed(datatype="INT64", data=[2.0**60, 1])]}),
    ("inputs[0].parameters", {"inputs": [changed(parameters=5)]}),
    ("inputs[0]", {"inputs": [changed(parameters={"binary_data_size": 8})]}),
    (
        "inputs[0].parameters.binary_data_size",
        {"inputs": [changed(data=..., parameters={"binary_data_size": 8})]},
    ),
    (
        "inputs[0].parameters.shared_memory_region",
        {"inputs": [changed(data=..., parameters={"shared_memory_region": "a"})]},
    ),
    ("outputs", {"inputs": [X], "outputs": {"name": "y"}}),
    ("outputs[0]", {"inputs": [X], "outputs": ["y"]}),
    ("outputs[0].name", {"inputs": [X], "outputs": [{}]}),
    ("outputs[1].name", {"inputs": [X], "outputs": [{"name": "y"}, {"name": "y"}]}),
    (
        "outputs[0].parameters.classification",
        {"inputs": [X], "outputs": [{"name": "y", "parameters": {"classification": 2}}]},
    ),
    (
        "outputs[0].parameters.binary_data",
        {"inputs": [X], "outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
    ),
]


@pytest.mark.parametrize(("field", "document"), WRONG)
def test_what_is_wrong_is_named(field: str, document: Any) -> None:
    with pytest.raises(HttpError) as caught:
        parse(document)
    assert caught.value.status == 400
    assert caught.value.message.startswith(field + ": ")


def lie(**fields: Any) -> tuple[bytes, int]:
    entry, data = entry_of(np.ones((1, 2), np.float32), "FP32")
    return binary([({**entry, **fields}, data)])


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("inputs[0].parameters.binary_data_size", {"parameters": {"binary_data_size": 4}}),
        ("inputs[0].parameters.binary_data_size", {"parameters": {"binary_data_size": -8}}),
        ("inputs[0].parameters.binary_data_size", {"parameters": {"binary_data_size": 8.0}}),
        ("inputs[0].parameters.binary_data_size", {"parameters": {"binary_data_size": "8"}}),
        ("inputs[0].parameters.binary_data_size", {"parameters": {"binary_data_size": 2**70}}),
        ("inputs[0].parameters.binary_data_size", {"shape": [2, 2]}),
        ("inputs[0].data", {"parameters": {}}),
        ("body", {"parameters": {}, "data": [1, 2]}),
    ],
)
def test_binary_lies_are_named(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(HttpError) as caught:
        parse_infer(*lie(**fields))
    assert caught.value.status == 400
    assert caught.value.message.startswith(field + ": ")


def test_binary_data_that_is_cut_off_or_too_long() -> None:
    body, length = lie()
    for wrong in (body[:-1], body + b"a"):
        with pytest.raises(HttpError, match="bytes"):
            parse_infer(wrong, length)
    with pytest.raises(HttpError, match="no JSON"):
        parse_infer(body, length + 1)
    with pytest.raises(HttpError, match="no JSON"):
        parse_infer(body, length - 1)


def test_bool_bytes_are_0_or_1() -> None:
    with pytest.raises(HttpError, match="0 or 1"):
        parse_infer(*binary([entry_of(np.array([0, 2], np.uint8), "BOOL")]))


@pytest.mark.parametrize("text", ["", "-1", "1.0", "a", "٣", "11", "9" * 5000, "1e1", "+1"])
def test_header_lengths_that_are_none(text: str) -> None:
    with pytest.raises(HttpError, match="Inference-Header-Content-Length") as caught:
        header_length(text, 10)
    assert caught.value.status == 400


def test_header_length() -> None:
    assert header_length("10", 10) == 10
    assert header_length(None, 10) is None


def test_an_object_of_more_than_a_piece_is_refused() -> None:
    """Where no inputs are, nothing long is needed."""
    assert parse_object(b"{}".ljust(PIECE_BYTES)) == {}
    with pytest.raises(HttpError, match=f"{PIECE_BYTES + 1} bytes; at most {PIECE_BYTES}") as told:
        parse_object(b"{}".ljust(PIECE_BYTES + 1))
    assert told.value.status == 413


@pytest.mark.parametrize(
    "body", [b"\xff\xfe{}", b"{", b"[1]", b"5", b'{"a":"\xff"}', b"nul", b"\0"]
)
def test_bodies_that_are_no_object(body: bytes) -> None:
    for read in (parse_object, lambda text: parse_infer(text, None)):
        with pytest.raises(HttpError) as caught:
            read(body)
        assert caught.value.status == 400


def test_half_a_surrogate_pair_is_no_fault() -> None:
    for text in (rb'{"id":"\ud800","inputs":[]}', rb'{"id":"\ud800","inputs":[NaN]}'):
        with pytest.raises(HttpError) as caught:
            parse_infer(text, None)
        caught.value.message.encode()


KEYS = ["name", "datatype", "shape", "data", "parameters", "inputs", "outputs", "id", "x"]
KEYS += ["binary_data_size", "binary_data", "binary_data_output"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "y"]) | JSON,
        "datatype": st.sampled_from([*DATATYPES, "BYTES"]) | JSON,
        "shape": st.lists(st.integers(-2, 5) | st.integers(), max_size=4) | JSON,
        "data": st.lists(st.floats() | st.integers() | st.none(), max_size=12) | JSON,
        "parameters": st.fixed_dictionaries(
            {}, optional={"binary_data_size": st.integers(-1, 40) | JSON}
        )
        | JSON,
    },
)
DOCUMENT = st.fixed_dictionaries(
    {"inputs": st.lists(ENTRY, max_size=3) | JSON},
    optional={
        "id": JSON,
        "outputs": st.lists(st.fixed_dictionaries({"name": JSON, "parameters": JSON})) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_output": JSON}) | JSON,
    },
)


def check(body: bytes, length: int | None) -> None:
    """A request is read or refused; there is nothing else."""
    found = refused = None
    try:
        found = parse_infer(body, length)
    except HttpError as error:
        refused = error
    if refused is not None:
        assert refused.status in (400, 413)
        assert refused.message.encode()
        assert refused.cause is None
    if found is not None:
        assert found.inputs
        for array in found.inputs.values():
            assert array.nbytes <= 8 * len(body)


@settings(max_examples=500)
@given(document=DOCUMENT, tail=st.binary(max_size=40), slip=st.sampled_from([0, 0, 0, -1, 1]))
def test_any_document(document: Any, tail: bytes, slip: int) -> None:
    head = json.dumps(document).encode()
    check(head, None)
    check(head + tail, max(0, min(len(head) + slip, len(head) + len(tail))))


@settings(max_examples=300)
@given(data=st.binary(max_size=200), share=st.floats(0, 1))
def test_any_bytes(data: bytes, share: float) -> None:
    check(data, None)
    check(data, int(share * len(data)))


@settings(max_examples=300)
@given(at=st.integers(0, 200), byte=st.integers(0, 255), length=st.integers(-3, 3))
def test_a_changed_byte_of_a_binary_request(at: int, byte: int, length: int) -> None:
    body, json_bytes = lie()
    spoilt = bytearray(body)
    spoilt[at % len(body)] = byte
    check(bytes(spoilt), max(0, min(len(body), json_bytes + length)))
