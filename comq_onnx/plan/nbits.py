"""Choose the weight-only products that are written as MatMulNBits, an operator of ONNX Runtime alone, not as QDQ."""

from __future__ import annotations

from comq_onnx.model.layers import Layer
from comq_onnx.plan.forms import WeightForm
from comq_onnx.plan.plan import Plan
from comq_onnx.targets.target import WIDTHS

# the widths of codes whose kernels are good: those of 2 bits were seen to give garbage for some numbers of outputs
NBITS_WIDTHS = (4, 8)
LEAST_BLOCK = 16
# layers that a note names
MOST_NAMED = 3


def nbits_block(plan: Plan, layer: Layer) -> int | None:
    """Return the block in which MatMulNBits reads the weight of a layer; None where it is written otherwise.

    A scale per channel is repeated for blocks of the size that the QDQ form has. An embedding reads the same blocks,
    which must fill its rows.
    """
    if not plan.nbits_op or _why_not(plan, layer):
        return None
    inputs, bits = layer.kind.inputs, plan.bits[layer.name]
    if layer.name in plan.tied:
        return _filling_block(inputs, plan.target.block)
    return plan.grids[layer.name].block_size or plan.target.block_of(inputs, bits)


def left_in_qdq(plan: Plan) -> dict[str, str]:
    """Return the reason for each weight-only matrix product that is not written as MatMulNBits, by its name."""
    products = [x for x in plan.layers if x.op in ("MatMul", "Gemm") and not plan.is_integer(x)]
    return {x.name: reason for x in products if (reason := _why_not(plan, x))}


def note_on_forms(plan: Plan) -> list[str]:
    """Return a remark on the weight-only products that stay QDQ, where they were asked to be MatMulNBits."""
    left = left_in_qdq(plan) if plan.nbits_op else {}
    if not left:
        return []
    named = ", ".join(f"{name} ({reason})" for name, reason in list(left.items())[:MOST_NAMED])
    more = f" and {len(left) - MOST_NAMED} more" if len(left) > MOST_NAMED else ""
    return [f"--nbits-op: {len(left)} weight-only products stay QDQ: {named}{more}"]


def _why_not(plan: Plan, layer: Layer) -> str:
    """Say why a layer is not written as MatMulNBits; "" where it is."""
    form = plan.form(layer)
    if form is WeightForm.FOLDED and layer.kind.is_matrix and layer.name in plan.unpacked:
        return "faster when its weight is unpacked at load"
    if form is not WeightForm.BLOCKED:
        return "no product of this form"
    bits = plan.bits[layer.name]
    container, planes = plan.container(layer, bits)
    if planes or WIDTHS[container] not in NBITS_WIDTHS:
        return f"{bits} bits"
    if layer.name in plan.tied and _filling_block(layer.kind.inputs, plan.target.block) is None:
        return f"no block fills {layer.kind.inputs} inputs, as the embedding of its weight needs"
    return ""


def _filling_block(inputs: int, most: int) -> int | None:
    """Return the largest power of two that divides the inputs, `most` at most; None where it is no block."""
    block = min(inputs & -inputs, most)
    return block if block >= LEAST_BLOCK else None
