# SPDX-License-Identifier: Apache-2.0
"""``pydedup score --on``: a private Ray, Ray Client, and command lines that make no sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pydedup.cli import main

from .conftest import ROWS, Cluster, Scored
from .test_score import assert_right

MODEL = ["--model", "m@prod", "--quiet"]


#: The command, which beside its work looks at the private Ray that it has, and notes what it sees.
LOOKING = """
import contextlib, glob, json, os, sys
import pydedup.ray
from pydedup.cli import main
score = sys.modules["pydedup.ray.score"]
real = score.attached
seen = {}

@contextlib.contextmanager
def attached(on, **options):
    with real(on, **options) as ray:
        (job,) = ray._private.worker.global_worker.gcs_client.get_all_job_info().values()
        session = ray._private.worker._global_node.get_session_dir_path()
        assert os.environ.get("RAY_AUTH_TOKEN_PATH", session).startswith("/tmp/pydedup-ray-")
        seen["told"] = job.entrypoint
        seen["cpus"] = ray.cluster_resources()["CPU"]
        seen["address"] = ray.get_runtime_context().gcs_address
        seen["folders"] = [one for one in glob.glob("/tmp/pydedup-ray-*") if one in session]
        yield ray

score.attached = attached
status = main(sys.argv[4:])
seen["tokens"] = [name for name in os.environ if "RAY_AUTH" in name]
seen["data"] = "ray.data" in sys.modules
with open(sys.argv[1], "w") as file:
    json.dump(seen, file)
sys.exit(status)
"""


@pytest.mark.usefixtures("parquet")
def test_parquet_on_a_private_ray(scored_file: Scored, tmp_path: Path) -> None:
    """Of which nothing is left, and which is not told passwords."""
    files = ["--parquet-in", str(tmp_path / "in" / "a.parquet")]
    files += ["--parquet-in", str(tmp_path / "in" / "more"), "--columns", "id,f0,f1,f2"]
    out = str(tmp_path / "out")
    command = ["score", scored_file.url, *MODEL, *files, "--parquet-out", out, "--json"]
    command += ["--on", "local", "--workers", "1"]
    # In a process of its own: this one may be connected to another Ray.
    password = "postgresql://me:pa55word@db.example/prod"
    spaced = "mysql://me:two wo4ds@db.example/prod"
    without = {name: os.environ[name] for name in os.environ if "RAY_AUTH" not in name}
    done = _run(
        ["-c", LOOKING, str(tmp_path / "seen"), password, f"--source={spaced}", *command],
        env=without | {"HOME": str(tmp_path)},
    )
    assert done["rows"] == ROWS
    assert done["table"] == out
    table = pq.read_table(out)
    found = dict(zip(table["id"].to_pylist(), table["prediction"].to_pylist(), strict=True))
    assert_right(found, scored_file)
    seen = json.loads((tmp_path / "seen").read_text())
    assert "pa55word" not in seen["told"]
    assert "wo4ds" not in seen["told"]
    assert seen["told"].count("db.example") == 2
    assert seen["cpus"] == 1.0
    assert seen["address"]
    assert not seen["tokens"]
    assert not seen["data"]  # Ray Data takes a second to import, and is for datasets alone
    (folder,) = seen["folders"]
    assert not Path(folder).exists()
    # A token there would be wanted by the clusters that are started here later.
    assert not (tmp_path / ".ray").exists()


def test_a_query_by_ray_client(scored_file: Scored, cluster: Cluster) -> None:
    command = ["score", scored_file.url, *MODEL, "--query", scored_file.query, "--into", "p"]
    done = _run(["-m", "pydedup", *command, "--on", cluster.client, "--json"])
    assert (done["rows"], done["model"]) == (ROWS, "m@1")
    assert_right(scored_file.predictions("p"), scored_file)


def _run(arguments: list[str], env: dict[str, str] | None = None) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-P", *arguments], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--into", "p"], "give --query or --parquet-in: one of them is needed"),
        (["--query", "SELECT 1"], "give --into or --parquet-out: one of them is needed"),
        (["--query", "x", "--parquet-in", "y", "--into", "p"], "--parquet-in: not both"),
        (["--parquet-in", "y", "--into", "p"], "--parquet-in goes with --on"),
        (["--query", "x", "--parquet-out", "y"], "--parquet-out goes with --on"),
        (["--query", "x", "--into", "p", "--workers", "2"], "--workers goes with --on"),
        (["--query", "x", "--into", "p", "--max-deaths", "2"], "--max-deaths goes with --on"),
        (["--query", "x", "--into", "p", "--on", "http://x"], "is no address of Ray"),
        (["--query", "SELECT 1", "--into", "p", "--on", "x:1:2"], "is no address of Ray"),
    ],
)
def test_what_makes_no_sense_is_said(
    scored_file: Scored, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    if "--on" in options:
        options = [scored_file.query if one in ("x", "SELECT 1") else one for one in options]
    assert main(["score", scored_file.url, "--model", "m@1", *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_missing_ray_is_said(
    scored_file: Scored, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    options = ["--query", scored_file.query, "--into", "p", "--on", "local"]
    assert main(["score", scored_file.url, "--model", "m@1", *options]) == 5
    assert "pip install 'pydedup[ray]'" in " ".join(capsys.readouterr().err.split())
