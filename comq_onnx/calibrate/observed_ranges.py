"""The ranges of quantized activations, gathered along the walk, and the grids that come of them."""

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

# makes the error for a value whose numbers are out of range, from its name, an array of it and its batch
Refuse = Callable[[str, Any, int], ModelError]


class ActivationRanges:
    """Gather what the samples show of each quantized activation, and turn it into grids.

    ranges: by value, what was seen so far
    grids: by value, once all of it was seen
    """

    def __init__(self, plan: Plan, masks: Sequence[Mask | None], seed: int, refuse: Refuse) -> None:
        """Begin with nothing seen; masks: the positions of each batch that count."""
        self._plan, self._masks, self._seed, self._refuse = plan, masks, seed, refuse
        self.ranges = {name: ObservedRange() for name in plan.activations.values}
        self.grids: dict[str, ActivationGrid] = {}
        self._readers = ranges.readers(plan.walked, plan.activations)
        self._positions = {name: ranges.Positions(readers.axis) for name, readers in self._readers.items()}

    def observe(self, name: str, array: Any, batch: int) -> None:
        """Widen the range of a value by its array of one batch; values that are not quantized are passed over.

        Raises ModelError where it holds numbers that are too large or not finite.
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
        """Turn the ranges of values that were seen in all batches into grids.

        A grid that is shared may belong to a value behind: where that is not yet reached, each has its own.
        """
        planned = self._plan.activations
        known = [name for name in names if name in self.ranges]
        for name in sorted(known, key=lambda name: planned.values[name].like is not None):
            root = planned.root(name)
            self.grids[name] = self.grids[root] if root != name and root in self.grids else self._grid(name)

    def _grid(self, name: str) -> ActivationGrid:
        """Choose the grid by what the readers make of the rounding; by the range alone where nothing tells."""
        plan, seen = self._plan, self.ranges[name]
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
