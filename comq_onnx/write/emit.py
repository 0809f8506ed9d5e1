"""Solutions and activation grids written into a graph as QuantizeLinear and DequantizeLinear, as the target wants them.

The same functions rewrite a segment during calibration and the whole model at the end, so what is measured is what
ships.

Weights, from fastest to most general:

- *integer*: codes -> (Cast to INT8) -> DequantizeLinear per channel, the layer's input quantized, an int32 bias of
  scale s_x * s_w (float where the target wants that, or it would be dequantized at every call). ONNX Runtime folds the
  Cast at load and runs its int8 kernels; the file holds 4 (2) bits a weight.
- *blocked* (weight-only MatMul): codes in blocks along the inputs -> DequantizeLinear: MatMulNBits.
- *folded* (any other weight-only layer): codes -> Cast to FLOAT -> Mul by the scale. Runtimes fold both at load: the
  file is small, the speed that of the float layer. A DequantizeLinear there would run at every call in ONNX Runtime;
  TensorRT takes codes nowhere else, so there one of scale 1 takes the place of the Cast.
- *looked up* (embeddings): Gather of codes -> Cast -> Mul by the Gather of scales; only the rows looked up become
  float.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import nodes_by_name
from comq_onnx.write.activations import emit_activation, integer_readers
from comq_onnx.write.weights import Quantization, emit_layer


def emit(model: ir.Model, quantization: Quantization) -> None:
    """Rewrite `model` in place: every solved layer it holds, every planned value that has a grid."""
    nodes = nodes_by_name(model)
    for layer in quantization.layers:
        if layer.name in nodes and layer.name in quantization.solutions:
            emit_layer(model, nodes, layer, quantization)
    readers = integer_readers(quantization, nodes)
    values = {str(v.name): v for v in graphs.walk_values(model)}
    for name in quantization.plan.values:
        if name in values and name in quantization.grids:
            emit_activation(model, values[name], quantization, readers.get(name, []))
    passes.RemoveUnusedNodesPass()(model)
    # the names made up here may be taken
    passes.NameFixPass()(model)
