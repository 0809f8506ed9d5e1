"""The layers of a graph: every operator with a constant weight, or the reason why it is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from comq_onnx.errors import ModelError, OptionError, did_you_mean
from comq_onnx.model import graph as graphs
from comq_onnx.model.graph import HALF
from comq_onnx.model.op_kind import NotQuantizable, OpKind
from comq_onnx.model.operators import OP_KINDS, Gather, Gemm, MatMul, MatMulLeft

# below this a layer's weights are no part of the file worth having, and its error is all cost
MIN_WEIGHTS = 128
# ops that only rearrange or retype a weight on its way to a layer
WEIGHT_CHAIN = frozenset({"Identity", "Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten"})


@dataclass(frozen=True)
class Layer:
    """One operator with a constant weight: names of its node, of its input value, weight and bias initializers.

    bias_node is the node that adds the bias: the layer's own for Conv and Gemm, the Add behind a MatMul. has_bias says
    that a bias can carry a shift, also one that must be made; nested, that the node lies in a subgraph.
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
    nested: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight as the graph holds it."""
        return self.kind.weight_shape  # type: ignore[attr-defined, no-any-return]


@dataclass
class Prepared:
    """A model ready to be quantized, its layers in topological order, the reasons for what is left, and remarks."""

    model: ir.Model
    layers: list[Layer]
    skipped: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def opset(self) -> int:
        """The standard operators' version."""
        return graphs.opset(self.model)

    def weight(self, layer: Layer) -> np.ndarray[Any, Any]:
        """The layer's weight as a stack of matrices [groups, out, in], float32."""
        tensor = self.model.graph.initializers[layer.weight].const_value
        assert tensor is not None
        matrix = layer.kind.to_matrix(tensor.numpy())
        return np.ascontiguousarray(matrix, dtype=np.float32)


def reaches_layer(value: ir.Value) -> bool:
    for user, index in value.uses():
        if user.op_type in OP_KINDS and user.domain == "" and index in ((0, 1) if user.op_type == "MatMul" else (1,)):
            return True
        if user.op_type in WEIGHT_CHAIN and user.domain == "" and reaches_layer(user.outputs[0]):
            return True
    return False


# Layers
# ----------------------------------------------------------------------------------------------------------------


def list_layers(model: ir.Model) -> tuple[list[Layer], dict[str, str]]:
    """The layers of the model, subgraphs included, and the reason for every operator with a weight that is none."""
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    for node in model.graph.all_nodes():
        name = str(node.name)
        try:
            layer = _as_layer(node, nested=node.graph is not model.graph)
        except NotQuantizable as reason:
            skipped[name] = f"{node.op_type}: {reason}"
            continue
        if layer is not None:
            layers.append(layer)
        elif (size := _idle_weight(node)) >= MIN_WEIGHTS:
            skipped[name] = f"{node.op_type}: not a kind of layer that is quantized ({size:,} weights stay float)"
    return layers, skipped


def _as_layer(node: ir.Node, nested: bool) -> Layer | None:
    """The layer a node is, None where it has no weight of its own. Raises NotQuantizable with the reason."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in OP_KINDS:
        return None
    factory: Any = OP_KINDS[node.op_type]
    weight_index = factory.weight_index
    if node.op_type == "MatMul" and not graphs.is_constant(node.inputs[1]) and graphs.is_constant(node.inputs[0]):
        factory, weight_index = MatMulLeft, 0
    weight = node.inputs[weight_index]
    if weight is None or not graphs.is_constant(weight):
        if node.op_type in ("Conv", "ConvTranspose"):
            raise NotQuantizable("its weight is computed at run time")
        if node.op_type == "Gemm" and graphs.is_constant(node.inputs[0]):
            raise NotQuantizable("its weight stands on the left")
        return None
    assert weight.const_value is not None
    shape = tuple(int(d) for d in weight.const_value.shape)
    kind: OpKind = (
        factory.of(node, shape) if weight.const_value.dtype in (ir.DataType.FLOAT, *HALF) else _wrong_type(weight)
    )
    if weight.const_value.size < MIN_WEIGHTS:
        raise NotQuantizable(f"only {weight.const_value.size} weights, too few to matter")
    source = node.inputs[kind.input_index]
    if source is None or graphs.is_constant(source):
        raise NotQuantizable("its input is constant")
    return Layer(
        str(node.name),
        node.op_type,
        kind,
        str(source.name),
        str(node.outputs[0].name),
        str(weight.name),
        *_bias(node, kind),
        nested,
    )


def _wrong_type(weight: ir.Value) -> OpKind:
    assert weight.const_value is not None
    if weight.const_value.dtype == ir.DataType.DOUBLE:
        raise NotQuantizable("its weights are float64; export the model in float32")
    raise NotQuantizable(f"its weights are {weight.const_value.dtype.name}")


def _bias(node: ir.Node, kind: OpKind) -> tuple[str | None, str | None, bool]:
    """(bias initializer, node that adds it, whether it can carry a shift)."""
    if kind.bias_index is not None:
        bias = node.inputs[kind.bias_index] if len(node.inputs) > kind.bias_index else None
        if bias is None:
            return None, str(node.name), True
        out = _outputs(node, kind)
        plain = graphs.is_constant(bias) and bias.const_value is not None and bias.const_value.size == out
        plain = plain and bias.const_value.shape[-1] == out  # type: ignore[union-attr]
        if isinstance(kind, Gemm) and kind.beta == 0:
            plain = False
        return (str(bias.name), str(node.name), True) if plain else (None, None, False)
    if not isinstance(kind, MatMul) or len(kind.weight_shape) != 2 or node.outputs[0].is_graph_output():
        return None, None, False
    users = list(node.outputs[0].uses())
    if len(users) != 1 or users[0][0].op_type != "Add" or users[0][0].graph is not node.graph:
        return None, None, False
    add = users[0][0]
    bias = add.inputs[1 - users[0][1]]
    if not graphs.is_constant(bias) or bias is None or bias.const_value is None:
        return None, None, False
    shape, rank = bias.const_value.shape, _rank(node.outputs[0])
    if bias.const_value.size != kind.weight_shape[-1] or not shape or shape[-1] != kind.weight_shape[-1]:
        return None, None, False
    # axes of one in front must not be what gives the sum its rank
    if len(shape) > (2 if rank is None else rank):
        return None, None, False
    return str(bias.name), str(add.name), True


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _outputs(node: ir.Node, kind: OpKind) -> int:
    shape = kind.weight_shape  # type: ignore[attr-defined]
    if isinstance(kind, Gemm):
        return int(shape[0] if kind.trans_b else shape[1])
    if node.op_type == "ConvTranspose":
        return int(shape[1] * kind.group)  # type: ignore[attr-defined]
    return int(shape[0])


def _idle_weight(node: ir.Node) -> int:
    """The most numbers in any float constant of rank 2 or more that a node reads."""
    sizes = [
        value.const_value.size
        for value in node.inputs
        if value is not None
        and graphs.is_constant(value)
        and value.const_value is not None
        and value.const_value.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE, *HALF)
        and len(value.const_value.shape) >= 2
    ]
    # adding or scaling by a constant is no layer
    return max(sizes, default=0) if node.op_type not in _ELEMENTWISE else 0


_ELEMENTWISE = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "Concat", "Slice", "Expand", "Identity", "Cast",
        "Pad", "Resize", "ScatterND", "GatherElements", "Reshape", "Transpose", "Unsqueeze", "Squeeze",
    }
)  # fmt: skip


def select(prepared: Prepared, include: Sequence[str], exclude: Sequence[str]) -> Prepared:
    """Keep the layers whose name matches an `include` (all, where none is given) and no `exclude`; the rest is skipped.

    Raises OptionError for a pattern that is no regular expression or matches no layer, ModelError where nothing is
    left.
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
        raise ModelError(
            "the model has no layer to quantize (MatMul, Gemm, Conv, ConvTranspose or Gather with a constant weight"
            f" of {MIN_WEIGHTS} numbers or more)" + (f"; left out: {reasons}" if reasons else "")
        )
    return Prepared(prepared.model, layers, skipped, prepared.notes)


def _matcher(patterns: Sequence[str], layers: Sequence[Layer], option: str) -> Callable[[str], bool]:
    compiled = [compile_pattern(p, option) for p in patterns]
    for expression in compiled:
        if not any(expression.search(layer.name) for layer in layers):
            names = [layer.name for layer in layers]
            raise OptionError(no_match(option, repr(expression.pattern), expression.pattern, names))
    return lambda name: any(expression.search(name) for expression in compiled)


def no_match(option: str, given: str, pattern: str, names: Sequence[str]) -> str:
    """What is wrong with a pattern that matches none of these layers, with the layer or the part of a name nearest to
    it."""
    other_case = [name for name in names if re.search(pattern, name, re.IGNORECASE)]
    parts = [part for name in names for part in (name, *re.split(r"[/.:]", name)) if part]
    hint = f"; did you mean {other_case[0]}?" if other_case else did_you_mean(pattern.strip("^$"), parts)
    return f"{option} {given} matches none of {len(names)} layers; see --plan for their names{hint}"


def compile_pattern(pattern: str, option: str) -> re.Pattern[str]:
    """A regular expression from the command line. Raises OptionError."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(f"{option} {pattern!r} is not a regular expression: {error}") from error


def nodes_by_name(model: ir.Model) -> dict[str, ir.Node]:
    """Every node, subgraphs included, by its (unique) name."""
    return {str(node.name): node for node in model.graph.all_nodes()}


def calibrated(layers: Sequence[Layer]) -> Iterator[Layer]:
    """The layers that need calibration: all but embeddings."""
    return (layer for layer in layers if not isinstance(layer.kind, Gather))
