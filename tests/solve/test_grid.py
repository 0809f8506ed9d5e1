"""Test that weights land on the grid, 0 among its values, and that ONNX Runtime dequantizes to the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comq_onnx.solve.grid import Grid, QuantizedWeight, check_codes, fit_minmax, fit_mse, round_to_grid, rtn

ALL_BITS = range(2, 9)
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    sharing = draw(st.sampled_from([{}, {"per_tensor": True}, {"block_size": 16}, {"block_size": 3}]))
    symmetric, signed = draw(st.sampled_from([(False, False), (True, False), (True, True)]))
    return Grid(draw(st.sampled_from(ALL_BITS)), symmetric, signed=signed, **sharing)


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 37)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.standard_normal(shape) * 10.0 ** draw(st.sampled_from([-30, -3, 0, 3, 15]))
    kind = draw(st.sampled_from(["normal", "positive", "negative", "sparse", "zero"]))
    weight = {
        "normal": weight,
        "positive": np.abs(weight),
        "negative": -np.abs(weight),
        "sparse": weight * (rng.random(shape) < 0.1),
        "zero": weight * 0,
    }[kind]
    return weight.astype(np.float32)


def valid(quantized: QuantizedWeight) -> None:
    """Check codes and zero points on the grid, and scales: positive normal numbers, one per block of each channel."""
    grid, (groups, out, inputs) = quantized.grid, quantized.codes.shape
    assert quantized.codes.dtype == quantized.zero_point.dtype == np.int8
    assert quantized.scale.dtype == np.float32
    assert quantized.scale.shape == quantized.zero_point.shape == (groups, out, grid.blocks(inputs))
    for numbers in (quantized.codes, quantized.zero_point):
        # a zero point on the grid is a code for exactly 0
        assert grid.qmin <= numbers.min()
        assert numbers.max() <= grid.qmax
    sizes = np.abs(quantized.scale) if grid.signed else quantized.scale
    assert np.isfinite(sizes).all()
    assert (sizes >= np.finfo(np.float32).tiny).all()
    if grid.symmetric:
        assert not quantized.zero_point.any()
    if grid.per_tensor:
        assert np.unique(quantized.scale).size == np.unique(quantized.zero_point).size == 1


@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_grid_has_two_to_the_bits_codes(bits: int) -> None:
    grid = Grid(bits)
    assert grid.qmax - grid.qmin + 1 == 2**bits
    assert grid.qmin == -grid.qmax - 1


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_that_no_container_holds_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}; 2 to 8"):
        Grid(bits)


@pytest.mark.parametrize("wrong", [{"block_size": 0}, {"block_size": -16}, {"block_size": 16, "per_tensor": True}])
def test_a_block_size_that_means_nothing_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="block size"):
        Grid(4, **wrong)


def test_granularity_is_what_the_command_line_writes() -> None:
    assert Grid(4).granularity == "channel"
    assert Grid(4, per_tensor=True).granularity == "tensor"
    assert Grid(4, block_size=32).granularity == "32"


@pytest.mark.parametrize(("inputs", "blocks"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_the_last_block_may_be_short(inputs: int, blocks: int) -> None:
    grid = Grid(4, block_size=16)
    assert grid.blocks(inputs) == blocks
    assert np.array_equal(grid.block_of(inputs), [i // 16 for i in range(inputs)])
    assert Grid(4).blocks(inputs) == 1
    assert not Grid(4).block_of(inputs).any()


@QUICK
@given(weights(), grids())
def test_rounding_stays_on_the_grid_and_keeps_zeros(weight: np.ndarray, grid: Grid) -> None:
    for scale, zero_point in (fit_minmax(weight, grid), fit_mse(weight, grid)):
        rounded = round_to_grid(weight, scale, zero_point, grid)
        valid(rounded)
        assert not rounded.dequantize()[weight == 0].any()


@QUICK
@given(weights(), grids())
def test_minmax_rounding_is_off_by_half_a_step_at_most(weight: np.ndarray, grid: Grid) -> None:
    rounded = rtn(weight, grid)
    step = rounded.scale[..., grid.block_of(weight.shape[-1])]
    # the zero point is rounded too, which moves the span by up to half a step: the end of it is clipped there
    most = 0.5 if grid.symmetric else 1.0
    # float32 division and multiplication: a code of up to 2^8 steps carries 2^8 * 2^-24 of them
    assert (np.abs(rounded.dequantize() - weight) <= step * (most + 2e-4)).all()


@QUICK
@given(weights(), grids())
def test_rounding_takes_the_nearest_code(weight: np.ndarray, grid: Grid) -> None:
    scale, zero_point = fit_mse(weight, grid)
    rounded = round_to_grid(weight, scale, zero_point, grid)
    block = grid.block_of(weight.shape[-1])
    codes = np.arange(grid.qmin, grid.qmax + 1)
    values = (codes - zero_point[..., block, None]) * scale[..., block, None].astype(np.float64)
    best = np.abs(values - weight[..., None]).min(axis=-1)
    ours = np.abs(rounded.dequantize().astype(np.float64) - weight)
    # two codes at the same distance up to float32's rounding of w / scale are both nearest
    assert (ours <= best + 1e-4 * np.abs(scale[..., block])).all()


@QUICK
@given(weights(), grids())
def test_the_mse_scale_is_no_worse_than_the_minmax_scale(weight: np.ndarray, grid: Grid) -> None:
    # shrinks holds 1 only nearly (linspace): asked for exactly, min-max is a candidate; errors that float32 can square
    weight = weight / max(float(np.abs(weight).max()), 1e-38)
    shrinks = np.asarray([1.0, 1.05, 0.9, 0.7, 0.5], np.float32)

    def loss(fit: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return ((round_to_grid(weight, *fit, grid).dequantize().astype(np.float64) - weight) ** 2).sum()

    # the choice is made on float32 sums of at most 555 squares
    assert loss(fit_mse(weight, grid, shrinks)) <= loss(fit_minmax(weight, grid)) * (1 + 1e-4) + 1e-12


def test_an_outlier_shrinks_the_mse_scale() -> None:
    weight = np.random.default_rng(0).standard_normal((1, 1, 512)).astype(np.float32)
    weight[0, 0, 7] = 12
    assert fit_mse(weight, Grid(4))[0] < 0.8 * fit_minmax(weight, Grid(4))[0]


@QUICK
@given(weights(), grids(), st.integers(-20, 20))
def test_scaling_a_weight_by_a_power_of_two_scales_its_grid(weight: np.ndarray, grid: Grid, power: int) -> None:
    weight = weight / max(float(np.abs(weight).max()), 1e-38)
    for fit in (fit_minmax, fit_mse):
        (scale, zero), (scale2, zero2) = fit(weight, grid), fit(np.ldexp(weight, power), grid)
        # a block of zeros has scale 1 whatever its neighbours are
        starts = np.arange(0, weight.shape[-1], grid.block_size or weight.shape[-1])
        some = np.logical_or.reduceat(weight != 0, starts, axis=-1) | (grid.per_tensor and bool(weight.any()))
        assert np.array_equal(scale2[some], np.ldexp(scale, power)[some])
        assert np.array_equal(zero2, zero)


def test_minmax_is_the_span_over_the_codes() -> None:
    weight = np.asarray([[[-1.0, 0.5, 2.0, 0.25], [0, 0, 0, 0]]], np.float32)
    scale, zero = fit_minmax(weight, Grid(4))
    assert np.array_equal(scale[..., 0], np.asarray([[2 / 7, 1]], np.float32))
    scale, zero = fit_minmax(weight, Grid(4, symmetric=False))
    assert np.array_equal(scale[..., 0], np.asarray([[3 / 15, 1]], np.float32))
    assert np.array_equal(zero[..., 0], [[-3, -8]])
    scale, _ = fit_minmax(weight, Grid(4, block_size=3))
    assert np.array_equal(scale[0, 0], np.asarray([2 / 7, 0.25 / 7], np.float32))


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_codes_survive_a_round_trip(symmetric: bool) -> None:
    for bits in ALL_BITS:
        grid = Grid(bits, symmetric)
        codes = np.arange(grid.qmin, grid.qmax + 1, dtype=np.int8).reshape(1, 1, -1)
        zero = np.full((1, 1, 1), 0 if symmetric else 1, np.int8)
        given_ = QuantizedWeight(codes, np.full((1, 1, 1), 0.37, np.float32), zero, grid)
        assert np.array_equal(round_to_grid(given_.dequantize(), given_.scale, zero, grid).codes, codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-36, 1e-20, 1e20, 1e37])
def test_extreme_weights_still_get_a_valid_grid(size: float, symmetric: bool) -> None:
    weight = np.random.default_rng(1).uniform(-1, 1, (1, 4, 20)).astype(np.float32) * np.float32(size)
    for sharing in ({}, {"per_tensor": True}, {"block_size": 16}):
        grid = Grid(4, symmetric, **sharing)
        for fit in (fit_minmax, fit_mse):
            # a squared error may overflow: then all spans are as good
            with np.errstate(over="ignore"):
                rounded = round_to_grid(weight, *fit(weight, grid), grid)
            valid(rounded)
            assert np.isfinite(rounded.dequantize()).all()


@pytest.mark.parametrize(
    ("fit", "symmetric"),
    [
        (fit_minmax, True),
        # rounding the zero point puts the lowest code half a step below the weight
        (fit_minmax, False),
        (fit_mse, True),
        (fit_mse, False),
    ],
)
def test_the_largest_float32_gets_a_valid_grid(fit, symmetric: bool) -> None:
    """Quantize -3.4e38, which a table of masks holds."""
    weight = np.asarray([[[-1, 1, 0.5, 0] * 5]], np.float32) * np.finfo(np.float32).max
    grid = Grid(4, symmetric)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = round_to_grid(weight, *fit(weight, grid), grid)
        valid(rounded)
        assert np.isfinite(rounded.dequantize()).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(weights(), grids())
def test_dequantize_is_onnx_runtimes_dequantize_linear(weight: np.ndarray, grid: Grid) -> None:
    quantized = rtn(weight, grid)
    groups, out, inputs = weight.shape
    codes = quantized.codes.reshape(groups * out, inputs)
    scale = quantized.scale.reshape(groups * out, -1)
    zero = quantized.zero_point.reshape(groups * out, -1)
    attributes: dict = {"axis": 0}
    if grid.per_tensor:
        scale, zero, attributes = scale[0, 0], zero[0, 0], {}
    elif grid.block_size is None:
        scale, zero = scale[:, 0], zero[:, 0]
    else:
        attributes = {"axis": 1, "block_size": grid.block_size}
    arrays = {"codes": codes, "scale": np.asarray(scale), "zero": np.asarray(zero)}
    values = [onnx.numpy_helper.from_array(a, name) for name, a in arrays.items()]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("DequantizeLinear", list(arrays), ["y"], **attributes)],
        "dequantize",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        values,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {})[0].reshape(weight.shape), quantized.dequantize())


@pytest.mark.parametrize(("code", "scale", "message"), [
    (7, 1.0, None),
    (-8, 1e-38, None),
    (8, 1.0, r"codes outside \[-8, 7\]"),
    (-9, 1.0, r"codes outside \[-8, 7\]"),
    (0, 0.0, "a scale is not a positive number"),
    (0, -1.0, "a scale is not a positive number"),
    (0, np.inf, "a scale is not a positive number"),
    (0, np.nan, "a scale is not a positive number"),
])  # fmt: skip
def test_codes_off_the_grid_and_scales_that_are_no_scales_are_caught(code: int, scale: float, message: str) -> None:
    weight = rtn(np.ones((1, 1, 3), np.float32), Grid(4))
    weight.codes[0, 0, 1], weight.scale[0, 0, 0] = code, scale
    if message is None:
        assert check_codes(weight) is weight.codes
        return
    with pytest.raises(ValueError, match=message):
        check_codes(weight)
