"""Test how biases are written: in integers, in float, and added where they carry a shift."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written import Quantize, quantize
from zoo import model_of, node, noise

import comq_onnx
from comq_onnx.metrics import sqnr_of
from comq_onnx.runtime.session import Session


@pytest.mark.parametrize(
    "size",
    [0, 1e-4, 1e-6, 1e-20],
)
def test_the_bias_of_a_channel_of_tiny_weights_survives(quantize: Quantize, size: float) -> None:
    """Test it because a folded BatchNorm leaves such channels, whose output is their bias alone."""
    weight = noise(16, 8, 3, 3)
    weight[5] *= np.float32(size)
    weights = {"w": weight, "b": np.linspace(50, 200, 16).astype(np.float32)}
    source = model_of([node("Conv", "x w b", "c"), node("Relu", "c", "y")], weights, {"x": ["n", 8, 6, 6]}, ["y"])
    feeds = {"x": noise(24, 8, 6, 6)}
    written = quantize(source, feeds, bits=8)
    before, after = (Session(m).run(feeds) for m in (source.SerializeToString(), written.path))
    # one layer at 8 bits, its input and output at 8 bits
    assert sqnr_of(before, after) > 35


@pytest.mark.parametrize("shape", [["n", 64], ["n", 5, 64], [4, 5, 64]])
def test_nothing_of_a_bias_is_dequantized_at_run_time(quantize: Quantize, shape: list[Any]) -> None:
    """Test that a bias is float behind a MatMul that cannot become a Gemm, and part of the kernel elsewhere."""
    source = model_of(
        [node("MatMul", "x w", "m"), node("Add", "m b", "y")], {"w": (64, 32), "b": (32,)}, {"x": shape}, ["y"]
    )
    written = quantize(source, {"x": noise(24, *shape[1:])}, bits=8)
    found = written.kernels
    assert sum(found.integer.values()) == 1, found.counts
    if shape == ["n", 5, 64]:
        assert not {"DequantizeLinear", "Gemm", "MatMul"} & set(found.counts)


def test_a_weight_only_matmul_without_a_bias_gets_one_that_carries_the_mean(quantize: Quantize) -> None:
    source = model_of([node("MatMul", "x w", "y")], {"w": (128, 32)}, {"x": ["n", 5, 128]}, ["y"])
    feeds = {"x": noise(24, 5, 128) + np.float32(2)}
    written = quantize(source, feeds, bits=3, activations="none")
    wanted, got = (Session(m).run(feeds)["y"] for m in (source.SerializeToString(), written.path))
    lost = np.abs((got - wanted).mean(axis=(0, 1)))
    assert [n.op_type for n in written.proto.graph.node] == ["DequantizeLinear", "MatMul", "Add"]
    # some hundred positions give the mean only so exactly; without a bias it is larger than the rest of the error
    assert lost.max() < 0.25 * (got - wanted).std()


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("activations", ["auto", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.25), (0.25, 1.0), (4.0, 0.5)])
def test_a_gemms_alpha_and_beta_count_once(
    tmp_path: Path, trans_a: int, activations: str, bias: bool, alpha: float, beta: float
) -> None:
    # the source has no bias, or one of zeros: the output is the layer's product alone
    weights = {"w": (32, 16)} | ({"b": np.zeros(16, np.float32)} if bias else {})
    nodes = [node("Gemm", "x w b" if bias else "x w", "y", transA=trans_a, alpha=alpha, beta=beta)]
    source = model_of(nodes, weights, {"x": [32, "n"] if trans_a else ["n", 32]}, ["y"])
    # inputs have a mean, so that the bias carries a shift
    x = noise(32, 48) + np.float32(2) if trans_a else noise(48, 32) + np.float32(2)
    samples = {"x": np.stack([x] * 4)} if trans_a else {"x": x}
    options = {"bits": 4, "activations": activations, "device": "cpu"}
    report = comq_onnx.quantize(source, tmp_path / "q.onnx", samples, **options)
    before = Session(source.SerializeToString()).run({"x": x})
    after = Session(tmp_path / "q.onnx", level=0).run({"x": x})
    # 8-bit activations, and of 48 samples some that were held back
    assert sqnr_of(before, after) > -report.layers[0].error_db - 4
