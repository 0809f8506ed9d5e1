"""Make the metadata of a quantized model: where it comes from."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from comq_onnx.context import Context
from comq_onnx.model.float_model import FloatModel
from comq_onnx.samples.dataset import Dataset


def version() -> str:
    """Return the installed version of comq-onnx."""
    return metadata.version("comq-onnx")


def provenance(source: FloatModel, data: Dataset, context: Context) -> dict[str, str]:
    """Return the metadata of the file: the version, the options, the source and the samples that it was made with."""
    samples = data.calibration
    return {
        "comq_onnx.version": version(),
        "comq_onnx.options": context.options.lasting(),
        "comq_onnx.source_sha256": source.file.sha256,
        "comq_onnx.samples": f"{len(samples)} of {Path(samples.source).name}",
    }
