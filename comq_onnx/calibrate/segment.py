"""Run the nodes of one stage, as a model of their own, on the tensors of a cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from comq_onnx import arrays
from comq_onnx.calibrate.cut_tensors import Host
from comq_onnx.calibrate.stages import Stage
from comq_onnx.model.files import to_bytes_or_file
from comq_onnx.model.states import follow
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.runtime.session import Session
from comq_onnx.write.emit import emit


def run_segment(
    plan: Plan, stage: Stage, given: Mapping[str, Sequence[Any]], count: int, wanted: Sequence[str],
    solved: Solved | None, store: Host, device: str, work: Path,
) -> Iterator[Mapping[str, Any]]:  # fmt: skip
    """Yield the values `wanted` that a stage makes, batch by batch.

    given: the cut tensors that the stage reads, one array for each of `count` batches
    wanted: the names of the values
    solved: what is quantized in the segment; None for the float segment
    store: keeps the tensors
    device: where the segment runs
    work: a directory for a model that is too large for one protobuf message
    """
    segment = extract_segment(plan.walked.model, stage, {name: given[name][0] for name in stage.reads}, wanted)
    if solved is not None:
        emit(segment, solved)
        follow(segment)
    session = Session(
        to_bytes_or_file(segment, work, f"stage{stage.index}"), device, what=f"stage {stage.index} of the model",
        float_matmul_nbits=True, disable_qdq_fusion=plan.target.runs_outside_ort,
    )  # fmt: skip
    feeds = store.ahead(count, lambda i: {name: store.fetch(given[name][i]) for name in stage.reads})
    for batch in feeds:
        yield store.run(session, batch, wanted)


def extract_segment(whole: ir.Model, stage: Stage, examples: Mapping[str, Any], wanted: Sequence[str]) -> ir.Model:
    """Extract the nodes of a stage as a model, from the cut tensors that it reads to the values `wanted`.

    whole: the model that was divided into stages
    examples: a tensor of each value that it reads, for its type
    """
    extracted = ir.convenience.extract(whole.graph, list(stage.reads), list(wanted))
    for value in extracted.inputs:
        example = examples[str(value.name)]
        if arrays.is_array(example):
            # only the type: ranks and sizes may differ from batch to batch
            value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(arrays.dtype(example))), None
    for value in extracted.outputs:
        value.shape = None
    model = ir.Model(extracted, ir_version=whole.ir_version)
    model.graph.opset_imports.update(whole.graph.opset_imports)
    return model
