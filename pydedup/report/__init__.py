# SPDX-License-Identifier: Apache-2.0
"""What a store looks like, in numbers and as a page of HTML.

figures.py and sizes.py have the sizes of models and of the store, compare.py who shares what with
whom. The page of `pydedup report` is made by page.py: gather.py takes all numbers at one moment
(families.py, detail.py and curves.py are parts of that), html.py and charts.py write them down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydedup._lazy import modules_of

if not TYPE_CHECKING:
    __getattr__ = modules_of(__name__)
