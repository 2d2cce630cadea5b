# SPDX-License-Identifier: Apache-2.0
"""The walls of docs/architecture.md within the C++ core, held by reading every #include."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


AREAS = {"hash", "similarity", "codec", "gemm"}

#: Folder of csrc/src -> the folders whose headers it may include, besides its own and the public
#: ones. Kernels share tables of function pointers and nothing else: not even public headers.
CXX_ALLOWED: dict[str, set[str]] = {
    "base": set(),
    "kernels": set(),
    "dispatch": {"base", "kernels"},
    **{area: {"base", "kernels", "dispatch"} for area in sorted(AREAS)},
    "packing": {"base", "kernels", "dispatch"} | AREAS,
    "storage": {"base", "kernels", "dispatch"} | AREAS,
}
#: Other system headers bring inline functions, which compiled with ISA flags could become the copy
#: that the linker keeps for everybody.
KERNEL_HEADERS = {"cstddef", "cstdint"}
INTRINSICS = {"immintrin.h", "arm_neon.h", "x86intrin.h", "emmintrin.h"}


def cxx_files(folder: str) -> list[Path]:
    found = sorted(path for path in (CSRC / folder).rglob("*") if path.suffix in {".cpp", ".hpp"})
    assert found, f"no C++ in csrc/{folder}: this test reads the wrong place"
    return found


def includes(path: Path) -> list[str]:
    """Return included headers, system headers in angle brackets as written."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r'^\s*#\s*include\s*(<[^>]+>|"[^"]+")', text, re.MULTILINE)
    return [name if name.startswith("<") else name.strip('"') for name in found]


def test_the_core_knows_nothing_of_python() -> None:
    for path in cxx_files("src") + cxx_files("include"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bPython\.h\b|pybind11|\bPyObject\b", text), path


def test_public_headers_stand_alone() -> None:
    for path in cxx_files("include"):
        for name in includes(path):
            assert name.strip("<>") not in INTRINSICS, f"{path} includes {name}"
            assert name.startswith(("<", "pydedup/")), f"{path} includes {name}"
        assert not re.search(r"\b__m(128|256|512)", path.read_text(encoding="utf-8")), path


def test_kernels_include_tables_and_intrinsics_alone() -> None:
    for path in cxx_files("src/kernels"):
        for name in includes(path):
            if name.startswith("<"):
                vector = not path.stem.startswith("scalar") and "_scalar" not in path.stem
                own = "arm_neon.h" if "neon" in path.stem else "immintrin.h"
                allowed = KERNEL_HEADERS | ({own} if vector else set())
                assert name.strip("<>") in allowed, f"{path} includes {name}"
            else:
                assert name.startswith("kernels/"), f"{path} includes {name}"


def test_native_folders_point_one_way() -> None:
    folders = {path.relative_to(CSRC / "src").parts[0] for path in cxx_files("src")}
    assert folders <= set(CXX_ALLOWED), f"give {folders - set(CXX_ALLOWED)} a row in CXX_ALLOWED"
    broken = []
    for path in cxx_files("src"):
        folder = path.relative_to(CSRC / "src").parts[0]
        for name in includes(path):
            target = name.partition("/")[0]
            if name.startswith("<") or target == folder:
                continue
            if target not in CXX_ALLOWED[folder] and not (
                target == "pydedup" and folder != "kernels"
            ):
                broken.append(f"{path.relative_to(ROOT)} includes {name}")
    assert not broken, "\n".join(broken)


def test_bindings_see_public_headers_alone() -> None:
    for path in cxx_files("bindings"):
        for name in includes(path):
            local = (path.parent / name).exists()
            assert local or name.startswith(("<", "pydedup/", "pybind11/")), f"{path}: {name}"
