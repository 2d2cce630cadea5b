# SPDX-License-Identifier: Apache-2.0
"""Loading to a dtype and to a device of torch gives what torch's own conversion gives."""

from __future__ import annotations

import pytest

import pydedup

torch = pytest.importorskip("torch")

DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("device", [None, "cpu", "meta"])
@pytest.mark.parametrize("label", [None, *DTYPES])
def test_dtypes_and_devices(store: pydedup.Store, label: str | None, device: str | None) -> None:
    torch.manual_seed(2)
    state = {name: torch.randn(70, 9, dtype=dtype) for name, dtype in DTYPES.items()}
    state |= {
        "special": torch.tensor([0.0, -0.0, 1e-7, torch.inf, -torch.inf, torch.nan, 1.0039062]),
        "f8": torch.randn(9).to(torch.float8_e4m3fn),
        "ids": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(0.1),
        "empty": torch.ones(0, 4),
    }
    store.add("m", state)
    found = store.load_torch("m", label, device)
    assert list(found) == list(state)
    for name, tensor in state.items():
        wanted = (
            tensor if label is None or not tensor.is_floating_point() else tensor.to(DTYPES[label])
        )
        got = found[name]
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert got.device.type == (device or "cpu")
        if device != "meta":
            assert torch.equal(got.double().nan_to_num(7), wanted.double().nan_to_num(7)), name


def test_what_is_loaded_belongs_to_the_caller(store: pydedup.Store) -> None:
    store.add("m", {"w": torch.ones(70, 70)})
    store.load_torch("m")["w"].zero_()
    assert torch.equal(store.load_torch("m")["w"], torch.ones(70, 70))
