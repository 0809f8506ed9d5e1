"""Give each layer its bits before any survey: those of the options, or as many as its container holds anyway."""

from __future__ import annotations

from comq_onnx.context import Context
from comq_onnx.errors import OptionError
from comq_onnx.model.layers import Layer, compile_pattern, no_match
from comq_onnx.options.options import Options
from comq_onnx.plan.plan import Bits, Plan
from comq_onnx.plan.tied import tied_bits
from comq_onnx.solve.grid import MAX_BITS

EMBEDDING_BITS = 8
# of layers that no sample shows
UNSEEN_BITS = 8
# the bits at which layers are compared, and which they have until a budget has decided
REFERENCE_BITS = 4


def initial_bits(plan: Plan, options: Options) -> Bits:
    """Return the bits that the options give each layer. Raises OptionError for a pattern that matches none."""
    bits = {x.name: _usual_bits(plan, x, options) for x in plan.layers}
    for pattern, number in options.bits_for:
        expression = compile_pattern(pattern, "--bits-for")
        matching = [name for name in bits if expression.search(name)]
        if not matching:
            raise OptionError(no_match("--bits-for", f"{pattern}={number}", pattern, list(bits)))
        bits.update(dict.fromkeys(matching, number))
    return bits | tied_bits(plan.tied, options)


def _usual_bits(plan: Plan, layer: Layer, options: Options) -> int:
    if plan.is_unseen(layer):
        return UNSEEN_BITS
    return (
        EMBEDDING_BITS
        if layer.kind.is_lookup or layer.name in plan.tied_layers
        else options.fixed_bits or REFERENCE_BITS
    )


def has_explicit_bits(name: str, options: Options) -> bool:
    """Tell whether --bits-for gives the bits of a layer."""
    return any(compile_pattern(pattern, "--bits-for").search(name) for pattern, _ in options.bits_for)


def fill_containers(plan: Plan, bits: Bits, context: Context) -> Bits:
    """Give each layer the most bits that take no more bytes than those asked for: its container holds them anyway.

    Embeddings and layers whose bits --bits-for gives keep theirs.
    """
    sharing: dict[str, list[Layer]] = {}
    for layer in plan.layers:
        sharing.setdefault(layer.weight, []).append(layer)
    filled = dict(bits)
    for layers in sharing.values():
        kept = {x.name for x in layers if x.kind.is_lookup or has_explicit_bits(x.name, context.options)}
        if not kept and not any(x.name in plan.tied_layers for x in layers):
            most = min(most_bits_in_container(plan, layer, bits[layer.name]) for layer in layers)
            filled.update({layer.name: max(most, bits[layer.name]) for layer in layers})
    more = [name for name in bits if filled[name] > bits[name]]
    if more:
        context.journal.notes.append(
            f"{len(more)} of {len(bits)} layers have more bits than asked for, which their containers on "
            f"{plan.target.name} hold in the same bytes (--uniform: not)"
        )
    return filled


def most_bits_in_container(plan: Plan, layer: Layer, bits: int) -> int:
    """Return the most bits whose codes go into the same container as those of `bits` bits."""
    stored = [plan.container(layer, n) for n in range(bits, MAX_BITS + 1)]
    return max(bits + i for i, container in enumerate(stored) if container == stored[0])
