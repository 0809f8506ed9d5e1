"""List the layers of a graph: every operator with a constant weight, or the reason why it is no layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from comq_onnx.errors import NothingToQuantize, OptionError, did_you_mean
from comq_onnx.model import graph as graphs
from comq_onnx.model.graph import HALF
from comq_onnx.model.judged import Judged, judged
from comq_onnx.model.normalized import is_normalized
from comq_onnx.model.op_kind import MIN_WEIGHTS, NotQuantizable, OpKind
from comq_onnx.model.operators import MatMulLeft, kinds_of
from comq_onnx.model.quantized import is_column, quantized_weight
from comq_onnx.model.recurrent import LENGTHS, given

# operators that only rearrange, join or retype a weight on its way to a layer
WEIGHT_CHAIN = frozenset(
    {"Identity", "Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Slice"}
)
# operators for which a constant is no weight: adding or scaling by one is no layer
_ELEMENTWISE = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "Concat", "Slice", "Expand", "Identity", "Cast",
        "Pad", "Resize", "ScatterND", "GatherElements", "Reshape", "Transpose", "Unsqueeze", "Squeeze",
        "QuantizeLinear", "DequantizeLinear",
    }
)  # fmt: skip

# operators whose large constants are no weights: the cosines and sines of rotary positions
_ROTARY = frozenset({"GroupQueryAttention", "RotaryEmbedding", "SparseAttention", "PagedAttention"})


@dataclass(frozen=True)
class Layer:
    """Describe one operator with a constant weight, by names in the graph.

    An operator with two weights, such as an LSTM, is two layers.

    name: the node's (unique) name, with `part` behind it.
    op: its operator.
    kind: what the operator computes.
    input, output: the values that it reads and makes. A layer that reads the state of its own node names as its input
        the node's output that holds all states.
    weight, bias: the initializers; bias is None where there is none to change.
    bias_node: the node that adds the bias: the layer's own for Conv and Gemm, the Add behind a MatMul.
    has_bias: a bias can take up a shift of the outputs, also one that must be made for it.
    is_normalized: a normalization reads the outputs, so that a shift of all is all that is left of small ones: no bias
        takes it.
    nested: the node lies in a subgraph.
    in_branch: it lies in a branch of an If, and in nothing that runs more than once.
    part: tells the layers of one node apart (".W", ".R"); "" where the node is one layer.
    """

    name: str
    op: str
    kind: OpKind
    input: str
    output: str
    weight: str
    bias: str | None = None
    bias_node: str | None = None
    has_bias: bool = False
    is_normalized: bool = False
    nested: bool = False
    in_branch: bool = False
    part: str = ""

    @property
    def node(self) -> str:
        """Return the name of the node."""
        return self.name.removesuffix(self.part)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Return the shape of the weight as the graph holds it."""
        return self.kind.weight_shape


@dataclass(frozen=True)
class Prepared:
    """Hold a model ready to be quantized, and its layers.

    model: the graph; its layers are `layers`, in topological order.
    skipped: the reason for each operator with a weight that is left as it is, by the node's name.
    notes: remarks for the report.
    declared: the dimensions that the source declares for each output; the graph may know more of them.
    """

    model: ir.Model
    layers: list[Layer]
    skipped: dict[str, str]
    notes: list[str] = field(default_factory=list)
    declared: tuple[ir.Shape | None, ...] = ()

    @cached_property
    def judged(self) -> Judged:
        """Return the values by which the model is judged once it is quantized."""
        return judged(self.model)

    @property
    def opset(self) -> int:
        """Return the version of the standard operators."""
        return graphs.opset(self.model)

    def weight(self, layer: Layer) -> np.ndarray[Any, Any]:
        """Return the layer's weight as a stack of matrices [groups, out, in], float32."""
        tensor = self.model.graph.initializers[layer.weight].const_value
        assert tensor is not None
        matrix = layer.kind.to_matrix(tensor.numpy())
        return np.ascontiguousarray(matrix, dtype=np.float32)


def list_layers(model: ir.Model) -> tuple[list[Layer], dict[str, str]]:
    """List the layers of the model, subgraphs included, and the reason for each operator with a weight that is none."""
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    branches = {id(branch) for branch in graphs.branches(model.graph)}
    for node in model.graph.all_nodes():
        idle = _idle_weight(node)
        for part in kinds_of(node) or [""]:
            name = f"{node.name}{part}"
            codes = quantized_weight(node, part)
            if codes is not None:
                skipped[name] = f"{node.op_type}: its weight is quantized already ({codes})"
                continue
            try:
                layer = _as_layer(node, part, node.graph is not model.graph, id(node.graph) in branches)
            except NotQuantizable as reason:
                skipped[name] = f"{node.op_type}: {reason}"
                continue
            if layer is not None:
                layers.append(layer)
            elif idle >= MIN_WEIGHTS and not part:
                skipped[name] = f"{node.op_type}: not a kind of layer that is quantized ({idle:,} weights stay float)"
    return layers, skipped


def reaches_layer(value: ir.Value) -> bool:
    """Tell whether a value becomes a layer's weight, directly or behind operators of WEIGHT_CHAIN."""
    for user, index in value.uses():
        if index in _weight_places(user):
            return True
        if user.op_type in WEIGHT_CHAIN and user.domain == "" and reaches_layer(user.outputs[0]):
            return True
    return False


def _weight_places(node: ir.Node) -> Sequence[int]:
    """Return the places of weights among a node's inputs."""
    return (0, 1) if node.op_type == "MatMul" else [kind.weight_index for kind in kinds_of(node).values()]


def select(prepared: Prepared, include: Sequence[str], exclude: Sequence[str]) -> Prepared:
    """Keep the layers whose name matches an `include` (all, where none is given) and no `exclude`; skip the rest.

    Raises OptionError for a pattern that is no regular expression or matches no layer, NothingToQuantize where no layer
    is left.
    """
    wanted = _matcher(include, prepared.layers, "--include")
    unwanted = _matcher(exclude, prepared.layers, "--exclude")
    layers, skipped = [], dict(prepared.skipped)
    for layer in prepared.layers:
        if include and not wanted(layer.name):
            skipped[layer.name] = f"{layer.op}: matches no --include"
        elif unwanted(layer.name):
            skipped[layer.name] = f"{layer.op}: excluded by --exclude"
        else:
            layers.append(layer)
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise NothingToQuantize(
            "the model has no layer to quantize (MatMul, Gemm, Conv, ConvTranspose, Gather, LSTM, GRU or RNN with a "
            f"constant weight of {MIN_WEIGHTS} numbers or more)" + (f"; left out: {reasons}" if reasons else "")
        )
    return replace(prepared, layers=layers, skipped=skipped)


def calibrated(layers: Sequence[Layer]) -> Iterator[Layer]:
    """Return the layers that need calibration: all but lookups."""
    return (layer for layer in layers if not layer.kind.is_lookup)


def layers_of_nodes(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Return the layers of each node, by the name of the node."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.node, []).append(layer)
    return found


def nodes_by_name(model: ir.Model) -> dict[str, ir.Node]:
    """Return every node, subgraphs included, by its (unique) name."""
    return {str(node.name): node for node in model.graph.all_nodes()}


def compile_pattern(pattern: str, option: str) -> re.Pattern[str]:
    """Compile a regular expression that `option` was given. Raises OptionError where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(f"{option} {pattern!r} is not a regular expression: {error}") from error


def no_match(option: str, given: str, pattern: str, names: Sequence[str]) -> str:
    """Say that a pattern matches none of these layers, and name the layer, or the part of a name, nearest to it.

    option, given: the option and its value, as the message shows them."""
    other_case = [name for name in names if re.search(pattern, name, re.IGNORECASE)]
    parts = [part for name in names for part in (name, *re.split(r"[/.:]", name)) if part]
    hint = f"; did you mean {other_case[0]}?" if other_case else did_you_mean(pattern.strip("^$"), parts)
    return f"{option} {given} matches none of {len(names)} layers; see --plan for their names{hint}"


def _as_layer(node: ir.Node, part: str, nested: bool, in_branch: bool) -> Layer | None:
    """Return a weight of a node as a layer; None where it has none of its own. Raises NotQuantizable with the reason.

    part: which of the node's weights, as OP_KINDS names it
    nested, in_branch: where the node lies, as a layer tells it
    """
    factory = kinds_of(node).get(part)
    if factory is None:
        return None
    if node.op_type == "MatMul" and not graphs.is_constant(node.inputs[1]) and graphs.is_constant(node.inputs[0]):
        factory = MatMulLeft
    weight = node.inputs[factory.weight_index]
    if weight is None or not graphs.is_constant(weight):
        _check_other_weights(node)
        return None
    kind = _kind_of(factory, node, weight)
    if nested and kind.is_recurrent and given(node, LENGTHS) is not None:
        raise NotQuantizable("it is in a subgraph, and its sequences have lengths of their own")
    source = node.inputs[kind.input_index]
    if source is None or graphs.is_constant(source):
        raise NotQuantizable("its input is constant")
    bias, bias_node, has_bias = _own_bias(node, kind) if kind.bias_index is not None else _added_bias(node, kind)
    normalized = is_normalized(node.outputs[0])
    read = node.outputs[0] if kind.reads_own_output else source
    return Layer(
        name=f"{node.name}{part}",
        op=node.op_type,
        kind=kind,
        input=str(read.name or f"{node.name}.states"),
        output=str(node.outputs[0].name),
        weight=str(weight.name),
        bias=bias,
        bias_node=bias_node,
        has_bias=has_bias and not normalized,
        is_normalized=normalized,
        nested=nested,
        in_branch=in_branch,
        part=part,
    )


def _kind_of(factory: type[OpKind], node: ir.Node, weight: ir.Value) -> OpKind:
    """Read a node with a constant weight. Raises NotQuantizable where that is none that is worth to be quantized."""
    tensor = weight.const_value
    assert tensor is not None
    if tensor.dtype not in (ir.DataType.FLOAT, *HALF):
        raise _wrong_type(tensor.dtype)
    kind = factory.of(node, tuple(tensor.shape.numpy()))
    if is_column(node, tensor):
        raise NotQuantizable("one number a row, for which a scale would take as much")
    if tensor.size < MIN_WEIGHTS:
        raise NotQuantizable(f"only {tensor.size} weights, too few to matter")
    return kind


def _check_other_weights(node: ir.Node) -> None:
    """Raise NotQuantizable for an operator that has a weight, but none that is constant and in its place."""
    if node.op_type in ("Conv", "ConvTranspose", "LSTM", "GRU", "RNN"):
        raise NotQuantizable("its weight is computed at run time")
    if node.op_type == "Gemm" and graphs.is_constant(node.inputs[0]):
        raise NotQuantizable("its weight stands on the left")


def _wrong_type(dtype: ir.DataType) -> NotQuantizable:
    if dtype == ir.DataType.DOUBLE:
        return NotQuantizable("its weights are float64; export the model in float32")
    return NotQuantizable(f"its weights are {dtype.name}")


# the bias initializer, the node that adds it, and whether a bias can take up a shift of the outputs
_Bias = tuple[str | None, str | None, bool]
_NO_BIAS: _Bias = (None, None, False)


def _own_bias(node: ir.Node, kind: OpKind) -> _Bias:
    """Find the bias among the inputs of a node: one number per output channel.

    A recurrent node without one gets none: it would be as large as that of both its weights.
    """
    assert kind.bias_index is not None
    bias = node.inputs[kind.bias_index] if len(node.inputs) > kind.bias_index else None
    if bias is None:
        return _NO_BIAS if kind.is_recurrent else (None, str(node.name), True)
    if not graphs.is_constant(bias) or bias.const_value is None or kind.beta == 0:
        return _NO_BIAS
    if not kind.fits_bias(tuple(bias.const_value.shape.numpy())):
        return _NO_BIAS
    return str(bias.name), str(node.name), True


def _added_bias(node: ir.Node, kind: OpKind) -> _Bias:
    """Find the bias that an Add, the only reader of a MatMul, adds behind it: one number per output channel."""
    if not kind.is_matrix or node.outputs[0].is_graph_output():
        return _NO_BIAS
    users = list(node.outputs[0].uses())
    if len(users) != 1 or users[0][0].op_type != "Add" or users[0][0].graph is not node.graph:
        return _NO_BIAS
    add = users[0][0]
    bias = add.inputs[1 - users[0][1]]
    if not graphs.is_constant(bias) or bias is None or bias.const_value is None:
        return _NO_BIAS
    shape, rank = bias.const_value.shape, _rank(node.outputs[0])
    if bias.const_value.size != kind.outputs or not shape or shape[-1] != kind.outputs:
        return _NO_BIAS
    # axes of one in front must not be what gives the sum its rank
    if len(shape) > (2 if rank is None else rank):
        return _NO_BIAS
    return str(bias.name), str(add.name), True


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _idle_weight(node: ir.Node) -> int:
    """Count the numbers of the largest float constant of rank 2 or more that a node reads as a weight; 0 for none."""
    sizes = [
        value.const_value.size
        for value in node.inputs
        if value is not None
        and graphs.is_constant(value)
        and value.const_value is not None
        and value.const_value.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE, *HALF)
        and len(value.const_value.shape) >= 2
    ]
    return max(sizes, default=0) if node.op_type not in _ELEMENTWISE | _ROTARY else 0


def _matcher(patterns: Sequence[str], layers: Sequence[Layer], option: str) -> Callable[[str], bool]:
    """Return a test of names by patterns, each of which must match a layer. Raises OptionError."""
    compiled = [compile_pattern(p, option) for p in patterns]
    for expression in compiled:
        if not any(expression.search(layer.name) for layer in layers):
            names = [layer.name for layer in layers]
            raise OptionError(no_match(option, repr(expression.pattern), expression.pattern, names))
    return lambda name: any(expression.search(name) for expression in compiled)
