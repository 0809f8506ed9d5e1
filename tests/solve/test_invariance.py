"""Test what must not change the answer: order, parts, units, threads, blocks of the kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from layers import ALL, COMQ, EFFORTS, METHODS, QUICK, SOLVERS, Case, cases, coupled, rows

from comq_onnx.solve.grid import Grid
from comq_onnx.solve.layer import Method, Solution, solve
from comq_onnx.solve.moments import Moments


@SOLVERS
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("part", [192, 5])
def test_permuting_the_outputs_permutes_the_answer(
    method: Method, symmetric: bool, block: int | None, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comq_onnx.solve.parallel.PART", part)
    weight, moments = coupled()
    order = np.random.default_rng(4).permutation(24)
    grid = Grid(4, symmetric, block_size=block)
    straight, permuted = (solve(w, moments, grid, method).weight for w in (weight, weight[:, order]))
    assert np.array_equal(permuted.codes, straight.codes[:, order])
    assert np.array_equal(permuted.zero_point, straight.zero_point[:, order])
    # BLAS may add up a column's products in another order where it stands elsewhere
    np.testing.assert_allclose(permuted.scale, straight.scale[:, order], rtol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.order == "greedy"], ids=str)
@pytest.mark.parametrize("grid", [Grid(4), Grid(3, symmetric=False), Grid(4, per_tensor=True)], ids=str)
def test_permuting_the_inputs_permutes_the_answer(method: Method, grid: Grid) -> None:
    """Leave out the paper's cyclic order, which visits the inputs as they lie."""
    weight, moments = coupled()
    order = np.random.default_rng(4).permutation(40)
    assert moments.cross is not None
    assert moments.residue is not None
    assert moments.mean_error is not None
    moved = Moments(
        moments.gram[:, order][..., order], moments.mean[:, order], moments.count, moments.cross[:, order][..., order],
        moments.residue[:, order][..., order], moments.mean_error[:, order],
    )  # fmt: skip
    straight, permuted = (solve(w, s, grid, method).weight for w, s in ((weight, moments), (weight[..., order], moved)))
    assert np.array_equal(permuted.codes, straight.codes[..., order])
    assert np.array_equal(permuted.zero_point, straight.zero_point)
    # sums over the inputs are taken in another order
    np.testing.assert_allclose(permuted.scale, straight.scale, rtol=1e-5)


@EFFORTS
@pytest.mark.parametrize("grid", [Grid(4), Grid(3, symmetric=False, block_size=16), Grid(4, per_tensor=True)], ids=str)
def test_the_parts_that_channels_are_solved_in_do_not_change_the_answer(
    method: Method, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moments = coupled()
    whole = solve(weight, moments, grid, method)
    for part in (1, 7, 23):
        monkeypatch.setattr("comq_onnx.solve.parallel.PART", part)
        apart = solve(weight, moments, grid, method)
        # BLAS adds up products of other shapes in another order, which may decide a tie the other way: of 48 channels
        # one may go another way from there
        differs = (apart.weight.codes != whole.weight.codes).any(axis=-1)
        assert np.count_nonzero(differs) <= 1
        assert apart.error == pytest.approx(whole.error, rel=1e-3)


@QUICK
@given(
    cases(conditions=["white", "correlated", "dead", "duplicate", "singular", "offset"]),
    st.integers(-12, 12),
    st.sampled_from(list(METHODS.values())),
    st.booleans(),
)
def test_the_unit_of_the_inputs_does_not_matter(case: Case, power: int, method: Method, has_bias: bool) -> None:
    hat = None if case.x_hat is None else np.ldexp(case.x_hat, power)
    scaled = oracle.moments_of(np.ldexp(case.x, power), hat, case.halves)
    ours, theirs = (solve(case.weight, s, case.grid, method, has_bias) for s in (case.moments, scaled))
    # a power of two changes no mantissa
    assert np.array_equal(ours.weight.codes, theirs.weight.codes)
    assert np.array_equal(ours.weight.scale, theirs.weight.scale)
    assert ours.error == theirs.error
    if ours.shift is not None:
        assert np.array_equal(np.ldexp(ours.shift, power), theirs.shift)


@QUICK
@given(
    cases(conditions=["white", "correlated", "dead", "duplicate", "singular", "offset"]),
    st.integers(-12, 12),
    st.sampled_from(list(METHODS.values())),
)
def test_the_unit_of_the_weights_does_not_matter(case: Case, power: int, method: Method) -> None:
    # a row of zeros has scale 1 in any unit, which others may share a choice with
    assume(np.abs(case.weight).max(axis=-1).all())
    ours = solve(case.weight, case.moments, case.grid, method)
    theirs = solve(np.ldexp(case.weight, power), case.moments, case.grid, method)
    # a power of two changes no mantissa
    assert np.array_equal(ours.weight.codes, theirs.weight.codes)
    assert np.array_equal(np.ldexp(ours.weight.scale, power), theirs.weight.scale)
    assert ours.error == theirs.error


@ALL
def test_solving_twice_gives_the_same_bytes(method: Method) -> None:
    rng = np.random.default_rng(5)
    x = rows(rng, "correlated", 2, 200, 150)
    moments = oracle.moments_of(x, (x * 1.01).astype(np.float32), halves=True)
    weight = rng.standard_normal((2, 20, 150)).astype(np.float32)
    for grid in (Grid(3), Grid(4, symmetric=False, block_size=32), Grid(2, per_tensor=True)):
        same_bytes(*(solve(weight.copy(), moments, grid, method, has_bias=True) for _ in range(2)))


@ALL
@pytest.mark.parametrize("groups", [1, 3])
def test_the_number_of_threads_does_not_change_a_byte(
    method: Method, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Solve more channels than one part has, and several groups; also few inputs."""
    rng = np.random.default_rng(5)
    for inputs in (40, 9):
        x = rows(rng, "correlated", groups, 200, inputs)
        moments = oracle.moments_of(x, (x * 1.01).astype(np.float32), halves=True)
        weight = rng.standard_normal((groups, 200, inputs)).astype(np.float32)
        for grid in (Grid(3, symmetric=False), Grid(4, per_tensor=True)):
            found = []
            for threads in (1, 2, 3):
                # numba's own setter refuses more threads than the machine has cores
                monkeypatch.setattr("comq_onnx.solve.parallel.numba.get_num_threads", lambda n=threads: n)
                found.append(solve(weight, moments, grid, method, has_bias=True))
            for other in found[1:]:
                same_bytes(found[0], other)


def same_bytes(first: Solution, second: Solution) -> None:
    for a, b in zip(parts(first), parts(second), strict=True):
        assert a.tobytes() == b.tobytes()


def parts(solution: Solution) -> list[np.ndarray]:
    numbers = np.asarray([solution.error, solution.rtn_error])
    shift = np.zeros(0) if solution.shift is None else solution.shift
    return [solution.weight.codes, solution.weight.scale, solution.weight.zero_point, shift, numbers]


@pytest.mark.parametrize("inputs", [20, 40])
def test_solving_leaves_its_arguments_alone(inputs: int) -> None:
    rng = np.random.default_rng(5)
    x = rows(rng, "white", 1, 100, inputs)
    moments = oracle.moments_of(x, x * np.float32(1.01), halves=True)
    weight = rng.standard_normal((1, 6, inputs)).astype(np.float32)
    assert moments.half is not None
    arrays = [weight] + [
        a for m in (moments, moments.half) for a in (m.gram, m.mean, m.cross, m.residue, m.mean_error) if a is not None
    ]
    assert len(arrays) == 10
    before = [a.copy() for a in arrays]
    for method in METHODS.values():
        for grid in (Grid(4), Grid(4, block_size=16)):
            for has_bias in (False, True):
                solve(weight, moments, grid, method, has_bias)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_the_kernels_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x = rows(rng, "white", 1, 300, 50)
    moments = oracle.moments_of(x, (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32))
    weight = rng.standard_normal((1, 8, 50)).astype(np.float32)
    for method in (*COMQ, Method("gptq")):
        whole = solve(weight, moments, Grid(4), method)
        with monkeypatch.context() as patched:
            patched.setattr("comq_onnx.solve.problem.BLOCK", 7)
            blocked = solve(weight, moments, Grid(4), method)
        # float32 sums in another order may decide a tie the other way
        assert np.count_nonzero(whole.weight.codes != blocked.weight.codes) <= 4
        assert blocked.error == pytest.approx(whole.error, rel=1e-2)


@SOLVERS
@pytest.mark.parametrize("inputs", [40, 9])
@pytest.mark.parametrize(
    "grid", [Grid(3, signed=True), Grid(3, signed=True, block_size=16), Grid(2, signed=True, per_tensor=True)], ids=str
)
def test_a_negative_weight_has_the_same_codes_at_negative_scales(method: Method, inputs: int, grid: Grid) -> None:
    if method.solver == "paper":
        pytest.skip("the authors' algorithm begins at positive scales, and keeps their sign")
    weight, moments = coupled(inputs)
    ours, theirs = (solve(sign * weight, moments, grid, method).weight for sign in (1, -1))
    # where no code lies at an end both signs are as good, and the positive one is taken
    turned = (np.sign(ours.scale) == -np.sign(theirs.scale)).all(axis=-1)
    assert turned.mean() > (0 if grid.per_tensor else 0.5)
    assert np.array_equal(ours.codes[turned], theirs.codes[turned])
    assert np.array_equal(ours.scale[turned], -theirs.scale[turned])
    assert grid.per_tensor or {-1, 1} == set(np.unique(np.sign(ours.scale)))


@EFFORTS
@pytest.mark.parametrize("block", [None, 16])
def test_signed_scales_lose_less(method: Method, block: int | None) -> None:
    weight, moments = coupled(40)
    grid = Grid(2, block_size=block)
    signed, positive = (solve(weight, moments, replace(grid, signed=sign), method) for sign in (True, False))
    assert signed.error < positive.error
