# SPDX-License-Identifier: Apache-2.0
"""Attaching gives the memory of a module's weights back, measured as RSS of a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

NET = """
import torch

def net():  # 80 MiB and 80 MiB that stream, and 1 that is loaded
    return torch.nn.Sequential(
        torch.nn.Embedding(20_000, 1024),
        *(torch.nn.Linear(1024, 1024) for _ in range(20)),
        torch.nn.LSTM(1024, 64),
    ).eval()
"""

ADD = """
import sys
import pydedup

torch.manual_seed(1)
with pydedup.open(sys.argv[1]) as store:
    store.add("m", net())
"""

# What an add needed is not all given back by the C library, so that it has its own process.
SERVE = """
import gc, json, sys
import psutil
import pydedup

def rss():
    gc.collect()
    return (psutil.Process().memory_info().rss - before) / (1 << 20)

before = 0
ids = torch.arange(0, 20_000, 100)
with torch.no_grad(), pydedup.open(sys.argv[1], memory="16MiB") as store:
    torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.LSTM(1024, 64))(torch.ones(200, 1024))
    with torch.device("meta"):
        net()  # for which torch imports 70 MB, once
    before = psutil.Process().memory_info().rss
    torch.manual_seed(1)
    module = net()
    found = {"made": rss()}
    wanted = module(ids)[0]
    store.attach(module, "m")
    got = module(ids)[0]
    found["attached"] = rss()
    others = []
    for _ in range(5):
        with torch.device("meta"):
            others.append(net())
        store.attach(others[-1], "m")(ids)
    found["six"] = rss()
    store.detach(module)
    found["detached"] = rss()
    print(json.dumps({**found, "error": float((got - wanted).abs().max())}))
"""


def run(code: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", NET + code, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_memory_of_weights_is_given_back(tmp_path: Path) -> None:
    run(ADD, tmp_path / "m.db")
    found = json.loads(run(SERVE, tmp_path / "m.db"))
    assert found["error"] < 1e-4
    assert found["made"] > 155
    assert found["attached"] < 16 + 24, found
    assert found["six"] < found["attached"] + 5 * 3, found
    assert found["detached"] > 155
