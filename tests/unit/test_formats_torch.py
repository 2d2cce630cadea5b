# SPDX-License-Identifier: Apache-2.0
"""torch checkpoints, modules and tensors in mappings, against torch."""

from __future__ import annotations

import errno
import io
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pydedup.errors import (
    ArgumentError,
    FormatError,
    NotFoundError,
    StorageFullError,
    UnsupportedFormatError,
)
from pydedup.formats import _files
from pydedup.formats.registry import open_source, write_model
from pydedup.types import DType

from .formats_files import is_mapped


def model() -> dict[str, torch.Tensor]:
    """Return tensors of all dtypes and layouts; some are views of others."""
    torch.manual_seed(0)
    big = torch.randn(700, 401)
    return {
        "big": big,
        "tied": big,
        "transposed": big.t(),
        "strided": big[3:90:2, 5::7],
        "one": big[2:3, 7],  # with a stride of 401 elements
        "offset": big[100:200],
        "expanded": torch.randn(1, 9).expand(5, 9),
        "half": torch.randn(7).half(),
        "brain": torch.randn(300, 500).bfloat16(),
        "double": torch.tensor([float("nan"), float("-inf")], dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "ids": torch.arange(6).reshape(2, 3),
        "unsigned": torch.arange(4).to(torch.uint16),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": nn.Parameter(torch.randn(3, 3)),
        "deep": torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
    }


EIGHT_BIT = {
    "e4m3": torch.randn(33).to(torch.float8_e4m3fn),
    "e5m2": torch.randn(33).to(torch.float8_e5m2),
}


def bits(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def check(source: Any, expected: dict[str, torch.Tensor]) -> None:
    assert [entry.name for entry in source.entries] == list(expected)
    for entry in source.entries:
        array = source.read(entry.name)
        assert array.shape == entry.shape == tuple(expected[entry.name].shape)
        assert array.dtype == entry.dtype.numpy
        assert array.flags.c_contiguous
        assert not array.flags.writeable
        assert array.tobytes() == bits(expected[entry.name]), entry.name


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".odd"])
def test_reads_what_torch_wrote(suffix: str, tmp_path: Path) -> None:
    expected = {**model(), **EIGHT_BIT}
    torch.save(expected, tmp_path / f"m{suffix}")
    with open_source(tmp_path / f"m{suffix}") as source:
        assert source.format == "torch"
        assert source.left_out == ()
        check(source, expected)


def test_reads_the_format_before_zip(tmp_path: Path) -> None:
    expected = model()
    del expected["unsigned"]  # has no storage class of its own, which that format needs
    torch.save(expected, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with open_source(tmp_path / "m.pt") as source:
        check(source, expected)
        keys = {entry.name: entry.key for entry in source.entries}
        assert keys["big"] == keys["tied"] != keys["transposed"]


def test_very_large_contiguous_tensors_are_views_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "_MAP_FROM", 256 * 1024)
    torch.save(model(), tmp_path / "m.pt")
    with open_source(tmp_path / "m.pt") as source:
        for name in ("big", "tied", "brain"):
            assert is_mapped(source.read(name))
        assert not is_mapped(source.read("transposed"))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2])
def test_dtypes_that_came_after_the_old_format(tmp_path: Path, dtype: torch.dtype) -> None:
    """torch writes them there, and does not read them back."""
    tensors = {"w": torch.zeros(3, dtype=dtype)}
    torch.save(tensors, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedFormatError, match="torch itself does not read back"):
        open_source(tmp_path / "m.pt")


def test_only_the_same_view_of_the_same_storage_is_tied(tmp_path: Path) -> None:
    torch.save(model(), tmp_path / "m.pt")
    for given in (tmp_path / "m.pt", model()):
        with open_source(given) as source:
            keys = {entry.name: entry.key for entry in source.entries}
        assert keys["big"] == keys["tied"]
        assert len(set(keys.values())) == len(keys) - 1


@pytest.mark.parametrize(
    "wrapper",
    [
        *("state_dict", "model", "model_state_dict", "module"),
        *("params", "params_ema", "ema", "net"),
    ],
)
def test_checkpoints_are_unwrapped(wrapper: str, tmp_path: Path) -> None:
    expected = OrderedDict(model())
    moments = {0: {"exp_avg": torch.zeros(700, 401), "step": torch.tensor(1.0)}}
    checkpoint = {"epoch": 3, "optimizer": {"state": moments, "lr": [0.1]}, wrapper: expected}
    torch.save(checkpoint, tmp_path / "m.pt")
    with open_source(tmp_path / "m.pt") as source:
        check(source, expected)
        assert source.left_out == ("epoch", "optimizer")
        assert source.weights_key == wrapper


def test_nested_wrappers_and_extra_state(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "layer._extra_state": {"version": 1}}
    torch.save({"model": {"state_dict": state, "arch": "x"}}, tmp_path / "m.pt")
    with open_source(tmp_path / "m.pt") as source:
        check(source, {"w": torch.ones(2)})
        assert source.left_out == ("arch", "layer._extra_state")
        assert source.weights_key == "model.state_dict"


@pytest.mark.parametrize(
    ("keys", "more"),
    [
        (("params", "params_ema"), {}),
        (("state_dict", "state_dict_ema"), {"epoch": 1, "optimizer": {"state": {}}}),
        (("model", "model_ema"), {"scheduler": {"w": torch.ones(2)}}),
        (("state_dict", "model"), {"config": {"a": 1}}),
        (("net", "ema"), {"d_optim": {"state": {"w": {"step": torch.ones(1)}}}}),
    ],
)
def test_several_sets_of_weights(
    keys: tuple[str, ...], more: dict[str, Any], tmp_path: Path
) -> None:
    """Of plain weights and averaged ones the first were taken, or a file was said to have none."""
    path = tmp_path / "m.pth"
    sets = {key: {"w": torch.full((3,), float(at))} for at, key in enumerate(keys)}
    torch.save({**more, **sets}, path)
    with pytest.raises(ArgumentError, match="holds several sets of weights, under ") as error:
        open_source(path)
    assert all(repr(key) in str(error.value) for key in keys)
    assert not any(repr(key) in str(error.value) for key in more)
    for at, key in enumerate(keys):
        with open_source(path, key) as source:
            check(source, {"w": torch.full((3,), float(at))})
            assert source.weights_key == key
            assert set(source.left_out) == {*more, *keys} - {key}
    with open_source(path, every_set=True) as source:
        assert {entry.name for entry in source.entries} == {f"{key}.w" for key in keys}


def test_several_sets_of_weights_inside_of_others(tmp_path: Path) -> None:
    """The keys that errors named were under no key that could be given."""
    path = tmp_path / "m.pth"
    sets = {key: {"w": torch.full((3,), float(at))} for at, key in enumerate(("params", "ema"))}
    averaged = {"decay": 0.9, "shadow": {"w": torch.full((3,), 2.0)}}
    torch.save({"g": sets, "d": {"w": torch.ones(1)}, "g.x": {"w": torch.ones(4)}}, path)
    with pytest.raises(ArgumentError, match=r"under 'g\.params', 'g\.ema'.* such as 'g\.params'"):
        open_source(path, "g")
    for at, key in enumerate(("g.params", "g.ema")):
        with open_source(path, key) as source:
            check(source, {"w": torch.full((3,), float(at))})
            assert source.weights_key == key
    with open_source(path, "g.x") as source:
        check(source, {"w": torch.ones(4)})
    with pytest.raises(NotFoundError, match=r"nothing under the key 'g\.swa'; it has: g, .*g\.ema"):
        open_source(path, "g.swa")
    torch.save({"model": sets["params"], "ema": averaged}, path)
    with pytest.raises(FormatError, match=r"what of it is the model: 'ema\.shadow'"):
        open_source(path, "ema")
    with open_source(path, "ema.shadow") as source:
        check(source, {"w": torch.full((3,), 2.0)})
    with open_source(path, every_set=True) as source:
        assert {entry.name for entry in source.entries} == {"model.w", "ema.shadow.w"}
    torch.save({"model": {"net": {"module": {"params": averaged}}}}, path)
    with pytest.raises(FormatError, match=r"the model: 'model\.net\.module\.params\.shadow'"):
        open_source(path)
    with open_source(path, "model.net.module.params.shadow") as source:
        check(source, {"w": torch.full((3,), 2.0)})


def test_checkpoints_that_hold_themselves(tmp_path: Path) -> None:
    """One of 200 keys took minutes; one with weights beside them, all memory."""
    path = tmp_path / "m.pth"
    state = {"w": torch.ones(3)}
    many: dict[str, Any] = {}
    many.update({f"k{at}": many for at in range(200)})
    torch.save(many, path)
    with pytest.raises(FormatError, match="'k0' is of type dict, not a tensor"):
        open_source(path)
    many["model"] = state
    torch.save(many, path)
    with open_source(path) as source:
        check(source, state)
    with open_source(path, every_set=True) as source:
        check(source, {"model.w": state["w"]})


def test_what_stands_beside_the_weights_themselves_is_left_out(tmp_path: Path) -> None:
    """Such files were refused: 'epoch' is a int, not a tensor."""
    path, weights = tmp_path / "m.pth", {"w": torch.ones(2), "n.b": torch.zeros(3)}
    beside = {"epoch": 3, "best": 0.5, "arch": "x", "done": True, "tag": None}
    beside |= {"optimizer": {"state": {0: torch.ones(2)}, "param_groups": []}}
    torch.save({**weights, **beside}, path)
    with open_source(path) as source:
        check(source, weights)
        assert source.left_out == tuple(beside)
        assert source.weights_key is None
    for name, value in (("n.scale", 0.5), ("more", {"w": 1}), ("items", [1])):
        torch.save({**weights, name: value}, path)
        with pytest.raises(FormatError, match=f"'{name}' is of type {type(value).__name__}, not"):
            open_source(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(FormatError, match="'epoch' is of type int, not a tensor"):
        open_source(path)


def test_a_checkpoint_in_a_folder_tells_its_key_and_what_is_beside(tmp_path: Path) -> None:
    """The key could not be chosen, and what was left out of the file was not told."""
    sets = {"params": {"w": torch.ones(3)}, "params_ema": {"w": torch.zeros(3)}}
    torch.save({"epoch": 3, **sets}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArgumentError, match=r"pytorch_model\.bin holds several sets of weights"):
        open_source(tmp_path)
    with open_source(tmp_path, "params_ema") as source:
        check(source, sets["params_ema"])
        assert source.weights_key == "params_ema"
        assert source.left_out == ("pytorch_model.bin: epoch", "pytorch_model.bin: params")
    with open_source(tmp_path, every_set=True) as source:
        assert {entry.name for entry in source.entries} == {"params.w", "params_ema.w"}
    safetensors.torch.save_file(sets["params"], tmp_path / "model.safetensors")
    with pytest.raises(ArgumentError, match="safetensors and no torch checkpoint; weights_key"):
        open_source(tmp_path, "params")


def test_weights_under_keys_of_their_own(tmp_path: Path) -> None:
    """They may be parts of one model as well."""
    path = tmp_path / "m.pth"
    parts = {"encoder": {"w": torch.zeros(2)}, "decoder": {"w": torch.ones(2)}}
    for more in ({}, {"ema": {"w": torch.ones(2)}}):
        torch.save({"epoch": 1, "optimizer": {"w": torch.ones(2)}, **parts, **more}, path)
        with pytest.raises(FormatError, match=r"weights_key .* what of it is the model.*'encoder'"):
            open_source(path)
        with open_source(path, "decoder") as source:
            check(source, {"w": torch.ones(2)})


def test_keys_of_weights_that_are_none(tmp_path: Path) -> None:
    path, plain = tmp_path / "m.pth", {"w": np.ones(3, np.float32)}
    torch.save({"params": {"w": torch.ones(2)}, "epoch": 3}, path)
    np.savez(tmp_path / "m.npz", **plain)
    with pytest.raises(NotFoundError, match="nothing under the key 'ema'; it has: params"):
        open_source(path, "ema")
    with pytest.raises(FormatError, match="a value of type int under 'epoch', not a state dict"):
        open_source(path, "epoch")
    with pytest.raises(ArgumentError, match="must be a text"):
        open_source(path, 3)  # type: ignore[arg-type]
    for given, what in ((tmp_path / "m.npz", "npz"), (plain, "dict"), (nn.Linear(2, 2), "Linear")):
        with pytest.raises(ArgumentError, match=f"weights_key.*{what}|{what}.*weights_key"):
            open_source(given, "params")


def test_torch_reads_an_export_with_ties(tmp_path: Path) -> None:
    expected = {**model(), **EIGHT_BIT}
    torch.save(expected, tmp_path / "m.pt")
    with open_source(tmp_path / "m.pt") as source:
        tensors = {entry.name: source.read(entry.name) for entry in source.entries}
        write_model(tmp_path / "out.pth", tensors, source.entries)
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(loaded) == list(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor)
    assert loaded["big"].data_ptr() == loaded["tied"].data_ptr()
    assert loaded["offset"].untyped_storage().nbytes() == 100 * 401 * 4
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["m.pt", "out.pth"]


def test_an_export_reads_one_tensor_at_a_time(tmp_path: Path) -> None:
    source = {f"w{index}": np.full(9, index, np.float32) for index in range(5)}
    asked: list[str] = []

    class Lazy:
        def __getitem__(self, name: str) -> Any:
            asked.append(name)
            return source[name]

    with open_source(source) as opened:
        write_model(tmp_path / "out.pt", Lazy(), opened.entries)
    assert asked == list(source)


def test_a_module_gives_parameters_and_persistent_buffers(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    module[2].weight = nn.Parameter(module[0].weight.detach().t().contiguous())
    with open_source(module) as source:
        assert source.format == "torch-module"
        check(source, dict(module.state_dict()))
        assert source.graph is not None


def test_tied_parameters_of_a_module_share_a_key() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    with open_source(Tied()) as source:
        keys = [entry.key for entry in source.entries]
        assert len(keys) == 2
        assert len(set(keys)) == 1
        assert source.graph is None


def _fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def _unusual(kind: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against them
        if kind == "nested":
            return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        if kind == "masked":
            return torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False]))
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def _freed() -> torch.Tensor:
    """Return a tensor as FSDP leaves those that other ranks hold."""
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(0)
    return tensor


def test_a_lazy_module_is_named() -> None:
    with pytest.raises(UnsupportedFormatError, match=r"tensor '0\.weight' is not initialised yet"):
        open_source(nn.Sequential(nn.LazyLinear(4)))


def test_a_quantised_module_is_refused_and_extra_state_left_out() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

    class Packed(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[prefix + "packed"] = (self.weight, self.bias)  # as torch's quantised layers

    with open_source(nn.Sequential(Extra(2, 2))) as source:
        assert source.left_out == ("0._extra_state",)
        assert [entry.name for entry in source.entries] == ["0.weight", "0.bias"]
    with pytest.raises(UnsupportedFormatError, match=r"'0\.packed' is a tuple.*quantised layers"):
        open_source(nn.Sequential(Packed(2, 2)))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2, dtype=torch.complex64), r"complex64, .*\(torch\.view_as_real"),
        (torch.zeros(2, dtype=torch.complex64).conj(), r"complex64, .*\(torch\.view_as_real"),
        (
            torch.zeros(2, dtype=torch.float8_e8m0fnu),
            r"stored; give its bytes.*view\(torch\.uint8\)",
        ),
        (torch.tensor([1 + 2j]).conj().imag, "negated"),
        (nn.UninitializedParameter(), "not initialised yet; run the module once"),
        (_unusual("nested"), "nested"),
        (_unusual("quantised"), r"quantised; dequantize\(\)"),
        (_fake(), r"without data \(FakeTensor\)"),
        (_unusual("masked"), "MaskedTensor; give plain tensors"),
        (_freed(), r"without data \(freed\); gather"),
    ],
)
def test_tensors_that_cannot_be_stored(tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"'w' .*{says}"):
        open_source({"w": tensor})


def test_every_dtype_of_a_store_goes_through_torch(tmp_path: Path) -> None:
    tensors = {member.label: np.ones(3).astype(member.numpy) for member in DType}
    with open_source(tensors) as source:
        write_model(tmp_path / "m.pt", tensors, source.entries)
    with open_source(tmp_path / "m.pt") as source:
        assert {entry.name: entry.dtype.label for entry in source.entries} == {
            member.label: member.label for member in DType
        }
        for name, array in tensors.items():
            assert source.read(name).tobytes() == array.tobytes()


def test_a_disk_that_fills_while_torch_writes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(path: Path, mode: str = "r", **more: Any) -> Any:
        return Full(path, "w") if mode == "wb" else opened(path, mode, **more)

    monkeypatch.setattr(Path, "open", open_full)
    with open_source({"w": torch.ones(9)}) as source, pytest.raises(StorageFullError):
        write_model(tmp_path / "m.pt", {"w": np.ones(9, np.float32)}, source.entries)
    assert list(tmp_path.iterdir()) == []
