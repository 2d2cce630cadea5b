# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime, where it is installed: its sessions, and arrays as it takes and gives them."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import config
from pydedup.arguments import as_dtype
from pydedup.errors import ArgumentError, UnsupportedFormatError, not_installed
from pydedup.formats.onnx_inputs import TextStep
from pydedup.serving.predict import as_input
from pydedup.text import listed
from pydedup.types import DType

__all__ = [
    "as_output",
    "as_runtime_input",
    "as_value",
    "check_kinds",
    "check_outputs",
    "import_onnxruntime",
    "inputs_and_outputs",
    "is_installed",
    "never_end",
    "new_session",
]

#: ONNX's number of the only type of inputs that numpy lacks.
_BF16 = 16
#: As sessions name it; outputs may be of this type.
_TEXTS = "tensor(string)"
#: Types of ONNX as sessions name them -> ours.
_TYPES = {
    "tensor(float)": DType.F32,
    "tensor(double)": DType.F64,
    "tensor(float16)": DType.F16,
    "tensor(bfloat16)": DType.BF16,
    "tensor(bool)": DType.BOOL,
    **{
        f"tensor({sign}int{bits})": DType.of_label(f"{sign}int{bits}")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


def is_installed() -> bool:
    """Return whether the packages are there that run such models; loads none of them."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def import_onnxruntime() -> Any:
    """Return ONNX Runtime. Raises UnsupportedFormatError where it or onnx cannot be imported."""
    # What it would tell its makers of each process; and a forked child that ends would wait for the
    # thread that sends it.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as exc:
        raise UnsupportedFormatError(not_installed("this ONNX model", exc, "onnx")) from exc
    return onnxruntime


def as_value(array: NDArray[Any], kind: int) -> Any:
    """Return an array as the runtime takes it; the memory stays the array's."""
    ort = import_onnxruntime()
    if array.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(array)
    plain = array.view(np.dtype(f"u{array.dtype.itemsize}"))  # bf16 and f8 have no numpy type
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(plain, kind)


def as_runtime_input(x: ArrayLike, kind: Any) -> Any:
    """Return an input in the type that the model wants, one of those that `check_kinds` lets pass.

    Raises ArgumentError.
    """
    wanted = _TYPES[kind.type]
    array = as_input(x, f"input {kind.name!r}")
    both_whole = wanted.numpy.kind in "iu" and array.dtype.kind in "iu"
    if not (both_whole or wanted.is_float or wanted.numpy == array.dtype):
        raise ArgumentError(f"input {kind.name!r} must be {wanted.label}, not {array.dtype}")
    if array.dtype.kind not in "biuf":
        try:
            DType.of(array.dtype)
        except ArgumentError:
            raise ArgumentError(
                f"input {kind.name!r} must hold numbers, not {array.dtype}"
            ) from None
    if both_whole and array.size:
        limits = np.iinfo(wanted.numpy)
        for number in (int(array.min()), int(array.max())):
            if not limits.min <= number <= limits.max:
                raise ArgumentError(
                    f"input {kind.name!r} must be {wanted.label}, from {limits.min} to "
                    f"{limits.max}; it has {number}"
                )
    array = as_dtype(array, wanted.numpy)
    return as_value(array, _BF16) if wanted is DType.BF16 else array


def check_kinds(
    kinds: Mapping[str, str], model: str, text_step: Callable[[list[str]], TextStep]
) -> None:
    """Raise UnsupportedFormatError for inputs that are no arrays of numbers.

    ``text_step`` returns what becomes of those that are texts.
    """
    for name, kind in kinds.items():
        if kind in _TYPES:
            continue
        told = f"{model} takes {name!r} as {kind}, which is not supported"
        if kind != _TEXTS:
            raise UnsupportedFormatError(told)
        step = text_step([name for name, kind in kinds.items() if kind == _TEXTS])
        what = f" ({listed(step.operators)})" if step.operators else ""
        begins = f", with the input {listed(list(map(repr, step.values)))}" if step.values else ""
        raise UnsupportedFormatError(
            f"{told}: do what it does with texts{what} before, in your own code, and add the model "
            f"that begins behind that{begins} (onnx.utils.extract_model cuts it out)"
        )


def check_outputs(kinds: Mapping[str, str], model: str) -> None:
    """Raise UnsupportedFormatError for outputs that are never arrays of numpy, or for none.

    What is optional may be an array, or not.
    """
    if not kinds:
        raise UnsupportedFormatError(f"{model} has no outputs")
    for name, kind in kinds.items():
        is_known = kind == _TEXTS or _TYPES.get(kind, DType.BF16) is not DType.BF16
        is_other = kind.startswith(("seq(", "map(", "sparse_tensor("))
        if is_other or (kind.startswith("tensor(") and not is_known):
            raise _no_array(name, kind, model)


def as_output(value: Any, name: str, kind: str, model: str) -> NDArray[Any]:
    """Return an output, if it is an array. Raises UnsupportedFormatError."""
    if isinstance(value, np.ndarray):
        return value
    raise _no_array(name, kind + (" without a value" if value is None else ""), model)


def _no_array(name: str, kind: str, model: str) -> UnsupportedFormatError:
    advice = "; convert its classifier with options={'zipmap': False}" if "map(" in kind else ""
    return UnsupportedFormatError(
        f"{model} gives {name!r} as {kind}, which is not supported{advice}"
    )


def new_session(model: bytes, constants: Mapping[str, Any]) -> Any:
    """Return a session of a model; its constants are as `with_constants` leaves them out."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    if "PYDEDUP_THREADS" in os.environ:
        options.intra_op_num_threads = config.threads()
    options.log_severity_level = 4  # what goes wrong is raised, and need not be printed too
    # One keeps the most that the first call of its session took, for as long as this lives.
    options.enable_cpu_mem_arena = False
    # A spinning thread would take the core that our kernels use next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if constants:
        options.add_external_initializers(list(constants), list(constants.values()))
    # There is nothing to fall back to; it would print so, to standard output, and try again.
    return ort.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], enable_fallback=False
    )


def inputs_and_outputs(session: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the inputs of a session by name, and the types of its outputs."""
    inputs = {value.name: value for value in session.get_inputs()}
    return inputs, {value.name: value.type for value in session.get_outputs()}


def never_end(session: Any) -> None:
    """Keep a session to the end of the process and beyond: Python, too, clears what it can."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
