"""The solvers: never worse than rounding whatever the data, equal to slow oracles, and what they claim to minimize."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from comq_onnx.calibrate import Moments
from comq_onnx.grid import Grid, fit_mse, round_to_grid, rtn
from comq_onnx.solve import (
    SOLVERS,
    Solution,
    Statistics,
    check_codes,
    error_db,
    round_rows,
    solve,
    solve_comq,
    solve_paper,
)

CONDITIONS = ["white", "correlated", "dead", "duplicate", "singular", "few", "offset", "tiny", "huge", "all dead"]
QUICK = settings(max_examples=25, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    """A layer to solve: weight [groups, out, in], rows [groups, positions, in] of the float and the quantized model."""

    weight: np.ndarray
    x: np.ndarray
    x_hat: np.ndarray | None
    grid: Grid

    @property
    def statistics(self) -> Statistics:
        return oracle.statistics(self.x, self.x_hat)


def rows(rng: np.random.Generator, condition: str, groups: int, positions: int, inputs: int) -> np.ndarray:
    """Inputs of a layer, well or badly conditioned."""
    x = rng.standard_normal((groups, 3 if condition == "few" else positions, inputs))
    if condition == "correlated":
        x = x @ rng.standard_normal((groups, inputs, inputs)) * np.geomspace(1, 30, inputs)
    elif condition == "dead":
        x[:, :, rng.random(inputs) < 0.4] = 0
    elif condition == "all dead":
        x[:] = 0
    elif condition == "duplicate":
        x[:, :, inputs // 2 :] = x[:, :, : inputs - inputs // 2]
    elif condition == "singular":
        x = np.broadcast_to(x[..., :1], x.shape) * rng.standard_normal(inputs) + 1e-4 * x
    elif condition == "offset":
        x += 5
    elif condition in ("tiny", "huge"):
        x *= 1e-6 if condition == "tiny" else 1e6
    return x.astype(np.float32)


@st.composite
def cases(draw: st.DrawFn, shapes: tuple[int, int, int] = (3, 9, 40), conditions: list[str] = CONDITIONS) -> Case:
    groups, out, inputs = (draw(st.integers(1, most)) for most in shapes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rows(rng, draw(st.sampled_from(conditions)), groups, 60, inputs)
    weight = rng.standard_normal((groups, out, inputs)).astype(np.float32)
    if draw(st.booleans()):
        weight[:, :, : inputs // 2] *= 0.01
    if draw(st.sampled_from([False, False, True])):
        weight[:, 0] = 0
    x_hat = None
    if draw(st.booleans()):
        x_hat = (x + draw(st.sampled_from([0.01, 0.3])) * x.std() * rng.standard_normal(x.shape)).astype(np.float32)
    sharing = draw(st.sampled_from([{}, {}, {"per_tensor": True}, {"block_size": 16}]))
    return Case(weight, x, x_hat, Grid(draw(st.integers(2, 8)), draw(st.booleans()), **sharing))


def noise(case: Case, *quantized: np.ndarray) -> float:
    """What float32 products may do to the relative errors of weights: some eps of the terms that are added up."""
    moments, weight = case.statistics, np.abs(case.weight.astype(np.float64))
    zero = np.zeros_like(moments.gram)
    gram, cross, residue = (np.abs(zero if m is None else m) for m in (moments.gram, moments.cross, moments.residue))
    x = case.x.astype(np.float64)
    energy = max(float(((x @ case.weight.swapaxes(1, 2)) ** 2).mean(axis=1).sum()), np.finfo(np.float64).tiny)
    whole = 0.0
    for one in quantized:
        d = np.abs(one.astype(np.float64) - case.weight)
        whole += float(((d @ gram + 2 * weight @ cross.swapaxes(1, 2)) * d + (weight @ residue) * weight).sum())
    # the energy itself is such a sum, of terms that cancel where the inputs are nearly singular
    own = ((weight @ gram + 2 * weight @ cross.swapaxes(1, 2) + weight @ residue) * weight).sum() / energy
    whole *= 1 + float(own)
    return 4 * float(np.finfo(np.float32).eps) * whole / energy


def on_grid(solution: Solution) -> None:
    """Codes and zero points lie on the grid, scales are normal numbers, shared as the grid says."""
    weight = solution.weight
    assert check_codes(weight) is weight.codes
    assert weight.codes.dtype == weight.zero_point.dtype == np.int8
    assert weight.scale.dtype == np.float32
    assert (weight.scale >= np.finfo(np.float32).tiny).all()
    assert weight.scale.shape == weight.zero_point.shape
    assert weight.scale.shape == (*weight.codes.shape[:2], weight.grid.blocks(weight.codes.shape[-1]))
    assert weight.grid.qmin <= weight.zero_point.min()
    assert weight.zero_point.max() <= weight.grid.qmax
    if weight.grid.symmetric:
        assert not weight.zero_point.any()
    if weight.grid.per_tensor:
        assert np.unique(weight.scale).size == np.unique(weight.zero_point).size == 1


@pytest.mark.parametrize("solver", ["comq", "paper"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_solving_never_costs_more_than_rounding(solver: str, has_bias: bool) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(cases())
    def check(case: Case) -> None:
        solution = solve(case.weight, case.statistics, case.grid, solver, has_bias)
        on_grid(solution)
        solved, rounded = solution.weight.dequantize(), rtn(case.weight, case.grid).dequantize()
        # which of the two is better is decided on float32 products
        undecided = noise(case, solved, rounded)
        assert solution.error <= solution.rtn_error + undecided
        ours = oracle.relative_error(case.weight, solved, case.x, case.x_hat, solution.shift)
        assert ours <= oracle.relative_error(case.weight, rounded, case.x, case.x_hat) + undecided

    check()


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_the_error_reported_is_the_one_on_the_samples(solver: str) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(cases(), st.booleans())
    def check(case: Case, has_bias: bool) -> None:
        solution = solve(case.weight, case.statistics, case.grid, solver, has_bias)
        solved, rounded = solution.weight.dequantize(), rtn(case.weight, case.grid).dequantize()
        slow = oracle.relative_error(case.weight, solved, case.x, case.x_hat, solution.shift)
        plain = oracle.relative_error(case.weight, rounded, case.x, case.x_hat)
        # the Gram's way multiplies in float32, the energy that it divides by too
        assert solution.error == pytest.approx(slow, rel=1e-5, abs=noise(case, solved))
        assert solution.rtn_error == pytest.approx(plain, rel=1e-5, abs=noise(case, rounded))

    check()


@QUICK
@given(cases(conditions=["white"]))
def test_on_an_identity_gram_solving_is_rounding_at_the_mse_scale_or_better(case: Case) -> None:
    groups, _, inputs = case.weight.shape
    # groups that share one scale: see the next test
    assume(groups == 1 or not case.grid.per_tensor)
    identity = Statistics(np.broadcast_to(np.eye(inputs), (groups, inputs, inputs)), np.zeros((groups, inputs)), 1)
    solved = solve_comq(case.weight, identity, case.grid)
    rounded = round_to_grid(case.weight, *fit_mse(case.weight, case.grid), case.grid)

    def cost(dequantized: np.ndarray) -> float:
        return float(((dequantized.astype(np.float64) - case.weight) ** 2).sum())

    # float32 decides between codes of nearly the same error
    assert cost(solved.dequantize()) <= cost(rounded.dequantize()) * (1 + 1e-4) + 1e-10
    # nothing couples the inputs, so at the solver's own scale its codes are plain rounding
    again = round_to_grid(case.weight, solved.scale, solved.zero_point, case.grid).dequantize()
    assert cost(solved.dequantize()) == pytest.approx(cost(again), rel=1e-3, abs=1e-9)


def test_groups_that_share_a_scale_choose_it_together() -> None:
    weight = np.asarray([[[1.523]], [[-1.524]]], np.float32)
    grid = Grid(2, symmetric=False, per_tensor=True)
    solved = solve_comq(weight, Statistics(np.ones((2, 1, 1)), np.zeros((2, 1)), 1), grid)
    rounded = round_to_grid(weight, *fit_mse(weight, grid), grid)
    assert ((solved.dequantize() - weight) ** 2).sum() <= ((rounded.dequantize() - weight) ** 2).sum()


def test_solving_beats_rounding_by_far_on_correlated_inputs() -> None:
    """The reason to be of the project: 4 bits, 64 correlated inputs."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 500, 8)) @ rng.standard_normal((8, 64)) + 0.1 * rng.standard_normal((1, 500, 64))
    weight = rng.standard_normal((1, 32, 64)).astype(np.float32)
    found = {s: solve(weight, oracle.statistics(x.astype(np.float32)), Grid(4), s).error for s in SOLVERS}
    # 8 of 64 directions carry the inputs: far more freedom than constraints. 6 and 3 dB are half of what was measured
    assert error_db(found["comq"]) < error_db(found["rtn"]) - 6
    assert error_db(found["paper"]) < error_db(found["rtn"]) - 3
    assert found["comq"] < found["paper"]


def test_centring_lowers_the_error_of_inputs_with_a_mean() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1, 500, 48)) + 3).astype(np.float32)
    weight = rng.standard_normal((1, 16, 48)).astype(np.float32)
    plain, centred = (solve(weight, oracle.statistics(x), Grid(3), has_bias=b) for b in (False, True))
    assert plain.shift is None
    assert centred.shift is not None
    assert centred.error < plain.error


@QUICK
@given(cases(conditions=["white", "correlated", "dead", "offset", "huge"]))
def test_the_shift_is_the_mean_that_the_weight_lost(case: Case) -> None:
    solution = solve(case.weight, case.statistics, case.grid, has_bias=True)
    assert solution.shift is not None
    hat = case.x if case.x_hat is None else case.x_hat
    x_mean, hat_mean = case.x.mean(axis=1, dtype=np.float64), hat.mean(axis=1, dtype=np.float64)
    quantized = solution.weight.dequantize().astype(np.float64)
    wanted = np.einsum("gmn,gn->gm", case.weight, x_mean) - np.einsum("gmn,gn->gm", quantized, hat_mean)
    # the difference of weights is taken in float32
    terms = np.einsum("gmn,gn->gm", np.abs(case.weight) + np.abs(quantized), np.abs(hat_mean) + np.abs(x_mean))
    assert (np.abs(solution.shift - wanted) <= 1e-6 * terms + 1e-30).all()


@pytest.mark.parametrize("solver", ["paper", "rtn"])
def test_only_comq_shifts_the_bias(solver: str) -> None:
    x = np.random.default_rng(0).standard_normal((1, 50, 8)).astype(np.float32) + 3
    assert solve(np.ones((1, 2, 8), np.float32), oracle.statistics(x), Grid(4), solver, has_bias=True).shift is None


@pytest.mark.parametrize("solver", ["comq", "paper"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [None, 16])
def test_permuting_the_outputs_permutes_the_answer(solver: str, symmetric: bool, block: int | None) -> None:
    rng = np.random.default_rng(3)
    x = rows(rng, "correlated", 2, 200, 40)
    moments = oracle.statistics(x, (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32))
    weight = rng.standard_normal((2, 24, 40)).astype(np.float32)
    order = rng.permutation(24)
    grid = Grid(4, symmetric, block_size=block)
    straight, permuted = (solve(w, moments, grid, solver).weight for w in (weight, weight[:, order]))
    assert np.array_equal(permuted.codes, straight.codes[:, order])
    assert np.array_equal(permuted.zero_point, straight.zero_point[:, order])
    # BLAS may add up a column's products in another order where it stands elsewhere
    np.testing.assert_allclose(permuted.scale, straight.scale[:, order], rtol=1e-5)


@QUICK
@given(
    cases(conditions=["white", "correlated", "dead", "duplicate", "singular", "offset"]),
    st.integers(-12, 12),
    st.sampled_from(["comq", "paper"]),
    st.booleans(),
)
def test_the_unit_of_the_inputs_does_not_matter(case: Case, power: int, solver: str, has_bias: bool) -> None:
    hat = None if case.x_hat is None else np.ldexp(case.x_hat, power)
    scaled = oracle.statistics(np.ldexp(case.x, power), hat)
    ours, theirs = (solve(case.weight, s, case.grid, solver, has_bias) for s in (case.statistics, scaled))
    # a power of two changes no mantissa
    assert np.array_equal(ours.weight.codes, theirs.weight.codes)
    assert np.array_equal(ours.weight.scale, theirs.weight.scale)
    assert ours.error == theirs.error
    if ours.shift is not None:
        assert np.array_equal(np.ldexp(ours.shift, power), theirs.shift)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_solving_twice_gives_the_same_bytes(solver: str) -> None:
    rng = np.random.default_rng(5)
    x = rows(rng, "correlated", 2, 200, 150)
    moments = oracle.statistics(x, (x * 1.01).astype(np.float32))
    weight = rng.standard_normal((2, 20, 150)).astype(np.float32)
    for grid in (Grid(3), Grid(4, symmetric=False, block_size=32), Grid(2, per_tensor=True)):
        first, second = (solve(weight.copy(), moments, grid, solver, has_bias=True) for _ in range(2))
        for a, b in zip(parts(first), parts(second), strict=True):
            assert a.tobytes() == b.tobytes()


def parts(solution: Solution) -> list[np.ndarray]:
    numbers = np.asarray([solution.error, solution.rtn_error])
    shift = np.zeros(0) if solution.shift is None else solution.shift
    return [solution.weight.codes, solution.weight.scale, solution.weight.zero_point, shift, numbers]


def test_solving_leaves_its_arguments_alone() -> None:
    rng = np.random.default_rng(5)
    x = rows(rng, "white", 1, 100, 20)
    moments = oracle.statistics(x, x * np.float32(1.01))
    weight = rng.standard_normal((1, 6, 20)).astype(np.float32)
    arrays = [weight, moments.gram, moments.mean, moments.cross, moments.residue, moments.mean_error]
    before = [a.copy() for a in arrays]
    for solver in SOLVERS:
        for grid in (Grid(4), Grid(4, block_size=16)):
            solve(weight, moments, grid, solver, has_bias=True)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


# Oracles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["greedy", "cyclic"])
@pytest.mark.parametrize(
    "grid", [Grid(4), Grid(3), Grid(2), Grid(8), Grid(4, symmetric=False), Grid(4, per_tensor=True)]
)
def test_the_papers_solver_on_a_gram_is_the_slow_one_on_the_samples(grid: Grid, order: str) -> None:
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((1, 120, 20)) * np.linspace(0.5, 2, 20) + 0.2).astype(np.float32)
    weight = rng.standard_normal((1, 6, 20)).astype(np.float32)
    codes, scale = oracle.paper(weight[0], x[0], grid, order)
    fast = solve_paper(weight, oracle.statistics(x), grid, order=order)
    ours = fast.codes[0].astype(int) - fast.zero_point[0]
    # float32 and float64 round a number near a half apart: of 120 codes two may differ, by one step
    assert np.count_nonzero(ours != codes) <= 2
    assert np.abs(ours - codes).max() <= 1
    found = oracle.relative_error(weight, fast.dequantize(), x)
    # a code at a tie costs the same either way
    assert found == pytest.approx(oracle.relative_error(weight, codes[None] * scale[None, :, None], x), rel=1e-3)


@QUICK
@given(
    cases(shapes=(2, 6, 24), conditions=["white", "offset", "dead", "duplicate"]),
    st.booleans(),
)
def test_no_single_code_of_a_solution_can_move_for_the_better(case: Case, centred: bool) -> None:
    # groups that share a scale get it after their sweeps, and then flip a bounded number of codes
    assume(len(case.weight) == 1 or not case.grid.per_tensor)
    no_single_step_helps(case.weight, case.statistics.centred() if centred else case.statistics, case.grid)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("block", [None, 32])
def test_no_single_code_can_move_where_two_sweeps_are_not_enough(bits: int, block: int | None) -> None:
    """Many correlated inputs: single flips finish the descent."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 600, 200))
    for i in range(1, 200):
        x[..., i] = 0.9 * x[..., i - 1] + 0.44 * x[..., i]
    no_single_step_helps(
        rng.standard_normal((1, 64, 200)).astype(np.float32), oracle.statistics(x), Grid(bits, block_size=block)
    )


def no_single_step_helps(weight: np.ndarray, moments: Statistics, grid: Grid) -> None:
    solved = solve_comq(weight, moments, grid)
    objective = oracle.Objective(weight, moments)
    values, step = solved.dequantize(), solved.scale[..., grid.block_of(weight.shape[-1])].astype(np.float64)
    changes = objective.after_any_step(values, step)
    for g, c, i in np.argwhere(np.ones(values.shape))[:: max(1, values.size // 10)]:
        one = objective.after_one_step(values, (g, c), i, step[g, c, i])
        # a difference of objectives, of which float64 keeps 15 digits
        assert changes[1, g, c, i] == pytest.approx(one, rel=1e-9, abs=1e-9 * np.abs(objective(values)).max())
    # below 1e-4 of a code's own curvature flips stop; float32 gradients of the whole channel's sums decide
    tolerance = 2e-4 * step**2 * np.einsum("gii->gi", objective.h)[:, None]
    tolerance = tolerance + 1e-5 * np.abs(objective(values))[..., None] + 1e-12
    possible = np.stack([solved.codes > grid.qmin, solved.codes < grid.qmax])
    assert not (possible & (changes < -tolerance)).any()


@QUICK
@given(cases(shapes=(2, 6, 24), conditions=["white", "offset", "dead"]))
def test_no_other_scale_suits_the_codes_better(case: Case) -> None:
    """Each channel's scale is the closed form's; at 8 bits the flips after it hardly move the optimum."""
    solved = solve_comq(case.weight, case.statistics, Grid(8, case.grid.symmetric))
    objective = oracle.Objective(case.weight, case.statistics)
    codes = solved.codes.astype(np.float64) - solved.zero_point
    base = objective(codes * solved.scale)
    for factor in (0.99, 1.01):
        moved = objective(codes * solved.scale * factor)
        # a percent of a channel's scale is more than a code's half step of 1 / 256: it must cost
        assert (moved >= base - 1e-4 * np.abs(base) - 1e-9).all()


# Statistics and tables ------------------------------------------------------------------------------------------------


@QUICK
@given(cases())
def test_centred_moments_are_those_of_the_samples_less_their_mean(case: Case) -> None:
    centred = case.statistics.centred()
    x = case.x.astype(np.float64)
    hat = x if case.x_hat is None else case.x_hat.astype(np.float64)
    less = [a - a.mean(axis=1, keepdims=True) for a in (hat, x - hat)]
    count = x.shape[1]
    size = float((hat**2).mean() + (x**2).mean())
    for found, a, b in ((centred.gram, 0, 0), (centred.cross, 0, 1), (centred.residue, 1, 1)):
        if found is None:
            assert case.x_hat is None
            continue
        wanted = less[a].swapaxes(1, 2) @ less[b] / count
        # float64 sums of 60 squares
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12 * size)
    assert centred.count == count
    np.testing.assert_allclose(centred.mean, hat.mean(axis=1), rtol=1e-12)


def test_a_dead_layer_is_rounded() -> None:
    weight = np.random.default_rng(0).standard_normal((2, 3, 12)).astype(np.float32)
    dead = Statistics(np.zeros((2, 12, 12)), np.zeros((2, 12)), 10)
    for solver in SOLVERS:
        solution = solve(weight, dead, Grid(8), solver)
        on_grid(solution)
        assert solution.error == solution.rtn_error == 0
        # nothing was seen, so the weights themselves are kept: to a step and a little that a clipped span may cost
        assert np.abs(solution.weight.dequantize() - weight).max() <= 3 * solution.weight.scale.max()


def test_inputs_that_hardly_vary_are_solved() -> None:
    """What a pool over a whole image makes of noise: a mean of 3 and a spread of a thousandth."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((24, 24)) * np.geomspace(1e-3, 5e-5, 24)
    x = 3 * rng.standard_normal(24) + rng.standard_normal((1, 21, 24)) @ spread
    moments = Moments()
    moments.add(x.astype(np.float32), None)
    weight = rng.standard_normal((1, 8, 24)).astype(np.float32)
    solution = solve(weight, moments.statistics(), Grid(4), has_bias=True)
    on_grid(solution)
    ours = oracle.relative_error(weight, solution.weight.dequantize(), x, None, solution.shift)
    assert ours <= oracle.relative_error(weight, rtn(weight, Grid(4)).dequantize(), x)


@pytest.mark.parametrize("inputs", [1, 2, 127, 128, 129, 300])
def test_any_number_of_inputs_is_solved(inputs: int) -> None:
    """One block of the kernel, several, and one that is not full."""
    rng = np.random.default_rng(inputs)
    x = rng.standard_normal((1, 400, inputs)).astype(np.float32)
    weight = rng.standard_normal((1, 3, inputs)).astype(np.float32)
    for grid in (Grid(3), Grid(3, block_size=64)):
        solution = solve(weight, oracle.statistics(x), grid)
        on_grid(solution)
        assert solution.error <= solution.rtn_error


def test_the_kernels_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x = rows(rng, "white", 1, 300, 50)
    moments = oracle.statistics(x, (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32))
    weight = rng.standard_normal((1, 8, 50)).astype(np.float32)
    whole = solve(weight, moments, Grid(4))
    monkeypatch.setattr("comq_onnx.solve.BLOCK", 7)
    blocked = solve(weight, moments, Grid(4))
    # float32 sums in another order may decide a tie the other way
    assert np.count_nonzero(whole.weight.codes != blocked.weight.codes) <= 4
    assert blocked.error == pytest.approx(whole.error, rel=1e-2)


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


def test_a_solver_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="no solver 'gptq'; there are comq, paper, rtn"):
        solve(np.ones((1, 1, 1), np.float32), Statistics(np.ones((1, 1, 1)), np.ones((1, 1)), 1), Grid(4), "gptq")


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


def test_error_db_is_ten_logarithms() -> None:
    assert error_db(1) == 0
    assert error_db(0.001) == pytest.approx(-30)
    assert error_db(0) == -200
