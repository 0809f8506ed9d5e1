"""Draw the parts of sweep.py that are no plain layers: control flow, recurrent layers, fused operators, and heads."""

from __future__ import annotations

from typing import Any

import numpy as np
from _sweep_blocks import behind, conv, gemm, matmul
from _sweep_graph import MS, Array, Graph, Value, as_channels, as_sequence
from onnx import AttributeProto, GraphProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def _body(name: str, nodes: list[Any], given: list[Any], results: list[Any], own: dict[str, Array]) -> GraphProto:
    constants = [numpy_helper.from_array(array, title) for title, array in own.items()]
    return helper.make_graph(nodes, name, given, results, constants)


def _info(name: str, kind: int, dims: Any = None) -> Any:
    return helper.make_tensor_value_info(name, kind, dims)


def branch(g: Graph, v: Value) -> Value:
    """Choose between two branches, with weights of their own or shared; samples take both of them or one."""
    v = as_sequence(g, v)
    width = v.shape[-1]
    own = g.dice.pick(("captured", "inside", "shared", "one empty"))
    share = g.dice.pick((0.0, 0.05, 1.0))
    g.traits.append(f"If: {own}, share {share}")
    switch = g.whole_input("switch", TensorProto.INT64, 2, 1, share=share)
    total = g.op("ReduceSum", switch, keepdims=0)
    condition = g.op("Greater", total, g.const(0, np.int64))
    weights = [g.weight(width, width, fan=width, channels=1)] * 2
    if own != "shared":
        weights[1] = g.weight(width, width, fan=width, channels=1)
    graphs = []
    for which, weight in zip(("then", "else"), weights, strict=True):
        out, product = g.name(f"{which}_out"), g.name(f"{which}_product")
        inside: dict[str, Array] = {}
        if own == "inside" and weight in g.constants:
            inside[weight] = g.constants.pop(weight)
        nodes = [
            helper.make_node("MatMul", [v.name, weight], [product], name=g.name(f"{which}_fc")),
            helper.make_node("Tanh", [product], [out], name=g.name("tanh")),
        ]
        if own == "one empty" and which == "else":
            nodes = [helper.make_node("Identity", [v.name], [out], name=g.name("same"))]
        graphs.append(_body(g.name(which), nodes, [], [_info(out, FLOAT)], inside))
    return Value(g.op("If", condition, then_branch=graphs[0], else_branch=graphs[1]), v.shape)


def loop(g: Graph, v: Value) -> Value:
    """Multiply by one weight in each turn of a Loop, perhaps one that is also read outside."""
    v = as_sequence(g, v)
    width = v.shape[-1]
    weight = g.weight(width, width, fan=width, channels=1)
    index, go_in, go, state, product, out = (g.name(n) for n in ("i", "go_in", "go", "state", "product", "out"))
    nodes = [
        helper.make_node("Identity", [go_in], [go]),
        helper.make_node("MatMul", [state, weight], [product], name=g.name("loop_fc")),
        helper.make_node("Tanh", [product], [out]),
    ]
    dims = [g.batch or "batch", *v.shape]
    body = _body(
        g.name("body"), nodes,
        [_info(index, TensorProto.INT64, []), _info(go_in, TensorProto.BOOL, []), _info(state, FLOAT, dims)],
        [_info(go, TensorProto.BOOL, []), _info(out, FLOAT, dims)], {},
    )  # fmt: skip
    turns = g.const(g.dice.pick((1, 2, 3)), np.int64)
    result = Value(g.op("Loop", turns, g.const(True, np.bool_), v, body=body), v.shape)
    if g.chance(0.3):
        g.traits.append("loop weight read outside")
        return Value(g.op("MatMul", result, weight), v.shape)
    return result


def scan(g: Graph, v: Value) -> Value:
    """Scan the positions with a state, and a layer in the body."""
    v = as_sequence(g, v)
    positions, width = v.shape
    weight, begin = g.weight(width, width, fan=width, channels=1), g.op("Gather", v, g.const(0, np.int64), axis=1)
    state, part, product, summed, out, copy = (g.name(n) for n in ("state", "part", "product", "sum", "out", "copy"))
    nodes = [
        helper.make_node("MatMul", [part, weight], [product], name=g.name("scan_fc")),
        helper.make_node("Add", [product, state], [summed]),
        helper.make_node("Tanh", [summed], [out]),
        helper.make_node("Identity", [out], [copy]),
    ]
    infos = [[_info(n, FLOAT, [g.batch or "batch", width]) for n in pair] for pair in ((state, part), (out, copy))]
    body = _body(g.name("scan"), nodes, *infos, {})
    _, stacked = g.op(
        "Scan", begin, v, outputs=2, body=body, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1]
    )
    return Value(stacked, (positions, width))


def recurrent(g: Graph, v: Value) -> Value:
    """Put an LSTM, a GRU or an RNN over the positions."""
    v = as_sequence(g, v)
    positions, width = v.shape
    kind, gates = g.dice.pick((("LSTM", 4), ("GRU", 3), ("RNN", 1)))
    direction = g.dice.pick(("forward", "reverse", "bidirectional"))
    ways, hidden = 2 if direction == "bidirectional" else 1, g.dice.pick((8, 12, 16))
    given = [
        g.op("Transpose", v, perm=[1, 0, 2]),
        g.weight(ways, gates * hidden, width, fan=width, channels=1),
        g.weight(ways, gates * hidden, hidden, fan=hidden, channels=1),
    ]
    if g.chance(0.7):
        given.append(g.const(g.normal(ways, 2 * gates * hidden, scale=0.1)))
    reset = {"linear_before_reset": 1} if kind == "GRU" and g.chance(0.6) else {}
    # every output of it, or the hidden states alone
    result = g.op(kind, *given, hidden_size=hidden, direction=direction, **reset)
    moved = g.op("Transpose", result, perm=[2, 0, 1, 3])
    return Value(g.op("Reshape", moved, g.ints(0, positions, ways * hidden)), (positions, ways * hidden))


def fused(g: Graph, v: Value) -> Value:
    """Put an operator that ONNX Runtime's tools fuse, of the domain com.microsoft."""
    kind = g.dice.pick(
        ("Attention", "FusedMatMul", "BiasGelu", "SkipLayerNormalization", "QuickGelu", "FusedConv", "FastGelu", "Gelu")
    )
    g.traits.append(kind)
    if kind == "FusedConv":
        v = as_channels(g, v, 2)
        weight = g.weight(16, v.shape[0], 3, 3, fan=9 * v.shape[0])
        act = g.dice.pick(({"activation": "Relu"}, {"activation": "LeakyRelu", "activation_params": [0.1]}))
        return Value(g.op(kind, v, weight, g.bias(16), domain=MS, pads=[1] * 4, **act), (16, *v.shape[1:]))
    v = as_sequence(g, v)
    positions, width = v.shape
    if kind == "Attention":
        wide = 2 * max(4, width // 2)
        given = (g.weight(width, 3 * wide, fan=width, channels=1), g.bias(3 * wide))
        return Value(g.op(kind, v, *given, domain=MS, num_heads=2), (positions, wide))
    if kind == "FusedMatMul":
        turned = g.chance(0.5)
        weight = g.weight(*((24, width) if turned else (width, 24)), fan=width, channels=0 if turned else 1)
        alpha = g.dice.pick((1.0, 0.5, 2.0))
        return Value(g.op(kind, v, weight, domain=MS, transB=int(turned), alpha=alpha), (positions, 24))
    product = g.op("MatMul", v, g.weight(width, width, fan=width, channels=1))
    if kind == "SkipLayerNormalization":
        return Value(g.op(kind, product, v, g.const(1 + g.normal(width, scale=0.2)), domain=MS), v.shape)
    if kind == "QuickGelu":
        return Value(g.op(kind, product, domain=MS, alpha=1.702), v.shape)
    biased = [g.bias(width)] if kind in ("BiasGelu", "FastGelu") else []
    return Value(g.op(kind, product, *biased, domain=MS), v.shape)


def attention(g: Graph, v: Value) -> Value:
    """Put one head of attention as exporters write it, with a LayerNormalization before it."""
    g.need(17)
    v = as_sequence(g, v)
    width = v.shape[-1]
    normed = g.op("LayerNormalization", v, g.const(g.normal(width, scale=0.2, mean=1)), g.bias(width), axis=-1)
    query, key, value = (g.op("MatMul", normed, g.weight(width, width, fan=width, channels=1)) for _ in range(3))
    scores = g.op("MatMul", query, g.op("Transpose", g.op("Add", key, g.bias(width)), perm=[0, 2, 1]))
    shares = g.op("Softmax", g.op("Mul", scores, g.const(width**-0.5)), axis=-1)
    out = g.op("MatMul", g.op("MatMul", shares, value), g.weight(width, width, fan=width, channels=1))
    return Value(g.op("Add", v, out), v.shape)


# Heads: what is behind the last block
# ----------------------------------------------------------------------------------------------------------------------


def plain(g: Graph, v: Value) -> None:
    """Give the value as it is, or class scores of it."""
    if g.chance(0.5):
        v = gemm(g, v)
        if g.chance(0.4):
            v = Value(g.op("Softmax", v, axis=-1), v.shape)
    g.output(v.name, FLOAT, v.shape)


def boxes(g: Graph, v: Value) -> None:
    """Join boxes in pixels and scores below one by a Concat; perhaps NonMaxSuppression selects among them."""
    v = as_channels(g, v, 2)
    places = v.size // v.shape[0]
    first = g.op("Conv", v, g.weight(4, v.shape[0], 3, 3, fan=9 * v.shape[0]), pads=[1] * 4)
    second = g.op("Conv", v, g.weight(6, v.shape[0], 3, 3, fan=9 * v.shape[0]), g.bias(6), pads=[1] * 4)
    where = g.op("Mul", g.op("Sigmoid", g.op("Reshape", first, g.ints(0, 4, places))), g.const(640))
    scores = g.op("Sigmoid", g.op("Reshape", second, g.ints(0, 6, places)))
    # NonMaxSuppression takes no float16
    if g.half or g.chance(0.5):
        g.traits.append("joined boxes")
        joined = g.op("Concat", where, scores, axis=1)
        g.output(joined, FLOAT, (10, places))
        return
    g.traits.append("NonMaxSuppression")
    rows = g.op("Transpose", where, perm=[0, 2, 1])
    limits = (g.const(10, np.int64), g.const(0.45), g.const(0.5))
    chosen = g.op("NonMaxSuppression", rows, scores, *limits, center_point_box=1)
    g.output(chosen, TensorProto.INT64, ("n", 3), selected=True)
    if g.chance(0.5):
        g.output(scores, FLOAT, (6, places))


def selection(g: Graph, v: Value) -> None:
    """Select by TopK, NonZero, ArgMax or Where; perhaps the numbers are an output too."""
    v = gemm(g, v)
    kind = g.dice.pick(("TopK", "NonZero", "ArgMax", "Compress", "Cast"))
    g.traits.append(f"head {kind}")
    if kind == "TopK":
        best, which = g.op(kind, v, g.ints(3), outputs=2, axis=-1)
        g.output(best, FLOAT, (3,))
        g.output(which, TensorProto.INT64, (3,))
    elif kind == "ArgMax":
        g.output(g.op(kind, v, axis=-1, keepdims=0), TensorProto.INT64, ())
    elif kind == "Cast":
        g.output(g.op(kind, g.op("Mul", v, g.const(100)), to=TensorProto.INT64), TensorProto.INT64, v.shape)
    else:
        above = g.op("Greater", v, g.const(0.5))
        if kind == "NonZero":
            g.output(g.op(kind, above), TensorProto.INT64, (2, "n"), selected=True)
        else:
            flat = g.op("Reshape", above, g.ints(-1))
            g.output(g.op(kind, g.op("Reshape", v, g.ints(-1)), flat, axis=0), FLOAT, ("n",), selected=True)
    if g.chance(0.4):
        g.output(v.name, FLOAT, v.shape)


def several(g: Graph, v: Value) -> None:
    """Give several outputs: of layers that share their input, and the input of a layer itself."""
    for block in (gemm, g.dice.pick((conv, matmul, behind))):
        result = block(g, v)
        g.output(result.name, FLOAT, result.shape)
    if g.chance(0.5) and v.name not in g.inputs:
        g.output(v.name, FLOAT, v.shape)


def subgraphs(graph: GraphProto) -> list[GraphProto]:
    """List a graph and the graphs inside it."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == AttributeProto.GRAPH]
    return [graph, *(found for one in inner for found in subgraphs(one))]
