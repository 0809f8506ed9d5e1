"""Choose the bits of each layer with the least damage under a budget of bytes: a multiple-choice knapsack.

Every layer (or set of layers that share a weight) has choices, each with its bytes in the file and its damage: the
noise that it brings to the model's output, relative to that output. Independent noises add up.

It is solved by dynamic programming over the bytes beyond the smallest choices, in at most STEPS steps: exactly where a
step is one byte. Otherwise bytes are rounded up to steps, and the bytes that are left are spent at the end. A price for
bytes (the Lagrangian dual) gives a lower bound of the damage of any allocation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

STEPS = 20_000


@dataclass(frozen=True)
class Choice:
    """Describe one choice of a layer.

    bits: the bits of its weight
    size: its bytes in the file
    damage: the noise that it brings to the output, over the energy of that output
    """

    bits: int
    size: int
    damage: float


@dataclass(frozen=True)
class Allocation:
    """Describe a choice for each layer.

    picked: the index of each layer's choice
    size: the bytes of all choices
    damage: the damage of all choices
    bound: no allocation within the budget has less damage
    """

    picked: tuple[int, ...]
    size: int
    damage: float
    bound: float


def allocate(layers: Sequence[Sequence[Choice]], budget: int) -> Allocation:
    """Find the choices with the least damage in total that take at most `budget` bytes.

    layers: the choices of each layer

    Raises ValueError where not even the smallest choices fit.
    """
    least = sum(min(choice.size for choice in choices) for choices in layers)
    if least > budget:
        raise ValueError(f"{budget} bytes are asked for; the least is {least}")
    most = sum(max(choice.size for choice in choices) for choices in layers)
    step = max(1.0, (min(budget, most) - least) / STEPS)
    steps = int((min(budget, most) - least) / step)
    picked = _spend(layers, _solve(layers, steps, step), budget)
    chosen = [choices[k] for choices, k in zip(layers, picked, strict=True)]
    total = float(sum(choice.damage for choice in chosen))
    return Allocation(tuple(picked), sum(choice.size for choice in chosen), total, min(_bound(layers, budget), total))


def _solve(layers: Sequence[Sequence[Choice]], steps: int, step: float) -> list[int]:
    """Find the choices with the least damage whose bytes beyond the smallest choices make at most `steps` steps.

    step: the bytes of a step; the bytes of each choice are rounded up to steps

    Returns the index of each layer's choice.
    """
    best = np.zeros(steps + 1)
    taken = np.zeros((len(layers), steps + 1), np.int16)
    beyond = []
    for at, choices in enumerate(layers):
        smallest = min(choice.size for choice in choices)
        beyond.append([int(np.ceil((choice.size - smallest) / step)) for choice in choices])
        now = np.full(steps + 1, np.inf)
        for k, (choice, cost) in enumerate(zip(choices, beyond[at], strict=True)):
            if cost <= steps:
                candidate = best[: steps + 1 - cost] + choice.damage
                better = candidate < now[cost:]
                now[cost:][better] = candidate[better]
                taken[at, cost:][better] = k
        best = now
    left = steps
    picked = []
    for at in reversed(range(len(layers))):
        picked.append(int(taken[at, left]))
        left -= beyond[at][picked[-1]]
    return picked[::-1]


def _bound(layers: Sequence[Sequence[Choice]], budget: int) -> float:
    """Return a lower bound of the damage: the Lagrangian dual at the best price of a byte."""
    most = max(len(choices) for choices in layers)
    damage, size = np.full((len(layers), most), np.inf), np.zeros((len(layers), most))
    for at, choices in enumerate(layers):
        damage[at, : len(choices)] = [choice.damage for choice in choices]
        size[at, : len(choices)] = [choice.size for choice in choices]

    def negative(logarithm: float) -> float:
        price = np.exp(logarithm)
        return float(price * budget - (damage + price * size).min(axis=1).sum())

    highest = np.log(damage[np.isfinite(damage)].sum() + 1e-300)
    found = minimize_scalar(negative, bounds=(highest - 60, highest), method="bounded", options={"xatol": 1e-3})
    return max(-float(found.fun), float(damage.min(axis=1).sum()))


def _spend(layers: Sequence[Sequence[Choice]], picked: Sequence[int], budget: int) -> list[int]:
    """Spend what is left of the budget, each time on the choice that removes most damage. Returns the new indices."""
    now = list(picked)
    left = budget - sum(choices[k].size for choices, k in zip(layers, now, strict=True))
    while True:
        gains = [
            (choices[now[at]].damage - choice.damage, -at, k)  # of equal gains the first layer's
            for at, choices in enumerate(layers)
            for k, choice in enumerate(choices)
            if choice.size - choices[now[at]].size <= left and choice.damage < choices[now[at]].damage
        ]
        if not gains:
            return now
        _, place, k = max(gains)
        at = -place
        left -= layers[at][k].size - layers[at][now[at]].size
        now[at] = k
