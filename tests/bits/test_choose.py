"""Test that what a report says of a model under --max-drop is of the attempt that was kept."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

import comq_onnx
from comq_onnx.bits import choose
from comq_onnx.bits.drop_check import DropCheck
from models import mlp, samples_for


def test_the_report_is_of_the_attempt_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[choose.Quantized] = []

    def only_the_first(quantized: choose.Quantized, *_: object) -> DropCheck:
        made.append(quantized)
        # the first keeps the accuracy by far, so that smaller models are tried, and none of them keeps it
        return DropCheck(len(made) == 1, "said", 1000.0 if len(made) == 1 else 0.5)

    monkeypatch.setattr(choose, "_check_accuracy", only_the_first)
    model, out = mlp(width=256), tmp_path / "q.onnx"
    report = comq_onnx.quantize(model, out, samples_for(model), bits="auto", max_drop="40dB", device="cpu")
    sizes = [sum(one.emitted.stored_bytes.values()) for one in made]
    assert len(sizes) > 1
    assert sizes[-1] < sizes[0]
    assert [layer.bits for layer in report.layers] == [made[0].chosen.plan.bits[x.name] for x in report.layers]
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    for layer, weight in zip(report.layers, ("w1", "w2"), strict=True):
        codes = [t for t in onnx.load(out).graph.initializer if t.name.startswith(f"{weight}.codes")]
        packed = sum(len(t.raw_data) for t in codes)
        others = [stored[n] for n in (f"{layer.name}.scale", f"{layer.name}.zero_point") if n in stored]
        assert layer.bytes_after == packed + sum(array.nbytes for array in others)
    assert report.size["after"] == out.stat().st_size
    assert [point.size for point in report.frontier if point.chosen] == [pytest.approx(out.stat().st_size, rel=0.05)]
