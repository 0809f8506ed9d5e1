"""Test samples: their batches, their split, and how many of them a model needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import VECTOR, an_input

import comq_onnx
from comq_onnx.errors import SamplesError
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Samples
from models import build, cnn, infer, mlp, normal, samples_for, several_inputs, weight

Run = Callable[..., Any]


def test_samples_keep_their_numbers_in_the_source() -> None:
    samples = Samples({"x": np.arange(40)}, "a file")
    used, held = samples.split(20, 8, 3)
    for part in (used, held, used.take([3, 1, 7])):
        assert [part.number(i) for i in range(len(part))] == part.arrays["x"].tolist()


def test_a_batch_axis_left_free_takes_any_batch_and_a_ragged_tail() -> None:
    samples = load_samples({"x": normal(10, 32)}, VECTOR)
    assert samples.batch_counts(4) == [4, 4, 2]
    batches = [b["x"] for b in samples.batches(4)]
    assert [len(b) for b in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(batches), samples.arrays["x"])


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_is_the_only_batch_and_its_ragged_tail_is_left_out(batch: int) -> None:
    samples = load_samples({"x": normal(11, 32)}, [an_input(batch, 32)])
    assert samples.fixed_batch == batch
    assert samples.batch_counts(16) == [batch] * (11 // batch)
    assert {len(b["x"]) for b in samples.batches(16)} == {batch}


@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_with_a_fixed_batch_is_quantized(tmp_path: Path, batch: int) -> None:
    model = cnn(batch=str(batch))
    samples = {"image": normal(42, 3, 16, 16)}
    report = comq_onnx.quantize(model, tmp_path / "q.onnx", samples, bits=8, device="cpu")
    assert report.samples["used"] % batch == 0
    assert report.samples["used"] + report.samples["held_back"] <= 42
    feeds = {"image": samples["image"][:batch]}
    assert infer(tmp_path / "q.onnx", feeds)["logits"].shape == (batch, 10)
    assert report.outputs[0].sqnr_db >= 25


def test_complete_tensors_are_quantized_from(quantized: Run) -> None:
    # what a model without a batch axis, or one whose sizes differ from sample to sample, is calibrated with
    model = build(
        "g (float[12, 32] x) => (float[12, 16] y) { [fc] y = MatMul (x, w) }", {"w": weight(32, 16)}, opset=17
    )
    done = quantized(model, {"x": normal(20, 12, 32)}, per_item=True)
    assert done.report.samples["used"] + done.report.samples["held_back"] == 20


def test_several_inputs_with_ints_and_bools_are_quantized_from(quantized: Run) -> None:
    samples = samples_for(several_inputs())
    assert {a.dtype.kind for a in samples.values()} == {"f", "b", "i"}
    quantized(several_inputs(), samples)


def test_uint8_pictures_for_a_float_input_are_quantized_from(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16), np.uint8)
    report = comq_onnx.quantize(cnn(), tmp_path / "q.onnx", {"image": pictures}, bits=8, device="cpu")
    assert report.outputs[0].sqnr_db >= 25


@pytest.mark.parametrize("count", [1, 0])
def test_too_few_samples_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(SamplesError):
        comq_onnx.quantize(mlp(), tmp_path / "q.onnx", {"x": normal(count, 32)})
    assert not (tmp_path / "q.onnx").exists()


def test_fewer_samples_than_two_fixed_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="at least 8 are needed"):
        comq_onnx.quantize(cnn(batch="4"), tmp_path / "q.onnx", {"image": normal(7, 3, 16, 16)})


def test_two_samples_are_enough_and_warned_about(tmp_path: Path) -> None:
    report = comq_onnx.quantize(mlp(), tmp_path / "q.onnx", {"x": normal(2, 32)}, bits=8, device="cpu")
    assert report.samples["used"] == report.samples["held_back"] == 1
    assert any("only 1 calibration samples" in w for w in report.warnings)


@pytest.mark.parametrize("unit", [None, 4])
def test_what_is_held_back_is_never_calibrated_on(unit: int | None) -> None:
    samples = Samples({"x": np.arange(50)[:, None]}, "numbers", fixed_batch=unit)
    used, held = samples.split(32, 12, seed=3)
    assert len(used) == 32
    assert len(held) == 12
    assert not set(used.arrays["x"].ravel()) & set(held.arrays["x"].ravel())


def test_the_split_depends_on_the_seed_alone() -> None:
    samples = Samples({"x": np.arange(50)[:, None]}, "numbers")
    first, again, other = (samples.split(30, 10, seed)[1].arrays["x"].ravel().tolist() for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_at_most_the_samples_asked_for_are_used(tmp_path: Path) -> None:
    report = comq_onnx.quantize(mlp(), tmp_path / "q.onnx", {"x": normal(100, 32)}, max_samples=33, device="cpu")
    assert report.samples["used"] == 33
    assert report.samples["held_back"] >= 1
