"""Finish a quantized model: half precision where it is asked for, and what the file tells of itself."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

import onnx_ir as ir

from comq_onnx.write.emit import Emitted
from comq_onnx.write.half import to_half


def finish(emitted: Emitted, provenance: Mapping[str, str], described: Set[str]) -> Emitted:
    """Return a quantized model as it goes into the file.

    provenance: metadata for the file
    described: the names of the values whose type and shape the source tells; those of other values are not written.
        With them ONNX Runtime fuses operators that it leaves alone in the source, and makes some of them slower.
    """
    plan = emitted.solved.plan
    model = emitted.model if plan.too_large is None else to_half(emitted.model, plan.too_large)
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in graph:
            for value in node.outputs:
                if not value.is_graph_output() and value.name not in described:
                    value.type = value.shape = None
    for value, shape in zip(model.graph.outputs, plan.written.declared, strict=True):
        # who reads the file finds the dimensions that it had, not those that were inferred
        value.shape = value.shape if shape is None else shape
    used = {t.dtype for v in model.graph.initializers.values() if (t := v.const_value) is not None}
    lowest_ir = 13 if ir.DataType.INT2 in used else 10 if ir.DataType.INT4 in used else 8
    model.ir_version = min(max(model.ir_version, lowest_ir), plan.target.max_ir)
    model.metadata_props.update(provenance)
    return replace(emitted, model=model)
