"""Make the weights of layers inputs of the float model, to try quantized ones without a new session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer, nodes_by_name
from comq_onnx.solve.layer import Solution
from comq_onnx.write.biases import add_bias, float_bias, set_bias
from comq_onnx.write.weights import Numbers


def expose(model: ir.Model, layers: Sequence[Layer], solutions: Mapping[str, Solution]) -> None:
    """Make the weights of layers, and the biases that their solutions shift, inputs of `model`, in place.

    They are the float ones unless something else is fed: see `exposed`.

    solutions: the solution of each layer, by the name of the layer
    """
    nodes = nodes_by_name(model)
    for layer in layers:
        solution = solutions[layer.name]
        if solution.shift is not None and layer.kind.is_recurrent:
            _expose_shift(model, nodes[layer.node], layer)
        elif solution.shift is not None:
            bias = float_bias(model, layer, replace(solution, shift=None))
            plain = np.zeros(solution.shift.size, np.float32) if bias is None else bias
            if layer.bias_node is not None:
                set_bias(model, nodes, layer, plain, None, None)
            else:
                add_bias(model, nodes[layer.node], layer, plain)
            model.graph.inputs.append(model.graph.initializers[f"{layer.name}.bias"])
        weight = model.graph.initializers[layer.weight]
        if weight not in model.graph.inputs:
            model.graph.inputs.append(weight)


def _expose_shift(model: ir.Model, node: ir.Node, layer: Layer) -> None:
    """Add an input to the bias that a recurrent node has for both its weights: the shift of one of them, zeros."""
    place = layer.kind.bias_index
    assert place is not None
    zeros = layer.kind.with_own_bias(None, np.zeros(layer.kind.outputs, np.float32))
    shift = graphs.add_initializer(model.graph, f"{layer.name}.bias", zeros)
    model.graph.inputs.append(shift)
    total = graphs.insert(node, "Add", [node.inputs[place], shift], {}, f"{layer.name}.shifted")
    node.replace_input_with(place, total)


def exposed(model: ir.Model, layer: Layer, solution: Solution) -> dict[str, Numbers]:
    """Return the feeds that make a layer quantized in a model that `expose` rewrote.

    model: the float model before `expose`
    """
    feeds: dict[str, Numbers] = {
        layer.weight: np.ascontiguousarray(layer.kind.from_matrix(solution.weight.dequantize()))
    }
    bias = None if solution.shift is None else float_bias(model, layer, solution)
    if solution.shift is not None and layer.kind.is_recurrent:
        bias = layer.kind.with_own_bias(None, solution.shift)
    return feeds if bias is None else feeds | {f"{layer.name}.bias": bias}
