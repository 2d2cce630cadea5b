# SPDX-License-Identifier: Apache-2.0
"""The adapter contract for marks of changes, where an adapter has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from pydedup.adapter import Adapter
from pydedup.adapter_options import ChangeMarkAdapter, only_sound_rows
from pydedup.testing._contract_base import ContractBase, in_thread

__all__ = ["MarksContract"]


class MarksContract(ContractBase):
    """No change goes without another mark, and without one a mark stays."""

    def test_marks_are_others_after_every_change(self, adapter: Adapter, url: str) -> None:
        """Whoever makes the change: this thread, another one, or another adapter."""
        if not isinstance(adapter, ChangeMarkAdapter):
            assert not hasattr(adapter, "change_mark")
            return
        with contextlib.closing(self.open(url)) as other:
            marks = [adapter.change_mark()]
            changes: list[Callable[[str], None]] = [
                lambda value: _change(adapter, value),
                lambda value: in_thread(lambda: _change(adapter, value)),
                lambda value: _change(other, value),
                lambda value: _change(adapter, value),
            ]
            for number, change in enumerate(changes):
                adapter.meta()
                other.models()
                assert adapter.change_mark() == marks[-1]
                change(str(number))
                marks.append(adapter.change_mark())
            assert None not in marks
            assert len(set(marks)) == len(marks)

    def test_marks_are_of_the_last_state_alone(self, adapter: Adapter) -> None:
        """Not of what a transaction or snapshot sees, nor of rows without the damaged ones."""
        if not isinstance(adapter, ChangeMarkAdapter):
            assert not hasattr(adapter, "change_mark")
            return
        marks = [adapter.change_mark()]
        with adapter.transaction():
            adapter.set_meta("x", "y")
            assert adapter.change_mark() is None
            marks.append(in_thread(adapter.change_mark))  # which does not see it
        marks += [adapter.change_mark(), in_thread(adapter.change_mark)]
        assert len(set(marks)) == 4
        with adapter.snapshot():
            assert adapter.change_mark() is None
        with only_sound_rows(adapter):
            assert adapter.change_mark() is None
        assert adapter.change_mark() == marks[2]


def _change(adapter: Adapter, value: str) -> None:
    with adapter.transaction():
        adapter.set_meta("x", value)
