"""Run the nodes of one stage, as a model of their own, on the tensors of a cut."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from comq_onnx import arrays
from comq_onnx.calibrate.cut_tensors import Host
from comq_onnx.calibrate.stages import Stage
from comq_onnx.model.files import private_directory, to_bytes_or_file
from comq_onnx.model.states import follow
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.runtime.session import Session
from comq_onnx.write.emit import emit


class Segments:
    """Run segments, and keep the last ones loaded for other samples: what is loaded depends on what is asked for."""

    def __init__(self, device: str, work: Path | None, threads: int = 0) -> None:
        """Begin with nothing loaded.

        device: where segments run
        work: a directory for models that are too large for one protobuf message; None for one of their own
        threads: of the CPU for one operator; 0 for as many as ONNX Runtime chooses
        """
        self._device, self._work, self._threads = device, work, threads
        self._loaded: dict[object, Session] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Go elsewhere with nothing loaded."""
        return type(self), (self._device, self._work, self._threads)

    def close(self) -> None:
        """Release what is loaded."""
        self._loaded.clear()

    def run(
        self, plan: Plan, stage: Stage, given: Mapping[str, Sequence[Any]], count: int, wanted: Sequence[str],
        solved: Solved | None, store: Host,
    ) -> Iterator[Mapping[str, Any]]:  # fmt: skip
        """Yield the values `wanted` that a stage makes, batch by batch.

        given: the cut tensors that the stage reads, one array for each of `count` batches
        wanted: the names of the values
        solved: what is quantized in the segment; None for the float segment
        store: keeps the tensors
        """
        examples = {name: given[name][0] for name in stage.reads}
        with self._lock:
            session = self._session(plan, stage, examples, tuple(wanted), solved)
        feeds = store.ahead(count, lambda i: {name: store.fetch(given[name][i]) for name in stage.reads})
        for batch in feeds:
            yield store.run(session, batch, wanted)

    def _session(
        self, plan: Plan, stage: Stage, examples: Mapping[str, Any], wanted: tuple[str, ...], solved: Solved | None
    ) -> Session:
        """Load a segment, unless it is; solutions and grids of a walk become more, and never others."""
        types = tuple(str(arrays.dtype(one)) if arrays.is_array(one) else "" for one in examples.values())
        found = None if solved is None else (len(solved.solutions), len(solved.activation_grids))
        key = (stage.index, len(stage.nodes), wanted, types, found)
        session = self._loaded.get(key)
        if session is None:
            segment = extract_segment(plan.walked.model, stage, examples, wanted)
            if solved is not None:
                emit(segment, solved)
                follow(segment)
            session = self._load(segment, f"stage{stage.index}", f"stage {stage.index} of the model", plan)
            # a float and a quantized one
            for old in list(self._loaded)[:-1]:
                del self._loaded[old]
            self._loaded[key] = session
        return session

    def _load(self, segment: ir.Model, name: str, what: str, plan: Plan) -> Session:
        """Load a segment; name: that of its file, where it needs one."""
        with contextlib.ExitStack() as stack:
            work = self._work or stack.enter_context(private_directory())
            return Session(
                to_bytes_or_file(segment, work, name), self._device, threads=self._threads, what=what,
                float_matmul_nbits=True, disable_qdq_fusion=plan.target.runs_outside_ort,
            )  # fmt: skip


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
