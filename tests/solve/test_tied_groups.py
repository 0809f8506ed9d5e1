"""Test groups that are parts of one matrix, which share the scales of its channels.

They are solved as the one matrix would be whose Gram is zero between the inputs of different groups.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from layers import SOLVERS

from comq_onnx.solve.grid import Grid, QuantizedWeight, fit_minmax, fit_mse
from comq_onnx.solve.layer import Method, judge, solve

GROUPS, OUT, INPUTS, POSITIONS = 3, 5, 16, 200
GRIDS = [
    Grid(4, tied=True),
    Grid(3, symmetric=False, tied=True),
    Grid(2, tied=True),
    Grid(4, per_tensor=True, tied=True),
    Grid(3, symmetric=False, per_tensor=True, tied=True),
    Grid(4, block_size=4, tied=True),
    Grid(3, symmetric=False, block_size=2, tied=True),
]


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a weight [groups, out, in], and rows [groups, positions, in] of as much power in every group, twice."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(GROUPS, OUT, INPUTS)).astype(np.float32)
    # one group has larger weights than the others: a scale of its own would be another one
    weight[1] *= 2
    rows = rng.normal(size=(GROUPS, POSITIONS, INPUTS)) @ rng.normal(size=(GROUPS, INPUTS, INPUTS)) + 1
    rows /= np.sqrt((rows**2).mean(axis=(1, 2), keepdims=True))
    hat = rows + 0.05 * rng.normal(size=rows.shape)
    hat /= np.sqrt((hat**2).mean(axis=(1, 2), keepdims=True))
    return weight, rows.astype(np.float32), hat.astype(np.float32)


def whole_weight(weight: np.ndarray, block: int | None) -> np.ndarray:
    """Put groups side by side, block by block: [1, out, groups * in]."""
    cut = weight.reshape(GROUPS, OUT, -1, block or INPUTS)
    return np.ascontiguousarray(cut.transpose(1, 2, 0, 3).reshape(1, OUT, -1))


def whole_rows(x: np.ndarray, block: int | None) -> np.ndarray:
    """Put the rows of all groups below one another, zeros for the inputs of others: [1, positions, groups * in]."""
    found = np.zeros((GROUPS, POSITIONS, INPUTS // (block or INPUTS), GROUPS, block or INPUTS), np.float32)
    for g in range(GROUPS):
        found[g, :, :, g] = x[g].reshape(POSITIONS, -1, block or INPUTS)
    return found.reshape(1, GROUPS * POSITIONS, -1)


def whole_grid(grid: Grid) -> Grid:
    return replace(grid, tied=False, block_size=grid.block_size and grid.block_size * GROUPS)


def check_shared(weight: QuantizedWeight) -> None:
    for numbers in (weight.scale, weight.zero_point):
        assert (numbers == numbers[:1]).all()


@SOLVERS
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("same", [True, False])
def test_tied_groups_are_solved_as_one_matrix(method: Method, grid: Grid, same: bool) -> None:
    weight, x, x_hat = problem()
    tied = solve(weight, oracle.moments_of(x, None if same else x_hat), grid, method)
    check_shared(tied.weight)
    block = grid.block_size
    wide = [whole_rows(one, block) for one in (x, x_hat)]
    moments = oracle.moments_of(wide[0], None if same else wide[1])
    whole = solve(whole_weight(weight, block), moments, whole_grid(grid), method)
    assert tied.rtn_error == pytest.approx(whole.rtn_error, rel=1e-4)
    # moves of two codes find other pairs where more inputs are side by side
    assert tied.error == pytest.approx(whole.error, rel=0.1 if method.solver == "comq" else 0.01)
    if method.solver != "comq":
        assert (whole_weight(tied.weight.codes, block) != whole.weight.codes).mean() <= 0.01


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tied_groups_start_from_the_scales_of_one_matrix(grid: Grid) -> None:
    weight, _, _ = problem()
    for fit in (fit_minmax, fit_mse):
        scale, zero = fit(weight, grid)
        expected = fit(whole_weight(weight, grid.block_size), whole_grid(grid))
        assert np.array_equal(scale, np.repeat(expected[0], GROUPS, axis=0))
        assert np.array_equal(zero, np.repeat(expected[1], GROUPS, axis=0))


@SOLVERS
@pytest.mark.parametrize("per_tensor", [False, True])
def test_tied_groups_have_one_shift_and_the_error_that_it_leaves(method: Method, per_tensor: bool) -> None:
    weight, x, x_hat = problem(1)
    x_hat = x_hat + np.float32(0.5)
    moments = oracle.moments_of(x, x_hat)
    solution = solve(weight, moments, Grid(3, per_tensor=per_tensor, tied=True), method, has_bias=True)
    if solution.shift is not None:
        assert (solution.shift == solution.shift[:1]).all()
        assert solution.shift.any()
    slow = oracle.relative_error(weight, solution.weight.dequantize(), x, x_hat, solution.shift)
    assert solution.error == pytest.approx(slow, rel=1e-4)
    judged = judge(weight, moments, solution.weight, method, has_bias=True)
    assert judged.error == pytest.approx(solution.error, rel=1e-4)
