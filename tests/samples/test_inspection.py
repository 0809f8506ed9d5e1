"""Test what a person is shown of samples: ranges and means, the sheet of pictures, doubts about the preprocessing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from pictures import norm_net, picture, pixels
from PIL import Image

from comq_onnx import pipeline
from comq_onnx.errors import ModelError
from comq_onnx.metrics import softmax, suspicious_scores
from comq_onnx.samples import inspection
from comq_onnx.samples.clues import suspicious_statistics
from comq_onnx.samples.inspection import contact_sheet, tensor_facts
from comq_onnx.samples.samples import Clues
from models import normal, samples_for, several_inputs, tokens


def test_the_facts_of_a_tensor_are_those_of_numpy() -> None:
    array = normal(6, 3, 8, 9) * 2 + np.arange(3, dtype=np.float32)[:, None, None]
    facts = tensor_facts("x", array)
    assert (facts.name, facts.dtype, facts.shape) == ("x", "float32", (6, 3, 8, 9))
    np.testing.assert_allclose(
        [facts.low, facts.high, facts.mean, facts.std], [array.min(), array.max(), array.mean(), array.std()], rtol=1e-5
    )
    np.testing.assert_allclose(facts.channels, array.mean(axis=(0, 2, 3)), rtol=1e-5)
    assert tensor_facts("x", array.transpose(0, 2, 3, 1)).channels == pytest.approx(facts.channels)


def test_the_facts_of_a_large_tensor_are_found_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "PIECE", 7)
    array = normal(5, 9) + 3
    array[2, 2] = np.inf
    facts, finite = tensor_facts("x", array), array[np.isfinite(array)].astype(np.float64)
    assert (facts.mean, facts.std) == (pytest.approx(finite.mean()), pytest.approx(finite.std()))
    assert facts.high == finite.max()


def test_tensors_of_no_numbers_have_no_range() -> None:
    for array in (np.array(["a"], object), np.zeros((3, 0))):
        assert tensor_facts("x", array).low is None
    assert tensor_facts("x", np.array([np.nan, 1.0, 3.0])).mean == 2


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "complete"])
def test_the_sheet_shows_the_pictures(layout: str) -> None:
    photos = np.stack([np.asarray(picture(30, 20, seed=i)) for i in range(10)])
    array = photos / 127.5 - 1
    if layout != "nhwc":
        array = array.transpose(0, 3, 1, 2)
    if layout == "complete":
        array = array[:, None]
    png = contact_sheet(array.astype(np.float32))
    assert png is not None
    sheet = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), float)
    assert sheet.shape == (224, 896, 3)
    # tile 9 is second of the second row; 20 x 30 pixels in the middle of 112 x 112
    shown = sheet[112 + 46 : 112 + 66, 112 + 41 : 112 + 71]
    low, high = photos.min(axis=(0, 1, 2)), photos.max(axis=(0, 1, 2))
    np.testing.assert_allclose(shown, (photos[9] - low) / (high - low) * 255, atol=1.5)


def test_the_sheet_keeps_to_the_first_and_shrinks_the_large() -> None:
    png = contact_sheet(normal(50, 1, 300, 300), most=4)
    assert png is not None
    assert Image.open(io.BytesIO(png)).size == (4 * 112, 112)
    assert contact_sheet(normal(50, 1, 300, 300), most=4) == png


def test_what_holds_no_pictures_has_no_sheet() -> None:
    for array in (normal(4, 32), normal(4, 7, 16, 16), normal(4, 3, 2, 2), np.ones((4, 3, 16, 16), bool)):
        assert contact_sheet(array) is None


# Doubts


def confident(samples: int = 16, classes: int = 100) -> np.ndarray:
    """Make logits that are sure of one class for each sample."""
    return normal(samples, classes) + 12 * np.eye(classes, dtype=np.float32)[np.arange(samples) % classes]


def test_confident_scores_raise_no_doubt() -> None:
    assert suspicious_scores("logits", confident()) is None
    assert suspicious_scores("probs", softmax(confident())) is None


def test_flat_scores_do() -> None:
    line = suspicious_scores("logits", normal(16, 100))
    assert line is not None
    assert line.startswith("the float model is undecided about these samples: its best class of 100 in 'logits' gets ")
    assert line.endswith(
        " on average; look at them with --inspect-samples, and see that they are preprocessed as the model was trained"
    )
    assert suspicious_scores("out", softmax(normal(16, 100))) is not None


def test_one_class_for_all_does() -> None:
    same = np.repeat(confident(1), 16, axis=0)
    assert suspicious_scores("logits", same) == (
        "the float model gives all of the first 16 samples the same of 100 classes ('logits'); look at them with "
        "--inspect-samples, and see that they are preprocessed as the model was trained"
    )


@pytest.mark.parametrize(
    "output",
    [
        normal(7, 100),
        normal(16, 9),
        normal(16, 100, scale=0.01),
        normal(16, 4, 100),
        "text",
        normal(16, 100).astype(int),
    ],
    ids=["few samples", "few classes", "features", "sequences", "no array", "whole numbers"],
)
def test_what_holds_no_scores_raises_none(output: object) -> None:
    assert suspicious_scores("out", output) is None


def test_pixels_of_another_scale_are_told_by_the_batch_normalizations() -> None:
    model = norm_net("imagenet-inception")
    right = pipeline.plan(model, {"image": pixels("imagenet-inception")}, device="cpu")
    wrong = pipeline.plan(model, {"image": pixels("raw")}, device="cpu")
    line = "these samples are not what the model was trained on, by the statistics of its BatchNormalizations (misfit "
    assert not any("BatchNormalizations" in w for w in right.warnings)
    assert any(w.startswith(line) for w in wrong.warnings)


def test_first_layers_that_do_not_run_alone_raise_no_doubt_and_no_error() -> None:
    def fails(_: object) -> float:
        raise ModelError("no")

    assert suspicious_statistics(Clues(misfit=fails), {}) is None


# Inspection


def test_an_inspection_tells_of_every_input_and_output(tmp_path: Path) -> None:
    found = pipeline.inspect_samples(several_inputs(), samples_for(several_inputs()), device="cpu")
    assert [f.name for f in found.inputs] == ["image", "vector", "use", "count"]
    assert [(f.name, f.shape) for f in found.outputs] == [("y", (16, 8))]
    assert (found.source, found.used, found.held_back) == ("arrays", 35, 5)
    assert found.sheet is not None
    onnx.save(tokens(), tmp_path / "t.onnx")
    assert pipeline.inspect_samples(tmp_path / "t.onnx", samples_for(tokens()), device="cpu").sheet is None
