# SPDX-License-Identifier: Apache-2.0
"""The program as it is run, on tiny stores: what it prints and how it ends."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import pydedup
from pydedup.cli.app import program
from pydedup.graph import Graph, Node
from pydedup.testing.program import PROGRAM, run_here, run_process

Run = Callable[..., subprocess.CompletedProcess[str]]

#: All commands but groups, by what is typed.
COMMANDS = tuple(
    f"{name} {inner}" if inner else name
    for name, command in program.commands.items()
    for inner in (command.commands if isinstance(command, click.Group) else [""])
)
#: What prints no result.
WITHOUT_JSON = ("serve",)


def checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Whatever happens, nobody is shown a traceback."""
    assert "Traceback" not in done.stderr + done.stdout
    return done


def succeed(*arguments: object, status: int = 0, run: Run = run_here, **options: Any) -> str:
    done = checked(run(*arguments, **options))
    assert done.returncode == status, (done.stdout, done.stderr)
    assert done.stderr == "" or done.stderr.startswith("pydedup: "), done.stderr
    return done.stdout


def document(*arguments: object, **options: Any) -> Any:
    """Return what is printed for a program."""
    return json.loads(succeed(*arguments, "--json", **options))


def fail(*arguments: object, status: int, **options: Any) -> str:
    """Run a command that fails; returns its one line."""
    done = checked(run_here(*arguments, **options))
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert re.fullmatch(r"pydedup: error: [^\n]+\n", done.stderr), done.stderr
    assert done.stdout == ""
    return done.stderr


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "dense.weight": rng.standard_normal((40, 60)).astype(np.float32),
        "dense.bias": np.arange(40, dtype=np.float32),
        "embedding.weight": rng.standard_normal((1000, 64)).astype(np.float32),
    }


def tuned(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    changed = {name: array.copy() for name, array in arrays.items()}
    changed["embedding.weight"][:10] += 0.5
    changed["extra"] = np.ones((3, 3), np.float16)
    return changed


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_file(weights(), folder / "base.safetensors")
    save_file(tuned(weights()), folder / "tuned.safetensors")
    np.savez(folder / "base.npz", **weights())
    (folder / "broken.safetensors").write_bytes((folder / "base.safetensors").read_bytes()[:5000])
    return folder


@pytest.fixture(scope="module")
def family(files: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of base@1, base@2 (an alias prod), and a classifier that predicts; for reading."""
    url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'family.db'}"
    succeed("add", url, "base@1", files / "base.safetensors", "--metadata", "task=imdb")
    succeed("add", url, "base@2", files / "tuned.safetensors", "--metadata", '{"epoch": 3}')
    succeed("alias", url, "base", "prod", "2")
    graph = Graph(
        inputs=("x",),
        outputs=("y",),
        nodes=(
            Node("linear", ("x",), "h", {"weight": "dense.weight", "bias": "dense.bias"}),
            Node("relu", ("h",), "y"),
        ),
    )
    with pydedup.open(url) as store:
        store.add("net@1", weights(), graph=graph)
    return url


def expected(x: np.ndarray) -> np.ndarray:
    arrays = weights()
    return np.maximum(x @ arrays["dense.weight"].T + arrays["dense.bias"], 0)


# ---- help ---------------------------------------------------------------------------------------


def test_help_names_every_command_and_exit_status() -> None:
    text = succeed("--help", run=run_process)
    for command in program.commands:
        assert re.search(rf"^  {command} ", text, re.MULTILINE), command
    for status in (0, 1, 2, 3, 4, 5, 6, 7, 70, 129, 130, 141, 143):
        assert re.search(rf"^  {status} ", text, re.MULTILINE), status
    assert succeed() == text
    assert succeed("-h") == text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str) -> None:
    text = succeed(*command.split(), "--help")
    assert text.startswith(f"Usage: pydedup {command} ")
    assert ("--json" in text) == (command not in WITHOUT_JSON)
    # What an option takes has a name of ours, not that of click's type.
    assert not re.search(r"^  -.* (TEXT|INTEGER|FLOAT|FILENAME|DIRECTORY)( |$)", text, re.M)


def test_help_starts_fast_and_loads_nothing_big() -> None:
    code = (
        "import sys; from pydedup.cli import main; main(['--help']);"
        "print([m for m in ('torch','onnx','onnxruntime','h5py','pyarrow','rich') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_version() -> None:
    assert succeed("--version", run=run_process) == f"pydedup {pydedup.__version__}\n"


# ---- in -----------------------------------------------------------------------------------------


def test_add_says_which_weights_of_a_checkpoint_it_took(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    url, path = f"sqlite:///{tmp_path / 's.db'}", tmp_path / "m.pth"
    states = {"params": {"w": torch.zeros(2000)}, "params_ema": {"w": torch.ones(2000)}}
    torch.save({**states, "iter": 3, "optimizers": []}, path)
    done = run_here("add", url, "m", path)
    assert done.returncode == 2
    assert "under 'params', 'params_ema': say which with weights_key (--weights-key)" in done.stderr
    assert not (tmp_path / "s.db").exists()
    said = succeed("add", url, "m", path, "--weights-key", "params_ema")
    assert (
        "m@1: its weights are those under 'params_ema'; left out, not stored: params, iter, optim"
    ) in said
    with pydedup.open(url, mode="r") as store:
        assert store.load("m")["w"].min() == 1
    (report,) = document("add", url, "m", path, "--weights-key", "params")["models"]
    assert report["weights_key"] == "params"


def test_add_reports_what_was_stored(files: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    report = document("add", url, "m", files / "base.safetensors")
    assert report["dry_run"] is False
    (model,) = report["models"]
    assert model["model"] == "m@1"
    assert report["logical_bytes"] == model["logical_bytes"]
    assert model["logical_bytes"] == sum(array.nbytes for array in weights().values())
    assert model["shared_blocks"] == 0
    again = document("add", url, "m", files / "base.npz")
    assert again["models"][0]["model"] == "m@2"
    assert again["stored_bytes"] == 0
    assert again["models"][0]["shared_blocks"] == model["blocks"]


def test_add_several_prints_a_row_each_and_the_sum(files: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    sources = ("a@1", files / "base.safetensors", "b@1", files / "tuned.safetensors")
    text = succeed("add", url, *sources, "--policy", "exact", "--block-shape", "64x64")
    assert [line.split()[0] for line in text.splitlines()] == [
        *("Model", "a@1", "b@1", "together", "added")
    ]
    assert document("info", url, "b")["policy"] == "exact"
    tensors = document("info", url, "a", "--tensors")["tensors"]
    assert {tensor["name"]: tensor["block_shape"] for tensor in tensors}["embedding.weight"] == [
        64,
        64,
    ]


def test_stacks_of_matrices_are_told_from_other_tensors(tmp_path: Path) -> None:
    url, path = f"sqlite:///{tmp_path / 's.db'}", tmp_path / "m.safetensors"
    save_file({"experts": np.ones((2, 128, 128)), "kernel": np.ones((4, 9, 9))}, path)
    succeed("add", url, "m", path)
    tensors = document("info", url, "m", "--tensors")["tensors"]
    assert {tensor["name"]: tensor["row_axes"] for tensor in tensors} == {"experts": 2, "kernel": 1}


@pytest.mark.parametrize("exists", [True, False])
def test_dry_run_writes_nothing(files: Path, tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "s.db"
    if exists:
        succeed("add", path, "m", files / "base.safetensors")
    before = path.read_bytes() if exists else None
    report = document("add", path, "n", files / "base.safetensors", "--dry-run")
    assert report["dry_run"] is True
    assert (report["stored_bytes"] == 0) == exists
    assert "nothing was written" in succeed("add", path, "n", files / "base.npz", "--dry-run")
    assert (path.read_bytes() if path.exists() else None) == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["s.db"] if exists else [])


def test_a_plain_path_is_a_store_too(files: Path, tmp_path: Path) -> None:
    succeed("add", "plain.db", "m", files / "base.npz", cwd=tmp_path)
    (model,) = document("ls", "sqlite:///plain.db", cwd=tmp_path)["models"]
    assert model["model"] == "m@1"
    assert succeed("ls", "plain.db", cwd=tmp_path).splitlines()[-1].startswith("1 model: ")


# ---- looking ------------------------------------------------------------------------------------


def test_ls(family: str) -> None:
    found = document("ls", family, run=run_process)
    by_model = {model["model"]: model for model in found["models"]}
    assert list(by_model) == ["base@1", "base@2", "net@1"]
    assert by_model["base@2"]["aliases"] == ["prod"]
    assert by_model["base@1"]["metadata"] == {"task": "imdb"}
    assert by_model["base@2"]["metadata"] == {"epoch": 3}
    shares = sum(model["share_bytes"] for model in found["models"])
    assert abs(shares - found["store"]["page_bytes"]) <= len(found["models"])
    lines = succeed("ls", family).splitlines()
    assert len(lines) == 5
    assert lines[0].split()[0] == "Model"
    assert "prod" in lines[2]
    assert lines[4].startswith("2 models in 3 versions: ")
    assert succeed("verify", family).startswith("sound: 2 models in 3 versions, ")
    for name, listed in (
        ("net", ["net@1"]),
        ("base", ["base@1", "base@2"]),
        ("base@1", ["base@1"]),
        ("base@prod", ["base@2"]),
    ):
        models = document("ls", family, name)["models"]
        assert [model["model"] for model in models] == listed


def test_info(family: str) -> None:
    found = document("info", family, "base@prod")
    assert found["model"] == "base@2"
    assert found["read_amplification"] == found["pages"] / found["least_pages"]
    assert found["certificate"]["policy"] == "lossless"
    assert found["n_tensors"] == 4
    text = succeed("info", family, "base", "--tensors")
    for word in ("read amplification", "prod", "lossless: the same bits", "embedding.weight"):
        assert word in text
    assert "1000x64" in text
    assert "metadata task" in succeed("info", family, "base@1")


def test_info_of_a_model_with_many_files_names_some(tmp_path: Path) -> None:
    folder, url = tmp_path / "model", str(tmp_path / "models.db")
    folder.mkdir()
    save_file({"w": np.ones((4, 4), np.float32)}, folder / "model.safetensors")
    for number in range(30):
        (folder / f"merges.{number:02}.txt").write_text(f"{number}")
    succeed("add", url, "m", str(folder))
    found = document("info", url, "m")["artifacts"]
    assert len(found) >= 30
    shown = succeed("info", url, "m")
    assert f" and {len(found) - 5} more" in " ".join(shown.split())
    assert shown.count("merges.") == 5


def test_stats(family: str) -> None:
    found = document("stats", family)
    assert (found["models"], found["versions"], found["tensors"]) == (2, 3, 10)
    assert found["logical_bytes"] > found["page_bytes"] > 0
    shown = succeed("stats", family)
    assert "2 in 3 versions" in shown
    assert re.search(r"saved +\d\d\.\d %", shown)


def test_stats_of_a_small_model(tmp_path: Path) -> None:
    """It was "nothing", and no word of why: the tables of SQLite take more than the model."""
    with pydedup.open(tmp_path / "s.db") as store:
        store.add("m", {"w": np.ones((64, 64), np.float32)})
    shown = succeed("stats", str(tmp_path / "s.db"))
    assert re.search(
        r"saved +nothing yet: beside its pages the database has [23]\d\d\.\d KiB", shown
    )


def test_explain(family: str) -> None:
    found = document("explain", family, "base@1")
    assert {other["model"] for other in found["shared_with"]} == {"base@2", "net@1"}
    assert found["removal_frees_bytes"] == 0
    assert found["shared_bytes"] == found["used_bytes"]
    text = succeed("explain", family, "base@2")
    assert "removing it frees" in text
    assert "extra" in text


def test_explain_names_some_of_many(tmp_path: Path) -> None:
    """A line of a tensor named all models that share it, however many."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    with pydedup.open(url) as store:
        store.add_many({f"m{number}": {"w": np.ones((9, 9))} for number in range(20)})
    text = succeed("explain", url, "m7")
    assert "m0@1, m1@1, m2@1, m3@1, m4@1 and 14 more" in text
    # Where there is no room, whole names are left out, and counted: 19 they are.
    for columns in (60, 65, 70, 75, 80, 90):
        narrow = run_here("explain", url, "m7", env={"COLUMNS": str(columns)}).stdout
        (row,) = [line for line in narrow.splitlines() if line.startswith("w ")]
        names, more = re.findall(r"m\d+@1", row), re.search(r" and (\d+) more", row)
        assert "…" not in row, row
        assert not more or len(names) + int(more.group(1)) == 19, row
    (tensor,) = document("explain", url, "m7")["tensors"]
    assert len(tensor["shared_with"]) == 19


def test_what_is_summed_up_is_cut_on_a_terminal(tmp_path: Path) -> None:
    """A line for each of thousands of models drove all else out of sight."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    with pydedup.open(url) as store:
        store.add_many({f"m{number}": {"w": np.ones((9, 9))} for number in range(1_050)})
    piped = succeed("explain", url, "m7")
    narrow = run_here("explain", url, "m7", env={"COLUMNS": "80"}).stdout
    assert len(re.findall(r"^m\d+@1 ", piped, re.MULTILINE)) == 1_049
    assert len(re.findall(r"^m\d+@1 ", narrow, re.MULTILINE)) == 40
    assert "\nand 1,009 more, in a pipe or with --json\n" in narrow
    assert narrow.splitlines()[-1].startswith("w ")
    assert "more, in a pipe" not in piped


def test_diff_tells_by_its_exit_status(family: str) -> None:
    assert document("diff", family, "base@1", "net")["same"] is True
    found = document("diff", family, "base@1", "base@2", status=1)
    states = {tensor["name"]: tensor["status"] for tensor in found["tensors"]}
    assert states == {
        "dense.bias": "same",
        "dense.weight": "same",
        "embedding.weight": "changed",
        "extra": "added",
    }
    text = succeed("diff", family, "base@1", "base@2", status=1)
    assert "they differ (2 same, 1 changed, 1 added)" in text
    assert "dense.bias" not in text
    assert "dense.bias" in succeed("diff", family, "base@1", "base@2", "--all", status=1)


def test_kernels() -> None:
    scalar = {"PYDEDUP_KERNEL": "scalar"}
    found = document("kernels", env=scalar, run=run_process)
    assert found["in_use"] == "scalar"
    assert "scalar" in {kernel["name"] for kernel in found["available"]}
    assert "in use: scalar" in succeed("kernels", env=scalar, run=run_process)
    # Notes included: a terminal of 80 characters left them out, and folded what is in use.
    assert max(map(len, succeed("kernels").splitlines())) <= 80


# ---- out ----------------------------------------------------------------------------------------


def test_export_gives_the_file_back(family: str, files: Path, tmp_path: Path) -> None:
    target = tmp_path / "back.safetensors"
    assert "wrote base@2" in succeed("export", family, "base@prod", target)
    original, back = load_file(files / "tuned.safetensors"), load_file(target)
    assert back.keys() == original.keys()
    assert all(back[name].tobytes() == array.tobytes() for name, array in original.items())
    done = document("export", family, "base@1", tmp_path / "x.weights", "--format", "npz")
    assert done["tensors"] == 3
    with np.load(tmp_path / "x.weights") as archive:
        assert archive["dense.weight"].tobytes() == weights()["dense.weight"].tobytes()


def test_load_prints_or_writes_tensors(family: str, tmp_path: Path) -> None:
    rows = {row["name"]: row for row in document("load", family, "base@1")["tensors"]}
    assert rows["dense.bias"]["max"] == 39.0
    assert rows["embedding.weight"]["shape"] == [1000, 64]
    assert "dense.bias" in succeed("load", family, "base@1")
    succeed("load", family, "base@1", "-o", tmp_path / "all.npz", "--dtype", "f16")
    with np.load(tmp_path / "all.npz") as archive:
        assert archive["dense.bias"].dtype == np.float16
    one = document("load", family, "base@1", "--tensor", "dense.bias")
    assert one["values"] == weights()["dense.bias"].tolist()
    succeed("load", family, "base@1", "-t", "dense.weight", "-o", tmp_path / "w.npy")
    assert np.load(tmp_path / "w.npy").tobytes() == weights()["dense.weight"].tobytes()


def test_load_writes_npy_to_standard_output(family: str) -> None:
    command = [*PROGRAM, "load", family, "base@1"]
    done = subprocess.run(
        [*command, "-t", "dense.bias", "-o", "-"], capture_output=True, check=True
    )
    assert np.load(io.BytesIO(done.stdout)).tolist() == weights()["dense.bias"].tolist()


def test_predict(family: str, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((5, 60)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x)
    (tmp_path / "x.json").write_text(json.dumps(x.tolist()))
    for source in ("x.npy", "x.npz", "x=x.npy", "x.json"):
        found = document("predict", family, "net", source, cwd=tmp_path)
        assert found["model"] == "net@1"  # the version that was asked, as `load` says it
        ((name, output),) = found["outputs"].items()
        assert name == "y"  # as it is called over HTTP, whatever form the input has
        assert (output["dtype"], output["shape"]) == ("f32", [5, 40])
        np.testing.assert_allclose(output["values"], expected(x), rtol=1e-4, atol=1e-4)
    piped = document("predict", family, "net", "-", input=json.dumps({"x": x.tolist()}))
    np.testing.assert_allclose(piped["outputs"]["y"]["values"], expected(x), rtol=1e-4, atol=1e-4)
    assert "f32 5x40" in succeed("predict", family, "net", "x.npy", cwd=tmp_path)
    for target in ("y.npy", "y.npz", "y.json"):
        succeed("predict", family, "net", "x.npy", "-o", target, cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected(x), rtol=1e-4, atol=1e-4)
    # It went into the file "instead of printing it", and was printed as well.
    wrote = document("predict", family, "net", "x.npy", "-o", "z.npy", cwd=tmp_path)
    outputs = {"y": {"dtype": "f32", "shape": [5, 40]}}
    assert wrote == {"model": "net@1", "path": "z.npy", "outputs": outputs}
    for target in ("no/y.npy", "no/y.json"):
        line = fail("predict", family, "net", "x.npy", "-o", target, status=2, cwd=tmp_path)
        assert f"{target} cannot be written: folder no does not exist" in line


def test_null_is_a_number_that_is_none(family: str) -> None:
    """It is what `--json` has for NaN, so that one model's answer may be asked of another."""
    given = json.dumps([[None, 1] + [0.5] * 58])
    found = document("predict", family, "net", "-", input=given)["outputs"]["y"]
    assert found["dtype"] == "f32"
    assert set(found["values"][0]) == {None}
    for odd in ('[["1", null]]', f"[[{10**400}, null]]", "[[{}, null]]"):
        line = fail("predict", family, "net", "-", status=2, input=odd)
        assert "standard input is no array of numbers" in line
    for odd in ("[[1, true, 3]]", "[[1.5, false]]", "[[true, null]]"):  # they were 1 and 0
        line = fail("predict", family, "net", "-", status=2, input=odd)
        assert "standard input has true or false beside other values" in line


def test_inputs_that_do_not_fit_are_told_in_our_words(family: str, tmp_path: Path) -> None:
    for given, said in (
        ("[[1, 2], [3]]", "x.json is no array: its lists differ in length or depth\n"),
        ("[[1, 2]]", "net@1 takes 60 features, and x has 2\n"),
        ("[1, 2]", "net@1 takes 60 features, and x has 2\n"),
        ('{"x": [[1, 2]]}', "net@1 takes 60 features, and x has 2\n"),
        ("5", "its last axis must be 60"),
    ):
        (tmp_path / "x.json").write_text(given)
        line = fail("predict", family, "net", "x.json", status=2, cwd=tmp_path)
        assert said in line


# ---- names and upkeep ---------------------------------------------------------------------------


def test_alias_rm_vacuum_verify(files: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    for version in ("1", "2"):
        succeed("add", url, f"m@{version}", files / "base.safetensors")
    succeed("add", url, "other@1", files / "tuned.safetensors")
    assert document("alias", url, "m", "prod", "1")["previous"] is None
    assert "m@prod is version 2 (it was 1)" in succeed("alias", url, "m", "prod", "2")
    assert "points at" in fail("rm", url, "m@2", status=2)
    assert "is gone" in succeed("alias", url, "m", "prod", "--delete")
    assert "--all-versions" in fail("rm", url, "m", status=2)
    removed = succeed("rm", url, "m@1").splitlines()
    assert removed == ["removed m@1", "`pydedup vacuum` gives the space back"]
    kept = succeed("rm", url, "m", "--keep", "1")
    assert kept == "m has no older versions; nothing was removed\n"
    succeed("add", url, "m@3", files / "tuned.safetensors")
    assert document("rm", url, "m", "--keep", "2") == {"dry_run": False, "removed": []}
    assert "alone" in fail("rm", url, "m@2", "--keep", "1", status=2)
    assert "alone" in fail("rm", url, "m", "--keep", "1", "--all-versions", status=2)
    assert "--keep" in fail("rm", url, "m", "--keep", "0", status=2)
    dry = ("rm", url, "m", "--keep", "1", "--dry-run")
    assert document(*dry) == {"dry_run": True, "removed": ["m@2"]}
    assert succeed(*dry) == "would remove m@2\ndry run: nothing was removed\n"
    assert document("rm", url, "m", "--keep", "1") == {"dry_run": False, "removed": ["m@2"]}
    succeed("add", url, "m@2", files / "base.safetensors")
    assert document("rm", url, "m@3") == {"dry_run": False, "removed": ["m@3"]}
    assert document("rm", url, "m", "--all-versions", "--yes") == {
        "dry_run": False,
        "removed": ["m@2"],
    }
    report = document("vacuum", url)
    assert report["amplification_after"] <= 1.1
    said = succeed("vacuum", url, "--grace", "60")
    assert "read amplification" in said
    assert re.search(r"^  pages in use +\d+ -> \d+, ", said, re.MULTILINE)
    checked = document("verify", url)
    assert (checked["ok"], checked["models"], checked["errors"]) == (True, 1, [])
    assert succeed("verify", url).startswith("sound: 1 model, ")


def test_what_sql_prints_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SQLite store is taken for one with functions: PL/Python is not everywhere."""

    class Functions:
        def function_statements(self, python_path: str | None) -> list[str]:
            return ["CREATE FUNCTION f()", f"-- {python_path}"]

        def drop_functions(self) -> None:
            dropped.append(True)

    dropped: list[bool] = []
    url = f"sqlite:///{tmp_path / 's.db'}"
    pydedup.open(url).close()
    monkeypatch.setattr("pydedup.cli.sql._functions", lambda adapter: Functions())
    shown = CliRunner().invoke(program, ["sql", "show", url, "--python-path", "/p", "--json"])
    assert json.loads(shown.stdout) == {
        "store": url,
        "statements": ["CREATE FUNCTION f()", "-- /p"],
    }
    plain = CliRunner().invoke(program, ["sql", "show", url])
    assert plain.stdout == "CREATE FUNCTION f();\n-- None;\n"
    gone = CliRunner().invoke(program, ["sql", "uninstall", url, "--json"])
    assert (json.loads(gone.stdout), dropped) == ({"store": url}, [True])
