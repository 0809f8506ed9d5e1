"""Test the grid of an activation: it covers the range that was seen, holds 0 and stays inside a Clip."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from comq_onnx.plan.activation_grid import ActivationGrid, fit_range
from comq_onnx.plan.observed_range import ObservedRange

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
dtypes = st.sampled_from(["uint8", "uint16"])
signed_too = st.sampled_from(["uint8", "uint16", "int8"])
numbers = st.one_of(st.floats(-1e6, 1e6, width=32), st.floats(-8, 8, width=32), st.sampled_from([0.0, 1e-35, -1e-35]))


@QUICK
@given(numbers, numbers, signed_too)
@example(0.0, 0.0, "uint8")
@example(0.0, 0.0, "int8")
@example(-3.0, 1.0, "int8")
@example(3.0, 5.0, "uint8")
@example(-5.0, -3.0, "uint16")
@example(-1e38, 1e38, "uint8")
def test_a_range_is_covered_and_holds_zero(first: float, second: float, dtype: str) -> None:
    low, high = min(first, second), max(first, second)
    grid = fit_range(low, high, dtype)
    assert grid.qmax == np.iinfo(dtype).max
    assert isinstance(grid.scale, np.float32)
    assert grid.scale > 0
    assert np.isfinite(grid.scale)
    assert 0 <= grid.zero_point <= grid.qmax
    assert grid.fake_quantize(np.zeros(1, np.float32))[0] == 0
    if max(high, 0) - min(low, 0) < 1e-29:
        return
    x = np.linspace(low, high, 1001).astype(np.float32)
    # half a step of rounding, and up to half a step that the rounded zero point cuts off at an end; float32 errors
    assert np.abs(grid.fake_quantize(x).astype(np.float64) - x).max() <= float(grid.scale) * (
        1 + 1e-3 * (1 + grid.qmax / 256)
    )


@QUICK
@given(
    numbers, numbers, dtypes, st.sampled_from([(0.0, np.inf), (0.0, 6.0), (-1.0, 1.0), (-3.0, np.inf), (-np.inf, 2.5)])
)
@example(-1.0, 1.0, "uint8", (-1.0, 1.0))
@example(0.0, 6.0, "uint8", (0.0, 6.0))
@example(0.0, 6.0, "uint16", (0.0, 6.0))
def test_no_code_leaves_the_bounds_of_a_clip(
    first: float, second: float, dtype: str, bounds: tuple[float, float]
) -> None:
    low, high = np.clip(sorted([first, second]), *bounds)
    assume(max(high, 0) - min(low, 0) > 1e-29)
    grid = fit_range(low, high, dtype, bounds)
    ends = grid.scale * np.asarray([-grid.zero_point, grid.qmax - grid.zero_point], np.float32)
    assert np.float32(bounds[0]) <= ends[0]
    assert ends[1] <= np.float32(bounds[1])
    assert grid.fake_quantize(np.zeros(1, np.float32))[0] == 0
    assert 0 < grid.scale < np.inf
    if bounds[0] == 0:
        # a Relu is fused only where the zero point is the lowest code
        assert grid.zero_point == 0
    plain = fit_range(low, high, dtype)
    if plain.zero_point == grid.zero_point:
        # the span shrinks by no more than the half step that the rounding of the zero point needs
        assert grid.scale >= plain.scale * (1 - 1 / grid.qmax)


def test_no_code_of_a_value_that_is_always_zero_leaves_the_bounds() -> None:
    """Test a dead Relu6: the runtime keeps the Clip, a float operator, unless all codes lie in [0, 6]."""
    grid = fit_range(0.0, 0.0, "uint8", (0.0, 6.0))
    assert grid.scale * grid.qmax <= 6


def test_a_span_that_is_all_of_six_ends_at_six() -> None:
    grid = fit_range(0.0, 6.0, "uint8", (0.0, 6.0))
    # the last float32 below 6 / 255 at most, since 255 of its neighbour above may round past 6
    assert grid.scale == pytest.approx(6 / 255, rel=1e-6)


@pytest.mark.parametrize("bounds", [None, (0.0, 6.0), (-1.0, np.inf)])
def test_a_signed_grid_is_symmetric_whatever_the_bounds(bounds: tuple[float, float] | None) -> None:
    grid = fit_range(-0.5, 4.0, "int8", bounds)
    assert (grid.zero_point, grid.qmin, grid.qmax) == (0, -128, 127)
    assert grid.scale == np.float32(4 / 127)
    # the nearer end is covered too
    np.testing.assert_allclose(grid.fake_quantize(np.array([-4, -0.5, 4], np.float32)), [-4, -0.5, 4], atol=2 / 127)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(numbers, numbers, signed_too, st.integers(0, 2**32 - 1))
def test_fake_quantize_is_onnx_runtimes_pair(first: float, second: float, dtype: str, seed: int) -> None:
    grid = fit_range(min(first, second), max(first, second), dtype)
    rng = np.random.default_rng(seed)
    spread = rng.uniform(-1, 2, 500) * (abs(first) + abs(second) + 1)
    ties = (rng.integers(grid.qmin - 10, grid.qmax + 10, 200) - grid.zero_point + 0.5) * np.float64(grid.scale)
    x = np.concatenate([spread, ties, [0, -0.0, 1e30, -1e30]]).astype(np.float32)
    assert np.array_equal(grid.fake_quantize(x), pair(x, grid))


def pair(x: np.ndarray, grid: ActivationGrid) -> np.ndarray:
    """Compute DequantizeLinear(QuantizeLinear(x)) in ONNX Runtime."""
    parts = {"s": np.asarray(grid.scale), "z": np.asarray(grid.zero_point, grid.dtype)}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [onnx.numpy_helper.from_array(a, n) for n, a in parts.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


# Observed ranges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_range_does_not_forget_what_is_not_finite(bad: float, place: int) -> None:
    seen = ObservedRange()
    for i in range(3):
        seen.observe(np.full(4, bad if i == place else i, np.float32))
    assert not np.isfinite([seen.low, seen.high]).all()


def test_a_range_grows_with_every_batch() -> None:
    seen = ObservedRange()
    assert seen.grid("uint8", None) == ActivationGrid(np.float32(1), 0, "uint8")
    seen.observe(np.zeros((0, 3), np.float32))
    assert seen.grid("uint8", None) == ActivationGrid(np.float32(1), 0, "uint8")
    seen.observe(np.asarray([-1, 2], np.float32))
    seen.observe(np.asarray([[0.5], [3]], np.float32))
    assert (seen.low, seen.high) == (-1, 3)
    assert seen.grid("uint8", None) == fit_range(-1, 3, "uint8")
    assert seen.grid("uint16", (0, 2)) == fit_range(-1, 3, "uint16", (0, 2))
