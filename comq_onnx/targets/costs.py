"""Estimate the time of operators on a runtime by straight lines through measured times.

`python tools/bench/costs.py` measures the nodes of real models and prints the lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """Describe the time of an operator, which grows with its largest tensor.

    fixed: microseconds.
    number: nanoseconds for each number of the tensor.
    """

    fixed: float
    number: float

    def of(self, numbers: int) -> float:
        """Return microseconds for a tensor of so many numbers."""
        return self.fixed + self.number * numbers * 1e-3


# fixed microseconds; nanoseconds for each multiplication; nanoseconds for each number read or written
LayerLine = tuple[float, float, float]


@dataclass(frozen=True)
class Costs:
    """Hold the times of operators on a runtime.

    layers: by kind (pointwise, window and depthwise convolutions, matrix products), weight-only (of convolutions: in
    float) and in integers.
    operators: those with an integer kernel, in float and in integers.
    quantize, dequantize: of a tensor.
    layout: of a change of layout before or behind a convolution.
    """

    layers: Mapping[str, tuple[LayerLine, LayerLine]]
    operators: Mapping[str, tuple[Line, Line]]
    quantize: Line
    dequantize: Line
    layout: Line


# ONNX Runtime 1.31, one thread of a server CPU with AVX-512 VNNI: medians of the nodes of seven real models
ORT_CPU_COSTS = Costs(
    layers={
        "pointwise": ((5.0, 0.0184, 0.0), (5.9, 0.0047, 0.038)),
        "window": ((3.0, 0.0174, 0.150), (15.2, 0.0030, 0.461)),
        "depthwise": ((0.6, 0.0158, 0.064), (11.4, 0.0306, 0.041)),
        "matrix": ((6.9, 0.0071, 1.289), (6.2, 0.0040, 0.342)),
    },
    operators={
        "Add": (Line(3.5, 0.098), Line(3.9, 0.144)),
        "Mul": (Line(3.5, 0.111), Line(3.9, 0.144)),
        "Concat": (Line(4.7, 0.095), Line(2.6, 0.143)),
        "GlobalAveragePool": (Line(2.5, 0.146), Line(6.6, 0.039)),
        "AveragePool": (Line(7.5, 0.031), Line(6.6, 0.039)),
        "MaxPool": (Line(6.7, 0.068), Line(4.0, 0.030)),
        "Sigmoid": (Line(3.2, 0.275), Line(3.2, 0.05)),
        "LeakyRelu": (Line(3.2, 0.1), Line(3.2, 0.05)),
    },
    quantize=Line(3.6, 0.123),
    dequantize=Line(3.4, 0.106),
    layout=Line(2.5, 0.100),
)
