# SPDX-License-Identifier: Apache-2.0
"""Models that ONNX Runtime runs, with the weights of the store."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.errors import UnsupportedFormatError
from pydedup.testing.program import run_here
from pydedup.testing.serving import Start, until

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def model(path: Path) -> Any:
    """Save y = abs(ceil(x W)) and z, the shape of x; our own engine knows neither."""
    make = onnx.helper
    weight = np.random.default_rng(0).standard_normal((64, 8), np.float32)
    graph = make.make_graph(
        [
            make.make_node("MatMul", ["x", "w"], ["h"]),
            make.make_node("Ceil", ["h"], ["c"]),
            make.make_node("Abs", ["c"], ["y"]),
            make.make_node("Shape", ["x"], ["z"]),
        ],
        "g",
        [make.make_tensor_value_info("x", 1, ["batch", 64])],
        [
            make.make_tensor_value_info("y", 1, ["batch", 8]),
            make.make_tensor_value_info("z", 7, [2]),
        ],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, path)
    return weight


def test_it_is_served_like_any_other(start: Start, own_url: str, tmp_path: Path) -> None:
    weight = model(tmp_path / "m.onnx")
    with pydedup.open(own_url) as store:
        store.add("ceil@1", tmp_path / "m.onnx")
        assert store.graph("ceil") is None
    server = start(own_url)
    found = server.ask("GET", "/v2/models/ceil").json
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}]
    assert found["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [-1, 8]},
        {"name": "z", "datatype": "INT64", "shape": [2]},
    ]
    index = server.ask("POST", "/v2/repository/index", {"ready": True}).json
    assert "ceil" in [entry["name"] for entry in index]
    x = np.random.default_rng(1).standard_normal((3, 64), np.float32)
    entry = {"name": "x", "datatype": "FP32", "shape": [3, 64], "data": x.tolist()}
    y, z = server.infer("ceil", {"inputs": [entry]}).json["outputs"]
    np.testing.assert_allclose(np.reshape(y["data"], (3, 8)), np.abs(np.ceil(x @ weight)))
    assert z["data"] == [3, 64]
    wrong = {**entry, "shape": [64, 3], "data": x.T.tolist()}
    answer = server.infer("ceil", {"inputs": [wrong]})
    assert answer.status == 400
    assert answer.error
    assert server.infer("ceil", {"inputs": [{**entry, "name": "a"}]}).status == 400
    assert server.ask("POST", "/v2/repository/models/ceil/load", b"").status == 200


def classifier(path: Path, kind: str) -> Any:
    """Save a classifier as scikit-learn's are: labels, and what the kind says of its scores."""
    make = onnx.helper
    weight = np.random.default_rng(2).standard_normal((3, 4), np.float32)
    nodes = [
        make.make_node(
            "LinearClassifier",
            ["x"],
            ["label", "scores"],
            domain="ai.onnx.ml",
            coefficients=weight.ravel().tolist(),
            intercepts=[0.0] * 3,
            classlabels_strings=["a", "bé", 'c"'],
        )
    ]
    if kind == "maps":
        labels = {"domain": "ai.onnx.ml", "classlabels_strings": ["a", "b", "c"]}
        nodes.append(make.make_node("ZipMap", ["scores"], ["p"], **labels))
        scores = make.make_map_type_proto(8, make.make_tensor_type_proto(1, []))
        last = make.make_value_info("p", make.make_sequence_type_proto(scores))
    else:
        nodes.append(make.make_node("Cast", ["scores"], ["p"], to=16 if kind == "bf16" else 1))
        last = make.make_tensor_value_info("p", 16 if kind == "bf16" else 1, ["n", 3])
    graph = make.make_graph(
        nodes,
        "g",
        [make.make_tensor_value_info("x", 1, ["n", 4])],
        [make.make_tensor_value_info("label", 8, ["n"]), last],
    )
    sets = [make.make_opsetid("", 17), make.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(make.make_model(graph, opset_imports=sets, ir_version=9), path)
    return weight


def test_outputs_that_are_text_or_no_arrays(start: Start, own_url: str, tmp_path: Path) -> None:
    x = np.random.default_rng(3).standard_normal((5, 4), np.float32)
    with pydedup.open(own_url) as store:
        for kind in ("plain", "maps", "bf16"):
            weight = classifier(tmp_path / "m.onnx", kind)
            store.add(kind, tmp_path / "m.onnx")
        labels = [["a", "bé", 'c"'][i] for i in (x @ weight.T).argmax(axis=1)]
        assert store.predict("plain", x)["label"].tolist() == labels
        for kind, said in (("maps", "'p' as seq.map.*zipmap"), ("bf16", "'p' as tensor.bfloat16")):
            with pytest.raises(UnsupportedFormatError, match=f"{kind}@1 gives {said}"):
                store.predict(kind, x)
    np.save(tmp_path / "x.npy", x)
    words = ["predict", own_url, "plain", tmp_path / "x.npy"]
    found = json.loads(run_here(*words, "--json").stdout)["outputs"]["label"]
    assert found == {"dtype": "text", "shape": [5], "values": labels}
    assert "label: text 5" in run_here(*words).stdout
    done = run_here(*words, "-o", tmp_path / "y.npz")  # "convert it to one of: f64"
    assert (done.returncode, "'label' is text, which .npz files" in done.stderr) == (2, True)

    server = start(own_url)
    told = server.ask("GET", "/v2/models/plain").json["outputs"]
    assert [one["datatype"] for one in told] == ["BYTES", "FP32"]
    told = server.ask("GET", "/v2/models/plain/config").json["output"]
    assert [one["data_type"] for one in told] == ["TYPE_STRING", "TYPE_FP32"]
    entry = {"name": "x", "datatype": "FP32", "shape": [5, 4], "data": x.tolist()}
    label, _ = server.infer("plain", {"inputs": [entry]}).json["outputs"]  # was refused
    assert label == {"name": "label", "datatype": "BYTES", "shape": [5], "data": labels}
    triton = pytest.importorskip("tritonclient.http")
    with contextlib.closing(triton.InferenceServerClient(f"127.0.0.1:{server.port}")) as client:
        given = triton.InferInput("x", [5, 4], "FP32")
        given.set_data_from_numpy(x)
        for binary in (True, False):
            asked = [triton.InferRequestedOutput("label", binary_data=binary)]
            answered = client.infer("plain", [given], outputs=asked).as_numpy("label")
            assert [bytes(text).decode() if binary else text for text in answered] == labels
    (p,) = server.infer("plain", {"inputs": [entry], "outputs": [{"name": "p"}]}).json["outputs"]
    np.testing.assert_allclose(np.reshape(p["data"], (5, 3)), x @ weight.T, 1e-5)
    for kind in ("maps", "bf16"):
        answer = server.infer(kind, {"inputs": [entry]})
        assert answer.status == 501
        assert f"{kind}@1 gives 'p'" in answer.error


def unusable(path: Path, kind: str) -> None:
    """Save a model of which no request can be answered."""
    make = onnx.helper
    x, y = (make.make_tensor_value_info(name, 1, ["n", 1]) for name in "xy")
    if kind == "texts":
        x = make.make_tensor_value_info("x", 8, ["n", 1])
        words = {"keys_strings": ["a"], "values_floats": [2.0], "domain": "ai.onnx.ml"}
        nodes = [make.make_node("LabelEncoder", ["x"], ["k"], **words)]
    elif kind == "sequences":
        x = make.make_tensor_sequence_value_info("x", 1, None)
        nodes = [make.make_node("ConcatFromSequence", ["x"], ["k"], axis=0)]
    else:
        nodes = [make.make_node("Frobnicate", ["x"], ["k"])]
    nodes.append(make.make_node("Ceil", ["k"], ["y"]))
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    graph = make.make_graph(nodes, "g", [x], [y], [weight])
    sets = [make.make_opsetid("", 17), make.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(make.make_model(graph, opset_imports=sets, ir_version=9), path)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("texts", "bad@1 takes 'x' as tensor(string), which is not supported: do what it does"),
        ("sequences", "bad@1 takes 'x' as seq(tensor(float)), which is not supported"),
        ("unknown", "ONNX Runtime cannot load bad@1: "),
    ],
)
def test_a_model_that_refuses_every_request_is_not_ready(
    start: Start, tmp_path: Path, kind: str, why: str
) -> None:
    """It was said to be ready, and to take FP32 instead of a sequence."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    unusable(tmp_path / "m.onnx", kind)
    with pydedup.open(url) as store:
        store.add("bad", tmp_path / "m.onnx")
    server = start(url)
    if kind != "unknown":  # the first to ask: an index looks at what the graph declares
        (listed,) = server.ask("POST", "/v2/repository/index").json
        assert (listed["state"], why in listed["reason"]) == ("UNAVAILABLE", True)
        assert server.ask("GET", "/v2/models/bad").status == 501
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}
    for answer in (
        server.infer("bad", {"inputs": [entry]}),
        server.ask("GET", "/v2/models/bad/ready"),
        server.ask("POST", "/v2/repository/models/bad/load"),
    ):
        assert answer.status == 501
        assert why in answer.error
        (listed,) = server.ask("POST", "/v2/repository/index").json
        assert (listed["state"], why in listed["reason"]) == ("UNAVAILABLE", True)


def test_an_index_tells_a_damaged_graph_until_it_is_mended(
    start: Start, own_url: str, tmp_path: Path
) -> None:
    """A graph that was lost in part was READY."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    model(tmp_path / "m.onnx")
    with pydedup.open(own_url) as store:
        store.copy_to(url, ["dense"])
    with pydedup.open(url) as store:
        store.add("ceil", tmp_path / "m.onnx")
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as database, database:
        database.execute("CREATE TABLE kept AS SELECT * FROM pydedup_artifacts")
        database.execute(
            "UPDATE pydedup_artifacts SET payload = substr(payload, 2) WHERE name LIKE '%onnx%'"
        )
    server = start(url)

    def states() -> dict[str, str]:
        entries = server.ask("POST", "/v2/repository/index").json
        return {entry["name"]: entry["state"] for entry in entries}

    assert states() == {"dense": "READY", "ceil": "UNAVAILABLE"}
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as database, database:
        database.execute("DELETE FROM pydedup_artifacts")
        database.execute("INSERT INTO pydedup_artifacts SELECT * FROM kept")
    assert states() == {"dense": "READY", "ceil": "READY"}


def test_weights_that_never_fit(start: Start, tmp_path: Path) -> None:
    """It was 503, with the time to try again, and said to be ready."""
    url = f"sqlite:///{tmp_path / 'large.db'}"
    make = onnx.helper
    weight = np.random.default_rng(4).standard_normal((64, 9000), np.float32)
    graph = make.make_graph(
        [make.make_node("MatMul", ["x", "w"], ["h"]), make.make_node("Ceil", ["h"], ["y"])],
        "g",
        [make.make_tensor_value_info("x", 1, ["batch", 64])],
        [make.make_tensor_value_info("y", 1, ["batch", 9000])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, tmp_path / "m.onnx")
    with pydedup.open(url) as store:
        store.add("ceil", tmp_path / "m.onnx")
    server = start(url, "--memory", "2MiB")
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [1.0] * 64}
    why = "ceil@1 is run by ONNX Runtime, which needs all of its 2,304,000 bytes"
    for answer in (
        server.infer("ceil", {"inputs": [entry]}),
        server.ask("GET", "/v2/models/ceil/ready"),
        server.ask("POST", "/v2/repository/models/ceil/load"),
    ):
        assert answer.status == 501
        assert "retry-after" not in answer.headers
        assert why in answer.error
    (listed,) = server.ask("POST", "/v2/repository/index").json
    assert listed["state"] == "UNAVAILABLE"
    assert why in listed["reason"]
    assert server.ask("POST", "/v2/repository/index", {"ready": True}).json == []
    assert server.process.stdout is not None
    assert f"No model there can predict; ceil@1: {why}" in server.process.stdout.readline()


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_runtime_it_is_not_ready(
    start: Start, own_url: str, tmp_path: Path, missing: str
) -> None:
    """The index called it READY, and so did its own path where onnx alone was there."""
    model(tmp_path / "m.onnx")
    with pydedup.open(own_url) as store:
        store.add("ceil@1", tmp_path / "m.onnx")
    hide = f"import sys\nsys.modules[{missing!r}] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hide)
    server = start(own_url, env={"PYTHONPATH": str(tmp_path)})
    for method, path in (("GET", ""), ("GET", "/ready"), ("GET", "/config"), ("POST", "/infer")):
        x = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0] * 64}
        answer = server.ask(method, f"/v2/models/ceil{path}", {"inputs": [x]})
        assert answer.status == 501, path
        assert f"import of {missing}" in answer.error
        assert "pydedup[onnx]" in answer.error
    for ready in (False, True):
        index = server.ask("POST", "/v2/repository/index", {"ready": ready}).json
        found = {entry["name"]: (entry["state"], entry["reason"]) for entry in index}
        told = ("UNAVAILABLE", "the extra onnx is not installed here")
        assert found.get("ceil") == (None if ready else told)
        assert found["dense"] == ("READY", "")


def test_a_loop_without_end_does_not_keep_its_thread(
    start: Start, own_url: str, tmp_path: Path
) -> None:
    """Who waited was told, but the thread computed on, for ever."""
    make = onnx.helper
    takes = [
        make.make_tensor_value_info(*one) for one in (("i", 7, []), ("c", 9, []), ("s", 1, [None]))
    ]
    gives = [make.make_tensor_value_info(*one) for one in (("d", 9, []), ("t", 1, [None]))]
    steps = [make.make_node("Identity", ["c"], ["d"]), make.make_node("Abs", ["s"], ["t"])]
    body = make.make_graph(steps, "body", takes, gives)
    graph = make.make_graph(
        [make.make_node("Loop", ["", "go", "x"], ["y"], body=body)],
        "g",
        [make.make_tensor_value_info("x", 1, [None]), make.make_tensor_value_info("go", 9, [])],
        [make.make_tensor_value_info("y", 1, [None])],
    )
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, tmp_path / "m.onnx")
    with pydedup.open(own_url) as store:
        store.add("loop", tmp_path / "m.onnx")
    server = start(own_url, "--timeout", 0.5, "--threads", 1)
    x = {"name": "x", "datatype": "FP32", "shape": [1], "data": [-1]}
    go = {"name": "go", "datatype": "BOOL", "shape": [], "data": [True]}
    assert server.infer("loop", {"inputs": [x, go]}).status == 504
    until(lambda: server.metric("pydedup_running_batches") == 0)
    stop = {**go, "data": [False]}
    until(lambda: server.infer("loop", {"inputs": [x, stop]}).status == 200)
