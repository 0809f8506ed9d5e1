"""Open the source model: its graph, its files, and the session that runs it as the reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from comq_onnx.context import Context
from comq_onnx.errors import ModelError
from comq_onnx.model import graph as graphs
from comq_onnx.model.files import MESSAGE_LIMIT
from comq_onnx.model.prepare import prepare_model
from comq_onnx.model.quantized import check_source
from comq_onnx.model.source import SourceFile, load_source
from comq_onnx.runtime.session import Session


@dataclass(frozen=True)
class FloatModel:
    """Hold the model that is to be quantized.

    path: where it was read
    model: its graph
    file: what identifies its files
    session: runs the reference, on the device that the model is calibrated on
    reference: what the quantized model is compared with: the file, or its float32 form where the file cannot run
    is_half: whether it has half-precision values
    described: the names of the values whose shapes the file tells
    """

    path: Path
    model: ir.Model
    file: SourceFile
    session: Session
    reference: Path | bytes
    is_half: bool
    described: frozenset[str]


def open_model(path: Path, context: Context) -> FloatModel:
    """Read a model and load it into ONNX Runtime, so that faults of the model show here.

    Raises ModelError for a file that is no ONNX model, and for a model whose layers are all quantized already, that has
    a newer opset than the target reads, cannot run, or has no inputs.
    """
    model, file = load_source(path)
    check_source(model, str(path))
    target = context.target
    if graphs.opset(model) > target.max_opset:
        raise ModelError(
            f"{path}: has opset {graphs.opset(model)}; {target.name} reads {target.max_opset} at most: export the "
            "model with a lower one"
        )
    opened = _load(path, model, file, context)
    if not opened.session.inputs:
        raise ModelError(f"{path}: the model has no inputs, so there is nothing to calibrate on")
    return opened


def _load(path: Path, model: ir.Model, file: SourceFile, context: Context) -> FloatModel:
    """Load the file; where ONNX Runtime has no bfloat16 arithmetic, load the float32 form in its place."""
    types = {v.dtype for v in graphs.walk_values(model)}
    described = frozenset(str(v.name) for v in graphs.walk_values(model) if v.shape is not None)
    try:
        session = Session(path, context.device, what=str(path), check=file.check, small=file.size > MESSAGE_LIMIT)
        return FloatModel(path, model, file, session, path, ir.DataType.FLOAT16 in types, described)
    except ModelError as refused:
        if ir.DataType.BFLOAT16 not in types:
            raise
        context.journal.notes.append(
            "ONNX Runtime cannot run this bfloat16 model here: compared with its float32 form instead"
        )
        reference = _in_float32(model, refused)
    session = Session(reference, context.device, what=str(path))
    return FloatModel(path, model, file, session, reference, True, described)


def _in_float32(model: ir.Model, refused: ModelError) -> bytes:
    """Return the float32 form of a model that was refused. Raises `refused` where there is none."""
    try:
        prepared = prepare_model(model, graphs.opset(model), graphs.opset(model), fold=False)
    except Exception:  # of a graph that is broken anyway
        raise refused from None
    return bytes(ir.to_proto(prepared.model).SerializeToString())
