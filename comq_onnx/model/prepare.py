"""Prepare a loaded model: clean and fold it, raise it to the opset that the target needs, and list its layers.

onnxscript and onnx-ir have the passes that fold constants and BatchNorms, inline functions and raise the opset.
Whether they changed the outputs is checked afterwards, by running the prepared model. What is no layer, and why, is in
`skipped`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import version_converter
from onnxscript.rewriter import RewritePass, pattern
from onnxscript.rewriter.rules.common import fuse_hardswish_rules

from comq_onnx.errors import ModelError
from comq_onnx.model import graph as graphs
from comq_onnx.model.fold import fold as fold_constants
from comq_onnx.model.half_precision import upcast
from comq_onnx.model.layers import WEIGHT_CHAIN, Prepared, list_layers, reaches_layer
from comq_onnx.model.op_kind import MIN_WEIGHTS
from comq_onnx.model.operators import OP_KINDS, kinds_of
from comq_onnx.model.quantized import nodes_of_quantized_weights
from comq_onnx.model.unfuse.graph import Unfusing, others, unfuse

logger = logging.getLogger(__name__)

# about how many numbers of two weights are compared before all of them
FEW = 64
# the opset that HardSwish came with
HARDSWISH_OPSET = 14


class Unprepared(Exception):
    """Say that this way of preparing does not work for this model; a plainer one may."""


def prepare_model(
    model: ir.Model, wanted_opset: int, min_opset: int, fold: bool = True, unfusing: Unfusing = Unfusing.FOR_WEIGHTS
) -> Prepared:
    """Clean `model` in place, raise it to `wanted_opset` where it is lower, and list its layers.

    wanted_opset: where no converter reaches it, min_opset is tried, and a note says so.
    fold: also fold constants and BatchNorms.
    unfusing: how much of ONNX Runtime's fused operators is taken apart.

    Raises ModelError where no converter reaches min_opset either, Unprepared where folding fails.
    """
    notes: list[str] = []
    _clean(model)
    names, declared = _layer_names(model), tuple(value.shape for value in model.graph.outputs)
    if fold:
        _turn_shared(model)
        kept = {str(node.name) for node in nodes_of_quantized_weights(model)}
        try:
            fold_constants(model, lambda node: _should_fold(node, kept))
            RewritePass([_AddIntoConv.rule()])(model)
            _adopt(model)
        except Exception as error:  # a library's bug on one graph must not end the run: the graph works unfolded
            raise Unprepared(f"constant folding failed: {error}") from error
    model = _raise_opset(model, wanted_opset, min_opset, notes)
    reasons = unfuse(model, unfusing)
    if unfusing is Unfusing.TO_STANDARD and (left := others(model, reasons)):
        notes.append(f"operators of com.microsoft stay as they are: {', '.join(left)}")
    if fold and graphs.opset(model) >= HARDSWISH_OPSET:
        RewritePass(fuse_hardswish_rules())(model)
    _restore_names(model, names)
    _clean(model)
    _drop_axes(model)
    if upcast(model):
        notes.append(
            "half-precision arithmetic became float32, which the CPU computes in anyway; inputs and outputs kept "
            "(for GPUs, --float16 makes it half precision again)"
        )
    _fold_alpha(model)
    _store_once(model)
    model.ir_version = min(max(model.ir_version, 8), graphs.MAX_IR_VERSION)
    layers, skipped = list_layers(model)
    return Prepared(model, layers, _with_reasons(skipped, reasons), notes, declared)


def _with_reasons(skipped: Mapping[str, str], reasons: Mapping[str, str]) -> dict[str, str]:
    """Add to what is said of operators that are left as they are why they could not be taken apart."""
    return {name: f"{said}; {reasons[name]}" if name in reasons else said for name, said in skipped.items()}


def _clean(model: ir.Model) -> None:
    """Inline functions, make every constant a main-graph initializer, and every name unique and present."""
    ir.passes.Sequential(
        passes.InlinePass(),
        passes.RemoveInitializersFromInputsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.NameFixPass(),
    )(model)
    _name_once(model)


def _adopt(model: ir.Model) -> None:
    """Make constants that belong to no graph initializers: onnxscript gives two Flattens of a value the same shape."""
    known = model.graph.initializers
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None or value.is_graph_input():
                continue
            if value.graph is None:
                value.name = _unused(str(value.name), set(known))
                model.graph.register_initializer(value)


def _name_once(model: ir.Model) -> None:
    """Make names of nodes and values unique over all subgraphs: NameFixPass lets branches share theirs."""
    # names of layers, where a node is more than one, are taken too
    nodes = {f"{node.name}{part}" for node in model.graph.all_nodes() for part in kinds_of(node) if part}
    values = {str(v.name) for v in (*model.graph.inputs, *model.graph.initializers.values())}
    for graph in (model.graph, *model.graph.subgraphs()):
        made = [] if graph is model.graph else list(graph.inputs)
        for node in graph:
            node.name = _unused(str(node.name), nodes)
            made += node.outputs
        for value in made:
            if value.name:
                value.name = _unused(value.name, values)


def _unused(name: str, taken: set[str]) -> str:
    """Return `name`, with a number where it is taken, and add it to `taken`."""
    unique, count = name, 1
    while unique in taken:
        unique, count = f"{name}_{count}", count + 1
    taken.add(unique)
    return unique


def _layer_names(model: ir.Model) -> dict[tuple[str, str], str]:
    """Return the name of each node with a constant weight, by its op type and the weight's name."""
    return {
        (node.op_type, str(value.name)): str(node.name)
        for node in model.graph.all_nodes()
        for value in node.inputs[:2]
        if node.op_type in OP_KINDS and value is not None and graphs.is_constant(value)
    }


def _restore_names(model: ir.Model, names: dict[tuple[str, str], str]) -> None:
    """Give layers that a rewrite replaced (a Conv with its BatchNorm folded) the names that the source has for them."""
    kept = {str(node.name) for node in model.graph.all_nodes()}
    for node in model.graph.all_nodes():
        for value in node.inputs[:2]:
            name = names.get((node.op_type, str(value.name))) if value is not None else None
            if name is not None and name not in kept:
                node.name = name
                kept.add(name)


class _AddIntoConv(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """Turn a Conv without a bias and an Add of a constant per channel into a Conv with that bias."""

    def pattern(self, op: Any, x: Any, w: Any, addend: Any) -> Any:
        """Match the Conv and the Add behind it."""
        return op.Conv(x, w, _allow_other_attributes=True, _outputs=["conv"]) + addend

    def check(self, _context: Any, conv: ir.Value, w: ir.Value, addend: ir.Value, **_: Any) -> bool:
        """Tell whether the addend has one number per channel, and nothing else reads the Conv."""
        if not graphs.is_constant(addend) or not graphs.is_constant(w) or len(conv.uses()) != 1:
            return False
        assert addend.const_value is not None
        assert w.const_value is not None
        out, rank = w.const_value.shape[0], len(w.const_value.shape)
        shape = list(addend.const_value.shape)
        return shape in ([1, out, *[1] * (rank - 2)], [out, *[1] * (rank - 2)])

    def rewrite(self, op: Any, x: ir.Value, w: ir.Value, conv: ir.Value, addend: ir.Value) -> Any:
        """Make the Conv with its bias."""
        assert addend.const_value is not None
        node = conv.producer()
        assert node is not None
        bias = op.initializer(ir.tensor(addend.const_value.numpy().reshape(-1)), name=f"{w.name}.bias")
        return op.Conv(x, w, bias, **node.attributes)


def _fold_alpha(model: ir.Model) -> None:
    """Multiply the alpha of each Gemm into its weight: a scale cannot take it where it is negative, 0 or very small.

    What a Gemm adds 0 times is removed.
    """
    for node in model.graph.all_nodes():
        if node.op_type != "Gemm" or node.domain != "":
            continue
        if "beta" in node.attributes and float(node.attributes["beta"].value) == 0:
            node.resize_inputs(min(len(node.inputs), 2))
        if "alpha" not in node.attributes:
            continue
        alpha, value = node.attributes["alpha"], node.inputs[1]
        weight = graphs.constant(value)
        if value is None or weight is None or weight.dtype != np.float32:
            continue
        node.attributes.pop("alpha")
        if float(alpha.value) != 1:
            product = weight * np.float32(alpha.value)
            node.replace_input_with(1, graphs.add_initializer(model.graph, f"{value.name}.times_alpha", product))
    passes.RemoveUnusedNodesPass()(model)


def _store_once(model: ir.Model) -> None:
    """Let all readers of equal weights read the same initializer: folding makes one of each Identity of a weight.

    Compares few numbers of each before all: onnx-ir's pass for it keeps the bytes of every weight.
    """
    alike: dict[object, list[ir.Value]] = {}
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.size < MIN_WEIGHTS or value.is_graph_input() or value.is_graph_output():
            continue
        numbers = tensor.numpy().reshape(-1)
        some = numbers[:: max(1, numbers.size // FEW)]
        known = alike.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), some.tobytes()), [])
        for other in known:
            assert other.const_value is not None
            if np.array_equal(other.const_value.numpy().reshape(-1), numbers):
                value.replace_all_uses_with(other)
                break
        else:
            known.append(value)
    passes.RemoveUnusedNodesPass()(model)


def _should_fold(node: ir.Node, kept: Set[str]) -> bool | None:
    """Fold operators between a weight and its layer whatever its size; None leaves a node to the library's limits.

    kept: the names of nodes that are not folded
    """
    if node.name in kept:
        return False
    if node.domain != "":
        return None
    if node.op_type in WEIGHT_CHAIN and reaches_layer(node.outputs[0]):
        return True
    # the library does not fold these, nor then any Pad whose amounts an exporter computed from shapes
    shape = graphs.constant(node.inputs[0]) if node.op_type == "ConstantOfShape" else None
    return True if shape is not None and int(np.prod(shape)) <= 1024 else None


def _turn_shared(model: ir.Model) -> None:
    """Transpose the weights of layers that other nodes read too: the library folds no large constant of two readers.

    The turned weight is a view of the other one: it takes no memory.
    """
    for node in list(model.graph.all_nodes()):
        value = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        if value is None or value.const_value is None or not graphs.is_constant(value) or len(value.uses()) < 2:
            continue
        if reaches_layer(node.outputs[0]) and not node.outputs[0].is_graph_output():
            turned = value.const_value.numpy().transpose(node.attributes.get_ints("perm"))
            tensor = ir.tensor(turned, name=str(node.outputs[0].name))
            made = ir.Value(name=tensor.name, type=value.type, shape=ir.Shape(turned.shape), const_value=tensor)
            node.outputs[0].replace_all_uses_with(made)
            assert node.graph is not None
            node.graph.remove(node, safe=True)
            model.graph.register_initializer(made)


def _drop_axes(model: ir.Model) -> None:
    """Make scales and zero points of shape [1] that whole activations have of rank 0: the same numbers.

    With shape [1] ONNX Runtime refuses to load a QLinearAdd, and runs other operators in float.
    """
    made: dict[str, ir.Value] = {}
    for node in model.graph.all_nodes():
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or graphs.is_constant(node.inputs[0]):
            continue
        numbers = {i: graphs.constant(value) for i, value in enumerate(node.inputs) if i and value is not None}
        if "block_size" in node.attributes or any(n is None or n.shape != (1,) for n in numbers.values()):
            continue
        for index, number in numbers.items():
            name = str(node.inputs[index].name)  # type: ignore[union-attr]
            if name not in made and number is not None:
                made[name] = graphs.add_initializer(model.graph, f"{name}.of_all", number.reshape(()))
            node.replace_input_with(index, made[name])
        node.attributes.pop("axis", None)


def _raise_opset(model: ir.Model, wanted: int, least: int, notes: list[str]) -> ir.Model:
    """Return the model at opset `wanted`, or where no converter reaches that, at `least` or its own, with a note.

    Raises ModelError where no converter reaches `least`."""
    own = graphs.opset(model)
    if own >= wanted:
        return model
    tried = [wanted] if own >= least else [wanted, least]
    for version in tried:
        converted = model.clone()
        try:
            version_converter.convert_version(converted, version, fallback=True)
        except Exception as error:
            logger.info("no conversion from opset %d to %d: %s", own, version, error)
            continue
        if graphs.opset(converted) == version:
            if version != wanted:
                notes.append(_lower_opset(own, wanted, version))
            return converted
    if own >= least:
        notes.append(_lower_opset(own, wanted, own))
        return model
    raise ModelError(f"opset {own}: no converter raises this model to opset {least}, the lowest one with quantized "
                     "channels; export it again at a newer opset")  # fmt: skip


def _lower_opset(own: int, wanted: int, got: int) -> str:
    return f"no converter raises this model from opset {own} to {wanted}: it is written at opset {got}, weights as INT8"
