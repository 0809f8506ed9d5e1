"""Build a small translator in the files that optimum writes: an encoder, and decoders without and with a past."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx

from models import Arrays, build, normal, weight

VOCABULARY, STATE, START = 40, 32, 3


def encoder() -> onnx.ModelProto:
    """Build input_ids, attention_mask [batch, source] -> last_hidden_state [batch, source, 32]."""
    return build(
        """encoder (int64[batch, source] input_ids, int64[batch, source] attention_mask)
            => (float[batch, source, 32] last_hidden_state) {
            x = Gather (table, input_ids)
            [first] a = MatMul (x, w1)
            t = Tanh (a)
            [second] b = MatMul (t, w2)
            kept = Cast <to = 1> (attention_mask)
            wide = Unsqueeze (kept, last)
            last_hidden_state = Mul (b, wide)
        }""",
        {"table": normal(VOCABULARY, STATE, seed=1), "w1": weight(STATE, STATE, seed=2),
         "w2": weight(STATE, STATE, seed=3), "last": np.array([2])},
    )  # fmt: skip


def _weights(names: str) -> Arrays:
    """Make the weights of the decoders that both share, and what else they read."""
    found: Arrays = {name: 2 * weight(STATE, STATE, seed=10 + i) for i, name in enumerate(
        ("query", "key", "value", "cross_query", "cross_key", "cross_value", "inner"))}  # fmt: skip
    found |= {"table": normal(VOCABULARY, STATE, seed=4), "head": 3 * weight(STATE, VOCABULARY, seed=5)}
    found |= {"one": np.array([1]), "heads": np.array([1, 2]), "big": np.float32(1e4), "unit": np.float32(1)}
    return {name: found[name] for name in names.split()}


# what both decoders compute: k, v and their cross forms are [batch, 1, positions, 32], mask is added to the scores
_ATTENTION = """
            [query] q2 = MatMul (x, query)
            q = Unsqueeze (q2, one)
            kt = Transpose <perm = [0, 1, 3, 2]> (k)
            [scores] raw = MatMul (q, kt)
            masked = Add (raw, future)
            share = Softmax (masked)
            [mixed] own4 = MatMul (share, v)
            own = Squeeze (own4, one)
            y = Add (x, own)
            [cross_query] cq2 = MatMul (y, cross_query)
            cq = Unsqueeze (cq2, one)
            ckt = Transpose <perm = [0, 1, 3, 2]> (ck)
            [cross_scores] craw = MatMul (cq, ckt)
            kept = Cast <to = 1> (encoder_attention_mask)
            hidden = Sub (unit, kept)
            far = Mul (hidden, big)
            away = Unsqueeze (far, heads)
            cmasked = Sub (craw, away)
            cshare = Softmax (cmasked)
            [cross_mixed] cross4 = MatMul (cshare, cv)
            cross = Squeeze (cross4, one)
            z = Add (y, cross)
            [inner] i = MatMul (z, inner)
            active = Tanh (i)
            [head] logits = MatMul (active, head)"""
_CACHE = "float[batch, 1, {length}, 32]"


def decoder() -> onnx.ModelProto:
    """Build tokens [batch, target], encoder_hidden_states -> logits [batch, target, 40], caches of both attentions."""
    own, other = _CACHE.format(length="target"), _CACHE.format(length="source")
    return build(
        f"""decoder (int64[batch, target] input_ids, float[batch, source, 32] encoder_hidden_states,
                int64[batch, source] encoder_attention_mask)
            => (float[batch, target, {VOCABULARY}] logits, {own} "present.0.decoder.key", {own}
                "present.0.decoder.value", {other} "present.0.encoder.key", {other} "present.0.encoder.value") {{
            x = Gather (table, input_ids)
            [key] k2 = MatMul (x, key)
            k = Unsqueeze (k2, one)
            [value] v2 = MatMul (x, value)
            v = Unsqueeze (v2, one)
            [cross_key] ck2 = MatMul (encoder_hidden_states, cross_key)
            ck = Unsqueeze (ck2, one)
            [cross_value] cv2 = MatMul (encoder_hidden_states, cross_value)
            cv = Unsqueeze (cv2, one)
            "present.0.decoder.key" = Identity (k)
            "present.0.decoder.value" = Identity (v)
            "present.0.encoder.key" = Identity (ck)
            "present.0.encoder.value" = Identity (cv)
            tt = Transpose <perm = [0, 1, 3, 2]> (k)
            like = MatMul (k, tt)
            shape = Shape (like)
            all = ConstantOfShape <value = float[1] {{-10000.0}}> (shape)
            future = Trilu <upper = 1> (all, one_up)
            {_ATTENTION}
        }}""",
        {**_weights("query key value cross_query cross_key cross_value inner table head one heads big unit"),
         "one_up": np.array(1)},
    )  # fmt: skip


def decoder_with_past() -> onnx.ModelProto:
    """Build one token [batch, 1] and the caches of both attentions -> logits, the longer cache of its own attention."""
    own, longer = _CACHE.format(length="past"), _CACHE.format(length="total")
    other = _CACHE.format(length="source")
    return build(
        f"""decoder (int64[batch, 1] input_ids, int64[batch, source] encoder_attention_mask,
                {own} "past_key_values.0.decoder.key", {own} "past_key_values.0.decoder.value",
                {other} "past_key_values.0.encoder.key", {other} "past_key_values.0.encoder.value")
            => (float[batch, 1, {VOCABULARY}] logits, {longer} "present.0.decoder.key",
                {longer} "present.0.decoder.value") {{
            x = Gather (table, input_ids)
            [key] k2 = MatMul (x, key)
            k1 = Unsqueeze (k2, one)
            k = Concat <axis = 2> ("past_key_values.0.decoder.key", k1)
            [value] v2 = MatMul (x, value)
            v1 = Unsqueeze (v2, one)
            v = Concat <axis = 2> ("past_key_values.0.decoder.value", v1)
            "present.0.decoder.key" = Identity (k)
            "present.0.decoder.value" = Identity (v)
            ck = Identity ("past_key_values.0.encoder.key")
            cv = Identity ("past_key_values.0.encoder.value")
            future = Sub (unit, unit)
            {_ATTENTION}
        }}""",
        _weights("query key value cross_query inner table head one heads big unit"),
    )


def write_folder(folder: Path) -> None:
    """Write the files of a translator, and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(encoder(), folder / "encoder_model.onnx")
    onnx.save(decoder(), folder / "decoder_model.onnx")
    onnx.save(decoder_with_past(), folder / "decoder_with_past_model.onnx")
    (folder / "config.json").write_text(json.dumps({"decoder_start_token_id": START, "is_encoder_decoder": True}))
