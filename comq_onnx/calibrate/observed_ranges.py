"""Gather the ranges of quantized activations along the walk, and make grids of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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

# makes the error for a value whose numbers are out of range, from its name, an array and the index of its batch
Refuse = Callable[[str, Any, int], ModelError]
# what was seen so far: ranges, grids, and the positions that grids will be chosen by
State = tuple[dict[str, ObservedRange], dict[str, ActivationGrid], dict[str, ranges.Positions]]


class ActivationRanges:
    """Gather the range of each quantized activation, and turn it into a grid.

    ranges: the range of each activation that was seen so far, by the name of the value
    grids: the grid of each activation of which all batches were seen, by the name of the value
    """

    def __init__(self, plan: Plan, masks: Sequence[Mask | None], seed: int, refuse: Refuse) -> None:
        """Begin with nothing seen.

        masks: the positions of each batch that count; None for all
        seed: the seed of the random sums that outputs of layers are mixed to
        refuse: makes the error for a value whose numbers are out of range
        """
        self._plan, self._masks, self._seed, self._refuse = plan, masks, seed, refuse
        self.ranges = {name: ObservedRange() for name in plan.activations.values}
        self.grids: dict[str, ActivationGrid] = {}
        self._readers = ranges.readers(plan.walked, plan.activations)
        self._positions = {name: ranges.Positions(readers.axis) for name, readers in self._readers.items()}

    def state(self) -> State:
        """Return all that was seen so far."""
        return self.ranges, self.grids, self._positions

    def restore(self, state: State) -> None:
        """Go on from what was seen before."""
        self.ranges, self.grids, self._positions = state

    def observe(self, name: str, array: Any, batch: int) -> None:
        """Widen the range of a value by one batch of it. Values that are not quantized are skipped.

        array: the value in that batch
        batch: the index of the batch

        Raises ModelError where the array holds numbers that are too large or not finite.
        """
        if name not in self.ranges:
            return
        array = arrays.on_host(array)
        seen = take_kept(array, self._masks[batch], least_rank=3)
        self.ranges[name].observe(seen)
        if name in self._positions:
            self._positions[name].observe(seen)
        low, high = self.ranges[name].low, self.ranges[name].high
        if low != np.inf and not max(-low, high) <= LARGEST:
            raise self._refuse(name, array, batch)

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
