"""comq-onnx: post-training quantization of ONNX models by coordinate minimization.

    import comq_onnx

    report = comq_onnx.quantize("model.onnx", "model_q.onnx", "samples.npz", bits=4)
    print(report.size, report.outputs)
    report.save_html("report.html")

`quantize` does it all, `quantize_all` for all models of a folder; `plan` says what it would do, `inspect_samples` what
the model would be fed; `compare` runs two models on the same samples. A model is a path, an onnx.ModelProto or an
onnx-graphsurgeon Graph; samples are a path, arrays by input name, or whatever yields them. A `Report` shows itself in a
notebook. Every error is a `ComqError`.
"""

from comq_onnx.errors import ComqError, ModelError, OptionError, OutOfMemory, RuntimeFailure, SamplesError
from comq_onnx.evaluate.comparison import Comparison, compare
from comq_onnx.folders import Done, quantize_all
from comq_onnx.metrics import OutputComparison
from comq_onnx.options.options import Options
from comq_onnx.options.samples import SampleOptions
from comq_onnx.pipeline import inspect_samples, plan, quantize
from comq_onnx.report.inputs import InputReport
from comq_onnx.report.report import ActivationReport, LayerReport, Report
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Samples
from comq_onnx.write.provenance import version

__all__ = [
    "ActivationReport",
    "Comparison",
    "ComqError",
    "Done",
    "InputReport",
    "LayerReport",
    "ModelError",
    "OptionError",
    "Options",
    "OutOfMemory",
    "OutputComparison",
    "Report",
    "RuntimeFailure",
    "SampleOptions",
    "Samples",
    "SamplesError",
    "compare",
    "inspect_samples",
    "load_samples",
    "plan",
    "quantize",
    "quantize_all",
    "version",
]
