"""The steps of COMQ's search: each against a slow one in float64, and none that costs anything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import QUICK, Case, cases, posed, rows, walk

from comq_onnx.solve.comq import (
    EFFORTS,
    Rounding,
    _babai,
    _beam,
    _better,
    _descend,
    _refit,
    _refit_blocks,
    _round_all,
    _start,
    choose_ridge,
    solve_comq,
    solve_gptq,
)
from comq_onnx.solve.grid import Array, Grid, fit_mse
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.problem import RIDGE, Part, arrange, pose, take_part

# how near to a tie float32 may round the other way: sums of some tens of products of a few steps each
TIE = 1e-3
EASY = ["white", "correlated", "dead", "duplicate", "offset", "tiny", "huge"]
POSED = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(params=EFFORTS)
def effort(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Slow:
    """A part's problem in float64, inputs in its order."""

    def __init__(self, part: Part) -> None:
        self.part, self.h = part, part.problem.h.astype(np.float64)
        pull = np.zeros_like(part.w) if part.pull is None else part.pull
        self.optimum = part.w + np.linalg.solve(self.h, pull.T.astype(np.float64)).T

    def loss(self, codes: Array, scale: Array) -> np.ndarray:
        """|| M (w* - wq) ||^2 of each channel: the objective less its least value."""
        d = self.optimum - codes.astype(np.float64) * scale.astype(np.float64)[:, self.part.problem.block]
        return np.einsum("ci,ij,cj->c", d, self.h, d)

    def noise(self, codes: Array, scale: Array) -> np.ndarray:
        """What float32 may do to that: some eps of the terms, and of the weights that their differences are of."""
        wq = codes * scale[:, self.part.problem.block]
        d, off = np.abs(self.optimum - wq), 2e-7 * (np.abs(self.optimum) + np.abs(wq))
        return np.einsum("ci,ij,cj->c", 2e-6 * d + 2 * off, np.abs(self.h), d + off) + 1e-30

    def babai(self, scale: Array) -> tuple[np.ndarray, np.ndarray]:
        """oracle.babai at scales [channels, blocks]."""
        return oracle.babai(self.h, self.optimum, scale[:, self.part.problem.block], *self.bounds)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and highest codes less the zero point [channels, in]."""
        zero = self.part.zero[:, self.part.problem.block].astype(np.float64)
        return self.part.problem.grid.qmin - zero, self.part.problem.grid.qmax - zero


def in_range(part: Part, one: Rounding) -> None:
    low, high = Slow(replace(part, zero=one.zero)).bounds
    assert (low <= one.codes).all()
    assert (one.codes <= high).all()
    assert np.array_equal(one.codes, np.rint(one.codes))
    assert (one.scale > 0).all()
    assert np.isfinite(one.scale).all()


# The start ------------------------------------------------------------------------------------------------------------


@POSED
@given(posed(conditions=EASY))
def test_babai_rounding_is_the_slow_one(given_: tuple[Part, Array]) -> None:
    part, scale = given_
    codes, _ = _round_all(part.problem, part.whole(), scale.T.copy(), part.zero.T.copy())
    wanted, near = Slow(part).babai(scale)
    clear = near.min(axis=1) > TIE
    assert np.array_equal(codes.T[clear], wanted[clear])


def test_babai_rounding_in_blocks_is_the_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rows(rng, "correlated", 1, 300, 60)
    moments = oracle.moments_of(x, (x + rng.standard_normal(x.shape)).astype(np.float32))
    weight = rng.standard_normal((70, 60)).astype(np.float32)
    for grid in (Grid(4), Grid(3, symmetric=False, block_size=25)):
        (scale,), (zero,) = fit_mse(weight[None], grid)
        for block in (1, 7, 30, 128):
            monkeypatch.setattr("comq_onnx.solve.comq.BLOCK", block)
            monkeypatch.setattr("comq_onnx.solve.problem.BLOCK", block)
            part = take_part(pose(arrange(moments), grid), weight, zero.astype(np.float32))
            codes, _ = _round_all(part.problem, part.whole(), scale.T.copy(), part.zero.T.copy())
            wanted, near = Slow(part).babai(scale)
            clear = near.min(axis=1) > TIE
            assert clear.mean() > 0.7
            assert np.array_equal(codes.T[clear], wanted[clear])


@POSED
@given(posed())
def test_a_babai_start_comes_with_its_best_common_factor_and_its_loss(given_: tuple[Part, Array]) -> None:
    part, scale = given_
    (one,), (loss,) = _babai([part], [part.whole()], [scale], [part.zero])
    in_range(part, one)
    slow = Slow(part)
    # sums of n products of the weight's own size; and the loss is told as the one before the factor, less its gain
    noise = 20 * slow.noise(one.codes, one.scale) + 1e-5 * slow.loss(one.codes, scale)
    assert (np.abs(loss - slow.loss(one.codes, one.scale)) <= noise).all()
    # no worse than at the scale that it was rounded at
    by = one.scale[:, 0] / scale[:, 0]
    assert (slow.loss(one.codes, one.scale) <= slow.loss(one.codes, scale) + noise).all()
    # nor at factors beside it, where it moved: by half and more it does not
    for factor in (np.float32(0.99), np.float32(1.01)):
        beside = slow.loss(one.codes, one.scale * factor)
        assert (slow.loss(one.codes, one.scale) <= beside + noise)[by != 1].all()
    assert (np.abs(by - 1) < 0.5 + 1e-6).all()


@POSED
@given(posed(), st.sampled_from(list(EFFORTS)))
def test_the_start_is_no_worse_than_babai_at_the_mse_scale(given_: tuple[Part, Array], name: str) -> None:
    part, scale = given_
    whole = part.whole()
    (plain,), _ = _babai([part], [whole], [scale], [part.zero])
    (best,) = _start([part], [whole], [scale], EFFORTS[name])
    in_range(part, best)
    slow, grid = Slow(part), part.problem.grid
    noise = 20 * slow.noise(plain.codes, plain.scale)
    assert (slow.loss(best.codes, best.scale) <= slow.loss(plain.codes, plain.scale) + noise).all()
    if grid.symmetric or grid.bits > 4 or name == "fast":
        assert np.array_equal(best.zero, part.zero)
    else:
        assert (np.abs(best.zero - part.zero) <= 1).all()
        assert best.zero.min() >= grid.qmin
        assert best.zero.max() <= grid.qmax


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_zero_points_at_an_end_of_the_range_stay_in_it(bits: int, sign: int) -> None:
    """Weights of one sign: the best zero point may be the first or the last code."""
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


# The descent ----------------------------------------------------------------------------------------------------------


def rounded(part: Part, scale: Array) -> Rounding:
    """Babai's codes at their best scale."""
    (one,), _ = _babai([part], [part.whole()], [scale], [part.zero])
    return one


@POSED
@given(posed(), st.sampled_from(list(EFFORTS)))
def test_moving_codes_costs_nothing(given_: tuple[Part, Array], name: str) -> None:
    part, scale = given_
    start = rounded(part, scale)
    before = start.codes.copy(), start.scale.copy()
    with pytest.MonkeyPatch.context() as patched:
        # the scales stay; see the next tests
        patched.setattr("comq_onnx.solve.comq._refit", lambda _taken, now, _gradients: now)
        (end,) = _descend([part], [start], EFFORTS[name])
    in_range(part, end)
    slow = Slow(part)
    noise = slow.noise(start.codes, start.scale)
    assert (slow.loss(end.codes, end.scale) <= slow.loss(start.codes, start.scale) + noise).all()
    assert np.array_equal(before[0], start.codes)
    assert np.array_equal(before[1], start.scale)


def test_a_solution_costs_no_more_than_its_start(effort: str) -> None:
    """On the objective with its ridge, channel by channel, or summed where channels share a scale."""
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


def test_what_is_kept_is_the_better_of_two_channel_by_channel() -> None:
    part, scale = example(Grid(3))
    good = rounded(part, scale)
    bad = replace(good, codes=np.clip(good.codes + 1, -4, 3), zero=good.zero + 1)
    mixed = [replace(good, codes=np.where(np.arange(9)[:, None] % 2, a.codes, b.codes)) for a, b in
             ((good, bad), (bad, good))]  # fmt: skip
    (best,) = _better([part], [mixed[0]], [mixed[1]])
    assert np.array_equal(best.codes, good.codes)
    # of two that are equal the first stays
    (best,) = _better([part], [good], [replace(good, zero=good.zero + 1)])
    assert np.array_equal(best.zero, good.zero)


def test_what_is_kept_of_channels_that_share_a_scale_is_one_of_the_two_for_all() -> None:
    part, scale = example(Grid(3, per_tensor=True))
    scale = np.full_like(scale, scale.mean())
    good = rounded(part, scale)
    worse = good.codes.copy()
    worse[0] = np.clip(good.codes[0] + 1, -4, 3)  # one channel much worse
    first, second = replace(good, codes=worse), good
    for one, other in ((first, second), (second, first)):
        (best,) = _better([part], [one], [other])
        assert np.array_equal(best.codes, good.codes)
    better_elsewhere = _better([part, part], [first, second], [second, first])
    assert sum(np.array_equal(one.codes, worse) for one in better_elsewhere) == 1


def example(grid: Grid, inputs: int = 48, channels: int = 9) -> tuple[Part, Array]:
    rng = np.random.default_rng(0)
    x = walk(rng, 200, inputs)
    weight = rng.standard_normal((channels, inputs)).astype(np.float32)
    (scale,), (zero,) = fit_mse(weight[None], grid)
    moments = oracle.moments_of(x, (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32))
    return take_part(pose(arrange(moments), grid), weight, zero.astype(np.float32)), scale


@POSED
@given(posed(conditions=EASY, blocked=False))
def test_one_scale_is_refitted_to_the_closed_form(given_: tuple[Part, Array]) -> None:
    part, scale = given_
    start = rounded(part, scale)
    moved = replace(start, scale=start.scale * np.float32(1.2), norm=start.norm * np.float32(1.44))
    (refitted,) = _refit([part], [moved], [part.gradient(moved.codes, moved.scale)])
    slow = Slow(part)
    codes = start.codes.astype(np.float64)
    above, below = (np.einsum("ci,ij,cj->c", codes, slow.h, other) for other in (slow.optimum, codes))
    best = above / np.where(below > 0, below, 1)
    reached = (below > 0) & (np.abs(best / moved.scale[:, 0] - 1) < 0.45)
    # float32 gradients: what is left of sums of the weight's size
    slack = 1e-5 * np.einsum("ci,ij,cj->c", np.abs(codes), np.abs(slow.h), np.abs(slow.optimum) + np.abs(codes) * scale)
    within = 1e-4 * best + slack / np.where(below > 0, below, 1)
    assert (np.abs(refitted.scale[:, 0] - best) <= within)[reached].all()
    # what is further off than a half stays
    far = (below > 0) & (np.abs(best / moved.scale[:, 0] - 1) > 0.55)
    assert np.array_equal(refitted.scale[far], moved.scale[far])
    assert np.array_equal(refitted.codes, moved.codes)


@POSED
@given(posed(blocked=True), st.floats(0.7, 1.4))
def test_refitting_the_scales_of_blocks_costs_nothing(given_: tuple[Part, Array], factor: float) -> None:
    part, scale = given_
    start = rounded(part, scale)
    moved = replace(start, scale=start.scale * np.float32(factor))
    refitted = _refit_blocks(part, moved, part.gradient(moved.codes, moved.scale))
    slow = Slow(part)
    noise = slow.noise(moved.codes, moved.scale)
    assert (slow.loss(refitted.codes, refitted.scale) <= slow.loss(moved.codes, moved.scale) + noise).all()
    in_range(part, refitted)
    assert (refitted.scale > 0.5 * moved.scale * (1 - 1e-6)).all()
    assert (refitted.scale < 2 * moved.scale * (1 + 1e-6)).all()


@pytest.mark.parametrize("block", [16, 12, 24])
def test_refitted_scales_of_blocks_are_those_of_least_squares(block: int) -> None:
    part, scale = example(Grid(4, block_size=block), inputs=48)
    start = rounded(part, scale)
    moved = replace(start, scale=start.scale * np.float32(1.1))
    refitted = _refit_blocks(part, moved, part.gradient(moved.codes, moved.scale))
    slow, of = Slow(part), part.problem.block
    m = oracle.lower_factor(slow.h)
    for c in range(len(scale)):
        images = np.stack([m @ np.where(of == b, start.codes[c], 0) for b in range(scale.shape[1])], axis=1)
        best = np.linalg.lstsq(images, m @ slow.optimum[c], rcond=None)[0]
        # what keeps blocks of zeros from counting, 1e-4 of the curvature, leaves as much of the way to go
        np.testing.assert_allclose(refitted.scale[c], best, rtol=2e-3)


def test_a_block_of_zeros_keeps_its_scale() -> None:
    part, scale = example(Grid(4, block_size=16))
    start = rounded(part, scale)
    codes = np.where(part.problem.block == 1, 0, start.codes)
    moved = replace(start, codes=codes, scale=start.scale * np.float32(1.1))
    refitted = _refit_blocks(part, moved, part.gradient(moved.codes, moved.scale))
    assert np.array_equal(refitted.scale[:, 1], moved.scale[:, 1])
    assert (refitted.scale[:, 0] != moved.scale[:, 0]).any()


# The beam -------------------------------------------------------------------------------------------------------------


def test_a_beam_over_blocks_is_the_one_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for grid in (Grid(3), Grid(4, symmetric=False, block_size=16)):
        part, scale = example(grid)
        start = rounded(part, scale)
        whole = _beam(part, part.whole(), start, 6)
        in_range(part, whole)
        for block in (1, 7, 20):
            monkeypatch.setattr("comq_onnx.solve.comq.BLOCK", block)
            blocked = _beam(part, part.whole(), start, 6)
            # float32 sums in another order may keep another of two that are as good
            assert np.count_nonzero((blocked.codes != whole.codes).any(axis=1)) <= 1
        monkeypatch.undo()


def test_a_beam_is_the_slow_one() -> None:
    part, scale = example(Grid(3, symmetric=False, block_size=16))
    start = rounded(part, scale)
    found, slow, same = _beam(part, part.whole(), start, 5), Slow(part), 0
    low, high = slow.bounds
    for c in range(len(scale)):
        step = start.scale[c, part.problem.block].astype(np.float64)
        loss, codes = oracle.beam(slow.h, slow.optimum[c], step, low[c], high[c], 5)[0]
        same += np.array_equal(found.codes[c], codes)
        assert slow.loss(found.codes, start.scale)[c] == pytest.approx(loss, rel=0.05)
    # float32 may keep another of two that are as good
    assert same >= len(scale) - 1


def test_a_wide_beam_is_better_than_babai_rounding_on_the_whole() -> None:
    part, scale = example(Grid(3), channels=40)
    start = rounded(part, scale)
    codes, _ = _round_all(part.problem, part.whole(), start.scale.T.copy(), start.zero.T.copy())
    slow = Slow(part)
    losses = [slow.loss(_beam(part, part.whole(), start, width).codes, start.scale).sum() for width in (1, 4, 16)]
    assert losses[0] == pytest.approx(slow.loss(codes.T, start.scale).sum(), rel=1e-3)
    assert losses[2] < losses[1] < losses[0]


# Few inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mismatch", [0.0, 0.3])
def test_a_few_inputs_are_solved_nearly_exactly(symmetric: bool, mismatch: float) -> None:
    """At 2 bits, against the best of all codes at the best scale for each."""
    over, plain = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 6))
        x = rows(rng, "correlated", 2, 60, n)
        hat = (x + mismatch * x.std() * rng.standard_normal(x.shape)).astype(np.float32)
        moments, grid = oracle.moments_of(x, hat if mismatch else None), Grid(2, symmetric)
        weight = rng.standard_normal((2, 3, n)).astype(np.float32)
        objective, solved = oracle.Objective(weight, moments), solve_comq(weight, moments, grid)
        optimum, found = objective.optimum(), objective(solved.dequantize()) - objective(objective.optimum())
        babai = objective(solve_comq(weight, moments, grid, "fast").dequantize()) - objective(optimum)
        for g, c in np.ndindex(2, 3):
            zero, h, w = int(solved.zero_point[g, c, 0]), objective.h[g], optimum[g, c]
            every = oracle.every_code(grid.qmin - zero, grid.qmax - zero, n)
            norm, slope = np.einsum("ki,ij,kj->k", every, h, every), every @ h @ w
            nothing = w @ h @ w
            gain = np.where(slope > 0, slope, 0) ** 2 / np.where(norm > 0, norm, 1)
            over.append((found[g, c] - nothing + gain.max()) / nothing)
            plain.append((babai[g, c] - nothing + gain.max()) / nothing)
    assert min(over) > -1e-5
    # a few have a better answer, at a scale that was not tried or beyond moves of one and two codes
    assert np.mean(np.asarray(over) < 1e-5) > 0.85
    assert np.mean(over) < 0.01
    assert np.mean(over) <= np.mean(plain) + 1e-6


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


# The ridge ------------------------------------------------------------------------------------------------------------


def halved(inputs: int, positions: int, seed: int = 0) -> tuple[np.ndarray, Moments]:
    """A layer of inputs whose powers fall, seen at so many positions, in halves."""
    rng = np.random.default_rng(seed)
    turned = np.linalg.qr(rng.standard_normal((inputs, inputs)))[0]
    x = rng.standard_normal((1, positions, inputs)) * np.arange(1, inputs + 1) ** -1.0 @ turned
    return rng.standard_normal((1, 16, inputs)).astype(np.float32), oracle.moments_of(x.astype(np.float32), halves=True)


def test_without_halves_the_ridge_is_the_usual_one() -> None:
    weight, moments = halved(48, 100)
    assert choose_ridge(weight, replace(moments, half=None), Grid(4)) == RIDGE
    # a half that is all or nothing tells nothing
    for count in (0, moments.count):
        half = replace(moments, half=None, count=count)
        assert choose_ridge(weight, replace(moments, half=half), Grid(4)) == RIDGE


@pytest.mark.parametrize("inputs", [48, 100])
def test_few_samples_take_a_larger_ridge_than_many(inputs: int) -> None:
    few, many = ([choose_ridge(*halved(inputs, k, seed), Grid(3)) for seed in range(3)] for k in (40, 6000))
    assert max(many) < min(few)
    assert np.mean(few) > 3 * np.mean(many)


def test_the_ridge_is_the_same_each_time_and_for_any_unit() -> None:
    for grid in (Grid(3), Grid(4, symmetric=False, block_size=16), Grid(4, per_tensor=True)):
        weight, moments = halved(70, 90)
        x = replace(moments, gram=moments.gram * 4, mean=moments.mean * 2, half=replace(
            moments.half, gram=moments.half.gram * 4, mean=moments.half.mean * 2))  # fmt: skip
        ridges = {choose_ridge(weight, m, grid) for m in (moments, moments, x)}
        assert len(ridges) == 1


@pytest.mark.parametrize(("inputs", "positions"), [(48, 30), (48, 150), (48, 4000), (70, 60), (70, 300)])
@pytest.mark.parametrize("grid", [Grid(3), Grid(4, symmetric=False, block_size=16)], ids=str)
def test_the_ridge_is_where_a_slow_search_ends(inputs: int, positions: int, grid: Grid) -> None:
    """From the usual ridge on, up and then down, while the error on the other half falls."""
    weight, moments = halved(inputs, positions)
    halves = moments.folds()
    assert halves is not None
    # of 64 inputs and more every other one
    order = np.argsort(-np.diag(moments.gram[0]), kind="stable")[:: 2 if inputs >= 64 else 1]
    (scale,), (zero,) = fit_mse(weight, grid)
    of = grid.block_of(inputs)[order]
    step, zeros, w = scale[:, of].astype(np.float64), zero[:, of].astype(np.float64), weight[0][:, order]

    def error(ridge: float) -> float:
        total = 0.0
        for seen, unseen in (halves, halves[::-1]):
            g, other = (s.gram[0][np.ix_(order, order)] for s in (seen, unseen))
            h = g + ridge * np.diag(g).mean() * np.eye(len(g))
            codes, _ = oracle.babai(h, w, step, grid.qmin - zeros, grid.qmax - zeros)
            # one factor on the scales of each channel
            q = codes * step
            d = w - q * (np.einsum("ci,ij,cj->c", q, h, w) / np.einsum("ci,ij,cj->c", q, h, q))[:, None]
            total += float(np.einsum("ci,ij,cj->", d, other, d))
        return total

    ridges = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    k = ridges.index(RIDGE)
    for by in (1, -1):
        while 0 <= k + by < len(ridges) and error(ridges[k + by]) < error(ridges[k]):
            k += by
    assert choose_ridge(weight, moments, grid) == ridges[k]


def test_a_ridge_is_chosen_from_samples_with_a_mismatch_and_a_mean() -> None:
    rng = np.random.default_rng(0)
    x = rows(rng, "offset", 6, 50, 40)
    moments = oracle.moments_of(x, (x + 0.3 * rng.standard_normal(x.shape)).astype(np.float32), halves=True)
    weight = rng.standard_normal((6, 120, 40)).astype(np.float32)
    for one in (moments, moments.centred()):
        assert choose_ridge(weight, one, Grid(4)) in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def test_only_the_fast_effort_does_not_choose_the_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("comq_onnx.solve.comq.choose_ridge", lambda *_: asked.append(1) or RIDGE)
    weight, moments = halved(40, 50)
    for name, times in (("fast", 0), ("default", 1), ("max", 2)):
        solve_comq(weight, moments, Grid(4), name)
        assert len(asked) == times


# One scale for all ---------------------------------------------------------------------------------------------------


@QUICK
@given(cases((3, 9, 60)), st.sampled_from(list(EFFORTS)))
def test_a_scale_for_all_is_shared_by_all_parts(case: Case, name: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("comq_onnx.solve.parallel.PART", 2)
        grid = Grid(case.grid.bits, case.grid.symmetric, per_tensor=True)
        solved = solve_comq(case.weight, case.moments, grid, name)
    assert np.unique(solved.scale).size == np.unique(solved.zero_point).size == 1
