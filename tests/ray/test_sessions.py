# SPDX-License-Identifier: Apache-2.0
"""Workers and replicas close their sessions of a database before they end: none is lost to it."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import pyarrow as pa
import pytest

import pydedup.ray
from pydedup.ray.cluster import import_ray
from pydedup.testing.program import PROGRAM

from ..scoring.conftest import features
from .conftest import Cluster, Sessions

ROWS = Sessions.ROWS


@pytest.mark.parametrize("how", ["done", "stopped"])
@pytest.mark.parametrize("what", ["query", pytest.param("dataset", marks=pytest.mark.long)])
def test_workers_of_a_scoring_close_what_they_have_open(
    what: str, how: str, sessions: Sessions, connected: Any
) -> None:
    data: Any = sessions.slow_query if how == "stopped" else sessions.query
    columns = None
    if what == "dataset":
        x, columns = features(ROWS), ["id", "f0", "f1", "f2"]
        table = pa.table({"id": range(ROWS), **{f"f{i}": x[:, i] for i in range(3)}})
        data = import_ray("ray.data").from_arrow([table[i : i + 50] for i in range(0, ROWS, 50)])

    def progress(*_: object) -> None:
        if how == "stopped":
            raise KeyboardInterrupt

    def score() -> None:
        pydedup.ray.score(
            data,
            sessions.url,
            "m@1",
            into="p",
            columns=columns,
            workers=2 if what == "query" else 1,
            part_rows=50,
            batch=10,
            progress=progress,
        )

    if how == "stopped":  # while workers are at other parts
        with pytest.raises(KeyboardInterrupt):
            score()
    else:
        score()
    assert sessions.lost() == 0


@pytest.mark.parametrize(
    ("on", "number"),
    [
        ("by Ray Client", signal.SIGINT),
        # Here Ray's core is in the process, and has ideas of its own of this one.
        ("of the cluster", signal.SIGTERM),
        pytest.param("local", signal.SIGINT, marks=pytest.mark.long),
        pytest.param("local", signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_a_scoring_that_is_interrupted_closes_all_sessions(
    on: str, number: int, sessions: Sessions, cluster: Cluster
) -> None:
    at = {"by Ray Client": cluster.client, "of the cluster": cluster.address}.get(on, on)
    command = [*PROGRAM, "score", sessions.url, "--model", "m@1", "--into", "p", "--on", at]
    command += ["--query", sessions.slow_query, "--workers", "2", "--batch", "10"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0) as scoring:
        sessions.wait_for_rows()
        os.killpg(scoring.pid, number)  # as a terminal does, and timeout
        _, said = scoring.communicate()
    assert scoring.returncode == 128 + number, said
    told = said.splitlines()
    assert "interrupted" in told[-1]
    assert [line for line in told if not line.startswith("pydedup: ")] == []
    assert sessions.lost() == 0


@pytest.mark.long
def test_replicas_close_all_sessions(sessions: Sessions) -> None:
    """On a private Ray; test_serving.py looks at a cluster.

    A signal to all of the group ended Ray first, and a minute later the command, with status 1.
    """
    command = [*PROGRAM, "serve", sessions.url, "--on", "local", "--port", "0", "--replicas", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as serving:
        assert serving.stdout is not None
        assert "pydedup serves 1 model" in serving.stdout.readline()
        assert sessions.others()
        os.killpg(serving.pid, signal.SIGTERM)
        serving.communicate()
    assert serving.returncode == 0
    assert sessions.lost() == 0
