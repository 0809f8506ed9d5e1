"""Test the compiled loops against slow ones in float64, away from ties, and against all codes where these are few."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from problems import HIGH, LOW, TIE, Few, few

from comq_onnx.solve import kernels
from comq_onnx.solve.descent import MOVE_TOLERANCE


def run_babai(problem: Few) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes and wq [channels, in] and sums [3, channels] of kernels.babai_block, with one block."""
    m = oracle.lower_factor(problem.h)
    unit = (m / np.diag(m)[:, None]).astype(np.float32)
    unit[np.triu_indices(len(unit), 1)] = 1e30  # not to be read
    whole = np.ascontiguousarray(((m / np.diag(m)[:, None]) @ problem.optimum.T).astype(np.float32))
    codes, wq = np.empty((2, *whole.shape), np.float32)
    sums = np.zeros((3, whole.shape[1]), np.float32)
    kernels.babai_block(
        whole, whole.copy(), unit, problem.scale.T.copy(), problem.zero.T.copy(), problem.block, LOW, HIGH,
        np.diag(m).astype(np.float32), codes, wq, sums,
    )  # fmt: skip
    return codes.T, wq.T, sums


# a tile of channels, one more and one less; eight inputs at a time, and those left over
@pytest.mark.parametrize(("n", "channels"), [(1, 1), (1, 70), (7, 3), (8, 63), (9, 64), (24, 65), (40, 130)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_rounding_one_input_after_the_other_is_the_slow_one(n: int, channels: int, blocks: int) -> None:
    problem = few(n + channels, n, channels, blocks)
    codes, wq, _ = run_babai(problem)
    wanted, near = oracle.babai(problem.h, problem.optimum, problem.step, problem.low, problem.high)
    clear = near.min(axis=1) > TIE
    assert clear.mean() > 0.7
    assert np.array_equal(codes[clear], wanted[clear])
    # a tie may go either way
    assert (problem.low <= codes).all()
    assert (codes <= problem.high).all()
    np.testing.assert_allclose(wq, codes * problem.step, rtol=1e-6)


@pytest.mark.parametrize(("n", "channels"), [(1, 70), (24, 65), (40, 3)])
def test_rounding_tells_loss_slope_and_norm_of_its_codes(n: int, channels: int) -> None:
    problem = few(n, n, channels)
    _, wq, sums = run_babai(problem)
    m = oracle.lower_factor(problem.h)
    y, image = (problem.optimum - wq) @ m.T, wq.astype(np.float64) @ m.T
    for found, wanted in zip(sums, ((y * y), (y * image), (image * image)), strict=True):
        # float32 sums of n products of numbers that are rounded themselves
        within = 1e-5 * (np.abs(y) + np.abs(image)) ** 2
        assert (np.abs(found - wanted.sum(axis=1)) <= within.sum(axis=1)).all()


@pytest.mark.parametrize("n", [1, 2, 9, 40])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_sweep_is_the_slow_one(n: int, blocks: int) -> None:
    problem = few(n, n, 30, blocks)
    codes, v = problem.start()
    before, clear = codes.copy(), 0
    changed = kernels.sweep(v, problem.h, problem.scale, problem.zero, problem.block, LOW, HIGH, codes)
    for c in range(30):
        channel = (problem.step[c], problem.low[c], problem.high[c])
        wanted, near = oracle.sweep(problem.h, problem.pull[c], problem.w[c], before[c], *channel)
        if near > TIE:
            clear += 1
            assert np.array_equal(codes[c], wanted)
    assert clear > 20
    assert (changed > 0) == (codes != before).any()
    # a code that a sweep changes back is counted too: none is visited twice
    assert changed == np.count_nonzero(codes != before)
    # the gradient followed: float32 updates, one a change
    np.testing.assert_allclose(v, problem.gradient(codes), rtol=1e-3, atol=1e-4 * float(np.abs(v).max()))


@pytest.mark.parametrize("pairs", [0, 24])
@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_the_gradient_follows_the_moves(n: int, pairs: int) -> None:
    problem = few(n, n, 30, 2)
    codes, v = problem.start()
    before = codes.copy()
    move_best_first(problem, v, codes, pairs)
    assert n == 1 or (codes != before).any()
    assert (problem.low <= codes).all()
    assert (codes <= problem.high).all()
    # float32 updates, one a move
    np.testing.assert_allclose(v, problem.gradient(codes), rtol=1e-3, atol=1e-4 * float(np.abs(v).max()))


def move_best_first(problem: Few, v: np.ndarray, codes: np.ndarray, pairs: int) -> None:
    kernels.move_best_first(
        v, problem.h, problem.scale, problem.zero, problem.block, LOW, HIGH, codes, np.float32(MOVE_TOLERANCE), pairs
    )


@pytest.mark.parametrize("n", [1, 2, 9, 25])
@pytest.mark.parametrize("blocks", [1, 3])
def test_single_moves_are_best_first(n: int, blocks: int) -> None:
    problem = few(n, n, 30, blocks)
    codes, v = problem.start()
    before, clear = codes.copy(), 0
    move_best_first(problem, v, codes, 0)
    for c in range(30):
        channel = (problem.step[c], problem.low[c], problem.high[c])
        wanted, near = oracle.best_first(problem.h, problem.pull[c], problem.w[c], before[c], *channel, MOVE_TOLERANCE)
        if near > 1e-5:  # gains of some curvatures in float32
            clear += 1
            assert np.array_equal(codes[c], wanted)
    assert clear > 20


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("ridge", [0.01, 0.3])
def test_after_the_moves_no_code_and_no_two_along_their_gradients_move_for_the_better(n: int, ridge: float) -> None:
    reached = []
    for seed in range(60 if n < 5 else 15):
        problem = few(seed, n, 4, 2, ridge)
        codes, v = problem.start()
        kernels.sweep(v, problem.h, problem.scale, problem.zero, problem.block, LOW, HIGH, codes)
        move_best_first(problem, v, codes, 24)
        for c in range(4):
            base, own = float(problem.loss(codes[c], c)), np.diag(problem.h) * problem.step[c] ** 2
            along = np.sign(problem.gradient(codes)[c])
            for move in oracle.steps(n):
                after = codes[c] + move
                if (after < problem.low[c]).any() or (after > problem.high[c]).any():
                    continue
                # two of which one goes against its own gradient are not tried
                if np.count_nonzero(move) == 2 and (move * along < 0).any():
                    continue
                # what a move must win at least, and what float32 does to gradients
                least = 2 * MOVE_TOLERANCE * float(own @ np.abs(move)) + 1e-5 * base
                assert float(problem.loss(after, c)) >= base - least
            least = float(problem.loss(every_code(problem, c), c).min())
            assert base >= least * (1 - 1e-9)
            reached.append(base <= least * (1 + 1e-6))
    # all codes there are set the bound: most problems reach it, of those of five codes with little ridge 63%
    assert np.mean(reached) > (0.8 if ridge == 0.3 else 0.5)


def every_code(problem: Few, channel: int) -> np.ndarray:
    """Return all codes that one channel may have, less the zero point."""
    n = problem.w.shape[1]
    ranges = [np.arange(problem.low[channel, i], problem.high[channel, i] + 1) for i in range(n)]
    return np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, n)


def run_beam(problem: Few, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes and wq [in, channels, width] and losses [channels, width] of kernels.beam_block, with one block."""
    m = oracle.lower_factor(problem.h)
    unit = (m / np.diag(m)[:, None]).astype(np.float32)
    unit[np.triu_indices(len(unit), 1)] = 1e30  # not to be read
    whole = ((m / np.diag(m)[:, None]) @ problem.optimum.T).astype(np.float32)
    n, channels = whole.shape
    codes, wq = np.empty((2, n, channels, width), np.float32)
    loss = np.full((channels, width), np.inf, np.float32)
    loss[:, 0] = 0
    origin = np.empty((channels, width), np.intp)
    kernels.beam_block(
        np.repeat(whole[..., None], width, axis=2), unit, problem.scale.T.copy(), problem.zero.T.copy(), problem.block,
        LOW, HIGH, np.diag(m).astype(np.float32), codes, wq, loss, origin,
    )  # fmt: skip
    return codes, wq, loss


@pytest.mark.parametrize(("n", "width"), [(1, 1), (1, 4), (4, 1), (4, 3), (9, 2), (9, 8), (25, 5)])
def test_a_beam_is_the_slow_one(n: int, width: int) -> None:
    problem, clear = few(n, n, 20, 2), 0
    codes, wq, loss = run_beam(problem, width)
    assert np.array_equal(np.sort(loss, axis=1), loss)
    for c in range(20):
        channel = (problem.step[c], problem.low[c], problem.high[c])
        wanted = oracle.beam(problem.h, problem.optimum[c], *channel, width)
        alive = np.isfinite(loss[c])
        assert np.count_nonzero(alive) == len(wanted)
        for k in np.flatnonzero(alive):
            # the loss told is that of the codes told: float32 sums of squares
            own = float(problem.loss(codes[:, c, k], c))
            assert loss[c, k] == pytest.approx(own, rel=1e-3, abs=1e-6)
            np.testing.assert_allclose(wq[:, c, k], codes[:, c, k] * problem.step[c], rtol=1e-6)
            assert (problem.low[c] <= codes[:, c, k]).all()
            assert (codes[:, c, k] <= problem.high[c]).all()
        same = np.allclose(loss[c, alive], [one for one, _ in wanted], rtol=1e-3, atol=1e-6)
        clear += same and np.array_equal(codes[:, c, 0], wanted[0][1])
    # float32 may keep another of two that are as good
    assert clear >= 19


@pytest.mark.parametrize("n", [1, 3, 6])
def test_a_beam_that_drops_nothing_finds_the_best_of_all_it_may_take(n: int) -> None:
    problem = few(n, n, 20, 2)
    codes, _, loss = run_beam(problem, 2**n)
    for c in range(20):
        channel = (problem.step[c], problem.low[c], problem.high[c])
        best, wanted = oracle.beam(problem.h, problem.optimum[c], *channel, 2**n)[0]
        assert loss[c, 0] == pytest.approx(best, rel=1e-3, abs=1e-6)
        assert np.array_equal(codes[:, c, 0], wanted)
        # at least as good as Babai's, whose every choice is among them
        plain, _ = oracle.babai(problem.h, problem.optimum, problem.step, problem.low, problem.high)
        assert best <= float(problem.loss(plain[c], c)) * (1 + 1e-9)


def test_a_beam_of_one_is_babai_rounding() -> None:
    problem = few(0, 24, 65, 3)
    codes, _, _ = run_beam(problem, 1)
    straight, _, sums = run_babai(problem)
    # the same float32 products, added up in another order
    assert np.count_nonzero((straight != codes[..., 0].T).any(axis=1)) <= 2
    _, _, loss = run_beam(problem, 1)
    np.testing.assert_allclose(np.sort(loss[:, 0]), np.sort(sums[0]), rtol=0.05)
