"""Test layers that are solved as several matrices: what is told of them is what the written model does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import comq_onnx
from models import build, normal


@pytest.mark.parametrize("granularity", ["channel", "tensor", "32"])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_the_error_told_of_a_transposed_convolution_is_that_of_the_file(
    tmp_path: Path, granularity: str, kernel: int
) -> None:
    source = build(
        """g (float[n, 8, 5, 5] x) => (float[n, 6, h, w] y) {
            [up] y = ConvTranspose <strides = [2, 2]> (x, w, b)
        }""",
        {"w": normal(8, 6, kernel, kernel), "b": normal(6)},
    )
    x = np.abs(normal(40, 8, 5, 5)) + 1
    report = comq_onnx.quantize(
        source, tmp_path / "q.onnx", {"x": x}, bits=3, granularity=granularity, uniform=True, activations="none",
        device="cpu", max_samples=32,
    )  # fmt: skip
    float_y, y = (
        ort.InferenceSession(model).run(None, {"x": x})[0].astype(np.float64)
        for model in (source.SerializeToString(), onnx.load(tmp_path / "q.onnx").SerializeToString())
    )
    # without the bias, as the error of a layer is told
    energy = ((float_y - onnx.numpy_helper.to_array(source.graph.initializer[1])[:, None, None]) ** 2).sum()
    found = 10 * np.log10(((y - float_y) ** 2).sum() / energy)
    # some of the samples are held back
    assert report.layers[0].error_db == pytest.approx(found, abs=0.3)
