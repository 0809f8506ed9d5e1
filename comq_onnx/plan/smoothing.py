"""Even out channels of very different size before they share one activation scale.

A few channels of a transformer's activations are many times larger than the rest, and with one scale for all the rest
gets only a few codes. X diag(t) times diag(1/t) W is the same product, so scale can move from the activation to the
weight, as SmoothQuant does (https://arxiv.org/abs/2211.10438): t_c = max |x_c|^-alpha. alpha is chosen for each
activation by the objective || Q(X t) Q(W / t) - X W ||^2, since the weight may lose what the activation gains.

Where the values come out of a layer norm or a product with a constant, and only the layers read them, t goes into that
constant. Elsewhere a Mul is put before the QuantizeLinear, which takes a few per cent of the product's time. A
QuantizeLinear per channel would need no Mul, but takes several times as long as the product (both measured by
tools/bench/forms.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer, Prepared
from comq_onnx.plan import ranges
from comq_onnx.plan.activation_grid import fit_range
from comq_onnx.plan.activations import ActivationPlan
from comq_onnx.plan.ranges import Objective, Positions, Reader
from comq_onnx.samples.padding import Mask, take_kept
from comq_onnx.solve.grid import Array, Grid, fit_mse, round_to_grid

# the alphas that are tried
ALPHAS = (0.15, 0.3, 0.45, 0.6, 0.75)
# about the share of rounding's squared error that the solver leaves (docs/solver.md)
SOLVED = 0.35
# fractions of the range of an activation that are tried
ENDS = (1.0, 0.75, 0.5)
# the number of output channels of a layer whose rounding is measured
CHANNELS = 64
# the share to which the error must fall without a new Mul, and with one; and the least number of outputs of the layers
# behind a new Mul, so that it is little work beside theirs
WORTH, WORTH_A_NODE, LEAST_OUTPUTS = 0.98, 0.85, 128
# channels below this share of the largest hold only rounding errors
FLOOR = 1e-3
# the factors [channels] of an activation, by the name of the value
Factors = dict[str, Array]


def candidates(prepared: Prepared, plan: ActivationPlan) -> dict[str, list[Layer]]:
    """Return the quantized values that only matrix products read dequantized, with those layers.

    The weights of the layers have no other use.
    """
    initializers = prepared.model.graph.initializers
    found: dict[str, list[Layer]] = {}
    for layer in prepared.layers:
        if layer.name in plan.integer_layers and not layer.nested:
            found.setdefault(layer.input, []).append(layer)
    return {
        name: layers
        for name, layers in found.items()
        if not plan.values[name].everywhere
        and plan.values[name].given is None
        and all(x.kind.is_matrix for x in layers)
        and all(len(initializers[x.weight].uses()) == 1 for x in layers)
    }


def find_factors(
    prepared: Prepared,
    among: Mapping[str, Sequence[Layer]],
    dtype: str,
    grids: Mapping[str, Grid],
    values: Iterable[Mapping[str, Array]],
    masks: Sequence[Mask | None],
) -> Factors:
    """Find the factors [channels] of values, for those that gain by them.

    among: the values, with the layers that read them, as `candidates` gives them
    dtype: the type of quantized activations
    grids: the grid of each layer's weight, by the name of the layer
    values: the arrays of the values, batch by batch
    masks: the positions of each batch that count; None for all
    """
    seen = {name: Positions(-1) for name in among}
    largest: dict[str, Array] = {}
    for batch, mask in zip(values, masks, strict=True):
        for name in among:
            x = take_kept(batch[name], mask, least_rank=3)
            if x.size:
                seen[name].observe(x)
                size = np.abs(x).reshape(-1, x.shape[-1]).max(axis=0)
                largest[name] = np.maximum(largest.get(name, size), size)
    found = {}
    for name, layers in among.items():
        if seen[name].enough and np.isfinite(largest[name]).all() and largest[name].max() > 0:
            worth = WORTH if _absorbing(prepared.model, name, layers) else WORTH_A_NODE
            if worth == WORTH or sum(x.weight_shape[x.kind.axis or 0] for x in layers) >= LEAST_OUTPUTS:
                factors = _best_factors(prepared, layers, grids, dtype, seen[name], largest[name], worth)
                if factors is not None:
                    found[name] = factors
    return found


def _best_factors(
    prepared: Prepared,
    layers: Sequence[Layer],
    grids: Mapping[str, Grid],
    dtype: str,
    positions: Positions,
    largest: Array,
    worth: float,
) -> Array | None:
    """Choose the factors of least error for one value; None where the error stays above `worth` of what it was.

    positions: some positions of the value
    largest: the largest magnitude of each channel, [channels]
    """
    cost = _cost_of_factors(prepared, layers, grids, dtype, positions)
    size = np.maximum(largest, largest.max() * FLOOR)
    size = (size / np.exp(np.log(size).mean())).astype(np.float32)
    plain = cost(np.ones_like(size))
    costs = {alpha: cost(size**-alpha) for alpha in ALPHAS}
    alpha = min(costs, key=costs.__getitem__)
    return size**-alpha if costs[alpha] < worth * plain else None


def _cost_of_factors(
    prepared: Prepared, layers: Sequence[Layer], grids: Mapping[str, Grid], dtype: str, positions: Positions
) -> Callable[[Array], float]:
    """Return the function that gives the cost of factors [channels]: the errors of the activation and of the weights.

    Both are relative to the outputs of the layers.
    """
    rows, shares = positions.rows()
    rng = np.random.default_rng(0)
    weights = [prepared.weight(x) for x in layers]
    mixed = [ranges.mix(x.kind, weight, rng) for x, weight in zip(layers, weights, strict=True)]
    # the mean of the error does not count where a bias takes it
    squares = [shares @ np.square(rows - shares @ rows if x.has_bias else rows) for x in layers]
    energies = [float((np.square(w[0]) @ square).sum()) for w, square in zip(weights, squares, strict=True)]

    def cost(t: Array) -> float:
        readers = [Reader(m / t[:, None], x.has_bias) for m, x in zip(mixed, layers, strict=True)]
        objective = Objective.of(rows * t, shares, readers, passed_on=False)
        low, high = float((rows * t).min()), float((rows * t).max())
        total = min(objective.cost(fit_range(low * f, high * f, dtype)) for f in ENDS)
        for layer, weight, square, energy in zip(layers, weights, squares, energies, strict=True):
            some = np.asarray(weight[:, :: max(1, weight.shape[1] // CHANNELS)] / t, np.float32, order="C")
            grid = grids[layer.name]
            error = round_to_grid(some, *fit_mse(some, grid), grid).dequantize() - some
            lost = float((np.square(error[0]) @ (square * t**2)).sum()) * weight.shape[1] / some.shape[1]
            total += SOLVED * lost / max(energy, 1e-30)
        return total

    return cost


def apply(model: ir.Model, layers: Sequence[Layer], factors: Factors) -> list[Layer]:
    """Rewrite `model` in place: the layers read their inputs times the factors, their weights are divided by them.

    Returns the layers as they are now.
    """
    nodes = {str(node.name): node for node in model.graph}
    values = {str(v.name): v for v in graphs.walk_values(model)}
    changed: dict[str, Layer] = {}
    for name, t in factors.items():
        readers = [layer for layer in layers if layer.input == name]
        for layer in readers:
            _divide_weight(model, layer, t)
        constants = _absorbing(model, name, readers)
        for constant in constants:
            _multiply(constant, t)
        if not constants:
            product = _insert_product(model, values[name], t)
            for layer in readers:
                nodes[layer.node].replace_input_with(layer.kind.input_index, product)
                changed[layer.name] = replace(layer, input=str(product.name))
    return [changed.get(layer.name, layer) for layer in layers]


def _divide_weight(model: ir.Model, layer: Layer, t: Array) -> None:
    """Divide the weight of a layer by factors of its input channels, in place."""
    weight = model.graph.initializers[layer.weight]
    assert weight.const_value is not None
    matrix = layer.kind.to_matrix(weight.const_value.numpy()) / t
    weight.const_value = ir.tensor(np.ascontiguousarray(layer.kind.from_matrix(matrix), np.float32), name=layer.weight)


def _multiply(constant: ir.Value, t: Array) -> None:
    """Multiply a constant by factors, in place."""
    assert constant.const_value is not None
    scaled = np.asarray(constant.const_value.numpy() * t, np.float32)
    constant.const_value = ir.tensor(scaled, name=str(constant.name))


def _insert_product(model: ir.Model, value: ir.Value, t: Array) -> ir.Value:
    """Insert a Mul by factors behind a value, and return its output."""
    factors = graphs.add_initializer(model.graph, f"{value.name}.factors", t)
    node = ir.node("Mul", [value, factors], name=f"{value.name}.even")
    product = node.outputs[0]
    product.name, product.type, product.shape = f"{value.name}.evened", value.type, value.shape
    producer = value.producer()
    if producer is not None:
        model.graph.insert_after(producer, node)
    else:
        model.graph.insert_before(next(iter(model.graph)), node)
    return product


def _absorbing(model: ir.Model, name: str, layers: Sequence[Layer]) -> list[ir.Value]:
    """Return the constants that can take the factors of a value; [] where there are none.

    They are the scale and bias of the layer norm, or of the product and the sum, that make the value. There are none
    where others than `layers` read it.
    """
    value = next(v for v in graphs.walk_values(model) if v.name == name)
    readers = {layer.name for layer in layers}
    if value.is_graph_output() or any(str(node.name) not in readers for node, _ in value.uses()):
        return []
    return _constants(value)


def _constants(value: ir.Value) -> list[ir.Value]:
    """Return the constants that scale and shift the channels of a value where it is made; [] where there are none."""
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return []
    if node.op_type == "LayerNormalization":
        last = node.attributes.get("axis")
        given = [v for v in node.inputs[1:] if v is not None]
        alone = last is None or last.value == -1
        return given if alone and all(_is_per_channel(v) for v in given) else []
    if node.op_type not in ("Mul", "Add"):
        return []
    constant = next((v for v in node.inputs if v is not None and v.const_value is not None), None)
    other = next((v for v in node.inputs if v is not None and v is not constant), None)
    if constant is None or other is None or not _is_per_channel(constant):
        return []
    if node.op_type == "Mul":
        return [constant]
    more = _constants(other) if len(other.uses()) == 1 and not other.is_graph_output() else []
    return [constant, *more] if more else []


def _is_per_channel(value: ir.Value) -> bool:
    """Tell whether a value is a constant with one number for each channel, and has one use."""
    tensor = value.const_value
    return tensor is not None and len(tensor.shape) == 1 and tensor.shape[0] != 1 and len(value.uses()) == 1
