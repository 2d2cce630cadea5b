# SPDX-License-Identifier: Apache-2.0
"""Every example of an operator that the package onnx has, beside ONNX Runtime itself."""

from __future__ import annotations

import functools
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pydedup
from pydedup.errors import PydedupError

from .onnx_models import onnx, ort

_PARTS = 8
#: Types of inputs and outputs that are refused, as messages call them.
_REFUSED = ("tensor(string)", "seq(tensor(", "optional(")


@functools.cache
def examples() -> list[Any]:
    """Return all examples of tensors, not of sequences of them: models, each with inputs."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():  # casts of what another dtype does not hold
        warnings.simplefilter("ignore")
        found = list(collect_testcases(""))
    kinds = (np.ndarray, np.generic)
    return [case for case in found if all(isinstance(x, kinds) for x in case.data_sets[0][0])]


def of_runtime(path: Path, given: dict[str, Any]) -> list[NDArray[Any]] | None:
    """Return what ONNX Runtime gives, None where it does not know the operator, or refuses."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return list(session.run(None, given))
    except Exception:  # of several classes
        return None


def of_store(folder: Path, path: Path, given: dict[str, Any]) -> list[NDArray[Any]]:
    with pydedup.open(folder / "s.db", memory="64MiB") as store:
        store.add("m", path)
        return list(store.predict("m", given).values())


@pytest.mark.long
@pytest.mark.parametrize("part", range(_PARTS))
def test_examples_of_operators(tmp_path: Path, part: int) -> None:
    wrong, compared = [], 0
    for number, case in enumerate(examples()[part::_PARTS]):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "m.onnx"
        onnx.save(case.model, path)
        names = [one.name for one in case.model.graph.input]
        given = dict(zip(names, map(np.asarray, case.data_sets[0][0]), strict=True))
        expected = of_runtime(path, given)
        try:
            found = of_store(folder, path, given)
        except PydedupError as error:
            if expected is not None and not any(kind in str(error) for kind in _REFUSED):
                wrong.append(f"{case.name}: {error}")
        else:
            compared += expected is not None
            wrong += [f"{case.name}: {what}" for what in differences(found, expected or found)]
        shutil.rmtree(folder)
    assert wrong == []
    assert compared > 100


def differences(found: list[NDArray[Any]], expected: list[NDArray[Any]]) -> list[str]:
    """Return what is not as it should be; sums may be added up in another order."""
    if len(found) != len(expected):
        return [f"{len(found)} outputs instead of {len(expected)}"]
    said = []
    for one, other in zip(map(np.asarray, found), map(np.asarray, expected), strict=True):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            said.append(f"{one.dtype} {one.shape} instead of {other.dtype} {other.shape}")
        elif other.dtype.kind not in "fV":
            said += [] if np.array_equal(one, other) else ["other values"]
        elif not np.allclose(
            one.astype(np.float64), other.astype(np.float64), 1e-3, 1e-4, equal_nan=True
        ):
            said.append("other values")
    return said
