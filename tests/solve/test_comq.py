"""Test the default solver and GPTQ as a whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import QUICK, Case, cases, halved, rows, walk
from problems import TIE

from comq_onnx.solve.comq import solve_comq, solve_gptq
from comq_onnx.solve.effort import EFFORTS
from comq_onnx.solve.grid import Grid, fit_mse
from comq_onnx.solve.problem import RIDGE


@pytest.fixture(params=EFFORTS)
def effort(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_solution_costs_no_more_than_its_start(effort: str) -> None:
    """Compare the objective with its ridge, channel by channel, or summed where channels share a scale."""
    start_only = replace(EFFORTS[effort], descend=False, beam=0, bit_split=False)

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(cases((2, 9, 60), least=33))  # fewer inputs have a solver of their own
    def check(case: Case) -> None:
        moments = replace(case.moments, half=None)
        found = (solve_comq(case.weight, moments, case.grid, e) for e in (effort, start_only))
        solved, start = (one.dequantize() for one in found)
        objective = oracle.Objective(case.weight, moments)
        ours, theirs = objective(solved), objective(start)
        # at 8 bits a difference is some 256th of the weight: an eps of the weight is 256 of the difference
        noise = 1e-5 * (objective.terms(start) + objective.terms(solved)) + 1e-30
        if case.grid.per_tensor:
            ours, theirs, noise = ours.sum(), theirs.sum(), noise.sum()
        assert (ours <= theirs + noise).all()

    check()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_zero_points_at_an_end_of_the_range_stay_in_it(bits: int, sign: int) -> None:
    """Quantize weights of one sign: the best zero point may be the first or the last code."""
    rng = np.random.default_rng(0)
    weight = sign * np.abs(rng.standard_normal((1, 100, 40))).astype(np.float32)
    grid = Grid(bits, symmetric=False)
    _, zero = fit_mse(weight, grid)
    assert (zero == (grid.qmin if sign > 0 else grid.qmax)).any()
    for effort in EFFORTS:
        solved = solve_comq(weight, oracle.moments_of(walk(rng, 200, 40)), grid, effort)
        assert solved.zero_point.min() >= grid.qmin
        assert solved.zero_point.max() <= grid.qmax
        assert (np.abs(solved.zero_point.astype(int) - zero) <= 1).all()


def test_only_the_fast_effort_does_not_choose_the_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("comq_onnx.solve.comq.choose_ridge", lambda *_: asked.append(1) or RIDGE)
    weight, moments = halved(40, 50)
    for name, times in (("fast", 0), ("default", 1), ("max", 2)):
        solve_comq(weight, moments, Grid(4), name)
        assert len(asked) == times


@QUICK
@given(cases((3, 9, 60)), st.sampled_from(list(EFFORTS)))
def test_a_scale_for_all_is_shared_by_all_parts(case: Case, name: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("comq_onnx.solve.parallel.PART", 2)
        grid = Grid(case.grid.bits, case.grid.symmetric, per_tensor=True)
        solved = solve_comq(case.weight, case.moments, grid, name)
    assert np.unique(solved.scale).size == np.unique(solved.zero_point).size == 1


# GPTQ -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid", [Grid(4), Grid(2), Grid(8), Grid(3, symmetric=False), Grid(4, per_tensor=True), Grid(4, block_size=16)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("inputs", [1, 20, 150])
def test_gptq_is_the_slow_one_with_the_inverses_factor(grid: Grid, inputs: int) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((2, 2 * inputs + 9, inputs)) @ rng.standard_normal((2, inputs, inputs))
    moments = oracle.moments_of(x.astype(np.float32))
    weight = rng.standard_normal((2, 12, inputs)).astype(np.float32)
    fast = solve_gptq(weight, moments, grid)
    ours = fast.codes.astype(int) - fast.zero_point[..., grid.block_of(inputs)]
    scale, zero = fit_mse(weight, grid)
    assert np.array_equal(fast.scale, scale)
    assert np.array_equal(fast.zero_point, zero)
    for g in range(2):
        codes, near = oracle.gptq(weight, moments.gram[g], grid, g)
        # 8 bits of a code leave float32 few for what is between codes
        clear = near.min(axis=1) > (2 * TIE if grid.bits == 8 else TIE)
        assert clear.mean() > 0.3
        assert np.array_equal(ours[g][clear], codes[clear])


def test_gptq_knows_of_no_mismatch() -> None:
    rng = np.random.default_rng(0)
    x = rows(rng, "correlated", 1, 90, 20)
    hat = (x + rng.standard_normal(x.shape)).astype(np.float32)
    weight = rng.standard_normal((1, 5, 20)).astype(np.float32)
    with_it, without = (solve_gptq(weight, m, Grid(4)) for m in (oracle.moments_of(x, hat), oracle.moments_of(hat)))
    assert np.array_equal(with_it.codes, without.codes)
