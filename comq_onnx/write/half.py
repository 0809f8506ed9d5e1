"""Make half precision of what a quantized model computes in float32."""

from __future__ import annotations

from collections.abc import Set

import onnx_ir as ir
import onnx_ir.passes.common as passes

from comq_onnx.model.half_precision import is_boundary
from comq_onnx.runtime.half import with_half


def to_half(model: ir.Model, too_large: Set[str]) -> ir.Model:
    """Return a copy of a model with float16 in place of float32; inputs and outputs keep their types.

    What has no float16 form stays as it is, and so do the nodes that read or make values of these names.

    too_large: the names of values with larger numbers than float16 has
    """
    typed = model.clone()
    passes.ShapeInferencePass()(typed)
    # nothing may refer to another file in the form that the converter reads
    ir.external_data.load_to_model(typed)
    kept = [
        str(node.name)
        for node in typed.graph.all_nodes()
        if any(value is not None and value.name in too_large for value in (*node.inputs, *node.outputs))
    ]
    half = ir.from_proto(with_half(ir.to_proto(typed), kept))
    # the converter puts its Casts behind all other nodes
    passes.TopologicalSortPass()(half)
    for graph in (half.graph, *half.graph.subgraphs()):
        for node in list(graph):
            if node.op_type == "Cast":
                _drop_idle_cast(half, node)
    passes.RemoveUnusedNodesPass()(half)
    return half


def _drop_idle_cast(model: ir.Model, node: ir.Node) -> None:
    """Let what reads a Cast read the value before it, where that has the type already.

    So no number goes through float16 from one float32 node to another.
    """
    made, value = node.outputs[0], node.inputs[0]
    assert value is not None
    before = value.producer()
    if made.name == f"{value.name}_cast_to_fp32" and before is not None and _is_of_float32_node(before):
        single = before.inputs[0]
        assert single is not None
        made.replace_all_uses_with(single)
    elif not is_boundary(node):
        return
    elif not made.is_graph_output():
        made.replace_all_uses_with(value)
    elif value.producer() is not None and not value.is_graph_output():
        name, type_ = made.name, made.type
        made.name = f"{name}_cast"
        value.name, value.type, value.shape = name, type_, made.shape
        model.graph.outputs[model.graph.outputs.index(made)] = value


def _is_of_float32_node(node: ir.Node) -> bool:
    """Tell whether a node is the Cast that the converter puts behind a node that stays float32."""
    value = node.inputs[0]
    return node.op_type == "Cast" and value is not None and value.name == f"{node.outputs[0].name}_cast_to_fp16"
