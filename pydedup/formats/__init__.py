# SPDX-License-Identifier: Apache-2.0
"""Model files in and out: one module per format, and a registry that chooses among them.

`base` is what a reader gives; `infer_onnx`, `infer_keras` and `infer_torch` say what the layers of
a file are. Nothing is imported here before it is asked for: formats bring optional libraries, and
import them only when used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydedup._lazy import modules_of

if not TYPE_CHECKING:
    __getattr__ = modules_of(__name__)
