"""Test which activations are written quantized: skips of residuals, and the parts of one product."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

import numpy as np
from written import Quantize, quantize
from zoo import model_of, node, noise


def test_the_skip_of_a_residual_is_quantized_and_outputs_are_not(quantize: Quantize) -> None:
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", "x w0", "c0", **pads), node("Relu", "c0", "r0"), node("Conv", "r0 w1", "c1", **pads),
        node("Add", "r0 c1", "s1"), node("Relu", "s1", "r1"), node("Conv", "r1 w2", "c2", **pads),
        node("Conv", "r1 w3", "c3", **pads), node("Add", "c2 c3", "s2"), node("Conv", "s2 w4", "y", **pads),
    ]  # fmt: skip
    source = model_of(nodes, {f"w{i}": (8, 8, 3, 3) for i in range(5)}, {"x": ["n", 8, 6, 6]}, ["y"])
    written = quantize(source, {"x": noise(24, 8, 6, 6)}, bits=8, target="tensorrt")
    quantized = {n.input[0] for n in written.proto.graph.node if n.op_type == "QuantizeLinear"}
    # c1 and c2 are added to as they come out of the product; s2 is the input of a layer
    assert quantized == {"x", "r0", "r1", "c3", "s2"}
    assert [i.endswith(".dequantized") for i in written.node("s1").input] == [True, False]
    assert [i.endswith(".dequantized") for i in written.node("s2").input] == [False, True]


def test_queries_keys_and_values_of_one_product_leave_it_quantized_for_tensorrt(quantize: Quantize) -> None:
    nodes = [
        node("MatMul", "x w0", "m"), node("Add", "m b", "qkv"), node("Reshape", "qkv shape", "h"),
        *(node("Gather", f"h {i}", f"part{i}", axis=2) for i in ("zero", "one")),
        node("Mul", "partzero partone", "product"), node("MatMul", "product w1", "y"),
    ]  # fmt: skip
    constants = {
        "w0": (16, 48), "b": (48,), "w1": (24, 8), "shape": [0, 0, 2, 24], "zero": np.int64(0), "one": np.int64(1)
    }  # fmt: skip
    source = model_of(nodes, constants, {"x": ["n", 4, 16]}, ["y"])
    for target, expected in (("tensorrt", {"x", "qkv", "product"}), ("ort-cpu", {"x", "product"})):
        written = quantize(source, {"x": noise(24, 4, 16)}, bits=8, target=target)
        assert {n.input[0] for n in written.proto.graph.node if n.op_type == "QuantizeLinear"} == expected
