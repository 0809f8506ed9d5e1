"""Build small ONNX models to test with, and compare the outputs of two.

Graphs are written in ONNX's own text form (onnx.parser); weights are drawn with a fixed seed. A layer needs 128 weights
or more to be quantized, so no weight here is smaller than that unless a test is about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from onnx import numpy_helper

Arrays = dict[str, np.ndarray]


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: type = np.float32) -> np.ndarray:
    """Draw normal noise of a shape."""
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(dtype)


def weight(*shape: int, seed: int = 1, fan: int | None = None, dtype: type = np.float32) -> np.ndarray:
    """Draw a weight that keeps activations near 1.

    fan: the inputs of an output; the first axis where None.
    """
    return normal(*shape, seed=seed, scale=(fan or shape[0]) ** -0.5, dtype=dtype)


def build(
    text: str,
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    domains: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Build a model of a graph (and functions after it) in ONNX's text form, with initializers by name."""
    imports = ", ".join([f'"" : {opset}', *(f'"{d}" : 1' for d in domains)])
    model = onnx.parser.parse_model(f"<ir_version: {ir_version}, opset_import: [{imports}]>\n{text}")
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    return model


def mlp(width: int = 32, opset: int = 17, ir_version: int = 8, seed: int = 1) -> onnx.ModelProto:
    """Build x [batch, width] -> Gemm, Relu, MatMul, Add -> y [batch, 10]."""
    return build(
        f"""mlp (float[batch, {width}] x) => (float[batch, 10] y) {{
            [fc1] h = Gemm <transB = 1> (x, w1, b1)
            [relu] r = Relu (h)
            [fc2] m = MatMul (r, w2)
            [bias] y = Add (m, b2)
        }}""",
        {
            "w1": weight(48, width, fan=width, seed=seed),
            "b1": normal(48, seed=seed, scale=0.1),
            "w2": weight(48, 10, seed=seed + 1),
            "b2": normal(10, seed=seed, scale=0.1),
        },
        opset=opset,
        ir_version=ir_version,
        metadata={"author": "a test", "labels": "zero,one"},
    )


def cnn(
    opset: int = 17, size: int = 16, batch: str = "batch", channels: int = 3, nhwc: bool = False
) -> onnx.ModelProto:
    """Build image [batch, 3, 16, 16] -> Conv, depthwise Conv, Conv, mean, Gemm -> logits [batch, 10]."""
    dims, name = (f"{size}, {size}, {channels}", "nchw") if nhwc else (f"{channels}, {size}, {size}", "image")
    first = "nchw = Transpose <perm = [0, 3, 1, 2]> (image)" if nhwc else ""
    return build(
        f"""cnn (float[{batch}, {dims}] image) => (float[{batch}, 10] logits) {{
            {first}
            [stem] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> ({name}, w1, b1)
            ar = Relu (a)
            [depthwise] d = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 16> (ar, w2, b2)
            dr = Relu (d)
            [point] p = Conv <kernel_shape = [1, 1]> (dr, w3, b3)
            s = Add (p, ar)
            g = GlobalAveragePool (s)
            f = Flatten (g)
            [head] logits = Gemm <transB = 1> (f, w4, b4)
        }}""",
        {
            "w1": weight(16, channels, 3, 3, fan=9 * channels),
            "b1": normal(16, scale=0.1),
            "w2": weight(16, 1, 3, 3, fan=9),
            "b2": normal(16, scale=0.1, seed=2),
            "w3": weight(16, 16, 1, 1, fan=16),
            "b3": normal(16, scale=0.1, seed=3),
            "w4": weight(10, 16, fan=16),
            "b4": normal(10, scale=0.1),
        },
        opset=opset,
    )


def batchnorm_cnn(opset: int = 17) -> onnx.ModelProto:
    """Build image -> Conv without a bias, BatchNormalization, Relu, Conv, BatchNormalization -> y [batch, 8, 8, 8]."""
    weights: Arrays = {"w1": weight(12, 3, 3, 3, fan=27), "w2": weight(8, 12, 3, 3, fan=108)}
    for i, n in ((1, 12), (2, 8)):
        weights |= {
            f"scale{i}": 1 + normal(n, scale=0.2, seed=i),
            f"shift{i}": normal(n, scale=0.2, seed=i + 10),
            f"mean{i}": normal(n, scale=0.2, seed=i + 20),
            f"var{i}": np.abs(1 + normal(n, scale=0.2, seed=i + 30)),
        }
    return build(
        """bn (float[batch, 3, 8, 8] image) => (float[batch, 8, 8, 8] y) {
            [conv1] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, w1)
            b = BatchNormalization (a, scale1, shift1, mean1, var1)
            r = Relu (b)
            [conv2] c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, w2)
            y = BatchNormalization (c, scale2, shift2, mean2, var2)
        }""",
        weights,
        opset=opset,
    )


def tokens(int_type: str = "int64", masked: bool = True, width: int = 24) -> onnx.ModelProto:
    """Build input_ids and attention_mask [batch, seq] -> embedding, masked mean, MatMul -> y [batch, 6].

    masked: where False, the mask is read and makes no difference.
    """
    used = "mu = Identity (mf)" if masked else "mu = Max (mf, unit)"
    return build(
        f"""tokens ({int_type}[batch, seq] input_ids, {int_type}[batch, seq] attention_mask) => (float[batch, 6] y)
        <int64[1] one = {{1}}, int64[1] two = {{2}}> {{
            [embed] e = Gather (table, input_ids)
            [proj] p = MatMul (e, w1)
            t = Tanh (p)
            mf = Cast <to = 1> (attention_mask)
            {used}
            m = Unsqueeze (mu, two)
            tm = Mul (t, m)
            s = ReduceSum <keepdims = 0> (tm, one)
            n = ReduceSum <keepdims = 0> (m, one)
            pooled = Div (s, n)
            [head] y = MatMul (pooled, w2)
        }}""",
        {"table": normal(50, width), "w1": weight(width, 32), "w2": weight(32, 6), "unit": np.float32(1)},
    )


_ENCODER = """encoder (int64[batch, seq] input_ids, int64[batch, seq] attention_mask) => (float[batch, seq, 8] y)
<int64[1] one = {1}, int64[2] flat = {-1, 32}, int64[1] wide = {24}> {
    [embed] e = Gather (table, input_ids)
    n = LayerNormalization (e, gamma, beta)
    [q] q0 = MatMul (n, wq)
    [k] k0 = MatMul (n, wk)
    [v] v0 = MatMul (n, wv)
    qb = Add (q0, bq)
    kb = Add (k0, bk)
    vb = Add (v0, bv)
    kt = Transpose <perm = [0, 2, 1]> (kb)
    scores = MatMul (qb, kt)
    scaled = Mul (scores, root)
    mf = Cast <to = 1> (attention_mask)
    unseen = Sub (unit, mf)
    far = Mul (unseen, minus)
    am = Unsqueeze (far, one)
    masked = Add (scaled, am)
    a = Softmax <axis = -1> (masked)
    c = MatMul (a, vb)
    [out] o = MatMul (c, wo)
    s = Add (e, o)
    rows = Reshape (s, flat)
    [up] g = Gemm (rows, wu, bu)
    r = Relu (g)
    size = Shape (input_ids)
    whole = Concat <axis = 0> (size, wide)
    back = Reshape (r, whole)
    [head] y = MatMul (back, wh)
}"""


def encoder() -> onnx.ModelProto:
    """Build a small encoder of sentences.

    input_ids and attention_mask [batch, seq] -> embedding, one head of attention to what is not masked, a Gemm over
    [batch * seq, 32], MatMul -> y [batch, seq, 8].
    """
    return build(
        _ENCODER,
        {
            "table": normal(50, 32),
            "gamma": 1 + normal(32, scale=0.1),
            "beta": normal(32, scale=0.1),
            "wq": weight(32, 32),
            "wk": weight(32, 32, seed=2),
            "wv": weight(32, 32, seed=3),
            "wo": weight(32, 32, seed=4),
            "wu": weight(32, 24),
            "wh": weight(24, 8),
            "bq": normal(32, scale=0.1, seed=5),
            "bk": normal(32, scale=0.1, seed=6),
            "bv": normal(32, scale=0.1, seed=7),
            "bu": normal(24, scale=0.1),
            "root": np.float32(32**-0.5),
            "unit": np.float32(1),
            # as exporters write it: e^-10000 is no float32 but 0
            "minus": np.float32(-10000),
        },
    )


def decoder(past: str = "past") -> onnx.ModelProto:
    """Build a small decoder with a cache.

    input_ids [batch, seq], the mask of past and present, positions, keys and values of the past [batch, 1, past, 16]
    -> one head of attention, logits [batch, seq, 50], keys and values of all.
    """
    return build(
        f"""decoder (int64[batch, seq] input_ids, int64[batch, total] attention_mask,
            int64[batch, seq] position_ids, float[batch, 1, {past}, 16] past_key_values_0_key,
            float[batch, 1, {past}, 16] past_key_values_0_value)
            => (float[batch, seq, 50] logits, float[batch, 1, whole, 16] present_0_key,
                float[batch, 1, whole, 16] present_0_value)
        <int64[1] one = {{1}}, int64[2] both = {{1, 2}}> {{
            words = Gather (table, input_ids)
            places = Gather (positions, position_ids)
            x = Add (words, places)
            [q] q0 = MatMul (x, wq)
            [k] k0 = MatMul (x, wk)
            [v] v0 = MatMul (x, wv)
            q1 = Unsqueeze (q0, one)
            k1 = Unsqueeze (k0, one)
            v1 = Unsqueeze (v0, one)
            present_0_key = Concat <axis = 2> (past_key_values_0_key, k1)
            present_0_value = Concat <axis = 2> (past_key_values_0_value, v1)
            kt = Transpose <perm = [0, 1, 3, 2]> (present_0_key)
            scores = MatMul (q1, kt)
            mf = Cast <to = 1> (attention_mask)
            unseen = Sub (unit, mf)
            far = Mul (unseen, minus)
            am = Unsqueeze (far, both)
            masked = Add (scores, am)
            a = Softmax <axis = -1> (masked)
            c = MatMul (a, present_0_value)
            c1 = Squeeze (c, one)
            [out] o = MatMul (c1, wo)
            s = Add (x, o)
            [head] logits = MatMul (s, wh)
        }}""",
        _decoder_weights(),
    )


def _decoder_weights() -> Arrays:
    return {
        "table": normal(50, 32),
        "positions": normal(64, 32, scale=0.3),
        "wq": weight(32, 16),
        "wk": weight(32, 16, seed=2),
        "wv": weight(32, 16, seed=3),
        "wo": weight(16, 32, seed=4),
        "wh": weight(32, 50),
        "unit": np.float32(1),
        "minus": np.float32(-10000),
    }


def sentences(count: int = 40, longest: int = 12, pad: int = 0, seed: int = 7) -> Arrays:
    """Draw input_ids and attention_mask [count, longest] for `tokens` and `encoder`.

    A sentence has 3 to `longest` tokens from 1 to 39, and `pad` behind them.
    """
    rng = np.random.default_rng(seed)
    kept = np.arange(longest) < rng.integers(3, longest + 1, (count, 1))
    return {
        "input_ids": np.where(kept, rng.integers(1, 40, kept.shape), pad),
        "attention_mask": kept.astype(np.int64),
    }


def several_inputs() -> onnx.ModelProto:
    """Build an image, a vector, a bool per sample and a count -> y [batch, 8]."""
    return build(
        """several (float[batch, 3, 8, 8] image, float[batch, 20] vector, bool[batch, 1] use, int64[batch, 1] count)
            => (float[batch, 8] y) {
            [conv] a = Conv <kernel_shape = [3, 3], strides = [2, 2]> (image, w1)
            f = Flatten (a)
            [left] l = MatMul (f, w2)
            [right] r = MatMul (vector, w3)
            w = Where (use, l, r)
            c = Cast <to = 1> (count)
            y = Add (w, c)
        }""",
        {"w1": weight(8, 3, 3, 3, fan=27), "w2": weight(72, 8), "w3": weight(20, 8)},
    )


def endless() -> onnx.ModelProto:
    """Build a layer, and a Loop that never ends."""
    return build(
        """endless (float[batch, 32] x) => (float[batch, 10] y) <int64 most = {9223372036854775807}, bool yes = {1}> {
            l = Loop (most, yes, x) <
                body = once (int64 i, bool go_in, float[batch, 32] v) => (bool go, float[batch, 32] v_out) {
                    go = Identity (go_in)
                    v_out = Tanh (v)
                }
            >
            [fc] y = MatMul (l, w)
        }""",
        {"w": weight(32, 10)},
    )


def samples_for(model: onnx.ModelProto, count: int = 40, seed: int = 7, free: int = 12) -> Arrays:
    """Draw random samples by input name.

    count: the length of the first axis.
    free: the length of other axes that are not fixed.
    """
    rng = np.random.default_rng(seed)
    constants = {i.name for i in model.graph.initializer}
    made: Arrays = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = (count, *(d.dim_value or free for d in tensor.shape.dim[1:]))
        if dtype.kind == "b":
            made[value.name] = rng.random(shape) < 0.5
        elif dtype.kind in "iu":
            made[value.name] = rng.integers(1, 5, shape).astype(dtype)
        else:
            made[value.name] = rng.standard_normal(shape).astype(dtype)
    return made


def infer(model: onnx.ModelProto | Path, feeds: Mapping[str, np.ndarray], exact: bool = False) -> Arrays:
    """Run a model in ONNX Runtime on one CPU thread, and return every output by name.

    exact: activations that are float stay float.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def codes(path: Path) -> Arrays:
    """Return the weight codes in a file, by the initializer's name."""
    tensors = (t for t in onnx.load(path).graph.initializer if ".codes" in t.name)
    return {t.name: numpy_helper.to_array(t).astype(int) for t in tensors}


def sqnr(before: np.ndarray, after: np.ndarray) -> float:
    """Return 10 log10 of signal over noise; 200 where the two are equal."""
    a, b = np.asarray(before, np.float64), np.asarray(after, np.float64)
    assert a.shape == b.shape
    noise = ((a - b) ** 2).sum()
    return 200.0 if noise == 0 else float(10 * np.log10((a**2).sum() / noise))


def worst_sqnr(before: onnx.ModelProto | Path, after: onnx.ModelProto | Path, feeds: Mapping[str, np.ndarray]) -> float:
    """Return the lowest SQNR over the floating-point outputs that two models give for the same feeds."""
    first, second = infer(before, feeds), infer(after, feeds)
    assert list(first) == list(second)
    return min(sqnr(first[name], second[name]) for name in first if first[name].dtype.kind == "f")


def op_types(model: onnx.ModelProto) -> list[str]:
    """List the operators of the main graph in order."""
    return [node.op_type for node in model.graph.node]


def signature(model: onnx.ModelProto) -> list[tuple[str, int, tuple[str | int, ...]]]:
    """Return name, element type and dimensions of every input that is no initializer, and of every output."""
    constants = {i.name for i in model.graph.initializer}
    values = [v for v in model.graph.input if v.name not in constants] + list(model.graph.output)
    return [
        (v.name, v.type.tensor_type.elem_type, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
        for v in values
    ]


def attention(masked: bool = True, opset: int = 17) -> onnx.ModelProto:
    """Build x [batch, seq, 32] -> LayerNorm, one head of attention (causal by a mask of -inf), two layers -> y."""
    add = "am = Add (scaled, mask)" if masked else "am = Identity (scaled)"
    return build(
        f"""attention (float[batch, 12, 32] x) => (float[batch, 12, 32] y) {{
            n = LayerNormalization (x, gamma, beta)
            [q] q0 = MatMul (n, wq)
            [k] k0 = MatMul (n, wk)
            [v] v0 = MatMul (n, wv)
            qb = Add (q0, bq)
            kt = Transpose <perm = [0, 2, 1]> (k0)
            scores = MatMul (qb, kt)
            scaled = Mul (scores, root)
            {add}
            a = Softmax <axis = -1> (am)
            c = MatMul (a, v0)
            [out] o = MatMul (c, wo)
            s = Add (x, o)
            [up] u = MatMul (s, wu)
            ub = Add (u, bu)
            g = Relu (ub)
            [down] d = MatMul (g, wd)
            y = Add (s, d)
        }}""",
        {
            "gamma": 1 + normal(32, scale=0.1),
            "beta": normal(32, scale=0.1),
            "wq": weight(32, 32),
            "wk": weight(32, 32, seed=2),
            "wv": weight(32, 32, seed=3),
            "wo": weight(32, 32, seed=4),
            "wu": weight(32, 64),
            "wd": weight(64, 32),
            "bq": normal(32, scale=0.1, seed=5),
            "bu": normal(64, scale=0.1),
            "root": np.float32(32**-0.5),
            "mask": np.triu(np.full((12, 12), -np.inf, np.float32), 1),
        },
        opset=opset,
    )
