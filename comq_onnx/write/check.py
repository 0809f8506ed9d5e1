"""Check a written model: every planned layer is quantized, no float weight is left, every rule of its target is kept.

`check_emitted` compares a model with its plan before the file gets its name. `lint` checks any QDQ model for what a
target does not read, or would run in float without a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx.context import Context
from comq_onnx.errors import InternalError
from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer, nodes_by_name
from comq_onnx.plan.forms import WeightForm
from comq_onnx.plan.solved import Solved
from comq_onnx.solve.grid import QuantizedWeight
from comq_onnx.targets.target import Target
from comq_onnx.write.activations import QUANTIZES, is_of_source
from comq_onnx.write.nbits import LOOKUP, PRODUCT, stored_codes
from comq_onnx.write.weights import channel_scale

Numbers = npt.NDArray[Any]
# the number of findings that one line names at most
MOST_NAMED = 3
OTHER_CODES = "reads other codes than were solved for"
INTEGERS = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.INT2)
# the nodes that may stand between the codes of a weight and its layer: they unpack constants
_UNPACKING = frozenset(
    {"Cast", "DequantizeLinear", "Mul", "Sub", "Gather", "Reshape", "Slice", "BitwiseOr", "Transpose", "Expand"}
)


def check_emitted(model: ir.Model, solved: Solved) -> None:
    """Raise InternalError where a written model is not what was planned or breaks a rule of its target."""
    found = [*missing(model, solved), *lint(model, solved.plan.target, ours_alone=True)]
    if found:
        more = f"; {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise InternalError(
            f"a fault of comq-onnx, nothing was written: the quantized model is not as planned "
            f"({'; '.join(found[:MOST_NAMED])}{more}); please report it with the model"
        )


# Against the plan
# ----------------------------------------------------------------------------------------------------------------------


def missing(model: ir.Model, solved: Solved) -> list[str]:
    """List what a model lacks of its plan, a line for each finding.

    Finds layers whose weight is not made of the solution's codes, float weights that are left, and activations without
    their pair of QuantizeLinear and DequantizeLinear.
    """
    nodes = nodes_by_name(model)
    found = []
    for layer in solved.plan.layers:
        node = nodes.get(layer.node) or nodes.get(f"{layer.name}.matmul")
        if solved.plan.form(layer) is WeightForm.LOOKED_UP:
            node = nodes.get(f"{layer.name}.rows")
        fault = "has no node" if node is None else _fault(node, layer, solved)
        if fault:
            found.append(f"layer {layer.name!r} {fault}")
    return [*found, *_left_weights(model, solved), *_unquantized(model, solved)]


def _unquantized(model: ir.Model, solved: Solved) -> Iterator[str]:
    """Name the planned activations that are not quantized, or not for all their readers."""
    pairs = {node.meta[QUANTIZES]: node for node in model.graph.all_nodes() if QUANTIZES in node.meta}
    values = {str(v.name): v for v in graphs.walk_values(model)}
    for name, planned in solved.plan.activations.values.items():
        pair = pairs.get(name)
        if pair is None or pair.op_type != "QuantizeLinear":
            # the source may have it dequantized
            if planned.given is None or not _dequantized(values.get(name)):
                yield f"activation {name!r} is not quantized"
            continue
        raw = pair.inputs[0]
        assert raw is not None
        if planned.everywhere and any(reader is not pair for reader, _ in raw.uses()):
            yield f"activation {name!r} is read before it is quantized"


def _fault(node: ir.Node, layer: Layer, solved: Solved) -> str:
    """Say what is wrong with the node of a layer; "" where nothing is."""
    form = solved.plan.form(layer)
    # a Gemm in blocks has become a MatMul; rows that are looked up are a product of codes and scales
    index = 0 if form is WeightForm.LOOKED_UP else 1 if form is WeightForm.BLOCKED else layer.kind.weight_index
    weight = node.inputs[index]
    solution = solved.solutions[layer.name].weight
    container, planes = solved.plan.container(layer, solved.plan.bits[layer.name])
    table = solved.table_of(layer)
    stored_as = layer if table is None else table
    codes = [v for v in _constants_behind(weight) if str(v.name).startswith(f"{stored_as.weight}.codes")]
    types = {v.dtype for v in codes}
    is_nbits = node.op_type in (PRODUCT, LOOKUP)
    wanted = ir.DataType.UINT8 if planes or is_nbits else ir.DataType[container]
    if len(codes) != max(1, len(planes)) or types != {wanted}:
        stored = ", ".join(sorted(t.name for t in types if t is not None)) or "no codes"
        return f"reads {stored} where {wanted.name} was planned"
    numbers = graphs.constant(codes[0])
    if is_nbits:
        same = numbers is not None and np.array_equal(stored_codes(node, numbers), solution.codes[0])
        return "" if same else OTHER_CODES
    last = None if weight is None else weight.producer()
    if form in (WeightForm.INTEGER, WeightForm.BLOCKED) and (last is None or last.op_type != "DequantizeLinear"):
        return "does not read its weight from a DequantizeLinear"
    if not planes and (
        numbers is None or not _same_codes(numbers, last, stored_as, solved.plan.form(stored_as), solution)
    ):
        return OTHER_CODES
    if form is WeightForm.INTEGER and not _dequantized(node.inputs[layer.kind.input_index]):
        return "reads an input that is not quantized"
    return ""


def _same_codes(stored: Numbers, last: ir.Node | None, layer: Layer, form: WeightForm, weight: QuantizedWeight) -> bool:
    """Tell whether the stored codes are those of the solution.

    A channel of an integer layer may have other codes where a large bias gave it another scale.

    last: the node that the layer reads its weight from
    """
    codes = stored.astype(np.int8)
    if form in (WeightForm.LOOKED_UP, WeightForm.BLOCKED):
        codes = (codes.T if form is WeightForm.BLOCKED else codes)[None]
    else:
        codes = layer.kind.to_matrix(codes.reshape(layer.weight_shape))
    if codes.shape != weight.codes.shape:
        return False
    same = (codes == weight.codes).all(axis=-1)
    if form is WeightForm.INTEGER and last is not None and not same.all():
        scale = graphs.constant(last.inputs[1])
        planned = channel_scale(weight)
        if scale is not None and scale.size in (1, same.size):
            same |= np.broadcast_to(scale != planned, same.size).reshape(same.shape)
    return bool(same.all())


def _dequantized(value: ir.Value | None) -> bool:
    """Tell whether a value comes from a DequantizeLinear of codes that are no constant."""
    last = None if value is None else value.producer()
    if last is None or last.op_type != "DequantizeLinear" or last.inputs[0] is None:
        return False
    return not graphs.is_constant(last.inputs[0])


def _constants_behind(value: ir.Value | None) -> list[ir.Value]:
    """Return the initializers that a weight is unpacked from."""
    pending, found, seen = [value], [], set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        producer = current.producer()
        if producer is None:
            found.append(current)
        elif producer.op_type in _UNPACKING:
            pending += producer.inputs
    return [v for v in found if graphs.is_constant(v)]


def _left_weights(model: ir.Model, solved: Solved) -> Iterator[str]:
    """Name the float weights of quantized layers that are still in the model, and that nothing else reads."""
    own = {layer.node for layer in solved.plan.layers}
    for name in dict.fromkeys(layer.weight for layer in solved.plan.layers):
        value = model.graph.initializers.get(name)
        if value is None:
            continue
        readers = {str(node.name) for node, _ in value.uses()}
        if not readers or readers & own:
            yield f"the float weight {name!r} is left"


# Against the rules of a target
# ----------------------------------------------------------------------------------------------------------------------


def warn_of_source(model: ir.Model, context: Context) -> None:
    """Warn of nodes of the source itself that another runtime than ONNX Runtime does not read, or runs in float."""
    target = context.target
    found = [fault for node in _pairs(model) for fault in _faults(node, target)] if target.runs_outside_ort else []
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        context.journal.warnings.append(
            f"the source itself breaks rules of {target.name}, and this is left as it is: {found[0]}{more}"
        )


def lint(model: ir.Model, target: Target, ours_alone: bool = False) -> list[str]:
    """List the rules of a target that a QDQ model breaks, a line for each finding; [] where it keeps them all.

    Checks versions, containers, scales, zero points, the axes of weights and the form of biases.

    ours_alone: leave out the nodes that the source had
    """
    opset = graphs.opset(model)
    found = []
    if not target.min_opset <= opset <= target.max_opset:
        found.append(f"opset {opset}: {target.name} reads {target.min_opset} to {target.max_opset}")
    if model.ir_version > target.max_ir:
        found.append(f"IR version {model.ir_version}: {target.name} reads up to {target.max_ir}")
    for node in _pairs(model):
        if not (ours_alone and is_of_source(node)):
            found += _faults(node, target)
    return found


def _pairs(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every QuantizeLinear and DequantizeLinear."""
    for node in model.graph.all_nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain in ("", "ai.onnx"):
            yield node


def _faults(node: ir.Node, target: Target) -> list[str]:
    return [f"{node.op_type} {node.name!r}: {fault}" for fault in _pair_faults(node, target)]


def _pair_faults(node: ir.Node, target: Target) -> Iterator[str]:
    """Find the faults of a QuantizeLinear or DequantizeLinear."""
    scale = _constant_scale(node.inputs[1])
    zero = graphs.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    quantized = node.inputs[0]
    is_activation = node.op_type == "QuantizeLinear" or (
        quantized is not None and quantized.producer() is not None and not _constants_only(quantized)
    )
    block = int(node.attributes["block_size"].value) if "block_size" in node.attributes else 0
    if scale is not None:
        signed = target.signed_scales and not is_activation
        yield from _scale_faults(node, np.abs(scale) if signed else scale, is_activation, block)
    if is_activation:
        yield from _activation_faults(zero, target)
    else:
        yield from _weight_faults(node, scale, zero, block, target)


def _scale_faults(node: ir.Node, scale: Numbers, is_activation: bool, block: int) -> Iterator[str]:
    """Find the faults of a scale; block: the size of its blocks, 0 where it has none."""
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield "scales must be finite and above 0"
    if is_activation and scale.ndim and (node.op_type == "QuantizeLinear" or _has_integer_reader(node)):
        yield f"an activation's scale has rank {scale.ndim}; only rank 0 runs in integers"
    if scale.ndim > 1 and not block:
        yield f"scales of rank {scale.ndim} without blocks"
    if scale.ndim == 1 and scale.shape == (1,) and not is_activation and not block:
        codes = _stored(node.inputs[0])
        channels = codes.shape[_axis(node, codes)] if codes is not None and codes.shape else 1
        if channels != 1:
            yield "one scale for all is of rank 0, never of shape [1]"


def _has_integer_reader(node: ir.Node) -> bool:
    """Tell whether a reader of what a node dequantizes has a quantized weight too, and so should run in integers."""
    makers = [v.producer() for reader, _ in node.outputs[0].uses() for v in reader.inputs[1:2] if v is not None]
    return any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)


def _activation_faults(zero: Numbers | None, target: Target) -> Iterator[str]:
    """Find the faults of the zero point of an activation."""
    allowed = [dtype for dtype in (target.activation, target.wide_activation) if dtype is not None]
    if not allowed:
        yield f"{target.name} takes no quantized activations"
    elif zero is None:
        yield "an activation needs its zero point written"
    elif str(zero.dtype) not in allowed:
        yield f"activations are {zero.dtype}; {target.name} takes {' or '.join(allowed)}"
    elif zero.dtype.kind == "i" and zero.any():
        yield f"a zero point of {int(zero.reshape(-1)[0])}; signed activations have 0"


def _weight_faults(
    node: ir.Node, scale: Numbers | None, zero: Numbers | None, block: int, target: Target
) -> Iterator[str]:
    """Find the faults of the DequantizeLinear of a weight or a bias; block: the size of its blocks, 0 without."""
    codes = _stored(node.inputs[0])
    dtype = None if codes is None else codes.dtype
    if dtype == ir.DataType.INT32:
        if not target.integer_bias:
            yield f"an int32 bias; {target.name} takes float ones"
        return
    if zero is not None and zero.astype(int).any() and not target.weight_zero_points:
        yield f"a weight's zero point other than 0; {target.name} takes none"
    held = {name for storage in (target.integer, target.weight_only) for _, name, _ in storage.containers}
    if dtype in INTEGERS and dtype is not None and dtype.name not in held:
        yield f"{dtype.name} weights; {target.name} takes {', '.join(sorted(held))}"
    if codes is None or codes.shape is None or scale is None:
        return
    yield from _axis_faults(node, codes, scale, block, target)


def _axis_faults(node: ir.Node, codes: ir.Value, scale: Numbers, block: int, target: Target) -> Iterator[str]:
    """Find scales that do not fit the shape of the codes of a weight, or lie along another axis than its channels."""
    shape = [int(d) for d in codes.shape or () if isinstance(d, int)]
    axis = _axis(node, codes)
    if block:
        blocks = -(-shape[axis] // block)
        if scale.shape != tuple(blocks if i == axis else d for i, d in enumerate(shape)):
            yield f"scales of shape {list(scale.shape)} do not fit blocks of {block} in {shape} along axis {axis}"
        if not target.takes_blocks(shape[axis], block):
            yield f"blocks of {block} do not fill {shape[axis]} inputs, or do so once; {target.name} wants two or more"
    elif scale.ndim == 1:
        if scale.shape[0] != shape[axis]:
            yield f"{scale.shape[0]} scales for {shape[axis]} channels along axis {axis}"
        for reader, index in node.outputs[0].uses():
            wanted = _channel_axis(reader, index, len(shape))
            if wanted is not None and axis != wanted:
                yield f"scales along axis {axis} of a {reader.op_type}'s weight, whose channels are axis {wanted}"


def _channel_axis(reader: ir.Node, index: int, rank: int) -> int | None:
    """Return the axis of output channels of a weight as input `index` of its reader; None where any axis will do."""
    if reader.op_type == "Conv" and index == 1:
        return 0
    if reader.op_type == "Gemm" and index == 1:
        transposed = reader.attributes.get("transB")
        return 0 if transposed is not None and transposed.value else 1
    if reader.op_type == "MatMul":
        return rank - 1 if index == 1 else rank - 2
    return None


def _axis(node: ir.Node, quantized: ir.Value | None) -> int:
    """Return the axis of a QuantizeLinear or DequantizeLinear, counted from 0."""
    attribute = node.attributes.get("axis")
    axis = int(attribute.value) if attribute is not None else 1
    rank = len(quantized.shape) if quantized is not None and quantized.shape is not None else 0
    return axis + rank if axis < 0 else min(axis, max(rank - 1, 0))


def _constant_scale(value: ir.Value | None) -> Numbers | None:
    """Return the numbers of a scale: of an initializer, reshaped or not, or of the product of two.

    The scales of int32 biases are products.
    """
    if value is None or value.producer() is None:
        return graphs.constant(value)
    node = value.producer()
    if node is not None and node.op_type == "Reshape":
        scale, shape = _constant_scale(node.inputs[0]), graphs.constant(node.inputs[1])
        return None if scale is None or shape is None else scale.reshape(shape)
    parts = [] if node is None or node.op_type != "Mul" else [graphs.constant(v) for v in node.inputs]
    return parts[0] * parts[1] if len(parts) == 2 and parts[0] is not None and parts[1] is not None else None


def _stored(value: ir.Value | None) -> ir.Value | None:
    """Return the value of the stored codes: the input of the Cast that unpacks them at load, where there is one."""
    producer = None if value is None else value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value


def _constants_only(value: ir.Value) -> bool:
    """Tell whether a value is made only of constants, by nodes that unpack them."""
    producer = value.producer()
    if producer is None:
        return graphs.is_constant(value)
    return producer.op_type in _UNPACKING and all(v is None or _constants_only(v) for v in producer.inputs)
