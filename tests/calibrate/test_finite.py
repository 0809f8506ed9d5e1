"""Test that numbers which are not finite, or too large to square, are refused by layer and sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from walks import never, quantize

from comq_onnx.errors import ModelError
from comq_onnx.samples.samples import Samples
from models import (
    build,
    cnn,
    infer,
    mlp,
    normal,
    samples_for,
    weight,
)  # fmt: skip

NOT_A_NUMBER = "absolute = Abs (x)\nnegative = Mul (absolute, minus)\nleft = Log (negative)"
INFINITE = "absolute = Abs (x)\nnothing = Sub (absolute, absolute)\nleft = Reciprocal (nothing)"


@pytest.mark.parametrize("activations", ["auto", "none"])
@pytest.mark.parametrize("condition", [NOT_A_NUMBER, INFINITE], ids=["nan", "inf"])
def test_activations_that_are_not_finite_are_refused_by_their_name(
    tmp_path: Path, activations: str, condition: str
) -> None:
    with pytest.raises(ModelError, match=r"NaN or Inf at 'left' \(read by 'aside'\) for sample \d+ of arrays"):
        quantize(never(condition), tmp_path / "q.onnx", activations=activations)
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("bad", [1e30, np.float32(3.4e38)])
def test_numbers_too_large_are_refused_with_the_sample(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], bad: float
) -> None:
    samples = samples_for(make())
    array = next(iter(samples.values()))
    # one that the split with seed 0 leaves to calibration
    _, held = Samples(samples, "").split(35, 5, 0)
    number = next(i for i in range(20, 40) if i not in {held.number(k) for k in range(len(held))})
    array[(number, *[0] * (array.ndim - 1))] = bad
    with pytest.raises(ModelError, match=rf"numbers up to .*too large.* for sample {number} of arrays"):
        quantize(make(), tmp_path / "q.onnx", samples)


def test_a_sample_that_turns_out_not_finite_is_named(tmp_path: Path) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 10] y) {
            [fc1] h = MatMul (x, w1)
            l = Log (x)
            [fc2] m = MatMul (l, w2)
            y = Add (h, m)
        }""",
        {"w1": weight(32, 10), "w2": weight(32, 10)},
    )
    samples = {"x": np.abs(normal(40, 32)) + 1}
    _, held = Samples(samples, "").split(35, 5, 0)
    number = next(i for i in range(20, 40) if i not in {held.number(k) for k in range(len(held))})
    samples["x"][number] = -1
    for batch_size in (16, 5, 1):
        with pytest.raises(ModelError, match=rf"at 'l' \(read by 'fc2'\) for sample {number} of arrays"):
            quantize(model, tmp_path / "q.onnx", samples, batch_size=batch_size)


def test_numbers_too_small_to_square_are_zeros(tmp_path: Path) -> None:
    report = quantize(mlp(), tmp_path / "q.onnx", {"x": normal(40, 32, scale=1e-31)}, bits=8)
    assert np.isfinite(infer(tmp_path / "q.onnx", samples_for(mlp()))["y"]).all()
    assert report.outputs


def test_weights_too_large_are_refused_with_the_layer(tmp_path: Path) -> None:
    model = mlp()
    array = numpy_helper.to_array(model.graph.initializer[0]) * np.float32(1e20)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, model.graph.initializer[0].name))
    with pytest.raises(ModelError, match=r"layer 'fc1': weights up to .* are too large"):
        quantize(model, tmp_path / "q.onnx")
