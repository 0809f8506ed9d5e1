"""Test rounding one input after the other, each step against a slow one in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import posed, rows
from problems import EASY, POSED, TIE, Slow, example, in_range, rounded

from comq_onnx.solve.effort import EFFORTS
from comq_onnx.solve.grid import Array, Grid, fit_mse
from comq_onnx.solve.problem import Part, arrange, pose, take_part
from comq_onnx.solve.rounding import babai, babai_codes, beam, best_start, better_of


@POSED
@given(posed(conditions=EASY))
def test_babai_rounding_is_the_slow_one(given_: tuple[Part, Array]) -> None:
    part, scale = given_
    codes, _ = babai_codes(part.problem, part.whole(), scale.T.copy(), part.zero.T.copy())
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
            monkeypatch.setattr("comq_onnx.solve.problem.BLOCK", block)
            part = take_part(pose(arrange(moments), grid), weight, zero.astype(np.float32))
            codes, _ = babai_codes(part.problem, part.whole(), scale.T.copy(), part.zero.T.copy())
            wanted, near = Slow(part).babai(scale)
            clear = near.min(axis=1) > TIE
            assert clear.mean() > 0.7
            assert np.array_equal(codes.T[clear], wanted[clear])


@POSED
@given(posed())
def test_a_babai_start_comes_with_its_best_common_factor_and_its_loss(given_: tuple[Part, Array]) -> None:
    part, scale = given_
    (one,), (loss,) = babai([part], [part.whole()], [scale], [part.zero])
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
    (plain,), _ = babai([part], [whole], [scale], [part.zero])
    (best,) = best_start([part], [whole], [scale], EFFORTS[name])
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


def test_what_is_kept_is_the_better_of_two_channel_by_channel() -> None:
    part, scale = example(Grid(3))
    good = rounded(part, scale)
    bad = replace(good, codes=np.clip(good.codes + 1, -4, 3), zero=good.zero + 1)
    mixed = [replace(good, codes=np.where(np.arange(9)[:, None] % 2, a.codes, b.codes)) for a, b in
             ((good, bad), (bad, good))]  # fmt: skip
    (best,) = better_of([part], [mixed[0]], [mixed[1]])
    assert np.array_equal(best.codes, good.codes)
    # of two that are equal the first stays
    (best,) = better_of([part], [good], [replace(good, zero=good.zero + 1)])
    assert np.array_equal(best.zero, good.zero)


def test_what_is_kept_of_channels_that_share_a_scale_is_one_of_the_two_for_all() -> None:
    part, scale = example(Grid(3, per_tensor=True))
    scale = np.full_like(scale, scale.mean())
    good = rounded(part, scale)
    worse = good.codes.copy()
    worse[0] = np.clip(good.codes[0] + 1, -4, 3)  # one channel much worse
    first, second = replace(good, codes=worse), good
    for one, other in ((first, second), (second, first)):
        (best,) = better_of([part], [one], [other])
        assert np.array_equal(best.codes, good.codes)
    better_elsewhere = better_of([part, part], [first, second], [second, first])
    assert sum(np.array_equal(one.codes, worse) for one in better_elsewhere) == 1


# The beam -------------------------------------------------------------------------------------------------------------


def test_a_beam_over_blocks_is_the_one_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for grid in (Grid(3), Grid(4, symmetric=False, block_size=16)):
        part, scale = example(grid)
        start = rounded(part, scale)
        target = part.whole()
        whole = beam(part, target, start, 6)
        in_range(part, whole)
        for block in (1, 7, 20):
            monkeypatch.setattr("comq_onnx.solve.problem.BLOCK", block)
            blocked = beam(part, target, start, 6)
            # float32 sums in another order may keep another of two that are as good
            assert np.count_nonzero((blocked.codes != whole.codes).any(axis=1)) <= 1
        monkeypatch.undo()


def test_a_beam_is_the_slow_one() -> None:
    part, scale = example(Grid(3, symmetric=False, block_size=16))
    start = rounded(part, scale)
    found, slow, same = beam(part, part.whole(), start, 5), Slow(part), 0
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
    codes, _ = babai_codes(part.problem, part.whole(), start.scale.T.copy(), start.zero.T.copy())
    slow = Slow(part)
    losses = [slow.loss(beam(part, part.whole(), start, width).codes, start.scale).sum() for width in (1, 4, 16)]
    assert losses[0] == pytest.approx(slow.loss(codes.T, start.scale).sum(), rel=1e-3)
    assert losses[2] < losses[1] < losses[0]
