"""Test the authors' algorithm on the Gram against the slow one on the samples, and what its parameters do."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from layers import walk

from comq_onnx.solve.grid import Grid, QuantizedWeight, fit_minmax
from comq_onnx.solve.layer import Method
from comq_onnx.solve.paper import ORDERS, SHRINK, SWEEPS, solve_paper

GRIDS = [
    Grid(4), Grid(3), Grid(2), Grid(8), Grid(4, symmetric=False), Grid(2, symmetric=False), Grid(4, per_tensor=True),
    Grid(3, symmetric=False, per_tensor=True),
]  # fmt: skip


def layer() -> tuple[np.ndarray, np.ndarray]:
    """Make a weight [1, 6, 20] and rows [1, 120, 20]."""
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((1, 120, 20)) * np.linspace(0.5, 2, 20) + 0.2).astype(np.float32)
    return rng.standard_normal((1, 6, 20)).astype(np.float32), x


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_papers_solver_on_a_gram_is_the_slow_one_on_the_samples(grid: Grid, order: str) -> None:
    same_as_slow(*layer(), grid, order)


@pytest.mark.parametrize("options", [{"sweeps": 1}, {"sweeps": 2}, {"sweeps": 6}, {"shrink": 1.0}, {"shrink": 0.7}])
def test_sweeps_and_shrink_are_those_of_the_slow_one(options: dict[str, Any]) -> None:
    for grid in (Grid(4), Grid(3, symmetric=False), Grid(3, per_tensor=True)):
        for order in ORDERS:
            same_as_slow(*alike(), grid, order, **options)


def alike() -> tuple[np.ndarray, np.ndarray]:
    """Make a weight [1, 24, 40] and rows [1, 100, 40] whose neighbouring inputs are alike.

    The second sweep still changes a dozen codes.
    """
    x = walk(np.random.default_rng(0), 100, 40)
    return np.random.default_rng(0).standard_normal((1, 24, 40)).astype(np.float32), x


def same_as_slow(weight: np.ndarray, x: np.ndarray, grid: Grid, order: str, **options: Any) -> None:
    codes, scale = oracle.paper(weight[0], x[0], grid, order, **options)
    fast = solve_paper(weight, oracle.moments_of(x), grid, order, **options)
    ours = fast.codes[0].astype(int) - fast.zero_point[0]
    # float32 and float64 round a number near a half apart: two codes may differ, by one step
    assert np.count_nonzero(ours != codes) <= 2
    assert np.abs(ours - codes).max() <= 1
    found = oracle.relative_error(weight, fast.dequantize(), x)
    # a code at a tie costs the same either way
    assert found == pytest.approx(oracle.relative_error(weight, codes[None] * scale[None, :, None], x), rel=1e-3)


def test_the_methods_parameters_reach_the_solver() -> None:
    weight, x = layer()
    moments = oracle.moments_of(x)
    method = Method("paper", order="cyclic", sweeps=1, shrink=0.8)
    same(method(weight, moments, Grid(4)), solve_paper(weight, moments, Grid(4), "cyclic", 1, 0.8))
    same(Method("paper")(weight, moments, Grid(3)), solve_paper(weight, moments, Grid(3), "greedy", SWEEPS, SHRINK[3]))
    same(Method("paper")(weight, moments, Grid(4)), solve_paper(weight, moments, Grid(4), "greedy", SWEEPS, 1.0))


def same(first: QuantizedWeight, second: QuantizedWeight) -> None:
    assert np.array_equal(first.codes, second.codes)
    assert np.array_equal(first.scale, second.scale)
    assert np.array_equal(first.zero_point, second.zero_point)


@pytest.mark.parametrize(("bits", "shrink"), [(2, 0.65), (3, 0.8), (4, 1.0), (8, 1.0)])
def test_few_bits_start_from_the_authors_smaller_span(bits: int, shrink: float) -> None:
    weight, x = alike()
    grid, moments = Grid(bits, symmetric=False), oracle.moments_of(x)
    found = solve_paper(weight, moments, grid)
    same(found, solve_paper(weight, moments, grid, shrink=shrink))
    assert (found.codes != solve_paper(weight, moments, grid, shrink=shrink + 0.01).codes).any()
    _, zero = fit_minmax(weight, grid, shrink)
    assert np.array_equal(found.zero_point, zero)


def test_orders_and_sweeps_make_a_difference() -> None:
    weight, x = alike()
    found = [solve_paper(weight, oracle.moments_of(x), Grid(4), order, k).codes for order in ORDERS for k in (1, 2)]
    assert all((a != b).any() for k, a in enumerate(found) for b in found[:k])


def test_the_papers_variant_for_a_layer_has_one_scale() -> None:
    weight, x = layer()
    found = solve_paper(weight, oracle.moments_of(x), Grid(4, per_tensor=True))
    assert np.unique(found.scale).size == 1
    h = oracle.moments_of(x).gram[0]
    q = found.codes[0].astype(np.float64)
    # <q, G w> / <q, G q> summed over the channels; the sums are float32's
    best = np.einsum("ci,ij,cj->", q, h, weight[0]) / np.einsum("ci,ij,cj->", q, h, q)
    assert found.scale[0, 0, 0] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("block", [5, 8, 20])
def test_each_blocks_scale_is_the_best_for_its_codes_in_turn(block: int) -> None:
    """Take block after block, the closed form without the others' part: this is not in the paper."""
    weight, x = layer()
    grid, moments = Grid(3, block_size=block), oracle.moments_of(x)
    found, h = solve_paper(weight, moments, grid, sweeps=5), oracle.moments_of(x).gram[0]
    of, last = grid.block_of(20), grid.blocks(20) - 1
    q, values = found.codes[0].astype(np.float64), found.dequantize()[0].astype(np.float64)
    # the last block's is fitted after all others: it is the best for what the others leave
    part = np.where(of == last, q, 0)
    rest = weight[0] - np.where(of == last, 0, values)
    best = np.einsum("ci,ij,cj->c", part, h, rest) / np.einsum("ci,ij,cj->c", part, h, part)
    np.testing.assert_allclose(found.scale[0, :, last], best, rtol=1e-4)


def test_groups_and_parts_are_solved_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([walk(rng, 100, 20) for _ in range(3)])
    weight, moments = rng.standard_normal((3, 7, 20)).astype(np.float32), oracle.moments_of(x)
    whole = solve_paper(weight, moments, Grid(4))
    for g in range(3):
        alone = solve_paper(weight[g : g + 1], moments.group(g), Grid(4))
        assert np.array_equal(whole.codes[g], alone.codes[0])
        assert np.array_equal(whole.scale[g], alone.scale[0])
    monkeypatch.setattr("comq_onnx.solve.parallel.PART", 2)
    same(solve_paper(weight, moments, Grid(4)), whole)


def test_a_dead_input_is_rounded() -> None:
    weight, x = layer()
    x = x.copy()
    x[..., 3] = 0
    found = solve_paper(weight, oracle.moments_of(x), Grid(8), sweeps=1)
    (scale, _) = fit_minmax(weight, Grid(8))
    wanted = np.clip(np.rint(weight[..., 3] / scale[..., 0]), -128, 127)
    assert np.array_equal(found.codes[..., 3], wanted)
