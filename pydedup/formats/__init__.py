# SPDX-License-Identifier: Apache-2.0
"""Model files in and out: one module per format, and a registry that chooses among them.

Nothing is imported here before it is asked for: formats bring optional libraries, and import
them only when used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

#: What `import pydedup` gives as ``pydedup.formats.NAME``.
_MODULES = frozenset(
    {
        "arrays",
        "base",
        "folder",
        "infer_keras",
        "infer_onnx",
        "infer_torch",
        "keras",
        "npz",
        "onnx",
        "onnx_inputs",
        "registry",
        "safetensors",
        "torch",
        "wordvec",
    }
)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            import importlib

            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
