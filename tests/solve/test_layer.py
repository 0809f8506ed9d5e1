"""Test layers as the pipeline has them solved: never worse than rounding whatever the data, and reported as it is."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layers import ALL, COMQ, EFFORTS, FEWER, METHODS, QUICK, SOLVERS, Case, cases, coupled, noise, on_grid

from comq_onnx.solve import parallel
from comq_onnx.solve.comq import solve_comq, solve_gptq
from comq_onnx.solve.grid import Grid, fit_mse, round_to_grid, rtn
from comq_onnx.solve.layer import (
    Method,
    _significant,
    error_db,
    in_parts,
    join_parts,
    pose,
    round_rows,
    solve,
    solve_part,
    solve_together,
)
from comq_onnx.solve.moments import Moments, MomentSums
from comq_onnx.solve.problem import RIDGE


@SOLVERS
@pytest.mark.parametrize("has_bias", [False, True])
def test_solving_never_costs_more_than_rounding(method: Method, has_bias: bool) -> None:
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(cases())
    def check(case: Case) -> None:
        solution = solve(case.weight, case.moments, case.grid, method, has_bias)
        on_grid(solution.weight)
        solved, rounded = solution.weight.dequantize(), rtn(case.weight, case.grid).dequantize()
        # which of the two is better is decided on float32 products
        undecided = noise(case, solved, rounded)
        assert solution.error <= solution.rtn_error + undecided
        ours = oracle.relative_error(case.weight, solved, case.x, case.x_hat, solution.shift)
        assert ours <= oracle.relative_error(case.weight, rounded, case.x, case.x_hat) + undecided

    check()


@ALL
def test_the_error_reported_is_the_one_on_the_samples(method: Method) -> None:
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(cases(), st.booleans())
    def check(case: Case, has_bias: bool) -> None:
        solution = solve(case.weight, case.moments, case.grid, method, has_bias)
        solved, rounded = solution.weight.dequantize(), rtn(case.weight, case.grid).dequantize()
        slow = oracle.relative_error(case.weight, solved, case.x, case.x_hat, solution.shift)
        plain = oracle.relative_error(case.weight, rounded, case.x, case.x_hat)
        # the Gram's way multiplies in float32, the energy that it divides by too
        assert solution.error == pytest.approx(slow, rel=1e-5, abs=noise(case, solved))
        assert solution.rtn_error == pytest.approx(plain, rel=1e-5, abs=noise(case, rounded))

    check()


@EFFORTS
def test_on_an_identity_gram_solving_is_rounding_at_the_mse_scale_or_better(method: Method) -> None:
    @FEWER
    @given(cases(conditions=["white"]))
    def check(case: Case) -> None:
        # groups that share one scale: see the next test
        assume(len(case.weight) == 1 or not case.grid.per_tensor)
        solved = method(case.weight, identity(case.weight), case.grid)
        on_grid(solved)
        rounded = round_to_grid(case.weight, *fit_mse(case.weight, case.grid), case.grid)

        def cost(dequantized: np.ndarray) -> float:
            return float(((dequantized.astype(np.float64) - case.weight) ** 2).sum())

        # float32 decides between codes of nearly the same error
        assert cost(solved.dequantize()) <= cost(rounded.dequantize()) * (1 + 1e-4) + 1e-10
        # nothing couples the inputs, so at the solver's own scale its codes are plain rounding, but for what the last
        # fit of the scale, after the last code has moved, may leave to win: some 2% were found
        again = round_to_grid(case.weight, solved.scale, solved.zero_point, case.grid).dequantize()
        assert cost(solved.dequantize()) == pytest.approx(cost(again), rel=0.05, abs=1e-9)

    check()


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_few_uncoupled_inputs_cost_no_more_than_rounding_at_the_mse_scale(bits: int) -> None:
    """Test that the scale that plain rounding likes best is among those that few inputs are tried with."""
    rng = np.random.default_rng(0)
    for inputs in (1, 3, 9, 32):
        weight = rng.standard_normal((1, 80, inputs)).astype(np.float32)
        for grid in (Grid(bits), Grid(bits, symmetric=False)):
            solved = solve_comq(weight, identity(weight), grid).dequantize().astype(np.float64)
            rounded = round_to_grid(weight, *fit_mse(weight, grid), grid).dequantize().astype(np.float64)
            ours, theirs = (((one - weight) ** 2).sum(axis=-1) for one in (solved, rounded))
            # float32 weights: an eps of them is some of the difference
            assert (ours <= theirs * (1 + 1e-4) + 1e-12).all()


@QUICK
@given(cases(conditions=["white"]))
def test_on_an_identity_gram_gptq_is_rounding_at_the_mse_scale(case: Case) -> None:
    found = solve_gptq(case.weight, identity(case.weight), case.grid)
    rounded = round_to_grid(case.weight, *fit_mse(case.weight, case.grid), case.grid)
    assert np.array_equal(found.codes, rounded.codes)
    assert np.array_equal(found.scale, rounded.scale)
    assert np.array_equal(found.zero_point, rounded.zero_point)


def identity(weight: np.ndarray) -> Moments:
    groups, _, inputs = weight.shape
    return Moments(np.broadcast_to(np.eye(inputs), (groups, inputs, inputs)), np.zeros((groups, inputs)), 1)


def test_groups_that_share_a_scale_choose_it_together() -> None:
    weight = np.asarray([[[1.523]], [[-1.524]]], np.float32)
    grid = Grid(2, symmetric=False, per_tensor=True)
    solved = solve_comq(weight, Moments(np.ones((2, 1, 1)), np.zeros((2, 1)), 1), grid)
    rounded = round_to_grid(weight, *fit_mse(weight, grid), grid)
    assert ((solved.dequantize() - weight) ** 2).sum() <= ((rounded.dequantize() - weight) ** 2).sum()


def test_solving_beats_rounding_by_far_on_correlated_inputs() -> None:
    """Compare all methods at 4 bits on 64 correlated inputs: this is why the project exists."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 500, 8)) @ rng.standard_normal((8, 64)) + 0.1 * rng.standard_normal((1, 500, 64))
    weight = rng.standard_normal((1, 32, 64)).astype(np.float32)
    moments = oracle.moments_of(x.astype(np.float32))
    found = {name: solve(weight, moments, Grid(4), method).error for name, method in METHODS.items()}
    # 8 of 64 directions carry the inputs: far more freedom than constraints. 6 and 3 dB are half of what was measured
    assert error_db(found["comq"]) < error_db(found["rtn"]) - 6
    assert error_db(found["paper"]) < error_db(found["rtn"]) - 3
    assert found["comq"] < found["paper"]
    assert found["comq max"] < found["comq"] < found["comq fast"] < found["gptq"]


def test_centring_lowers_the_error_of_inputs_with_a_mean() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1, 500, 48)) + 3).astype(np.float32)
    weight = rng.standard_normal((1, 16, 48)).astype(np.float32)
    plain, centred = (solve(weight, oracle.moments_of(x), Grid(3), has_bias=b) for b in (False, True))
    assert plain.shift is None
    assert centred.shift is not None
    assert centred.error < plain.error


@EFFORTS
def test_with_a_bias_the_weight_is_solved_about_the_mean(method: Method) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1, 500, 48)) + 3).astype(np.float32)
    weight, moments = rng.standard_normal((1, 16, 48)).astype(np.float32), oracle.moments_of(x, halves=True)
    # at 3 bits no channel falls back on plain rounding
    for has_bias, wanted in ((False, moments), (True, moments.centred())):
        assert np.array_equal(
            solve(weight, moments, Grid(3), method, has_bias).weight.codes, method(weight, wanted, Grid(3)).codes
        )
    assert (method(weight, moments, Grid(3)).codes != method(weight, moments.centred(), Grid(3)).codes).any()


@QUICK
@given(cases(conditions=["white", "correlated", "dead", "offset", "huge"]))
def test_the_shift_is_the_mean_that_the_weight_lost(case: Case) -> None:
    solution = solve(case.weight, case.moments, case.grid, has_bias=True)
    assert solution.shift is not None
    hat = case.x if case.x_hat is None else case.x_hat
    x_mean, hat_mean = case.x.mean(axis=1, dtype=np.float64), hat.mean(axis=1, dtype=np.float64)
    quantized = solution.weight.dequantize().astype(np.float64)
    wanted = np.einsum("gmn,gn->gm", case.weight, x_mean) - np.einsum("gmn,gn->gm", quantized, hat_mean)
    # the difference of weights is taken in float32
    terms = np.einsum("gmn,gn->gm", np.abs(case.weight) + np.abs(quantized), np.abs(hat_mean) + np.abs(x_mean))
    near = np.abs(solution.shift - wanted) <= 1e-6 * terms + 1e-30
    assert (near | (solution.shift == 0)).all()


def test_a_shift_that_is_chance_is_not_carried() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((1, 16, 24)).astype(np.float32)
    # a few loud positions make all of the mean; beside quiet ones it would drown their outputs
    loud = (rng.standard_normal((1, 400, 24)) * 10.0 ** rng.uniform(-2, 2, (1, 400, 1))).astype(np.float32)
    shift = solve(weight, oracle.moments_of(loud), Grid(4), has_bias=True).shift
    assert shift is not None
    assert np.count_nonzero(shift) <= 1
    shift = solve(weight, oracle.moments_of(loud + 30), Grid(4), has_bias=True).shift
    assert shift is not None
    assert np.count_nonzero(shift) > 12


@pytest.mark.parametrize("solver", ["paper", "gptq", "rtn"])
def test_only_comq_shifts_the_bias(solver: str) -> None:
    x = np.random.default_rng(0).standard_normal((1, 50, 8)).astype(np.float32) + 3
    method = Method(solver)
    assert solve(np.ones((1, 2, 8), np.float32), oracle.moments_of(x), Grid(4), method, has_bias=True).shift is None


# Layers of one input --------------------------------------------------------------------------------------------------


@SOLVERS
@pytest.mark.parametrize("has_bias", [False, True])
def test_layers_solved_together_come_out_as_each_alone(method: Method, has_bias: bool) -> None:
    weight, moments = coupled(outputs=30)
    weights = [weight[:, :7], weight[:, 7:8], weight[:, 8:]]
    for grid in (Grid(4), Grid(3, symmetric=False, block_size=16)):
        together = solve_together(weights, moments, grid, method, has_bias)
        for one, found in zip(weights, together, strict=True):
            alone = solve(one, moments, grid, method, has_bias)
            assert found.weight.codes.shape == one.shape
            # BLAS adds up products of other shapes in another order, which may decide a tie the other way
            assert found.error == pytest.approx(alone.error, rel=1e-3)
            assert found.rtn_error == pytest.approx(alone.rtn_error, rel=1e-5)
            assert np.count_nonzero((found.weight.codes != alone.weight.codes).any(axis=-1)) <= 1
            if has_bias and method.solver == "comq":
                assert found.shift is not None
                assert found.shift.shape == one.shape[:2]


@pytest.mark.parametrize("effort", ["fast", "default", "max"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("grid", [Grid(4), Grid(2, symmetric=False), Grid(3, symmetric=False, block_size=16)], ids=str)
def test_parts_solved_apart_are_the_whole_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, effort: str, has_bias: bool, grid: Grid
) -> None:
    monkeypatch.setattr(parallel, "PART", 8)
    weight, moments = coupled(outputs=30, groups=1)
    weights, method = [weight[:, :7], weight[:, 7:8], weight[:, 8:]], Method(effort=effort)
    assert in_parts(method, 1, weight.shape[-1], grid)
    # as it reaches another process
    posed = pickle.loads(pickle.dumps(pose(weights, moments, grid, method, has_bias)))
    parts = [solve_part(posed, method, channels) for channels in parallel.channel_slices(30)]
    assert len(parts) == 4
    found = join_parts(parts, [7, 1, 22], has_bias)
    for one, whole in zip(found, solve_together(weights, moments, grid, method, has_bias), strict=True):
        for name in ("codes", "scale", "zero_point"):
            np.testing.assert_array_equal(getattr(one.weight, name), getattr(whole.weight, name))
        np.testing.assert_array_equal(one.shift, whole.shift)
        assert (one.error, one.rtn_error) == (whole.error, whole.rtn_error)


@pytest.mark.parametrize(
    ("method", "groups", "inputs", "grid"),
    [
        (Method("gptq"), 1, 64, Grid(4)), (Method(), 2, 64, Grid(4)), (Method(), 1, 9, Grid(4)),
        (Method(), 1, 64, Grid(4, per_tensor=True)), (Method(), 1, 64, Grid(4, tied=True)),
    ],
)  # fmt: skip
def test_channels_that_share_something_are_solved_as_one(method: Method, groups: int, inputs: int, grid: Grid) -> None:
    assert not in_parts(method, groups, inputs, grid)


@QUICK
@given(cases(), st.sampled_from(list(METHODS.values())), st.booleans(), st.integers(0, 9))
def test_no_layer_solved_with_others_costs_more_than_rounding(
    case: Case, method: Method, has_bias: bool, cut: int
) -> None:
    assume(not case.grid.per_tensor and 0 < cut < case.weight.shape[1])
    weights = [case.weight[:, :cut], case.weight[:, cut:]]
    found = solve_together(weights, case.moments, case.grid, method, has_bias)
    for weight, solution in zip(weights, found, strict=True):
        on_grid(solution.weight)
        own = replace(case, weight=weight)
        solved, rounded = solution.weight.dequantize(), rtn(weight, case.grid).dequantize()
        # which of the two is better is decided on float32 products
        undecided = noise(own, solved, rounded)
        ours = oracle.relative_error(weight, solved, case.x, case.x_hat, solution.shift)
        assert ours <= oracle.relative_error(weight, rounded, case.x, case.x_hat) + undecided
        # the Gram's way multiplies in float32, the energy that it divides by too
        assert solution.error == pytest.approx(ours, rel=1e-5, abs=undecided)


# Edges ----------------------------------------------------------------------------------------------------------------


@ALL
def test_a_dead_layer_is_rounded(method: Method) -> None:
    for inputs in (1, 12, 40):
        weight = np.random.default_rng(0).standard_normal((2, 3, inputs)).astype(np.float32)
        dead = Moments(np.zeros((2, inputs, inputs)), np.zeros((2, inputs)), 10)
        solution = solve(weight, dead, Grid(8), method)
        on_grid(solution.weight)
        assert solution.error == solution.rtn_error == 0
        # nothing was seen, so the weights themselves are kept: to a step and a little that a clipped span may cost
        assert np.abs(solution.weight.dequantize() - weight).max() <= 3 * solution.weight.scale.max()


@ALL
@pytest.mark.parametrize("inputs", [5, 40])
def test_a_layer_of_zeros_stays_one(method: Method, inputs: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, 50, inputs)).astype(np.float32)
    for grid in (Grid(4), Grid(2, symmetric=False), Grid(4, block_size=16), Grid(4, per_tensor=True)):
        solution = solve(np.zeros((1, 3, inputs), np.float32), oracle.moments_of(x, halves=True), grid, method)
        on_grid(solution.weight)
        assert not solution.weight.dequantize().any()
        assert solution.error == solution.rtn_error == 0


def test_inputs_that_hardly_vary_are_solved() -> None:
    """Solve on what a pool over a whole image makes of noise: a mean of 3 and a deviation of a thousandth."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((24, 24)) * np.geomspace(1e-3, 5e-5, 24)
    x = 3 * rng.standard_normal(24) + rng.standard_normal((1, 21, 24)) @ spread
    sums = MomentSums()
    sums.add(x.astype(np.float32), None)
    weight = rng.standard_normal((1, 8, 24)).astype(np.float32)
    solution = solve(weight, sums.moments(), Grid(4), has_bias=True)
    on_grid(solution.weight)
    ours = oracle.relative_error(weight, solution.weight.dequantize(), x, None, solution.shift)
    assert ours <= oracle.relative_error(weight, rtn(weight, Grid(4)).dequantize(), x)


@EFFORTS
@pytest.mark.parametrize("inputs", [1, 2, 32, 33, 127, 128, 129, 300])
@pytest.mark.parametrize("outputs", [1, 3])
def test_any_number_of_inputs_is_solved(method: Method, inputs: int, outputs: int) -> None:
    """Solve with one block of the kernel, several, and one that is not full; with few inputs and one more than few."""
    rng = np.random.default_rng(inputs)
    x = rng.standard_normal((1, 400, inputs)).astype(np.float32)
    weight = rng.standard_normal((1, outputs, inputs)).astype(np.float32)
    for grid in (Grid(3), Grid(3, block_size=64), Grid(3, symmetric=False, per_tensor=True)):
        solution = solve(weight, oracle.moments_of(x), grid, method)
        on_grid(solution.weight)
        assert solution.error <= solution.rtn_error


@SOLVERS
@pytest.mark.parametrize("sharing", [{}, {"block_size": 16}, {"per_tensor": True}], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_bit_more_costs_less(method: Method, sharing: dict[str, Any], symmetric: bool) -> None:
    weight, moments = coupled()
    found = [solve(weight, moments, Grid(bits, symmetric, **sharing), method) for bits in range(2, 9)]
    for fewer, more in pairwise(found):
        on_grid(more.weight)
        # each bit halves the step, worth 6 dB; what the model quantized so far has lost stays
        assert error_db(more.error) < error_db(fewer.error) - 2


def test_a_single_input_makes_up_for_what_it_was_quantized_to() -> None:
    """Solve on one input that the model quantized so far halved.

    The best weight on it is twice the float one, but for the ridge.
    """
    x = np.random.default_rng(0).standard_normal((1, 100, 1)).astype(np.float32)
    moments = oracle.moments_of(x, x / 2)
    weight = np.ones((1, 4, 1), np.float32)
    for grid in (Grid(8), Grid(8, block_size=1), Grid(8, per_tensor=True)):
        for method in COMQ:
            solved = method(weight, moments, grid).dequantize()
            # W + W E / H, E = G, H = G (1 + RIDGE): the one scale a channel is for all of the mismatch
            np.testing.assert_allclose(solved, 1 + 1 / (1 + RIDGE), rtol=1e-5)


# Tables and checks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_table_is_rounded_at_the_mse_scale_of_each_row(bits: int) -> None:
    table = np.random.default_rng(0).standard_normal((1, 30, 17)).astype(np.float32)
    table[0, 3] = 0
    table[0, 4] *= 1000
    grid = Grid(bits)
    solution = round_rows(table, grid)
    best = round_to_grid(table, *fit_mse(table, grid), grid)
    assert solution.shift is None
    assert np.array_equal(solution.weight.codes, best.codes)
    assert np.array_equal(solution.weight.scale, best.scale)

    def cost(quantized: np.ndarray) -> float:
        return float(((quantized.astype(np.float64) - table) ** 2).sum() / (table.astype(np.float64) ** 2).sum())

    assert solution.error == pytest.approx(cost(best.dequantize()), rel=1e-12)
    assert solution.rtn_error == pytest.approx(cost(rtn(table, grid).dequantize()), rel=1e-12)
    assert solution.error <= solution.rtn_error
    assert not solution.weight.dequantize()[0, 3].any()


@pytest.mark.parametrize(("options", "message"), [
    ({"solver": "obq"}, "no solver 'obq'; there are comq, paper, gptq, rtn"),
    ({"effort": "much"}, "no effort 'much'; there are fast, default, max"),
    ({"order": "random"}, "no order 'random'; there are greedy, cyclic"),
])  # fmt: skip
def test_a_name_that_does_not_exist_is_told_with_those_that_do(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method(**options)


def test_error_db_is_ten_logarithms() -> None:
    assert error_db(1) == 0
    assert error_db(0.001) == pytest.approx(-30)
    assert error_db(0) == -200


def test_means_of_some_channels_that_are_chance_among_many_are_not_carried() -> None:
    rng = np.random.default_rng(0)
    count, variance = 400, np.full((1, 200), 4.0)
    chance = rng.standard_normal((1, 200)) * np.sqrt(variance / count)
    # one in twenty is beyond two standard errors
    assert (np.abs(chance) > 2 * np.sqrt(variance / count)).sum() > 4
    assert not _significant(variance, chance, count).any()
    real = chance + 0.3
    assert (_significant(variance, real, count) == np.where(np.abs(real) > 0.2, real, 0)).all()
    # no variance: what is left is no chance
    assert _significant(np.zeros((1, 3)), np.array([[0.0, 1e-3, 0.0]]), count)[0, 1] == 1e-3
