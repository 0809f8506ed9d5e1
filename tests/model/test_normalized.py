"""Test that no bias shifts what a normalization reads: quiet rows behind it would hold little else."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import comq_onnx
from comq_onnx.model.normalized import is_normalized
from models import Arrays, build, normal, weight

# what stands between the product h and the output y
NORMALIZED = {
    "LayerNormalization": "y = LayerNormalization (h, g)",
    "a constant before": "a = Add (h, b)  c = Reshape (a, s)  y = LayerNormalization (c, g)",
    "mean and deviation": """
        m = ReduceMean <axes = [-1]> (h)  d = Sub (h, m)  q = Mul (d, d)  v = ReduceMean <axes = [-1]> (q)
        e = Add (v, e0)  r = Sqrt (e)  y = Div (d, r)""",
    "root of mean squares": """
        q = Pow (h, two)  v = ReduceMean <axes = [-1]> (q)  e = Add (v, e0)  r = Sqrt (e)  y = Div (h, r)""",
    "length": "n = ReduceL2 <axes = [-1]> (h)  y = Div (h, n)",
    "LpNormalization": "y = LpNormalization (h)",
}  # fmt: skip
OTHERS = {
    "Softmax": "y = Softmax (h)",
    "something computed is added": "i = MatMul (x, w2)  a = Add (h, i)  y = LayerNormalization (a, g)",
    "a mean by which channels are scaled": "m = ReduceMean <axes = [1]> (h)  t = Sigmoid (m)  y = Mul (h, t)",
}
CONSTANTS: Arrays = {
    "w": weight(24, 32), "w2": weight(24, 32), "g": np.ones(32, np.float32), "b": np.full(32, 1e-4, np.float32),
    "s": np.array([0, 0, -1], np.int64), "two": np.float32(2), "e0": np.float32(1e-12),
}  # fmt: skip


def net(behind: str) -> ir.Model:
    text = f"net (float[batch, 8, 24] x) => (float[batch, 8, 32] y) {{ [only] h = MatMul (x, w) {behind} }}"
    used = {name: array for name, array in CONSTANTS.items() if name in re.findall(r"\w+", text)}
    return ir.serde.deserialize_model(build(text, used))


@pytest.mark.parametrize("what", NORMALIZED)
def test_what_a_normalization_reads_is_found(what: str) -> None:
    (product,) = [node for node in net(NORMALIZED[what]).graph if node.name == "only"]
    assert is_normalized(product.outputs[0])


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_read_otherwise_is_not(what: str) -> None:
    (product,) = [node for node in net(OTHERS[what]).graph if node.name == "only"]
    assert not is_normalized(product.outputs[0])


def test_quiet_rows_keep_their_accuracy(tmp_path: Path) -> None:
    x = (3 + normal(64, 8, 24)).astype(np.float32)
    x[:, 4:] *= 1e-4
    model = ir.serde.serialize_model(net(NORMALIZED["LayerNormalization"]))
    db = {
        solver: comq_onnx.quantize(
            model, tmp_path / "q.onnx", {"x": x}, bits=4, granularity="32", activations="none", solver=solver
        ).outputs[0].sqnr_db
        for solver in ("comq", "rtn")
    }  # fmt: skip
    assert db["comq"] > db["rtn"] + 1
