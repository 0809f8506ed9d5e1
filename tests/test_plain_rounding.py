"""Test that --solver rtn needs no samples: each weight is rounded, activations stay float, nothing is calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from decoders import genai

import comq_onnx
from comq_onnx.bits import choose
from comq_onnx.errors import OptionError
from comq_onnx.solve.grid import Grid, rtn
from comq_onnx.solve.layer import round_plainly
from models import mlp, normal, samples_for


@pytest.fixture(autouse=True)
def _no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything is calibrated."""

    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(choose, "walk", fail)


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, False, block_size=8)])
def test_the_codes_and_the_error_are_those_of_plain_rounding(grid: Grid) -> None:
    weight = normal(2, 5, 16)
    found = round_plainly(weight, grid)
    assert np.array_equal(found.weight.codes, rtn(weight, grid).codes)
    lost = found.weight.dequantize() - weight
    assert found.error == found.rtn_error == pytest.approx((lost**2).sum() / (weight**2).sum(), rel=1e-5)


@pytest.mark.parametrize("make", [genai, mlp])
def test_without_samples_weights_are_rounded_and_activations_stay_float(make: Any, tmp_path: Path) -> None:
    report = comq_onnx.quantize(make(), tmp_path / "q.onnx", bits=8, solver="rtn", device="cpu")
    assert any("--solver rtn rounds the weights, and activations stay float" in note for note in report.notes)
    assert report.options["activations"] == "none"
    assert all(layer.error_db is not None and layer.error_db < -35 for layer in report.layers)
    assert not any(n.op_type == "QuantizeLinear" for n in onnx.load(tmp_path / "q.onnx").graph.node)
    # 8 bits of random weights keep some 40 dB, before the products of rounded activations
    assert report.outputs[0].sqnr_db > 25


def test_ranges_of_activations_need_samples() -> None:
    with pytest.raises(OptionError, match=r"^--activations 8: the ranges of activations need samples"):
        comq_onnx.plan(mlp(), solver="rtn", activations="8", device="cpu")
    given = comq_onnx.plan(mlp(), samples_for(mlp()), solver="rtn", activations="8", device="cpu", uniform=True)
    assert given.options["activations"] == "8"
