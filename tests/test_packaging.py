# SPDX-License-Identifier: Apache-2.0
"""What an installed pydedup consists of: the right files, one version, one place.

These look at the package that is installed, whichever it is; what holds for a wheel alone is
skipped on an editable install (`make test` and CI install a wheel).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pydedup
from pydedup import _core

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = importlib.metadata.distribution("pydedup")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

#: Sources that are compiled, and what compiling leaves behind.
NOT_SHIPPED = {".pyx", ".pxd", ".c", ".cpp", ".cxx", ".hpp", ".o", ".a", ".cmake"}


def is_editable() -> bool:
    origin = DISTRIBUTION.read_text("direct_url.json")
    return bool(origin and json.loads(origin).get("dir_info", {}).get("editable"))


wheel_only = pytest.mark.skipif(is_editable(), reason="holds for a wheel; this install is editable")


def installed_files() -> list[Path]:
    """Return the installed files, relative to site-packages, without metadata and caches."""
    listed = [Path(str(file)) for file in DISTRIBUTION.files or []]
    return [
        path
        for path in listed
        if ".dist-info" not in path.parts[0] and "__pycache__" not in path.parts
    ]


def test_versions_agree() -> None:
    # What compiled code and metadata say must come from one build.
    assert pydedup.__version__ == DISTRIBUTION.version == _core.version() == PROJECT["version"]


def test_adapters_live_inside_the_package() -> None:
    adapters = importlib.import_module("pydedup.adapters")
    assert adapters.__name__ == "pydedup.adapters"
    sqlite = importlib.import_module("pydedup.adapters.sqlite")
    assert callable(sqlite.connect)


def test_entry_points_of_the_adapters_load() -> None:
    points = importlib.metadata.entry_points(group="pydedup.adapters")
    ours = {point.name: point for point in points if point.value.startswith("pydedup.")}
    assert set(ours) == set(PROJECT["entry-points"]["pydedup.adapters"])
    assert callable(ours["sqlite"].load())


@wheel_only
def test_nothing_is_installed_beside_the_package() -> None:
    tops = {path.parts[0] for path in installed_files() if not path.parts[0].startswith("..")}
    assert tops == {"pydedup"}


@wheel_only
def test_package_has_one_place() -> None:
    # A second entry (editable installs have one) would make pydedup.csrc importable.
    assert list(pydedup.__path__) == [str(Path(pydedup.__file__).parent)]
    assert importlib.util.find_spec("pydedup.tests") is None


@wheel_only
def test_tests_run_on_the_installed_package() -> None:
    assert ROOT / "pydedup" not in Path(pydedup.__file__).parents


@wheel_only
def test_wheel_ships_types_and_no_sources() -> None:
    files = installed_files()
    names = {path.as_posix() for path in files}
    assert {"pydedup/py.typed", "pydedup/_core.pyi", "pydedup/adapters/__init__.py"} <= names
    assert [path for path in files if path.suffix in NOT_SHIPPED] == []
    modules = {path.name.partition(".")[0] for path in files if path.suffix == ".so"}
    assert modules == {"_core", "_pages"}


@wheel_only
def test_wheel_ships_every_python_file() -> None:
    shipped = {path.as_posix() for path in installed_files()}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pydedup").rglob("*.py*")}
    wanted |= {
        "pydedup/" + path.relative_to(ROOT).as_posix() for path in (ROOT / "adapters").rglob("*.py")
    }
    wanted = {name for name in wanted if name.endswith((".py", ".pyi", ".py.typed"))}
    assert wanted - shipped == set()


def test_metadata_says_what_pyproject_says() -> None:
    metadata = DISTRIBUTION.metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    extras = {"postgres", "mysql", "torch", "onnx", "serve", "demo", "test", "bench"}
    assert extras <= set(metadata.get_all("Provides-Extra", []))


def test_top_level_name_adapters_is_left_alone() -> None:
    code = "import pydedup, pydedup.store, sys; sys.exit('adapters' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_the_core_keeps_libstdcxx_to_itself() -> None:
    # With a shared libstdc++ mysql-connector does not load: see csrc/cmake/PythonModules.cmake. (On
    # Debian 12 it still does not, beside Python's hashlib: its libssl asks for a newer libcrypto.)
    pytest.importorskip("mysql.connector", reason="needs mysql-connector-python")
    code = "import pydedup._core, _mysql_connector"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or "OPENSSL" in done.stderr, done.stderr


def test_command_and_module_are_the_same_program() -> None:
    script = Path(sys.executable).with_name("pydedup")
    texts = [
        subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for command in ([str(script)], [sys.executable, "-P", "-m", "pydedup"])
    ]
    assert texts[0] == texts[1]
    assert re.search(rf"\b{re.escape(pydedup.__version__)}$", texts[0])
