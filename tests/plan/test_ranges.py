"""Test activation ranges, chosen by the error that rounding makes in the outputs of the readers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Done

from comq_onnx.model.convolutions import Conv
from comq_onnx.model.operators import MatMul
from comq_onnx.model.prepare import prepare_model
from comq_onnx.plan import ranges
from comq_onnx.plan.activation_grid import fit_range
from comq_onnx.plan.activations import plan_activations
from comq_onnx.plan.ranges import Objective, Positions, Reader, choose, mix, readers
from comq_onnx.targets.catalog import ORT_CPU
from models import build, cnn, normal, weight


def taken(x: np.ndarray, axis: int, batches: int) -> Positions:
    """Observe an array in some batches."""
    seen = Positions(axis)
    for part in np.array_split(x, batches):
        seen.observe(part)
    return seen


# Positions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), [((40, 7, 9, 5), 1), ((40, 11, 6), -1), ((300, 8), -1), ((64, 5, 30), 1)])
def test_positions_do_not_depend_on_the_batches(shape: tuple[int, ...], axis: int) -> None:
    x = normal(*shape)
    rows, shares = taken(x, axis, 1).rows()
    for batches in (2, 7, shape[0]):
        others = taken(x, axis, batches).rows()
        assert np.array_equal(rows, others[0])
        assert np.array_equal(shares, others[1])
    assert shares.sum() == pytest.approx(1, rel=1e-5)


def test_few_positions_are_all_taken() -> None:
    x = normal(10, 4, 6, 5)
    rows, shares = taken(x, 1, 3).rows()
    every = np.moveaxis(x, 1, -1).reshape(-1, 4)
    assert np.array_equal(np.unique(rows, axis=0), np.unique(every, axis=0))
    assert np.allclose(shares, 1 / 300)


def test_the_largest_are_among_them_and_the_rest_stands_for_all() -> None:
    x = normal(40_000, 6)
    x[123, 2], x[39_999, 0] = -60, 50
    rows, shares = taken(x, -1, 9).rows()
    assert len(rows) <= ranges.DRAWN + ranges.EXTREME
    assert rows.min() == -60
    assert rows.max() == 50
    # the mean square, of which the two outliers make 0.03, as exactly as a thousand draws give it
    assert shares @ np.square(rows).sum(axis=1) == pytest.approx(np.square(x).sum(axis=1).mean(), rel=0.05)


def test_many_channels_take_no_more_memory() -> None:
    x = normal(600, 20_000)
    rows, _ = taken(x, -1, 2).rows()
    assert rows.size <= ranges.MOST_NUMBERS


def test_few_positions_are_not_enough_to_choose_by() -> None:
    seen = Positions(-1)
    seen.observe(np.zeros((0, 4), np.float32))
    seen.observe(np.zeros(4, np.float32))
    seen.observe(np.zeros((ranges.LEAST - 1, 4), np.float32))
    assert not seen.enough
    seen.observe(np.zeros((1, 4), np.float32))
    assert seen.enough


# Readers --------------------------------------------------------------------------------------------------------------

RESIDUAL = build(
    """g (float[n, 8, 12, 12] x) => (float[n, 8, 6, 6] y, float[n, 8, 12, 12] z) {
        [first] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
        r = Relu (a)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
        [pooled] y = Conv <pads = [1, 1, 1, 1]> (p, w2)
        [second] b = Conv <pads = [1, 1, 1, 1]> (r, w3)
        z = Add (b, r)
    }""",
    {name: weight(8, 8, 3, 3, seed=i, fan=72) for i, name in enumerate(("w1", "w2", "w3"))},
)


def test_readers_are_found_through_a_pool_and_beside_a_sum() -> None:
    prepared = prepare_model(ir.from_proto(RESIDUAL), 17, 13)
    plan = plan_activations(prepared.model, prepared.layers, ORT_CPU, "uint8")
    found = readers(prepared, plan)
    assert {name: {x.name for x in who.layers} for name, who in found.items()} == {
        "x": {"first"},
        "r": {"pooled", "second"},
    }
    assert found["r"].passed_on
    assert not found["x"].passed_on
    assert found["r"].axis == 1


# The objective --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (MatMul((48, 300)), (48, 300)),
        (Conv((40, 12, 3, 3), 1, (1, 1), (1, 1), (0, 0, 0, 0), "NOTSET"), (40, 12, 3, 3)),
        (Conv((32, 4, 3, 3), 4, (1, 1), (1, 1), (0, 0, 0, 0), "NOTSET"), (32, 4, 3, 3)),
    ],
)
def test_mixed_outputs_keep_the_size_of_an_error(kind: MatMul | Conv, shape: tuple[int, ...]) -> None:
    w = weight(*shape)
    matrix = np.ascontiguousarray(kind.to_matrix(w))
    mixed = mix(kind, matrix, np.random.default_rng(0))
    channels = 48 if isinstance(kind, MatMul) else kind.groups * shape[1]
    assert mixed.shape == (channels, ranges.MIXED)
    error = normal(4000, channels) * np.linspace(0.1, 3, channels, dtype=np.float32)
    # errors are independent from place to place: the mean square over positions of the layer's output
    places = int(np.prod(kind.kernel))
    square = np.square(matrix).reshape(*matrix.shape[:2], -1, places).sum(axis=(1, 3)).reshape(-1)
    exact = float((np.square(error).mean(axis=0) * square).sum())
    assert np.square(error @ mixed).sum(axis=1).mean() == pytest.approx(exact, rel=0.25)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_cost_is_the_error_of_the_readers_over_their_outputs(has_bias: bool) -> None:
    rows, w = normal(500, 10) + 1, normal(10, 7, seed=1)
    shares = np.full(500, 1 / 500, np.float32)
    # clipped on one side, so that the error has a mean
    grid = fit_range(-2.0, 1.5, "uint8")
    error = grid.fake_quantize(rows) - rows
    centred, middle = (error - error.mean(axis=0), rows - rows.mean(axis=0)) if has_bias else (error, rows)
    of_reader = np.square(centred @ w).sum() / np.square(middle @ w).sum()
    passed = np.square(error).sum() / np.square(rows - rows.mean(axis=0)).sum()
    reader = Reader(w, has_bias)
    cost = Objective.of(rows, shares, [reader], passed_on=False).cost(grid)
    assert cost == pytest.approx(of_reader, rel=1e-3)
    assert Objective.of(rows, shares, [reader], passed_on=True).cost(grid) == pytest.approx(
        of_reader + passed, rel=1e-3
    )
    assert Objective.of(rows, shares, [], passed_on=False).cost(grid) == pytest.approx(passed, rel=1e-3)


def outliers(matters: bool) -> tuple[Objective, np.ndarray]:
    """Make a thousand positions with outliers in one channel, some 80 times as large, which the reader uses or not."""
    rows, w = normal(1000, 16), weight(16, 40)
    rows[::50, 3] *= 80
    if not matters:
        w[3] = 0
    return Objective.of(rows, np.full(1000, 1e-3, np.float32), [Reader(w, True)], passed_on=False), rows


def test_an_outlier_that_nobody_reads_sets_no_range() -> None:
    objective, rows = outliers(matters=False)
    low, high = float(rows.min()), float(rows.max())
    chosen, widest = choose(objective, low, high, "uint8", None), fit_range(low, high, "uint8")
    assert chosen.scale < 0.2 * widest.scale
    assert objective.cost(chosen) < 0.1 * objective.cost(widest)


def test_an_outlier_that_counts_keeps_its_range() -> None:
    objective, rows = outliers(matters=True)
    low, high = float(rows.min()), float(rows.max())
    chosen = choose(objective, low, high, "uint8", None)
    assert chosen.scale > 0.8 * fit_range(low, high, "uint8").scale
    assert objective.cost(chosen) <= objective.cost(fit_range(low, high, "uint8"))


@pytest.mark.parametrize("bounds", [None, (0.0, 6.0), (0.0, np.inf), (-1.0, 1.0)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_the_choice_is_within_what_was_seen_and_allowed(bounds: tuple[float, float] | None, dtype: str) -> None:
    rows = np.clip(normal(800, 6, scale=3), *(bounds or (-np.inf, np.inf)))
    objective = Objective.of(rows, np.full(800, 1 / 800, np.float32), [Reader(weight(6, 9), True)], passed_on=True)
    low, high = float(rows.min()), float(rows.max())
    chosen, widest = choose(objective, low, high, dtype, bounds), fit_range(low, high, dtype, bounds)
    assert objective.cost(chosen) <= objective.cost(widest)
    ends = np.asarray([0, chosen.qmax], np.float32) - np.float32(chosen.zero_point)
    assert ends[0] * chosen.scale >= min(low, 0) - 1.01 * chosen.scale
    assert ends[1] * chosen.scale <= max(high, 0) + 1.01 * chosen.scale
    if bounds is not None:
        assert ends[0] * chosen.scale >= bounds[0]
        assert ends[1] * chosen.scale <= bounds[1]


@pytest.mark.parametrize("span", [(0.0, 0.0), (3.0, 3.0), (-2.0, -2.0)])
def test_an_activation_that_never_changes_gets_a_grid(span: tuple[float, float]) -> None:
    rows = np.full((50, 4), span[0], np.float32)
    objective = Objective.of(rows, np.full(50, 1 / 50, np.float32), [Reader(weight(4, 5), True)], passed_on=False)
    assert choose(objective, *span, "uint8", None) == fit_range(*span, "uint8")


# In the walk ----------------------------------------------------------------------------------------------------------


def test_a_rare_outlier_that_no_layer_reads_costs_nothing(quantized: Callable[..., Done]) -> None:
    model = cnn()
    images = normal(64, 3, 16, 16)
    weights = {t.name: t for t in model.graph.initializer}
    first = next(n for n in model.graph.node if n.op_type == "Conv").input[1]
    array = np.array(ir.from_proto(weights[first]).numpy())
    array[:, 1] = 0
    weights[first].raw_data = array.tobytes()
    plain = quantized(model, {"image": images}).sqnr
    images = images.copy()
    images[:, 1, 0, 0] = 100
    assert quantized(model, {"image": images}).sqnr > plain - 3
