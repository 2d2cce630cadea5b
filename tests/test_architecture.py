# SPDX-License-Identifier: Apache-2.0
"""The walls of docs/architecture.md, held by reading every import.

The sources are parsed, not run (but for one test that asks what importing pydedup loads), so an
import inside a function counts like one at the top of its file. When a test here fails, move
the code to the room it belongs in; widen a table only when the architecture is to change.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# ---- Python: who may import whom ----------------------------------------------------------------

FACADES = {
    "hashing",
    "similarity",
    "packing",
    "encoding",
    "codec",
    "pool",
    "replacement",
    "matmul",
    "stack",
    "lookup",
    "joint",
    "conv",
    "config",
}
VALUES = {"arguments", "errors", "sets", "types", "words"}
ADAPTERS = {"adapter", "adapter_options"}
MODEL = (
    VALUES
    | {"names", "accuracy", "policies", "certificates", "operations", "graph", "blocks"}
    | ADAPTERS
)
CORE = (
    MODEL
    | FACADES
    | {"formats", "catalog", "jobs", "layout", "signatures", "text", "usage", "quotas"}
)
INNER = CORE | {"ingest", "serving", "maintenance", "moving", "report", "registry"}
PUBLIC = {"", "store"} | CORE | {"registry", "report", "maintenance", "moving"}

#: Room -> the rooms it may import from. A room is what follows ``pydedup.`` up to the next dot; ""
#: is the package itself. Rooms come in order: a row names only rows above it, so no circle can be
#: allowed by mistake (``test_table_has_no_circles``).
ALLOWED: dict[str, set[str]] = {
    "_core": set(),
    "_pages": set(),
    "text": set(),
    "sets": set(),
    "errors": {"text"},
    "arguments": {"errors"},
    "types": {"errors"},
    "words": {"errors", "types"},
    "_lazy": set(),
    "_memory": set(),
    "names": VALUES,
    "accuracy": VALUES,
    "certificates": VALUES | {"text"},
    "operations": VALUES,
    "graph": VALUES | {"operations"},
    "adapter": VALUES,
    "adapter_options": VALUES,
    "registry": VALUES | ADAPTERS | {"text"},
    "config": VALUES | {"_core"},
    "blocks": VALUES | {"config"},
    "hashing": VALUES | {"_core", "blocks", "config"},
    "similarity": VALUES | {"_core", "blocks", "config", "hashing"},
    "packing": VALUES | {"_core", "blocks", "config"},
    "encoding": VALUES | {"_core", "blocks", "config"},
    "codec": VALUES | {"_core", "blocks", "config", "encoding", "hashing"},
    "windows": {"blocks"},
    "formats": VALUES | {"_lazy", "names", "graph", "blocks", "text"},
    "replacement": VALUES | {"_core", "config", "formats"},
    "pool": VALUES | {"_core", "blocks", "codec", "config", "replacement", "windows"},
    "matmul": VALUES | {"_core", "blocks", "codec", "config", "pool", "windows"},
    "stack": VALUES | {"_core", "blocks", "matmul", "pool"},
    "lookup": VALUES | {"_core", "blocks", "codec", "matmul", "pool"},
    "joint": VALUES | {"blocks", "matmul", "pool"},
    "conv": VALUES | {"_core", "blocks", "config", "matmul", "pool"},
    "training": VALUES | {"accuracy", "formats"},
    "policies": VALUES | {"accuracy", "training"},
    "layout": VALUES | {"blocks", "codec", "packing", "pool"},
    "jobs": VALUES | ADAPTERS,
    "signatures": VALUES | {"adapter", "similarity"},
    "catalog": MODEL | {"matmul", "pool", "text"},
    "usage": MODEL | {"catalog", "layout", "pool"},
    "quotas": MODEL | {"config", "pool", "text", "usage"},
    "ingest": CORE | {"windows"},
    "serving": CORE | {"_memory"},
    "maintenance": CORE | {"_lazy", "ingest"},
    "moving": CORE | {"_lazy", "ingest", "maintenance"},
    "report": CORE | {"_lazy"},
    "opening": INNER,
    "adding": INNER | {"opening", "_memory"},
    "predicting": INNER | {"opening"},
    "upkeep": INNER | {"opening", "_memory"},
    "store": INNER | {"opening", "adding", "predicting", "upkeep"},
    "sql": VALUES | {"config", "opening", "registry", "serving", "store"},
    "": PUBLIC - {""},
    "http": PUBLIC | {"serving", "opening"},
    "ray": PUBLIC | {"serving", "opening", "http"},
    "selftest": PUBLIC,
    "testing": PUBLIC | {"selftest"},
    "demo": PUBLIC | {"selftest"},
    "cli": PUBLIC | {"selftest", "demo", "http", "ray"},
    "__main__": {"cli"},
}

#: Distributions that may be imported at the top of a file, by room; numpy may be everywhere.
RUNTIME: dict[str, set[str]] = {
    "cli": {"click", "rich"},
    "demo": {"rich", "torch", "pyarrow"},
    "formats": {"ml_dtypes", "safetensors"},
    # Its one importer, the command `serve`, imports it when it is called.
    "http": {"httptools", "ml_dtypes", "orjson", "prometheus_client", "uvicorn", "uvloop"},
    "blocks": {"ml_dtypes"},
    # The folder `serving`, imported when it is asked for.
    "ray": {"prometheus_client", "ray"},
    # report/html.py and charts.py, imported when a report is made.
    "report": {"jinja2", "markupsafe"},
    "types": {"ml_dtypes"},
    "testing": {"hypothesis", "ml_dtypes", "pytest"},
}
#: Imported by serving/layers.py alone, which is imported when a module is attached.
ATTACHED = "pydedup/serving/attached"
TORCH_FILES = {
    "pydedup/formats/torch.py",
    "pydedup/formats/torch_tensors.py",
    "pydedup/serving/layers.py",
    *(f"{ATTACHED}/{path.name}" for path in (ROOT / ATTACHED).glob("*.py")),
    "pydedup/training.py",
}
DRIVERS = {"sqlite3", "psycopg", "psycopg_pool", "mysql"}

ADAPTER_ROOMS = VALUES | ADAPTERS | {"_pages"}
ADAPTER_DRIVERS = {
    "sqlite.py": {"sqlite3"},
    "postgres.py": {"psycopg", "psycopg_pool"},
    "_postgres_cursor.py": {"psycopg"},
    "_postgres_pooler.py": {"psycopg"},
    "_postgres_said.py": {"psycopg"},
    "_postgres_statement.py": {"psycopg"},
    "mysql.py": {"mysql"},
    "_mysql_cursors.py": {"mysql"},
    "_sqlite_connect.py": {"sqlite3"},
    "_sqlite_rows.py": {"sqlite3"},
    "_sqlite_functions.py": {"sqlite3"},
}


@dataclass(frozen=True)
class Import:
    """One imported module, and where."""

    file: str
    line: int
    target: str
    at_top: bool
    for_types: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def python_files(folder: str) -> list[Path]:
    return sorted(
        path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".pyi", ".pyx"}
    )


def parsed(path: Path) -> ast.Module:
    """Parse a file; of Cython only its import lines, which are written as Python writes them."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".pyx":
        text = "\n".join(
            line.strip()
            if re.match(r"\s*(import|from)\s+\w", line) and "cimport" not in line
            else ""
            for line in text.split("\n")
        )
    # Python 3.11 has one depth for all threads that make trees, and others do so when they print a
    # traceback (those of Ray, say, that tests before these have left).
    for _ in range(10):
        with contextlib.suppress(SystemError):
            return ast.parse(text, filename=str(path))
    return ast.parse(text, filename=str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "adapters":
        parts = ("pydedup", *parts)
    return ".".join(part for part in parts if part != "__init__")


@functools.cache
def is_module(name: str) -> bool:
    """Whether a dotted name below pydedup is a module of ours, and not a name inside of one."""
    base = ROOT.joinpath(*name.split("."))
    if base.is_dir() or any(base.with_suffix(end).exists() for end in (".py", ".pyx", ".pyi")):
        return True
    return name in {"pydedup._core", "pydedup._pages", "pydedup.adapters"}


@functools.cache
def imports(path: Path) -> tuple[Import, ...]:
    """Return each imported module; ``from package import module`` counts as ``package.module``."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[Import]:
    tree = parsed(path)
    nodes = list(ast.walk(tree))
    top = set(map(id, tree.body))
    for_types = {
        id(inner)
        for node in nodes
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    where = path.relative_to(ROOT).as_posix()
    package = module_name(path)
    if path.stem != "__init__":
        package = package.rpartition(".")[0]
    for node in nodes:
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                targets.append(full if base.startswith("pydedup") and is_module(full) else base)
        for target in dict.fromkeys(targets):
            yield Import(where, node.lineno, target, id(node) in top, id(node) in for_types)


def room_of(module: str) -> str:
    """Return the room of a module named from ``pydedup`` on."""
    parts = module.split(".")[1:]
    if ".".join(parts[:2]) in ALLOWED:
        return ".".join(parts[:2])
    return parts[0] if parts else ""


def root_of(target: str) -> str:
    return target.partition(".")[0]


def imports_of(folder: str) -> list[Import]:
    found = [found for path in python_files(folder) for found in imports(path)]
    assert found, f"no import was found in {folder}: this test reads the wrong place"
    return found


def listed(broken: list[Import]) -> str:
    return "\n".join(map(str, broken))


def test_table_has_no_circles() -> None:
    above: set[str] = set()
    for room, rooms in ALLOWED.items():
        assert rooms <= above, (
            f"{room!r} may import {rooms - above}, which come later or not at all"
        )
        above.add(room)
    assert not {"ingest", "registry", "store"} & ALLOWED["serving"]
    assert not {"serving", "registry", "store"} & ALLOWED["ingest"]


def test_every_file_is_in_a_room() -> None:
    rooms = {room_of(module_name(path)) for path in python_files("pydedup")}
    assert rooms <= set(ALLOWED), f"give {rooms - set(ALLOWED)} a row in ALLOWED"


def test_rooms_import_only_what_their_row_allows() -> None:
    broken = []
    for found in imports_of("pydedup"):
        if root_of(found.target) == "pydedup":
            room, target = room_of(module_name(ROOT / found.file)), room_of(found.target)
            if target != room and target not in ALLOWED.get(room, set()):
                broken.append(found)
    assert not broken, listed(broken)


def test_only_facades_import_the_core() -> None:
    # The row of every other room lacks it already; this says so even when a row is widened.
    users = {
        room_of(module_name(ROOT / found.file))
        for found in imports_of("pydedup")
        if found.target == "pydedup._core"
    }
    assert users, "nobody imports _core: this test reads the wrong place"
    assert users <= FACADES


def test_nobody_imports_the_adapters_or_a_driver() -> None:
    broken = [
        found
        for found in imports_of("pydedup")
        if found.target.startswith("pydedup.adapters") or root_of(found.target) in DRIVERS
        # What tests look at servers with must not be the adapter.
        if found.file not in ("pydedup/testing/mysql_servers.py", "pydedup/testing/shards.py")
    ]
    assert not broken, listed(broken)


def test_what_is_optional_is_imported_in_functions() -> None:
    standard = sys.stdlib_module_names | {"pydedup", "numpy"}
    broken = []
    for found in imports_of("pydedup"):
        room = room_of(module_name(ROOT / found.file))
        torch_here = {"torch"} if found.file in TORCH_FILES else set()
        allowed = standard | RUNTIME.get(room, set()) | torch_here
        stub = found.file.endswith(".pyi")
        if found.at_top and not stub and root_of(found.target) not in allowed:
            broken.append(found)
    assert not broken, listed(broken)


def test_what_pydedup_imports_on_demand_is_public() -> None:
    # These imports are made from names, which nobody sees who reads import statements.
    import pydedup

    assert pydedup._MODULES, "pydedup gives no module on demand: this test reads the wrong place"
    assert pydedup._MODULES <= PUBLIC


def test_torch_is_imported_where_it_is_meant_to_be() -> None:
    broken = [
        found
        for found in imports_of("pydedup")
        if root_of(found.target) == "torch"
        and not found.for_types
        and found.file not in TORCH_FILES
        and not found.file.startswith("pydedup/demo/")
    ]
    assert not broken, listed(broken)


def test_importing_pydedup_loads_nothing_optional() -> None:
    optional = ["torch", "onnx", "onnxruntime", "h5py", "psycopg", "mysql", "pyarrow"]
    optional += ["uvicorn", "orjson", "prometheus_client", "jinja2"]
    code = (
        "import sys, pydedup, pydedup.cli, pydedup.store\n"
        f"print([name for name in {optional!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ---- Python: the adapters -----------------------------------------------------------------------


def test_adapters_are_thin() -> None:
    broken = []
    for found in imports_of("adapters"):
        root, name = root_of(found.target), Path(found.file).name
        if root == "pydedup":
            room = room_of(found.target)
            if room != "adapters" and room not in ADAPTER_ROOMS:
                broken.append(found)
        elif root not in (sys.stdlib_module_names - DRIVERS) | ADAPTER_DRIVERS.get(name, set()):
            broken.append(found)
    assert not broken, listed(broken)


def test_an_adapter_is_short() -> None:
    """What needs the driver; all else is shared, or in private modules beside it."""
    lengths = {
        path.name: len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "adapters").glob("*.py")
        if path.stem in ("sqlite", "postgres", "mysql")
    }
    assert len(lengths) == 3
    assert max(lengths.values()) < 200, lengths


def test_importing_the_adapters_package_loads_no_driver() -> None:
    path = ROOT / "adapters" / "__init__.py"
    assert [found for found in imports(path) if found.target != "__future__"] == []


@pytest.mark.parametrize("folder", ["pydedup", "adapters", "tests", "bench", "examples"])
def test_nobody_imports_adapters_by_its_top_level_name(folder: str) -> None:
    # That name belongs to another project; importing it here would make every class twice.
    broken = [
        found
        for path in python_files(folder)
        if "adapters" in path.read_text(encoding="utf-8")  # parsing all tests takes seconds
        for found in imports(path)
        if root_of(found.target) == "adapters"
    ]
    assert not broken, listed(broken)


def test_sql_is_written_in_the_adapters_alone() -> None:
    statement = re.compile(
        r"^\s*(SELECT\s.*\sFROM\s|INSERT\s+INTO\s|UPDATE\s+\w+\s+SET\s|DELETE\s+FROM\s"
        r"|CREATE\s+(TABLE|VIEW|INDEX)\s|ALTER\s+TABLE\s|PRAGMA\s)",
        re.DOTALL,
    )
    first_word = re.compile("SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|PRAGMA")
    # Statements of users, and looks behind an adapter's back.
    of_tests = ROOT / "pydedup" / "testing"
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files("pydedup")
        if path.suffix == ".py" and not path.is_relative_to(of_tests)
        if first_word.search(path.read_text(encoding="utf-8"))
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and statement.match(node.value)
    ]
    assert not found, f"SQL outside of adapters/: {found}"
