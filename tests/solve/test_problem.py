"""Test the problem that COMQ minimizes against float64: its triangular factor, gradient, objective and optimum."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from layers import QUICK, Case, cases, rows

from comq_onnx.solve.grid import Grid
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.problem import BLOCK, RIDGE, Part, arrange, factor, pose, take_part

RIDGES = st.sampled_from([0.003, 0.1, 1.0])
EPS = float(np.finfo(np.float32).eps)


def gram(rng: np.random.Generator, n: int, ridge: float) -> np.ndarray:
    """Make a Gram of fewer rows than inputs, with a ridge: float32 [n, n]."""
    x = rng.standard_normal((max(n // 2, 1), n)) * np.geomspace(1, 10, n)
    g = x.T @ x / len(x)
    return (g + ridge * np.diag(g).mean() * np.eye(n)).astype(np.float32)


def whole_factor(h: np.ndarray) -> np.ndarray:
    """Return M in float64 from what `factor` gives."""
    unit, root = factor(h)
    assert unit.dtype == root.dtype == np.float32
    assert (root > 0).all()
    np.testing.assert_allclose(np.diag(unit), 1, rtol=1e-6)
    return np.tril(unit).astype(np.float64) * root[:, None]


@pytest.mark.parametrize("n", [1, 2, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 44])
@pytest.mark.parametrize("ridge", [0.003, 0.1])
def test_the_factor_is_lower_triangular_and_gives_h_back(n: int, ridge: float) -> None:
    h = gram(np.random.default_rng(n), n, ridge)
    m = whole_factor(h)
    # a Cholesky factor's backward error: some eps for each of n products, of the diagonal's size
    size = np.sqrt(np.outer(np.diag(h), np.diag(h)).astype(np.float64))
    assert (np.abs(m.T @ m - h) <= 4 * n * EPS * size).all()


def test_the_factors_blocks_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    h = gram(np.random.default_rng(0), 50, 0.1)
    whole = whole_factor(h)
    monkeypatch.setattr("comq_onnx.solve.problem.BLOCK", 7)
    # float32 sums in another order, on a matrix of condition some thousand
    np.testing.assert_allclose(whole_factor(h), whole, rtol=1e-3, atol=1e-4 * float(np.abs(whole).max()))


@pytest.mark.parametrize("n", [1, 2, 40, BLOCK + 1])
def test_the_factor_leaves_its_matrix_alone(n: int) -> None:
    h = gram(np.random.default_rng(n), n, 0.1) * 4
    before = h.copy()
    factor(h)
    assert np.array_equal(h, before)


def test_where_float32_finds_no_factor_float64_does() -> None:
    h = nearly_singular()
    with pytest.raises(scipy.linalg.LinAlgError):
        scipy.linalg.cholesky(h[::-1, ::-1], lower=True)
    m = whole_factor(h)
    assert (np.abs(m.T @ m - h) <= 4 * len(h) * EPS * np.abs(h).max()).all()


def nearly_singular() -> np.ndarray:
    """Make a matrix that is positive definite, but by less than float32 loses on the way to its factor."""
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((6, 6)) * np.geomspace(1, 2e-4, 6)
        turned = np.linalg.qr(rng.standard_normal((6, 6)))[0]
        h = (turned @ x.T @ x @ turned.T).astype(np.float32)
        h = (h + h.T) / np.float32(2)
        if np.linalg.eigvalsh(h.astype(np.float64)).min() <= 0:
            continue
        try:
            scipy.linalg.cholesky(h[::-1, ::-1], lower=True)
        except scipy.linalg.LinAlgError:
            return h
    raise AssertionError("none found")


def test_a_matrix_that_is_not_positive_definite_is_refused() -> None:
    for n in (1, 3, BLOCK + 5):
        h = gram(np.random.default_rng(0), n, 0.1)
        h[0, 0] = -1
        with pytest.raises(np.linalg.LinAlgError):
            factor(h)


def one_group(case: Case, ridge: float) -> tuple[Part, oracle.Objective, np.ndarray]:
    """Return the first group's channels, the slow objective of it, and the order of the inputs."""
    moments = case.moments.group(0)
    problem = pose(arrange(moments), case.grid, ridge)
    blocks = case.grid.blocks(case.weight.shape[-1])
    zero = np.zeros((case.weight.shape[1], blocks), np.float32)
    part = take_part(problem, case.weight[0], zero)
    return part, oracle.Objective(case.weight[:1], moments, ridge), problem.order


@QUICK
@given(cases((1, 9, 40)), RIDGES)
def test_the_inputs_come_by_decreasing_power_and_keep_their_blocks(case: Case, ridge: float) -> None:
    part, slow, order = one_group(case, ridge)
    assert sorted(order) == list(range(len(order)))
    assert (np.diff(np.diag(case.moments.gram[0])[order]) <= 0).all()
    assert np.array_equal(part.problem.block, case.grid.block_of(len(order))[order])
    assert np.array_equal(part.w, case.weight[0][:, order])
    # float32 of float64 sums, and the ridge
    np.testing.assert_allclose(part.problem.h, slow.h[0][np.ix_(order, order)], rtol=1e-6, atol=0)


@QUICK
@given(cases((1, 9, 40)), RIDGES, st.integers(0, 99))
def test_gradient_and_objective_are_those_of_float64(case: Case, ridge: float, seed: int) -> None:
    part, slow, order = one_group(case, ridge)
    rng = np.random.default_rng(seed)
    codes = rng.integers(-9, 10, part.w.shape).astype(np.float32)
    scale = rng.uniform(0.01, 1, part.zero.shape).astype(np.float32)
    values = np.empty_like(case.weight[:1])
    values[0][:, order] = codes * scale[:, part.problem.block]
    # float32 sums of n products each
    within = 2 * values.shape[-1] * EPS * slow.terms(values)[0]
    assert (np.abs(part.objective(codes, scale) - slow(values)[0]) <= within).all()
    d = np.abs(case.weight[:1] - values.astype(np.float64))
    terms = (d @ np.abs(slow.h) + np.abs(case.weight[:1]) @ np.abs(mismatch(case.moments)))[0][:, order]
    found = part.gradient(codes, scale)
    assert (np.abs(found - slow.gradient(values)[0][:, order]) <= 2 * values.shape[-1] * EPS * terms).all()


def mismatch(moments: Moments) -> np.ndarray:
    zero = np.zeros_like(moments.gram)
    return (zero if moments.cross is None else moments.cross.swapaxes(1, 2))[:1]


@QUICK
@given(cases((1, 9, 40)), RIDGES)
def test_the_optimum_is_where_the_gradient_vanishes(case: Case, ridge: float) -> None:
    part, slow, order = one_group(case, ridge)
    wanted = slow.optimum()[0][:, order]
    # float32 solves a system of this condition so well
    within = 8 * len(order) * EPS * np.linalg.cond(slow.h[0]) * np.abs(wanted - part.w).max() + 1e-6
    assert np.abs(part.optimum() - wanted).max() <= within


@QUICK
@given(cases((1, 9, 40)), RIDGES)
def test_the_whole_is_the_factor_times_the_optimum(case: Case, ridge: float) -> None:
    part, slow, order = one_group(case, ridge)
    m = oracle.lower_factor(slow.h[0][np.ix_(order, order)])
    wanted = m @ slow.optimum()[0][:, order].T
    # the norm of M w* is the optimum's in H; its error is float32's on a triangular system of this condition
    within = 8 * len(order) * EPS * np.sqrt(np.linalg.cond(slow.h[0])) * np.abs(wanted).max(axis=0) + 1e-30
    assert (np.abs(part.whole() * np.diag(m)[:, None] - wanted) <= within).all()


def test_the_wholes_blocks_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rows(rng, "white", 1, 90, 40)
    weight = rng.standard_normal((5, 40)).astype(np.float32)
    moments = oracle.moments_of(x, (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32))
    part = take_part(pose(arrange(moments), Grid(4)), weight, np.zeros((5, 1), np.float32))
    whole = part.whole()
    monkeypatch.setattr("comq_onnx.solve.problem.BLOCK", 7)
    # float32 sums in another order
    np.testing.assert_allclose(part.whole(), whole, rtol=1e-4, atol=1e-5)


def test_some_of_the_inputs_pose_a_problem_of_their_own() -> None:
    """Take every other input, as choose_ridge does, each in its block."""
    rng = np.random.default_rng(0)
    x = rows(rng, "white", 1, 90, 40)
    moments, grid = oracle.moments_of(x, x * np.float32(1.1)), Grid(4, block_size=16)
    order = np.asarray([30, 2, 17, 8])
    problem = pose(arrange(moments, order), grid)
    part = take_part(problem, rng.standard_normal((5, 40)).astype(np.float32), np.zeros((5, 3), np.float32))
    assert part.w.shape == (5, 4)
    assert list(problem.block) == [1, 0, 1, 0]
    own = moments.gram[0][np.ix_(order, order)]
    np.testing.assert_allclose(problem.h, own + RIDGE * np.diag(own).mean() * np.eye(4), rtol=1e-6)


@pytest.mark.parametrize("n", [1, 7])
def test_inputs_that_are_dead_get_a_problem_all_the_same(n: int) -> None:
    dead = Moments(np.zeros((1, n, n)), np.zeros((1, n)), 10)
    problem = pose(arrange(dead), Grid(4))
    assert np.array_equal(problem.h, np.eye(n, dtype=np.float32))
    assert np.array_equal(np.tril(problem.unit), np.eye(n))
    assert np.array_equal(problem.root, np.ones(n))
    assert np.array_equal(pose(arrange(dead), Grid(4), 0.0).root, np.ones(n))


def test_moments_that_are_off_by_more_than_the_ridge_get_a_larger_one() -> None:
    gram = np.asarray([[[1.0, 3.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])  # no Gram: 1 - 3 is an eigenvalue
    problem = pose(arrange(Moments(gram, np.zeros((1, 3)), 10)), Grid(4))
    # 0.1, 1 and 10 times the mean power
    np.testing.assert_allclose(problem.h, gram[0] + 10 * np.eye(3), rtol=1e-6)
    m = np.tril(problem.unit) * problem.root[:, None]
    np.testing.assert_allclose(m.T @ m, problem.h, rtol=1e-5, atol=1e-5)


def test_what_centring_leaves_of_a_constant_input_does_not_count() -> None:
    """Square a mean of 1000 to 1e6, of which float64 sums of float32 products keep a few parts in a million."""
    left = np.full((1, 3, 3), -1e-2)
    problem = pose(arrange(Moments(left, np.full((1, 3), 1000.0), 10)), Grid(4))
    # -0.01 + 1e-6 * 3e6
    np.testing.assert_allclose(np.diag(problem.h), 2.99, rtol=1e-6)
