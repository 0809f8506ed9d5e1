"""Build the small models and samples that fuzz.py mutates, and make its seeded choices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import AttributeProto, numpy_helper

SAMPLES = 12
NAMES = ("", "x", "y", "w1", "a b", "ü", "line\nbreak", "\x1b[31mred", "../up", "[/red]", "%s{0}", "n" * 5000, "\u202e")
NUMBERS = (0, 1, -1, 2, 3, 127, 255, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63))
FLOATS = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 0.0, 1e20)

TEXTS = {
    "mlp": """mlp (float[batch, 32] x) => (float[batch, 10] y) {
        h = Gemm <transB = 1> (x, w1, b1)
        r = Relu (h)
        m = MatMul (r, w2)
        y = Add (m, b2)
    }""",
    "cnn": """cnn (float[batch, 3, 8, 8] x) => (float[batch, 10] y) {
        a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k1)
        n = BatchNormalization (a, scale, shift, mean, var)
        r = Relu (n)
        d = Conv <kernel_shape = [3, 3], strides = [2, 2], group = 16> (r, k2)
        g = GlobalAveragePool (d)
        f = Flatten (g)
        y = Gemm <transB = 1> (f, w3, b2)
    }""",
    "tokens": """tokens (int64[batch, 6] x) => (float[batch, 10] y) <int64[1] one = {1}> {
        e = Gather (table, x)
        p = MatMul (e, w4)
        t = Tanh (p)
        s = ReduceMean <keepdims = 0, axes = [1]> (t)
        y = MatMul (s, w5)
    }""",
    "flow": """flow (float[batch, 32] x) => (float[batch, 10] y) <int64 three = {3}, bool yes = {1}> {
        s = ReduceSum <keepdims = 0> (x)
        none = Sub (s, s)
        c = Equal (none, none)
        h = If (c) <
            then_branch = yes_branch () => (float[batch, 48] then_y) { then_y = MatMul (x, w6) },
            else_branch = no_branch () => (float[batch, 48] else_y) { else_y = MatMul (x, w7) }
        >
        l = Loop (three, yes, h) <
            body = once (int64 i, bool go_in, float[batch, 48] v) => (bool go, float[batch, 48] v_out) {
                go = Identity (go_in)
                u = MatMul (v, w8)
                v_out = Tanh (u)
            }
        >
        y = MatMul (l, w2)
    }""",
}


def base(name: str) -> onnx.ModelProto:
    """Build one of the small models."""
    rng = np.random.default_rng(0)
    shapes = {
        "w1": (48, 32), "b1": (48,), "w2": (48, 10), "b2": (10,), "k1": (16, 3, 3, 3), "k2": (16, 1, 3, 3),
        "scale": (16,), "shift": (16,), "mean": (16,), "var": (16,), "w3": (10, 16), "table": (40, 24), "w4": (24, 16),
        "w5": (16, 10), "w6": (32, 48), "w7": (32, 48), "w8": (48, 48),
    }  # fmt: skip
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{TEXTS[name]}')
    read = {i for node in nodes_of(model.graph) for i in node.input}
    for weight, shape in shapes.items():
        if weight in read:
            array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)
            array = np.abs(array) + 0.5 if weight == "var" else array
            model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), weight))
    return model


def samples_of(name: str, count: int = SAMPLES, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw samples for one of the small models."""
    rng = np.random.default_rng(seed)
    if name == "tokens":
        return {"x": rng.integers(0, 40, (count, 6))}
    shape = (count, 3, 8, 8) if name == "cnn" else (count, 32)
    return {"x": rng.standard_normal(shape).astype(np.float32)}


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


class Dice:
    """Make seeded choices."""

    def __init__(self, *seed: int) -> None:
        self.rng = np.random.default_rng(list(seed))

    def pick(self, things: Any) -> Any:
        """Choose one of the things."""
        things = list(things)
        return things[int(self.rng.integers(len(things)))]

    def below(self, n: int) -> int:
        """Choose a number from 0 to n - 1."""
        return int(self.rng.integers(max(n, 1)))

    def times(self) -> int:
        """Choose how many things to change: most often one."""
        return int(self.pick((1, 1, 1, 2, 4)))
