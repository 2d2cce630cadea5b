# SPDX-License-Identifier: Apache-2.0
"""Repair from sources that are damaged or lack blocks; bases whose dtype is not sure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import codec, policies
from pydedup.cli.app import main
from pydedup.errors import PydedupError
from pydedup.maintenance.blocks_from import dtype_of_base
from pydedup.types import DType

from ..damage import flip_last

Model = dict[str, np.ndarray]
Change = Callable[[str, int, Callable[[bytearray], Any]], None]

SIDE = 64


def blocks(*seeds: int) -> Model:
    """A model of one block per seed."""
    parts = [np.random.default_rng(seed).standard_normal((SIDE, SIDE)) for seed in seeds]
    return {"w": np.concatenate(parts).astype(np.float32)}


def add(url: str, **models: Model) -> None:
    with pydedup.open(url) as store:
        for name, model in models.items():
            store.add(name, model, policy=policies.Exact(), block_shape=(SIDE, SIDE))


def pages(url: str, name: str) -> list[int]:
    with pydedup.open(url, mode="r") as store:
        return [row[1] for row in store._adapter.model_pages(store.info(name).info.id)]


def ruin(payload: bytearray) -> None:
    payload[100:] = bytes(len(payload) - 100)


def test_a_source_that_is_damaged_or_lacks_blocks_is_told_page_by_page(
    store_url: str,
    new_store: Callable[[str], str],
    change_page: Change,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    backend = store_url.partition(":")[0].replace("postgresql", "postgres")
    source = new_store(backend)
    add(store_url, a=blocks(1, 2, 3), b=blocks(4, 5))
    add(source, part=blocks(1, 2), other=blocks(4))
    (page_a,), (page_b,) = pages(store_url, "a"), pages(store_url, "b")
    for page in (page_a, page_b):
        change_page(store_url, page, ruin)
    (there,) = pages(source, "part")
    change_page(source, there, flip_last)
    with pydedup.open(store_url) as store:
        report = store.verify(repair_from=source).repair
        assert report is not None
        found = {
            missing.page: (
                missing.blocks,
                missing.damaged_there,
                missing.source_pages,
                missing.forgotten,
            )
            for missing in report.missing
        }
        # Of a page with a flipped bit nothing is taken, whatever block the bit is in.
        assert found == {page_a: (3, 2, (there,), 0), page_b: (1, 0, (), 0)}
        assert report.found_blocks == 1
        assert list(report.source_damage) == [f"page {there}"]
        assert "checksum" in report.source_damage[f"page {there}"]
    assert main(["verify", store_url, "--repair-from", source, "-q"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        f"not found: 3 blocks of page {page_a}, missed by a@1: the source has 2, but on damaged "
        f"pages of its own ({there}); the source lacks 1" in lines
    )
    assert f"not found: 1 block of page {page_b}, missed by b@1: the source lacks 1" in lines
    (told,) = [line for line in lines if "the source is damaged itself" in line]
    assert f"page {there}: corrupt page: its bytes do not match" in told
    assert "repair the source first, from elsewhere, or take another" in lines
    assert main(["verify", store_url, "--repair-from", source, "-q", "--json"]) == 1
    repair = json.loads(capsys.readouterr().out)["repair"]
    assert repair["missing"][0]["source_pages"] == [there]
    # As it says: once the source is whole, it helps.
    for number, model in enumerate((blocks(1, 2), blocks(3), blocks(5))):
        np.savez(tmp_path / f"{number}.npz", **model)
    assert main(["verify", source, "--repair-from", str(tmp_path / "0.npz"), "-q"]) == 0
    assert main(["verify", store_url, "--repair-from", source, "-q"]) == 1
    for number in (1, 2):
        main(["verify", store_url, "--repair-from", str(tmp_path / f"{number}.npz"), "-q"])
    with pydedup.open(store_url, mode="r") as store:
        assert store.verify().ok
        for name, model in (("a", blocks(1, 2, 3)), ("b", blocks(4, 5))):
            assert store.load(name)["w"].tobytes() == model["w"].tobytes()


def test_a_file_with_a_tensor_that_cannot_be_read_gives_the_others(
    store_url: str, change_page: Change, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"v": blocks(1)["w"], "w": blocks(2)["w"]}
    add(store_url, m=model)
    for page in pages(store_url, "m"):
        change_page(store_url, page, ruin)
    path = tmp_path / "m.npz"
    np.savez(path, **model)
    content = bytearray(path.read_bytes())
    at = content.index(model["v"].tobytes())
    content[at + 7] ^= 1  # its checksum, of zip, does not match any more
    path.write_bytes(content)
    assert main(["verify", store_url, "--repair-from", str(path), "-q"]) == 1
    out = capsys.readouterr().out
    assert "the source is damaged itself: tensor 'v': " in out
    assert "not found: 1 block of page" in out
    path.write_bytes(
        content[:at] + model["v"].tobytes() + content[at + len(model["v"].data.cast("B")) :]
    )
    assert main(["verify", store_url, "--repair-from", str(path), "-q"]) == 0


def test_any_weights_of_a_checkpoint_restore_it(
    store_url: str, change_page: Change, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    sets = {key: {"w": torch.from_numpy(blocks(at)["w"])} for at, key in ((1, "model"), (2, "ema"))}
    path = tmp_path / "m.pt"
    torch.save({**sets, "epoch": 3}, path)
    with pydedup.open(store_url) as store:
        for key in sets:
            assert store.add(key, path, weights_key=key).weights_key == key
    for key in sets:
        for page in pages(store_url, key):
            change_page(store_url, page, ruin)
    assert main(["verify", store_url, "--repair-from", str(path), "-q"]) == 0
    with pydedup.open(store_url, mode="r") as store:
        for key, state in sets.items():
            assert store.load(key)["w"].tobytes() == state["w"].numpy().tobytes()


def test_what_nobody_recorded_is_told(tmp_path: Path) -> None:
    """A page is gone with its rows, and what a lossy model had there with them."""
    url = f"sqlite:///{tmp_path}/store.db"
    with pydedup.open(url) as store:
        store.add("m", blocks(1, 2), policy=policies.Bounded(0.01), block_shape=(SIDE, SIDE))
        (page,) = pages(url, "m")
        with store._adapter.transaction():
            store._adapter.delete_pages([page])
        np.savez(tmp_path / "m.npz", **blocks(1, 2))
        report = store.verify(repair_from=tmp_path / "m.npz").repair
        assert report is not None
        ((missing),) = report.missing
        assert (missing.blocks, missing.forgotten, missing.damaged_there) == (2, 2, 0)


# ---- dtypes of bases ----------------------------------------------------------------------------


def near(base: Model, seed: int) -> Model:
    moved = base["w"] * (1 + 1e-4 * np.random.default_rng(seed).standard_normal(base["w"].shape))
    return {"w": moved.astype(np.float32)}


@pytest.mark.parametrize("sound", [True, False])
def test_a_damaged_delta_that_names_another_dtype(
    sound: bool, store_url: str, tmp_path: Path, change_page: Change
) -> None:
    """The base is looked for as what it can be: other deltas on it are nowhere else."""
    base = blocks(1, 2, 3)
    models = {"base": base, "near": near(base, 1), "nearer": near(base, 2)}
    with pydedup.open(store_url) as store:
        for name, model in models.items():
            store.add(name, model, block_shape=(SIDE, SIDE))
    source = f"sqlite:///{tmp_path}/source.db"
    with pydedup.open(source) as store:
        for name in ("base", "near"):
            store.add(name, models[name], block_shape=(SIDE, SIDE))
    (base_page,) = pages(store_url, "base")
    (near_page,) = set(pages(store_url, "near")) - {base_page}
    (nearer_page,) = set(pages(store_url, "nearer")) - {base_page}
    with pydedup.open(store_url) as store:
        store.remove("base")

    def misname(payload: bytearray) -> None:
        page = codec.Page(bytes(payload))
        for slot in page.slots:
            if slot["encoding"] >= codec.Encoding.DELTA:
                payload[int(slot["offset"]) + 2] = DType.F16.code
        assert dtype_of_base(page) == DType.F32.code

    change_page(store_url, base_page, ruin)
    change_page(store_url, near_page, misname)
    if not sound:
        change_page(store_url, nearer_page, lambda payload: payload.__setitem__(9, 77))
    with pydedup.open(store_url) as store:
        report = store.verify(repair_from=source)
        assert report.errors == []
        assert report.repair is not None
        assert report.repair.missing == ()
        for name in ("near", "nearer"):
            assert store.load(name)["w"].tobytes() == models[name]["w"].tobytes()


def test_a_source_that_cannot_be_looked_at_is_an_error_of_ours(tmp_path: Path) -> None:
    """Of one in another user's folder, too, the system's own error was raised."""
    with pydedup.open(tmp_path / "store.db") as store, pytest.raises(PydedupError):
        store.verify(repair_from=tmp_path / ("x" * 300))
