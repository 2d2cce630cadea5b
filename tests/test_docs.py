# SPDX-License-Identifier: Apache-2.0
"""What documents say is so: commands and options are those of the program, each piece of code is
run by some test, those that need no server by this one, and tests that are named exist.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import pydedup
from pydedup.cli.app import program
from pydedup.graph import Graph, Node
from pydedup.testing.program import run_here
from pydedup.testing.serving import serving

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
STORE = "sqlite:///models.db"

#: Column of docs/faults.md -> what the name of a test's file may not have in it.
COLUMNS = {"SQLite": ("postgres", "mysql"), "PostgreSQL": ("mysql",), "MariaDB": ("postgres",)}
#: What a page has code of -> the test that runs it as it stands there.
RUN_BY = {
    ("README.md", "python"): "tests/test_readme.py",
    ("docs/attach.md", "python"): "tests/test_docs.py",
    ("docs/howto.md", "python"): "tests/test_docs.py",
    ("docs/http.md", "python"): "tests/test_docs.py",
    ("docs/moving.md", "python"): "tests/test_docs.py",
    ("docs/report.md", "python"): "tests/test_docs.py",
    ("docs/serving.md", "python"): "tests/test_docs.py",
    ("docs/scoring.md", "python"): "tests/scoring/test_sqlite_functions.py",
    ("docs/scoring.md", "sql"): "tests/scoring/test_plpython.py",
    ("docs/sharding.md", "sql"): "tests/adapters/shards/test_foreign_partitions.py",
    ("docs/sql.md", "sql"): "tests/e2e/test_sql.py",
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_of(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.M | re.S)


# ---- the program --------------------------------------------------------------------------------


def commands_of(page: str) -> Iterator[list[str]]:
    """Yield the words of each command, on a line of its own or within a sentence."""
    text = text_of(page).replace("\\\n", " ")
    form = r"^ {4}(pydedup .*)$|`(pydedup [a-z][^`]*)`|^ExecStart=\S*/(pydedup .*)$"
    for line in re.findall(form, text, re.M):
        (found,) = filter(None, line)
        yield shlex.split(found.split(" | ")[0].replace("\n", " "), comments=True)[1:]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_are_those_of_the_program(page: str) -> None:
    for words in commands_of(page):
        command: click.Command = program
        at = 0
        with click.Context(program, **program.context_settings) as context:
            while isinstance(command, click.Group) and at < len(words) and words[at][0] != "-":
                found = command.get_command(context, words[at])
                assert found is not None, f"pydedup {' '.join(words)}"
                command, at = found, at + 1
            known = {
                "--help",
                *(opt for param in command.get_params(context) for opt in param.opts),
            }
        given = {word.partition("=")[0] for word in words[at:] if re.match(r"--?[a-z]", word)}
        assert given <= known, f"pydedup {' '.join(words)}: {given - known}"


@pytest.mark.parametrize("page", PAGES)
def test_programs_in_python_are_there(page: str) -> None:
    for path in re.findall(r"(?:^ {4}|`)python ([\w/]+\.py)", text_of(page), re.M):
        assert (ROOT / path).is_file(), path


# ---- code ---------------------------------------------------------------------------------------


def test_each_piece_of_code_is_run_by_a_test() -> None:
    there = {
        (page, language)
        for page in PAGES
        for language in re.findall(r"^```(python|sql)$", text_of(page), re.M)
    }
    assert there == set(RUN_BY)
    for (page, _), test in RUN_BY.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")
    # Python that is not marked as such is found by nobody. (docs/ray.md: the test below.)
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)
        unmarked = re.findall(r"^ {4}(?:import|from|\w+ = \w).*$", text, re.M)
        assert not unmarked or page == "docs/ray.md", unmarked


def test_what_ray_says_has_arguments_that_there_are() -> None:
    """Ray itself runs in tests/ray; here is what is called there, and how."""
    pytest.importorskip("ray")
    import pydedup.ray

    text = text_of("docs/ray.md")
    (block,) = re.findall(r"^ {4}from ray import serve\n(?:(?: {4}.*)?\n)+", text, re.M)
    pieces = [*code_of("docs/ray.md", "text"), textwrap.dedent(block)]
    calls = [
        node
        for piece in pieces
        for node in ast.walk(ast.parse(piece))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("pydedup.ray.")
    ]
    assert len(calls) == 5
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        signature = inspect.signature(getattr(pydedup.ray, call.func.attr))
        named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        signature.bind(*call.args, **named)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pydedup.Store]:
    """A store with the models that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "weight"}),))
    weights = np.array([[1, 10, 100]], np.float32)
    with pydedup.open(STORE) as store:
        for name in ("churn@1", "tenant-a", "tenant-b", "minilm@1", "net@1"):
            store.add(name, {"weight": weights}, graph=graph)
        for version in ("minilm@2", "sentiment@1", "sentiment@2"):
            store.add(version, {"weight": weights * int(version[-1])}, graph=graph)
        for name in ("churn", "minilm"):
            store.alias(name, "prod", "1")
        yield store


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "docs", "exec"), names)
    return names


def test_what_serving_says(store: pydedup.Store) -> None:
    first, traffic, many = code_of("docs/serving.md")
    x = np.ones((2, 3), np.float32)
    names = run(first, x=x)
    with names["store"] as opened:
        np.testing.assert_array_equal(names["y"], [[111], [111]])
        done = 'store.predict("churn@prod", x)'
        assert "...  # predictions" in traffic
        assert run(traffic.replace("...  #", f"{done}; {done}  #"), store=opened, x=x)["policy"]
        answers = run(many, store=opened, x1=x, x2=x, x3=x)["results"]
        assert [answer.shape for answer in answers] == [(2, 1)] * 3


def test_what_attach_says(store: pydedup.Store) -> None:
    torch = pytest.importorskip("torch")
    first, meta, folder = code_of("docs/attach.md")

    def net() -> Any:
        return torch.nn.Linear(3, 1, bias=False)

    with torch.no_grad():
        x = torch.ones(2, 3)
        assert run(first, store=store, module=net().eval(), x=x)["y"].tolist() == [[111], [111]]
        assert run(meta, store=store, torch=torch, Net=net)["module"](x).tolist() == [[111], [111]]

    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    config = transformers.BertConfig(**sizes, intermediate_size=8)
    bert = transformers.BertModel(config).eval()
    bert.save_pretrained("bert")
    store.add("minilm@3", "bert")
    store.alias("minilm", "prod", "3")
    assert list(store.artifacts("minilm@prod")) == ["config.json"]
    assert store.artifacts("minilm@1") == {}
    names = {
        "json": json,
        "BertConfig": transformers.BertConfig,
        "BertModel": transformers.BertModel,
    }
    attached = run(folder, store=store, **names)["module"]
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(attached(ids).pooler_output, bert(ids).pooler_output)


def test_what_report_says(store: pydedup.Store) -> None:
    (code,) = code_of("docs/report.md")
    run(code.replace("...  #", "predict()  #"), store=store, predict=lambda: store.load("churn"))
    assert Path("trace.npz").exists()
    store.close()
    reports = [words for words in commands_of("docs/report.md") if words[:2] == ["report", STORE]]
    assert len(reports) == 2
    for words in reports:
        done = run_here(*words)
        assert done.returncode == 0, done.stderr
        Path("models.html").unlink()


def test_what_http_says(store: pydedup.Store) -> None:
    pytest.importorskip("tritonclient.http")
    pytest.importorskip("uvicorn")
    (code,) = code_of("docs/http.md")
    with serving(STORE) as server:
        assert "127.0.0.1:8000" in code
        names = run(code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"))
        assert names["y"].tolist() == [[321]]
        names["client"].close()


def test_what_howto_says_of_fastapi(store: pydedup.Store) -> None:
    fastapi = pytest.importorskip("fastapi")
    store.close()
    (code,) = code_of("docs/howto.md")
    names = run(code)
    app, predict = names["app"], names["predict"]
    assert app.url_path_for("predict", name="churn") == "/predict/churn"

    async def ask() -> None:
        async with app.router.lifespan_context(app):
            assert predict("churn@prod", [[1, 2, 3]]) == [[321]]
            with pytest.raises(fastapi.HTTPException) as caught:
                predict("nobody", [[1, 2, 3]])
            assert caught.value.status_code == 404
            for rows in ([[1, 2]], [[1, 2, 3], [1]]):
                with pytest.raises(fastapi.HTTPException) as caught:
                    predict("churn", rows)
                assert caught.value.status_code == 422

    asyncio.run(ask())


def test_what_moving_says(store: pydedup.Store) -> None:
    store.close()
    places = {"STORE": STORE, "TARGET": "sqlite:///target.db"}
    steps = []
    for words in commands_of("docs/moving.md"):
        if words[0] in ("copy", "backup", "restore", "vacuum", "verify") and len(words) > 1:
            steps.append([places.get(word, word) for word in words])
    assert len(steps) >= 8
    for number, (command, *words) in enumerate(steps):
        if command == "restore":
            words = [words[0], f"sqlite:///restored{number}.db"]
        elif command == "copy" and words[-1] == "NEW":
            continue
        done = run_here(command, *words, *(["--replace"] if command == "backup" else []))
        assert done.returncode == 0, f"{command} {words}: {done.stderr}"
    (code,) = code_of("docs/moving.md")
    names = run(code)
    for name in ("source", "copy"):
        names[name].close()
    assert run_here("verify", "sqlite:///copy.db").returncode == 0


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not here")
def test_what_jq_makes_of_a_listing(store: pydedup.Store) -> None:
    store.close()
    (line,) = re.findall(r"^ {4}pydedup (ls .*) \| (jq .*)$", text_of("docs/cli.md"), re.M)
    listed = run_here(*shlex.split(line[0])).stdout
    done = subprocess.run(
        shlex.split(line[1]), input=listed, capture_output=True, text=True, check=True
    )
    assert "sentiment@1 0" in done.stdout.splitlines()
    assert "churn@1" not in done.stdout


# ---- faults -------------------------------------------------------------------------------------


def files_of_tests() -> dict[str, set[str]]:
    """Return the files that each test is in, from the repository's root."""
    found: dict[str, set[str]] = {}
    for folder in ("tests", "pydedup/testing"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(encoding="utf-8"), re.M):
                found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_faults_name_tests_that_exist() -> None:
    tests = files_of_tests()
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    table = text[text.index("## What is tested where") :]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    header, rows = [cell.strip() for cell in rows[0]], rows[2:]
    assert header[1:] == list(COLUMNS)
    assert len(rows) > 15
    for fault, *cells in rows:
        for column, cell in zip(header[1:], cells, strict=True):
            names = re.findall(r"`(test_\w+)`", cell)
            assert names or cell.strip() == "-", f"{fault} on {column}: {cell}"
            for name in names:
                files = tests.get(name, set())
                fitting = [file for file in files if not any(w in file for w in COLUMNS[column])]
                assert fitting, f"{fault} on {column}: {name} is in {files or 'no file'}"
