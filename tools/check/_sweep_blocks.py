"""Draw the blocks of sweep.py that hold layers: convolutions, matrix products, tables, and what stands behind them.

Each block reads a value, adds nodes to a graph, and returns the value that the next block reads.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import onnx.parser
from _sweep_graph import DEGENERATE, Graph, Value, as_channels, as_sequence, as_vector
from onnx import TensorProto

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from products import BEHIND

# the opset that an operator of BEHIND needs
NEEDS = {"HardSwish": 14, "LayerNormalization": 17}
MOST_NUMBERS = 3000


def conv(g: Graph, v: Value) -> Value:
    """Convolve in one to three dimensions: grouped, depthwise, dilated, strided, padded, with a BatchNormalization."""
    rank = len(v.shape) - 1 if len(v.shape) > 2 else g.dice.pick((1, 2, 2, 2, 3))
    v = as_channels(g, v, rank)
    channels = v.shape[0]
    group = g.dice.pick([n for n in (1, 1, 1, 2, 4, channels) if channels % n == 0])
    out = group * max(1, g.dice.pick((8, 12, 16, 24, 32)) // group)
    kernel = [g.dice.pick([k for k in (1, 2, 3, 3, 5) if k <= n + 1]) for n in v.shape[1:]]
    # ONNX Runtime takes no dilation together with auto_pad
    auto = g.dice.pick(("NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"))
    dilations = [2 if auto == "NOTSET" and k > 1 and g.chance(0.2) else 1 for k in kernel]
    strides = [2 if v.size > MOST_NUMBERS or g.chance(0.25) else 1 for _ in kernel]
    spans = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    if auto == "VALID" and any(s >= n for s, n in zip(spans, v.shape[1:], strict=True)):
        auto = "SAME_UPPER"
    before, after = [(s + 1) // 2 for s in spans], [s // 2 if g.chance(0.8) else (s + 1) // 2 for s in spans]
    pads = {"pads": [*before, *after]} if auto == "NOTSET" else {"auto_pad": auto}
    if auto == "VALID":
        sizes = [(n - s - 1) // t + 1 for n, s, t in zip(v.shape[1:], spans, strides, strict=True)]
    elif auto == "NOTSET":
        padded = [n + b + a for n, b, a in zip(v.shape[1:], before, after, strict=True)]
        sizes = [(n - s - 1) // t + 1 for n, s, t in zip(padded, spans, strides, strict=True)]
    else:
        sizes = [-(-n // t) for n, t in zip(v.shape[1:], strides, strict=True)]
    inputs = channels // group
    weight = g.weight(out, inputs, *kernel, fan=inputs * int(np.prod(kernel)))
    bias = [g.bias(out)] if g.chance(0.6) else []
    shown = {"kernel_shape": kernel} if g.chance(0.7) else {}
    result = g.op("Conv", v, weight, *bias, group=group, dilations=dilations, strides=strides, **pads, **shown)
    return _normed(g, Value(result, (out, *sizes)))


def _normed(g: Graph, v: Value) -> Value:
    """Put a BatchNormalization, an activation function, both or neither behind a convolution."""
    count = v.shape[0]
    if g.chance(0.4):
        stats = (g.normal(count, scale=0.3, mean=1), g.normal(count, scale=0.2), g.normal(count, scale=0.2))
        variance = np.abs(g.normal(count, scale=0.3, mean=1)) + 0.1
        v = Value(g.op("BatchNormalization", v, *map(g.const, (*stats, variance))), v.shape)
    if g.chance(0.5):
        v = Value(g.op("Relu", v), v.shape)
    elif g.chance(0.3):
        v = Value(g.op("Clip", v, g.const(0), g.const(6)), v.shape)
    return v


def conv_transpose(g: Graph, v: Value) -> Value:
    """Convolve transposed: with groups, output_padding, other channels in than out."""
    rank = len(v.shape) - 1 if len(v.shape) > 2 else g.dice.pick((1, 2, 2))
    v = as_channels(g, v, rank)
    channels = v.shape[0]
    group = g.dice.pick([n for n in (1, 1, 2, 4) if channels % n == 0])
    out = g.dice.pick((4, 6, 10)) if v.size < MOST_NUMBERS else 1
    strides = [g.dice.pick((1, 2) if v.size < MOST_NUMBERS else (1,)) for _ in range(rank)]
    kernel = [g.dice.pick((2, 3)) for _ in range(rank)]
    pads = [g.dice.below(2) if n > 1 else 0 for n in v.shape[1:]] * 2
    extra = [g.dice.below(s) for s in strides]
    sizes = [
        (n - 1) * s + e + k - p - q
        for n, s, e, k, p, q in zip(v.shape[1:], strides, extra, kernel, pads[:rank], pads[rank:], strict=True)
    ]
    if min(sizes) < 1:
        pads, sizes = [0] * 2 * rank, [s + 2 * p for s, p in zip(sizes, pads, strict=False)]
    weight = g.weight(channels, out, *kernel, fan=channels // group * int(np.prod(kernel)), channels=1)
    bias = [g.bias(out * group)] if g.chance(0.6) else []
    result = g.op(
        "ConvTranspose", v, weight, *bias, group=group, strides=strides, pads=pads, output_padding=extra,
        kernel_shape=kernel,
    )  # fmt: skip
    return _normed(g, Value(result, (out * group, *sizes)))


def gemm(g: Graph, v: Value) -> Value:
    """Multiply by Gemm: transposed or not, scaled or not, with every shape of a bias."""
    v = as_vector(g, v)
    width, out = v.size, g.dice.pick((10, 16, 32, 48))
    source: Value | str = v
    attributes: dict[str, float | int] = {}
    if g.chance(0.3):
        source, attributes["transA"] = g.op("Transpose", v, perm=[1, 0]), 1
    turned = g.chance(0.5)
    if turned:
        attributes["transB"] = 1
    for scale in ("alpha", "beta"):
        if g.chance(0.4):
            attributes[scale] = g.dice.pick((0.5, 2.0, -1.0, 0.0) if scale == "beta" else (0.5, 2.0, -1.0))
    weight = g.weight(*((out, width) if turned else (width, out)), fan=width, channels=0 if turned else 1)
    shapes: list[tuple[int, ...]] = [(out,), (out,), (1, out), (1,), (), (1, 1)]
    if g.batch:
        shapes += [(g.batch, out), (g.batch, 1)]
    given = [g.const(g.normal(*g.dice.pick(shapes), scale=0.3))] if g.chance(0.8) else []
    if given and out == width and g.chance(0.2):
        given = [v.name]
    return Value(g.op("Gemm", source, weight, *given, **attributes), (out,))


def matmul(g: Graph, v: Value) -> Value:
    """Multiply by MatMul: a constant of one to four axes on either side, with a bias before, behind or not at all."""
    v = as_sequence(g, v)
    positions, width = v.shape
    out = g.dice.pick((8, 16, 24, 32))
    side = g.dice.pick(("right", "right", "right", "rank 2", "left", "stack", "vector", "rank 5"))
    g.traits.append(f"MatMul {side}")
    if side == "rank 2":
        v = as_vector(g, v)
        return _biased(g, Value(g.op("MatMul", v, g.weight(v.size, out, fan=v.size, channels=1)), (out,)))
    if side == "left":
        return Value(g.op("MatMul", g.weight(out, positions, fan=positions), v), (out, width))
    if side == "vector":
        v = as_vector(g, v)
        product = g.op("MatMul", v, g.weight(v.size, fan=v.size))
        return Value(g.op("Unsqueeze", product, g.ints(1)), (1,))
    if side == "stack":
        heads = g.dice.pick((2, 3))
        stacked = g.op("Unsqueeze", v, g.ints(1))
        product = g.op("MatMul", stacked, g.weight(heads, width, 8, fan=width, channels=2))
        flat = g.op("Reshape", g.op("Transpose", product, perm=[0, 2, 1, 3]), g.ints(0, positions, heads * 8))
        return Value(flat, (positions, heads * 8))
    weight = g.weight(width, out, fan=width, channels=1)
    if side == "rank 5":
        product = g.op("MatMul", g.op("Unsqueeze", v, g.ints(1, 2)), weight)
        return Value(g.op("Squeeze", product, g.ints(1, 2)), (positions, out))
    return _biased(g, Value(g.op("MatMul", v, weight), (positions, out)))


def _biased(g: Graph, v: Value) -> Value:
    """Add a bias on the left, on the right or not."""
    if g.chance(0.4):
        return v
    bias = g.bias(v.shape[-1])
    return Value(g.op("Add", *((v, bias) if g.chance(0.5) else (bias, v))), v.shape)


def table(g: Graph, v: Value) -> Value:
    """Look rows up in a table; where it is tied, a MatMul reads the same constant transposed."""
    sequence = as_sequence(g, v)
    positions, width = sequence.shape
    words = g.dice.pick((40, 64))
    ids = g.whole_input("ids", g.dice.pick((TensorProto.INT64, TensorProto.INT32)), words, positions)
    rows = g.weight(words, width, fan=1)
    found = g.op("Gather", rows, ids, axis=0)
    summed = Value(g.op("Add", found, sequence), sequence.shape)
    if not g.chance(0.5):
        return summed
    g.traits.append("tied table")
    hidden = matmul_square(g, summed)
    return Value(g.op("MatMul", hidden, g.op("Transpose", rows, perm=[1, 0])), (positions, words))


def matmul_square(g: Graph, v: Value) -> Value:
    """Multiply by a matrix that keeps the width, and bound the result."""
    width = v.shape[-1]
    return Value(g.op("Tanh", g.op("MatMul", v, g.weight(width, width, fan=width, channels=1))), v.shape)


def behind(g: Graph, v: Value) -> Value:
    """Put an operator of BEHIND behind a product or a convolution of the same shape."""
    name = g.dice.pick(BEHIND)
    if g.half and name == "celu":
        # there is no Celu of float16
        name = "elu"
    form = g.dice.pick(("matmul", "biased", "gemm", "conv", "depthwise", "conv_transpose"))
    g.traits.append(f"{name} behind {form}")
    if form in ("conv", "depthwise", "conv_transpose"):
        v = as_channels(g, v, len(v.shape) - 1 if len(v.shape) > 2 else 2)
        n, rank = v.shape[0], len(v.shape) - 1
        group = n if form == "depthwise" else 1
        weight = g.weight(n, n // group, *[3] * rank, fan=n // group * 3**rank, channels=int(form == "conv_transpose"))
        kind = "ConvTranspose" if form == "conv_transpose" else "Conv"
        product = g.op(kind, v, weight, g.bias(n), pads=[1] * 2 * rank, group=group)
    else:
        v = as_vector(g, v) if form == "gemm" or g.chance(0.3) else as_sequence(g, v)
        n = v.shape[-1]
        weight = g.weight(n, n, fan=n, channels=1)
        product = g.op("Gemm", v, weight, g.bias(n)) if form == "gemm" else g.op("MatMul", v, weight)
        if form == "biased":
            product = g.op("Add", product, g.bias(n))
    return Value(add_text(g, BEHIND[name], v, product), v.shape)


def add_text(g: Graph, text: str, x: Value, product: str) -> str:
    """Add the nodes of a text of BEHIND, which reads the product v and its input x; return the name of its result r."""
    values = {"zero": 0, "six": 6, "minus": -1, "one": 1, "two": 2, "half": 0.5, "root": 2**0.5}
    parsed = onnx.parser.parse_graph(f"g (float[n] x, float[n] v) => (float[n] r) {{ {text} }}")
    names = {"x": x.name, "v": product}
    for node in parsed.node:
        g.need(NEEDS.get(node.op_type, 13))
        for i in node.input:
            if i == "many":
                names.setdefault(i, g.const(g.normal(x.shape[-1], scale=0.3, mean=1)))
            elif i in values:
                names.setdefault(i, g.const(values[i]))
        names |= {o: g.name(o) for o in node.output}
        node.input[:] = [names[i] for i in node.input]
        node.output[:] = [names[o] for o in node.output]
        node.name = g.name("behind")
        g.nodes.append(node)
    return names["r"]


def degenerate_weight(g: Graph, v: Value) -> Value:
    """Put a layer with spoiled channels."""
    g.degenerate = g.dice.pick(DEGENERATE)
    g.traits.append(f"weight: {g.degenerate}")
    v = g.dice.pick((conv, gemm, matmul, behind, conv_transpose))(g, v)
    if g.degenerate in ("huge", "outlier", "spread"):
        v = Value(g.op("Tanh", v), v.shape)
    g.degenerate = None
    return v


def degenerate_activation(g: Graph, v: Value) -> Value:
    """Make an activation constant, dead, of a huge or tiny range, or of outliers, and put a layer behind it."""
    kind = g.dice.pick(("constant", "dead", "huge", "tiny", "outlier channel", "rare", "quiet and loud"))
    g.traits.append(f"activation: {kind}")
    if kind == "constant":
        r = g.op("Add", g.op("Mul", v, g.const(0)), g.const(0.7))
    elif kind == "dead":
        r = g.op("Relu", g.op("Sub", v, g.const(1e5)))
    elif kind in ("huge", "tiny"):
        r = g.op("Mul", v, g.const(1e6 if kind == "huge" else 1e-6))
    elif kind == "outlier channel":
        factor = np.ones(v.shape[-1], np.float32)
        factor[g.dice.below(v.shape[-1])] = 200
        r = g.op("Mul", v, g.const(factor))
    elif kind == "rare":
        r = g.op("Pow", v, g.const(5))
    else:
        g.need(17)
        scale = g.const(g.normal(v.shape[-1], scale=0.2, mean=1))
        hidden = behind(g, v)
        hidden = hidden if hidden.shape == v.shape else v
        r = g.op("LayerNormalization", hidden, scale, axis=-1)
    v = g.dice.pick((conv, gemm, matmul))(g, Value(r, v.shape))
    return Value(g.op("Tanh", v), v.shape) if kind in ("huge", "tiny", "rare") else v


def copies(g: Graph, v: Value) -> Value:
    """Put a layer whose weight is a copy of a constant: by Identity, Transpose, Cast, Reshape or Constant."""
    g.copied = True
    v = g.dice.pick((conv, gemm, matmul, conv_transpose))(g, v)
    g.copied = False
    return v


def shared(g: Graph, v: Value) -> Value:
    """Put two layers that share a weight; perhaps one of them is excluded."""
    v = as_sequence(g, v)
    width = v.shape[-1]
    weight = g.weight(width, width, fan=width, channels=1)
    first = Value(g.op("Tanh", g.op("MatMul", v, weight)), v.shape)
    second = g.op("MatMul", first, weight)
    if g.chance(0.5):
        g.nodes[-1].name = g.name("kept_float")
        g.excluded.append(f"^{re.escape(g.nodes[-1].name)}$")
        g.traits.append("shared weight, one layer excluded")
    return Value(g.op("Add", second, first), v.shape)


def partial(g: Graph, v: Value) -> Value:
    """Put a layer that is QDQ already."""
    g.need(19 if g.half else 13)
    v = as_vector(g, v)
    width, out = v.size, 24
    codes = g.const(g.dice.rng.integers(-100, 101, (width, out)), np.int8)
    scale = g.const(np.abs(g.normal(out, scale=0.002, mean=0.01)) + 1e-3)
    weight = g.op("DequantizeLinear", codes, scale, g.const(np.zeros(out), np.int8), axis=1)
    grid = (g.const(0.03), g.const(120, np.uint8))
    source: Value | str = v
    if g.chance(0.6):
        source = g.op("DequantizeLinear", g.op("QuantizeLinear", v, *grid), *grid)
    return Value(g.op("Tanh", g.op("MatMul", source, weight)), (out,))


def bytes_input(g: Graph) -> Value:
    """Begin with an image of bytes behind a DequantizeLinear."""
    g.traits.append("bytes")
    raw = g.whole_input("bytes", TensorProto.UINT8, 256, 3, 12, 12)
    return Value(g.op("DequantizeLinear", raw, g.const(1 / 64), g.const(128, np.uint8)), raw.shape)
