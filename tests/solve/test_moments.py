"""The moments a solver knows, their halves, and the threads that share its work."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import given
from layers import QUICK, Case, cases, rows
from threadpoolctl import threadpool_info

from comq_onnx.solve.moment_sums import MomentSums
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.parallel import each, single_threaded_blas


@QUICK
@given(cases())
def test_centred_moments_are_those_of_the_samples_less_their_mean(case: Case) -> None:
    centred = case.statistics.centred()
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
    for moments in (case.statistics, case.statistics.centred()):
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
    halves = oracle.statistics(x, hat, halves=True).folds()
    assert halves is not None
    for found, start in zip(halves, (0, 1), strict=True):
        wanted = oracle.statistics(x[:, start::2], hat[:, start::2])
        assert found.count == wanted.count == 31 - start
        for name in ("gram", "mean", "cross", "mean_error"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [0, 60])
def test_a_half_that_is_all_or_nothing_is_none(count: int) -> None:
    moments = oracle.statistics(rows(np.random.default_rng(0), "white", 1, 60, 5), halves=True)
    assert moments.half is not None
    assert replace(moments, half=replace(moments.half, count=count)).folds() is None


def test_rows_added_as_halves_come_out_as_halves() -> None:
    rng = np.random.default_rng(0)
    x = rows(rng, "offset", 2, 60, 7)
    hat = (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)
    moments = MomentSums()
    for k in range(6):
        at = slice(10 * k, 10 * k + 10)
        moments.add(x[:, at], hat[:, at], half=k % 2)
    found = moments.statistics()
    first = np.arange(60) // 10 % 2 == 0
    halves, wanted = found.folds(), oracle.statistics(x, hat)
    assert halves is not None
    for one, slow in ((found, wanted), (halves[0], oracle.statistics(x[:, first], hat[:, first])),
                      (halves[1], oracle.statistics(x[:, ~first], hat[:, ~first]))):  # fmt: skip
        assert one.count == slow.count
        for name in ("gram", "mean", "cross", "mean_error"):
            # sums of float32 products
            np.testing.assert_allclose(getattr(one, name), getattr(slow, name), rtol=1e-4, atol=1e-4)
    only = MomentSums()
    only.add(x, hat)
    assert only.statistics().folds() is None


def test_a_group_and_some_inputs_are_taken_with_their_halves() -> None:
    rng = np.random.default_rng(0)
    x = rows(rng, "offset", 3, 60, 7)
    hat = (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)
    moments, some = oracle.statistics(x, hat, halves=True), np.asarray([5, 0, 2])
    found = moments.group(1).take(some)
    wanted = oracle.statistics(x[1:2][..., some], hat[1:2][..., some], halves=True)
    assert found.half is not None
    assert wanted.half is not None
    for one, slow in ((found, wanted), (found.half, wanted.half)):
        assert one.count == slow.count
        for name in ("gram", "mean", "cross", "residue", "mean_error"):
            a, b = getattr(one, name), getattr(slow, name)
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_allclose(a, b, rtol=1e-12)


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_tasks_come_back_in_order(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comq_onnx.solve.parallel.numba.get_num_threads", lambda: threads)
    names = set()

    def slower_first(k: int) -> int:
        names.add(threading.current_thread().name)
        time.sleep(0.01 * (5 - k))
        return k * k

    assert each(slower_first, range(6)) == [0, 1, 4, 9, 16, 25]
    assert each(slower_first, []) == []
    assert len(names) <= max(threads, 1)
    assert (threads == 1) == (names == {threading.current_thread().name})


@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_task_raises_is_raised(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comq_onnx.solve.parallel.numba.get_num_threads", lambda: threads)

    def fail(k: int) -> None:
        if k == 2:
            raise np.linalg.LinAlgError("not this one")

    with pytest.raises(np.linalg.LinAlgError, match="not this one"):
        each(fail, range(5))


def test_a_task_has_one_thread_of_blas() -> None:
    def most(_: int) -> int:
        return max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)

    before = most(0)
    assert each(most, range(3)) == [1, 1, 1]
    with single_threaded_blas():
        assert most(0) == 1
    assert most(0) == before
