"""Test which kernels ONNX Runtime makes of the file: integer ones for every layer that is planned so."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from written import Quantize, Written, quantize
from zoo import model_of, node, noise

from comq_onnx.metrics import sqnr_of
from comq_onnx.runtime.session import Session

IMAGE = {"x": ["n", 8, 12, 12]}
IMAGE_FEEDS = {"x": noise(24, 8, 12, 12)}
CONV = {"w0": (8, 8, 3, 3), "w1": (8, 8, 3, 3), "b": (8,)}
PADS = {"pads": [1, 1, 1, 1]}
# at the ends: the conversions, and the change of layout that ONNX Runtime makes for its convolutions
AROUND = {"QuantizeLinear", "DequantizeLinear", "Transpose"}


def all_in_integers(written: Written, **kernels: int) -> None:
    """Check that a file runs in these kernels alone, between quantization and dequantization, near the float model."""
    found = written.kernels
    assert found.float_behind_dequantize == 0, found.counts
    ours = {op: n for op, n in found.counts.items() if op not in AROUND}
    assert ours == kernels
    before = Session(written.source.SerializeToString()).run(written.feeds)
    # a few layers in a row at 8 bits each, every one about -40 dB
    assert sqnr_of(before, Session(written.path).run(written.feeds)) > 28


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_conv_and_relu_become_one_integer_kernel(quantize: Quantize, bits: int) -> None:
    nodes = [node("Conv", "x w0 b", "c", **PADS), node("Relu", "c", "y")]
    written = quantize(model_of(nodes, CONV, IMAGE, ["y"]), IMAGE_FEEDS, bits=bits)
    found = written.kernels
    assert found.integer == {"QLinearConv": 1}
    assert set(found.counts) == AROUND | {"QLinearConv"}


@pytest.mark.parametrize("scale", [0.5, 10.0])
def test_conv_and_relu6_become_one_integer_kernel(quantize: Quantize, scale: float) -> None:
    """Test it with values that reach 6, and with values that do not."""
    nodes = [node("Conv", "x w0 b", "c", **PADS), node("Clip", "c low high", "y")]
    weights = {"w0": noise(8, 8, 3, 3) * np.float32(scale / 8), "b": (8,), "low": 0.0, "high": 6.0}
    all_in_integers(quantize(model_of(nodes, weights, IMAGE, ["y"]), IMAGE_FEEDS, bits=8), QLinearConv=1)


@pytest.mark.parametrize(
    ("weight", "x", "attributes"),
    [
        ((16, 8, 3), (24, 8, 20), {}),
        ((16, 8, 2, 2, 2), (24, 8, 4, 4, 4), {}),
        ((16, 2, 3, 3), (24, 8, 9, 9), {"group": 4}),
        ((16, 1, 3, 3), (24, 16, 9, 9), {"group": 16}),
        ((16, 8, 3, 3), (24, 8, 9, 9), {"strides": [2, 2], "dilations": [2, 2]}),
    ],
)
def test_every_convolution_becomes_an_integer_kernel(
    quantize: Quantize, weight: tuple, x: tuple, attributes: dict
) -> None:
    source = model_of([node("Conv", "x w", "y", **attributes)], {"w": weight}, {"x": ["n", *x[1:]]}, ["y"])
    all_in_integers(quantize(source, {"x": noise(*x)}, bits=8), QLinearConv=1)


@pytest.mark.parametrize("deep", [False, True])
def test_parts_of_a_concat_are_copied_where_they_are_made_together(quantize: Quantize, deep: bool) -> None:
    """Test that parts have their own scales where one branch is a layer deeper: that of the whole is known too late."""
    middle = [node("Conv", "r0 w1 b", "d0", **PADS), node("Relu", "d0", "e0")] if deep else [node("Relu", "c0", "e0")]
    source = model_of(
        [
            node("Conv", "x w0 b", "c0", **PADS),
            *([node("Relu", "c0", "r0")] if deep else []),
            *middle,
            node("Conv", "x w2 b", "c1", **PADS),
            node("Relu", "c1", "e1"),
            node("Concat", "e0 e1", "both", axis=1),
            node("Conv", "both w4 b", "y", **PADS),
        ],
        CONV | {"w2": (8, 8, 3, 3), "w4": (8, 16, 3, 3)},
        IMAGE,
        ["y"],
    )
    written = quantize(source, IMAGE_FEEDS, bits=8)
    assert written.kernels.integer == {"QLinearConv": 4 if deep else 3, "QLinearConcat": 1}
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(written.path).graph.initializer}
    scales = [float(tensors[f"{name}.scale"]) for name in ("e0", "e1", "both")]
    assert scales[0] == scales[2]
    assert scales[1] <= scales[2] if deep else scales[1] == scales[2]
    before = Session(written.source.SerializeToString()).run(written.feeds)
    assert sqnr_of(before, Session(written.path).run(written.feeds)) > 28


def test_a_residual_network_runs_in_integers_from_end_to_end(quantize: Quantize) -> None:
    source = model_of(
        [
            node("Conv", "x w0 b", "c0", **PADS),
            node("Relu", "c0", "r0"),
            node("Conv", "r0 w1 b", "c1", **PADS),
            node("Add", "c1 r0", "a"),
            node("Relu", "a", "r1"),
            node("MaxPool", "r1", "m", kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", "m w2 b", "c2", **PADS),
            node("Relu", "c2", "r2"),
            node("GlobalAveragePool", "r2", "g"),
            node("Flatten", "g", "f"),
            node("Gemm", "f w3 b3", "y", transB=1),
        ],
        CONV | {"w2": (8, 8, 3, 3), "w3": (20, 8), "b3": (20,)},
        IMAGE,
        ["y"],
    )
    written = quantize(source, IMAGE_FEEDS, bits=8)
    found = written.kernels
    all_in_integers(
        written, QLinearConv=3, QLinearAdd=1, NhwcMaxPool=1, QLinearGlobalAveragePool=1, QGemm=1,
        **{op: n for op, n in found.counts.items() if op in ("Flatten", "Reshape")},
    )  # fmt: skip
    # quantized at the beginning, dequantized at the end
    assert (found.counts["QuantizeLinear"], found.counts.get("DequantizeLinear", 0)) == (1, 0)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_matmul_becomes_an_integer_kernel(quantize: Quantize, static: bool, rank: int, bias: bool, bits: int) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "a")] if bias else [node("MatMul", "x w", "a")]
    nodes += [node("Tanh", "a", "y")]
    weights = {"w": (64, 32)} | ({"b": (32,)} if bias else {})
    shape = (24, 5, 64) if rank == 3 else (24, 64)
    inputs = {"x": list(shape) if static else [*["n", "m"][: rank - 1], 64]}
    if static:
        inputs["x"][0] = 4
    written = quantize(model_of(nodes, weights, inputs, ["y"]), {"x": noise(*shape)}, bits=bits)
    found = written.kernels
    assert found.float_behind_dequantize == 0, found.counts
    assert sum(found.integer.values()) == 1, found.counts
    assert not {"MatMul", "Gemm", "FusedMatMul"} & set(found.counts)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 3.0)])
def test_a_gemm_becomes_an_integer_kernel(
    quantize: Quantize, trans_b: int, bias: bool, alpha: float, beta: float
) -> None:
    weights = {"w": (32, 64) if trans_b else (64, 32)} | ({"b": (32,)} if bias else {})
    nodes = [node("Gemm", "x w b" if bias else "x w", "y", transB=trans_b, alpha=alpha, beta=beta)]
    written = quantize(model_of(nodes, weights, {"x": ["n", 64]}, ["y"]), {"x": noise(64, 64)}, bits=8)
    all_in_integers(written, QGemm=1)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("granularity", ["channel", "32"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_only_matmul_becomes_matmulnbits(quantize: Quantize, bits: int, granularity: str, bias: bool) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "y")] if bias else [node("MatMul", "x w", "y")]
    weights = {"w": (128, 32)} | ({"b": (32,)} if bias else {})
    source = model_of(nodes, weights, {"x": ["n", 5, 128]}, ["y"])
    written = quantize(source, {"x": noise(24, 5, 128)}, bits=bits, activations="none", granularity=granularity)
    found = written.kernels
    assert found.integer == {"MatMulNBits": 1}
    assert found.float_behind_dequantize == 0
    assert not {"MatMul", "FusedMatMul", "DequantizeLinear"} & set(found.counts)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("columns", [5, 10, 16, 63])
def test_a_weight_only_matmul_of_any_number_of_outputs_computes_what_is_written(
    quantize: Quantize, bits: int, columns: int
) -> None:
    source = model_of([node("MatMul", "x w", "y")], {"w": (128, columns)}, {"x": ["n", 5, 128]}, ["y"])
    feeds = {"x": noise(24, 5, 128)}
    written = quantize(source, feeds, bits=bits, activations="none")
    plain, fused = (Session(written.path, level=level).run(feeds) for level in (0, 99))
    # MatMulNBits rounds its input to 8 bits, which leaves 6e-3; of INT2 codes of 5 outputs it made garbage
    assert sqnr_of(plain, fused) > 35


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_only_gemm_becomes_matmulnbits(quantize: Quantize, trans_b: int, bias: bool) -> None:
    weights = {"w": (32, 128) if trans_b else (128, 32)} | ({"b": (32,)} if bias else {})
    nodes = [node("Gemm", "x w b" if bias else "x w", "y", transB=trans_b, alpha=0.5, beta=3.0)]
    written = quantize(
        model_of(nodes, weights, {"x": ["n", 128]}, ["y"]), {"x": noise(64, 128)}, bits=8, activations="none"
    )
    assert written.kernels.integer == {"MatMulNBits": 1}
    assert written.kernels.float_behind_dequantize == 0
    before = Session(written.source.SerializeToString()).run(written.feeds)
    assert sqnr_of(before, Session(written.path, level=0).run(written.feeds)) > 35


def test_a_weight_only_convolution_costs_no_dequantization_at_run_time(quantize: Quantize) -> None:
    """Test that Cast and Mul are folded when the model is loaded; a DequantizeLinear would run at every call."""
    nodes = [node("Conv", "x w0 b", "c", **PADS), node("Relu", "c", "y")]
    written = quantize(model_of(nodes, CONV, IMAGE, ["y"]), IMAGE_FEEDS, bits=4, activations="none")
    counts = written.kernels.counts
    assert sum(n for op, n in counts.items() if op in ("Conv", "FusedConv")) == 1
    assert not {"DequantizeLinear", "Cast", "Mul"} & set(counts)
