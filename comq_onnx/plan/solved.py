"""A plan with what was found for it: the value that is written to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.observed_range import ObservedRange
from comq_onnx.plan.plan import Plan
from comq_onnx.solve.layer import Solution


@dataclass(frozen=True)
class Solved:
    """Hold the solutions of a plan's layers; of some of them while it is calibrated.

    solutions: by the name of the layer
    activation_grids, ranges: the grid of each quantized activation, and the range that the samples showed
    layer_seconds: how long each layer took to solve
    """

    plan: Plan
    solutions: Mapping[str, Solution]
    activation_grids: Mapping[str, ActivationGrid]
    ranges: Mapping[str, ObservedRange] = field(default_factory=dict)
    layer_seconds: Mapping[str, float] = field(default_factory=dict)
