"""Test files of arrays: what they may hold, and that damaged and hostile ones are refused."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import VECTOR, an_input

import comq_onnx
from comq_onnx.errors import SamplesError
from comq_onnx.runtime import memory
from comq_onnx.samples.load import load_samples
from models import mlp, normal, samples_for


@pytest.mark.parametrize("form", ["npz", "compressed", "npy", "folder", "mapping", "lists"])
def test_arrays_are_read_whatever_the_form(tmp_path: Path, form: str) -> None:
    x = normal(24, 32)
    source: Any = tmp_path / "s.npz"
    match form:
        case "npz":
            np.savez(source, x=x)
        case "compressed":
            np.savez_compressed(source, x=x)
        case "npy":
            source = tmp_path / "s.npy"
            np.save(source, x)
        case "folder":
            source = tmp_path
            for i in range(3):
                np.savez(tmp_path / f"part{i}.npz", x=x[8 * i : 8 * i + 8])
        case "mapping":
            source = {"x": x}
        case "lists":
            source = {"x": [list(map(float, row)) for row in x]}
    np.testing.assert_array_equal(load_samples(source, VECTOR).arrays["x"], x)


def test_a_folder_of_npy_files_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    x = normal(6, 32)
    for i in (2, 0, 1):
        np.save(tmp_path / f"{i}.npy", x[2 * i : 2 * i + 2])
    np.testing.assert_array_equal(load_samples(tmp_path, VECTOR).arrays["x"], x)


def test_arrays_that_no_input_wants_are_ignored_in_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=normal(8, 32), label=np.arange(8))
    assert list(load_samples(tmp_path / "s.npz", VECTOR).arrays) == ["x"]


def test_a_folder_is_quantized_from(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    samples = samples_for(mlp())["x"]
    for i in range(4):
        np.savez(tmp_path / "parts" / f"{i}.npz", x=samples[10 * i : 10 * i + 10])
    report = comq_onnx.quantize(mlp(), tmp_path / "q.onnx", tmp_path / "parts", bits=8, device="cpu")
    assert report.samples == {"source": str(tmp_path / "parts"), "used": 35, "held_back": 5}


def test_parts_of_different_shapes_are_refused_by_the_files_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", normal(4, 32))
    np.save(tmp_path / "b.npy", normal(4, 31))
    with pytest.raises(SamplesError, match=r"b\.npy"):
        load_samples(tmp_path, VECTOR)


def test_parts_of_different_names_are_refused_by_the_files_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=normal(4, 32))
    np.savez(tmp_path / "b.npz", y=normal(4, 32))
    with pytest.raises(SamplesError, match=r"b\.npz"):
        load_samples(tmp_path, VECTOR)


def test_one_array_for_several_inputs_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", normal(4, 32))
    with pytest.raises(SamplesError, match=r"one array for 2 inputs \(a, b\)"):
        load_samples(tmp_path / "a.npy", [an_input(None, 32, name="a"), an_input(None, 32, name="b")])


@pytest.mark.parametrize("name", ["s.md", "s.onnx", "s.csv"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("1, 2, 3")
    with pytest.raises(SamplesError, match=r"samples are \.npz, \.npy, input_<i>\.pb"):
        load_samples(tmp_path / name, VECTOR)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="no such file or folder"):
        load_samples(tmp_path / "nothing.npz", VECTOR)
    with pytest.raises(SamplesError, match="the folder holds no samples"):
        load_samples(tmp_path, VECTOR)


@pytest.mark.parametrize("name", ["s.npz", "s.npy"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no zip", b"\x93NUMPY\x01\x00", b"text"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SamplesError, match="cannot be read"):
        load_samples(tmp_path / name, VECTOR)


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"s.{suffix}"
    if suffix == "npz":
        np.savez_compressed(path, x=normal(100, 32))
    else:
        np.save(path, normal(100, 32))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(SamplesError, match=path.name):
        load_samples(path, VECTOR)


def test_a_damaged_member_of_an_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez_compressed(path, x=normal(100, 32))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(SamplesError, match="cannot be read"):
        load_samples(path, VECTOR)


class _Trap:
    """Make a folder when this is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", ["npz", "npy", "pickle called npy"])
def test_nothing_is_ever_unpickled(tmp_path: Path, suffix: str) -> None:
    array = np.array([_Trap(tmp_path / "sprung")], dtype=object)
    path = tmp_path / ("s.npz" if suffix == "npz" else "s.npy")
    if suffix == "npz":
        np.savez(path, x=array)
    elif suffix == "npy":
        np.save(path, array, allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    with pytest.raises(SamplesError, match="without pickles"):
        load_samples(path, VECTOR)
    assert not (tmp_path / "sprung").exists()


def _npy(shape: object, content: bytes, descr: str = "<f4", version: tuple[int, int] = (1, 0)) -> bytes:
    """Make an .npy file whose header may lie."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return (
        b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(header)) + header + content
    )


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_npy("(1099511627776, 32)", bytes(128)), "should hold"),
        (_npy("(4611686018427387904, 4611686018427387904)", bytes(128)), "should hold"),
        (_npy("(-1, 32)", bytes(128)), "should hold"),
        (_npy("(2, 32)", bytes(128)), "should hold"),
        (_npy("(2, 32", bytes(256)), "damaged header"),
        (_npy("(2, 32)", bytes(256), version=(9, 9)), "version"),
        (_npy("__import__('os').abort()", bytes(256)), "damaged header"),
        (_npy("(1,)" + "," * 60_000, bytes(4), version=(2, 0)), "damaged header"),
    ],
    ids=["terabytes", "overflow", "negative", "short", "brackets", "version", "code", "long"],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(
    tmp_path: Path, suffix: str, content: bytes, words: str
) -> None:
    path = tmp_path / f"s.{suffix}"
    if suffix == "npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    tracemalloc.start()
    with pytest.raises(SamplesError, match=words):
        load_samples(path, VECTOR)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_an_archive_that_unpacks_to_more_than_fits_is_refused(tmp_path: Path) -> None:
    # 2 MB that would become 64 GB of zeros: the members overlap
    with zipfile.ZipFile(tmp_path / "s.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("x.npy", _npy("(131072, 32)", bytes(1 << 24)))
    whole = (tmp_path / "s.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "s.npz") as archive:
        entry = whole[archive.start_dir : whole.rindex(b"PK\x05\x06")]
    count = 4096
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(entry) * count, archive.start_dir, 0)
    (tmp_path / "s.npz").write_bytes(whole[: archive.start_dir] + entry * count + end)
    with pytest.raises(SamplesError, match=r"68\.7 GB of arrays when unpacked"):
        load_samples(tmp_path / "s.npz", VECTOR)


def test_only_the_arrays_that_are_wanted_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "s.npz", x=normal(10, 32), other=np.zeros(100_000))
    monkeypatch.setattr(memory, "free", lambda: 10_000)
    assert len(load_samples(tmp_path / "s.npz", VECTOR)) == 10


def test_members_that_lead_elsewhere_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "s.npz", "w") as archive:
        for name in ("x.npy", "../up.npy", "/etc/comq.npy"):
            archive.writestr(name, _npy("(4, 32)", bytes(512)))
    assert len(load_samples(tmp_path / "in" / "s.npz", VECTOR)) == 4
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "s.npz"]
