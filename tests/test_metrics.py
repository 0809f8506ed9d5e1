"""Test the smooth estimate of agreement against counting."""

from __future__ import annotations

import numpy as np
import pytest

from comq_onnx.metrics import (
    add_matches,
    deviation_for,
    expected_agreement,
    lead_changes,
    leads,
    match_rows,
    match_values,
)

RNG = np.random.default_rng(0)


def test_leads_and_their_changes() -> None:
    scores = np.array([[1.0, 5.0, 3.0], [7.0, 7.0, 0.0]])
    np.testing.assert_array_equal(leads(scores), [2.0, 0.0])
    np.testing.assert_array_equal(leads(scores.reshape(2, 1, 3)), [2.0, 0.0])
    # class 1 over class 2 loses 3: what class 0 does is nothing to it
    np.testing.assert_array_equal(lead_changes(scores[:1], np.array([[9.0, 4.0, 5.0]])), [-3.0])
    np.testing.assert_array_equal(lead_changes(scores, scores), [0.0, 0.0])


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
def test_the_expected_agreement_is_what_counting_finds(noise: float) -> None:
    scores = RNG.normal(0, 1, (20_000, 10))
    changed = scores + RNG.normal(0, noise, scores.shape)
    counted = float((scores.argmax(1) == changed.argmax(1)).mean())
    deviation = float(np.sqrt(np.mean(lead_changes(scores, changed) ** 2)))
    assert deviation == pytest.approx(np.sqrt(2) * noise, rel=0.03)
    # the third class may overtake too
    assert counted <= expected_agreement(leads(scores), deviation) <= counted + 0.35 * (1 - counted)


def test_the_deviation_for_an_agreement_gives_it() -> None:
    margins = RNG.exponential(2.0, 500)
    for agreement in (0.6, 0.9, 0.99):
        deviation = deviation_for(margins, agreement)
        assert expected_agreement(margins, deviation) == pytest.approx(agreement, abs=1e-6)
        assert expected_agreement(margins, 1.01 * deviation) < agreement


def test_ties_cannot_be_kept() -> None:
    # a half of all ties are lost to any noise
    assert deviation_for(np.zeros(10), 0.9) == 0.0
    assert expected_agreement(np.array([0.0, 1e9]), 1.0) == pytest.approx(0.75)


# Rows and whole numbers -----------------------------------------------------------------------------------------------


def test_rows_match_whatever_their_order_and_number() -> None:
    before = np.array([[0.0, 10], [5, 20], [10, 30]])
    after = np.array([[10.2, 30], [0, 10.1], [7, 20]])
    found = match_rows(before, after, "boxes")
    # the first and the last are within a twentieth of the columns' ranges, the second is 2 of 10 away
    assert (found.name, found.before, found.after, found.matched) == ("boxes", 3, 3, 2)
    assert found.share == pytest.approx(2 / 3)
    assert match_rows(before, after[:1]).matched == 1
    assert match_rows(before, np.zeros((0, 2))).share == 0
    assert match_rows(before[:0], before[:0]).share == 1


def test_a_row_matches_only_once() -> None:
    before = np.zeros((3, 2), np.int64)
    assert match_rows(before, np.zeros((1, 2), np.int64)).matched == 1
    assert match_rows(before, before).matched == 3


def test_whole_numbers_match_where_they_are_equal() -> None:
    a = np.arange(6).reshape(2, 3)
    assert match_values(a, a).share == 1
    assert match_values(a, a + (a == 2)).matched == 5
    # of other lengths by rows
    assert match_values(a, a[:1]).matched == 1


def test_matches_add_up() -> None:
    a = np.arange(6).reshape(2, 3)
    total = add_matches(match_values(a, a, "which"), match_values(a, a + 1, "which"))
    assert (total.name, total.before, total.after, total.matched) == ("which", 12, 12, 6)
