"""Find the layers of a source whose weights are quantized already: those are left as they are.

A weight counts as quantized where it is made from constants alone, and these are integers (or floats of 8 bits and
fewer), or go through a QuantizeLinear. Quantized activations do not count: a float model may have a DequantizeLinear
behind an image of uint8, or pairs of QuantizeLinear and DequantizeLinear anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from comq_onnx.errors import ModelError
from comq_onnx.model.graph import HALF
from comq_onnx.model.op_kind import MIN_WEIGHTS
from comq_onnx.model.operators import OP_KINDS
from comq_onnx.model.unfuse.maker import MICROSOFT

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, *HALF})
# the types that codes are stored in, also of floats of 8 bits and fewer
_CODES = ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2", "FLOAT8", "FLOAT4")
# the nodes by which constants become a weight: they unpack, rearrange, retype or scale them
_UNPACKING = frozenset(
    {
        "Cast", "CastLike", "DequantizeLinear", "QuantizeLinear", "Mul", "Sub", "Add", "Div", "Gather", "Reshape",
        "Slice", "Concat", "Split", "BitwiseOr", "BitwiseAnd", "BitShift", "Transpose", "Identity", "Squeeze",
        "Unsqueeze", "Flatten", "Pad",
    }
)  # fmt: skip
# the products of integers in ONNX; in other domains every operator that reads a matrix of integer constants is one
_PRODUCTS = frozenset({"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"})
_STANDARD = ("", "ai.onnx")
# the inputs of ONNX Runtime's fused operators that are weights, as `unfuse` takes them out
_FUSED_WEIGHTS = {
    "Attention": (1,), "FusedMatMul": (0, 1), "TransposeMatMul": (0, 1), "FusedGemm": (1,), "FusedConv": (1,),
    "EmbedLayerNormalization": (2, 3),
}  # fmt: skip


def quantized_weight(node: ir.Node, part: str | None = None) -> str | None:
    """Return the type of the weight of a node whose weight is quantized already; None for any other node.

    part: of a node with more than one weight, only this one, as OP_KINDS names it
    """
    if node.domain in _STANDARD and node.op_type in OP_KINDS:
        sources = [weight_source(value) for value in _weights(node, part)]
        found = [s for s in sources if s is not None and s.size >= MIN_WEIGHTS and s.is_quantized]
        return found[0].type_name if found else None
    if node.domain in _STANDARD and node.op_type not in _PRODUCTS:
        return None
    for value in node.inputs:
        source = weight_source(value)
        if source is not None and source.rank > 1 and source.size >= MIN_WEIGHTS and source.is_quantized:
            return source.type_name
    return None


@dataclass(frozen=True)
class WeightSource:
    """Describe the largest constant that a weight is made from.

    tensor: the constant
    nodes: those that make the weight from constants
    """

    tensor: ir.TensorProtocol
    nodes: tuple[ir.Node, ...]

    @property
    def size(self) -> int:
        """Return how many numbers the constant has."""
        return int(self.tensor.size)

    @property
    def rank(self) -> int:
        """Return how many axes the constant has."""
        return len(self.tensor.shape)

    @property
    def is_float(self) -> bool:
        """Tell whether the weight is float."""
        return self.tensor.dtype in _FLOATS and not self.is_quantized

    @property
    def is_quantized(self) -> bool:
        """Tell whether the weight is quantized: made from codes, or rounded by a QuantizeLinear."""
        made = {node.op_type for node in self.nodes}
        return bool(made & {"QuantizeLinear", "DequantizeLinear"}) or self.tensor.dtype.name.startswith(_CODES)

    @property
    def type_name(self) -> str:
        """Return the type of the stored numbers, and what rounds them where they are floats."""
        name = str(self.tensor.dtype.name)
        return f"{name} behind a QuantizeLinear" if self.tensor.dtype in _FLOATS else name


def weight_source(value: ir.Value | None) -> WeightSource | None:
    """Return the largest constant that a value is made from; None where it depends on anything else."""
    largest: ir.TensorProtocol | None = None
    pending, nodes, seen = [value], [], set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        tensor = _constant(current)
        if tensor is not None:
            largest = tensor if largest is None or tensor.size > largest.size else largest
            continue
        producer = current.producer()
        if producer is None or producer.domain not in _STANDARD or producer.op_type not in _UNPACKING:
            return None
        nodes.append(producer)
        pending += producer.inputs
    return None if largest is None else WeightSource(largest, tuple(nodes))


def nodes_of_quantized_weights(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes that make quantized weights from constants: folded, they would leave floats of the full size."""
    for node in model.graph.all_nodes():
        if quantized_weight(node) is not None:
            for value in node.inputs:
                source = weight_source(value)
                if source is not None and source.is_quantized:
                    yield from source.nodes


def check_source(model: ir.Model, path: str) -> None:
    """Refuse a model whose layers all have quantized weights. Raises ModelError."""
    counts: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        if _has_float_weight(node):
            return
        if quantized_weight(node) is not None:
            counts[node.op_type] += 1
    # what functions hold is seen once they are inlined
    if counts and not model.functions:
        found = ", ".join(f"{n} {op}" for op, n in sorted(counts.items()))
        raise ModelError(
            f"{path}: already quantized (the weights of {found} are, and no other layer has as many as {MIN_WEIGHTS}); "
            "give the float model it was made from"
        )


def _weights(node: ir.Node, part: str | None = None) -> list[ir.Value | None]:
    """Return the inputs of a node that may be its weight, or that of `part`."""
    if node.domain not in _STANDARD:
        return [node.inputs[i] for i in _FUSED_WEIGHTS[node.op_type] if i < len(node.inputs)]
    if node.op_type == "MatMul":
        return list(node.inputs[:2])
    kinds = OP_KINDS[node.op_type]
    places = [kind.weight_index for name, kind in kinds.items() if part is None or name == part]
    return [value for index in places for value in node.inputs[index : index + 1]]


def _has_float_weight(node: ir.Node) -> bool:
    """Tell whether a node is a layer with a float weight of its own that may be worth quantizing."""
    is_fused = node.domain == MICROSOFT and node.op_type in _FUSED_WEIGHTS
    if not is_fused and (node.domain not in _STANDARD or node.op_type not in OP_KINDS):
        return False
    found = (weight_source(value) for value in _weights(node))
    return any(s is not None and s.size >= MIN_WEIGHTS and s.is_float and not is_column(node, s.tensor) for s in found)


def is_column(node: ir.Node, table: ir.TensorProtocol) -> bool:
    """Tell whether a node looks up a table of one number a row: with a scale for each row it would grow."""
    return node.op_type == "Gather" and len(table.shape) == 2 and table.shape[1] == 1


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a Constant; None for any other value."""
    try:
        return ir.convenience.get_const_tensor(value)
    except ValueError:  # a Constant that is not as it should be: ONNX Runtime says so when it loads the model
        return None
