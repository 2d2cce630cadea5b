# SPDX-License-Identifier: Apache-2.0
"""The README says what is so: its Python and its commands run as they stand there, its links lead
somewhere, and its make targets exist. The numbers in it are not checked here.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup.cli.app import main
from pydedup.testing.program import run_here, run_process
from pydedup.testing.serving import serving

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README speaks of."""
    rng = np.random.default_rng(0)
    model = {
        "embedding.weight": rng.standard_normal((3000, 50), dtype=np.float32),
        "dense.weight": rng.standard_normal((16, 50), dtype=np.float32),
    }
    save_file(model, tmp_path / "sentiment.safetensors")
    save_file({**model, "dense.weight": model["dense.weight"] + 1}, tmp_path / "next.safetensors")
    (tmp_path / "next.safetensors").rename(tmp_path / "sentiment-next.safetensors")
    encoder = tmp_path / "all-MiniLM-L6-v2"
    encoder.mkdir()
    save_file(model, encoder / "model.safetensors")
    (encoder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_onnx(tmp_path / "churn.onnx")
    (tmp_path / "x.json").write_text("[[1, 2, 3]]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_onnx(path: Path) -> None:
    """Write y = x W, of three features."""
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    graph = make.make_graph(
        [make.make_node("MatMul", ["x", "w"], ["y"])],
        "churn",
        [make.make_tensor_value_info("x", 1, ["batch", 3])],
        [make.make_tensor_value_info("y", 1, ["batch", 1])],
        [onnx.numpy_helper.from_array(np.array([[1], [10], [100]], np.float32), "w")],
    )
    opset = [make.make_opsetid("", 17)]
    onnx.save(make.make_model(graph, opset_imports=opset, ir_version=9), path)


def commands() -> list[list[str]]:
    """Return the indented lines that call the program on the store, but those that go on for ever.

    What ``serve`` prints is checked in tests/http.
    """
    lines = re.findall(r"^    pydedup ((?:\w+) sqlite:.*)$", README, re.MULTILINE)
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words[0] != "serve"]


def test_the_python_of_the_readme_runs(folder: Path) -> None:
    first, attaching, second = re.findall(
        r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
    )
    x = np.ones((2, 50), np.float32)
    names: dict[str, object] = {"x": x}
    exec(compile(first, "README.md", "exec"), names)
    with pydedup.open("sqlite:///models.db", mode="r") as store:
        weights = store.load("sentiment@2")["dense.weight"]
        # The second version shares all but its dense layer with the first.
        assert store.stats().page_bytes < (folder / "sentiment.safetensors").stat().st_size
    np.testing.assert_allclose(names["hidden"], x @ weights.T, rtol=1e-5)  # type: ignore[arg-type]

    torch = pytest.importorskip("torch")
    names = {"ids": torch.arange(20)}
    exec(compile(attaching, "README.md", "exec"), names)
    wanted = names["net"](names["ids"])  # type: ignore[operator]
    torch.testing.assert_close(names["scores"], wanted)

    rng = np.random.default_rng(1)
    model = {"table": rng.standard_normal((500, 64), np.float32)}
    texts = rng.integers(0, 500, 600)
    names = {
        "model": model,
        "texts": texts,
        "labels": model["table"][texts, 0] > 0,
        "predict": lambda weights, ids: weights["table"][ids, 0] > 0,
    }
    exec(compile(second, "README.md", "exec"), names)
    with pydedup.open("sqlite:///models.db", mode="r") as store:
        assert store.info("reviews").certificate["metric_before"] == 1.0
        assert store.info("sentiment@close").info.policy == "bounded"


def test_the_commands_of_the_readme_run(folder: Path) -> None:
    assert len(commands()) >= 7
    for number, arguments in enumerate(commands()):
        done = (run_here if number else run_process)(*arguments)
        # Like diff(1), `pydedup diff` says with 1 that there are differences.
        wanted = 1 if arguments[0] == "diff" else 0
        assert done.returncode == wanted, f"pydedup {' '.join(arguments)}: {done.stderr}"
        assert done.stdout.strip(), f"pydedup {' '.join(arguments)} said nothing"
    assert (folder / "back.safetensors").stat().st_size > 600_000


def test_the_request_of_the_readme_is_answered(folder: Path) -> None:
    """It asked for a model that has no layers."""
    pytest.importorskip("uvicorn")
    for words in commands():
        if words[:1] == ["add"] and words[2].startswith("churn"):
            assert main(words) == 0
    assert main(["alias", "sqlite:///models.db", "churn", "prod", "1"]) == 0
    with serving("sqlite:///models.db") as server:
        for text in (README, (ROOT / "docs" / "http.md").read_text(encoding="utf-8")):
            asked = re.search(r"^    curl http://127.0.0.1:8000(\S+) \\\n +-d '(.*)'$", text, re.M)
            assert asked is not None
            path, body = asked.groups()
            answer = server.ask("POST", path, json.loads(body))
            assert answer.json["outputs"][0]["data"] == [321.0]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"(?:^ {4}|`)make ([a-z]+)", text, re.MULTILINE)
    assert set(named) <= targets
