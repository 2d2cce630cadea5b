# SPDX-License-Identifier: Apache-2.0
"""Commands that lose their cluster, by Ray Client: they end, and say what to do."""

from __future__ import annotations

import os
import re
import subprocess
import urllib.request
from typing import Any

import psutil
import pytest

from pydedup.testing.program import PROGRAM

from .conftest import Sessions, slowly, started


@pytest.mark.long
def test_a_connection_that_is_lost_ends_the_commands(sessions: Sessions) -> None:
    """The server stayed for ever. A scoring began a Ray here, to ask that to end its workers."""
    # How long Ray Client tries to come back, and the cluster waits for it.
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "1"}
    options: dict[str, Any] = {"env": os.environ | environment, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    slowly(sessions, 0.06)  # half a minute of work for a worker that lives on, and of no core
    with started(**environment) as cluster:
        on = ["--on", cluster.client]
        serve = [*PROGRAM, "serve", sessions.url, *on, "--port", "0"]
        score = [*PROGRAM, "score", sessions.url, *on, "--model", "m@1", "--workers", "1"]
        score += ["--into", "p", "--query", sessions.slow_query, "--batch", "5"]
        with subprocess.Popen(serve, **options) as server:
            assert server.stdout is not None
            # Both lines: what readline() has taken ahead of the first, communicate() does not give.
            hello = server.stdout.readline() + server.stdout.readline()
            assert "pydedup serves 1 model" in hello
            with subprocess.Popen(score, **options) as scorer:
                sessions.wait_for_table()
                for one in psutil.Process(cluster.pid).children(recursive=True):
                    if "--mode=specific-server" in one.cmdline():
                        one.kill()
                (_, why), (_, error) = (one.communicate(timeout=120) for one in (scorer, server))
        assert scorer.returncode == server.returncode == 4, why + error
        lost = "pydedup: error: the connection to the Ray cluster was lost"
        assert f"{lost}; run it again to continue" in why
        assert "local Ray" not in why + error
        assert f"{lost}; if the cluster lives, it goes on serving, and the same command" in error
        address = re.search(r"http://[\d.:]+", hello)
        assert address is not None
        with urllib.request.urlopen(f"{address.group()}/v2/models/m") as answer:
            assert answer.status == 200
    sessions.end()  # what the processes of the cluster left open, when they were killed
    assert sessions.run("SELECT COUNT(*) FROM p")[0][0] < sessions.ROWS
