"""Add to a graph what computes the rows that the weights of a recurrent node multiply (recurrent.py).

The node gives all states h_t as its first output Y [steps, directions, batch, hidden]. The rows of R are the states one
step before: Y, shifted by a step in the direction that it runs in, behind the initial state or zeros. Where the
sequences have lengths of their own (sequence_lens), steps behind their ends are no rows, of W neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer
from comq_onnx.model.op_kind import attribute
from comq_onnx.model.quantized import weight_source
from comq_onnx.model.recurrent import LENGTHS, RESET_ACTIVATIONS, given, has_gated_rows, reset_activations

# in the meta of an Identity: the name of a node, and which of its inputs, or -1 for its first output, it copies
COPIES = "comq_onnx.copies"
# places among the inputs of a recurrent node
_X, _W, _R, _BIAS, _INITIAL = 0, 1, 2, 3, 5
# behind the end of any axis
_END = 2**62


def add_rows(model: ir.Model, node: ir.Node, layer: Layer) -> ir.Value:
    """Add nodes behind a recurrent node that compute the rows of a layer.

    Returns them: inputs [n, in], or states [n, groups, hidden], the steps of one sequence after the other.
    """
    work = _Builder(model, node, f"{layer.name}.rows")
    rows = work.states() if layer.kind.reads_own_output else work.inputs()
    # as an error names it
    rows.name = f"{layer.name}.rows"
    return rows


def follow(model: ir.Model) -> None:
    """Let the rows that `add_rows` added follow the node once it has been rewritten: they read what it reads."""
    nodes = {str(node.name): node for node in model.graph.all_nodes()}
    for node in nodes.values():
        if COPIES in node.meta:
            name, place = node.meta[COPIES]
            node.replace_input_with(0, nodes[name].outputs[0] if place < 0 else nodes[name].inputs[place])


def copies_weight(node: ir.Node) -> bool:
    """Tell whether a node is one that `add_rows` added to work on a weight alone, not on what the model reads."""
    source = weight_source(node.outputs[0])
    return source is not None and any(COPIES in made.meta for made in source.nodes)


class _Builder:
    """Add nodes one behind the other, behind a recurrent node."""

    def __init__(self, model: ir.Model, node: ir.Node, name: str) -> None:
        """Begin behind a node; name: begins the names of all that is added."""
        self._model, self._node, self._last, self._name, self._count = model, node, node, name, 0

    def inputs(self) -> ir.Value:
        """Add the rows of W: the steps within each sequence, [n, in]."""
        x = given(self._node, _X)
        assert x is not None
        rows = self._add("Reshape", self._add("Transpose", x, perm=[1, 0, 2]), self._ints(-1, self._width(_W)))
        return self._within(rows, x)

    def states(self) -> ir.Value:
        """Add the rows of R: what it multiplies at each step, [n, groups, hidden]."""
        made = self._node.outputs[0]
        made.name = made.name or f"{self._node.name}.states"
        y, hidden = self._copy(-1), self._width(_R)
        direction = attribute(self._node, "direction", "forward")
        backward = {"forward": [False], "reverse": [True]}.get(direction, [False, True])
        gated = has_gated_rows(self._node)
        parts = []
        for d, is_backward in enumerate(backward):
            before = self._before(y, d, is_backward)
            reset = [self._add("Mul", before, self._reset_gate(before, d, len(backward)))] if gated else []
            parts += [before, before, *reset] if gated else [before]
        stacked = self._add("Concat", *(self._add("Unsqueeze", part, self._ints(2)) for part in parts), axis=2)
        shape = self._ints(-1, len(parts), hidden)
        rows = self._add("Reshape", self._add("Transpose", stacked, perm=[1, 0, 2, 3]), shape)
        return self._within(rows, y)

    def _within(self, rows: ir.Value, like: ir.Value) -> ir.Value:
        """Leave out the rows [batch * steps, ...] behind the ends of sequences; like: [steps, ...]."""
        if given(self._node, LENGTHS) is None:
            return rows
        kept = self._add("Reshape", self._kept(like, 0), self._ints(-1))
        return self._add("Compress", rows, kept, axis=0)

    def _before(self, y: ir.Value, d: int, backward: bool) -> ir.Value:
        """Add the states of direction d before each step, [steps, batch, hidden]; y: those behind each step."""
        own = self._add("Gather", y, self._scalar(d), axis=1)
        initial = given(self._node, _INITIAL)
        if initial is None:
            like = self._add("Shape", self._add("Slice", own, self._ints(0), self._ints(1), self._ints(0)))
            first = self._add("ConstantOfShape", like)
        else:
            first = self._add("Gather", initial, self._ints(d), axis=0)
        if not backward:
            rest = self._add("Slice", own, self._ints(0), self._ints(-1), self._ints(0))
            return self._add("Concat", first, rest, axis=0)
        rest = self._add("Slice", own, self._ints(1), self._ints(_END), self._ints(0))
        before = self._add("Concat", rest, first, axis=0)
        if given(self._node, LENGTHS) is None:
            return before
        # the last step of a sequence has the initial state before it
        goes_on = self._add("Transpose", self._kept(y, 1), perm=[1, 0])
        return self._add("Where", self._add("Unsqueeze", goes_on, self._ints(2)), before, first)

    def _reset_gate(self, before: ir.Value, d: int, directions: int) -> ir.Value:
        """Add the reset gate of a GRU in direction d, [steps, batch, hidden]; before: the states before each step."""
        hidden = self._width(_R)
        both = [self._add("Gather", self._copy(place), self._scalar(d), axis=0) for place in (_W, _R)]
        whole = self._add("Concat", *both, axis=1)
        gate = self._add("Slice", whole, self._ints(hidden), self._ints(2 * hidden), self._ints(0))
        # one product, so that no part of it belongs to an earlier stage than the node
        rows = self._add("Concat", given(self._node, _X), before, axis=2)
        total = self._add("MatMul", rows, self._add("Transpose", gate, perm=[1, 0]))
        if given(self._node, _BIAS) is not None:
            bias = self._add("Gather", self._copy(_BIAS), self._scalar(d), axis=0)
            for first in (hidden, 4 * hidden):
                part = self._add("Slice", bias, self._ints(first), self._ints(first + hidden), self._ints(0))
                total = self._add("Add", total, part)
        clip = attribute(self._node, "clip", None)
        if clip:
            bounds = [self._constant(np.asarray(bound, np.float32)) for bound in (-clip, clip)]
            total = self._add("Clip", total, *bounds)
        return self._add(RESET_ACTIVATIONS[reset_activations(self._node, directions)[d].lower()], total)

    def _kept(self, like: ir.Value, ahead: int) -> ir.Value:
        """Add which steps of each sequence, moved by `ahead`, lie within it: [batch, steps]; like: [steps, ...]."""
        count = self._add("Gather", self._add("Shape", like), self._scalar(0), axis=0)
        steps = self._add("Range", self._scalar(ahead), self._add("Add", count, self._scalar(ahead)), self._scalar(1))
        lengths = self._add("Cast", given(self._node, LENGTHS), to=ir.DataType.INT64)
        return self._add("Less", steps, self._add("Unsqueeze", lengths, self._ints(1)))

    def _width(self, place: int) -> int:
        """Return the last dimension of a weight of the node."""
        value = self._node.inputs[place]
        assert value is not None
        assert value.const_value is not None
        return int(value.const_value.shape.numpy()[-1])

    def _copy(self, place: int) -> ir.Value:
        """Add a copy of an input of the node, or with -1 of its first output, that `follow` finds again."""
        copied = self._add("Identity", self._node.outputs[0] if place < 0 else self._node.inputs[place])
        producer = copied.producer()
        assert producer is not None
        producer.meta[COPIES] = (str(self._node.name), place)
        return copied

    def _add(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node and return its output."""
        made = ir.node(op, inputs, attributes, name=self._fresh_name())
        made.outputs[0].name = made.name
        assert self._last.graph is not None
        self._last.graph.insert_after(self._last, made)
        self._last = made
        return made.outputs[0]

    def _ints(self, *numbers: int) -> ir.Value:
        return self._constant(np.array(numbers, np.int64))

    def _scalar(self, number: int) -> ir.Value:
        return self._constant(np.asarray(number, np.int64))

    def _constant(self, numbers: np.ndarray[Any, Any]) -> ir.Value:
        return graphs.add_initializer(self._model.graph, self._fresh_name(), numbers)

    def _fresh_name(self) -> str:
        self._count += 1
        return f"{self._name}_{self._count}"
