"""Test the moments that a solver knows, the sums that they are made from, and their halves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from conftest import Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import QUICK, Case, cases, rows

from comq_onnx.solve import moments as module
from comq_onnx.solve.moments import STRETCHES, Moments, MomentSums, chunks, halves, pooled
from models import normal


@QUICK
@given(cases())
def test_centred_moments_are_those_of_the_samples_less_their_mean(case: Case) -> None:
    centred = case.moments.centred()
    x = case.x.astype(np.float64)
    hat = x if case.x_hat is None else case.x_hat.astype(np.float64)
    same_moments(centred, hat, x, hat.mean(axis=1, keepdims=True), (x - hat).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(centred.mean, hat.mean(axis=1), rtol=1e-12)
    if centred.half is not None:
        # about the mean of all, not of the half
        mean, mean_error = hat.mean(axis=1, keepdims=True), (x - hat).mean(axis=1, keepdims=True)
        same_moments(centred.half, hat[:, ::2], x[:, ::2], mean, mean_error)


def same_moments(found: Moments, hat: np.ndarray, x: np.ndarray, mean: np.ndarray, mean_error: np.ndarray) -> None:
    less = (hat - mean, x - hat - mean_error)
    count = x.shape[1]
    size = float((hat**2).mean() + (x**2).mean())
    assert found.count == count
    for moment, a, b in ((found.gram, 0, 0), (found.cross, 0, 1), (found.residue, 1, 1)):
        if moment is not None:
            # float64 sums of 60 squares
            wanted = less[a].swapaxes(1, 2) @ less[b] / count
            np.testing.assert_allclose(moment, wanted, rtol=1e-9, atol=1e-12 * size)


@QUICK
@given(cases())
def test_the_two_halves_add_up_to_the_whole(case: Case) -> None:
    for moments in (case.moments, case.moments.centred()):
        halves = moments.folds()
        assert moments.has_folds == (halves is not None)
        if not case.halves:
            assert halves is None
            continue
        assert halves is not None
        first, second = halves
        assert first.count + second.count == moments.count
        for name in ("gram", "mean", "cross", "mean_error"):
            whole, a, b = (getattr(m, name) for m in (moments, first, second))
            if whole is None:
                assert a is None
                assert b is None
                continue
            size = float(np.abs(a).max() + np.abs(b).max())
            # float64 sums
            np.testing.assert_allclose((a * first.count + b * second.count) / moments.count, whole, atol=1e-12 * size)
        assert first.residue is None
        assert second.residue is None


def test_the_second_half_is_that_of_the_other_samples() -> None:
    rng = np.random.default_rng(0)
    x = rows(rng, "offset", 2, 61, 7)
    hat = (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)
    halves = oracle.moments_of(x, hat, halves=True).folds()
    assert halves is not None
    for found, start in zip(halves, (0, 1), strict=True):
        wanted = oracle.moments_of(x[:, start::2], hat[:, start::2])
        assert found.count == wanted.count == 31 - start
        for name in ("gram", "mean", "cross", "mean_error"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [0, 60])
def test_a_half_that_is_all_or_nothing_is_none(count: int) -> None:
    moments = oracle.moments_of(rows(np.random.default_rng(0), "white", 1, 60, 5), halves=True)
    assert moments.half is not None
    assert replace(moments, half=replace(moments.half, count=count)).folds() is None


def test_rows_added_as_halves_come_out_as_halves() -> None:
    rng = np.random.default_rng(0)
    x = rows(rng, "offset", 2, 60, 7)
    hat = (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)
    sums = MomentSums()
    for k in range(6):
        at = slice(10 * k, 10 * k + 10)
        sums.add(x[:, at], hat[:, at], half=k % 2)
    found = sums.moments()
    first = np.arange(60) // 10 % 2 == 0
    halves, wanted = found.folds(), oracle.moments_of(x, hat)
    assert halves is not None
    for one, slow in ((found, wanted), (halves[0], oracle.moments_of(x[:, first], hat[:, first])),
                      (halves[1], oracle.moments_of(x[:, ~first], hat[:, ~first]))):  # fmt: skip
        assert one.count == slow.count
        for name in ("gram", "mean", "cross", "mean_error"):
            # sums of float32 products
            np.testing.assert_allclose(getattr(one, name), getattr(slow, name), rtol=1e-4, atol=1e-4)
    only = MomentSums()
    only.add(x, hat)
    assert only.moments().folds() is None


def test_a_group_and_some_inputs_are_taken_with_their_halves() -> None:
    rng = np.random.default_rng(0)
    x = rows(rng, "offset", 3, 60, 7)
    hat = (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)
    moments, some = oracle.moments_of(x, hat, halves=True), np.asarray([5, 0, 2])
    found = moments.group(1).take(some)
    wanted = oracle.moments_of(x[1:2][..., some], hat[1:2][..., some], halves=True)
    assert found.half is not None
    assert wanted.half is not None
    for one, slow in ((found, wanted), (found.half, wanted.half)):
        assert one.count == slow.count
        for name in ("gram", "mean", "cross", "residue", "mean_error"):
            a, b = getattr(one, name), getattr(slow, name)
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_allclose(a, b, rtol=1e-12)


# Sums -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.integers(1, 400))
def test_every_position_is_in_one_half_whatever_the_batches(total: int, batch: int) -> None:
    whole = halves(0, total, total)
    starts = range(0, total, batch)
    parts = [halves(start, min(batch, total - start), total) for start in starts]
    assert np.array_equal(np.concatenate(parts), whole)
    assert set(whole) <= {0, 1}
    # neighbours are together: there are no more stretches than that
    assert np.count_nonzero(np.diff(whole)) < STRETCHES
    if total >= 32:
        assert np.count_nonzero(np.diff(whole)) == STRETCHES - 1
        # stretches of equal length but for one
        assert abs(int((whole == 0).sum()) - int((whole == 1).sum())) <= STRETCHES


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.integers(1, 40))
def test_chunks_are_consecutive_positions_of_one_half_and_small(dealt: list[int], most: int) -> None:
    given_halves, inputs, groups = np.array(dealt), 3, 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", 4 * inputs * groups * most)
        found = list(chunks(given_halves, inputs, groups))
    assert np.array_equal(np.concatenate([part for part, _ in found]), np.arange(len(dealt)))
    for part, half in found:
        assert 1 <= len(part) <= most
        assert (given_halves[part] == half).all()


def test_the_sums_of_both_halves_are_those_of_all_rows(kind: Kind) -> None:
    rows, rows_hat = normal(2, 50, 5, seed=1), normal(2, 50, 5, seed=2)
    given, given_hat = kind(rows), kind(rows_hat)
    sums = MomentSums()
    sums.add(given[:, :20], given_hat[:, :20], 0)
    sums.add(given[:, 20:35], given_hat[:, 20:35], 1)
    sums.add(given[:, 35:], given_hat[:, 35:], 0)
    whole = sums.moments().on_host()
    first = np.r_[:20, 35:50]
    assert sums.count == whole.count == 50
    assert whole.half is not None
    assert whole.half.count == 35
    for found, chosen in ((whole, np.arange(50)), (whole.half, first)):
        hat = rows_hat[:, chosen].astype(np.float64)
        error = rows[:, chosen] - hat
        expected = {
            "gram": np.einsum("gpi,gpj->gij", hat, hat), "cross": np.einsum("gpi,gpj->gij", hat, error),
            "mean": hat.sum(1), "mean_error": error.sum(1),
        }  # fmt: skip
        for name, total in expected.items():
            # float32 products of 20 rows: 7 digits less one
            np.testing.assert_allclose(getattr(found, name), total / len(chosen), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        whole.residue, np.einsum("gpi,gpj->gij", rows - rows_hat, rows - rows_hat) / 50, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("half", [0, 1])
def test_where_one_half_is_empty_there_are_no_halves(kind: Kind, half: int) -> None:
    sums = MomentSums()
    sums.add(kind(normal(1, 9, 4)), None, half)
    found = sums.moments()
    assert found.count == 9
    assert found.half is None
    assert found.cross is found.residue is found.mean_error is None


def test_pooled_moments_are_those_of_all_rows() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 90, 5), np.float32)
    x_hat = x[:1] + 0.1 * rng.standard_normal((1, 90, 5), np.float32)
    rows = [(x[:1], x_hat), (x[1:], None)]
    parts, everything = [], MomentSums()
    for float_rows, hat in rows:
        own = MomentSums()
        for half, positions in ((0, slice(0, 40)), (1, slice(40, 90))):
            some = float_rows[:, positions], None if hat is None else hat[:, positions]
            own.add(*some, half)
            everything.add(some[0], some[0] if hat is None else some[1], half)
        parts.append(own.moments())
    found, expected = pooled(parts), everything.moments()
    assert found.count == expected.count == 180
    for one, other in ((found, expected), (found.half, expected.half)):
        assert one is not None
        assert other is not None
        for name in ("gram", "mean", "cross", "residue", "mean_error"):
            if name != "residue" or one is found:
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6)
