"""Test that a weight which several layers share is solved for the inputs of all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Solved
from walks import quantize

from comq_onnx.calibrate import walk
from models import build, weight

WIDTH = 48
# the later layer reads mostly what the earlier one reads little of
SIZES = np.geomspace(1, 30, WIDTH).astype(np.float32)


def twice(branches: bool = False) -> onnx.ModelProto:
    """Build x -> two layers of one weight, one behind the other or beside it, on inputs of unlike channels."""
    second = "ts" if branches else "us"
    return build(
        f"""g (float[batch, 6, {WIDTH}] x) => (float[batch, 6, {WIDTH}] y) {{
            xs = Div (x, sizes)
            ts = Mul (x, sizes)
            [first] a = MatMul (xs, w)
            t = Tanh (a)
            [other] u = MatMul (t, w2)
            us = Mul (u, sizes)
            [second] b = MatMul ({second}, w)
            y = Add (b, a)
        }}""",
        {"w": weight(WIDTH, WIDTH), "w2": weight(WIDTH, WIDTH, seed=5), "sizes": SIZES},
    )


@pytest.mark.parametrize("branches", [False, True])
def test_a_shared_weight_is_solved_for_all_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved, branches: bool
) -> None:
    model, options = twice(branches), {"activations": "none"}
    together = quantize(model, tmp_path / "q.onnx", **options)
    moments = solved.on["first"]
    # 35 samples of 6 positions for each of the two layers
    assert moments.count == 2 * 35 * 6
    assert moments.half is not None
    assert np.isfinite(moments.gram).all()
    written = onnx.load(tmp_path / "q.onnx")
    assert sum(".codes" in t.name for t in written.graph.initializer) == (1 if branches else 2)

    monkeypatch.setattr(walk, "later_readers", lambda *_: {})
    alone = quantize(model, tmp_path / "alone.onnx", **options)
    assert solved.on["first"].count == 35 * 6
    assert together.outputs[0].sqnr_db > alone.outputs[0].sqnr_db


def test_each_layer_of_a_shared_weight_has_its_own_error(tmp_path: Path) -> None:
    report = quantize(twice(), tmp_path / "q.onnx", activations="none")
    errors = {layer.name: layer.error_db for layer in report.layers}
    assert errors["first"] is not None
    assert errors["second"] is not None
    assert errors["first"] != errors["second"]
