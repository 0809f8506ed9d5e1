"""Test that no step of the descent costs anything, and that scales are refitted to the best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import posed
from problems import EASY, POSED, Slow, example, in_range, rounded

from comq_onnx.solve.descent import descend, refit
from comq_onnx.solve.effort import EFFORTS
from comq_onnx.solve.grid import Array, Grid
from comq_onnx.solve.problem import Part


@POSED
@given(posed(), st.sampled_from(list(EFFORTS)))
def test_moving_codes_costs_nothing(given_: tuple[Part, Array], name: str) -> None:
    part, scale = given_
    start = rounded(part, scale)
    before = start.codes.copy(), start.scale.copy()
    with pytest.MonkeyPatch.context() as patched:
        # the scales stay; see the next tests
        patched.setattr("comq_onnx.solve.descent.refit", lambda _taken, now, _gradients: now)
        (end,) = descend([part], [start], EFFORTS[name])
    in_range(part, end)
    slow = Slow(part)
    noise = slow.noise(start.codes, start.scale)
    assert (slow.loss(end.codes, end.scale) <= slow.loss(start.codes, start.scale) + noise).all()
    assert np.array_equal(before[0], start.codes)
    assert np.array_equal(before[1], start.scale)


@POSED
@given(posed(conditions=EASY, blocked=False))
def test_one_scale_is_refitted_to_the_closed_form(given_: tuple[Part, Array]) -> None:
    part, scale = given_
    start = rounded(part, scale)
    moved = replace(start, scale=start.scale * np.float32(1.2), norm=start.norm * np.float32(1.44))
    (refitted,) = refit([part], [moved], [part.gradient(moved.codes, moved.scale)])
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
    refitted = refit([part], [moved], [part.gradient(moved.codes, moved.scale)])[0]
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
    refitted = refit([part], [moved], [part.gradient(moved.codes, moved.scale)])[0]
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
    refitted = refit([part], [moved], [part.gradient(moved.codes, moved.scale)])[0]
    assert np.array_equal(refitted.scale[:, 1], moved.scale[:, 1])
    assert (refitted.scale[:, 0] != moved.scale[:, 0]).any()
