"""Test codes in a file: containers and bit planes hold what was put in, at every optimization level of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comq_onnx.model import graph as graphs
from comq_onnx.runtime.session import Session
from comq_onnx.targets.catalog import ORT_CPU
from comq_onnx.write import codes
from models import build

CONTAINERS = {"INT8": np.arange(-128, 128), "INT4": np.arange(-8, 8), "INT2": np.array([-2, -1, 0, 1])}


def passing(opset: int = 21) -> ir.Model:
    """Build a model that codes can be added to."""
    return ir.from_proto(build("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=opset, ir_version=10))


def test_packed_codes_survive_the_file(tmp_path: Path) -> None:
    model = ir.from_proto(build("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=25, ir_version=13))
    for container, numbers in CONTAINERS.items():
        graphs.add_initializer(model.graph, container, codes.pack(numbers.reshape(2, -1), container))
    ir.save(model, tmp_path / "m.onnx")
    read = ir.load(tmp_path / "m.onnx").graph.initializers
    for container, numbers in CONTAINERS.items():
        tensor = read[container].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy().astype(int).ravel(), numbers)
        assert tensor.nbytes == -(-numbers.size * int(container[3:]) // 8)


def unpack(plane: np.ndarray, width: int, shift: int, signed: bool, count: int) -> np.ndarray:
    """Return the codes of a bit plane."""
    return codes.field_table(width, shift, signed)[plane].ravel()[:count]


@given(st.integers(2, 8), st.lists(st.integers(-128, 127), min_size=1, max_size=40))
def test_planes_hold_the_codes(bits: int, numbers: list[int]) -> None:
    lowest = 1 << (bits - 1)
    given_codes = np.clip(numbers, -lowest, lowest - 1).astype(np.int8)
    planes = tuple(width for width in (4, 2, 1) if bits & width) or (4, 4)
    shifts = [sum(planes[k + 1 :]) for k in range(len(planes))]
    whole = np.zeros(len(numbers), np.int8)
    for k, (width, shift) in enumerate(zip(planes, shifts, strict=True)):
        plane = codes.pack_plane(given_codes, width, shift)
        assert plane.nbytes == -(-len(numbers) * width // 8)
        whole |= unpack(plane, width, shift, k == 0, len(numbers))
    np.testing.assert_array_equal(whole, given_codes)


@pytest.mark.parametrize("shape", [(8, 16), (3, 5, 1, 1), (7,)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("level", [0, 1, 99])
def test_the_runtime_joins_the_planes(bits: int, shape: tuple[int, ...], level: int) -> None:
    model = passing(18)
    rng = np.random.default_rng(bits)
    numbers = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape).astype(np.int8)
    planes = ORT_CPU.integer.planes(bits, 18)
    assert sum(planes) == bits
    value = codes.store(model, "w", numbers, "INT8", planes)
    model.graph.outputs.append(value)
    found = Session(ir.to_proto(model).SerializeToString(), level=level).run({"x": np.zeros(2, np.float32)})
    np.testing.assert_array_equal(found[str(value.name)], numbers)


def test_equal_codes_are_stored_once_and_others_apart() -> None:
    model = passing()
    first = np.arange(-4, 4, dtype=np.int8)
    for planes in ((), (2, 1)):
        one = codes.store(model, "w", first, "INT8", planes)
        assert codes.store(model, "w", first.copy(), "INT8", planes) is one
        other = codes.store(model, "w", first[::-1].copy(), "INT8", planes)
        assert other is not one
        turned = codes.store(model, "w", first.reshape(2, 4), "INT8", planes)
        assert turned is not one
        assert turned is not other


@pytest.mark.parametrize(
    ("bits", "opset", "planes"),
    [
        (2, 25, ()), (2, 21, (2,)), (3, 21, (2, 1)), (4, 21, ()), (4, 18, (4,)), (5, 21, (4, 1)), (6, 21, (4, 2)),
        (7, 18, (4, 2, 1)), (8, 21, ()), (3, 17, ()), (5, 13, ()),
    ],
)  # fmt: skip
def test_which_widths_take_planes(bits: int, opset: int, planes: tuple[int, ...]) -> None:
    assert ORT_CPU.integer.planes(bits, opset) == planes
