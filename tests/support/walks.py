"""Quantize small models as tests of the walk do, and read what their layers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

import comq_onnx
from models import Arrays, attention, build, cnn, infer, mlp, samples_for, weight

MODELS = {"mlp": mlp, "cnn": cnn, "attention": attention}


def quantize(model: onnx.ModelProto, out: Path, samples: Arrays | None = None, **options: Any) -> comq_onnx.Report:
    """Quantize a model to 4 bits on the CPU, on the samples that fit it where none are given."""
    given = samples_for(model) if samples is None else samples
    return comq_onnx.quantize(model, out, given, **{"bits": 4, "uniform": True, "device": "cpu", **options})


def tapped(path: Path, layers: dict[str, int], feeds: Arrays) -> Arrays:
    """Return what layers read in the model at `path`.

    layers: the index of the input, by the name of the node
    """
    model = onnx.load(path)
    nodes = {node.name: node for node in model.graph.node}
    wanted = {layer: nodes[layer].input[index] for layer, index in layers.items()}
    for name in dict.fromkeys(wanted.values()):
        model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    made = infer(model, feeds, exact=True)
    return {layer: made[name] for layer, name in wanted.items()}


def never(condition: str) -> onnx.ModelProto:
    """Build a model whose layer `aside` reads `left`, which the nodes of `condition` make of x [batch, 12, 32]."""
    return build(
        f"""g (float[batch, 12, 32] x) => (float[batch, 16] y) {{
            {condition}
            [aside] m = MatMul (left, w1)
            a = ReduceSum <keepdims = 0> (m, axis)
            [main] h = MatMul (x, w2)
            b = ReduceSum <keepdims = 0> (h, axis)
            y = Add (a, b)
        }}""",
        {
            "w1": weight(32, 16),
            "w2": weight(32, 16, seed=2),
            "axis": np.array([1]),
            "zero": np.array([0]),
            "minus": np.float32(-1),
        },
    )
