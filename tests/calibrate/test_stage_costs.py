"""Test the shares of a walk that progress is told in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from stages import planned

from comq_onnx.calibrate import stages
from comq_onnx.calibrate.leading import input_shapes
from comq_onnx.calibrate.stage_costs import stage_shares
from models import build, cnn, mlp, samples_for, weight


def shares(model: onnx.ModelProto, folder: Path, needed: list[int] | None = None, count: int = 80) -> list[float]:
    """Return the shares for all stages; needed: how many samples each needs, all of them if not given."""
    onnx.save(model, folder / "m.onnx")
    at = planned(folder / "m.onnx", samples_for(model, count), bits=4)
    parts = stages.cut(at.plan.walked.model, at.plan.walked.layers)
    shapes = input_shapes(at.plan, parts, at.data.calibration, "cpu", folder) or {}
    like = [(1, *array.shape[1:]) for array in at.data.calibration.arrays.values()]
    return stage_shares(parts, shapes, like, needed or [count] * len(parts), count, 1, 1)


@pytest.mark.parametrize("make", [cnn, mlp], ids=lambda make: make.__name__)
def test_shares_grow_to_the_whole(tmp_path: Path, make: object) -> None:
    found = shares(make(), tmp_path)  # type: ignore[operator]
    assert (np.diff([0.0, *found]) > 0).all()
    assert found[-1] == pytest.approx(1)


def test_a_large_layer_takes_a_large_share(tmp_path: Path) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 16] y) {
            a = MatMul (x, w1)  r = Relu (a)  b = MatMul (r, w2)  s = Relu (b)  y = MatMul (s, w3)
        }""",
        {"w1": weight(32, 1024), "w2": weight(1024, 1024), "w3": weight(1024, 16)},
    )
    # the first stage has no layer
    *rest, large, last = np.diff([0.0, *shares(model, tmp_path)])
    assert large > 5 * max(*rest, last)


def test_samples_that_wait_run_in_float_first(tmp_path: Path) -> None:
    model = cnn(size=32)
    everywhere = shares(model, tmp_path, count=4000)
    count = len(everywhere)
    waiting = shares(model, tmp_path, [32] * (count - 1) + [4000], count=4000)
    # and quantized before the last stage, whose share is larger for it
    assert 1 - waiting[-2] > 1 - everywhere[-2]
    assert waiting[0] > everywhere[0] / 2
