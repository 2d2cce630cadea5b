# SPDX-License-Identifier: Apache-2.0
"""16 models added at once by one worker and by two.

    python bench/peers/parallel_ingest.py [--only AREA] [--json]

Models are safetensors files of 8 tensors of 1024 x 1024 f32 from N(0, 0.02), 33.5 MB each, 537 MB
together. "A quarter moved": a family in which each has noise of 1 % of that spread on every weight
of 2 of the 8 tensors; "all moved": on all of them; "strangers": 16 models drawn by themselves. Each
add is a process of its own into an empty store, in which nothing imports PyTorch, and only the call
of `add_many` is timed. Two
workers are held against one (`workers=`: so many threads in all), and against one whose kernels
use both cores all the same, as no user has it any more. They take turns; medians of ROUNDS (an
environment variable; 5).
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from _stored import Finding, main, said
from databases import places
from numpy.typing import NDArray
from safetensors.numpy import save_file

MODELS, TENSORS, SIDE, SPREAD = 16, 8, 1024, 0.02
#: Workers of each side, and whether computations may take more threads.
SIDES = {
    "two workers": (2, False),
    "one worker": (1, False),
    "one worker, all cores in its kernels": (1, True),
}
ROUNDS = int(os.environ.get("ROUNDS", "5"))
AIM = 1.3

_ADDS = Path(__file__).with_name("_add_many.py")


def drawn(rng: np.random.Generator, spread: float = SPREAD) -> NDArray[np.float32]:
    return (rng.standard_normal((SIDE, SIDE), np.float32) * spread).astype(np.float32)


def files(folder: Path, moved: int | None) -> list[Path]:
    """Write the models; ``moved`` tensors of each are noisy copies of the first's, None: none."""
    rng = np.random.default_rng(0)
    base = {f"layer{i}": drawn(rng) for i in range(TENSORS)}
    paths = []
    for number in range(MODELS):
        own = dict(base)
        for i, (name, array) in enumerate(base.items()):
            if moved is None:
                own[name] = drawn(rng)
            elif number and i < moved:
                own[name] = array + drawn(rng, 0.01 * SPREAD)
        paths.append(folder / f"m{number:02}.safetensors")
        save_file(own, paths[-1])
    return paths


def timed(url: str, policy: str, side: str, paths: Sequence[Path]) -> float:
    """Add the models in a process of its own; return the seconds."""
    workers, more = SIDES[side]
    command = [sys.executable, str(_ADDS), url, policy, str(workers), str(more)]
    done = subprocess.run([*command, *map(str, paths)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def beside(
    backend: str, family: str, moved: int | None, policies: Sequence[str]
) -> Iterator[Finding]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        paths = files(folder, moved)
        place = stack.enter_context(places())[backend]
        for policy in policies:
            spent: dict[str, list[float]] = {side: [] for side in SIDES}
            for number in range(ROUNDS + 1):
                for side, seconds in spent.items():
                    url = place()
                    one = timed(url, policy, side, paths)
                    Path(url.removeprefix("sqlite:///")).unlink(missing_ok=True)  # they are large
                    if number:  # the first round warms up the page cache and the server
                        seconds.append(one)
            medians = {side: statistics.median(seconds) for side, seconds in spent.items()}
            case = f"{backend}, {family}, {policy}"
            said(f"{case}: {spent}")
            for side, median in medians.items():
                yield Finding(case, side, median, "s")
            two = medians["two workers"]
            yield Finding(case, "of one worker", medians["one worker"] / two, "x", least=AIM)
            all_cores = medians["one worker, all cores in its kernels"]
            yield Finding(case, "of one worker, all cores", all_cores / two, "x")


def quarter() -> Iterator[Finding]:
    """Yield families that have three quarters of their tensors in common."""
    yield from beside("SQLite", "a quarter moved", TENSORS // 4, ["lossless"])


def quarter_postgres() -> Iterator[Finding]:
    """Yield the same in PostgreSQL."""
    yield from beside("PostgreSQL", "a quarter moved", TENSORS // 4, ["lossless"])


def moved() -> Iterator[Finding]:
    """Yield families in which every weight moved."""
    yield from beside("SQLite", "all moved", TENSORS, ["lossless", "bounded"])


def moved_postgres() -> Iterator[Finding]:
    """Yield the same in PostgreSQL."""
    yield from beside("PostgreSQL", "all moved", TENSORS, ["lossless"])


def strangers() -> Iterator[Finding]:
    """Yield models that have nothing in common."""
    yield from beside("SQLite", "strangers", None, ["lossless", "exact"])


if __name__ == "__main__":
    main(__doc__, [quarter, quarter_postgres, moved, moved_postgres, strangers])
