"""Test that detectors are judged by what their users use: each unit by itself, selections by what is selected from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from detectors import images, joined, selecting

import comq_onnx
from models import infer, sqnr


@pytest.mark.parametrize("moved", [False, True])
def test_the_worst_part_decides_what_drop_is_kept(tmp_path: Path, moved: bool) -> None:
    model, seen = joined(moved), images(160)
    report = comq_onnx.quantize(model, tmp_path / "q.onnx", seen, bits="auto", max_drop="30dB", device="cpu")
    assert [output.name for output in report.outputs] == ["y", "y: boxes", "y: scores"]
    assert min(output.sqnr_db for output in report.outputs) >= 30
    fresh = {"image": images(64)["image"][::-1]}
    before, after = (infer(x, fresh)["y"] for x in (model, tmp_path / "q.onnx"))
    scores = (Ellipsis, slice(4, None)) if moved else (slice(None), slice(4, None))
    # other samples than those held back: 2 dB of grace
    assert sqnr(before[scores], after[scores]) >= 28


def test_a_part_that_is_noise_is_said(tmp_path: Path) -> None:
    report = comq_onnx.quantize(joined(), tmp_path / "q.onnx", images(), bits=2, uniform=True, device="cpu")
    whole, boxes, scores = (output.sqnr_db for output in report.outputs)
    assert scores < boxes
    assert whole == pytest.approx(boxes, abs=0.5)


@pytest.mark.parametrize(
    "options",
    [{"bits": 4}, {"bits": 4, "uniform": True}, {"bits": 8}, {"bits": "auto", "max_drop": "20dB"}],
    ids=str,
)
def test_a_detector_with_its_selection_inside_is_quantized(tmp_path: Path, options: dict[str, Any]) -> None:
    report = comq_onnx.quantize(selecting(), tmp_path / "q.onnx", images(), device="cpu", **options)
    assert [output.name for output in report.outputs] == ["which: boxes", "which: scores"]
    assert min(output.sqnr_db for output in report.outputs) > 10
    found, which = report.matches
    assert (found.name, which.name) == ("found", "which")
    assert found.before == which.before > 0
    assert which.share > 0.5
    assert not any("far from its source" in warning for warning in report.warnings)


def test_the_layers_of_a_detector_are_ranked() -> None:
    report = comq_onnx.plan(selecting(), images(), sensitivity=True, device="cpu")
    noises = [layer.output_noise_db for layer in report.layers]
    assert all(noise is not None and np.isfinite(noise) and noise < 0 for noise in noises)


def test_whole_numbers_are_compared_by_how_many_are_equal(tmp_path: Path) -> None:
    report = comq_onnx.quantize(selecting(), tmp_path / "q.onnx", images(), bits=8, device="cpu")
    onnx.checker.check_model(tmp_path / "q.onnx")
    assert report.to_dict()["matches"][1]["matched"] == report.matches[1].matched
    assert "which" in report.to_html()
