"""Replace fused normalizations, embeddings and GELUs, so that weights and biases inside stand where all others do.

A bias that a fused operator adds to the product before it becomes an Add of its own: there the shift of a quantized
product goes, and ONNX Runtime's integer products add it themselves.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.unfuse.maker import MICROSOFT, Maker, Stays, is_product, is_weight

GELU_OPSET, LAYER_NORM_OPSET = 20, 17
# ReduceMean takes its axes as an input from this opset on
_MEAN_OPSET = 18
# ONNX Runtime would join an Add and a LayerNormalization to what was taken apart
_SUM = "Sum"
# epsilon of the fused normalizations, where they name none
_EPSILON = 1e-12
# the coefficients of ONNX Runtime's FastGelu: 0.5 x (1 + tanh(x (B + C x^2)))
_FAST_B, _FAST_C = 0.7978845608028654, 0.035677408136300125


def bias_gelu(make: Maker) -> list[ir.Value | None]:
    """Replace BiasGelu by Add and Gelu, where a product with a weight is before it."""
    x, bias = make.given(0), make.given(1)
    if not (make.standard or (is_product(x) and graphs.is_constant(bias))):
        return []
    return [_gelu(make, _add(make, x, bias))]


def gelu(make: Maker) -> list[ir.Value | None]:
    """Replace Gelu by the standard operator, where only standard ones are wanted."""
    return [_gelu(make, make.given(0))] if make.standard else []


def fast_gelu(make: Maker) -> list[ir.Value | None]:
    """Take the bias out of FastGelu, where a product with a weight is before it; replace the whole if need be."""
    x, bias = make.given(0), make.input(1)
    if make.standard:
        return [_tanh_gelu(make, x if bias is None else _add(make, x, bias))]
    if bias is None or not is_product(x) or not graphs.is_constant(bias):
        return []
    return [make("FastGelu", _add(make, x, bias), name=str(make.node.name), domain=MICROSOFT)]


def quick_gelu(make: Maker) -> list[ir.Value | None]:
    """Replace QuickGelu by x * Sigmoid(alpha x), where only standard operators are wanted."""
    if not make.standard:
        return []
    x, alpha = make.given(0), float(make.attribute("alpha", 1.702))
    return [make("Mul", x, make("Sigmoid", make("Mul", x, make.number(alpha))))]


def skip_layer_norm(make: Maker) -> list[ir.Value | None]:
    """Replace SkipLayerNormalization by Sum and LayerNormalization, where it adds the bias of a product with a weight.

    On the CPU these two take a third of its time. SkipSimplifiedLayerNormalization would become many operators: unless
    only standard ones are wanted, only the bias is taken out.

    Raises Stays where the whole is to be replaced, and something reads the mean or the deviation.
    """
    simplified = make.node.op_type.startswith("SkipSimplified")
    operands, bias = [make.given(0), make.given(1)], make.input(3 if simplified else 4)
    if make.standard:
        return _plain_skip_norm(make, operands, bias, simplified)
    at = next((i for i, value in enumerate(operands) if is_product(value)), None)
    if bias is None or at is None or not graphs.is_constant(bias):
        return []
    if graphs.opset(make.model) >= LAYER_NORM_OPSET and not simplified and not (make.output(1) or make.output(2)):
        return _plain_skip_norm(make, operands, bias, simplified)
    operands[at] = _add(make, operands[at], bias)
    rest = make.node.inputs[2 : 3 if simplified else 4]
    name, count = str(make.node.name), len(make.node.outputs)
    own, op = dict(make.node.attributes), make.node.op_type
    return list(make.several(op, *operands, *rest, outputs=count, name=name, domain=MICROSOFT, **own))


def _plain_skip_norm(
    make: Maker, operands: list[ir.Value], bias: ir.Value | None, simplified: bool
) -> list[ir.Value | None]:
    """Make the sum and its normalization, by standard operators."""
    if make.output(1) is not None or make.output(2) is not None:
        raise Stays("something reads the mean or the deviation that it computes")
    at = 1 if is_product(operands[1]) else 0
    if bias is not None:
        operands[at] = _add(make, operands[at], bias)
    total = make("Add" if make.standard else _SUM, *operands, like=operands[0])
    epsilon, gamma = float(make.attribute("epsilon", _EPSILON)), make.given(2)
    normal = _rms_norm(make, total, gamma, epsilon) if simplified else _norm(make, total, gamma, make.input(3), epsilon)
    return [normal, None, None, total][: len(make.node.outputs)]


def simplified_layer_norm(make: Maker) -> list[ir.Value | None]:
    """Replace SimplifiedLayerNormalization, which only ONNX Runtime has, where only standard operators are wanted.

    Raises Stays for another axis than the last, and where something reads the deviation.
    """
    if not make.standard:
        return []
    if make.attribute("axis", -1) != -1 or make.output(1) is not None:
        raise Stays("it normalizes another axis than the last, or something reads the deviation that it computes")
    normal = _rms_norm(make, make.given(0), make.given(1), float(make.attribute("epsilon", 1e-5)))
    return [normal, None][: len(make.node.outputs)]


def embed_layer_norm(make: Maker) -> list[ir.Value | None]:
    """Replace EmbedLayerNormalization by lookups in its tables, their sum and its normalization.

    Without positions they count from 0; without segments all are segment 0. The index of the mask is the number of ones
    in each row.
    """
    ids, segments, words, positions, kinds = make.given(0), make.input(1), make.given(2), make.given(3), make.input(4)
    if not (make.standard or is_weight(words) or is_weight(positions)):
        return []
    shape = make("Shape", ids)
    places = make.input(8)
    if places is None:
        length = make("Gather", shape, make.number(1, np.int64))
        places = make("Range", make.number(0, np.int64), length, make.number(1, np.int64))
        places.type, places.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([None])
    total = make(
        "Add",
        make("Gather", words, ids, name=make.name("words")),
        make("Gather", positions, places, name=make.name("positions")),
    )
    if kinds is not None:
        total = make("Add", total, _segments(make, kinds, segments))
    normal = _norm(make, total, make.given(5), make.given(6), float(make.attribute("epsilon", _EPSILON)))
    index = None if make.output(1) is None else _mask_index(make, ids, shape)
    return [normal, index, total][: len(make.node.outputs)]


def _segments(make: Maker, kinds: ir.Value, segments: ir.Value | None) -> ir.Value:
    """Look up the segments; without any return the row of segment 0 [1, features]."""
    table = graphs.constant(kinds) if segments is None else None
    if table is not None:
        return make.derive((kinds.name, "first"), f"{kinds.name}.first", lambda: table[:1])
    segments = make.number([0], np.int64) if segments is None else segments
    return make("Gather", kinds, segments, name=make.name("segments"))


def _mask_index(make: Maker, ids: ir.Value, shape: ir.Value) -> ir.Value:
    """Return how many ones each row of the mask has [samples]; zeros where there is no mask."""
    mask = make.input(7)
    if mask is None:
        batch = make("Gather", shape, make.number([0], np.int64))
        index = make("Expand", make.number([0], np.int32), batch)
    else:
        ones = make("Cast", make("Equal", mask, make.number(1, np.int32)), to=ir.DataType.INT32.value)
        index = make("ReduceSum", ones, make.number([1], np.int64), keepdims=0)
    # an Attention asks for the rank of its mask
    index.type = ir.TensorType(ir.DataType.INT32)
    index.shape = ir.Shape([None if ids.shape is None else ids.shape[0]])
    return index


def _add(make: Maker, x: ir.Value, bias: ir.Value) -> ir.Value:
    """Add a bias to a value."""
    return make("Add", x, bias, like=x)


def _norm(make: Maker, x: ir.Value, gamma: ir.Value, beta: ir.Value | None, epsilon: float) -> ir.Value:
    """Make a LayerNormalization. Raises Stays where the opset has none, and only standard operators are wanted."""
    if make.standard and graphs.opset(make.model) < LAYER_NORM_OPSET:
        raise Stays(f"LayerNormalization came with opset {LAYER_NORM_OPSET}, to which no converter raises this model")
    return make("LayerNormalization", x, gamma, beta, axis=-1, epsilon=epsilon, name=str(make.node.name))


def _rms_norm(make: Maker, x: ir.Value, gamma: ir.Value, epsilon: float) -> ir.Value:
    """Make gamma * x / sqrt(mean(x^2) + epsilon), over the last axis."""
    square = make("Mul", x, x, like=x)
    if graphs.opset(make.model) >= _MEAN_OPSET:
        mean = make("ReduceMean", square, make.number([-1], np.int64), keepdims=1)
    else:
        mean = make("ReduceMean", square, axes=[-1], keepdims=1)
    deviation = make("Sqrt", make("Add", mean, make.number(epsilon)))
    return make("Mul", make("Div", x, deviation, like=x), gamma, like=x, name=str(make.node.name))


def _gelu(make: Maker, x: ir.Value) -> ir.Value:
    """Make x (1 + erf(x / sqrt 2)) / 2."""
    if graphs.opset(make.model) >= GELU_OPSET:
        return make("Gelu", x, like=x, name=str(make.node.name))
    if not make.standard:
        return make("Gelu", x, like=x, domain=MICROSOFT, name=str(make.node.name))
    inner = make("Erf", make("Div", x, make.number(math.sqrt(2)), like=x), like=x)
    return _halved(make, x, inner)


def _tanh_gelu(make: Maker, x: ir.Value) -> ir.Value:
    """Make x (1 + tanh(x (B + C x^2))) / 2."""
    if graphs.opset(make.model) >= GELU_OPSET:
        return make("Gelu", x, like=x, approximate="tanh", name=str(make.node.name))
    square = make("Mul", make("Mul", x, x, like=x), make.number(_FAST_C), like=x)
    inner = make("Mul", x, make("Add", square, make.number(_FAST_B), like=x), like=x)
    return _halved(make, x, make("Tanh", inner, like=x))


def _halved(make: Maker, x: ir.Value, inner: ir.Value) -> ir.Value:
    """Make x (1 + inner) / 2."""
    outer = make("Mul", x, make("Add", inner, make.number(1.0), like=x), like=x)
    return make("Mul", outer, make.number(0.5), like=x, name=str(make.node.name))
