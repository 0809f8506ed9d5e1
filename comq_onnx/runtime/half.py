"""Turn float32 arithmetic into float16, with the converter that comes with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

# operators that take float32 alone, beside those that the converter knows
_FLOAT_ALONE = (
    "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM", "QAttention",
    "LSTM", "GRU", "RNN",
)  # fmt: skip


def with_half(model: onnx.ModelProto, kept: Sequence[str]) -> onnx.ModelProto:
    """Return a model with float16 in place of float32, between Casts of its inputs and outputs.

    What has no float16 form stays as it is.

    model: its values are typed, and its numbers lie in it; it is changed
    kept: the names of nodes that stay as they are
    """
    # ONNX Runtime may not be installed where this is imported
    from onnxruntime.transformers import float16

    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *_FLOAT_ALONE]
    converted: onnx.ModelProto = float16.convert_float_to_float16(
        model, keep_io_types=True, disable_shape_infer=True, node_block_list=list(kept), op_block_list=blocked
    )
    return converted
