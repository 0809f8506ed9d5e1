"""Use the library as a typed program does: mypy checks it strictly, and tests/test_release.py runs it.

python tests/typed/example.py MODEL FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import comq_onnx


def told(what: str, done: int, total: int) -> None:
    """Take what a progress function gets."""
    assert 0 <= done <= total, what


def main(model: Path, folder: Path) -> None:
    """Quantize a model in each way that there is, and print what became of it."""
    images = np.random.default_rng(0).random((32, 1, 28, 28), np.float32)
    inspected = comq_onnx.inspect_samples(model, {"image": images})
    planned: comq_onnx.Report = comq_onnx.plan(model, {"image": images}, bits=8)
    report = comq_onnx.quantize(model, folder / "q.onnx", {"image": images}, progress=told, uniform=True)
    layer: comq_onnx.LayerReport = report.layers[0]
    error: float | None = layer.error_db
    worst: float = min(output.sqnr_db for output in report.outputs)
    compared: comq_onnx.Comparison = comq_onnx.compare(model, folder / "q.onnx", {"image": images}, seconds=0.01)
    done: list[comq_onnx.Done] = comq_onnx.quantize_all([model], folder / "all", {"image": images}, uniform=True)
    failed: list[comq_onnx.ComqError] = [one.error for one in done if one.error is not None]
    try:
        comq_onnx.quantize(model, folder / "q.onnx", bits=9)
    except comq_onnx.OptionError as raised:
        code: int = raised.exit_code
        print(type(inspected).__name__, len(planned.layers), error, worst > 0, compared.samples, failed, code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
