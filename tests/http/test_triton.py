# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's own client, `tritonclient[http]`, on our server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pydedup
from pydedup.testing.serving import Server

triton = pytest.importorskip("tritonclient.http")
utils = pytest.importorskip("tritonclient.utils")
NAME = "équipe/ranking model"


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    found = triton.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=4)
    yield found
    found.close()


def given(name: str, array: Any, binary: bool = True) -> Any:
    datatype = utils.np_to_triton_dtype(array.dtype)
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("dense")
    assert client.is_model_ready("dense", "1")
    assert client.is_model_ready(NAME)
    assert not client.is_model_ready("none")
    assert client.get_server_metadata()["name"] == "pydedup"
    assert client.get_model_metadata(NAME)["versions"] == ["2026-11"]
    assert client.get_model_metadata("dense", "prod")["versions"] == ["1"]
    assert client.get_model_config("dense")["input"][0]["data_type"] == "TYPE_FP32"


def test_repository(client: Any) -> None:
    index = client.get_model_repository_index()
    assert {"dense", "words", NAME} <= {entry["name"] for entry in index}
    client.load_model(NAME)
    client.unload_model(NAME)
    with pytest.raises(utils.InferenceServerException, match="no model 'none'"):
        client.load_model("none")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_infer(client: Any, store_url: str, binary_in: bool, binary_out: bool) -> None:
    x = np.random.default_rng(0).standard_normal((6, 4), np.float32)
    ids = np.arange(6).reshape(2, 3)
    with pydedup.open(store_url, mode="r") as store:
        for name, version, address in (
            ("dense", "", "dense"),
            ("dense", "1", "dense@1"),
            ("dense", "prod", "dense@1"),
            (NAME, "", NAME),
        ):
            wanted = [triton.InferRequestedOutput("y", binary_data=binary_out)]
            found = client.infer(
                name, [given("x", x, binary_in)], version, outputs=wanted, request_id="17"
            )
            np.testing.assert_allclose(found.as_numpy("y"), store.predict(address, x), 1e-6)
            assert found.get_response()["id"] == "17"
        found = client.infer("words", [given("ids", ids, binary_in)])
        wanted = store.predict("words", {"ids": ids})
        np.testing.assert_array_equal(found.as_numpy("same"), ids)
        np.testing.assert_allclose(found.as_numpy("mean"), wanted["mean"], 1e-6)


def test_every_datatype_it_has(client: Any, store_url: str) -> None:
    with pydedup.open(store_url, mode="r") as store:
        for kind in (bool, "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
            x = (np.arange(8).reshape(2, 4) % 2).astype(kind)
            found = client.infer("dense", [given("x", x)]).as_numpy("y")
            np.testing.assert_allclose(found, store.predict("dense", x), 1e-6)
        tensor = triton.InferInput("x", [2, 4], "BF16")
        x = np.arange(8).reshape(2, 4).astype(ml_dtypes.bfloat16)
        tensor.set_data_from_numpy(x)
        found = client.infer("dense", [tensor]).as_numpy("y")
        np.testing.assert_allclose(found, store.predict("dense", x), 1e-6)


def test_many_at_once(client: Any, store_url: str) -> None:
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((n % 5 + 1, 4), np.float32) for n in range(40)]
    pending = [
        client.async_infer("dense", [given("x", x)], str(n % 2 + 1)) for n, x in enumerate(xs)
    ]
    with pydedup.open(store_url, mode="r") as store:
        for n, (x, one) in enumerate(zip(xs, pending, strict=True)):
            wanted = store.predict(f"dense@{n % 2 + 1}", x)
            np.testing.assert_allclose(one.get_result().as_numpy("y"), wanted, 1e-5)


def test_its_client_for_asyncio(server: Server, store_url: str) -> None:
    aio = pytest.importorskip("tritonclient.http.aio")
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((n % 5 + 1, 4), np.float32) for n in range(40)]

    async def ask() -> list[Any]:
        async with aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            assert await client.is_model_ready(NAME)
            asked = (
                client.infer("dense", [given("x", x, n % 2 == 0)], "prod") for n, x in enumerate(xs)
            )
            return list(await asyncio.gather(*asked))

    with pydedup.open(store_url, mode="r") as store:
        for x, one in zip(xs, asyncio.run(ask()), strict=True):
            np.testing.assert_allclose(one.as_numpy("y"), store.predict("dense@1", x), 1e-5)


def test_errors_are_exceptions_of_its_own(client: Any) -> None:
    x = np.ones((1, 3), np.float32)
    with pytest.raises(utils.InferenceServerException, match=r"inputs\[0\].shape") as caught:
        client.infer("dense", [given("x", x)])
    assert caught.value.status() == "400"
    with pytest.raises(utils.InferenceServerException) as caught:
        client.infer("none", [given("x", x)])
    assert caught.value.status() == "404"
    with pytest.raises(utils.InferenceServerException) as caught:
        client.infer("dense", [given("x", x)], request_compression_algorithm="gzip")
    assert caught.value.status() == "415"
