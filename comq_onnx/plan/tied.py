"""Find embeddings that are the weight of a product too, transposed, as the head of most language models is.

Both get the same codes, which are stored once: the product's, solved on what it reads. Eight bits, unless the options
say otherwise, are so many that the embedding loses next to nothing by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from comq_onnx.context import Context
from comq_onnx.model.layers import Layer, Prepared, compile_pattern
from comq_onnx.options.options import Options
from comq_onnx.plan.forms import BLOCKS_OPSET, WeightForm, form_of
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.solve.grid import QuantizedWeight

# the most bits whose container ONNX Runtime cannot transpose
UNTRANSPOSED_BITS = 2
# rows of a table that are looked at together
ROWS = 4096


def tie(plan: Plan, context: Context) -> Plan:
    """Return the plan with the embeddings that share their codes with a product, which is packed then in any case."""
    if plan.target.runs_outside_ort or not plan.target.packed_products or plan.opset < BLOCKS_OPSET:
        return plan
    tables = [x for x in plan.layers if x.name not in plan.unpacked and _may_tie(x, plan, WeightForm.LOOKED_UP)]
    products = [x for x in plan.layers if x.kind.is_matrix and _may_tie(x, plan, WeightForm.BLOCKED)]
    found: dict[str, str] = {}
    for product in products:
        same = [x for x in tables if _agree(product, x, context.options) and _same_weight(plan.written, product, x)]
        # in branches of an If there are several of both
        table = next((x for x in same if x.name not in found.values()), next(iter(same), None))
        if table is not None:
            found[product.name] = table.name
            context.journal.notes.append(f"{table.name} and {product.name} have one weight: stored once, for both")
    return replace(plan, tied=found, unpacked=plan.unpacked - set(found))


def with_tied(solved: Solved) -> Solved:
    """Give embeddings the codes of the products that share their weight."""
    solutions = dict(solved.solutions)
    layers = {x.name: x for x in solved.plan.layers}
    for product, table in solved.plan.tied.items():
        weight = solutions[product].weight
        error = _error(solved.plan.written, layers[table], weight)
        solutions[table] = replace(solutions[table], weight=weight, error=error)
    return replace(solved, solutions=solutions)


def explicit_bits(name: str, options: Options) -> int | None:
    """Return the bits that --bits-for gives a layer; None where it gives none."""
    matching = [bits for pattern, bits in options.bits_for if compile_pattern(pattern, "--bits-for").search(name)]
    return matching[-1] if matching else None


def tied_bits(tied: Mapping[str, str], options: Options) -> dict[str, int]:
    """Return the bits that --bits-for gives tied layers: those of one of them are those of both."""
    found = {}
    for pair in tied.items():
        bits = next((bits for name in pair if (bits := explicit_bits(name, options)) is not None), None)
        found.update(dict.fromkeys(pair, bits) if bits is not None else {})
    return found


def _may_tie(layer: Layer, plan: Plan, form: WeightForm) -> bool:
    """Tell whether a layer that runs once has this form once it is not unpacked; a product that samples reach."""
    once, seen = not layer.nested or layer.in_branch, layer.kind.is_lookup or not plan.is_unseen(layer)
    return once and seen and form_of(layer, plan.activations) is form


def _agree(product: Layer, table: Layer, options: Options) -> bool:
    """Tell whether two layers may have the same codes, by their shapes and by the bits asked for."""
    asked = {bits for x in (product, table) if (bits := explicit_bits(x.name, options)) is not None}
    same = (product.kind.outputs, product.kind.inputs) == (table.kind.outputs, table.kind.inputs)
    return same and len(asked) < 2 and min(asked, default=8) > UNTRANSPOSED_BITS


def _same_weight(prepared: Prepared, product: Layer, table: Layer) -> bool:
    """Tell whether the matrix of a product is a table."""
    first, second = _matrix(prepared, product), _matrix(prepared, table)
    parts = range(0, len(second), ROWS)
    return all(np.array_equal(first[i : i + ROWS], second[i : i + ROWS]) for i in parts)


def _matrix(prepared: Prepared, layer: Layer) -> npt.NDArray[np.float32]:
    """Return the weight of a layer [out, in], without a copy where the graph holds it so."""
    tensor = prepared.model.graph.initializers[layer.weight].const_value
    assert tensor is not None
    return np.asarray(layer.kind.to_matrix(tensor.numpy())[0], np.float32)


def _error(prepared: Prepared, table: Layer, weight: QuantizedWeight) -> float:
    """Return what the rows of a table lose, as a share of their energy."""
    matrix, lost, energy = _matrix(prepared, table), 0.0, 0.0
    for start in range(0, len(matrix), ROWS):
        rows = matrix[start : start + ROWS].astype(np.float64)
        found = weight.part(slice(0, 1), slice(start, start + ROWS)).dequantize()[0]
        lost, energy = lost + float(((found - rows) ** 2).sum()), energy + float((rows**2).sum())
    return lost / max(energy, np.finfo(np.float64).tiny)
