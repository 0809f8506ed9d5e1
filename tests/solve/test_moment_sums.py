"""Running sums of rows, numpy arrays and tensors alike."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from comq_onnx.solve import moment_sums as moments
from comq_onnx.solve.moment_sums import MomentSums
from models import normal


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.integers(1, 400))
def test_every_position_is_in_one_half_whatever_the_batches(total: int, batch: int) -> None:
    whole = moments.halves(0, total, total)
    starts = range(0, total, batch)
    parts = [moments.halves(start, min(batch, total - start), total) for start in starts]
    assert np.array_equal(np.concatenate(parts), whole)
    assert set(whole) <= {0, 1}
    # neighbours are together: there are no more stretches than that
    assert np.count_nonzero(np.diff(whole)) < moments.STRETCHES
    if total >= 32:
        assert np.count_nonzero(np.diff(whole)) == moments.STRETCHES - 1
        # stretches of equal length but for one
        assert abs(int((whole == 0).sum()) - int((whole == 1).sum())) <= moments.STRETCHES


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.integers(1, 40))
def test_parts_are_consecutive_positions_of_one_half_and_small(halves: list[int], most: int) -> None:
    given_halves, inputs, groups = np.array(halves), 3, 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "CHUNK_BYTES", 4 * inputs * groups * most)
        parts = list(moments.parts(given_halves, inputs, groups))
    assert np.array_equal(np.concatenate([part for part, _ in parts]), np.arange(len(halves)))
    for part, half in parts:
        assert 1 <= len(part) <= most
        assert (given_halves[part] == half).all()


def test_the_halves_add_up_to_the_whole(kind: Kind) -> None:
    rows, rows_hat = normal(2, 50, 5, seed=1), normal(2, 50, 5, seed=2)
    given, given_hat = kind(rows), kind(rows_hat)
    sums = MomentSums()
    sums.add(given[:, :20], given_hat[:, :20], 0)
    sums.add(given[:, 20:35], given_hat[:, 20:35], 1)
    sums.add(given[:, 35:], given_hat[:, 35:], 0)
    statistics = sums.statistics().on_host()
    first = np.r_[:20, 35:50]
    assert sums.count == statistics.count == 50
    assert statistics.half is not None
    assert statistics.half.count == 35
    for found, chosen in ((statistics, np.arange(50)), (statistics.half, first)):
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
        statistics.residue, np.einsum("gpi,gpj->gij", rows - rows_hat, rows - rows_hat) / 50, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("half", [0, 1])
def test_where_one_half_is_empty_there_are_no_halves(kind: Kind, half: int) -> None:
    sums = MomentSums()
    sums.add(kind(normal(1, 9, 4)), None, half)
    statistics = sums.statistics()
    assert statistics.count == 9
    assert statistics.half is None
    assert statistics.cross is statistics.residue is statistics.mean_error is None
