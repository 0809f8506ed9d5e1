"""Replace fused matrix products and convolutions by standard ones, which hold their weights as all others do.

What the fused operators compute: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.op_kind import AnyArray
from comq_onnx.model.unfuse.maker import Maker, Stays, is_weight

# the parameters of the activations that products are fused with, in the order of FusedConv's activation_params
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "Relu": (), "Sigmoid": (), "Tanh": (), "Softplus": (), "Softsign": (), "HardSwish": (),
    "LeakyRelu": ("alpha",), "Elu": ("alpha",), "ThresholdedRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"),
    "Selu": ("alpha", "gamma"), "ScaledTanh": ("alpha", "beta"), "Clip": ("min", "max"),
}  # fmt: skip
_HARDSWISH_OPSET = 14


def fused_matmul(make: Maker) -> list[ir.Value | None]:
    """Replace FusedMatMul and TransposeMatMul by MatMul; transpositions and alpha go into the weight.

    Raises Stays where the input is transposed and its rank is unknown.
    """
    operands = [make.given(0), make.given(1)]
    constant = [graphs.is_constant(value) for value in operands]
    weighted = [i for i in (1, 0) if is_weight(operands[i]) and not constant[1 - i]]
    if not (weighted or make.standard):
        return []
    orders = [_order(make, value, letter) for value, letter in zip(operands, "AB", strict=True)]
    alpha = float(make.attribute("alpha", 1.0))
    for i, (value, order) in enumerate(zip(operands, orders, strict=True)):
        if weighted[:1] == [i]:
            operands[i] = _folded(make, value, order, alpha)
        elif order is not None:
            operands[i] = make("Transpose", value, perm=list(order))
    out = make.node.outputs[0]
    product = make("MatMul", *operands, name=str(make.node.name), like=out)
    return [product if weighted or alpha == 1 else make("Mul", product, _scalar(make, alpha, out), like=out)]


def _order(make: Maker, value: ir.Value, letter: str) -> tuple[int, ...] | None:
    """Return the order of axes in which an operand is multiplied; None for its own. Raises Stays for unknown ranks.

    letter: A or B, as in the names of the attributes
    """
    batch, last = bool(make.attribute(f"transBatch{letter}", 0)), bool(make.attribute(f"trans{letter}", 0))
    if not (batch or last):
        return None
    if value.shape is None:
        raise Stays("it transposes an input of unknown rank")
    axes = list(range(len(value.shape)))
    if len(axes) < 2:
        return None
    if batch:
        axes = [*axes[1:-1], axes[0], axes[-1]]
    if last:
        axes[-2:] = axes[:-3:-1]
    return None if axes == sorted(axes) else tuple(axes)


def _folded(make: Maker, weight: ir.Value, order: tuple[int, ...] | None, alpha: float) -> ir.Value:
    """Return the weight with its axes in another order, times alpha."""
    if order is None and alpha == 1:
        return weight

    def fold() -> AnyArray:
        array = graphs.constant(weight)
        assert array is not None
        array = array if order is None else array.transpose(order)
        return array if alpha == 1 else array * array.dtype.type(alpha)

    return make.derive((weight.name, order, alpha), f"{weight.name}.unfused", fold)


def _scalar(make: Maker, number: float, like: ir.Value) -> ir.Value:
    """Return a constant of the type of another value."""
    return make.number(number, np.float64 if like.dtype == ir.DataType.DOUBLE else np.float32)


def fused_gemm(make: Maker) -> list[ir.Value | None]:
    """Replace FusedGemm by Gemm and its activation. Raises Stays for an activation that is not known."""
    if not (is_weight(make.input(1)) or make.standard):
        return []
    activation = str(make.attribute("activation", ""))
    own = {name: make.attribute(name, None) for name in ("alpha", "beta", "transA", "transB")}
    parameters = {name: make.attribute(f"activation_{name}", None) for name in ("alpha", "beta", "gamma")}
    _check_activation(activation, parameters)
    attributes = {name: value for name, value in own.items() if value is not None}
    product = make("Gemm", *make.node.inputs, name=str(make.node.name), like=make.node.outputs[0], **attributes)
    return [_activate(make, product, activation, parameters)]


def fused_conv(make: Maker) -> list[ir.Value | None]:
    """Replace FusedConv by Conv, the Add of what it adds, and its activation.

    Raises Stays for an activation that is not known.
    """
    if not (is_weight(make.input(1)) or make.standard):
        return []
    activation, given = str(make.attribute("activation", "")), make.attribute("activation_params", ())
    parameters = dict(zip(_PARAMETERS.get(activation, ()), map(float, given), strict=False))
    _check_activation(activation, parameters)
    own: dict[str, Any] = {key: a for key, a in make.node.attributes.items() if not key.startswith("activation")}
    out = make.node.outputs[0]
    result = make("Conv", *make.node.inputs[:3], name=str(make.node.name), like=out, **own)
    added = make.input(3)
    if added is not None:
        result = make("Add", result, added, like=out)
    return [_activate(make, result, activation, parameters)]


def _check_activation(activation: str, parameters: Mapping[str, float | None]) -> None:
    """Raise Stays for an activation that is not known, or lacks a parameter."""
    if activation and activation not in _PARAMETERS:
        raise Stays(f"it is fused with an activation {activation!r} that has no standard form here")
    missing = [name for name in _PARAMETERS.get(activation, ()) if parameters.get(name) is None]
    if missing:
        raise Stays(f"its activation {activation} lacks {missing[0]}")


def _activate(make: Maker, x: ir.Value, activation: str, parameters: Mapping[str, float | None]) -> ir.Value:
    """Make the nodes of an activation."""
    found: dict[str, Any] = {name: float(parameters[name] or 0) for name in _PARAMETERS.get(activation, ())}
    if not activation:
        return x
    if activation == "Clip":
        return make("Clip", x, make.number(found["min"]), make.number(found["max"]), like=x)
    if activation == "ScaledTanh":
        inner = make("Tanh", make("Mul", x, make.number(found["beta"]), like=x), like=x)
        return make("Mul", inner, make.number(found["alpha"]), like=x)
    if activation == "HardSwish" and graphs.opset(make.model) < _HARDSWISH_OPSET:
        return make("Mul", x, make("HardSigmoid", x, alpha=1 / 6, beta=0.5, like=x), like=x)
    return make(activation, x, like=x, **found)
