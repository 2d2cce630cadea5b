# SPDX-License-Identifier: Apache-2.0
"""What predicts loads what that takes, and no more; other names are there when asked for."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.graph import Graph, Node

#: What predicting from a model with a graph needs nothing of.
NEEDLESS = (
    "pydedup.accuracy",
    "pydedup.formats",
    "pydedup.ingest",
    "pydedup.maintenance",
    "pydedup.moving",
    "pydedup.policies",
    "pydedup.quotas",
    "pydedup.report",
    "pydedup.serving.onnx_session",
    "pydedup.serving.score",
    "pydedup.similarity",
    "pydedup.training",
    "pydedup.usage",
    "importlib.metadata",
    "click",
    "onnx",
    "onnxruntime",
    "rich",
    "torch",
)
GRAPH = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
WITH_MODULES = ("formats", "maintenance", "moving", "report")


def in_child(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_predicting_loads_nothing_needless(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'models.db'}"
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    with pydedup.open(url) as store:
        store.add("m", {"w": weights}, graph=GRAPH)
    code = """
import json, sys
before = set(sys.modules)  # an editable install or a .pth file may have loaded some
import pydedup
with pydedup.open(sys.argv[1], mode="r") as store:
    result = store.predict("m", [[1.0, 1.0, 1.0]])
print(json.dumps([result.tolist(), sorted(set(sys.modules) - before)]))
"""
    result, loaded = json.loads(in_child(code, url))
    assert result == [[3.0, 12.0]]
    assert "pydedup.serving.engine" in loaded
    assert [name for name in loaded if name.startswith(tuple(f"{n}." for n in NEEDLESS))] == []
    assert sorted(set(loaded) & set(NEEDLESS)) == []


def test_an_alias_and_a_removal_load_no_vacuum(tmp_path: Path) -> None:
    """Which took longer to load than they take."""
    url = f"sqlite:///{tmp_path / 'models.db'}"
    with pydedup.open(url) as store:
        for _ in range(2):
            store.add("m", {"w": np.ones(3)})
    code = """
import json, sys
import pydedup
with pydedup.open(sys.argv[1]) as store:
    store.alias("m", "prod", "2")
    removed = store.remove("m@1")
print(json.dumps([removed, sorted(sys.modules)]))
"""
    removed, loaded = json.loads(in_child(code, url))
    assert removed == ["m@1"]
    assert "pydedup.maintenance.versions" in loaded
    assert not {"pydedup.maintenance.vacuum", "pydedup.ingest", "pydedup.formats"} & set(loaded)


def test_the_command_line_loads_no_work() -> None:
    """Of a command and of what completes it in a shell; the formats of files alone took 35 ms."""
    loaded = json.loads(
        in_child("import json, sys, pydedup.cli.app; print(json.dumps(sorted(sys.modules)))")
    )
    rooms = ("ingest", "maintenance", "moving", "report", "formats.registry")
    needless = tuple(f"pydedup.{room}" for room in rooms)
    assert [name for name in loaded if name.startswith(needless)] == []


def test_names_are_there_after_import_pydedup_alone() -> None:
    """Each is asked for in a child of a process that has imported nothing else."""
    expressions = [
        "policies.Exact()",
        "policies.Accuracy",
        "errors.NotFoundError",
        "config.parse_bytes('1.5 kB') == 1500",
        "graph.Graph",
        "formats.registry.WRITABLE",
        "hashing.HASH_VERSION",
        "maintenance.verify.VerifyReport",
        "moving.copy.copy_models",
        "report.compare.Diff",
        "similarity.distances",
        "registry.schemes()",
        "usage.Usage",
        "__version__",
    ]
    code = """
import os, sys
import pydedup
for expression in sys.argv[1:]:
    if os.fork() == 0:
        there = False
        try:
            there = bool(eval(f"pydedup.{expression}"))
        finally:
            os._exit(not there)
    _, status = os.wait()
    if status:
        print(expression)
"""
    assert in_child(code, *expressions) == ""


@pytest.mark.parametrize("compiled", [False, True])
def test_ctrl_c_while_the_program_loads_is_said_in_one_line(compiled: bool) -> None:
    """It ended in forty lines of a traceback through whatever was just imported."""
    code = f"""
import sys

class Finder:
    def find_spec(self, name, *more):
        if name == "numpy" and {compiled}:
            raise ImportError("initialization failed") from KeyboardInterrupt()
        if name == "numpy":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
from pydedup.cli import main
sys.exit(main(["ls", "models.db"]))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr == "pydedup: interrupted, the store is as it was before\n"


def test_what_is_for_torch_says_how_to_get_it(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import pydedup
with pydedup.open(sys.argv[1]) as store:
    store.add("m", {"w": [1.0]})
    for call, given in (("attach", (0, "m")), ("detach", (0,)), ("load_torch", ("m",))):
        try:
            getattr(store, call)(*given)
        except pydedup.errors.UnsupportedFormatError as error:
            print(error)
"""
    said = in_child(code, str(tmp_path / "m.db")).splitlines()
    for call, line in zip(("attach", "detach", "load_torch"), said, strict=True):
        assert line.startswith(f"{call} needs something that is not installed (import of torch")
        assert line.endswith("install it with: pip install 'pydedup[torch]'")


def test_star_import_gives_the_public_names() -> None:
    code = "from pydedup import *; print(open, Store, PydedupError, policies.Lossless, __version__)"
    assert in_child(code).strip().endswith(pydedup.__version__)


def test_all_that_is_listed_is_there() -> None:
    listed = dir(pydedup)
    assert {"policies", "errors", "report", "__version__", "Store", "open"} <= set(listed)
    assert set(pydedup.__all__) <= set(listed)
    assert not {"Any", "TYPE_CHECKING", "annotations", "windows"} & set(listed)
    for name in listed:
        assert getattr(pydedup, name, None) is not None, name


def test_editors_know_what_the_help_names() -> None:
    """Pyright, as in VS Code, said of ``pydedup.errors`` that there is no such attribute."""
    assert pydedup.__doc__ is not None
    assert pydedup.__file__ is not None
    named = set(re.findall(r"^ {4}pydedup\.(\w+) ", pydedup.__doc__, re.M))
    assert {"errors", "policies", "config"} <= named <= set(dir(pydedup))
    tree = ast.parse(Path(pydedup.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "pydedup"
        for alias in node.names
    }
    assert named <= imported


@pytest.mark.parametrize("policy", ["Exact", "Lossless", "Bounded", "Accuracy"])
def test_editors_take_policies_for_policies(policy: str) -> None:
    """Pyright takes no ``ClassVar`` for a protocol's property, and refused ``policy=Exact()``."""
    annotated = getattr(policies, policy).__annotations__
    assert not [name for name, hint in annotated.items() if "ClassVar" in str(hint)]


@pytest.mark.parametrize("room", WITH_MODULES)
def test_packages_give_all_their_modules(room: str) -> None:
    package = importlib.import_module(f"pydedup.{room}")
    assert package.__file__ is not None
    names = {path.stem for path in Path(package.__file__).parent.glob("[!_]*.py")}
    for name in names:
        # Not getattr(): it gives what another module has imported, too.
        assert package.__getattr__(name).__name__ == f"pydedup.{room}.{name}"


@pytest.mark.parametrize("module", ["", *(f".{room}" for room in WITH_MODULES)])
def test_unknown_names_stay_unknown(module: str) -> None:
    here = importlib.import_module(f"pydedup{module}")
    with pytest.raises(AttributeError, match=rf"'pydedup{module}' has no attribute 'nothing'"):
        _ = here.nothing
    with pytest.raises(ImportError, match="nothing"):
        exec(f"from pydedup{module} import nothing", {})


@pytest.mark.parametrize("how", [["-c", "from pydedup import hashing"], ["-m", "pydedup.selftest"]])
def test_sources_without_a_core_say_how_to_get_what_is_installed(
    how: list[str], tmp_path: Path
) -> None:
    shutil.copytree(Path(__file__).parents[2] / "pydedup", tmp_path / "pydedup")
    # -S: without the finder of an editable install, which knows a core for the sources, too.
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
        "PYTHONPATH": str(Path(np.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-S", *how],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: {tmp_path / 'pydedup'} has no compiled core"), done.stderr
    assert "start Python in another folder, or with its option -P" in said
