"""Define the solved plan: the value that is written to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.observed_range import ObservedRange
from comq_onnx.plan.plan import Plan
from comq_onnx.solve.layer import Solution


@dataclass(frozen=True)
class Solved:
    """Hold a plan with the solutions of its layers; only of some layers during calibration.

    solutions: the solution of each layer, by the name of the layer
    activation_grids: the grid of each quantized activation, by the name of the value
    ranges: the range of each quantized activation in the samples, by the name of the value
    layer_seconds: the seconds that each layer took to solve, by the name of the layer
    """

    plan: Plan
    solutions: Mapping[str, Solution]
    activation_grids: Mapping[str, ActivationGrid]
    ranges: Mapping[str, ObservedRange] = field(default_factory=dict)
    layer_seconds: Mapping[str, float] = field(default_factory=dict)
