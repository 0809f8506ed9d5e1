"""Test the allocation of bits against trying every way."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comq_onnx.bits import knapsack
from comq_onnx.bits.knapsack import Allocation, Choice, allocate

Layers = list[list[Choice]]
choice = st.builds(Choice, st.integers(2, 8), st.integers(1, 60), st.floats(1e-9, 1.0))
problem = st.lists(st.lists(choice, min_size=1, max_size=4), min_size=1, max_size=4)


def best_of_all(layers: Layers, budget: int) -> float:
    """Return the least damage within a budget, by trying every way."""
    ways = [w for w in itertools.product(*layers) if sum(c.size for c in w) <= budget]
    return min(sum(c.damage for c in way) for way in ways)


def least(layers: Layers) -> int:
    """Return the bytes of the smallest choices."""
    return sum(min(c.size for c in choices) for choices in layers)


def cost(layers: Layers, found: Allocation) -> tuple[int, float]:
    """Sum the bytes and the damage of the choices that were picked."""
    chosen = [choices[k] for choices, k in zip(layers, found.picked, strict=True)]
    return sum(c.size for c in chosen), sum(c.damage for c in chosen)


@given(problem, st.integers(0, 200))
def test_nothing_that_fits_does_less_damage(layers: Layers, more: int) -> None:
    budget = least(layers) + more
    found = allocate(layers, budget)
    assert cost(layers, found) == (found.size, pytest.approx(found.damage))
    assert found.size <= budget
    assert found.damage == pytest.approx(best_of_all(layers, budget))
    assert found.bound <= found.damage


@given(problem, st.integers(0, 200), st.integers(1, 12))
def test_with_steps_of_several_bytes_the_best_lies_between_bound_and_damage(
    layers: Layers, more: int, steps: int
) -> None:
    budget = least(layers) + more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "STEPS", steps)
        found = allocate(layers, budget)
    assert cost(layers, found) == (found.size, pytest.approx(found.damage))
    assert found.size <= budget
    best = best_of_all(layers, budget)
    assert found.bound <= best * (1 + 1e-9)
    assert best <= found.damage * (1 + 1e-9)


def test_what_cannot_fit_is_refused_with_the_least() -> None:
    layers = [[Choice(4, 10, 1.0), Choice(8, 20, 0.1)], [Choice(4, 7, 1.0)]]
    with pytest.raises(ValueError, match=r"^16 bytes are asked for; the least is 17$"):
        allocate(layers, 16)
    assert allocate(layers, 17).picked == (0, 0)
    assert allocate(layers, 27).picked == (1, 0)


def test_damages_of_all_magnitudes_are_told_apart() -> None:
    # one of these matters a billion times more than the other
    layers = [[Choice(4, 10, 1e-3), Choice(8, 20, 1e-5)], [Choice(4, 10, 1e-12), Choice(8, 20, 1e-14)]]
    assert allocate(layers, 30).picked == (1, 0)
    assert allocate(layers, 40).picked == (1, 1)


def test_a_larger_choice_that_is_no_better_is_never_taken() -> None:
    layers = [[Choice(3, 10, 0.2), Choice(4, 10, 0.1), Choice(5, 15, 0.1), Choice(8, 20, 0.01)]]
    assert allocate(layers, 19).picked == (1,)
    assert allocate(layers, 20).picked == (3,)


def test_many_layers_are_solved_to_a_small_gap() -> None:
    layers = [
        [Choice(b, 1000 * b * (37 + 11 * k % 83), 4.0**-b * (1 + k * k % 29)) for b in range(2, 9)] for k in range(300)
    ]
    most = sum(max(c.size for c in choices) for choices in layers)
    found = allocate(layers, (least(layers) + most) // 2)
    assert found.bound < found.damage <= 1.02 * found.bound


def test_what_is_left_over_is_spent() -> None:
    layers = [[Choice(4, 10, 1.0), Choice(8, 20, 0.1)], [Choice(4, 10, 1.0), Choice(8, 19, 0.2)]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "STEPS", 1)
        # one step of nineteen bytes holds one of the two, and what is left over holds no other
        assert allocate(layers, 39).picked == (1, 1)
        assert allocate(layers, 38).picked == (1, 0)
