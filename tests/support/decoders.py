"""Build small decoders in the forms that people deploy: as ONNX Runtime GenAI's model builder writes them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx

from models import Arrays, build, normal, weight

# tokens of the vocabulary; the width of the state, of a head, of a feed-forward block; heads of queries and of keys
VOCABULARY, STATE, HEAD, INNER, HEADS, GROUPS = 60, 32, 16, 48, 2, 1
# the positions that rotary angles are stored for
POSITIONS = 160


def genai(
    layers: int = 2,
    tied: bool = True,
    width: int | str = "kv_cache_dim",
    half: bool = False,
    keeping: bool = False,
    vocabulary: int = VOCABULARY,
) -> onnx.ModelProto:
    """Build a decoder with a cache: GroupQueryAttention with rotary positions inside, one product for q, k and v.

    input_ids [batch, seq], attention_mask [batch, total], past [batch, 1, past, width] -> logits [batch, seq, 60],
    present [batch, 1, total, width].

    tied: the embedding is the head, transposed; else it has a table of its own
    width: of the past as the inputs declare it; the builder gives it a name
    half: float16 throughout, as the builder writes it for GPUs
    vocabulary: the number of tokens; tables of 2^16 numbers and more are looked up, smaller ones unpacked
    keeping: with the number of last positions that get logits as an input of rank 0, and the positions of the call
    """
    number = "float16" if half else "float"
    pasts = [(i, kind) for i in range(layers) for kind in ("key", "value")]
    given = "".join(f', {number}[batch, 1, past, {width}] "past_key_values.{i}.{kind}"' for i, kind in pasts)
    made = "".join(f', {number}[batch, 1, total, {width}] "present.{i}.{kind}"' for i, kind in pasts)
    lookup = "table = Transpose (head)" if tied else ""
    hidden, more, kept = f"h{2 * layers}", "", ""
    if keeping:
        more = ", int64 num_logits_to_keep, int64[seq] cache_position, bool[1] use_cache_branch"
        kept = f"""at = Neg (num_logits_to_keep)
            starts = Unsqueeze (at, zero)
            kept = Slice (h{2 * layers}, starts, ends, one)
            place = Cast <to = {10 if half else 1}> (cache_position)
            least = ReduceMin <keepdims = 0> (place)
            moved = Add (kept, least)"""
        hidden = "moved"
    blocks = "".join(_block(i) for i in range(layers))
    weights = _weights(layers, tied, vocabulary)
    return build(
        f"""genai (int64[batch, seq] input_ids, int64[batch, total] attention_mask{given}{more})
            => ({number}[batch, seq, {vocabulary}] logits{made})
        <int64[1] one = {{1}}, int64[1] zero = {{0}}, int64[1] ends = {{9999}}, int64 second = {{1}}> {{
            lengths = ReduceSum (attention_mask, one)
            last = Sub (lengths, one)
            seqlens = Cast <to = 6> (last)
            shape = Shape (attention_mask)
            whole = Gather (shape, second)
            total = Cast <to = 6> (whole)
            {lookup}
            [embed] x0 = Gather (table, input_ids)
            h0 = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (x0, norm0)
            {blocks}
            {kept}
            [lm_head] logits = MatMul ({hidden}, head)
        }}""",
        {name: array.astype(np.float16) if half else array for name, array in weights.items()},
        opset=22, ir_version=10, domains=["com.microsoft"],
    )  # fmt: skip


def _block(i: int) -> str:
    """Write attention and feed-forward block `i`, each with the sum and the normalization behind it."""
    skip = "com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001>"
    return f"""
            [qkv{i}] qkv{i}_out = MatMul (h{2 * i}, qkv{i})
            a{i}, "present.{i}.key", "present.{i}.value" = com.microsoft.GroupQueryAttention
                <num_heads = {HEADS}, kv_num_heads = {GROUPS}, do_rotary = 1, rotary_interleaved = 0>
                (qkv{i}_out, , , "past_key_values.{i}.key", "past_key_values.{i}.value", seqlens, total, cos, sin)
            [out{i}] o{i} = MatMul (a{i}, out{i})
            h{2 * i + 1}, m{i}, v{i}, x{2 * i + 1} = {skip} (x{2 * i}, o{i}, norm{2 * i + 1})
            [gate{i}] g{i} = MatMul (h{2 * i + 1}, gate{i})
            [up{i}] u{i} = MatMul (h{2 * i + 1}, up{i})
            s{i} = Sigmoid (g{i})
            t{i} = Mul (g{i}, s{i})
            w{i} = Mul (t{i}, u{i})
            [down{i}] d{i} = MatMul (w{i}, down{i})
            h{2 * i + 2}, n{i}, z{i}, x{2 * i + 2} = {skip} (x{2 * i + 1}, d{i}, norm{2 * i + 2})"""


def _weights(layers: int, tied: bool, vocabulary: int) -> Arrays:
    angles = np.arange(POSITIONS)[:, None] * 100.0 ** (-np.arange(HEAD // 2) / (HEAD // 2))
    found = {
        "head": weight(STATE, vocabulary, seed=9),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        **{f"norm{i}": 1 + normal(STATE, seed=i, scale=0.1) for i in range(2 * layers + 1)},
    }
    for i in range(layers):
        found[f"qkv{i}"] = weight(STATE, (HEADS + 2 * GROUPS) * HEAD, seed=10 + i)
        found[f"out{i}"] = weight(HEADS * HEAD, STATE, seed=20 + i)
        found[f"gate{i}"] = weight(STATE, INNER, seed=30 + i)
        found[f"up{i}"] = weight(STATE, INNER, seed=40 + i)
        found[f"down{i}"] = weight(INNER, STATE, seed=50 + i)
    return found if tied else {**found, "table": normal(vocabulary, STATE, seed=8)}


def merged(model: onnx.ModelProto, copies: bool = True) -> onnx.ModelProto:
    """Build the merged form of a decoder, as optimum writes it: an If on `use_cache_branch`, a flag.

    One branch goes on with the past, the other leaves it out. The outputs and the other inputs are those of `model`.

    copies: each branch holds its own copies of the weights; else both read those of the main graph
    """
    names = {x.name for x in (*model.graph.input, *model.graph.initializer)}
    outputs = [x.name for x in model.graph.output]
    branches = {}
    for branch, prefix in (("then_branch", "with_past"), ("else_branch", "without")):
        kept = names - ({x.name for x in model.graph.initializer} if copies else set())
        inner = _renamed(model.graph, prefix, kept)
        made = [onnx.helper.make_empty_tensor_value_info(f"{prefix}.{name}") for name in outputs]
        starts = [] if branch == "then_branch" else _without_past(inner, model.graph.input)
        branches[branch] = onnx.helper.make_graph(
            [*starts, *inner.node], prefix, [], made, inner.initializer if copies else []
        )
    choice = onnx.helper.make_node("If", ["use_cache_branch"], outputs, name="choice", **branches)
    flag = onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1])
    graph = onnx.helper.make_graph(
        [choice], "merged", [*model.graph.input, flag], model.graph.output, [] if copies else model.graph.initializer
    )
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _renamed(graph: onnx.GraphProto, prefix: str, kept: set[str]) -> onnx.GraphProto:
    """Copy a graph with a prefix before all names of nodes and values but those `kept`."""
    copied = onnx.GraphProto()
    copied.CopyFrom(graph)
    for tensor in copied.initializer:
        tensor.name = tensor.name if tensor.name in kept else f"{prefix}.{tensor.name}"
    for node in copied.node:
        node.name = f"{prefix}.{node.name}" if node.name else ""
        for values in (node.input, node.output):
            values[:] = [x if x in kept or not x else f"{prefix}.{x}" for x in values]
    return copied


def _without_past(graph: onnx.GraphProto, inputs: Iterable[onnx.ValueInfoProto]) -> list[onnx.NodeProto]:
    """Let a graph read nothing of the pasts among its inputs, and return the nodes that it reads instead of them."""
    parts = {"starts": [0], "ends": [0], "axes": [2]}
    nodes = [
        onnx.helper.make_node("Constant", [], [f"nothing.{name}"], value_ints=value) for name, value in parts.items()
    ]
    pasts = [x.name for x in inputs if x.name.startswith("past")]
    for name in pasts:
        nodes.append(onnx.helper.make_node("Slice", [name, *(f"nothing.{x}" for x in parts)], [f"nothing.{name}"]))
    for node in graph.node:
        node.input[:] = [f"nothing.{x}" if x in pasts else x for x in node.input]
    return nodes
