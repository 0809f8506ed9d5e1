"""Test that a result no smaller than its source is an error with the reason, or a warning for hardly any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import comq_onnx
from comq_onnx.errors import ModelError
from models import build, normal, weight


def twice(dtype: Any = np.float32) -> onnx.ModelProto:
    """Build two products with the same weight [192, 192]."""
    kind = {np.float32: "float", np.float16: "float16"}[dtype]
    return build(
        f"""g ({kind}[batch, 192] x) => ({kind}[batch, 192] y) {{
            [first] h = MatMul (x, w)
            r = Tanh (h)
            [second] y = MatMul (r, w)
        }}""",
        {"w": weight(192, 192, dtype=dtype)},
    )


def test_a_float_weight_beside_its_codes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"not smaller than its source \([\d,]+ bytes, not [\d,]+\): float weights stay"
    ) as e:
        comq_onnx.quantize(twice(), tmp_path / "q.onnx", {"x": normal(40, 192)}, exclude=("second",), bits=8)
    assert "'w' (for 'second')" in str(e.value)
    assert "second (MatMul: excluded by --exclude)" in str(e.value)
    assert not list(tmp_path.iterdir())
    comq_onnx.quantize(twice(), tmp_path / "q.onnx", {"x": normal(40, 192)}, bits=8)


def test_half_precision_that_becomes_float_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="what stays float has become float32"):
        comq_onnx.quantize(
            twice(np.float16), tmp_path / "q.onnx", {"x": normal(40, 192, dtype=np.float16)}, exclude=("second",)
        )


def test_a_model_of_hardly_any_weights_is_written_with_a_warning(tmp_path: Path) -> None:
    model = build("g (float[batch, 16] x) => (float[batch, 16] y) { [only] y = MatMul (x, w) }", {"w": weight(16, 16)})
    report = comq_onnx.quantize(model, tmp_path / "q.onnx", {"x": normal(40, 16)}, bits=8, activations="8")
    assert (tmp_path / "q.onnx").stat().st_size > len(model.SerializeToString())
    (warning,) = [w for w in report.warnings if "not smaller than its source" in w]
    assert "1,024 bytes of weights became" in warning
