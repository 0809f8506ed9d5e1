"""Build the report of a run, or of a plan."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from comq_onnx.bits.choose import Chosen, Quantized
from comq_onnx.calibrate import stages
from comq_onnx.context import Context
from comq_onnx.evaluate.evaluation import Evaluation
from comq_onnx.model.float_model import FloatModel
from comq_onnx.model.layers import Layer, calibrated
from comq_onnx.plan.forms import may_overflow
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.report.changes import changed_answers, worst_weights
from comq_onnx.report.flow import layers_before
from comq_onnx.report.inputs import describe
from comq_onnx.report.report import ActivationReport, LayerReport, Report
from comq_onnx.runtime import session as runtime
from comq_onnx.samples.dataset import Dataset
from comq_onnx.solve.grid import MAX_BITS, Grid
from comq_onnx.solve.layer import error_db
from comq_onnx.write.provenance import version

# the share of an activation's values that are in its typical range
TYPICAL = 0.999


def build_plan_report(chosen: Chosen, source: FloatModel, data: Dataset, context: Context) -> Report:
    """Build the report of a plan: layers, bits and stages, but no errors and no outputs."""
    plan, options, journal = chosen.plan, context.options, context.journal
    stage_of = {
        layer.name: stage.index
        for stage in stages.cut(plan.walked.model, list(calibrated(plan.walked.layers)))
        for layer in stage.layers
    }
    journal.seconds["total"] = time.perf_counter() - journal.started
    tradeoff, allocation = chosen.tradeoff, chosen.allocation
    before = layers_before(plan.walked.model, plan.walked.layers)
    return Report(
        model=str(source.path),
        output=None,
        version=version(),
        target=plan.target.name,
        bits=options.bits,
        layers=[
            replace(_planned_layer(x, chosen, source, stage_of.get(x.name, 0)), before=before.get(x.name, ()))
            for x in plan.layers
        ],
        skipped=plan.written.skipped,
        notes=[*journal.notes, *_cpu_notes(plan)],
        warnings=journal.warnings,
        options=dict(vars(options)),
        runtime={"onnxruntime": runtime.version(), "device": context.device, "opset": str(plan.opset)},
        samples={
            "source": data.calibration.source,
            "used": len(data.calibration),
            "held_back": len(data.held_back),
        },
        seconds={stage: round(spent, 3) for stage, spent in journal.seconds.items()},
        peak_rss_mb=round(_peak_rss_mb(), 1),
        frontier=tradeoff.frontier(allocation) if tradeoff is not None and allocation is not None else [],
        inputs=describe(data.calibration.arrays),
    )


def build_report(
    quantized: Quantized, evaluation: Evaluation, source: FloatModel, data: Dataset, context: Context, out: Path,
    size: int,
) -> Report:  # fmt: skip
    """Build the report of a finished run.

    evaluation: the comparison of the quantized model with its source
    out: the file that was written
    size: the bytes of that file
    """
    solved, stored = quantized.emitted.solved, quantized.emitted.stored_bytes
    report = build_plan_report(quantized.chosen, source, data, context)
    kernels = evaluation.kernels
    of_layer = {} if kernels is None else kernels.of_layer
    return replace(
        report,
        output=str(out),
        layers=[_solved_layer(layer, solved, stored, of_layer) for layer in report.layers],
        size={"before": source.file.size, "after": size},
        activations=_activations(solved),
        histograms=worst_weights(solved),
        answers=changed_answers(evaluation.outputs, data.held_back.arrays),
        outputs=evaluation.outputs,
        language=evaluation.language,
        matches=evaluation.matches,
        latency_ms=evaluation.latency_ms,
        decoding_ms=evaluation.decoding_ms,
        kernels={} if kernels is None else kernels.integer,
        float_kernels={} if kernels is None else kernels.floating,
    )


def _cpu_notes(plan: Plan) -> list[str]:
    """Say on which CPUs the integer layers are right; nothing where all CPUs of the target are alike."""
    safe = plan.target.safe_bits
    layers = [x for x in plan.layers if may_overflow(x, plan.activations, plan.target)]
    if safe == MAX_BITS or not layers:
        return []
    narrowed = sum(plan.grids[x.name].bits < plan.bits[x.name] for x in layers)
    wide = sum(plan.grids[x.name].bits > safe for x in layers)
    if wide:
        return [
            f"{wide} of {len(layers)} integer layers may overflow on x86 CPUs without VNNI (--cpu any: none, by codes "
            f"of {safe} bits)"
        ]
    how = f": {narrowed} of {len(layers)} use {safe} of their {MAX_BITS} bits for that (--cpu vnni: all)"
    return [f"no integer layer overflows on x86 CPUs without VNNI{how if narrowed else ''}"]


def _planned_layer(layer: Layer, chosen: Chosen, source: FloatModel, stage: int) -> LayerReport:
    """Report what is planned for a layer; stage: the index of its stage."""
    plan, tradeoff = chosen.plan, chosen.tradeoff
    grid, bits = plan.grids[layer.name], plan.bits[layer.name]
    noise = None if tradeoff is None else error_db(tradeoff.sensitivity.cost(layer.name, bits))
    return LayerReport(
        layer.name, layer.op, layer.weight_shape, bits, _granularity(layer, grid), plan.form(layer).value, stage,
        input=layer.input, bytes_before=math.prod(layer.weight_shape) * (2 if source.is_half else 4),
        output_noise_db=noise, slower=layer.name in plan.slower,
    )  # fmt: skip


def _solved_layer(
    report: LayerReport, solved: Solved, stored: Mapping[str, int], kernels: Mapping[str, str]
) -> LayerReport:
    """Add what was solved to the report of a layer.

    stored: the bytes of each layer's weight in the file, by the name of the layer
    kernels: the op type that runs each layer, by the name of the layer
    """
    solution = solved.solutions[report.name]
    return replace(
        report,
        error_db=error_db(solution.error),
        rtn_error_db=error_db(solution.rtn_error),
        seconds=round(solved.layer_seconds.get(report.name, 0.0), 4),
        bytes_after=stored.get(report.name),
        kernel=kernels.get(report.name),
    )


def _activations(solved: Solved) -> list[ActivationReport]:
    """Report the range and the grid of each quantized activation, in graph order."""
    reports = []
    for name in solved.plan.activations.values:
        seen, grid = solved.ranges.get(name), solved.activation_grids.get(name)
        if seen is not None and grid is not None and np.isfinite(seen.low):
            typical = seen.between(TYPICAL)
            reports.append(
                ActivationReport(
                    name, seen.low, seen.high, *typical, float(grid.scale), int(grid.zero_point), grid.dtype
                )
            )
    return reports


def _granularity(layer: Layer, grid: Grid) -> str:
    """Return what shares a scale, as the report names it."""
    return "row" if layer.kind.is_lookup else grid.granularity


def _peak_rss_mb() -> float:
    """Return the most memory that this process has used, in MB; NaN where the system does not tell."""
    try:
        # getrusage keeps its figure through exec: a small run that a large process started would show that one's memory
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
