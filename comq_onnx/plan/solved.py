"""Define the solved plan: the value that is written to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from comq_onnx.model.layers import Layer
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.observed_range import ObservedRange
from comq_onnx.plan.plan import Plan
from comq_onnx.solve.grid import QuantizedWeight
from comq_onnx.solve.layer import Solution


@dataclass(frozen=True)
class Solved:
    """Hold a plan with the solutions of its layers; only of some layers during calibration.

    solutions: the solution of each layer, by the name of the layer
    activation_grids: the grid of each quantized activation, by the name of the value
    ranges: the range of each quantized activation in the samples, by the name of the value
    layer_seconds: the seconds that each layer took to solve, by the name of the layer
    observed: what an observer of the solver keeps of each layer, by the name of the layer
    """

    plan: Plan
    solutions: Mapping[str, Solution]
    activation_grids: Mapping[str, ActivationGrid]
    ranges: Mapping[str, ObservedRange] = field(default_factory=dict)
    layer_seconds: Mapping[str, float] = field(default_factory=dict)
    observed: Mapping[str, Any] = field(default_factory=dict)

    def table_of(self, product: Layer) -> Layer | None:
        """Return the embedding whose codes, transposed, are those of a product; None where its codes are its own."""
        name = self.plan.tied.get(product.name, "")
        found = [self.solutions[x].weight for x in (product.name, name) if x in self.solutions]
        if len(found) < 2 or not (found[0] is found[1] or _same(*found)):
            return None
        return next(x for x in self.plan.layers if x.name == name)


def _same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Tell whether two weights are the same."""
    pairs = ((a.codes, b.codes), (a.scale, b.scale), (a.zero_point, b.zero_point))
    return a.grid == b.grid and all(np.array_equal(x, y) for x, y in pairs)
