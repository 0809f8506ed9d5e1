"""Find values that a normalization makes alike in size, row by row or image by image.

What a bias adds to all rows alike may be lost beside loud ones, and is all that is left of quiet ones behind a
normalization.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from comq_onnx.model import graph as graphs

_NORMALIZATIONS = frozenset(
    {
        "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "GroupNormalization",
        "InstanceNormalization", "LpNormalization", "GroupNorm",
    }
)  # fmt: skip
# operators behind which quiet rows stay quiet
_PASSED = frozenset(
    {
        "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout", "Slice", "Split",
        "Concat", "Relu", "LeakyRelu", "PRelu", "Abs",
    }
)  # fmt: skip
# so do these, with a constant
_SCALED = frozenset({"Add", "Sub", "Mul", "Div"})
_MEANS = frozenset({"ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare"})


def is_normalized(value: ir.Value) -> bool:
    """Tell whether a value reaches a normalization before anything is added to it that is not constant."""
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if any(node.op_type in _NORMALIZATIONS and index == 0 for node, index in one.uses()) or _is_taken_apart(one):
            return True
        waiting += _passed(one)
    return False


def _passed(value: ir.Value) -> Iterator[ir.Value]:
    """Yield what readers make of a value and nothing else that is computed."""
    for node, index in value.uses():
        others = [v for i, v in enumerate(node.inputs) if v is not None and i != index]
        if node.op_type in _PASSED or (node.op_type in _SCALED and all(map(graphs.is_constant, others))):
            yield from node.outputs


def _is_taken_apart(value: ir.Value) -> bool:
    """Tell whether a normalization of a value is written out: its mean, or that of its square, is divided out of it."""
    readers = [node for node, _ in value.uses()]
    squares = [node for node in readers if node.op_type == "Pow" or [*node.inputs] == [value, value]]
    means = any(node.op_type in _MEANS for node in readers)
    means_of_squares = any(user.op_type in _MEANS for node in squares for user, _ in node.outputs[0].uses())
    rest = {node.op_type for node in readers if node not in squares}
    return (means and not rest.isdisjoint({"Sub", "Div"})) or (means_of_squares and not rest.isdisjoint({"Mul", "Div"}))
