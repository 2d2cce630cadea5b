# SPDX-License-Identifier: Apache-2.0
"""A real server, asked in plain HTTP."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

import pydedup
from pydedup.http.datatypes import DATATYPES
from pydedup.testing.serving import Server, Start

NAME = "équipe/ranking model"


def tensor(array: Any, datatype: str = "FP32", name: str = "x") -> dict[str, Any]:
    return {
        "name": name,
        "datatype": datatype,
        "shape": list(array.shape),
        "data": array.reshape(-1).tolist(),
    }


def outputs_of(answer: Any) -> dict[str, Any]:
    """Return the outputs of an answer, in either form."""
    assert answer.status == 200, answer.body
    length = answer.headers.get("inference-header-content-length")
    head = json.loads(answer.body[: None if length is None else int(length)])
    at, found = 0 if length is None else int(length), {}
    for entry in head["outputs"]:
        dtype = DATATYPES[entry["datatype"]]
        if "data" in entry:
            found[entry["name"]] = np.array(entry["data"], dtype).reshape(entry["shape"])
            continue
        size = entry["parameters"]["binary_data_size"]
        array = np.frombuffer(answer.body[at : at + size], dtype)
        found[entry["name"]] = array.reshape(entry["shape"])
        at += size
    assert length is None or at == len(answer.body)
    return found


@pytest.fixture(scope="module")
def x() -> Any:
    return np.random.default_rng(0).standard_normal((5, 4), np.float32)


def test_hello(server: Server, store_url: str) -> None:
    first, second, third = server.hello
    assert first == f"pydedup serves 5 models in 6 versions of {store_url}"
    assert server.url in second
    path = third.split(server.url, 1)[1]
    assert server.ask("GET", path).status == 200


def test_a_store_without_layers_says_what_is_missing(start: Start, tmp_path: Path, x: Any) -> None:
    url = f"sqlite:///{tmp_path}/models.db"
    with pydedup.open(url) as store:
        store.add("weights", {"w": x})
    server = start(url)
    assert server.hello[0] == f"pydedup serves 0 models of {url}"
    assert server.process.stdout is not None
    assert "graph=" in server.process.stdout.readline()


def test_health_and_server(server: Server) -> None:
    assert server.ask("GET", "/v2/health/live").json == {"live": True}
    assert server.ask("GET", "/v2/health/ready").json == {"live": True, "ready": True}
    for path in ("/v2", "/v2/"):
        found = server.ask("GET", path).json
        assert found["name"] == "pydedup"
        assert found["version"] == pydedup.__version__
        assert {"binary_tensor_data", "model_repository"} <= set(found["extensions"])
    assert server.ask("HEAD", "/v2/health/live").status == 200


def test_metadata(server: Server) -> None:
    found = server.ask("GET", "/v2/models/dense").json
    assert found == {
        "name": "dense",
        "versions": ["1", "2"],
        "platform": "pydedup_graph",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
    }
    assert server.ask("GET", "/v2/models/dense/versions/1").json["versions"] == ["1"]
    assert server.ask("GET", "/v2/models/dense/versions/prod").json["versions"] == ["1"]
    found = server.ask("GET", "/v2/models/words").json
    assert found["inputs"] == [{"name": "ids", "datatype": "INT64", "shape": [-1, -1]}]
    assert found["outputs"] == [
        {"name": "mean", "datatype": "FP32", "shape": [-1, 4]},
        {"name": "same", "datatype": "INT64", "shape": [-1, -1]},
    ]
    assert server.ask("GET", "/v2/models/dense/config").json["input"][0]["dims"] == [-1, 4]


def test_a_body_of_one_input_alone(server: Server, x: Any, store_url: str) -> None:
    """As Triton's extension for binary tensors has it: no JSON, whose length is 0."""
    headers = {"Inference-Header-Content-Length": "0"}
    answer = server.infer("dense/versions/prod", x.tobytes(), headers=headers)
    assert answer.status == 200
    length = int(answer.headers["inference-header-content-length"])
    head = json.loads(answer.body[:length])
    assert head["model_version"] == "1"
    with pydedup.open(store_url, mode="r") as store:
        wanted = store.predict("dense@1", x)
    found = np.frombuffer(answer.body[length:], "<f4").reshape(head["outputs"][0]["shape"])
    np.testing.assert_allclose(found, wanted, 1e-6)
    for name, said in (("dense", "are no FP32 of shape [-1, 4]"), ("words", "ids [-1, -1]")):
        answer = server.infer(name, bytes(20), headers=headers)
        assert answer.status == 400
        assert said in answer.error
    assert "offsets [-1]" in server.infer("bags", bytes(16), headers=headers).error
    assert server.infer("none", bytes(16), headers=headers).status == 404


@pytest.mark.parametrize("encoded", [quote(NAME, safe=""), quote(NAME, safe="/")])
def test_names_with_slashes_and_other_letters(server: Server, encoded: str, x: Any) -> None:
    for path in ("", "/versions/2026-11"):
        assert server.ask("GET", f"/v2/models/{encoded}{path}").json["name"] == NAME
        assert server.ask("GET", f"/v2/models/{encoded}{path}/ready").status == 200
        answer = server.infer(f"{encoded}{path}", {"inputs": [tensor(x)]})
        head = {"model_name": NAME, "model_version": "2026-11"}
        assert {key: answer.json[key] for key in answer.json if key != "outputs"} == head
        answer = server.infer(f"{encoded}{path}", {"inputs": [tensor(x)], "id": "é-7"})
        assert answer.json.items() >= {**head, "id": "é-7"}.items()


def test_predictions_are_those_of_the_store(server: Server, store_url: str, x: Any) -> None:
    with pydedup.open(store_url, mode="r") as store:
        for address, path in {
            "dense@2": "dense",
            "dense@1": "dense/versions/1",
            "dense@prod": "dense/versions/prod",
        }.items():
            answer = server.infer(path, {"id": "é1", "inputs": [tensor(x)]})
            np.testing.assert_allclose(outputs_of(answer)["y"], store.predict(address, x), 1e-6)
            assert answer.json["id"] == "é1"
            assert answer.json["model_version"] == ("2" if address == "dense@2" else "1")
        ids = np.arange(12).reshape(3, 4)
        wanted = store.predict("words", {"ids": ids})
        for datatype in ("INT64", "INT32", "UINT8"):
            found = outputs_of(server.infer("words", {"inputs": [tensor(ids, datatype, "ids")]}))
            np.testing.assert_allclose(found["mean"], wanted["mean"], 1e-6)
            np.testing.assert_array_equal(found["same"], ids)


@pytest.mark.parametrize("datatype", ["FP64", "FP32", "FP16", "BF16", "INT8", "UINT16", "BOOL"])
def test_binary_there_and_back(server: Server, store_url: str, datatype: str) -> None:
    x = (np.arange(8).reshape(2, 4) % 2).astype(DATATYPES[datatype])
    entry = {"name": "x", "datatype": datatype, "shape": [2, 4]}
    entry["parameters"] = {"binary_data_size": x.nbytes}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    for pad in range(4):  # the tensor begins at any address
        padded = head + b" " * pad
        headers = {"Inference-Header-Content-Length": str(len(padded))}
        answer = server.infer("dense", padded + x.tobytes(), headers=headers)
        assert answer.headers["content-type"] == "application/octet-stream"
        with pydedup.open(store_url, mode="r") as store:
            np.testing.assert_array_equal(outputs_of(answer)["y"], store.predict("dense", x))


def test_outputs_that_are_asked_for(server: Server) -> None:
    ids = tensor(np.arange(4).reshape(2, 2), "INT64", "ids")
    asked = [{"name": "same", "parameters": {"binary_data": True}}, {"name": "mean"}]
    answer = server.infer("words", {"inputs": [ids], "outputs": asked})
    found = outputs_of(answer)
    assert list(found) == ["same", "mean"]
    np.testing.assert_array_equal(found["same"], [[0, 1], [2, 3]])
    answer = server.infer("words", {"inputs": [ids], "outputs": [{"name": "nothing"}]})
    assert answer.status == 400
    assert answer.error.startswith("outputs[0].name: ")


def test_large_json_both_ways(server: Server, store_url: str) -> None:
    x = np.random.default_rng(0).standard_normal((50_000, 4), np.float32)
    with pydedup.open(store_url, mode="r") as store:
        wanted = store.predict("dense", x)
    answer = server.infer("dense", {"inputs": [{**tensor(x), "data": x.tolist()}]})
    np.testing.assert_allclose(outputs_of(answer)["y"], wanted, 1e-5)


def test_nan_is_computed_with_as_predict_does(server: Server) -> None:
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2,4],"data":[1,2,3,%s,1,2,3,4]}]}'
    for text in (b"NaN", b"null"):
        data = server.infer("dense", body % text).json["outputs"][0]["data"]
        assert data[:3] == [None] * 3
        assert None not in data[3:]


def test_no_rows(server: Server) -> None:
    x = np.empty((0, 4), np.float32)
    assert outputs_of(server.infer("dense", {"inputs": [tensor(x)]}))["y"].shape == (0, 3)


GOOD = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("model", "status", "begins", "inputs"),
    [
        ("dense", 400, "inputs[0].shape: ", [{**GOOD, "shape": [1, 3], "data": [1, 2, 3]}]),
        ("dense", 400, "inputs[0].shape: ", [{**GOOD, "shape": [], "data": [1]}]),
        ("dense", 400, "inputs[0].name: ", [{**GOOD, "name": "z"}]),
        ("dense", 400, "inputs[1].name: ", [GOOD, {**GOOD, "name": "z"}]),
        ("bags", 400, "inputs: ", [{**GOOD, "name": "ids", "datatype": "INT64"}]),
        ("words", 400, "inputs[0].datatype: ", [{**GOOD, "name": "ids"}]),
        (
            "words",
            400,
            "node 'embedding'",
            [{**GOOD, "name": "ids", "datatype": "INT64", "data": [1, 2, 3, 50]}],
        ),
        ("densé", 404, "no model 'densé'", [GOOD]),
        ("dense/versions/9", 404, "'dense' has no version or alias '9'", [GOOD]),
        ("plain", 404, "plain@1 has no graph", [GOOD]),
        ("a@b@c", 400, "version or alias", [GOOD]),
        ("", 400, "model name", [GOOD]),
        ("x%27%3B%20DROP%20TABLE%20pydedup_models%3B--", 404, "no model", [GOOD]),
        ("%00", 400, "model name", [GOOD]),
        ("a" * 300, 400, "model name", [GOOD]),
    ],
)
def test_what_is_wrong_is_said(
    server: Server, model: str, status: int, begins: str, inputs: list[Any]
) -> None:
    path = model if "%" in model else quote(model, safe="/@")
    answer = server.infer(path, {"inputs": inputs})
    assert answer.status == status
    assert answer.error.startswith(begins), answer.error
    assert "sqlite:" not in answer.error


def test_paths_and_methods(server: Server) -> None:
    for path in ("/", "/v1", "/v2/nothing", "/v2/models", "/v2/repository/models/x/other"):
        answer = server.ask("GET", path)
        # It said that paths begin with /v2, of those that do.
        assert (answer.status, "GET /v2/models/NAME" in answer.error) == (404, True)
    answer = server.ask("GET", "/v2/models/dense/infer")
    assert answer.status == 405
    assert answer.headers["allow"] == "POST"
    assert server.ask("POST", "/v2/health/live").headers["allow"] == "GET, HEAD"
    for path in ("/v2/models/dense", "/v2/models/dense/predict"):
        answer = server.ask("POST", path, b"{}")
        assert (answer.status, "at /v2/models/NAME/infer" in answer.error) == (405, True)
    assert server.ask("GET", "/v2/models/%ff").status == 400
    answer = server.infer("dense", b"{}", headers={"Content-Encoding": "gzip"})
    assert answer.status == 415
    assert "Content-Encoding" in answer.error


def test_repository(server: Server) -> None:
    every = server.ask("POST", "/v2/repository/index", b"").json
    assert {"name": "plain", "version": "1"}.items() <= next(
        entry for entry in every if entry["name"] == "plain"
    ).items()
    ready = server.ask("POST", "/v2/repository/index", {"ready": True}).json
    assert [entry for entry in every if entry["state"] == "READY"] == ready
    assert [entry["name"] for entry in every if entry not in ready] == ["plain"]
    assert server.ask("POST", "/v2/repository/index", {"ready": "yes"}).status == 400
    padded = b'{"ready": true}'.ljust(1 << 16)
    assert server.ask("POST", "/v2/repository/index", padded).json == ready
    refused = server.ask("POST", "/v2/repository/index", padded + b" ")
    assert (refused.status, refused.json["error"][:26]) == (413, "body: it has 65537 bytes; ")

    name = quote(NAME, safe="")
    answer = server.ask("POST", f"/v2/repository/models/{name}/load", b"{}")
    assert answer.json == {"pages": 1}
    before = server.metric("pydedup_pool_pages")
    answer = server.ask("POST", f"/v2/repository/models/{name}/unload", b"")
    assert answer.json["pages"] >= 0
    assert server.metric("pydedup_pool_pages") == before - answer.json["pages"]
    assert server.infer(name, {"inputs": [GOOD]}).status == 200  # it is read again
    answer = server.ask(
        "POST", "/v2/repository/models/dense/load", {"parameters": {"config": "{}"}}
    )
    assert answer.status == 400
    for wrong in (5, [1], "config", [[1]], True, 1.5):
        answer = server.ask("POST", "/v2/repository/models/dense/load", {"parameters": wrong})
        assert (answer.status, "a JSON object is needed" in answer.json["error"]) == (400, True)
    for action in ("load", "unload"):
        assert server.ask("POST", f"/v2/repository/models/none/{action}", b"").status == 404


def test_metrics(server: Server) -> None:
    def ok() -> float:
        return server.metric("pydedup_requests_total", model="dense@2", outcome="ok")

    before = ok()
    connection = server.connect()
    for _ in range(5):  # one connection serves many
        answer = server.ask(
            "POST", "/v2/models/dense/infer", {"inputs": [GOOD]}, connection=connection
        )
        assert answer.status == 200
    connection.close()
    assert ok() == before + 5
    server.infer("unheard-of", {"inputs": [GOOD]})
    # What a model refuses counts as its own, so that one sees whose clients err.
    refused = {"model": "dense@2", "outcome": "bad_request"}
    before = server.metric("pydedup_requests_total", **refused)
    for slip in ({"shape": [2, 2]}, {"name": "z"}):
        assert server.infer("dense", {"inputs": [{**GOOD, **slip}]}).status == 400
    assert server.metric("pydedup_requests_total", **refused) == before + 2
    text = server.ask("GET", "/metrics").body.decode()
    assert "unheard-of" not in text  # a client cannot make labels
    for name in ("hits_total", "misses_total", "evictions_total", "bytes"):
        assert f"pydedup_pool_{name} " in text
    for name in ("request_seconds_count", "batch_rows_count", "queue_requests"):
        assert f"pydedup_{name} " in text
    assert server.metric("pydedup_requests_total", model="", outcome="not_found") >= 1


def test_a_damaged_row_of_a_model(start: Start, own_url: str) -> None:
    """All others are listed and served."""
    server = start(own_url)
    before = server.ask("POST", "/v2/repository/index", b"").json
    path = own_url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        damage = "UPDATE pydedup_models SET policy = CAST(x'ff' AS TEXT) WHERE name = 'plain'"
        assert connection.execute(damage).rowcount == 1
    after = server.ask("POST", "/v2/repository/index", b"").json
    assert after == [entry for entry in before if entry["name"] != "plain"]
    assert server.ask("GET", "/v2/models/dense").status == 200
    assert server.ask("GET", "/v2/models/plain").status == 500


def test_an_alias_moves_and_a_version_goes(start: Start, own_url: str) -> None:
    server = start(own_url)
    body = {"inputs": [GOOD]}
    with pydedup.open(own_url) as store:
        for version in ("1", "2", "1"):
            store.alias("dense", "prod", version)
            found = server.infer("dense/versions/prod", body).json
            assert found["model_version"] == version
            wanted = store.predict(f"dense@{version}", np.array([GOOD["data"]], np.float32))
            np.testing.assert_allclose(found["outputs"][0]["data"], wanted[0], 1e-6)
        store.remove("dense@2")
        assert server.infer("dense", body).json["model_version"] == "1"
        assert server.infer("dense/versions/2", body).status == 404
        store.alias("dense", "prod", None)
        store.remove("dense@1")
        store.vacuum()
        assert server.infer("dense", body).status == 404
        assert server.ask("GET", "/v2/models/dense/ready").status == 404
        rng = np.random.default_rng(9)
        graph = store.graph(NAME)
        store.add(
            "dense@2",
            {"w": rng.standard_normal((3, 6), np.float32), "b": np.ones(3, np.float32)},
            graph=graph,
        )
    # The same address is another model now.
    assert server.ask("GET", "/v2/models/dense").json["inputs"][0]["shape"] == [-1, 6]
    answer = server.infer("dense", body)
    assert answer.status == 400
    assert answer.error.startswith("inputs[0].shape: ")
