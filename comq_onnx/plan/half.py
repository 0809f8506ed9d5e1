"""Find the values of a model that are too large for float16."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from comq_onnx.context import Context
from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Prepared
from comq_onnx.model.probe import probe
from comq_onnx.samples.dataset import Dataset

# float16 ends at 65,504; other samples than those looked at may have values four times as large
LARGEST = 2.0**14
LOOKED_AT = 8
PROBED = "the model with the largest numbers of its values as outputs"


def too_large_for_half(prepared: Prepared, data: Dataset, context: Context) -> frozenset[str]:
    """Return the names of the float32 values whose numbers do not fit float16, as a few samples show.

    Values in subgraphs are not looked at.

    Raises ModelError, RuntimeFailure where the model with these outputs does not run.
    """
    model = prepared.model.clone()
    made = [v for node in model.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT]
    everything = graphs.add_initializer(model.graph, "largest.all", np.array([-1]))
    zero = graphs.add_initializer(model.graph, "largest.zero", np.zeros(1, np.float32))
    names = {f"largest.{i}": str(value.name) for i, value in enumerate(made)}
    for name, value in zip(names, made, strict=True):
        sizes = ir.node("Abs", [value])
        flat = ir.node("Reshape", [sizes.outputs[0], everything])
        # an empty value has no largest number
        some = ir.node("Concat", [flat.outputs[0], zero], {"axis": 0})
        largest = ir.node("ReduceMax", [some.outputs[0]], {"keepdims": 0})
        largest.outputs[0].name = name
        model.graph.extend([sizes, flat, some, largest])
    found: set[str] = set()
    for numbers in probe(model, list(names), data.calibration.few(LOOKED_AT).batches(1), context.device, PROBED):
        # no number compares with NaN
        found |= {names[name] for name, x in numbers.items() if not np.max(x) <= LARGEST}
    return frozenset(found)
