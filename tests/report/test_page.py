# SPDX-License-Identifier: Apache-2.0
"""A report in a real browser: it loads nothing, hides nothing, and says what the store says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import text
from pydedup.layout import PAGE_BYTES
from pydedup.replacement import POLICIES, Trace, replay
from pydedup.testing.browser import Page

Show = Callable[..., Page]

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{7*7}}</title></style>"
TENSOR = "</svg><svg onload=alert(3)>.weight"


@pytest.fixture(scope="module")
def trace(family_url: str) -> Trace:
    rng = np.random.default_rng(3)
    names = ["reviews@1", "reviews-exact@1", "reviews-near@1", "other@1", "reviews-bounded@1"]
    with pydedup.open(family_url, mode="r") as store:
        store.record()
        for _ in range(60):
            store.predict(names[min(int(rng.zipf(1.5)) - 1, 4)], rng.integers(0, 2000, (2, 8)))
        return store.recorded()


@pytest.fixture(scope="module")
def html(family_url: str, trace: Trace) -> str:
    with pydedup.open(family_url, mode="r") as store:
        return store.report(
            models=["reviews-near@1", f"{HOSTILE}@<b>1</b>", "x" * 240], trace=trace
        )


@pytest.fixture
def page(html: str, show: Show) -> Page:
    return show(html)


def values(page: Page, selector: str) -> list[float]:
    """Return the exact numbers behind what is shown."""
    script = f"[...document.querySelectorAll({selector!r})].map(e => Number(e.value))"
    found: list[float] = page.run(script)
    return found


def texts(page: Page, selector: str) -> list[str]:
    script = f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)"
    found: list[str] = page.run(script)
    return found


def rows(page: Page, table: str) -> dict[str, list[float]]:
    """Return the numbers of each row of a table under the text of its heading."""
    script = (
        f"[...document.querySelectorAll('#{table} tbody tr')].map(r => "
        "[(r.querySelector('th bdi') || r.querySelector('th')).textContent, "
        "[...r.querySelectorAll('data')].map(d => Number(d.value))])"
    )
    return dict(page.run(script))


def test_it_loads_nothing_and_nothing_complains(page: Page) -> None:
    assert page.complaints == []
    (alone,) = page.requests
    assert alone.startswith("file:///")
    assert page.run("document.scripts.length + document.images.length") == 0
    # And could not if it wanted to.
    page.run("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    page.run("new Promise(done => setTimeout(done, 50))")
    assert len(page.requests) == 1 or "Content Security Policy" in "".join(page.complaints)
    assert "Content Security Policy" in "".join(page.complaints)


def test_totals_are_those_of_the_store(page: Page, family_url: str) -> None:
    with pydedup.open(family_url, mode="r") as store:
        stats = store.stats()
        usage = store.stats(by="tenant")
    assert values(page, "#logical data") == [stats.logical_bytes]
    assert values(page, "#stored data") == [stats.stored_bytes]
    assert values(page, "#distinct data") == [stats.distinct_blocks]
    assert values(page, "#n-pages data") == [stats.pages]
    assert texts(page, "#saved") == [text.percent(stats.saved_share)]
    steps = [stats.logical_bytes, usage.used_bytes, stats.page_bytes, stats.stored_bytes]
    assert values(page, "#steps data") == steps
    assert texts(page, "#steps data") == [text.size(step) for step in steps]


def test_models_are_counted_as_explain_counts_them(page: Page, family_url: str) -> None:
    shown = rows(page, "models")
    with pydedup.open(family_url, mode="r") as store:
        infos = store.models()
        assert len(shown) == len(infos) == 8
        for info in infos:
            explained, figures = store.explain(info.address), store.info(info.address)
            assert shown[text.clean(info.address)] == [
                info.logical_bytes,
                explained.used_bytes,
                explained.shared_bytes,
                explained.removal_frees_bytes,
                figures.pages,
            ]


def test_the_heat_map_has_the_right_cells(page: Page, family_url: str) -> None:
    labels = page.run(
        "[...document.querySelectorAll('svg.map text.label')]"
        ".map(t => t.querySelector('title').textContent)"
    )
    cells = page.run(
        "[...document.querySelectorAll('svg.map rect')].map(r => [Number(r.dataset.row), "
        "Number(r.dataset.column), Number(r.getAttribute('fill-opacity')), r.textContent])"
    )
    with pydedup.open(family_url, mode="r") as store:
        address = {text.clean(info.address): info for info in store.models()}
        assert sorted(labels) == sorted(address)
        assert len(cells) == len(labels) ** 2
        common = {name: _common(store, info.address) for name, info in address.items()}
        used = {
            name: sum(blocks for _, _, blocks, _ in store._adapter.model_pages(info.id))
            for name, info in address.items()
        }
    for row, column, opacity, words in cells:
        mine, other = labels[row], labels[column]
        if mine == other:
            assert words == f"{mine}: {text.plural(used[mine], 'block')}"
            continue
        both = common[mine].get(other, 0)
        share = both / used[mine]
        assert words.startswith(f"{mine}: {both:,} of its {used[mine]:,} blocks ")
        assert words.endswith(f" are in {other} too")
        assert opacity == pytest.approx(0.1 + 0.9 * share if both else 0.0, abs=1e-3)
    # Models that share are side by side: the stranger is at one end or the other of its family.
    kin = [i for i, label in enumerate(labels) if label.startswith(("reviews", "<script"))]
    assert kin == list(range(min(kin), min(kin) + 5))


def _common(store: pydedup.Store, name: str) -> dict[str, int]:
    return {text.clean(one.model): one.blocks for one in store.explain(name).shared_with}


def test_names_are_text_whatever_they_hold(page: Page) -> None:
    names = texts(page, "#models th bdi")
    assert f"{HOSTILE}@<b>1</b>" in names
    assert "<i>prod</i>" in names
    # What would turn the text around is shown as what it is.
    assert "evil\\u202egnp.exe@1" in names
    assert "\u202e" not in page.run("document.documentElement.outerHTML")
    assert TENSOR in texts(page, "#blocks th bdi")
    assert page.run("document.querySelectorAll('b b, h1 b, #models b, i, img, script').length") == 0
    assert page.run("document.querySelectorAll('[onload], [onerror]').length") == 0
    assert page.run("document.title").endswith("pydedup report")


def test_blocks_are_shown_where_they_lie(page: Page, family_url: str) -> None:
    with pydedup.open(family_url, mode="r") as store:
        wanted = {one.tensor.name: one for one in store.explain("reviews-near@1").tensors}
    script = (
        "[...document.querySelector('#blocks details').querySelectorAll('tbody tr')].map(r => ["
        "r.querySelector('bdi').textContent, [...r.querySelectorAll('data')].map(d => +d.value), "
        "Object.fromEntries([...r.querySelectorAll('path:not(.gaps)')].map("
        "p => [p.getAttribute('class'), p.getAttribute('d')]))])"
    )
    shown = page.run(script)
    assert [name for name, _, _ in shown] == list(wanted)
    for name, numbers, paths in shown:
        one = wanted[name]
        assert numbers == [one.blocks, one.shared_blocks, one.delta_blocks]
        cells = {kind: _cells(path) for kind, path in paths.items()}
        assert sum(map(len, cells.values())) == one.blocks
        assert len(cells.get("k1", ())) == one.delta_blocks
        assert len(cells.get("k0", ())) == one.blocks - one.shared_blocks - one.delta_blocks
    (embedding,) = [paths for name, _, paths in shown if name == "embedding.weight"]
    # The first rows of the embedding are deltas; it is laid in columns of 11 blocks.
    deltas = sorted(_cells(embedding["k1"]))
    assert deltas == [(0, row) for row in range(10)]


def _cells(path: str) -> list[tuple[int, int]]:
    """Return the (column, row) of each cell that a path fills."""
    found = []
    for start, top, stop in re.findall(r"M(\d+) (\d+)H(\d+)v9H\1z", path):
        found += [(x // 10, int(top) // 10) for x in range(int(start), int(stop), 10)]
    return found


def test_pages_by_how_full_they_are(page: Page, family_url: str) -> None:
    with pydedup.open(family_url, mode="r") as store:
        sizes = [row.payload_bytes for row in store._adapter.page_rows()]
    bins = [0] * 10
    for size in sizes:
        bins[min(size * 10 // PAGE_BYTES, 9)] += 1
    bars = page.run("[...document.querySelectorAll('#pages rect')].map(r => +r.dataset.count)")
    assert bars == bins


def test_guarantees(page: Page, family_url: str) -> None:
    shown = rows(page, "policies")
    assert {policy: numbers[0] for policy, numbers in shown.items()} == {
        "lossless": 6,
        "exact": 1,
        "bounded": 1,
    }
    (certificate,) = texts(page, "#certificates td")
    with pydedup.open(family_url, mode="r") as store:
        largest = store.info("reviews-bounded@1").certificate["largest_block_error"]
    assert f"measured: by at most {text.at_most(largest)}" in certificate


def test_curves_are_what_a_replay_gives(page: Page, trace: Trace) -> None:
    script = (
        "[...document.querySelectorAll('#misses tbody tr')]"
        ".map(r => [...r.querySelectorAll('data')].map(d => Number(d.value)))"
    )
    policies = [*POLICIES, "optimum"]
    assert texts(page, "#misses thead th") == ["Memory", *policies]
    shown = page.run(script)
    assert len(shown) >= 5
    for memory, *ratios in shown:
        wanted = [1 - replay(trace, int(memory), policy).hit_ratio for policy in policies]
        assert ratios == pytest.approx(wanted)
    lines = page.run(
        "[...document.querySelectorAll('#cache polyline')].map(l => "
        "[l.dataset.series, "
        "l.getAttribute('points').split(' ').map(p => p.split(',').map(Number))])"
    )
    assert [name for name, _ in lines] == policies
    for number, (_, points) in enumerate(lines):
        # 16 is the top, 288 the bottom of the chart.
        heights = [(288 - y) / 272 for _, y in points]
        assert heights == pytest.approx([row[1 + number] for row in shown], abs=1e-3)
        assert [x for x, _ in points] == sorted(x for x, _ in points)
    called = rows(page, "called")
    assert sum(numbers[0] for numbers in called.values()) == 60
    assert "reviews@1" in called


def test_long_names_of_tensors_are_cut_into_lines_at_their_dots(tmp_path: Path, show: Show) -> None:
    """They were at any letter: "embeddings.position_embeddings.weigh", "t"."""
    name = "embeddings.position_embeddings.LayerNorm.of_the_first_layer.weight"
    with pydedup.open(tmp_path / "s.db") as store:
        store.add("m", {name: np.ones(4, np.float32)})
        page = show(store.report(), width=420)
    lines = page.run(
        """(() => {
            const found = [], range = document.createRange();
            const walk = document.createTreeWalker(
                document.querySelector("#blocks tbody th"), NodeFilter.SHOW_TEXT);
            for (let node; (node = walk.nextNode()); )
                for (let i = 0; i < node.length; i++) {
                    range.setStart(node, i), range.setEnd(node, i + 1);
                    const top = Math.round(range.getBoundingClientRect().top);
                    if (!found.length || found.at(-1)[0] !== top) found.push([top, ""]);
                    found.at(-1)[1] += node.data[i];
                }
            return found.map(line => line[1]);
        })()"""
    )
    assert "".join(lines) == name
    assert len(lines) > 1
    assert all(line[-1] in "._" for line in lines[:-1]), lines


@pytest.mark.parametrize("width", [320, 390, 768])
def test_it_fits_a_phone(html: str, show: Show, width: int) -> None:
    page = show(html, width=width, height=800)
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.body.scrollWidth") <= width


def test_it_is_light_or_dark_as_the_reader_wishes(html: str, show: Show) -> None:
    contrasts = []
    for dark in (False, True):
        page = show(html, dark=dark)
        ground, ink = page.run(
            "['background-color', 'color'].map(p => getComputedStyle(document.body)"
            ".getPropertyValue(p).match(/\\d+/g).reduce((a, b) => a + Number(b), 0))"
        )
        contrasts.append(ground - ink)
    light, dark_one = contrasts
    assert light > 400
    assert dark_one < -400


def test_who_cannot_see_it_can_hear_it(page: Page) -> None:
    assert page.run("document.documentElement.lang") == "en"
    unnamed = "[...document.querySelectorAll('svg')].filter(s => !s.getAttribute('aria-label')"
    assert page.run(f"{unnamed} && s.getAttribute('aria-hidden') !== 'true').length") == 0
    assert page.run("[...document.querySelectorAll('th')].every(t => t.scope)")
    assert page.run(
        "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))"
    )
    assert page.run("document.querySelectorAll('h1').length") == 1


def test_labels_of_the_heat_map_are_whole(tmp_path: Path, show: Show) -> None:
    """Of those with wide letters the beginning was outside of the picture."""
    with pydedup.open(tmp_path / "s.db") as store:
        for name in ("n" * 60, "模型" * 30):
            store.add(name, {"w": np.ones(4, np.float32)})
        page = show(store.report())
    labels = "[...document.querySelectorAll('.map .label')]"
    assert page.run(f"{labels}.map(label => label.getBBox().x >= 0)") == [True, True]
    shown = page.run(f"{labels}.map(label => label.firstChild.data)")
    assert shown == ["n" * 14 + "…" + "n" * 11 + "@1", "模型模型模型模…型模型模型@1"]


def test_an_empty_store_and_one_model(tmp_path: Path, show: Show) -> None:
    with pydedup.open(tmp_path / "s.db") as store:
        page = show(store.report())
        assert page.complaints == []
        assert values(page, "#logical data") == [0]
        assert "The store is empty" in page.run("document.body.textContent")
        assert page.run("document.querySelector('#pages svg')") is None
        assert page.run(
            "[...document.querySelectorAll('table')].every(t => t.tBodies[0].rows.length)"
        )
        store.add("one@1", {"w": np.ones((64, 64), np.float32), "nothing": np.ones((0, 4))})
        page = show(store.report())
        assert "nothing to share" in page.run("document.body.textContent")
        assert rows(page, "models")["one@1"][0] == 64 * 64 * 4


def test_hundreds_of_models(tmp_path: Path, show: Show) -> None:
    rng = np.random.default_rng(0)
    roots = [rng.standard_normal((128, 64), np.float32) for _ in range(50)]
    models: dict[str, Any] = {
        f"family-{n % 50}-{n:04}@1": {
            "shared": roots[n % 50],
            "own": np.full(1 + n % 7, n, np.float32),
        }
        for n in range(300)
    }
    with pydedup.open(tmp_path / "s.db") as store:
        store.add_many(models, policy=pydedup.policies.Exact())
        html = store.report()
        logical = store.stats().logical_bytes
        marginal = store.stats(by="tenant").values[0].marginal_bytes
        shared = sum(store.explain(f"family-{n}-{n:04}@1").shared_with[0].bytes for n in range(50))
    assert len(html) < 2_000_000
    page = show(html)
    assert page.complaints == []
    shown = rows(page, "models")
    assert len(shown) == 101
    assert sum(numbers[0] for numbers in shown.values()) == logical
    # What only one uses, and what a family shares, is all that there is.
    rest = shown.pop("200 smaller models more")
    assert sum(numbers[3] for numbers in shown.values()) + rest[1] + shared == marginal
    assert len(page.run("[...document.querySelectorAll('svg.map text.label')]")) == 40
    diagonal = page.run(
        "[...document.querySelectorAll('svg.map rect')].filter(r => r.dataset.row === "
        "r.dataset.column).map(r => r.textContent)"
    )
    assert all(re.search(r"-00\d\d@1 \+5: 66.7 % among themselves", words) for words in diagonal)
    assert "300 models in 50 families" in page.run("document.body.textContent")
