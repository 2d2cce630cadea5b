# SPDX-License-Identifier: Apache-2.0
"""The suites for functions inside of a server: what `pydedup sql` works with.

An adapter that is a :class:`pydedup.adapter_options.FunctionsAdapter` passes
:class:`FunctionsAdapterContract` on a server that can have the functions, and
:class:`RefusedFunctionsContract` on one that cannot. Subclass, give the place and the database's
own driver, and pytest does the rest::

    class TestFunctionsOfMyDatabase(FunctionsAdapterContract):
        python_path = "/where/the/server/finds/pydedup"
        def make_url(self, folder): ...
        def run(self, url, statement): ...
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import pydedup
from pydedup import registry
from pydedup.adapter_options import FunctionsAdapter
from pydedup.errors import ArgumentError, StoreError
from pydedup.graph import Graph, Node

__all__ = ["FunctionsAdapterContract", "RefusedFunctionsContract"]

_WEIGHTS = np.array([[0.5, -2, 3]], np.float32)


class _FunctionsContract(abc.ABC):
    """A store with the model ``m@1``, which multiplies by `_WEIGHTS`, and no functions yet."""

    #: What is given to the adapter: where the Python of the server finds pydedup.
    python_path: str | None = None

    @abc.abstractmethod
    def make_url(self, folder: Path) -> str:
        """Return the URL of a place without a store; ``folder`` is empty and writable."""

    @abc.abstractmethod
    def run(self, url: str, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement by the driver, where the names of the store's functions are known.

        As a user who may make functions. What it raises is the driver's.
        """

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        """Give a store."""
        folder = tmp_path / "database"
        folder.mkdir()
        url = self.make_url(folder)
        graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
        with pydedup.open(url) as store:
            store.add("m@1", {"w": _WEIGHTS}, graph=graph)
        return url

    @pytest.fixture
    def adapter(self, url: str) -> Iterator[FunctionsAdapter]:
        """Give its adapter."""
        with registry.opened(url, mode="a") as adapter:
            assert isinstance(adapter, FunctionsAdapter)
            yield adapter

    def assert_there(self, url: str) -> None:
        """Check that the functions work, each of its own kind."""
        assert self.run(url, "SELECT pydedup_model('m'), pydedup_version()") == [
            ("m@1", pydedup.__version__)
        ]
        ((one,),) = self.run(url, "SELECT pydedup_predict('m', 2, 1, 1)")
        assert one == pytest.approx(2.0)

    def assert_missing(self, url: str) -> None:
        """Check that the functions do not exist, and that the store is as it was."""
        for call in ("pydedup_predict('m', 2, 1, 1)", "pydedup_model('m')", "pydedup_version()"):
            with pytest.raises(Exception, match="pydedup_"):  # the driver's: names what is missing
                self.run(url, f"SELECT {call}")
        with pydedup.open(url, mode="r") as store:
            np.testing.assert_array_equal(store.load("m@1")["w"], _WEIGHTS)

    def test_nothing_is_there_at_first(self, adapter: FunctionsAdapter, url: str) -> None:
        """A store has no functions until it is asked for, and then taking them out is no error."""
        self.assert_missing(url)
        adapter.drop_functions()
        self.assert_missing(url)


class FunctionsAdapterContract(_FunctionsContract):
    """Functions in a server that can have them."""

    def test_installed_and_dropped(self, adapter: FunctionsAdapter, url: str) -> None:
        """They work when they were made, in the version that is said; twice is as good as once."""
        for _ in range(2):
            assert adapter.install_functions(self.python_path) == pydedup.__version__
            self.assert_there(url)
        for _ in range(2):
            adapter.drop_functions()
            self.assert_missing(url)
        assert adapter.install_functions(self.python_path) == pydedup.__version__
        self.assert_there(url)

    def test_the_statements_alone_make_them(self, adapter: FunctionsAdapter, url: str) -> None:
        """An administrator can run what is shown, one by one and again, and we take it out."""
        statements = adapter.function_statements(self.python_path)
        self.assert_missing(url)  # showing changes nothing
        for _ in range(2):
            for statement in statements:
                assert not statement.rstrip().endswith(";")
                self.run(url, statement)
        self.assert_there(url)
        adapter.drop_functions()
        self.assert_missing(url)

    def test_all_or_none(self, adapter: FunctionsAdapter, url: str) -> None:
        """Where the server does not find pydedup, there are none, and those of before stay."""
        with pytest.raises(StoreError):
            adapter.install_functions("/nowhere/at/all")
        self.assert_missing(url)
        with registry.opened(url, mode="a") as other:  # what imported pydedup once has it
            assert isinstance(other, FunctionsAdapter)
            other.install_functions(self.python_path)
        with pytest.raises(StoreError):
            adapter.install_functions("/nowhere/at/all")
        self.assert_there(url)

    def test_a_path_that_is_none(self, adapter: FunctionsAdapter, url: str) -> None:
        """A folder is named by an absolute path; anything else is refused, and changes nothing."""
        for path in ("", "relative", "/a\nb", "/a\0b"):
            for use in (adapter.function_statements, adapter.install_functions):
                with pytest.raises(ArgumentError):
                    use(path)
        self.assert_missing(url)

    def test_a_path_is_only_a_path(self, adapter: FunctionsAdapter, url: str) -> None:
        """Whatever is in it, the statements are well-formed: what fails is not their syntax."""
        for path in ("/it's", '/a "b"', "/a\\b", "/ü'||x||'", "/'''", "/%s {0}"):
            adapter.function_statements(path)
            with pytest.raises(StoreError) as caught:
                adapter.install_functions(path)
            assert "syntax" not in str(caught.value).lower()
        self.assert_missing(url)

    def test_what_changes_in_the_store_is_seen(self, adapter: FunctionsAdapter, url: str) -> None:
        """The functions predict by what is stored when they are called."""
        adapter.install_functions(self.python_path)
        self.assert_there(url)
        with pydedup.open(url) as store:
            store.add("m@2", {"w": 2 * _WEIGHTS}, graph=store.graph("m@1"))
        ((one,),) = self.run(url, "SELECT pydedup_predict('m', 2, 1, 1)")
        assert one == pytest.approx(4.0)
        with pytest.raises(Exception, match=r"\w"):  # SQLite's driver keeps the words to itself
            self.run(url, "SELECT pydedup_predict('other', 2, 1, 1)")


class RefusedFunctionsContract(_FunctionsContract):
    """Functions on a server that cannot have them: nothing is done, and why is said."""

    def test_installing_is_refused(self, adapter: FunctionsAdapter, url: str) -> None:
        """With an error that names the place, without its password, and changes nothing."""
        with pytest.raises(StoreError) as caught:
            adapter.install_functions(self.python_path)
        parts = urlsplit(url)
        assert (parts.hostname or parts.path) in str(caught.value)
        assert not parts.password or parts.password not in str(caught.value)
        self.assert_missing(url)
