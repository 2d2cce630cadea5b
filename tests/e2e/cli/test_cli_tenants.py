# SPDX-License-Identifier: Apache-2.0
"""``pydedup stats --by`` and ``quota`` as they are run."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup.testing.program import run_here


def succeed(*arguments: object) -> str:
    done = run_here(*arguments)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def document(*arguments: object) -> Any:
    return json.loads(succeed(*arguments, "--json"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files base, a, b: a shares half of base, b is of its own."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((512, 64)).astype(np.float32)
    a = base.copy()
    a[256:] = rng.standard_normal((256, 64))
    for name, array in (("base", base), ("a", a), ("b", rng.standard_normal((512, 64)))):
        np.savez(tmp_path / f"{name}.npz", w=array.astype(np.float32))
    return tmp_path


def test_a_tenant_with_a_quota(folder: Path, store_url: str) -> None:
    url = store_url
    succeed("add", url, "base", folder / "base.npz", "-q")
    succeed("add", url, "a", folder / "a.npz", "--metadata", "tenant=acme", "-q")
    lines = succeed("stats", url, "--by", "tenant").splitlines()
    assert lines[0].split() == ["tenant", "Models", "Weights", "Shared", "Marginal"]
    assert [line.split()[0] for line in lines[1:3]] == ["acme", "(none)"]
    assert "counted once" in lines[3]
    found = document("stats", url, "--by", "tenant")
    acme = next(value for value in found["values"] if value["value"] == "acme")
    assert acme["logical_bytes"] == 512 * 64 * 4
    assert 0 < acme["marginal_bytes"] < acme["logical_bytes"]
    assert acme["quota"] is None
    assert found["used_bytes"] == found["shared_bytes"] + sum(
        value["marginal_bytes"] for value in found["values"]
    )

    assert "no quota" in succeed("quota", url)
    said = succeed("quota", url, "tenant=acme", "100kB")
    assert said == "tenant=acme may take 97.7 KiB (100,000 bytes), marginal\n"
    listed = document("quota", url)["quotas"]
    assert listed == [
        {
            "key": "tenant",
            "value": "acme",
            "bytes": 100_000,
            "measure": "marginal",
            "used_bytes": acme["marginal_bytes"],
            "used_by": "acme",
        }
    ]
    assert "tenant=acme" in succeed("quota", url).splitlines()[1]
    for dry_run in (["--dry-run"], []):
        refused = run_here("add", url, "b", folder / "b.npz", "--metadata", "tenant=acme", *dry_run)
        assert (refused.returncode, refused.stdout) == (7, "")
        assert refused.stderr.startswith("pydedup: error: with this add, tenant=acme would take")
        assert "over its quota of 100,000" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert "Left" in succeed("stats", url, "--by", "tenant").splitlines()[0]
    assert "over" not in succeed("stats", url, "--by", "tenant")
    assert "are refused" in succeed("quota", url, "tenant=acme", "1kB")
    assert "over" in succeed("stats", url, "--by", "tenant")
    assert "no quota any more" in succeed("quota", url, "tenant=acme", "--delete")
    succeed("add", url, "b", folder / "b.npz", "--metadata", "tenant=acme", "-q")


def test_each_other_value(folder: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/models.db"
    succeed("add", url, "a", folder / "a.npz", "--metadata", "tenant=acme", "-q")
    said = succeed("quota", url, "tenant", "200kB", "--measure", "logical")
    assert (
        said
        == "each tenant without a quota of its own may take 195.3 KiB (200,000 bytes), logical\n"
    )
    ((quota,),) = [document("quota", url, "tenant=acme")["quotas"]]
    assert (quota["value"], quota["used_bytes"]) == (None, 512 * 64 * 4)
    (most,) = document("quota", url, "tenant")["quotas"]
    assert (most["used_bytes"], most["used_by"]) == (512 * 64 * 4, "acme")
    row = succeed("quota", url).splitlines()[1]
    assert row.split()[-5:] == ["128.0", "KiB", "(acme)", "67.3", "KiB"]
    assert document("quota", url, "team=x")["quotas"] == []
    assert "no quota for team=x" in succeed("quota", url, "team=x")
    refused = run_here("add", url, "b", folder / "b.npz", "--metadata", "tenant=acme", "-q")
    assert refused.returncode == 7
    succeed("add", url, "b", folder / "b.npz", "--metadata", "tenant=other", "-q")
    # Who has a quota of his own does not count for that of the others, nor does who has no tenant.
    succeed("add", url, "base", folder / "base.npz", "-q")
    for tenant in ("acme", "other"):
        said = succeed("quota", url, f"tenant={tenant}", "1GB")
        most, *_ = document("quota", url, "tenant")["quotas"]
        by = {"acme": "other", "other": None}[tenant]
        assert (most["used_bytes"], most["used_by"]) == (512 * 64 * 4 if by else 0, by)
    assert "0 B" in succeed("quota", url, "tenant").splitlines()[1]
    succeed("quota", url, "tenant=other", "--delete")
    said = succeed("quota", url, "tenant", "1kB", "--measure", "logical")
    assert "tenant=other takes 128.0 KiB already" in said


def test_a_key_that_no_model_has(folder: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/models.db"
    succeed("add", url, "base", folder / "base.npz", "-q")
    assert "has the key 'tenant' in its metadata; there is none at all" in succeed(
        "stats", url, "--by", "tenant"
    )
    metadata = ("--metadata", "team=x", "--metadata", "tenant=acme")
    succeed("add", url, "a", folder / "a.npz", *metadata, "-q")
    said = succeed("stats", url, "--by", "tennant")
    assert said == "no model has the key 'tennant' in its metadata; there are: team, tenant\n"
    found = document("stats", url, "--by", "tennant")
    assert [value["value"] for value in found["values"]] == [None]
    assert found["keys"] == ["team", "tenant"]


def test_a_key_that_models_on_a_damaged_page_have(folder: Path, tmp_path: Path) -> None:
    """No model had it, it was said, though the error behind that names those that were left out."""
    path = tmp_path / "models.db"
    succeed("add", path, "base", folder / "base.npz", "-q")
    succeed("add", path, "a", folder / "a.npz", "--metadata", "tenant=acme", "-q")
    succeed("add", path, "b", folder / "b.npz", "-q")
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE pydedup_pages SET payload = zeroblob(99) WHERE id = 1")
    done = run_here("stats", path, "--by", "tenant")
    assert done.returncode == 4
    assert "no model that can be read has the key 'tenant' in its metadata" in done.stdout
    assert "a@1" in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("tenant=a", "--delete"), 3, "there is no quota for tenant=a; there is none at all"),
        (("--delete",), 2, "--delete takes the KEY=VALUE"),
        (("tenant=a", "5", "--delete"), 2, "without a SIZE"),
        (("tenant=a", "much"), 2, "'much' is not a size"),
        (("tenant=a", "1.5"), 2, "write a unit, e.g. 1.5GB"),
        (("tenant=a", "-5"), 2, "-5"),
        (("tenant=a", "99999999TB"), 2, "not within 1 byte and 8 EiB"),
        (("tenant=", "5"), 2, "tenant= names no value"),
        (("=a", "5"), 2, "'=a' is not KEY=VALUE"),
        (("tenant=a", "5", "--measure", "gross"), 2, "gross"),
    ],
)
def test_what_is_wrong_is_said(
    words: tuple[str, ...], status: int, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "models.db"
    pydedup.open(path).close()
    done = run_here("quota", path, *words)
    assert done.returncode == status
    assert said in done.stderr
    assert run_here("quota", tmp_path / "none.db", "tenant=a", "5").returncode == 3
    assert not (tmp_path / "none.db").exists()
