"""Build small decoders in the forms that people deploy: as ONNX Runtime GenAI's model builder writes them."""

from __future__ import annotations

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
