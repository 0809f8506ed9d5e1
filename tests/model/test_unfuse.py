"""Fused operators of ONNX Runtime are taken apart into what ONNX Runtime computes for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from comq_onnx.errors import ModelError
from comq_onnx.evaluate.kernels import executed_kernels
from comq_onnx.model.layers import Prepared
from comq_onnx.model.prepare import prepare_model
from comq_onnx.model.quantized import check_source
from comq_onnx.model.unfuse import products
from comq_onnx.model.unfuse.graph import Unfusing
from comq_onnx.samples.clues import token_limits
from models import Arrays, build, cnn, mlp, normal, samples_for, tokens, weight, worst_sqnr

Run = Callable[..., Any]
MICROSOFT = "com.microsoft"
BATCH, SEQ, PAST, HEADS, WIDTH = 3, 5, 4, 2, 16
# two ways to the same float32 sums of some hundred products of normal numbers
CLOSE = 2e-6


@dataclass(frozen=True)
class Case:
    """Describe a fused operator: its inputs by name in `order`, of which `feeds` vary, and its attributes.

    dims: the dimensions that the graph gives the feeds; by default those of the arrays.
    layers: the layers that it becomes, by the ends of their names.
    """

    op: str
    feeds: Arrays
    constants: Arrays
    order: Sequence[str]
    outputs: int = 1
    attributes: Mapping[str, Any] = field(default_factory=dict)
    dims: Mapping[str, Sequence[Any] | None] = field(default_factory=dict)
    layers: Sequence[str] = ("it",)

    def model(self, opset: int = 17) -> onnx.ModelProto:
        """Build a model of this one operator."""
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), self.dims.get(name, array.shape)
            )
            for name, array in self.feeds.items()
        ]
        names = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, self.order, names, name="it", domain=MICROSOFT, **self.attributes)
        whole = {"y1": TensorProto.INT32} if self.op.startswith("Embed") else {}
        outputs = [helper.make_tensor_value_info(name, whole.get(name, TensorProto.FLOAT), None) for name in names]
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph([node], "fused", inputs, outputs, constants)
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)


def prepared(model: onnx.ModelProto, unfusing: Unfusing = Unfusing.FOR_WEIGHTS, opset: int = 17) -> Prepared:
    return prepare_model(ir.from_proto(model), opset, 13, True, unfusing)


def plainly(model: onnx.ModelProto, feeds: Arrays) -> list[np.ndarray]:
    """Run a model with all of ONNX Runtime's own optimizations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def ops(model: onnx.ModelProto, domain: str = MICROSOFT) -> list[str]:
    return [node.op_type for node in model.graph.node if node.domain == domain]


def masks(past: int) -> dict[str, np.ndarray]:
    """Return a mask of every form that ONNX Runtime takes on the CPU."""
    rng = np.random.default_rng(past)
    ends = np.array([5, 3, 1]) + past
    found = {
        "lengths": ends,
        "ends and starts": np.concatenate([ends, [0, 2, 0]]),
        "cumulated lengths": np.arange(3 * BATCH + 2),
        "keys": rng.integers(0, 2, (BATCH, SEQ + past)),
        "queries and keys": rng.integers(0, 2, (BATCH, SEQ, SEQ + past)),
        "dummy": np.zeros((BATCH, 1)),
    }
    return {name: array.astype(np.int32) for name, array in found.items()}


def attention(mask: str | None = None, past: bool = False, biased: bool = True, **attributes: Any) -> Case:
    """Build an Attention; the sizes of samples and positions are not known."""
    feeds: Arrays = {"x": normal(BATCH, SEQ, 24)}
    sizes = attributes.get("qkv_hidden_sizes", [WIDTH] * 3)
    constants: Arrays = {"w": weight(24, sum(sizes))}
    if biased:
        constants["b"] = normal(sum(sizes))
    order = ["x", "w", "b" if biased else "", "", "", ""]
    dims: dict[str, Any] = {"x": ["batch", "seq", 24], "past": [2, "batch", HEADS, "past", WIDTH // HEADS]}
    if mask is not None:
        feeds["mask"], order[3] = masks(PAST if past else 0)[mask], "mask"
        dims["mask"] = [
            "batch" if mask == "lengths" else "many",
            *(d if d == 1 else "n" for d in feeds["mask"].shape[1:]),
        ]
    if past:
        feeds["past"], order[4] = normal(2, BATCH, HEADS, PAST, WIDTH // HEADS), "past"
    elif attributes.get("unidirectional"):
        feeds["bias"], order[5] = normal(1, HEADS, SEQ, SEQ), "bias"
    while not order[-1]:
        order.pop()
    attributes = {"num_heads": HEADS, **attributes}
    return Case("Attention", feeds, constants, order, 2 if past else 1, attributes, dims, ("query", "key", "value"))


ATTENTION = {
    f"attention, {mask}{', past' if past else ''}{', causal' if causal else ''}": attention(
        mask, past, unidirectional=causal, **({"scale": 0.3, "mask_filter_value": -50.0} if causal else {})
    )
    for mask in (None, *masks(0))
    for past in (False, True)
    for causal in (0, 1)
} | {
    "attention, wider values": attention(qkv_hidden_sizes=[16, 16, 24]),
    "attention, no bias": attention(biased=False),
    "attention, present without past": replace(attention("keys"), outputs=2),
}


def matmul(op: str, left: tuple[int, ...], right: tuple[int, ...], constant: int = 1, **attributes: Any) -> Case:
    operands = {"a": normal(*left), "b": normal(*right, seed=1)}
    name = "ab"[constant]
    return Case(op, {k: v for k, v in operands.items() if k != name}, {name: operands[name]}, ["a", "b"], 1, attributes)


MATMUL = {
    "product": matmul("FusedMatMul", (2, 3, 16), (16, 12)),
    "product, B transposed": matmul("FusedMatMul", (2, 3, 16), (12, 16), transB=1, alpha=0.5),
    "product, both transposed": matmul("FusedMatMul", (2, 16, 3), (12, 16), transA=1, transB=1, alpha=-2.0),
    "product, weight on the left": matmul("FusedMatMul", (16, 12), (2, 5, 16), 0, transA=1, transB=1, alpha=3.0),
    "product, batches inside": matmul("FusedMatMul", (4, 2, 16), (16, 2, 8), transBatchA=1, transBatchB=1, alpha=2.0),
    "product, batches inside, transposed": matmul(
        "FusedMatMul", (16, 2, 4), (2, 8, 16), transBatchA=1, transA=1, transB=1
    ),
    "older product": matmul("TransposeMatMul", (16, 5), (16, 12), transA=1, alpha=0.3),
}


def gemm(activation: str, **parameters: float) -> Case:
    attributes = {f"activation_{name}": value for name, value in parameters.items()}
    own = {"transA": 1, "transB": 1, "alpha": 0.7, "beta": 1.3, "activation": activation}
    constants = {"w": weight(12, 16, fan=16), "c": normal(12)}
    return Case("FusedGemm", {"x": normal(16, 5)}, constants, ["x", "w", "c"], 1, own | attributes)


def conv(activation: str | None, *parameters: float, added: bool = False, biased: bool = True) -> Case:
    attributes: dict[str, Any] = {"group": 2, "pads": [1, 1, 1, 1], "strides": [2, 2], "kernel_shape": [3, 3]}
    attributes |= {} if activation is None else {"activation": activation}
    attributes |= {"activation_params": list(parameters)} if parameters else {}
    feeds = {"x": normal(2, 4, 6, 6)} | ({"z": normal(2, 8, 3, 3)} if added else {})
    constants = {"w": weight(8, 2, 3, 3, fan=18)} | ({"b": normal(8)} if biased else {})
    order = ["x", "w", *(["b"] if biased or added else []), *(["z"] if added else [])]
    order = ["" if name == "b" and not biased else name for name in order]
    return Case("FusedConv", feeds, constants, order, 1, attributes)


ACTIVATED = {
    **{f"gemm, {name}": gemm(name) for name in ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign")},
    **{f"gemm, {name}": gemm(name, alpha=0.3) for name in ("LeakyRelu", "Elu", "ThresholdedRelu")},
    "gemm, HardSigmoid": gemm("HardSigmoid", alpha=0.3, beta=0.6),
    "gemm, ScaledTanh": gemm("ScaledTanh", alpha=0.3, beta=0.6),
    "gemm, Selu": gemm("Selu", alpha=0.3, gamma=0.6),
    **{f"conv, {name}": conv(name) for name in ("Relu", "Sigmoid", "Tanh", "HardSwish")},
    "conv, LeakyRelu": conv("LeakyRelu", 0.3),
    "conv, Clip": conv("Clip", 0.1, 0.6),
    "conv, HardSigmoid, no bias": conv("HardSigmoid", 0.3, 0.6, biased=False),
    "conv, sum, Relu": conv("Relu", added=True),
    "conv, sum, no bias, LeakyRelu": conv("LeakyRelu", 0.2, added=True, biased=False),
    "conv, sum": conv(None, added=True),
}


def embedding(*order: str, outputs: int = 2) -> Case:
    rng = np.random.default_rng(0)
    feeds = {
        "ids": rng.integers(0, 30, (BATCH, SEQ)),
        "segments": rng.integers(0, 9, (BATCH, SEQ)),
        "mask": np.array([[1, 1, 1, 0, 0], [2, 1, 0, 1, 1], [0, 0, 0, 0, 0]]),
        "places": rng.integers(0, 9, (1, SEQ)),
    }
    tables = {"words": normal(30, 16), "positions": normal(9, 16), "kinds": normal(9, 16, seed=1)}
    constants = tables | {"gamma": normal(16), "beta": normal(16, seed=1)}
    used = {name: array.astype(np.int32) for name, array in feeds.items() if name in order}
    dims = {"ids": ["batch", "seq"], "segments": ["batch", "seq"], "mask": ["batch", "seq"]}
    layers = ("words", "positions", *(["segments"] if "segments" in order else []))
    known = {name: array for name, array in constants.items() if name in order}
    return Case("EmbedLayerNormalization", used, known, order, outputs, {"epsilon": 1e-5}, dims, layers)


NORM = ("gamma", "beta")
EMBEDDING = {
    "embedding": embedding("ids", "segments", "words", "positions", "kinds", *NORM),
    "embedding, mask, sum": embedding("ids", "segments", "words", "positions", "kinds", *NORM, "mask", outputs=3),
    "embedding, one segment": embedding("ids", "", "words", "positions", "kinds", *NORM),
    "embedding, no segments": embedding("ids", "", "words", "positions", "", *NORM, "mask"),
    "embedding, positions": embedding("ids", "segments", "words", "positions", "kinds", *NORM, "", "places", outputs=3),
}
CASES = {**ATTENTION, **MATMUL, **ACTIVATED, **EMBEDDING}


@pytest.mark.parametrize("unfusing", [Unfusing.FOR_WEIGHTS, Unfusing.TO_STANDARD])
@pytest.mark.parametrize("name", CASES)
def test_what_a_fused_operator_becomes_computes_the_same(name: str, unfusing: Unfusing) -> None:
    case = CASES[name]
    model = case.model()
    found = prepared(model, unfusing)
    made = ir.to_proto(found.model)
    for expected, output in zip(plainly(model, case.feeds), plainly(made, case.feeds), strict=True):
        assert output.dtype == expected.dtype
        np.testing.assert_allclose(output, expected, rtol=0, atol=CLOSE * max(1, np.abs(expected).max()))
    assert [layer.name.split("/")[-1] for layer in found.layers] == list(case.layers)
    assert not found.skipped
    left = ["MultiHeadAttention"] if case.op == "Attention" and unfusing is Unfusing.FOR_WEIGHTS else []
    assert ops(made) == left
    assert [output.name for output in made.graph.output] == [f"y{i}" for i in range(case.outputs)]


def behind_product(text: str, outputs: str = "y") -> onnx.ModelProto:
    """Build x [batch, seq, 24] -> MatMul -> m [batch, seq, 16] -> `text` makes the outputs."""
    listed = ", ".join(f"float[batch, seq, 16] {name}" for name in outputs.split())
    return build(
        f"g (float[batch, seq, 24] x, float[batch, seq, 16] s) => ({listed}) {{ [fc] m = MatMul (x, w) {text} }}",
        {
            "w": weight(24, 16), "b": normal(16), "gamma": normal(16, seed=1), "beta": normal(16, seed=2),
            "w2": weight(24, 16, seed=3), "w3": weight(24, 16, seed=4), "b3": normal(48),
        },
        domains=[MICROSOFT],
    )  # fmt: skip


SKIP_NORM = "com.microsoft.SkipLayerNormalization <epsilon = 0.00001>"
RMS_NORM = "com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001>"
HEADS_OF = "com.microsoft.MultiHeadAttention <num_heads = 2, unidirectional = 1>"
BIASED = {
    "BiasGelu": ("y = com.microsoft.BiasGelu (m, b)", "y", ["Gelu"]),
    "FastGelu": ("y = com.microsoft.FastGelu (m, b)", "y", ["FastGelu"]),
    "norm": (f"y = {SKIP_NORM} (s, m, gamma, beta, b)", "y", []),
    "norm without beta, and sum": (f"y, u, v, t = {SKIP_NORM} (m, s, gamma, , b)", "y t", []),
    "norm and mean": (
        f"y, u, v, t = {SKIP_NORM} (m, s, gamma, beta, b) n = Add (y, u)", "n t", ["SkipLayerNormalization"]
    ),
    "mean square": (
        f"y, u, v, t = {RMS_NORM} (m, s, gamma, b)", "y t", ["SkipSimplifiedLayerNormalization"]
    ),
    "attention": (
        f"k = MatMul (x, w2) v = MatMul (x, w3) y = {HEADS_OF} (m, k, v, b3)", "y", ["MultiHeadAttention"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("unfusing", [Unfusing.FOR_WEIGHTS, Unfusing.TO_STANDARD])
@pytest.mark.parametrize("name", BIASED)
def test_the_bias_of_a_product_leaves_the_fused_operator_behind_it(name: str, unfusing: Unfusing) -> None:
    text, outputs, left = BIASED[name]
    model = behind_product(text, outputs)
    feeds = {"x": normal(BATCH, SEQ, 24), "s": normal(BATCH, SEQ, 16)}
    found = prepared(model, unfusing)
    made = ir.to_proto(found.model)
    refused = name == "norm and mean"
    if unfusing is Unfusing.FOR_WEIGHTS or not refused:
        assert all(layer.bias is not None for layer in found.layers)
    assert ops(made) == (left if unfusing is Unfusing.FOR_WEIGHTS or refused else [])
    for expected, output in zip(plainly(model, feeds), plainly(made, feeds), strict=True):
        # the approximation of ONNX Runtime's FastGelu has coefficients of six digits
        np.testing.assert_allclose(output, expected, rtol=0, atol=5e-6)


WHOLE = {
    "Gelu": "y = com.microsoft.Gelu (s)",
    "QuickGelu": "y = com.microsoft.QuickGelu <alpha = 1.5> (s)",
    "FastGelu": "y = com.microsoft.FastGelu (s)",
    "BiasGelu": "y = com.microsoft.BiasGelu (s, b)",
    "SkipLayerNormalization": f"y = {SKIP_NORM} (s, s, gamma, beta)",
    "SkipSimplifiedLayerNormalization": f"y = {RMS_NORM} (s, s, gamma)",
    "SimplifiedLayerNormalization": "y = SimplifiedLayerNormalization <axis = -1> (s, gamma)",
    "FusedMatMul": "t = Transpose <perm = [0, 2, 1]> (s) u = com.microsoft.FusedMatMul <alpha = 0.5, transB = 1> (s, s)"
    " y = MatMul (u, s)",
    "MultiHeadAttention": f"y = {HEADS_OF} (s, s, s)",
}


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("op", WHOLE)
def test_operators_without_weights_stay_unless_only_standard_ones_are_wanted(op: str, opset: int) -> None:
    model = build(
        f"g (float[batch, seq, 16] s) => (float[batch, seq, 16] y) {{ {WHOLE[op]} }}",
        {"b": normal(16), "gamma": normal(16, seed=1), "beta": normal(16, seed=2)},
        domains=[MICROSOFT],
        opset=opset,
    )
    feeds = {"s": normal(BATCH, SEQ, 16)}
    kept, replaced = (ir.to_proto(prepared(model, unfusing).model) for unfusing in (
        Unfusing.FOR_WEIGHTS, Unfusing.TO_STANDARD))  # fmt: skip
    assert op in [node.op_type for node in kept.graph.node]
    assert not ops(replaced)
    assert "Simplified" not in str(replaced.graph.node)
    np.testing.assert_allclose(plainly(replaced, feeds)[0], plainly(model, feeds)[0], rtol=0, atol=5e-6)


def test_keys_and_values_of_the_past_are_joined_by_standard_operators_too() -> None:
    model = build(
        """g (float[batch, seq, 16] q, float[batch, seq, 16] k, int32[batch, total] mask,
              float[batch, 2, past, 8] pk, float[batch, 2, past, 8] pv)
              => (float[batch, seq, 16] y, float[batch, 2, total, 8] nk, float[batch, 2, total, 8] nv) {
            y, nk, nv = com.microsoft.MultiHeadAttention <num_heads = 2, unidirectional = 1>
                (q, k, k, b, mask, , pk, pv)
        }""",
        {"b": normal(48)},
        domains=[MICROSOFT],
    )
    feeds = {
        "q": normal(BATCH, SEQ, 16), "k": normal(BATCH, SEQ, 16, seed=1), "mask": masks(PAST)["keys"],
        "pk": normal(BATCH, 2, PAST, 8), "pv": normal(BATCH, 2, PAST, 8, seed=1),
    }  # fmt: skip
    made = ir.to_proto(prepared(model, Unfusing.TO_STANDARD).model)
    assert not ops(made)
    for expected, output in zip(plainly(model, feeds), plainly(made, feeds), strict=True):
        np.testing.assert_allclose(output, expected, rtol=0, atol=5e-6)


# what stays


REFUSED = {
    "do_rotary": attention(do_rotary=1),
    "past_present_share_buffer": attention(past_present_share_buffer=1),
    "mask has rank 4": replace(attention("keys"), dims={"x": ["batch", "seq", 24], "mask": ["b", 1, "n", "n"]}),
    "mask has unknown rank": replace(attention("keys"), dims={"x": ["batch", "seq", 24], "mask": None}),
    "bias is computed at run time": replace(
        attention(), feeds={"x": normal(1, 2, 24), "b": normal(48)}, constants={"w": weight(24, 48)}
    ),
    "transposes an input of unknown rank": replace(MATMUL["older product"], dims={"a": None}),
    "activation 'Mish'": gemm("Mish"),
    "Elu lacks alpha": gemm("Elu"),
    "other devices than the CPU": replace(gemm("Relu"), op="FusedMatMulActivation"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_taken_apart_stays_with_the_reason(reason: str) -> None:
    found = prepared(REFUSED[reason].model())
    assert not found.layers
    assert list(found.skipped) == ["it"]
    assert "weights stay float" in found.skipped["it"]
    assert reason in found.skipped["it"]


def test_operators_that_another_runtime_may_lack_are_named_with_the_reason() -> None:
    notes = prepared(REFUSED["do_rotary"].model(), Unfusing.TO_STANDARD).notes
    assert len(notes) == 1
    assert "Attention (do_rotary" in notes[0]


def test_a_replacement_that_changes_the_outputs_is_not_kept(quantized: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_folded", lambda _make, weight, _order, _alpha: weight)
    model = build(
        """g (float[batch, 16] x) => (float[batch, 16] y) {
            [fc1] h = com.microsoft.FusedMatMul <alpha = 0.5> (x, w1)
            r = Relu (h)
            [fc2] y = MatMul (r, w2)
        }""",
        {"w1": weight(16, 16), "w2": weight(16, 16, seed=2)},
        domains=[MICROSOFT],
    )
    report = quantized(model).report
    assert [layer.name for layer in report.layers] == ["fc2"]
    assert "fc1" in report.skipped
    assert any("not taken apart: outputs changed" in note for note in report.notes)


# fused models, quantized


def bert() -> onnx.ModelProto:
    """Build a small encoder as ONNX Runtime's tools leave it: each of its parts one fused operator."""
    return build(
        """bert (int32[batch, seq] input_ids, int32[batch, seq] segment_ids, int32[batch, seq] attention_mask)
            => (float[batch, seq, 32] y) {
            [embed] x, ends = com.microsoft.EmbedLayerNormalization <epsilon = 0.00001>
                (input_ids, segment_ids, words, positions, kinds, gamma, beta, attention_mask)
            [att] a = com.microsoft.Attention <num_heads = 2> (x, wa, ba, ends)
            [out] o = MatMul (a, wo)
            [norm1] n = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (o, x, gamma, beta, bo)
            [wide] u = MatMul (n, wu)
            [gelu] g = com.microsoft.BiasGelu (u, bu)
            [narrow] d = MatMul (g, wd)
            [norm2] y = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (d, n, gamma, beta, bd)
        }""",
        {
            "words": normal(50, 32), "positions": normal(16, 32), "kinds": normal(5, 32),
            "gamma": 1 + normal(32, scale=0.1), "beta": normal(32, scale=0.1), "wa": weight(32, 96),
            "ba": normal(96, scale=0.1), "wo": weight(32, 32), "bo": normal(32, scale=0.1, seed=1),
            "wu": weight(32, 64), "bu": normal(64, scale=0.1), "wd": weight(64, 32),
            "bd": normal(32, scale=0.1, seed=2),
        },
        domains=[MICROSOFT],
    )  # fmt: skip


BERT_LAYERS = {
    "embed/words", "embed/positions", "embed/segments", "att/query", "att/key", "att/value", "out", "wide", "narrow",
}  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "target", "floor"), [(8, "ort-cpu", 25.0), (4, "ort-cpu", 8.0), (8, "openvino", 25.0)]
)
def test_every_weight_of_a_fused_encoder_is_quantized(quantized: Run, bits: int, target: str, floor: float) -> None:
    done = quantized(bert(), bits=bits, target=target, floor=floor)
    assert {layer.name for layer in done.report.layers} == BERT_LAYERS
    assert not done.report.skipped
    assert all(layer.form == "integer" for layer in done.report.layers if "embed" not in layer.name)
    expected = {"MultiHeadAttention", "Gelu"} if target == "ort-cpu" else set()
    assert set(ops(done.model)) <= expected
    if target == "ort-cpu":
        # what was taken apart is not fused again when the file is loaded, and biases are added by the products
        kernels = executed_kernels(done.out).counts
        assert kernels["MatMulIntegerToFloat"] == 6
        assert not {"SkipLayerNormalization", "DequantizeLinear", "Attention"} & set(kernels)


def test_a_decoder_with_a_past_is_quantized(quantized: Run) -> None:
    model = build(
        """decoder (float[batch, seq, 24] x, float[2, batch, 2, past, 8] past)
            => (float[batch, seq, 16] y, float[2, batch, 2, total, 8] present) {
            [att] a, present = com.microsoft.Attention <num_heads = 2, unidirectional = 1> (x, wa, ba, , past)
            [out] o = MatMul (a, wo)
            y = com.microsoft.FastGelu (o, bo)
        }""",
        {"wa": weight(24, 48), "ba": normal(48, scale=0.1), "wo": weight(16, 16), "bo": normal(16, scale=0.1)},
        domains=[MICROSOFT],
    )
    items = [{"x": normal(1, 5, 24, seed=i), "past": normal(2, 1, 2, 4, 8, seed=i)} for i in range(20)]
    samples = {name: np.stack([item[name] for item in items]) for name in items[0]}
    done = quantized(model, samples, per_item=True)
    assert {layer.name for layer in done.report.layers} == {"att/query", "att/key", "att/value", "out"}
    assert ops(done.model) == ["MultiHeadAttention", "FastGelu"]


@pytest.mark.parametrize("make", [cnn, mlp], ids=["cnn", "mlp"])
def test_a_model_that_onnx_runtime_fused_is_quantized_as_before(quantized: Run, tmp_path: Path, make: Run) -> None:
    plain = make()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fused.onnx"), 4
    onnxruntime.InferenceSession(plain.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fused = onnx.load(tmp_path / "fused.onnx")
    assert {"FusedConv", "FusedGemm"} & set(ops(fused))
    samples = samples_for(plain)
    from_plain, from_fused = quantized(plain, samples), quantized(fused, samples)
    assert len(from_fused.report.layers) == len(from_plain.report.layers)
    assert not from_fused.report.skipped
    assert abs(worst_sqnr(plain, from_fused.out, samples) - from_plain.sqnr) < 0.3


# what else asks for layers


def test_a_model_whose_only_float_weights_are_in_fused_operators_is_no_quantized_one() -> None:
    text = "c = DequantizeLinear (codes, step) h = MatMul (x, c)"
    constants = {"codes": np.ones((16, 16), np.int8), "step": np.float32(0.1), "w": weight(16, 16)}
    head = "g (float[batch, 16] x) => (float[batch, 16] y)"
    only = build(f"{head} {{ {text} y = Relu (h) }}", {k: constants[k] for k in ("codes", "step")})
    with pytest.raises(ModelError, match="already quantized"):
        check_source(ir.from_proto(only), "m")
    also = build(f"{head} {{ {text} y = com.microsoft.FusedMatMul (h, w) }}", constants, domains=[MICROSOFT])
    check_source(ir.from_proto(also), "m")


def test_the_tables_of_a_fused_embedding_limit_its_inputs() -> None:
    assert token_limits(ir.from_proto(bert())) == {"input_ids": 50, "segment_ids": 5}
    assert token_limits(ir.from_proto(tokens()))["input_ids"] > 0


def test_two_readers_of_one_weight_share_what_it_becomes() -> None:
    model = build(
        """g (float[batch, 16] x) => (float[batch, 16] y) {
            h = com.microsoft.FusedMatMul <transB = 1> (x, w)
            y = com.microsoft.FusedMatMul <transB = 1> (h, w)
        }""",
        {"w": weight(16, 16)},
        domains=[MICROSOFT],
    )
    assert len({layer.weight for layer in prepared(model).layers}) == 1
