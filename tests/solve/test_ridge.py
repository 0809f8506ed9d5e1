"""Test the choice of the ridge against a slow search in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from layers import halved, rows

from comq_onnx.solve.grid import Grid, fit_mse
from comq_onnx.solve.problem import RIDGE
from comq_onnx.solve.ridge import choose_ridge


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
    """Search from the usual ridge on, up and then down, while the error on the other half falls."""
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
