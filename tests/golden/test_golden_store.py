# SPDX-License-Identifier: Apache-2.0
"""What an earlier version stored, this one reads: whole stores, written once and kept."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import pydedup

FOLDER = Path(__file__).parent


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_store_golden", FOLDER / "make_store_golden.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", ["store_v1.db.gz"])
def test_a_golden_store_is_read_and_written_on(file: str, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(gzip.decompress((FOLDER / file).read_bytes()))
    wanted = _maker().models()
    with pydedup.open(path, mode="r") as store:
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])
        assert {info.address for info in store.models()} == set(wanted)
        for address, model in wanted.items():
            loaded = store.load(address)
            assert list(loaded) == list(model)
            for name, array in model.items():
                assert loaded[name].dtype == array.dtype
                assert loaded[name].shape == array.shape
                assert loaded[name].tobytes() == array.tobytes()
        assert store.info("base@prod").info.metadata == {"task": "golden"}
        assert store.info("tuned").certificate["policy"] == "exact"
        ids = np.array([[1, 5, 299], [0, 0, 7]])
        model = wanted["tuned@1"]
        logits = model["embedding"][ids].mean(axis=1) @ model["head.weight"].T
        np.testing.assert_allclose(store.predict("tuned", ids), logits, rtol=1e-5, atol=1e-6)
        before = {info.address: info.digest for info in store.models()}
    with pydedup.open(path) as store:
        again = store.add("again", wanted["base@1"])
        assert again.stored_bytes == 0, "digests of this version are those of the golden one"
        store.remove("tuned")
        store.vacuum()
        assert store.verify().errors == []
        assert store.info("base").info.digest == before["base@1"] == store.info("again").info.digest
