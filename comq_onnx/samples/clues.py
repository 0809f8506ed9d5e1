"""Find out what a model tells about the samples it wants: vocabulary, layout, statistics of the first layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx.errors import ComqError
from comq_onnx.model.graph import find_readers
from comq_onnx.model.operators import kinds_of
from comq_onnx.model.probe import probe
from comq_onnx.model.recurrent import LENGTHS
from comq_onnx.runtime.session import Session
from comq_onnx.samples.cache_shapes import cache_shapes
from comq_onnx.samples.samples import Clues, Feeds

Floats = npt.NDArray[np.float64]
# operators that exporters put between an input and the first layer that tells the layout
ELEMENTWISE = frozenset(
    {"Cast", "Identity", "Sub", "Add", "Mul", "Div", "Clip", "QuantizeLinear", "DequantizeLinear", "Pad"}
)
NORMS = 3  # BatchNormalizations compared: what later ones see depends on those before


def read_clues(model: ir.Model, path: Path, session: Session, device: str) -> Clues:
    """Gather the clues of a model.

    path: the file that the model was read from
    session: runs the float model
    device: where the first layers run alone
    """
    norms, first = _first_norms(model), _first_bias(model)
    return Clues(
        folder=path.parent,
        token_limits=token_limits(model),
        cache_shapes=cache_shapes(model, path.parent),
        step_axes=step_axes(model),
        channels_last=channels_last(model),
        run=session.run,
        misfit=_misfit(model, norms, device) if norms else None,
        balance=_balance(model, *first, device) if first is not None else None,
    )


def suspicious_statistics(clues: Clues, feeds: Feeds) -> str | None:
    """Warn of feeds that do not look like those of training, by the statistics of the first layers.

    Returns None where the feeds look right, or where the model has no BatchNormalization that could tell. Right pixels
    measure 0.01 to 0.2, those of another model's mean and deviation up to 2, those of another scale 30 and more.
    """
    try:
        found = clues.misfit(feeds) if clues.misfit is not None else 0.0
    except ComqError:  # the first layers alone do not run everywhere
        return None
    if found <= 10:
        return None
    return (
        f"these samples are not what the model was trained on, by the statistics of its BatchNormalizations (misfit "
        f"{found:.3g}, 0 to 1 is right): their pixels may be of another scale or layout; look with --inspect-samples"
    )


def token_limits(model: ir.Model) -> dict[str, int]:
    """Return the number of rows of the embedding, for each input that indexes one."""
    limits: dict[str, int] = {}
    for value in model.graph.inputs:
        for node, index in find_readers(value, {"Cast", "Identity"}):
            table = _table(node, index)
            if table is not None and table.const_value is not None:
                rows = int(table.const_value.shape.numpy()[0])
                limits[str(value.name)] = min(rows, limits.get(str(value.name), rows))
    return limits


def step_axes(model: ir.Model) -> dict[str, tuple[str, int]]:
    """Return, for each input with the lengths of sequences of a recurrent node, the input with their steps.

    With it comes the axis of the steps; inputs behind other nodes than a Transpose are not found.
    """
    inputs = {str(value.name) for value in model.graph.inputs}
    found: dict[str, tuple[str, int]] = {}
    for value in model.graph.inputs:
        for node, index in find_readers(value, {"Cast", "Identity"}):
            x = node.inputs[0]
            if ".R" not in kinds_of(node) or index != LENGTHS or x is None:
                continue
            turned, axis = x.producer(), 0
            if turned is not None and turned.op_type == "Transpose" and turned.inputs[0] is not None:
                x, axis = turned.inputs[0], int(turned.attributes.get_ints("perm", [2, 1, 0])[0])
            if str(x.name) in inputs:
                found[str(value.name)] = str(x.name), axis
    return found


def _table(node: ir.Node, index: int) -> ir.Value | None:
    """Return the table of an embedding in which an input of a node looks rows up; None for any other input."""
    tables = {"Gather": {1: 0}, "EmbedLayerNormalization": {0: 2, 1: 4, 8: 3}}.get(node.op_type, {})
    return node.inputs[tables[index]] if index in tables else None


def channels_last(model: ir.Model) -> dict[str, bool]:
    """Tell whether an input is NHWC (transposed before the first convolution), for each input that reaches one."""
    found: dict[str, bool] = {}
    for value in model.graph.inputs:
        for node, index in find_readers(value, ELEMENTWISE):
            if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [0, 3, 1, 2]:
                found.setdefault(str(value.name), True)
            elif node.op_type == "Conv" and index == 0:
                found.setdefault(str(value.name), False)
    return found


# The first layers
# ---------------------------------------------------------------------------------------------------------


def _first_norms(model: ir.Model) -> list[tuple[ir.Value, Floats, Floats]]:
    """Return (input, mean, variance) of the first BatchNormalizations that another node feeds."""
    found: list[tuple[ir.Value, Floats, Floats]] = []
    for node in model.graph:
        if node.op_type == "BatchNormalization" and len(found) < NORMS and len(node.inputs) == 5:
            x, mean, variance = node.inputs[0], _numbers(node.inputs[3]), _numbers(node.inputs[4])
            producer = x.producer() if x is not None else None
            if x is not None and mean is not None and variance is not None and producer is not None:
                found.append((x, mean, variance))
    return found


def _first_bias(model: ir.Model) -> tuple[ir.Value, Floats] | None:
    """Return (output, bias) of the first convolution; None where it has no bias.

    A BatchNormalization that was folded into the convolution leaves a bias.
    """
    node = next((n for n in model.graph if n.op_type == "Conv"), None)
    bias = _numbers(node.inputs[2]) if node is not None and len(node.inputs) > 2 else None
    return (node.outputs[0], bias) if node is not None and bias is not None and np.any(bias) else None


def _numbers(value: ir.Value | None) -> Floats | None:
    if value is None:
        return None
    tensor = value.const_value or ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy(), np.float64)


def _misfit(model: ir.Model, norms: list[tuple[ir.Value, Floats, Floats]], device: str) -> Callable[[Feeds], float]:
    """Return a function that measures how far feeds are from those of training.

    It is the median over channels of (m - mean)^2 / var + log(s^2 / var)^2 / 4, averaged over BatchNormalizations, with
    mean and var those of training, and m and s^2 the mean and the variance of what reaches the BatchNormalization.
    """
    observe = _channel_statistics(model, [value for value, _, _ in norms], device)

    def misfit(feeds: Feeds) -> float:
        found = []
        for (_, mean, variance), (m, v) in zip(norms, observe(feeds), strict=True):
            ratio = np.maximum(v, 1e-12) / np.maximum(variance, 1e-12)
            found.append(float(np.median((m - mean) ** 2 / np.maximum(variance, 1e-12) + np.log(ratio) ** 2 / 4)))
        return float(np.mean(found))

    return misfit


def _balance(model: ir.Model, output: ir.Value, bias: Floats, device: str) -> Callable[[Feeds], float]:
    """Return a function that measures the size of the first convolution's products beside that of its biases.

    It is the norm of the standard deviations of its channels over the norm of its biases: a folded BatchNormalization
    makes both of one size.
    """
    observe = _channel_statistics(model, [output], device)

    def balance(feeds: Feeds) -> float:
        [(_, variance)] = observe(feeds)
        return float(np.sqrt(variance.sum()) / np.linalg.norm(bias))

    return balance


def _channel_statistics(
    model: ir.Model, values: list[ir.Value], device: str
) -> Callable[[Feeds], list[tuple[Floats, Floats]]]:
    """Return a function that runs the first layers alone: (mean, variance) of each channel (axis 1) of these values.

    It raises ModelError or RuntimeFailure where they do not run without the rest.
    """
    names = [str(value.name) for value in values]

    def observe(feeds: Feeds) -> list[tuple[Floats, Floats]]:
        (outputs,) = probe(model, names, [feeds], device, "the model's first layers")
        arrays = [np.moveaxis(np.asarray(outputs[name], np.float64), 1, 0) for name in names]
        return [(a.mean(axis=tuple(range(1, a.ndim))), a.var(axis=tuple(range(1, a.ndim)))) for a in arrays]

    return observe
