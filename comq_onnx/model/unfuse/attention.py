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

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.op_kind import AnyArray
from comq_onnx.model.unfuse.maker import MICROSOFT, Maker, Stays, is_product, is_weight

_PARTS = ("query", "key", "value")
# attributes that Attention and MultiHeadAttention share
_SHARED = ("num_heads", "unidirectional", "scale", "mask_filter_value")
_FILTER = -10000.0


def attention(make: Maker) -> list[ir.Value | None]:
    """Replace Attention by three products with their biases, and attention without weights.

    Raises Stays for what ONNX Runtime does on GPUs only, and for shapes that the graph does not tell.
    """
    if not (is_weight(make.input(1)) or make.standard):
        return []
    _check_attention(make)
    parts = _projections(make)
    past = make.input(4)
    if past is None:
        before: list[ir.Value | None] = [None, None]
    else:
        before = [make("Gather", past, make.number(i, np.int64), axis=0) for i in (0, 1)]
    mask = _Mask.of(make, make.input(3), make.given(0), before[0])
    if make.standard:
        outputs = _plain(make, parts, _sizes(make)[0], mask, before)
    else:
        outputs = _multi_head(make, parts, mask, before)
    if make.output(1) is None:
        return [outputs[0], None][: len(make.node.outputs)]
    axis = make.number([0], np.int64)
    present = make("Concat", *(make("Unsqueeze", value, axis) for value in outputs[1:]), axis=0)
    return [outputs[0], present]


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
        product.type, product.shape = x.type, None if x.shape is None else ir.Shape([*x.shape[:-1], size])
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
    before = [make.input(6), make.input(7)]
    # sizes are asked of sums: a bias is only seen behind a product that nothing else reads
    given = [part for part in parts if part is not None]
    made = _plain(make, given, _width(given[0]), _Mask.of(make, make.input(4), given[1], before[0]), before)
    return [*made, None][: len(make.node.outputs)]


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
class _Mask:
    """Hold a mask of attention, and the nodes that tell sizes.

    value: the mask; None for none
    rank: its number of axes
    lengths_only: it has rank 1, and is known to be one number a sample
    keys: the number of keys [1]; None where nothing asks for it
    """

    make: Maker
    value: ir.Value | None
    lengths_only: bool
    source: ir.Value
    before: ir.Value | None

    @classmethod
    def of(cls, make: Maker, value: ir.Value | None, source: ir.Value, before: ir.Value | None) -> _Mask:
        """Look at a mask.

        source: what keys are made of, [samples, positions, ...]
        before: the keys of the past [samples, heads, positions, features]; None for none
        """
        if value is not None and value.shape is not None and len(value.shape) == 2 and value.shape[1] == 1:
            value = None
        return cls(make, value, value is not None and _is_one_a_sample(value, source), source, before)

    @property
    def rank(self) -> int:
        """Return the number of axes of the mask."""
        assert self.value is not None
        return len(self.value.shape or ())

    def positions(self) -> tuple[ir.Value, ir.Value]:
        """Make the number of keys, and of those in the past: scalars."""
        make = self.make
        new = make("Gather", make("Shape", self.source), make.number(1, np.int64))
        if self.before is None:
            return new, make.number(0, np.int64)
        old = make("Gather", make("Shape", self.before), make.number(2, np.int64))
        return make("Add", new, old), old

    def kept(self) -> ir.Value:
        """Make the bools of the positions that are attended to: [samples, keys] or [samples, queries, keys]."""
        make = self.make
        if self.rank > 1:
            return make("Greater", self.value, make.number(0, np.int32))
        keys, _ = self.positions()
        keys = make("Cast", keys, to=ir.DataType.INT32.value)
        place = make("Range", make.number(0, np.int32), keys, make.number(1, np.int32))
        one = make.number([1], np.int64)
        if self.lengths_only:
            return make("Less", place, make("Unsqueeze", self.value, one))
        zero = make.number([0], np.int64)
        count = make("Gather", make("Shape", self.source), zero)
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


def _multi_head(make: Maker, parts: list[ir.Value], mask: _Mask, before: list[ir.Value | None]) -> list[ir.Value]:
    """Make MultiHeadAttention; return its output, and the keys and values of the present."""
    padding = mask.value
    if padding is not None and mask.rank == 1 and not mask.lengths_only:
        padding = make("Cast", mask.kept(), to=ir.DataType.INT32.value)
    own = {name: make.node.attributes[name] for name in _SHARED if name in make.node.attributes}
    count = 1 if make.output(1) is None else 3
    inputs = (*parts, None, padding, make.input(5), *before)
    name = str(make.node.name)
    made = make.several("MultiHeadAttention", *inputs, outputs=count, name=name, domain=MICROSOFT, **own)
    made[0].type, made[0].shape = parts[2].type, parts[2].shape
    return made


def _plain(
    make: Maker, parts: list[ir.Value], width: int, mask: _Mask, before: list[ir.Value | None]
) -> list[ir.Value]:
    """Make attention of standard operators; return its output, and the keys and values of the present.

    width: the number of features of the queries
    """
    heads, bias = int(make.attribute("num_heads", 1)), make.input(5)
    query, key, value = (_by_head(make, part, heads) for part in parts)
    if before[0] is not None and before[1] is not None:
        key, value = make("Concat", before[0], key, axis=2), make("Concat", before[1], value, axis=2)
    scale = float(make.attribute("scale", 0.0)) or (width / heads) ** -0.5
    scores = make("MatMul", make("Mul", query, make.number(scale)), make("Transpose", key, perm=[0, 1, 3, 2]))
    if bias is not None:
        scores = make("Add", scores, bias)
    if mask.value is not None:
        kept = make("Unsqueeze", mask.kept(), make.number([1] if mask.rank == 3 else [1, 2], np.int64))
        masked = make.number(float(make.attribute("mask_filter_value", _FILTER)))
        scores = make("Add", scores, make("Where", kept, make.number(0.0), masked))
    if make.attribute("unidirectional", 0):
        scores = _only_earlier(make, scores, mask, parts[0])
    weighed = make("MatMul", make("Softmax", scores, axis=-1), value)
    joined = make("Transpose", weighed, perm=[0, 2, 1, 3])
    out = make("Reshape", joined, make.number([0, 0, -1], np.int64), name=str(make.node.name))
    return [out, key, value]


def _by_head(make: Maker, part: ir.Value, heads: int) -> ir.Value:
    """Bring [samples, positions, features] into [samples, heads, positions, features of a head]."""
    split = make("Reshape", part, make.number([0, 0, heads, -1], np.int64))
    return make("Transpose", split, perm=[0, 2, 1, 3])


def _only_earlier(make: Maker, scores: ir.Value, mask: _Mask, query: ir.Value) -> ir.Value:
    """Make -infinity of the scores of keys that are later than their query."""
    keys, old = mask.positions()
    queries = make("Gather", make("Shape", query), make.number(1, np.int64))
    zero, one = make.number(0, np.int64), make.number(1, np.int64)
    place = make("Add", make("Range", zero, queries, one), old)
    later = make("Greater", make("Range", zero, keys, one), make("Unsqueeze", place, make.number([1], np.int64)))
    return make("Where", later, make.number(float(np.finfo(np.float32).min)), scores)
