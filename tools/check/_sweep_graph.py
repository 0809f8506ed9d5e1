"""Build the graphs of sweep.py node by node, and draw their weights and samples from one seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from _fuzz_models import Dice
from onnx import AttributeProto, TensorProto, helper, numpy_helper

Array = np.ndarray
MS = "com.microsoft"
NARROW = 12
# the channels that a degenerate weight may have
DEGENERATE = ("zero", "constant", "equal", "tiny", "huge", "outlier", "spread", "all zero")
# how a layer may read its weight
COPIES = ("Identity", "Transpose", "Cast", "Reshape", "Constant")
ODD = ("/a.1/b/Conv_output_{}", "with space {}", "ü.{}", "w.codes{}", "scale_{}", "{}", "x:{}", "[/red]{}", "%s.{}")


@dataclass(frozen=True)
class Value:
    """Hold the name of a tensor, and its dimensions behind the batch."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return how many numbers a sample of it has."""
        return int(np.prod(self.shape))


class Graph:
    """Collect the nodes, constants, inputs and outputs of a model, and make its seeded choices.

    batch: the size of the batch; None for any
    opset: the least opset that its operators need
    degenerate: what the next weights are like, of DEGENERATE; None for normal noise
    loud, half: samples differ much in size; the model will be float16
    copied: whether the next layers may read a copy of their weight
    excluded: patterns of layers that are to stay float
    selected: the outputs whose rows depend on the data
    traits: what else is odd about the model, in words
    """

    def __init__(self, dice: Dice) -> None:
        self.dice = dice
        self.batch: int | None = dice.pick((None, None, None, 1, 4))
        self.odd = self.chance(0.2)
        self.opset = 13
        self.degenerate: str | None = None
        self.copied = False
        self.loud = self.half = False
        self.excluded: list[str] = []
        self.selected: set[str] = set()
        self.traits: list[str] = []
        self.domains: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.inputs: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.outputs: dict[str, tuple[int, Sequence[int | str]]] = {}
        self.draw: dict[str, Callable[[np.random.Generator, int], Array]] = {}
        self._count = 0

    def chance(self, share: float) -> bool:
        """Say yes in such a share of cases."""
        return bool(self.dice.rng.random() < share)

    def need(self, opset: int) -> None:
        """Raise the opset to one that has an operator."""
        self.opset = max(self.opset, opset)

    def name(self, hint: str) -> str:
        """Make a name that nothing has yet."""
        self._count += 1
        return self.dice.pick(ODD).format(self._count) if self.odd else f"{hint}_{self._count}"

    def op(self, kind: str, *inputs: Value | str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; return the name of its output, or the names where there are several."""
        names = [self.name(kind.lower()) for _ in range(outputs)]
        read = [i.name if isinstance(i, Value) else i for i in inputs]
        title = "" if self.odd and self.chance(0.3) else self.name(f"n_{kind}")
        self.nodes.append(helper.make_node(kind, read, names, name=title, domain=domain, **attributes))
        if domain:
            self.domains.add(domain)
        return names[0] if outputs == 1 else names

    def const(self, value: Any, dtype: type = np.float32) -> str:
        """Add a constant."""
        name = self.name("c")
        self.constants[name] = np.asarray(value, dtype)
        return name

    def ints(self, *values: int) -> str:
        """Add a constant of whole numbers."""
        return self.const(values, np.int64)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Array:
        """Draw normal noise."""
        return (mean + scale * self.dice.rng.standard_normal(shape)).astype(np.float32)

    def bias(self, count: int) -> str:
        """Add a bias [count]."""
        return self.const(self.normal(count, scale=0.2))

    def weight(self, *shape: int, fan: int, channels: int = 0) -> str:
        """Add a weight that keeps activations near 1; as a copy of a constant where that is asked for.

        fan: the inputs of an output
        channels: the axis of the outputs
        """
        array = self.normal(*shape, scale=fan**-0.5)
        if self.degenerate:
            array = np.moveaxis(degenerate(np.moveaxis(array, channels, 0), self.degenerate, self.dice), 0, channels)
        return self._copied(array) if self.copied else self.const(array)

    def _copied(self, array: Array) -> str:
        """Add a constant, and an operator that makes the weight of it."""
        kind = self.dice.pick(COPIES)
        self.traits.append(f"weight by {kind}")
        if kind == "Transpose":
            axes = list(range(array.ndim))[::-1]
            return str(self.op(kind, self.const(np.ascontiguousarray(array.transpose(axes))), perm=axes))
        if kind == "Cast":
            return str(self.op(kind, self.const(np.clip(array, -6e4, 6e4), np.float16), to=TensorProto.FLOAT))
        if kind == "Reshape":
            return str(self.op(kind, self.const(array.ravel()), self.ints(*array.shape)))
        if kind == "Constant":
            return str(self.op(kind, value=numpy_helper.from_array(array)))
        return str(self.op(kind, self.const(array)))

    def input(self, hint: str, *shape: int, scale: float = 1.0) -> Value:
        """Add an input of normal noise, each sample as loud as others or not."""
        name, loud = self.name(hint), self.loud
        self.inputs[name] = TensorProto.FLOAT, shape

        def draw(rng: np.random.Generator, count: int) -> Array:
            volume = 10 ** rng.uniform(-2.5, 2.5, (count, *[1] * len(shape))) if loud else scale
            return (rng.standard_normal((count, *shape)) * volume).astype(np.float32)

        self.draw[name] = draw
        return Value(name, shape)

    def whole_input(self, hint: str, kind: int, most: int, *shape: int, share: float = 1.0) -> Value:
        """Add an input of whole numbers below `most`; share: of samples that are not all zero."""
        name, dtype = self.name(hint), helper.tensor_dtype_to_np_dtype(kind)
        self.inputs[name] = kind, shape

        def draw(rng: np.random.Generator, count: int) -> Array:
            kept = rng.random((count, *[1] * len(shape))) < share
            return (rng.integers(0, most, (count, *shape)) * kept).astype(dtype)

        self.draw[name] = draw
        return Value(name, shape)

    def output(self, name: str, kind: int, dims: Sequence[int | str], selected: bool = False) -> None:
        """Make a tensor an output; dims: behind the batch, or all where its rows depend on the data."""
        self.outputs[name] = kind, dims if selected else [self.batch or "batch", *dims]
        if selected:
            self.selected.add(name)

    def model(self, opset: int, free: bool) -> onnx.ModelProto:
        """Make the model; free: declare no dimension but that of channels."""
        batch = self.batch or "batch"
        given = [
            helper.make_tensor_value_info(
                name, kind, [batch, *(f"d{i}" if free and i else d for i, d in enumerate(shape))]
            )
            for name, (kind, shape) in self.inputs.items()
        ]
        results = [
            helper.make_tensor_value_info(
                name, kind, [d if not free or i < 1 or name in self.selected else f"o{i}" for i, d in enumerate(dims)]
            )
            for name, (kind, dims) in self.outputs.items()
        ]
        graph = helper.make_graph(
            self.nodes, "sweep", given, results, [numpy_helper.from_array(a, n) for n, a in self.constants.items()]
        )
        imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in sorted(self.domains))]
        return helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 19 else 10)

    def samples(self, count: int, seed: int) -> dict[str, Array]:
        """Draw samples by input name; another seed gives others of the same kind."""
        rng = np.random.default_rng([seed, 77])
        return {name: draw(rng, count) for name, draw in self.draw.items()}


def degenerate(array: Array, kind: str, dice: Dice) -> Array:
    """Spoil channels of a weight [out, ...]."""
    spoiled = array.copy()
    some = dice.rng.random(len(array)) < 0.4
    some[dice.below(len(array))] = True
    largest = float(np.abs(array).max())
    if kind == "zero":
        spoiled[some] = 0
    elif kind == "all zero":
        spoiled[:] = 0
    elif kind == "constant":
        spoiled[some] = 0.05
    elif kind == "equal":
        spoiled[:] = spoiled[:1]
    elif kind == "tiny":
        spoiled[some] *= 1e-30
    elif kind == "huge":
        spoiled[int(np.argmax(some))] *= 1e13
    elif kind == "outlier":
        flat = spoiled.reshape(len(array), -1)
        flat[dice.below(len(flat)), dice.below(flat.shape[1])] = 1000 * largest
    else:
        spoiled *= np.geomspace(1e-3, 1e3, len(array)).reshape(-1, *[1] * (array.ndim - 1)).astype(np.float32)
    return spoiled


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn every float32 tensor, input, output and Cast of a model into float16."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    _halve(half.graph)
    return half


def _halve(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _halve_tensor(tensor)
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _halve(attribute.g)
            elif attribute.type == AttributeProto.TENSOR:
                _halve_tensor(attribute.t)
            elif attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16


def _halve_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        array = np.clip(numpy_helper.to_array(tensor), -6e4, 6e4).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


# From one form to another
# ----------------------------------------------------------------------------------------------------------------------


def as_vector(g: Graph, v: Value) -> Value:
    """Make [width] of a value: flattened where that is small, else the mean of positions or the first of them."""
    if len(v.shape) == 1:
        return v
    if v.size <= 256:
        return Value(g.op("Flatten", v), (v.size,))
    if len(v.shape) == 2:
        return Value(g.op("Gather", v, g.const(0, np.int64), axis=1), v.shape[1:])
    return Value(g.op("Flatten", g.op("GlobalAveragePool", v)), v.shape[:1])


def as_sequence(g: Graph, v: Value) -> Value:
    """Make [positions, width] of a value, of 12 channels or more: layers of fewer are too small to be quantized."""
    if len(v.shape) == 1:
        parts = next(n for n in (4, 2, 1) if v.size % n == 0)
        v = Value(g.op("Reshape", v, g.ints(0, parts, v.size // parts)), (parts, v.size // parts))
    elif len(v.shape) > 2:
        flat = g.op("Reshape", v, g.ints(0, v.shape[0], -1))
        v = Value(g.op("Transpose", flat, perm=[0, 2, 1]), (v.size // v.shape[0], v.shape[0]))
    positions, width = v.shape
    if width >= NARROW:
        return v
    return Value(g.op("MatMul", v, g.const(g.normal(width, 16, scale=width**-0.5))), (positions, 16))


def as_channels(g: Graph, v: Value, rank: int) -> Value:
    """Make [channels, ...] with `rank` spatial axes of a value, as convolutions read it."""
    if len(v.shape) == rank + 1 and rank > 1:
        return v
    sequence = as_sequence(g, v)
    positions, width = sequence.shape
    last = g.op("Transpose", sequence, perm=[0, 2, 1])
    if rank == 1:
        return Value(last, (width, positions))
    if rank == 2:
        rows = next(n for n in (8, 6, 4, 3, 2, 1) if positions % n == 0)
        shape: tuple[int, ...] = (width, rows, positions // rows)
    else:
        rows = next(n for n in (2, 1) if positions % (n * n) == 0)
        shape = (width, rows, rows, positions // rows**2)
    return Value(g.op("Reshape", last, g.ints(0, *shape)), shape)
