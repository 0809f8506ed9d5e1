"""Replace the fused operators of a model, where that serves their weights or the target.

ONNX Runtime's optimizers join operators of the standard to faster ones of the domain com.microsoft. Where such an
operator holds a weight, or the bias of the product before it, it is taken apart again, into what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum

import onnx_ir as ir
import onnx_ir.passes.common as passes

from comq_onnx.model.unfuse import attention, norms, products
from comq_onnx.model.unfuse.maker import MICROSOFT, Derived, Maker, Stays

Rule = Callable[[Maker], list[ir.Value | None]]


class Unfusing(Enum):
    """Name how much of the fused operators is replaced.

    NOTHING: they stay as they are.
    FOR_WEIGHTS: those that hold a weight, or the bias of a product with one.
    TO_STANDARD: all that can be, for a runtime that has not all operators of the domain com.microsoft.
    """

    NOTHING = "nothing"
    FOR_WEIGHTS = "for weights"
    TO_STANDARD = "to standard operators"


_RULES: Mapping[tuple[str, str], Rule] = {
    (MICROSOFT, "FusedMatMul"): products.fused_matmul,
    (MICROSOFT, "TransposeMatMul"): products.fused_matmul,
    (MICROSOFT, "FusedGemm"): products.fused_gemm,
    (MICROSOFT, "FusedConv"): products.fused_conv,
    (MICROSOFT, "Attention"): attention.attention,
    (MICROSOFT, "MultiHeadAttention"): attention.multi_head_attention,
    (MICROSOFT, "BiasGelu"): norms.bias_gelu,
    (MICROSOFT, "Gelu"): norms.gelu,
    (MICROSOFT, "FastGelu"): norms.fast_gelu,
    (MICROSOFT, "QuickGelu"): norms.quick_gelu,
    (MICROSOFT, "SkipLayerNormalization"): norms.skip_layer_norm,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): norms.skip_layer_norm,
    (MICROSOFT, "EmbedLayerNormalization"): norms.embed_layer_norm,
    ("", "SimplifiedLayerNormalization"): norms.simplified_layer_norm,
}
# the opset that an operator is best taken apart at, also where operators of com.microsoft may stay
_OPSETS: Mapping[str, int] = dict.fromkeys(
    ("EmbedLayerNormalization", "SkipLayerNormalization"), norms.LAYER_NORM_OPSET
)
_STANDARD_OPSETS: Mapping[str, int] = {
    **_OPSETS,
    **dict.fromkeys(("BiasGelu", "Gelu", "FastGelu"), norms.GELU_OPSET),
}
# why operators with weights stay as they are
_ELSEWHERE = "ONNX Runtime has it for other devices than the CPU, and no way is known here to take it apart"
_REASONS: Mapping[tuple[str, str], str] = {
    **{
        (MICROSOFT, op): _ELSEWHERE
        for op in (
            "PackedAttention", "NhwcConv", "NhwcFusedConv", "FusedMatMulActivation", "GemmFastGelu", "DecoderAttention",
            "LongformerAttention", "QOrderedMatMul", "QOrderedAttention", "QOrderedLongformerAttention",
        )
    },
    ("com.microsoft.nchwc", "Conv"): "its weight is laid out for one processor; give the model as it was before "
                                     "ONNX Runtime optimized layouts",
}  # fmt: skip


# operators whose first output has the shape of their first input
_SAME_SHAPE = frozenset(
    {
        "Gelu", "BiasGelu", "FastGelu", "QuickGelu", "LayerNormalization", "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "Erf", "Relu", "Tanh", "Sigmoid",
    }
)  # fmt: skip


def has_fused(model: ir.Model) -> bool:
    """Tell whether a model has operators that this package may replace."""
    return any(True for _ in _fused(model))


def wanted_opset(model: ir.Model, unfusing: Unfusing) -> int:
    """Return the opset at which the fused operators of a model are best replaced; 1 where any will do."""
    opsets = {Unfusing.NOTHING: {}, Unfusing.FOR_WEIGHTS: _OPSETS}.get(unfusing, _STANDARD_OPSETS)
    return max((opsets.get(node.op_type, 1) for node in _fused(model)), default=1)


def unfuse(model: ir.Model, unfusing: Unfusing) -> dict[str, str]:
    """Replace fused operators in place; return the reason for each with a weight that stays, by the node's name."""
    reasons: dict[str, str] = {}
    derived: Derived = {}
    replaced = False
    for node in list(model.graph.all_nodes()) if unfusing is not Unfusing.NOTHING else []:
        key = (node.domain, node.op_type)
        if key in _REASONS:
            reasons[str(node.name)] = _REASONS[key]
        if key not in _RULES:
            continue
        make = Maker(model, node, unfusing is Unfusing.TO_STANDARD, derived)
        try:
            made = _RULES[key](make)
        except Stays as reason:
            reasons[str(node.name)] = str(reason)
            continue
        if made:
            _replace(make, made)
            replaced = True
    if replaced:
        ir.passes.Sequential(passes.RemoveUnusedNodesPass(), passes.RemoveUnusedOpsetsPass())(model)
        for node in model.graph.all_nodes():
            if node.domain in ("", MICROSOFT) and node.outputs:
                _infer_shape(node)
    return reasons


def others(model: ir.Model, reasons: Mapping[str, str]) -> list[str]:
    """Return the operators of com.microsoft that a model has, in order of their names, with the reasons known.

    reasons: why operators stay, by the node's name, as `unfuse` returns it
    """
    found: dict[str, str] = {}
    for node in model.graph.all_nodes():
        if node.domain.startswith(MICROSOFT):
            reason = reasons.get(str(node.name))
            found.setdefault(node.op_type, node.op_type if reason is None else f"{node.op_type} ({reason})")
    return [found[op] for op in sorted(found)]


def _fused(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the operators that may be replaced, those in functions too."""
    within: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in within:
        yield from (node for node in graph.all_nodes() if (node.domain, node.op_type) in _RULES)


def _infer_shape(node: ir.Node) -> None:
    """Give the output of a node a shape where it has none, as far as its inputs tell.

    ONNX's own inference ends at the first operator of com.microsoft, and the rank of a product's input decides the form
    of its bias.
    """
    out, read = node.outputs[0], [value for value in node.inputs if value is not None]
    shapes = [list(value.shape) for value in read if value.shape is not None]
    if out.shape is not None or len(shapes) != len(read) or not shapes:
        return
    if node.op_type == "Gather" and "axis" not in node.attributes:
        out.shape = ir.Shape([*shapes[1], *shapes[0][1:]])
    elif node.op_type == "MatMul" and len(shapes[1]) == 2 and len(shapes[0]) > 1:
        out.shape = ir.Shape([*shapes[0][:-1], shapes[1][-1]])
    elif node.op_type in ("Add", "Sum") and all(len(shape) <= len(shapes[0]) for shape in shapes):
        same = all(shape in (shapes[0], shapes[0][-1:]) for shape in shapes)
        out.shape = ir.Shape(shapes[0] if same else [None] * len(shapes[0]))
    elif node.op_type in _SAME_SHAPE:
        out.shape = ir.Shape(shapes[0])
    if out.shape is not None and out.type is None:
        out.type = read[0].type


def _replace(make: Maker, made: list[ir.Value | None]) -> None:
    """Put the nodes that were made in the place of the fused one; its outputs get the values that were made."""
    node = make.node
    assert node.graph is not None
    node.graph.insert_before(node, make.nodes)
    pairs = [(old, new) for old, new in zip(node.outputs, made, strict=True) if new is not None]
    for old, new in pairs:
        name, new.type, new.shape = old.name, old.type or new.type, old.shape or new.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = None, name
    node.graph.remove(node, safe=True)
