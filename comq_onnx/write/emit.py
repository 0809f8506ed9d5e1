"""Write solutions and activation grids into a graph as QuantizeLinear and DequantizeLinear, as the target wants them.

The same functions rewrite a segment during calibration and the whole model at the end, so what is measured is what is
written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import nodes_by_name
from comq_onnx.plan.solved import Solved
from comq_onnx.write.activations import emit_activation, integer_readers, keep_float, mark_source
from comq_onnx.write.nbits import write_nbits
from comq_onnx.write.walls import build_walls
from comq_onnx.write.weights import emit_layer, stored_bytes


@dataclass(frozen=True)
class Emitted:
    """Hold a whole quantized model.

    solved: what it was made from
    model: the quantized model
    """

    solved: Solved
    model: ir.Model

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Return the bytes that the weight of each layer takes in the model, by the name of the layer."""
        return {layer.name: stored_bytes(self.model, layer) for layer in self.solved.plan.layers}


def emit_model(solved: Solved) -> Emitted:
    """Make the quantized model of a solved plan."""
    model = solved.plan.written.model.clone()
    emit(model, solved)
    write_nbits(model, solved)
    return Emitted(solved, model)


def emit(model: ir.Model, solved: Solved) -> None:
    """Rewrite `model` in place: every solved layer and every planned value with a grid that it holds.

    model: a clone of the model that is written, or a part of it
    """
    nodes = nodes_by_name(model)
    mark_source(model)
    for layer in solved.plan.layers:
        if layer.node in nodes and layer.name in solved.solutions:
            emit_layer(model, nodes, layer, solved)
    # a Gemm may have become a MatMul
    readers = integer_readers(solved, nodes_by_name(model))
    values = {str(v.name): v for v in graphs.walk_values(model)}
    for name in solved.plan.activations.values:
        if name in values and name in solved.activation_grids:
            emit_activation(model, values[name], solved, readers.get(name, []))
    keep_float(model, solved)
    build_walls(model, solved)
    _store_biases_once(model, solved)
    passes.RemoveUnusedNodesPass()(model)
    # the new names may be taken already
    passes.NameFixPass()(model)


def _store_biases_once(model: ir.Model, solved: Solved) -> None:
    """Let layers of one weight in several branches of an If read the same bias, where it has the same numbers."""
    kept: dict[str, ir.Value] = {}
    for layer in solved.plan.layers:
        value = model.graph.initializers.get(f"{layer.name}.bias") if layer.in_branch else None
        if value is None or value.const_value is None:
            continue
        first = kept.setdefault(layer.weight, value)
        assert first.const_value is not None
        if first is not value and np.array_equal(first.const_value.numpy(), value.const_value.numpy()):
            value.replace_all_uses_with(first)
