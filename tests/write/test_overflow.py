"""Integer layers on x86 CPUs without VNNI: what their kernels add in 16 bits does not overflow.

Without VNNI, ONNX Runtime multiplies with VPMADDUBSW (MLAS, QgemmU8X8KernelAvx2.S, QgemmU8X8KernelAvx512Core.S and
ConvSymKernelAvx2.S): uint8 times int8, the products of two neighbouring inputs added with saturation to int16, and
pairs of these in int32. Neighbours are inputs 2i and 2i + 1 of a matrix product, and of a convolution as im2col lays
its window out, channels last. A depthwise convolution (ConvSymDepthwiseKernel: VPMADDWD) adds nothing in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from models import attention, build, cnn, codes, encoder, mlp, normal, samples_for, sentences, weight

Run = Callable[..., Any]
# where the codes of the weight stand among the inputs of an integer product
CODES = {"QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3, "MatMulIntegerToFloat": 1, "MatMulInteger": 1}
LEAST, MOST = np.iinfo(np.int16).min, np.iinfo(np.int16).max


def executed(path: Path, folder: Path) -> onnx.GraphProto:
    """Return the graph as ONNX Runtime executes it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx").graph


def products(graph: onnx.GraphProto) -> Iterator[np.ndarray]:
    """Yield the constant codes [outputs, inputs] of each integer product in the order of its kernel; of a depthwise
    convolution, whose products are added in 32 bits, without inputs."""
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        name = node.input[CODES[node.op_type]] if node.op_type in CODES else ""
        if name not in constants:
            continue
        stored = numpy_helper.to_array(constants[name])
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "QLinearConv":
            if stored.shape[1] == 1 and stored.shape[0] == attributes.get("group", 1):
                stored = stored[:, :0]
            stored = np.moveaxis(stored, 1, -1).reshape(len(stored), -1)
        elif not attributes.get("transB", 0):
            stored = stored.T
        yield stored.astype(np.int32)


def overflows(weight: np.ndarray) -> int:
    """Count the pairs of codes [outputs, inputs] whose products with some inputs do not fit in 16 bits."""
    padded = np.pad(weight, ((0, 0), (0, weight.shape[1] % 2)))
    found = 0
    # all inputs at their most, and only those that add up to the most and to the least
    for x in (np.full_like(padded, 255), np.where(padded > 0, 255, 0), np.where(padded < 0, 255, 0)):
        exact = (x * padded).reshape(len(padded), -1, 2).sum(axis=-1)
        found += int((np.clip(exact, LEAST, MOST) != exact).sum())
    return found


def convolutions() -> onnx.ModelProto:
    """Build convolutions of 3 channels, of groups, of one axis and with more outputs than a depthwise one has."""
    return build(
        """g (float[batch, 3, 12, 12] x) => (float[batch, 16, 1, 144] y) <int64[4] flat = {-1, 16, 1, 144}> {
            [stem] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1)
            ar = Relu (a)
            [grouped] b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 2> (ar, w2)
            br = Relu (b)
            [widened] c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 8> (br, w3)
            cr = Relu (c)
            [point] d = Conv <kernel_shape = [1, 1]> (cr, w4)
            rows = Reshape (d, flat)
            [long] y = Conv <kernel_shape = [1, 5], pads = [0, 2, 0, 2]> (rows, w5)
        }""",
        {
            "w1": weight(10, 3, 3, 3, fan=27), "w2": weight(8, 5, 3, 3, fan=45), "w3": weight(16, 1, 3, 3, fan=9),
            "w4": weight(16, 16, 1, 1, fan=16), "w5": weight(16, 16, 1, 5, fan=80),
        },
    )  # fmt: skip


MODELS = {"cnn": cnn, "convolutions": convolutions, "mlp": mlp, "attention": attention, "encoder": encoder}
OPTIONS: dict[str, dict[str, Any]] = {
    "symmetric": {}, "asymmetric": {"symmetric": False}, "per tensor": {"granularity": "tensor"},
    "rounded": {"solver": "rtn"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", OPTIONS)
def test_no_sum_overflows(quantized: Run, tmp_path: Path, name: str, options: str) -> None:
    model = MODELS[name]()
    given = sentences() if name == "encoder" else samples_for(model)
    found = {}
    for cpu in ("any", "vnni"):
        done = quantized(model, given, floor=20, activations="8", cpu=cpu, **OPTIONS[options])
        weights = list(products(executed(done.out, tmp_path)))
        assert len(weights) == sum(x.form == "integer" for x in done.report.layers)
        found[cpu] = sum(map(overflows, weights))
        (note,) = [n for n in done.report.notes if "VNNI" in n]
        assert ("no integer layer overflows" in note) == (cpu == "any")
    assert found["any"] == 0
    assert found["vnni"] > 0


def reach(path: Path) -> dict[str, int]:
    """Return the largest magnitude of the codes of each weight in a file."""
    return {name.split(".")[0]: int(np.abs(array).max()) for name, array in codes(path).items()}


def test_only_layers_that_could_overflow_have_fewer_codes(quantized: Run) -> None:
    found = {}
    for cpu in ("any", "vnni"):
        done = quantized(cnn(), activations="8", cpu=cpu)
        found[cpu] = (done, reach(done.out))
    (safe, narrow), (whole, wide) = found["any"], found["vnni"]
    # w2 is that of the depthwise convolution
    assert {name: n > 64 for name, n in narrow.items()} == {"w1": False, "w2": True, "w3": False, "w4": False}
    assert min(wide.values()) > 64
    assert any(n.startswith("no integer layer overflows") and ": 3 of 3 use 7" in n for n in safe.report.notes)
    assert any(n.startswith("3 of 3 integer layers may overflow") for n in whole.report.notes)
    # the bytes are the same, and so are the kernels
    assert [x.bytes_after for x in safe.report.layers] == [x.bytes_after for x in whole.report.layers]
    assert safe.report.kernels == whole.report.kernels
    assert {x.bits for x in safe.report.layers} == {8}
    # a bit less of the weights' range costs at most half of their precision: 6 dB
    assert whole.sqnr - 6.5 < safe.sqnr < whole.sqnr + 1


@pytest.mark.parametrize("options", [{"activations": "none"}, {"target": "tensorrt"}, {"activations": "16"}])
def test_other_layers_have_all_codes(quantized: Run, options: dict[str, Any]) -> None:
    done = quantized(mlp(), **options)
    assert min(reach(done.out).values()) > 64
    assert not [n for n in done.report.notes if "VNNI" in n]


def test_openvino_has_such_kernels_too(quantized: Run) -> None:
    # what its depthwise convolutions do is not known
    assert max(reach(quantized(cnn(), target="openvino").out).values()) <= 64


@pytest.mark.parametrize("bits", [2, 4, 6, 7])
def test_fewer_bits_are_safe_as_they_are(quantized: Run, bits: int) -> None:
    done = quantized(mlp(), bits=bits, uniform=True, floor=0)
    other = quantized(mlp(), bits=bits, uniform=True, floor=0, cpu="vnni")
    assert {n: c.tolist() for n, c in codes(done.out).items()} == {n: c.tolist() for n, c in codes(other.out).items()}
    assert [n for n in other.report.notes if "VNNI" in n] == ["no integer layer overflows on x86 CPUs without VNNI"]


def test_a_weight_that_a_layer_in_floats_shares_is_stored_once(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 32] y) <int64 two = {2}, bool yes = {1}> {
            [outside] m = MatMul (x, w)
            y = Loop (two, yes, m) <
                body = once (int64 i, bool go_in, float[batch, 32] v) => (bool go, float[batch, 32] v_out) {
                    go = Identity (go_in)
                    [inside] p = MatMul (v, w)
                    v_out = Tanh (p)
                }
            >
        }""",
        {"w": weight(32, 32)},
    )
    done = quantized(model, floor=20)
    assert {x.name: x.form for x in done.report.layers} == {"outside": "integer", "inside": "folded"}
    assert len(codes(done.out)) == 1
    assert max(reach(done.out).values()) <= 64


def test_layers_get_seven_bits_where_these_are_smaller_and_no_worse(quantized: Run) -> None:
    # bit planes of 7 bits hold the same codes as 8 bits do
    done = quantized(mlp(width=512), {"x": normal(64, 512)}, bits="auto", max_drop="30dB", floor=29)
    bits = {math.prod(x.weight_shape) > 20_000: x.bits for x in done.report.layers if x.form == "integer"}
    assert bits[True] < 8
    # a small layer has no bit planes, and so 8 bits in the same bytes
    assert bits[False] != 7
