"""Add the rows of recurrent layers to the model that is walked.

Only there: in the model that is planned they would be more readers of the states, and change what is quantized.
"""

from __future__ import annotations

from dataclasses import replace

from comq_onnx.model.layers import Layer, nodes_by_name
from comq_onnx.model.recurrent import LENGTHS, given
from comq_onnx.model.states import add_rows
from comq_onnx.plan.plan import Plan


def with_rows(plan: Plan) -> Plan:
    """Return the plan with recurrent layers of the main graph reading values of their own in the walked model."""
    walked = plan.walked
    if not any(layer.kind.is_recurrent and layer.name not in plan.probes for layer in walked.layers):
        return plan
    model = walked.model.clone()
    nodes = nodes_by_name(model)
    shared: dict[object, str] = {}

    def reading_rows(layer: Layer) -> Layer:
        if not layer.kind.is_recurrent or layer.name in plan.probes:
            return layer
        node = nodes[layer.node]
        # the same input over the same steps, as the two directions of a network may have it, gives the same rows
        key = layer.name if layer.kind.reads_own_output else (layer.input, given(node, LENGTHS))
        if key not in shared:
            shared[key] = str(add_rows(model, node, layer).name)
        return replace(layer, input=shared[key])

    layers = [reading_rows(layer) for layer in walked.layers]
    return replace(plan, walked=replace(walked, model=model, layers=layers))
