"""Build small recurrent models, and samples for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models import Arrays, normal, weight

STEPS, GATES = 6, {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(
    op: str, inputs: int = 16, hidden: int = 12, lengths: bool = False, initial: bool = False, **attributes: Any
) -> onnx.ModelProto:
    """Build x [batch, STEPS, inputs] -> cell, one of GATES -> y [STEPS, directions, batch, hidden].

    lengths, initial: the model has an input for the lengths of the sequences [batch], for the initial state
    """
    directions, out = 1 + (attributes.get("direction") == "bidirectional"), GATES[op] * hidden
    constants = {
        "w": weight(directions, out, inputs, fan=inputs),
        "r": weight(directions, out, hidden, fan=hidden),
        "b": normal(directions, 2 * out, scale=0.2),
    }
    nodes = [helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0, 2], name="steps_first")]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", STEPS, inputs])]
    names = ["xt", "w", "r", "b", "", ""]
    if lengths:
        names[4] = "lengths"
        given.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]))
    if initial:
        names[5] = "ht"
        given.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", directions, hidden]))
        nodes.append(helper.make_node("Transpose", ["h"], ["ht"], perm=[1, 0, 2], name="directions_first"))
    nodes.append(helper.make_node(op, names, ["y"], name="cell", hidden_size=hidden, **attributes))
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [STEPS, directions, "batch", hidden])
    graph = helper.make_graph(
        nodes, "recurrent", given, [made], [numpy_helper.from_array(array, name) for name, array in constants.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def sequences(model: onnx.ModelProto, count: int = 48, seed: int = 3) -> Arrays:
    """Draw inputs for a model of `recurrent`: sequences whose inputs depend on one another and are far from 0."""
    rng = np.random.default_rng(seed)
    samples: Arrays = {}
    for value in model.graph.input:
        shape = (count, *(d.dim_value for d in value.type.tensor_type.shape.dim[1:]))
        if value.name == "lengths":
            samples["lengths"] = rng.integers(2, STEPS + 1, count).astype(np.int32)
            continue
        mixed = (
            rng.standard_normal(shape)
            @ np.linalg.qr(normal(shape[-1], shape[-1]))[0]
            * np.geomspace(1, 0.05, shape[-1])
        )
        samples[value.name] = (mixed @ np.linalg.qr(normal(shape[-1], shape[-1], seed=5))[0] + 0.3).astype(np.float32)
    return samples
