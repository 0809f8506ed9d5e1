"""Test bit planes: taken apart and put together again, and refined without leaving the grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from layers import posed, walk

from comq_onnx.solve.bitsplit import refine, split, stitch
from comq_onnx.solve.comq import solve_comq
from comq_onnx.solve.effort import EFFORTS
from comq_onnx.solve.grid import Array, Grid, fit_mse
from comq_onnx.solve.problem import Part, arrange, pose, take_part
from comq_onnx.solve.rounding import babai, better_of


@pytest.mark.parametrize("bits", range(2, 9))
def test_bit_planes_put_together_are_the_codes(bits: int) -> None:
    # a code less a zero point is at most 2^bits - 1 to either side
    codes = np.arange(-(2**bits) + 1, 2**bits, dtype=np.float32)[None]
    planes = split(codes, bits)
    assert planes.dtype == np.float32
    assert planes.flags.c_contiguous
    assert set(np.unique(planes)) == {-1, 0, 1}
    assert planes.shape == (bits, *codes.shape)
    assert np.array_equal(stitch(planes), codes)
    assert stitch(planes).dtype == np.float32
    # a plane says nothing against its code's sign
    assert (planes * np.sign(codes) >= 0).all()


def test_refining_a_channel_does_not_depend_on_the_others() -> None:
    """Test that it does not depend on how large their codes are either."""
    for grid in (Grid(3), Grid(4, symmetric=False), Grid(6, block_size=16)):
        part, scale, start = rounded(grid)
        found = refine(part, start, scale, part.zero)
        for c in range(30):
            own = take_part(part.problem, part.w[c : c + 1][:, np.argsort(part.problem.order)], part.zero[c : c + 1])
            alone = refine(own, start[c : c + 1], scale[c : c + 1], own.zero)
            assert np.array_equal(alone[0], found[c])


def rounded(grid: Grid) -> tuple[Part, Array, Array]:
    """Return thirty channels, their scales and their plainly rounded codes.

    These leave much to refine; Babai's leave hardly anything.
    """
    rng = np.random.default_rng(0)
    x = walk(rng, 200, 40)
    weight = rng.standard_normal((30, 40)).astype(np.float32)
    (scale,), (zero,) = fit_mse(weight[None], grid)
    moments = oracle.moments_of(x, (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32))
    part = take_part(pose(arrange(moments), grid), weight, zero.astype(np.float32))
    of = part.problem.block
    codes = np.clip(np.rint(part.w / scale[:, of]), *(np.float32(b) - part.zero[:, of] for b in (grid.qmin, grid.qmax)))
    return part, scale, codes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(posed())
def test_refined_codes_are_on_the_grid(given_: tuple[Part, Array]) -> None:
    part, scale = given_
    (start,), _ = babai([part], [part.whole()], [scale], [part.zero])
    before = start.codes.copy()
    refined = refine(part, start.codes, start.scale, start.zero)
    assert np.array_equal(start.codes, before)
    codes, grid = refined + start.zero[:, part.problem.block], part.problem.grid
    assert refined.dtype == np.float32
    assert np.array_equal(codes, np.rint(codes))
    assert codes.min() >= grid.qmin
    assert codes.max() <= grid.qmax
    # kept only where it is the better of the two
    other = replace(start, codes=refined)
    (best,) = better_of([part], [start], [other])
    costs = [part.objective(one.codes, one.scale) for one in (best, start, other)]
    assert (costs[0] <= np.minimum(costs[1], costs[2])).all()


@pytest.mark.parametrize("grid", [Grid(3), Grid(4, symmetric=False), Grid(6, block_size=16)], ids=str)
def test_refining_is_the_slow_turn_of_every_plane(grid: Grid) -> None:
    part, scale, start = rounded(grid)
    found, of, clear = refine(part, start, scale, part.zero), part.problem.block, 0
    assert part.pull is not None
    assert (found != start).any(axis=1).mean() > 0.7
    for c in range(30):
        low, high = (bound - part.zero[c, of].astype(np.float64) for bound in (grid.qmin, grid.qmax))
        around = (scale[c, of].astype(np.float64), low, high, grid.bits)
        wanted, near = oracle.bit_planes(part.problem.h, part.pull[c], part.w[c], start[c], *around)
        # float32 gradients over 40 inputs
        if near > 1e-3:
            clear += 1
            assert np.array_equal(found[c], wanted)
    assert clear > 10


def test_refining_changes_codes_and_wins_something() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 300, 60)) @ rng.standard_normal((60, 60))
    weight, grid = rng.standard_normal((1, 40, 60)).astype(np.float32), Grid(4)
    moments = oracle.moments_of(x.astype(np.float32))
    with_it = replace(EFFORTS["default"], bit_split=True)
    objective = oracle.Objective(weight, moments)
    before, after = (objective(solve_comq(weight, moments, grid, e).dequantize()) for e in ("default", with_it))
    # float32 decides which of the two is better
    assert (after <= before * (1 + 1e-5)).all()
    assert (after < before * 0.999).any()
