"""Bit planes: taken apart and put together again, and refined without leaving the grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from layers import posed

from comq_onnx.grid import Array, Grid
from comq_onnx.solve import solve_comq
from comq_onnx.solve.bitsplit import refine, split, stitch
from comq_onnx.solve.comq import EFFORTS, _babai, _better
from comq_onnx.solve.problem import Part


@pytest.mark.parametrize("bits", range(2, 9))
def test_bit_planes_put_together_are_the_codes(bits: int) -> None:
    # a code less a zero point is at most 2^bits - 1 to either side
    codes = np.arange(-(2**bits) + 1, 2**bits, dtype=np.float32)[None]
    planes = split(codes)
    assert planes.dtype == np.float32
    assert planes.flags.c_contiguous
    assert set(np.unique(planes)) == {-1, 0, 1}
    assert len(planes) == bits
    assert np.array_equal(stitch(planes), codes)
    assert stitch(planes).dtype == np.float32
    # a plane says nothing against its code's sign
    assert (planes * np.sign(codes) >= 0).all()


def test_codes_that_are_all_zero_have_one_plane() -> None:
    planes = split(np.zeros((2, 3), np.float32))
    assert planes.shape == (1, 2, 3)
    assert not planes.any()
    assert not split(np.zeros((2, 0), np.float32)).any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(posed())
def test_refined_codes_are_on_the_grid(given_: tuple[Part, Array]) -> None:
    part, scale = given_
    (start,), _ = _babai([part], [part.whole()], [scale], [part.zero])
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
    (best,) = _better([part], [start], [other])
    costs = [part.objective(one.codes, one.scale) for one in (best, start, other)]
    assert (costs[0] <= np.minimum(costs[1], costs[2])).all()


def test_refining_changes_codes_and_wins_something() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 300, 60)) @ rng.standard_normal((60, 60))
    weight, grid = rng.standard_normal((1, 40, 60)).astype(np.float32), Grid(4)
    moments = oracle.statistics(x.astype(np.float32))
    with_it = replace(EFFORTS["default"], bit_split=True)
    objective = oracle.Objective(weight, moments)
    before, after = (objective(solve_comq(weight, moments, grid, e).dequantize()) for e in ("default", with_it))
    # float32 decides which of the two is better
    assert (after <= before * (1 + 1e-5)).all()
    assert (after < before * 0.999).any()
