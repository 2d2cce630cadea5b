# SPDX-License-Identifier: Apache-2.0
"""What a newcomer sees first, `make demo`, on terminals that are narrow."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from pydedup.testing.terminal import run_on_terminal

LIBRARY = Path(__file__).resolve().parents[3] / "scripts" / "lib.sh"

#: The demo with figures that are made up: those of a real one take half a minute.
_SHOWS = """
import sys
from types import SimpleNamespace as Some
import pydedup.demo.run
from pydedup.cli import main
from pydedup.demo import show

def run(url, cache, screen, retrain):
    report = Some(
        model="imdb-frozen@1", logical_bytes=80 << 20, stored_bytes=9 << 20, blocks=9_999,
        shared_blocks=999, delta_blocks=8_888, pages=10,
    )
    show.sizes(screen, [report], Some(logical_bytes=8 << 30, stored_bytes=2 << 30, saved_share=0.7))
    show.pair(screen, "imdb@1", "imdb-frozen@1", [report])
    outputs = Some(texts=4_981, max_difference=9.5e-7, same_class=4_981, agrees=True, ties=0)
    found = Some(
        model="imdb-frozen@1", outputs=outputs, accuracy_in_memory=0.8858,
        accuracy_from_store=0.8858, seconds_in_memory=1.5, seconds_from_store=0.5,
    )
    show.predictions(screen, [found])

pydedup.demo.run.run_demo = run
sys.exit(main(["demo"]))
"""


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_the_demo_fits(columns: int) -> None:
    """Numbers were cut ("0.88…"), and sentences folded within words, the result among them."""
    pytest.importorskip("torch")
    status, shown = run_on_terminal([sys.executable, "-P", "-c", _SHOWS], columns)
    assert status == 0, shown
    shown = re.sub(r"\x1b\[[0-9;?]*m", "", shown)
    assert max(map(len, shown.splitlines())) <= columns
    assert "…" not in shown
    text = " ".join(shown.split())
    assert "After: 2,048.0 MiB, the whole database. Saved: 70.0 %, without loss." in text
    assert "so only 10.0 % of its blocks are shared." in text
    assert "the machine's other work included" in text
    assert ("imdb-frozen@1 80.0 MiB 9.0 MiB 11.2 %" in text) == (columns > 40)
    assert ("imdb-frozen@1 4,981 0.8858 0.8858 9.5e-07" in text) == (columns > 40)
    assert ("4,981 1.50 0.50" in text) == (columns == 80)


@pytest.mark.parametrize("columns", [40, 80])
def test_a_step_stays_on_one_line(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on in a next one, and the terminal got two more lines with each second."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(LIBRARY, tmp_path / "scripts")
    monkeypatch.chdir(tmp_path)
    script = """
        . scripts/lib.sh
        last_line() { printf '%060d' 7; touch looked; }
        work() { until [ -e looked ]; do sleep 0.1; done; }
        step "install with the extra 'demo'" log work
    """
    status, shown = run_on_terminal(["bash", "-c", script], columns)
    assert status == 0
    *lines, last = shown.split("\r\x1b[K")[1:]
    assert lines
    assert {len(line) for line in lines} == {columns - 1}
    assert last.startswith(" ok install with the extra 'demo' (")
