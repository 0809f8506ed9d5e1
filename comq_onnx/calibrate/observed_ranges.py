"""Gather the ranges of quantized activations along the walk, and make grids of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from comq_onnx import arrays
from comq_onnx.calibrate.finite import LARGEST
from comq_onnx.errors import ModelError
from comq_onnx.plan import ranges
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.observed_range import ObservedRange
from comq_onnx.plan.plan import Plan
from comq_onnx.samples.padding import Mask, take_kept

# what was seen so far: ranges, grids, and the positions that grids will be chosen by
State = tuple[dict[str, ObservedRange], dict[str, ActivationGrid], dict[str, ranges.Positions]]


class Seen:
    """Hold what some samples show of values: their ranges, and positions by which grids will be chosen.

    ranges, positions: by the name of the value; positions only where layers read it
    """

    def __init__(self, names: Iterable[str], axes: Mapping[str, int], first: int) -> None:
        """Begin with nothing seen.

        axes: the axis of the channels of each value that layers read
        first: how many samples come before these
        """
        self.ranges = {name: ObservedRange(first) for name in names}
        self.positions = {name: ranges.Positions(axes[name], first) for name in self.ranges if name in axes}

    def observe(self, name: str, array: Any, mask: Mask | None, refuse: Callable[[str, Any], ModelError]) -> None:
        """Look at one batch of a value. Values that are not among `ranges` are skipped.

        mask: the positions that count; None for all
        refuse: makes the error for the value `name` and its array

        Raises ModelError where the array holds numbers that are too large or not finite.
        """
        if name not in self.ranges:
            return
        array = arrays.on_host(array)
        seen = take_kept(array, mask, least_rank=3)
        self.ranges[name].observe(seen)
        if name in self.positions:
            self.positions[name].observe(seen)
        low, high = self.ranges[name].low, self.ranges[name].high
        if low != np.inf and not max(-low, high) <= LARGEST:
            raise refuse(name, array)

    def add(self, other: Seen) -> Seen:
        """Add what other samples show of the same values."""
        for name, one in other.ranges.items():
            self.ranges[name].add(one)
        for name, some in other.positions.items():
            self.positions[name].add(some)
        return self


class ActivationRanges:
    """Gather the range of each quantized activation, and turn it into a grid.

    ranges: the range of each activation that was seen so far, by the name of the value
    grids: the grid of each activation of which all batches were seen, by the name of the value
    axes: the axis of the channels of each value that layers read
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        """Begin with nothing seen; seed: the seed of the random sums that outputs of layers are mixed to."""
        self._plan, self._seed = plan, seed
        self.ranges = {name: ObservedRange() for name in plan.activations.values}
        self.grids: dict[str, ActivationGrid] = {}
        self._readers = ranges.readers(plan.walked, plan.activations)
        self.axes = {name: readers.axis for name, readers in self._readers.items()}
        self._positions: dict[str, ranges.Positions] = {}

    def state(self) -> State:
        """Return all that was seen so far."""
        return self.ranges, self.grids, self._positions

    def restore(self, state: State) -> None:
        """Go on from what was seen before."""
        self.ranges, self.grids, self._positions = state

    def take(self, seen: Seen) -> None:
        """Add what some samples show."""
        for name, one in seen.ranges.items():
            self.ranges[name].add(one)
        for name, some in seen.positions.items():
            known = self._positions.get(name)
            self._positions[name] = some if known is None else known.add(some)

    def settle(self, names: Iterable[str]) -> None:
        """Turn the ranges of these values into grids, once they were seen in all batches.

        The grid that a value shares may belong to a later value: until that one is reached, it gets a grid of its own.
        """
        planned = self._plan.activations
        known = [name for name in names if name in self.ranges]
        for name in sorted(known, key=lambda name: planned.values[name].like is not None):
            root = planned.root(name)
            self.grids[name] = self.grids[root] if root != name and root in self.grids else self._grid(name)

    def _grid(self, name: str) -> ActivationGrid:
        """Choose the grid of a value by its effect on the readers; by the range alone where no layer reads it.

        A grid that the source has is taken as it is.
        """
        plan, seen = self._plan, self.ranges[name]
        given = plan.activations.values[name].given
        if given is not None:
            return given
        dtype, bounds = plan.activations.dtype, plan.activations.values[name].bounds
        positions = self._positions.pop(name, None)
        if positions is None or not positions.enough or not np.isfinite(seen.low):
            return seen.grid(dtype, bounds)
        rng, reading = np.random.default_rng(self._seed), self._readers[name]
        readers = [
            ranges.Reader(ranges.mix(x.kind, plan.walked.weight(x), rng), plan.has_bias(x)) for x in reading.layers
        ]
        objective = ranges.Objective.of(*positions.rows(), readers, reading.passed_on)
        return ranges.choose(objective, seen.low, seen.high, dtype, bounds)
