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


@dataclass(frozen=True)
class LayerLine:
    """Describe the time of a layer.

    fixed: microseconds
    product, weight, number: nanoseconds for each multiplication, each weight, each number that it reads or writes
    """

    fixed: float
    product: float
    weight: float
    number: float

    def of(self, products: int, weights: int, numbers: int) -> float:
        """Return microseconds for so many multiplications, weights, and numbers read or written."""
        return self.fixed + (self.product * products + self.weight * weights + self.number * numbers) * 1e-3


@dataclass(frozen=True)
class Costs:
    """Hold the times of operators on a runtime.

    layers: by kind (pointwise, window and depthwise convolutions, matrix products) and form: float, integer and, of
        matrix products, weight-only where these have a good kernel; without the quantization of the input
    operators: those with an integer kernel, in float and in integers
    quantize, dequantize: of a tensor
    layout: of a change of layout before or behind a convolution
    blocked: whether float convolutions have a layout of their own, with channels in blocks
    """

    layers: Mapping[str, Mapping[str, LayerLine]]
    operators: Mapping[str, tuple[Line, Line]]
    quantize: Line
    dequantize: Line
    layout: Line
    blocked: bool = True


# ONNX Runtime 1.32, one thread of a server CPU with AVX-512 VNNI, by tools/bench/costs.py; convolutions, Concat, pools,
# Sigmoid, LeakyRelu and layout: from profiles of seven real models, whose few channels and float neighbours chains of
# equal convolutions do not have
ORT_CPU_COSTS = Costs(
    layers={
        "matrix": {
            "float": LayerLine(0.92, 0.0106, 0.0349, 0.0024),
            "weight-only": LayerLine(1.36, 0.0086, 0.0062, 0.8079),
            "integer": LayerLine(1.62, 0.0009, 0.0187, 0.1149),
        },
        "pointwise": {"float": LayerLine(5.0, 0.0184, 0.0, 0.0), "integer": LayerLine(5.9, 0.0047, 0.0, 0.038)},
        "window": {"float": LayerLine(3.0, 0.0174, 0.0, 0.150), "integer": LayerLine(15.2, 0.0030, 0.0, 0.461)},
        "depthwise": {"float": LayerLine(0.6, 0.0158, 0.0, 0.064), "integer": LayerLine(11.4, 0.0306, 0.0, 0.041)},
    },
    operators={
        "Add": (Line(0.76, 0.127), Line(0.95, 0.192)),
        "Mul": (Line(0.75, 0.128), Line(0.96, 0.276)),
        "Concat": (Line(1.2, 0.095), Line(0.8, 0.143)),
        "GlobalAveragePool": (Line(0.8, 0.146), Line(1.2, 0.039)),
        "AveragePool": (Line(1.0, 0.031), Line(1.2, 0.039)),
        "MaxPool": (Line(1.0, 0.068), Line(1.0, 0.030)),
        "Sigmoid": (Line(0.8, 0.275), Line(0.9, 0.05)),
        "LeakyRelu": (Line(0.8, 0.169), Line(0.9, 0.05)),
    },
    quantize=Line(0.22, 0.149),
    dequantize=Line(0.22, 0.149),
    layout=Line(0.6, 0.100),
)

# onnxruntime-web 1.30 in Node 20, one thread, by tools/bench/costs.py --web build/web, on a machine that did other
# work. Integer pools between convolutions are not measured: AveragePool and MaxPool count as in float. The lines of
# GlobalAveragePool and of the layout are too low, of an earlier fit that the tool no longer makes: measure them again
ORT_WEB_COSTS = Costs(
    layers={
        "matrix": {"float": LayerLine(1.71, 0.0815, 0.0, 0.0), "integer": LayerLine(2.10, 0.0355, 0.0789, 0.2863)},
        "pointwise": {"float": LayerLine(2.44, 0.1042, 0.0, 0.0), "integer": LayerLine(1.61, 0.0666, 0.0, 1.3812)},
        "window": {"float": LayerLine(5.65, 0.1429, 0.0, 0.0), "integer": LayerLine(2.44, 0.0503, 0.0, 3.56)},
        "depthwise": {"float": LayerLine(3.32, 0.4435, 22.2352, 0.0), "integer": LayerLine(0.0, 1.8848, 0.0, 0.0)},
    },
    operators={
        "Add": (Line(1.87, 0.2344), Line(2.29, 0.9291)),
        "Mul": (Line(1.81, 0.2406), Line(2.17, 0.9667)),
        "Concat": (Line(1.97, 0.2039), Line(2.08, 0.1921)),
        "GlobalAveragePool": (Line(1.05, 0.0221), Line(0.96, 0.0038)),
        "AveragePool": (Line(2.78, 3.3881), Line(2.78, 3.3881)),
        "MaxPool": (Line(3.85, 1.6257), Line(3.85, 1.6257)),
        "Sigmoid": (Line(1.61, 2.511), Line(1.78, 0.8285)),
        "LeakyRelu": (Line(1.53, 0.7541), Line(1.81, 0.5248)),
    },
    quantize=Line(0.48, 0.3137),
    dequantize=Line(0.48, 0.3137),
    layout=Line(0.17, 0.0),
    blocked=False,
)
