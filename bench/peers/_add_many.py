# SPDX-License-Identifier: Apache-2.0
"""Adds models in a process that imported what an add needs, and prints the seconds.

python bench/peers/_add_many.py URL POLICY WORKERS ALL_CORES FILE...
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import numpy as np

import pydedup
from pydedup.ingest import add
from pydedup.policies import Bounded, Exact, Lossless

POLICIES = {"exact": Exact(), "lossless": Lossless(), "bounded": Bounded(0.001)}


def main(url: str, policy: str, workers: str, all_cores: str, *paths: str) -> None:
    if all_cores == "True":
        add.config.at_most_threads = lambda _most: contextlib.nullcontext()
    with pydedup.open(url) as store:
        # What is imported with the first add is not what is measured.
        store.add("warm-up", {"w": np.zeros((64, 64), np.float32)}, policy=POLICIES[policy])
        models = {Path(path).stem: path for path in paths}
        started = time.perf_counter()
        store.add_many(models, policy=POLICIES[policy], workers=int(workers))
        print(time.perf_counter() - started)


if __name__ == "__main__":
    main(*sys.argv[1:])
