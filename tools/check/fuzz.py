"""Put thousands of broken, hostile and odd inputs through comq-onnx: each must be refused in one clear line or come out
right.

    python tools/check/fuzz.py [--inputs 5000] [--seed 0] [--json FILE]

Inputs are small models, samples and folders with seeded mutations of four kinds:

- bytes: the model's file with bits flipped, ranges cut, copied, blown up or spliced in from another model;
- model: the parsed model with nodes, names, types, dimensions, attributes, weights, versions or external data changed;
- samples: .npz, .npy and pictures with the same done to their bytes, their arrays or their headers;
- folder: models in folders with others, links, missing data, outputs that cannot be, and what killed runs left.

Right means: exit code 0, the model written runs and keeps 5 dB SQNR on samples it was not calibrated on, or the report
warns that it does not. In every case the inputs keep their bytes, nothing else is left in the folder or among temporary
files. Exits with 1 where anything else happened.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx.parser
import onnxruntime
from _sandbox import Outcome, command_line, each, quickly, snapshot, table
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from PIL import Image

from comq_onnx.errors import ComqError, SamplesError
from comq_onnx.metrics import sqnr_of
from comq_onnx.pipeline import LEAST_DB
from comq_onnx.runtime.session import Session

KINDS = ("bytes", "model", "samples", "folder")
SAMPLES = 12
# what the report finds on the few samples it held back may differ from what is found on others
SLACK_DB = 3.0
ADDRESS_SPACE = 8 << 30
OFTEN = (b"\xff", b"\x00", b"\x80\x80\x80\x80\x10", b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x0a\x00")
NAMES = ("", "x", "y", "w1", "a b", "ü", "line\nbreak", "\x1b[31mred", "../up", "[/red]", "%s{0}", "n" * 5000, "\u202e")
NUMBERS = (0, 1, -1, 2, 3, 127, 255, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63))
FLOATS = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 0.0, 1e20)

TEXTS = {
    "mlp": """mlp (float[batch, 32] x) => (float[batch, 10] y) {
        h = Gemm <transB = 1> (x, w1, b1)
        r = Relu (h)
        m = MatMul (r, w2)
        y = Add (m, b2)
    }""",
    "cnn": """cnn (float[batch, 3, 8, 8] x) => (float[batch, 10] y) {
        a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k1)
        n = BatchNormalization (a, scale, shift, mean, var)
        r = Relu (n)
        d = Conv <kernel_shape = [3, 3], strides = [2, 2], group = 16> (r, k2)
        g = GlobalAveragePool (d)
        f = Flatten (g)
        y = Gemm <transB = 1> (f, w3, b2)
    }""",
    "tokens": """tokens (int64[batch, 6] x) => (float[batch, 10] y) <int64[1] one = {1}> {
        e = Gather (table, x)
        p = MatMul (e, w4)
        t = Tanh (p)
        s = ReduceMean <keepdims = 0, axes = [1]> (t)
        y = MatMul (s, w5)
    }""",
    "flow": """flow (float[batch, 32] x) => (float[batch, 10] y) <int64 three = {3}, bool yes = {1}> {
        s = ReduceSum <keepdims = 0> (x)
        none = Sub (s, s)
        c = Equal (none, none)
        h = If (c) <
            then_branch = yes_branch () => (float[batch, 48] then_y) { then_y = MatMul (x, w6) },
            else_branch = no_branch () => (float[batch, 48] else_y) { else_y = MatMul (x, w7) }
        >
        l = Loop (three, yes, h) <
            body = once (int64 i, bool go_in, float[batch, 48] v) => (bool go, float[batch, 48] v_out) {
                go = Identity (go_in)
                u = MatMul (v, w8)
                v_out = Tanh (u)
            }
        >
        y = MatMul (l, w2)
    }""",
}


def base(name: str) -> onnx.ModelProto:
    """One of the small models."""
    rng = np.random.default_rng(0)
    shapes = {
        "w1": (48, 32), "b1": (48,), "w2": (48, 10), "b2": (10,), "k1": (16, 3, 3, 3), "k2": (16, 1, 3, 3),
        "scale": (16,), "shift": (16,), "mean": (16,), "var": (16,), "w3": (10, 16), "table": (40, 24), "w4": (24, 16),
        "w5": (16, 10), "w6": (32, 48), "w7": (32, 48), "w8": (48, 48),
    }  # fmt: skip
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{TEXTS[name]}')
    read = {i for node in _nodes(model.graph) for i in node.input}
    for weight, shape in shapes.items():
        if weight in read:
            array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)
            array = np.abs(array) + 0.5 if weight == "var" else array
            model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), weight))
    return model


def samples_of(name: str, count: int = SAMPLES, seed: int = 0) -> dict[str, np.ndarray]:
    """Samples for one of the small models."""
    rng = np.random.default_rng(seed)
    if name == "tokens":
        return {"x": rng.integers(0, 40, (count, 6))}
    shape = (count, 3, 8, 8) if name == "cnn" else (count, 32)
    return {"x": rng.standard_normal(shape).astype(np.float32)}


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


class Dice:
    """Seeded choices."""

    def __init__(self, *seed: int) -> None:
        self.rng = np.random.default_rng(list(seed))

    def pick(self, things: Any) -> Any:
        things = list(things)
        return things[int(self.rng.integers(len(things)))]

    def below(self, n: int) -> int:
        return int(self.rng.integers(max(n, 1)))

    def times(self) -> int:
        return int(self.pick((1, 1, 1, 2, 4)))


# Mutations


def mutate_bytes(data: bytes, dice: Dice, other: bytes) -> bytes:
    """A file's bytes with a few of them changed."""
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
    """A parsed model with a few things in it changed."""
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
    dice.pick(_nodes(model.graph)).op_type = dice.pick(ops)


def _other_input(model: onnx.ModelProto, dice: Dice) -> None:
    node = dice.pick(_nodes(model.graph))
    names = [*NAMES, *(o for n in _nodes(model.graph) for o in (*n.output, *n.input))]
    node.input[dice.below(len(node.input))] = dice.pick(names)


def _less_inputs(model: onnx.ModelProto, dice: Dice) -> None:
    node = dice.pick(_nodes(model.graph))
    del node.input[dice.below(len(node.input))]


def _other_output(model: onnx.ModelProto, dice: Dice) -> None:
    node = dice.pick(_nodes(model.graph))
    names = [*NAMES, *(o for n in _nodes(model.graph) for o in n.output)]
    node.output[dice.below(len(node.output))] = dice.pick(names)


def _rename(model: onnx.ModelProto, dice: Dice) -> None:
    """A value everywhere, or a node, gets an odd name."""
    new = dice.pick(NAMES)
    if dice.below(2):
        dice.pick(_nodes(model.graph)).name = new
        return
    old = dice.pick([o for n in model.graph.node for o in (*n.output, *n.input)])
    for node in _nodes(model.graph):
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
    node = dice.pick([n for n in _nodes(model.graph) if n.attribute])
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
    node = dice.pick(_nodes(model.graph))
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
    """A model function that a node calls: itself too, at times, or one that is not there."""
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


def mutate_samples(folder: Path, arrays: dict[str, np.ndarray], dice: Dice) -> list[object]:
    """Write samples with something wrong or odd about them; the options that name them."""
    what = dice.below(8)
    path = folder / dice.pick(("s.npz", "s.npy"))
    if what == 0:  # the arrays
        for _ in range(dice.times()):
            arrays = _odd_arrays(arrays, dice)
    _save(path, arrays)
    data = path.read_bytes()
    if what in (1, 2):
        path.write_bytes(mutate_bytes(data, dice, data))
    elif what == 3:  # a header that promises other things
        header = dice.pick((
            f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({dice.pick(NUMBERS)},)}}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1099511627776)}",
            "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
            "{'descr': '<f4', 'shape': ()}", "{" * 500, "[" * 9000, "__import__('os').abort()",
            "{'descr': [('a', '<f4'), ('b', 'O')], 'fortran_order': False, 'shape': (2,)}",
        ))  # fmt: skip
        version = dice.pick(((1, 0), (2, 0), (3, 0), (9, 9)))
        length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
        npy = b"\x93NUMPY" + bytes(version) + length + header.encode() + bytes(dice.below(500))
        if path.suffix == ".npy":
            path.write_bytes(npy)
        else:
            with zipfile.ZipFile(path, "w", dice.pick((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
                archive.writestr("x.npy", npy)
    elif what == 4:  # a folder of them
        (folder / "many").mkdir()
        for i in range(3):
            part = folder / "many" / f"{i}{dice.pick(('.npz', '.npy', '.txt', '.png'))}"
            part.write_bytes(mutate_bytes(data, dice, data) if dice.below(2) else data)
        path.unlink()
        path = folder / "many"
    elif what == 5:  # pictures
        path.unlink()
        path = folder / "pictures"
        path.mkdir()
        for i in range(3):
            stream = io.BytesIO()
            Image.fromarray(dice.rng.integers(0, 256, (9 + i, 12, 3), np.uint8)).save(
                stream, dice.pick(("PNG", "BMP", "GIF"))
            )
            data = stream.getvalue()
            (path / f"{i}.png").write_bytes(mutate_bytes(data, dice, data) if dice.below(2) else data)
        recipe = folder / "recipe.json"
        recipe.write_text(
            dice.pick(('{"scale": 1}', '{"resize": -1}', "[]", '{"std": 0}', '{"mean": "a"}', "{", '{"crop": 5}'))
        )
        return ["--calib", path, "--preprocess", dice.pick(("imagenet", "raw", recipe))]
    elif what == 6:  # an archive with other members
        with zipfile.ZipFile(folder / "s.npz", "w") as archive:
            warnings.simplefilter("ignore")  # of the same name twice
            for name in ("x.npy", "../up.npy", "/etc/passwd.npy", "x.npy", "y.txt")[: 1 + dice.below(5)]:
                archive.writestr(name, data if dice.below(3) else data[: dice.below(len(data))])
        path = folder / "s.npz"
    elif what == 7:
        return dice.pick(([], ["--calib", folder / "nothing"], ["--calib", folder / "model.onnx"], ["--calib", folder]))
    return ["--calib", path]


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        np.save(path, next(iter(arrays.values()), np.zeros(0)))


def _odd_arrays(arrays: dict[str, np.ndarray], dice: Dice) -> dict[str, np.ndarray]:
    name = dice.pick(arrays) if arrays else "x"
    array = arrays.get(name, np.zeros(3, np.float32))
    changed: Any = array.copy()
    what = dice.below(9)
    with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):
        if what == 0:
            changed.reshape(-1)[dice.below(changed.size)] = dice.pick(FLOATS)
        elif what == 1:
            changed = changed.astype(dice.pick(("f2", "f8", "i4", "u1", "c8", "?", "U5", ">f4", "M8[s]")))
        elif what == 2:
            changed = changed[: dice.below(4)]
        elif what == 3:
            changed = changed[None] if dice.below(2) else changed[..., None]
        elif what == 4:
            changed = changed[..., : dice.below(changed.shape[-1] + 1)]
        elif what == 5:
            changed = np.asfortranarray(changed)
        elif what == 6:
            changed = changed * dice.pick((0, 1e-30, 1e30, -1))
        elif what == 7:
            return {dice.pick(n for n in NAMES if n and len(n) < 200 and "/" not in n): changed, **arrays}
        else:
            return {n: a for n, a in arrays.items() if n != name}
    return {**arrays, name: changed}


def mutate_folder(folder: Path, model: onnx.ModelProto, dice: Dice) -> list[object]:
    """The model in a folder with something wrong or odd about it; the arguments for model and output."""
    source, out = folder / "model.onnx", folder / "q.onnx"
    what = dice.below(12)
    if what == 0:
        (folder / "other.onnx").write_bytes(dice.pick((b"", b"junk", source.read_bytes())))
        if dice.below(2):
            source.rename(folder / "third.onnx")
        return [folder, "-o", out]
    if what in (1, 2, 3):  # external data
        onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
        data = folder / "weights.bin"
        if what == 2:
            data.write_bytes(dice.pick((b"", data.read_bytes()[: dice.below(data.stat().st_size)], bytes(9))))
        if what == 3:
            data.unlink()
            if dice.below(3):
                data.symlink_to(dice.pick(("/etc/passwd", "/dev/zero", "weights.bin", "nothing", "model.onnx")))
            else:
                os.mkfifo(data)
    elif what == 4:
        out.mkdir()
    elif what == 5:
        out.symlink_to(dice.pick(("model.onnx", "nothing", "q.onnx", "/dev/null", "weights.bin")))
    elif what == 6:
        out = dice.pick((folder / "no" / "q.onnx", Path("/proc/q.onnx"), folder / ("q" * 300), source, folder / "pipe"))
        os.mkfifo(folder / "pipe")
    elif what == 7:  # what a killed run left
        left = folder / ".comq-held-left"
        left.mkdir()
        (left / "q.onnx").write_bytes(b"half")
        os.utime(left, (0, 0))
    elif what == 8:
        out.write_bytes(b"an older result")
    elif what == 9:
        source.unlink()
        dice.pick(
            (source.mkdir, lambda: source.symlink_to(dice.pick(("model.onnx", "/dev/zero", "no"))), lambda: None)
        )()
    elif what == 10:
        report = dice.pick((source, out, folder, folder / "no" / "r.json", Path("/dev/full")))
        return [source, "-o", out, "--json", report]
    elif what == 11:
        return [source, *dice.pick(([], ["--plan"], ["-o", out, "--include", "("], ["-o", out, "--memory", "0"],
                                    ["-o", out, "--batch-size", "1"], ["-o", out, "--exclude", "."],
                                    ["-o", out, "--granularity", "16"], ["-o", out, "--bits", "2"]))]  # fmt: skip
    return [source, "-o", out]


# One input


@dataclass(frozen=True)
class Result:
    """What an input came to: right, refused, wrong or crash; and why."""

    kind: str
    detail: str


def check(job: tuple[str, int, int]) -> Result:
    """Make one input, run it and look at what is there afterwards."""
    kind, seed, number = job
    dice = Dice(seed, KINDS.index(kind), number)
    name = dice.pick(TEXTS)
    model, arrays = base(name), samples_of(name)
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as temporary:
        folder = Path(work)
        source = folder / "model.onnx"
        (folder / "weights.bin").write_bytes(bytes(20_000))
        _save(folder / "good.npz", arrays)
        onnx.save(model, source)
        arguments: list[object] = [source, "-o", folder / "q.onnx"]
        samples: list[object] = ["--calib", folder / "good.npz"]
        if kind == "bytes":
            other = base(dice.pick(TEXTS)).SerializeToString()
            source.write_bytes(mutate_bytes(source.read_bytes(), dice, other))
        elif kind == "model":
            mutate_model(model, dice)
            source.write_bytes(model.SerializeToString())
        elif kind == "samples":
            samples = mutate_samples(folder, arrays, dice)
        else:
            arguments = mutate_folder(folder, model, dice)
        bits = [] if "--bits" in arguments else ["--bits", dice.pick((8, 8, 4))]
        before = _state(folder)
        tempfile.tempdir = temporary
        said = command_line(*arguments, *samples, *bits, "--device", "cpu", "--json", folder / "report.json"
                            ) if "--json" not in arguments else command_line(*arguments, *samples, *bits)  # fmt: skip
        tempfile.tempdir = None
        after = _state(folder)
        report = after.pop("report.json", None)
        out = folder / "q.onnx"
        was, is_now = before.pop("q.onnx", None), after.pop("q.onnx", None)
        swept = {n for n in before if n.startswith(".comq-held-left")}
        if {n: v for n, v in before.items() if n not in swept} != {n: v for n, v in after.items() if n not in swept}:
            return Result("crash", f"files changed: {sorted(set(before.items()) ^ set(after.items()))}")
        if left := os.listdir(temporary):
            return Result("crash", f"temporary files left: {left}")
        if said.refused:
            # of a report that cannot be written one hears when the model is there
            told = "the model was written" in said.err
            if (was != is_now and not told) or report is not None:
                return Result("crash", f"refused, but wrote: {said.err}")
            return Result("refused", said.err.strip())
        if said.code or said.err:
            return Result("crash", f"exit code {said.code}: {said.err[-3000:]}")
        if "--plan" in arguments or report is None:
            return Result("right", "")
        # odd samples make a model for odd samples
        same = source if kind != "samples" and source.is_file() else None
        return _compare(same, out, name, json.loads((folder / "report.json").read_text()))


def _state(folder: Path) -> dict[str, str]:
    """Every file by its digest; pipes and devices by their kind."""
    found = {
        n: hashlib.sha256(v.encode() if isinstance(v, str) else v).hexdigest() for n, v in snapshot(folder).items()
    }
    return found | {str(p.relative_to(folder)): "other" for p in folder.rglob("*") if p.is_fifo()}


def _compare(source: Path | None, out: Path, name: str, report: dict[str, Any]) -> Result:
    """Whether the model at `out` does what its source does on new samples; without a source, on those held back."""
    if any("random" in w or "other outputs each time" in w for w in report["warnings"]):
        return Result("right", "not compared")
    feeds = samples_of(name, 6, seed=1)
    try:
        if source is None:
            raise SamplesError("other samples than these are meant")
        before = Session(source)
        wanted = before.run({i.name: feeds["x"] for i in before.inputs})
    except ComqError:
        # a mutation changed what it takes: the report's own comparison is there
        worst = min((o["sqnr_db"] for o in report["outputs"]), default=200.0)
        if worst is None or worst >= LEAST_DB or any("far from its source" in w for w in report["warnings"]):
            return Result("right", "compared by the report")
        return Result("wrong", f"SQNR {worst} dB, and no warning")
    after = Session(out)
    found = sqnr_of(wanted, after.run({i.name: feeds["x"] for i in after.inputs}))
    if found >= LEAST_DB - SLACK_DB or any("far from its source" in w for w in report["warnings"]):
        return Result("right", f"SQNR {found:.1f} dB")
    return Result("wrong", f"SQNR {found:.1f} dB, and no warning")


@click.command()
@click.option("--inputs", default=5000, show_default=True, help="How many inputs in all.")
@click.option("--seed", default=0, show_default=True, help="Another seed gives other inputs.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), default=KINDS, help="Only these kinds.")
@click.option("--only", "only", multiple=True, type=int, help="Only the inputs of these numbers.")
@click.option("--seconds", default=60.0, show_default=True, help="What an input may take before it counts as a hang.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every outcome as JSON.")
def main(
    inputs: int, seed: int, kinds: tuple[str, ...], only: tuple[int, ...], seconds: float, json_path: Path | None
) -> None:
    """Fuzz comq-onnx with mutated models, samples and folders."""
    quickly()
    click.echo(
        f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, {platform.machine()}, "
        f"Python {platform.python_version()}, seed {seed}"
    )
    numbers = only or range(inputs // len(kinds))
    jobs = [(kind, seed, number) for number in numbers for kind in kinds]
    found: list[tuple[tuple[str, int, int], Outcome, Result]] = []
    start = time.perf_counter()
    for job, outcome in each(jobs, check, seconds, ADDRESS_SPACE):
        result = outcome.value if outcome.kind == "done" else Result(outcome.kind, str(outcome.value)[-3000:])
        found.append((job, outcome, result))
        if result.kind not in ("right", "refused"):
            click.echo(f"{result.kind}: {job[0]} {job[2]}: {result.detail}", err=True)
    outcomes = ("right", "refused", "wrong", "crash", "hang")
    counts = {kind: Counter(r.kind for j, _, r in found if j[0] == kind) for kind in kinds}
    click.echo(
        table(("inputs", "all", *outcomes), [(k, c.total(), *(c[o] for o in outcomes)) for k, c in counts.items()])
    )
    lines = {r.detail for _, _, r in found if r.kind == "refused"}
    slowest, largest = max(o.seconds for _, o, _ in found), max(o.peak_mb for _, o, _ in found)
    click.echo(
        f"\n{len(found)} inputs in {time.perf_counter() - start:.0f} s, {len(lines)} different messages; the slowest "
        f"took {slowest:.1f} s, the most memory of a process was {largest:,.0f} MB"
    )
    if json_path:
        rows = [{"kind": j[0], "number": j[2], "outcome": r.kind, "detail": r.detail} for j, _, r in found]
        json_path.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(r.kind not in ("right", "refused") for _, _, r in found))


if __name__ == "__main__":
    main()
