"""Build a model with a layer of every kind, and other models of a few nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Feeds = dict[str, np.ndarray]


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    """Make a node that is called like its output."""
    return helper.make_node(op, inputs.split(), [output], name=output, **attributes)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, Any],
    inputs: dict[str, Sequence[int | str]],
    outputs: Sequence[str],
    opset: int = 21,
) -> onnx.ModelProto:
    """Build a model of nodes.

    weights: arrays, or the shapes of random ones
    inputs: the shapes; `ids` are int64, all others float
    """
    rng = np.random.default_rng(0)

    def array(given: Any) -> np.ndarray:
        if isinstance(given, tuple):
            return (rng.standard_normal(given) / np.sqrt(np.prod(given[1:]))).astype(np.float32)
        return np.asarray(given, np.float32 if isinstance(given, float) else None)

    types = {n: TensorProto.INT64 if n == "ids" else TensorProto.FLOAT for n in inputs}
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(n, types[n], shape) for n, shape in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(array(w), n) for n, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def noise(*shape: int) -> np.ndarray:
    """Draw normal noise of a shape."""
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


# samples differ in brightness and colour, or the pool in the middle would give all of them the same features
TINTED = noise(24, 8, 6, 6) + 2 * np.random.default_rng(3).standard_normal((24, 8, 1, 1)).astype(np.float32)
ZOO_FEEDS = {"x": TINTED, "ids": np.random.default_rng(2).integers(0, 20, (24, 5))}


def zoo() -> onnx.ModelProto:
    """Build a model with a layer of every kind."""
    same = {"pads": [1, 1, 1, 1]}
    return model_of(
        [
            node("Conv", "x w_conv b16", "conv", **same),
            node("Relu", "conv", "relu"),
            node("Conv", "relu w_depthwise b16", "depthwise", group=16, **same),
            node("Conv", "depthwise w_grouped", "grouped", group=4, **same),
            node("ConvTranspose", "grouped w_up b8", "up", group=2, strides=[2, 2]),
            node("ConvTranspose", "up w_up1", "up1"),
            node("GlobalAveragePool", "up1", "pool"),
            node("Flatten", "pool", "flat"),
            node("Gemm", "flat w_gemm b24", "gemm", transB=1, alpha=0.5, beta=2.0),
            node("MatMul", "gemm w_matmul", "matmul"),
            node("Add", "matmul b32", "y1"),
            node("Transpose", "y1", "turned", perm=[1, 0]),
            node("Gemm", "turned w_left", "y3", transA=1),
            node("Gather", "table ids", "gather"),
            node("Tanh", "gather", "embedding"),
            node("MatMul", "embedding w_rank3", "rank3"),
            node("Tanh", "rank3", "tanh"),
            node("MatMul", "w_onleft tanh", "onleft"),
            node("Unsqueeze", "onleft one", "wide"),
            node("MatMul", "wide w_stack", "y2"),
        ],
        {
            "w_conv": (16, 8, 3, 3), "b16": (16,), "w_depthwise": (16, 1, 3, 3), "w_grouped": (16, 4, 3, 3),
            "w_up": (16, 4, 2, 2), "b8": (8,), "w_up1": (8, 8, 3, 3), "w_gemm": (24, 8), "b24": (24,),
            "w_matmul": (24, 32), "b32": (32,), "w_left": (32, 12), "table": (20, 16), "w_rank3": (16, 24),
            "w_onleft": (32, 5), "one": [1], "w_stack": (2, 24, 8),
        },
        {"x": ["n", 8, 6, 6], "ids": ["n", 5]},
        ["y1", "y2", "y3"],
    )  # fmt: skip
