"""Change the bytes of a file, or a few things in a parsed model, by seeded choices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import onnx
from _fuzz_models import FLOATS, NAMES, NUMBERS, Dice, nodes_of
from onnx import AttributeProto, TensorProto, helper, numpy_helper

OFTEN = (b"\xff", b"\x00", b"\x80\x80\x80\x80\x10", b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x0a\x00")


def mutate_bytes(data: bytes, dice: Dice, other: bytes) -> bytes:
    """Change a few of a file's bytes; `other` is a file to take bytes from."""
    changed = bytearray(data)
    for _ in range(dice.times()):
        at, length = dice.below(len(changed)), 1 + dice.below(64)
        what = dice.below(8)
        if what == 0 and changed:
            changed[at] ^= 1 << dice.below(8)
        elif what == 1:
            del changed[at : at + length]
        elif what == 2:
            changed[at:at] = changed[at : at + length]
        elif what == 3:
            changed[at : at + 1] = dice.pick(OFTEN)
        elif what == 4:
            changed[at : at + length] = bytes(dice.rng.integers(0, 256, length, np.uint8))
        elif what == 5 and dice.below(4) == 0:
            del changed[at:]
        elif what == 6:
            start = dice.below(len(other))
            changed[at:at] = other[start : start + length]
        elif what == 7 and changed:
            changed[at] = dice.pick((0, 1, 0x7F, 0x80, 0xFF))
    return bytes(changed)


def mutate_model(model: onnx.ModelProto, dice: Dice) -> None:
    """Change a few things in a parsed model."""
    for _ in range(dice.times()):
        with contextlib.suppress(ValueError, IndexError, TypeError, OverflowError):
            dice.pick(MODEL_MUTATIONS)(model, dice)


def _drop_node(model: onnx.ModelProto, dice: Dice) -> None:
    del model.graph.node[dice.below(len(model.graph.node))]


def _copy_node(model: onnx.ModelProto, dice: Dice) -> None:
    model.graph.node.append(dice.pick(model.graph.node))


def _other_op(model: onnx.ModelProto, dice: Dice) -> None:
    ops = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "Add", "Reshape", "Loop", "Softmax", "Where", "Nope",
           "", "QuantizeLinear", "LSTM", "Resize", "Einsum", "Identity", "ConstantOfShape", "NonZero",
           "Range")  # fmt: skip
    dice.pick(nodes_of(model.graph)).op_type = dice.pick(ops)


def _other_input(model: onnx.ModelProto, dice: Dice) -> None:
    node = dice.pick(nodes_of(model.graph))
    names = [*NAMES, *(o for n in nodes_of(model.graph) for o in (*n.output, *n.input))]
    node.input[dice.below(len(node.input))] = dice.pick(names)


def _less_inputs(model: onnx.ModelProto, dice: Dice) -> None:
    node = dice.pick(nodes_of(model.graph))
    del node.input[dice.below(len(node.input))]


def _other_output(model: onnx.ModelProto, dice: Dice) -> None:
    node = dice.pick(nodes_of(model.graph))
    names = [*NAMES, *(o for n in nodes_of(model.graph) for o in n.output)]
    node.output[dice.below(len(node.output))] = dice.pick(names)


def _rename(model: onnx.ModelProto, dice: Dice) -> None:
    """Give a value, wherever it stands, or a node an odd name."""
    new = dice.pick(NAMES)
    if dice.below(2):
        dice.pick(nodes_of(model.graph)).name = new
        return
    old = dice.pick([o for n in model.graph.node for o in (*n.output, *n.input)])
    for node in nodes_of(model.graph):
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                values[i] = new if value == old else value
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = new if value.name == old else value.name


def _other_dims(model: onnx.ModelProto, dice: Dice) -> None:
    tensor = dice.pick(model.graph.initializer)
    what = dice.below(4)
    if what == 0:
        tensor.dims[dice.below(len(tensor.dims))] = dice.pick(NUMBERS)
    elif what == 1:
        tensor.dims.append(dice.pick((0, 1, 2, 2**40)))
    elif what == 2:
        del tensor.dims[0]
    else:
        tensor.dims[:] = list(reversed(tensor.dims))


def _other_type(model: onnx.ModelProto, dice: Dice) -> None:
    types = [*TensorProto.DataType.values(), 99]
    if dice.below(2):
        dice.pick(model.graph.initializer).data_type = dice.pick(types)
    else:
        value = dice.pick([*model.graph.input, *model.graph.output])
        value.type.tensor_type.elem_type = dice.pick(types)


def _other_data(model: onnx.ModelProto, dice: Dice) -> None:
    tensor = dice.pick(model.graph.initializer)
    what = dice.below(4)
    if what == 0:
        tensor.raw_data = tensor.raw_data[: dice.below(len(tensor.raw_data))]
    elif what == 1:
        tensor.ClearField("raw_data")
    elif what == 2:
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[dice.below(array.size)] = dice.pick(FLOATS)
        tensor.raw_data = array.tobytes()
    else:
        array = numpy_helper.to_array(tensor)
        tensor.raw_data = (array * np.float32(dice.pick((0, 1e-30, 1e30, -1, 1e-3, 1e3)))).astype(array.dtype).tobytes()


def _other_attribute(model: onnx.ModelProto, dice: Dice) -> None:
    node = dice.pick([n for n in nodes_of(model.graph) if n.attribute])
    attribute = dice.pick(node.attribute)
    if attribute.type == AttributeProto.INTS and attribute.ints:
        attribute.ints[dice.below(len(attribute.ints))] = dice.pick(NUMBERS)
        if dice.below(3) == 0:
            attribute.ints.append(1)
    elif attribute.type == AttributeProto.INT:
        attribute.i = dice.pick(NUMBERS)
    else:
        attribute.type = dice.pick(AttributeProto.AttributeType.values())


def _more_attributes(model: onnx.ModelProto, dice: Dice) -> None:
    node = dice.pick(nodes_of(model.graph))
    name = dice.pick(
        ("axis", "group", "strides", "alpha", "beta", "transA", "auto_pad", "nope", "kernel_shape", "pads")
    )
    value = dice.pick((dice.pick(NUMBERS), dice.pick(FLOATS), [0, 0], [1, 1, 1, 1], "SAME_UPPER", b"\xff\xfe"))
    node.attribute.append(helper.make_attribute(name, value))


def _versions(model: onnx.ModelProto, dice: Dice) -> None:
    what = dice.below(4)
    if what == 0:
        model.opset_import[0].version = dice.pick((*range(1, 28), *NUMBERS))
    elif what == 1:
        model.ir_version = dice.pick((*range(1, 15), *NUMBERS))
    elif what == 2:
        model.opset_import.append(helper.make_opsetid(dice.pick(("", "ai.onnx", "com.microsoft", "nope")), 1))
    else:
        del model.opset_import[:]


def _shapes(model: onnx.ModelProto, dice: Dice) -> None:
    value = dice.pick([*model.graph.input, *model.graph.output])
    dims = value.type.tensor_type.shape.dim
    what = dice.below(5)
    if what == 0:
        value.type.tensor_type.ClearField("shape")
    elif what == 1:
        dice.pick(dims).dim_value = dice.pick(NUMBERS)
    elif what == 2:
        dice.pick(dims).dim_param = dice.pick(NAMES)
    elif what == 3:
        dims.add().dim_value = dice.pick((0, 1, 5))
    else:
        value.ClearField("type")


def _interface(model: onnx.ModelProto, dice: Dice) -> None:
    what = dice.below(5)
    values = dice.pick((model.graph.input, model.graph.output))
    if what == 0:
        del values[dice.below(len(values))]
    elif what == 1:
        values.append(dice.pick(values))
    elif what == 2:
        values.append(
            helper.make_tensor_value_info(dice.pick(NAMES), dice.pick((1, 7, 8, 9)), dice.pick(([], [2], None)))
        )
    elif what == 3:
        model.graph.output.append(dice.pick(model.graph.input))
    else:
        name = dice.pick(model.graph.initializer).name
        model.graph.input.append(helper.make_tensor_value_info(name, 1, None))


def _duplicate_initializer(model: onnx.ModelProto, dice: Dice) -> None:
    copy = TensorProto()
    copy.CopyFrom(dice.pick(model.graph.initializer))
    model.graph.initializer.append(copy)


def _external(model: onnx.ModelProto, dice: Dice) -> None:
    tensor = dice.pick(model.graph.initializer)
    places = ("weights.bin", "../weights.bin", "/etc/passwd", "/dev/zero", "", ".", "nothing.bin", "a\0b", "model.onnx",
              "x/../../weights.bin", "n" * 300)  # fmt: skip
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    for key, value in (("location", dice.pick(places)), ("offset", dice.pick(NUMBERS)), ("length", dice.pick(NUMBERS))):
        if dice.below(4):
            tensor.external_data.add(key=key, value=str(value))


def _metadata(model: onnx.ModelProto, dice: Dice) -> None:
    model.metadata_props.add(key=dice.pick(NAMES), value=dice.pick(NAMES))
    model.producer_name, model.domain = dice.pick(NAMES), dice.pick(NAMES)


def _function(model: onnx.ModelProto, dice: Dice) -> None:
    """Add a model function that a node calls; at times it calls itself, or one that is not there."""
    callee = dice.pick(("f", "f", "g"))
    inner = helper.make_node(dice.pick(("Tanh", callee)), ["a"], ["b"], domain=dice.pick(("", "local")))
    model.functions.append(helper.make_function("local", "f", ["a"], ["b"], [inner], [helper.make_opsetid("", 17)], ()))
    model.opset_import.append(helper.make_opsetid("local", 1))
    node = dice.pick(model.graph.node)
    old, node.output[0] = node.output[0], f"{node.output[0]}.f"
    model.graph.node.append(helper.make_node("f", [f"{old}.f"], [old], domain="local"))
    nodes = sorted(model.graph.node, key=lambda n: list(model.graph.node).index(n))
    nodes.insert(nodes.index(node) + 1, nodes.pop())
    del model.graph.node[:]
    model.graph.node.extend(nodes)


MODEL_MUTATIONS: tuple[Callable[[onnx.ModelProto, Dice], None], ...] = (
    _drop_node, _copy_node, _other_op, _other_input, _less_inputs, _other_output, _rename, _other_dims, _other_type,
    _other_data, _other_attribute, _more_attributes, _versions, _shapes, _interface, _duplicate_initializer, _external,
    _metadata, _function,
)  # fmt: skip
