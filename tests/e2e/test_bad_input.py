# SPDX-License-Identifier: Apache-2.0
"""Bad input through the front door: a clear error each time, and the store still verifies."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest

import pydedup
from pydedup.errors import (
    ArgumentError,
    ConflictError,
    FormatError,
    NotAStoreError,
    NotFoundError,
    PydedupError,
    ReadOnlyError,
    StorageFullError,
    StoreError,
)
from pydedup.policies import Accuracy, Exact
from pydedup.testing.disks import SmallDisk

MODEL = {"w": np.arange(6000.0, dtype=np.float32).reshape(60, 100)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[pydedup.Store]:
    """A store with one model; afterwards that model must still be whole."""
    with pydedup.open(f"sqlite:///{tmp_path / 'store.db'}") as opened:
        opened.add("good", MODEL)
        yield opened
        assert [info.name for info in opened.models()] == ["good"]
        assert np.array_equal(opened.load("good")["w"], MODEL["w"])
        report = opened.verify()
        assert (report.errors, report.notes) == ([], [])


def _files(folder: Path) -> dict[str, Path]:
    """One good file of each format that can be written here."""
    with pydedup.open(f"sqlite:///{folder / 'maker.db'}") as maker:
        maker.add("m", {"embedding": MODEL["w"]})
        made = {}
        for suffix in ("safetensors", "pt", "npz", "npy", "onnx", "weights.h5"):
            path = folder / f"model.{suffix}"
            if suffix == "npy":
                np.save(path, MODEL["w"])
            else:
                try:
                    maker.export("m", path)
                except FormatError:
                    continue  # formats that need a graph of their own have their own tests
            made[suffix] = path
    assert {"safetensors", "pt", "npz", "npy"} <= set(made)
    return made


def test_truncated_files_of_each_format(store: pydedup.Store, tmp_path: Path) -> None:
    for suffix, path in _files(tmp_path).items():
        whole = path.read_bytes()
        for keep in (0, 1, 7, len(whole) // 2, len(whole) - 1):
            broken = tmp_path / f"cut-{keep}.{suffix}"
            broken.write_bytes(whole[:keep])
            with pytest.raises(FormatError) as caught:
                store.add("bad", broken)
            message = str(caught.value)
            assert broken.name in message, f"{suffix}: {message}"
            assert "\n" not in message


def test_a_pickle_with_code_never_runs(store: pydedup.Store, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {ran}",)

    for name in ("evil.pt", "evil.bin", "evil.npy", "evil.safetensors"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps({"w": Evil()}))
        with pytest.raises(FormatError, match=r"evil"):
            store.add("bad", path)
    import torch

    path = tmp_path / "zip.pt"
    torch.save({"w": Evil()}, path)
    with pytest.raises(FormatError, match=r"zip\.pt"):
        store.add("bad", path)
    assert not ran.exists()


def test_a_wrong_extension_is_read_right_or_refused(store: pydedup.Store, tmp_path: Path) -> None:
    made = _files(tmp_path)
    disguised = tmp_path / "really-safetensors.pt"
    disguised.write_bytes(made["safetensors"].read_bytes())
    store.add("disguised", disguised)
    assert np.array_equal(store.load("disguised")["embedding"], MODEL["w"])
    store.remove("disguised")
    store.vacuum()
    text = tmp_path / "notes.safetensors"
    text.write_text("these are not tensors\n")
    with pytest.raises(FormatError, match="notes"):
        store.add("bad", text)


def test_sources_that_are_not_there_or_nothing(store: pydedup.Store, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="missing"):
        store.add("bad", tmp_path / "missing.safetensors")
    (tmp_path / "empty-folder").mkdir()
    with pytest.raises(FormatError, match="empty-folder"):
        store.add("bad", tmp_path / "empty-folder")
    for nonsense in (42, None, object(), [1, 2]):
        with pytest.raises(PydedupError):
            store.add("bad", nonsense)
    with pytest.raises(PydedupError, match="complex128"):
        store.add("bad", {"w": np.zeros(3, complex)})
    with pytest.raises(PydedupError, match="'w'"):
        store.add("bad", {"w": np.array([{}, []], object)})


def test_blocks_that_no_page_holds(store: pydedup.Store) -> None:
    """They were refused behind the search and ``evaluate``, as `sizes` of the packer.

    Those that zeros make small were stored, and took all of their size beside the budget when read.
    """
    noise = np.random.default_rng(2).standard_normal((600, 512)).astype(np.float32)
    never = Accuracy(lambda _weights: pytest.fail("evaluated"), 0.1)
    for array, shape in ((noise, (512, 512)), (np.zeros_like(noise), (1 << 62, 1 << 62))):
        with pytest.raises(ArgumentError, match=r"block_shape .* is too large for 'w' of shape"):
            store.add("m", {"small": MODEL["w"], "w": array}, policy=never, block_shape=shape)
    fits = {"w": noise[:, :511]}
    assert store.add("m", fits, policy=Exact(), block_shape=(512, 512), dry_run=True).pages == 2


def _word_vectors(path: Path, numbers: np.ndarray[Any, Any]) -> None:
    rows = (" ".join(map(str, row)) for row in numbers.tolist())
    path.write_text("".join(f"word{i} {row}\n" for i, row in enumerate(rows)))


def _packed_keras(path: Path, numbers: np.ndarray[Any, Any]) -> None:
    with h5py.File(path, "w") as file:
        file["kernel"] = numbers
    weights = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", weights)


@pytest.mark.parametrize(
    ("write", "name"), [(_word_vectors, "m.txt"), (_packed_keras, "m.keras"), (np.save, "m.npy")]
)
def test_a_full_disk_of_temporary_files_is_no_fault_of_the_source(
    store: pydedup.Store,
    write: Callable[..., None],
    name: str,
    tmp_path: Path,
    new_disk: Callable[[Path, int], SmallDisk],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / name
    write(source, np.random.default_rng(1).random((10_000, 60), np.float32))
    monkeypatch.setenv("TMPDIR", str(new_disk(tmp_path / "disk", 1).folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # where Python remembers it
    with pytest.raises(StorageFullError, match=f"no space left .* in {tmp_path / 'disk'}; free"):
        store.add("large", source)


def test_nan_and_infinity_are_kept(store: pydedup.Store) -> None:
    odd = {"w": np.array([[np.nan, np.inf], [-np.inf, -0.0]], np.float32)}
    odd["w"].view(np.uint32)[0, 0] = 0x7FC12345  # a NaN with a payload
    store.add("odd", odd)
    assert store.load("odd")["w"].tobytes() == odd["w"].tobytes()
    with np.errstate(invalid="ignore"):
        assert np.isnan(store.tensor("odd", "w").matmul(np.ones((1, 2), np.float32))).any()
    store.remove("odd")
    store.vacuum()


def test_a_database_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as raw:
        raw.execute("CREATE TABLE pydedup_meta (x)")
        raw.execute("CREATE TABLE customers (name)")
    raw.close()
    text = tmp_path / "text.db"
    text.write_text("just some text, long enough to be looked at " * 40)
    plain = tmp_path / "plain.db"
    with sqlite3.connect(plain) as raw:
        raw.execute("CREATE TABLE customers (name)")
    raw.close()
    for path in (other, text, plain):
        before = path.read_bytes()
        for mode in ("a", "r"):
            with pytest.raises(StoreError, match=path.name):
                pydedup.open(f"sqlite:///{path}", mode=mode)
        assert path.read_bytes() == before
    with pytest.raises(NotAStoreError, match=r"nothing\.db"):
        pydedup.open(f"sqlite:///{tmp_path / 'nothing.db'}", mode="r")
    assert not (tmp_path / "nothing.db").exists()


def test_a_second_writer_waits_or_is_told(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    pydedup.open(f"sqlite:///{path}").close()
    raw = sqlite3.connect(path, isolation_level=None)
    raw.execute("BEGIN IMMEDIATE")
    try:
        with (
            pydedup.open(f"sqlite:///{path}?timeout=0.2") as store,
            pytest.raises(ConflictError, match=r"store\.db"),
        ):
            store.add("m", MODEL)
    finally:
        raw.execute("ROLLBACK")
        raw.close()
    with pydedup.open(f"sqlite:///{path}") as store:
        store.vacuum()
        store.add("m", MODEL)
        assert store.verify().errors == []
        assert store.verify().notes == []


def test_folders_that_do_not_allow_it(tmp_path: Path) -> None:
    with pytest.raises(PydedupError, match="no-such-folder"):
        pydedup.open(f"sqlite:///{tmp_path / 'no-such-folder' / 'store.db'}")
    with pytest.raises(PydedupError):
        pydedup.open(f"sqlite:///{tmp_path}")
    with pytest.raises(PydedupError, match="oracle"):
        pydedup.open("oracle://scott:tiger@host/db")
    with pytest.raises(PydedupError) as caught:
        pydedup.open("oracle://scott:tiger@host/db")
    assert "tiger" not in str(caught.value)


def _as_nobody(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    prefix = (
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    )
    return subprocess.run(
        [*prefix, sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": "/nonexistent"},
    )


def test_a_read_only_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """root may write anywhere, so a child without rights does the asking."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="pydedup-ro-", dir="/var/tmp"))
    try:
        folder.chmod(0o755)
        with pydedup.open(f"sqlite:///{folder / 'store.db'}") as store:
            store.add("m", MODEL)
        (folder / "store.db").chmod(0o644)
        if os.geteuid() != 0:
            folder.chmod(0o555)
        probe = _as_nobody("import pydedup")
        if probe.returncode != 0:
            pytest.skip("the interpreter cannot be run by an unprivileged user here")
        script = (
            "import sys, pydedup\n"
            "store = pydedup.open(sys.argv[1], mode=sys.argv[2])\n"
            "print(store.load('m')['w'].sum(), flush=True)\n"
            "store.add('n', {'w': store.load('m')['w']})\n"
        )
        done = _as_nobody(script, f"sqlite:///{folder / 'store.db'}", "r")
        assert float(done.stdout) == MODEL["w"].sum()
        assert ReadOnlyError.__name__ in done.stderr
        done = _as_nobody(script, f"sqlite:///{folder / 'store.db'}", "a")
        assert done.returncode != 0
        assert "pydedup.errors." in done.stderr.splitlines()[-1]
        done = _as_nobody(
            "import sys, pydedup; pydedup.open(sys.argv[1])", f"sqlite:///{folder / 'new.db'}"
        )
        assert "pydedup.errors." in done.stderr.splitlines()[-1]
        assert sorted(p.name for p in folder.iterdir()) == ["store.db"]
    finally:
        folder.chmod(0o755)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _has_open(pid: int, path: Path) -> bool:
    links = []
    for fd in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            links.append(fd.readlink())
    return path in links


def test_ctrl_c_in_the_middle(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as store:
        store.add("good", MODEL)
    source = tmp_path / "large.npy"
    np.save(source, np.random.default_rng(0).standard_normal((18000, 1000)).astype(np.float32))
    for delay in (0.0, 0.05, 0.15):
        child = subprocess.Popen(
            [sys.executable, "-m", "pydedup", "add", url, "large", str(source)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while child.poll() is None and not _has_open(child.pid, source):
            time.sleep(0.005)
        time.sleep(delay)
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate()
        # `python -m` ends as by the signal, 130 for a shell too, where that came within an exec of
        # text, as dataclasses are made, whoever caught it.
        assert child.returncode in (0, 130, -signal.SIGINT), stderr
        assert "Traceback" not in stderr
        assert child.returncode == 0 or "interrupted" in stderr
        with pydedup.open(url) as store:
            assert store.verify().errors == []
            assert np.array_equal(store.load("good")["w"], MODEL["w"])
            # Interrupted after its publishing transaction, an add is complete all the same.
            if "large" in {info.name for info in store.models()}:
                (loaded,) = store.load("large").values()
                assert np.array_equal(loaded, np.load(source))
                store.remove("large")
    with pydedup.open(url) as store:
        store.vacuum()
        report = store.verify()
        assert (report.errors, report.notes) == ([], [])


CUT_SHORT = """
import os, sys
import numpy as np
import pydedup
from pydedup.errors import FormatError
from safetensors.numpy import save_file

folder, workers = sys.argv[1], int(sys.argv[2])
path = f"{folder}/m.safetensors"
rng = np.random.default_rng(0)
model = {f"t{i}": rng.standard_normal((300, 300), np.float32) for i in range(30)}
save_file(model, path)
with pydedup.open(f"{folder}/cut.db") as store:
    try:
        store.add("m", path, progress=lambda *_: os.truncate(path, 100), workers=workers)
        assert all((store.load("m")[name] == array).all() for name, array in model.items())
    except FormatError as error:
        print(error)
        assert store.models() == []
    assert store.verify().errors == []
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_that_is_cut_short_while_it_is_added(tmp_path: Path, workers: int) -> None:
    """As by a job that saves its checkpoint again: an error, where a mapping would be SIGBUS."""
    done = subprocess.run(
        [sys.executable, "-c", CUT_SHORT, str(tmp_path), str(workers)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cut = ("m.safetensors is truncated", "m.safetensors ended early")  # before, or in a read
    # Several may have read all of it by then.
    assert any(said in done.stdout for said in cut) or (workers > 1 and not done.stdout)


@pytest.mark.parametrize("names", [("m@2", "m"), ("m", "m@2")])
def test_one_address_for_two_models_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    """A name without a version means the next number, which the other may have been given."""
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("m", MODEL)
        with pytest.raises(ArgumentError, match=f"m@2 is named twice in one add: '{names[1]}'"):
            store.add_many(dict.fromkeys(names, MODEL))
        assert [info.address for info in store.models()] == ["m@1"]
