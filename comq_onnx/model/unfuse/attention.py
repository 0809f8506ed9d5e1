"""Replace attention that has the projection of queries, keys and values inside.

Attention becomes three products, each with its bias, and MultiHeadAttention, which has the same kernel; or standard
operators, where only these are wanted. A mask counts, as in ONNX Runtime,

    where it has rank 1, how many positions of each sample are attended to [samples], or their ends and then their
        starts [2 * samples];
    where it has rank 2 or 3, which positions are attended to, [samples, keys] or [samples, queries, keys], by numbers
        above 0. With one key only it is a dummy.

Scores of masked positions get mask_filter_value added. Later positions, if only earlier ones are attended to, count as
-infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.op_kind import AnyArray
from comq_onnx.model.unfuse.maker import MICROSOFT, Maker, Stays, is_product, is_weight

_PARTS = ("query", "key", "value")
# attributes that Attention and MultiHeadAttention share
_SHARED = ("num_heads", "unidirectional", "scale", "mask_filter_value")
_FILTER = -10000.0
# what the scores of later positions become
_LOWEST = float(np.finfo(np.float32).min)


def attention(make: Maker) -> list[ir.Value | None]:
    """Replace Attention by three products with their biases, and attention without weights.

    Raises Stays for what ONNX Runtime does on GPUs only, and for shapes that the graph does not tell.
    """
    if not (is_weight(make.input(1)) or make.standard):
        return []
    _check_attention(make)
    query, key, value = _projections(make)
    past, width, heads = make.input(4), _sizes(make)[0], int(make.attribute("num_heads", 1))
    mask = _Mask.of(make, make.input(3), _Positions(make, make.given(0), past, 3))
    if past is None and not make.standard:
        out, *kept = _multi_head(make, [query, key, value], mask)
        present = _stack(make, kept) if kept else None
        return [out, present][: len(make.node.outputs)]
    kept = [_by_head(make, part, heads) for part in (key, value)]
    present = _stack(make, kept) if past is not None or make.output(1) is not None else None
    if past is not None:
        # each number of the past is copied twice; as inputs of MultiHeadAttention three times
        present = make("Concat", past, present, axis=3)
        kept = [make("Gather", present, make.number(i, np.int64), axis=0) for i in (0, 1)]
    out = _plain(make, query, kept, width, mask) if make.standard else _multi_head(make, [query, *kept], mask)[0]
    out.type, out.shape = value.type, value.shape
    return [out, present][: len(make.node.outputs)]


def _stack(make: Maker, kept: list[ir.Value]) -> ir.Value:
    """Join keys and values along a new first axis."""
    axis = make.number([0], np.int64)
    return make("Concat", *(make("Unsqueeze", value, axis) for value in kept), axis=0)


def _check_attention(make: Maker) -> None:
    """Raise Stays for an Attention that cannot be taken apart."""
    for name in ("do_rotary", "past_present_share_buffer"):
        if make.attribute(name, 0):
            raise Stays(f"{name} is for GPUs; MultiHeadAttention has none")
    weight, bias, mask = make.given(1), make.input(2), make.input(3)
    if not graphs.is_constant(weight):
        raise Stays("its weight is computed at run time")
    if bias is not None and not graphs.is_constant(bias):
        raise Stays("its bias is computed at run time")
    sizes = _sizes(make)
    if len(sizes) != 3 or sum(sizes) != weight.shape[-1]:  # type: ignore[index]
        raise Stays("the sizes of its queries, keys and values are not those of its weight")
    if mask is not None and (mask.shape is None or len(mask.shape) > 3):
        rank = "unknown rank" if mask.shape is None else f"rank {len(mask.shape)}"
        raise Stays(f"its mask has {rank}; expected 1, 2 or 3")


def _projections(make: Maker) -> list[ir.Value]:
    """Make queries, keys and values [samples, positions, features]: products of the input, with their biases."""
    x, weight, bias = make.given(0), make.given(1), make.input(2)
    sizes = _sizes(make)
    ends = np.cumsum(sizes)
    made = []
    for part, end, size in zip(_PARTS, ends, sizes, strict=True):
        columns_of = _columns(make, weight, part, end - size, end)
        product = make("MatMul", x, columns_of, name=make.name(part))
        product.type = weight.type
        product.shape = ir.Shape([*(x.shape[:-1] if x.shape is not None else (None, None)), size])
        if bias is not None:
            addend = _columns(make, bias, part, end - size, end)
            product = make("Add", product, addend, name=make.name(f"{part}_bias"), like=product)
        made.append(product)
    return made


def _sizes(make: Maker) -> list[int]:
    """Return the number of features of queries, keys and values."""
    columns = int(make.given(1).shape[-1])  # type: ignore[arg-type, index]
    return [int(n) for n in make.attribute("qkv_hidden_sizes", ())] or [columns // 3] * 3


def _columns(make: Maker, value: ir.Value, part: str, start: int, end: int) -> ir.Value:
    """Return some columns of a constant as a constant."""

    def cut() -> AnyArray:
        array = graphs.constant(value)
        assert array is not None
        return np.ascontiguousarray(array[..., start:end])

    return make.derive((value.name, int(start), int(end)), f"{value.name}.{part}", cut)


def multi_head_attention(make: Maker) -> list[ir.Value | None]:
    """Take the bias out of MultiHeadAttention, where products with weights are before it; replace the whole if need be.

    Raises Stays where the whole is to be replaced and has inputs that standard operators are not made for here.
    """
    parts = [make.input(i) for i in range(3)]
    if not make.standard:
        bias = make.input(3)
        if bias is None or not graphs.is_constant(bias) or not all(map(is_product, parts)):
            return []
        parts = _with_bias(make, parts, bias)
        rest = [None, *make.node.inputs[4:]]
        own = dict(make.node.attributes)
        name, count = str(make.node.name), len(make.node.outputs)
        op = make.node.op_type
        return list(make.several(op, *parts, *rest, outputs=count, name=name, domain=MICROSOFT, **own))
    _check_plain(make)
    if make.input(3) is not None:
        parts = _with_bias(make, parts, make.given(3))
    given = [part for part in parts if part is not None]
    kept = [_by_head(make, part, int(make.attribute("num_heads", 1))) for part in given[1:]]
    # sizes are asked of sums: a bias is only seen behind a product that nothing else reads
    mask = _Mask.of(make, make.input(4), _Positions(make, given[1], make.input(6), 2))
    if make.input(6) is not None:
        kept = [make("Concat", make.given(i), part, axis=2) for i, part in zip((6, 7), kept, strict=True)]
    out = _plain(make, given[0], kept, _width(given[0]), mask)
    return [out, *kept, None][: len(make.node.outputs)]


def _check_plain(make: Maker) -> None:
    """Raise Stays for a MultiHeadAttention that is not made of standard operators here."""
    if any(make.input(i) is not None for i in (8, 9)) or make.output(3) is not None:
        raise Stays("it shares buffers, or gives its scores out")
    parts = [make.input(i) for i in range(3)]
    if any(part is None or part.shape is None or len(part.shape) != 3 for part in parts):
        raise Stays("its queries, keys and values are packed, or of unknown rank")
    mask, bias = make.input(4), make.input(3)
    if mask is not None and (mask.shape is None or len(mask.shape) > 3):
        raise Stays("its mask has an unknown rank, or more than three axes")
    if not isinstance(make.given(0).shape[-1], int):  # type: ignore[index]
        raise Stays("the number of features is unknown")
    if bias is not None and not graphs.is_constant(bias):
        raise Stays("its bias is computed at run time")


def _with_bias(make: Maker, parts: list[ir.Value | None], bias: ir.Value) -> list[ir.Value | None]:
    """Add the bias [queries + keys + values] to its parts."""
    width = _width(parts[0])
    total = int(bias.shape[0])  # type: ignore[arg-type, index]
    starts = (0, width, 2 * width, total)
    made: list[ir.Value | None] = []
    for i, (part, value) in enumerate(zip(_PARTS, parts, strict=True)):
        assert value is not None
        addend = _columns(make, bias, part, starts[i], starts[i + 1])
        made.append(make("Add", value, addend, name=make.name(f"{part}_bias"), like=value))
    return made


def _width(value: ir.Value | None) -> int:
    """Return the number of features of the queries, by their shape or by the weight that makes them."""
    assert value is not None
    if value.shape is not None and isinstance(value.shape[-1], int):
        return value.shape[-1]
    node = value.producer()
    weight = None if node is None else node.inputs[1]
    if weight is None or not is_weight(weight) or weight.shape is None:
        raise Stays("the number of features is unknown")
    return int(weight.shape[-1])  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Positions:
    """Count positions when the model runs.

    source: what keys are made of, [samples, positions, ...]
    past: keys, or keys and values, of the past; None for none
    axis: the axis of the positions in the past
    """

    make: Maker
    source: ir.Value
    past: ir.Value | None
    axis: int

    def count(self) -> tuple[ir.Value, ir.Value]:
        """Make the number of keys, and of those in the past: scalars."""
        make = self.make
        new = make("Gather", make("Shape", self.source), make.number(1, np.int64))
        if self.past is None:
            return new, make.number(0, np.int64)
        old = make("Gather", make("Shape", self.past), make.number(self.axis, np.int64))
        return make("Add", new, old), old

    def later(self, query: ir.Value) -> ir.Value:
        """Make the bools of keys that are later than their query: [queries, keys]."""
        make = self.make
        keys, old = self.count()
        queries = make("Gather", make("Shape", query), make.number(1, np.int64))
        zero, one = make.number(0, np.int64), make.number(1, np.int64)
        place = make("Add", make("Range", zero, queries, one), old)
        return make("Greater", make("Range", zero, keys, one), make("Unsqueeze", place, make.number([1], np.int64)))


@dataclass(frozen=True)
class _Mask:
    """Hold a mask of attention.

    value: the mask; None for none
    lengths_only: it has rank 1, and is known to be one number a sample
    positions: counts keys
    """

    make: Maker
    value: ir.Value | None
    lengths_only: bool
    positions: _Positions

    @classmethod
    def of(cls, make: Maker, value: ir.Value | None, positions: _Positions) -> _Mask:
        """Look at a mask: a dummy is none."""
        if value is not None and value.shape is not None and len(value.shape) == 2 and value.shape[1] == 1:
            value = None
        return cls(make, value, value is not None and _is_one_a_sample(value, positions.source), positions)

    @property
    def rank(self) -> int:
        """Return the number of axes of the mask."""
        assert self.value is not None
        return len(self.value.shape or ())

    def kept(self) -> ir.Value:
        """Make the bools of the positions that are attended to: [samples, keys] or [samples, queries, keys]."""
        make = self.make
        if self.rank > 1:
            return make("Greater", self.value, make.number(0, np.int32))
        keys = make("Cast", self.positions.count()[0], to=ir.DataType.INT32.value)
        place = make("Range", make.number(0, np.int32), keys, make.number(1, np.int32))
        one = make.number([1], np.int64)
        if self.lengths_only:
            return make("Less", place, make("Unsqueeze", self.value, one))
        zero = make.number([0], np.int64)
        count = make("Gather", make("Shape", self.positions.source), zero)
        twice = make("Add", count, count)
        padded = make("Concat", self.value, make("Expand", make.number([0], np.int32), count), axis=0)
        second = make("Slice", padded, count, twice, zero)
        has_starts = make("Equal", make("Shape", self.value), twice)
        starts = make("Where", has_starts, second, make.number([0], np.int32))
        ends = make("Slice", self.value, zero, count, zero)
        early = make("Less", place, make("Unsqueeze", starts, one))
        return make("And", make("Less", place, make("Unsqueeze", ends, one)), make("Not", early))


def _is_one_a_sample(mask: ir.Value, source: ir.Value) -> bool:
    """Tell whether a mask of rank 1 is known to hold one number a sample."""
    if mask.shape is None or len(mask.shape) != 1:
        return False
    maker = mask.producer()
    counted = maker is not None and maker.op_type in ("ReduceSum", "EmbedLayerNormalization")
    known = mask.shape[0] if isinstance(mask.shape[0], int) else mask.shape[0].value
    return counted or (source.shape is not None and known is not None and mask.shape[0] == source.shape[0])


def _multi_head(make: Maker, parts: list[ir.Value], mask: _Mask) -> list[ir.Value]:
    """Make MultiHeadAttention; return its output, and the keys and values of the present where something reads them.

    parts: queries [samples, positions, features], and keys and values; with a past these are of all positions, by heads
    """
    padding, bias = mask.value, make.input(5)
    if padding is not None and mask.rank == 1 and not mask.lengths_only:
        padding = make("Cast", mask.kept(), to=ir.DataType.INT32.value)
    own: dict[str, Any] = {name: make.node.attributes[name] for name in _SHARED if name in make.node.attributes}
    has_past = mask.positions.past is not None
    if has_past and own.pop("unidirectional", None) and make.attribute("unidirectional", 0):
        hidden = make("Where", mask.positions.later(parts[0]), make.number(_LOWEST), make.number(0.0))
        bias = make("Unsqueeze", hidden, make.number([0, 1], np.int64))
    count = 1 if has_past or make.output(1) is None else 3
    inputs = (*parts, None, padding, bias)
    name = str(make.node.name)
    made = make.several("MultiHeadAttention", *inputs, outputs=count, name=name, domain=MICROSOFT, **own)
    if not has_past:
        made[0].type, made[0].shape = parts[2].type, parts[2].shape
    return made


def _plain(make: Maker, query: ir.Value, kept: list[ir.Value], width: int, mask: _Mask) -> ir.Value:
    """Make attention of standard operators.

    query: queries [samples, positions, features]
    kept: keys and values [samples, heads, positions, features of a head]
    width: the number of features of the queries
    """
    heads, bias = int(make.attribute("num_heads", 1)), make.input(5)
    scaled = make("Mul", _by_head(make, query, heads), make.number(_scale(make, width / heads)))
    scores = make("MatMul", scaled, make("Transpose", kept[0], perm=[0, 1, 3, 2]))
    if bias is not None:
        scores = make("Add", scores, bias)
    if mask.value is not None:
        seen = make("Unsqueeze", mask.kept(), make.number([1] if mask.rank == 3 else [1, 2], np.int64))
        masked = make.number(float(make.attribute("mask_filter_value", _FILTER)))
        scores = make("Add", scores, make("Where", seen, make.number(0.0), masked))
    if make.attribute("unidirectional", 0):
        scores = make("Where", mask.positions.later(query), make.number(_LOWEST), scores)
    weighed = make("MatMul", make("Softmax", scores, axis=-1), kept[1])
    joined = make("Transpose", weighed, perm=[0, 2, 1, 3])
    return make("Reshape", joined, make.number([0, 0, -1], np.int64), name=str(make.node.name))


def _scale(make: Maker, features: float) -> float:
    """Return the factor of the scores: the attribute, or one over the root of the features of a head."""
    return float(make.attribute("scale", 0.0)) or features**-0.5


def _by_head(make: Maker, part: ir.Value, heads: int) -> ir.Value:
    """Bring [samples, positions, features] into [samples, heads, positions, features of a head]."""
    split = make("Reshape", part, make.number([0, 0, heads, -1], np.int64))
    return make("Transpose", split, perm=[0, 2, 1, 3])
