"""Run two models on the same samples: how near the outputs are, how fast each runs, what the runtime made of them."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from comq_onnx.context import Context
from comq_onnx.errors import ModelError, RuntimeFailure
from comq_onnx.metrics import ComparisonSums, OutputComparison
from comq_onnx.model.files import private_directory
from comq_onnx.model.float_model import FloatModel
from comq_onnx.model.source import as_path, load_source
from comq_onnx.options.samples import SampleOptions
from comq_onnx.runtime import device as devices
from comq_onnx.runtime.session import Session, has_device
from comq_onnx.samples.dataset import Dataset
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Samples

INTEGER_PRODUCTS = frozenset(
    {
        "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "MatMulNBits", "ConvInteger",
    }
)  # fmt: skip
FLOAT_PRODUCTS = frozenset({"Conv", "FusedConv", "MatMul", "Gemm", "FusedMatMul"})
INTEGER_KERNELS = INTEGER_PRODUCTS | frozenset(
    {
        "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool",
        "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax",
    }
)  # fmt: skip


# what is timed for about so long, both models in turn
TIMED_SECONDS = 2.0
# below this an output is more noise than a user would put up with; it may be what few bits cost, but never silently
LEAST_DB = 5.0
# what ONNX Runtime's optimizations may change of an output's SQNR before it is said, and an SQNR above which
# differences are those of float32 sums
SAME_DB, MOST_DB = 1.0, 60.0
# a model that takes so many times its source's time is warned about
SLOWER = 1.05


@dataclass(frozen=True)
class Comparison:
    """Hold how two models compare on the same samples.

    outputs: how near each output is; size: bytes of both files
    latency_ms: median milliseconds of both for one sample on one thread
    kernels, float_kernels: operators by type in the graph of the second as ONNX Runtime runs it (see `Kernels`)
    """

    outputs: list[OutputComparison]
    size: dict[str, int]
    latency_ms: dict[str, float]
    kernels: dict[str, int]
    float_kernels: dict[str, int]
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """Hold how a quantized model compares with its source on the samples held back.

    latency_ms, kernels: of the target's own device; None where ONNX Runtime has no such device here
    """

    outputs: list[OutputComparison]
    latency_ms: dict[str, float]
    kernels: Kernels | None


def compare(
    before: str | os.PathLike[str] | onnx.ModelProto | Any,
    after: str | os.PathLike[str] | onnx.ModelProto | Any,
    samples: str | os.PathLike[str] | Mapping[str, Any] | Samples | None = None,
    *,
    preprocess: str | None = None,
    count: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
    seconds: float = TIMED_SECONDS,
) -> Comparison:
    """Run two models on the same samples, at most `count`, and say how near the second is to the first.

    Models, samples and preprocess are given as to `quantize`; device: as there, or tensorrt; seconds: how long to time
    both. Raises ComqError.
    """
    device = devices.choose(device, ("tensorrt",)).device
    with private_directory() as work:
        paths = [as_path(model, work) for model in (before, after)]
        sizes = [load_source(path)[1].size for path in paths]
        first, second = (Session(path, device, what=str(path)) for path in paths)
        missing = [name for name in first.output_names if name not in second.output_names]
        if missing:
            raise ModelError(
                f"{paths[1]}: lacks output {missing[0]!r} of {paths[0]} (it has {', '.join(second.output_names)}); "
                "compare a model with its quantized form"
            )
        data = load_samples(samples, first.inputs, SampleOptions(preprocess=preprocess), count, seed)
        data = data.take(np.arange(min(count, len(data))))
        times = latency([Session(path, device, threads=1) for path in paths], data, seconds)
        kernels = executed_kernels(paths[1], device)
        return Comparison(
            outputs=compare_outputs(first, second, data, batch_size),
            size={"before": sizes[0], "after": sizes[1]},
            latency_ms={"before": times[0], "after": times[1]},
            kernels=kernels.integer,
            float_kernels=kernels.floating,
            samples=len(data),
        )


def evaluate(source: FloatModel, path: Path, data: Dataset, context: Context) -> Evaluation:
    """Compare the quantized model at `path` with its source on the samples held back.

    Warns where an output is mostly noise, where it depends on ONNX Runtime's optimizations, and where the model is
    slower than its source. Releases the source's session.
    """
    journal = context.journal
    outputs = compare_outputs(
        source.session, quantized_session(path, context), data.held_back, context.options.batch_size,
        lambda done, total: context.progress("compare", done, total),
    )  # fmt: skip
    _compare_levels(outputs, source, path, data, context)
    source.session.close()
    source.file.check()
    lost = [f"{o.name} {o.sqnr_db:.1f} dB" for o in outputs if not o.sqnr_db >= LEAST_DB]
    if lost:
        journal.warnings.append(
            f"the quantized model's outputs are far from its source's (SQNR {', '.join(lost)}): give more --bits, "
            "more samples, or --exclude the layers of most error"
        )
    device = context.target.device
    if device is None or not has_device(device):
        journal.notes.append(
            f"compared by ONNX Runtime, not on {context.target.name}: docs/deploy.md tells how to see kernels and "
            "speed there"
        )
        return Evaluation(outputs, {}, None)
    before, after = latency([Session(x, device, threads=1) for x in (source.reference, path)], data.held_back)
    if after > SLOWER * before:
        journal.warnings.append(
            f"the quantized model is slower than its source ({after:.2f} against {before:.2f} ms): "
            "try --activations none, or --exclude the layers of least weight"
        )
    return Evaluation(outputs, {"before": before, "after": after}, executed_kernels(path, device))


def quantized_session(model: Path | bytes | str, context: Context) -> Session:
    """Load a quantized model as its target would compute it, as far as ONNX Runtime can."""
    # ONNX Runtime's CPU alone rounds the activations of weight-only products
    return Session(
        model, context.device, what="the quantized model", float_matmul_nbits=context.device != context.target.device,
        disable_qdq_fusion=context.target.runs_outside_ort,
    )  # fmt: skip


def _compare_levels(
    outputs: Sequence[OutputComparison], source: FloatModel, path: Path, data: Dataset, context: Context
) -> None:
    """Say where a model gives other outputs as it is written than at ONNX Runtime's default optimization level.

    outputs: how near they are as the target computes them. Optimizations that fuse integers may change what a model
    computes; rounding the inputs of weight-only products to 8 bits is what ONNX Runtime's CPU does by default.
    """

    def compared(literal: bool = False, exact: bool = False) -> list[OutputComparison]:
        session = Session(
            path, context.device, what="the quantized model", float_matmul_nbits=exact, disable_qdq_fusion=literal
        )
        return compare_outputs(source.session, session, data.held_back, context.options.batch_size)

    written, default = outputs, outputs
    if context.target.runs_outside_ort:
        try:
            default = compared()
        except (ModelError, RuntimeFailure) as error:
            context.journal.warnings.append(
                f"ONNX Runtime's default optimizations fail on the quantized model: {error}"
            )
            return
    else:
        written = compared(literal=True)
    apart = _apart(written, default)
    if not apart:
        return
    if not _apart(written, compared(exact=True)):
        context.journal.notes.append(
            f"ONNX Runtime's CPU rounds the inputs of weight-only products to 8 bits: {apart}; the session option "
            "session.qdq_matmulnbits_accuracy_level=1 keeps them float"
        )
        return
    context.journal.warnings.append(
        f"ONNX Runtime's optimizations change what the quantized model computes (SQNR {apart}): judge it on its own "
        "runtime, or set session.disable_quant_qdq=1"
    )


def _apart(written: Sequence[OutputComparison], default: Sequence[OutputComparison]) -> str:
    """Name the outputs whose SQNR is another as written than by default, with both figures; "" where there are none."""
    pairs = list(zip(written, default, strict=True))
    return ", ".join(
        f"{one.name} {one.sqnr_db:.1f} dB as written, {other.sqnr_db:.1f} dB by default"
        for one, other in pairs
        # outputs that are noise in both differ by chance
        if max(one.sqnr_db, other.sqnr_db) >= LEAST_DB
        and not abs(min(one.sqnr_db, MOST_DB) - min(other.sqnr_db, MOST_DB)) <= SAME_DB
    )


def compare_outputs(
    before: Session,
    after: Session,
    samples: Samples,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[OutputComparison]:
    """Run both models on `samples` and compare every floating-point output that they share.

    progress: called with the samples done and all of them.
    """
    done = 0
    sums: dict[str, ComparisonSums] = {}
    names = [name for name in before.output_names if name in after.output_names]
    for feeds, count in zip(samples.batches(batch_size), samples.batch_counts(batch_size), strict=True):
        done += count
        progress(done, len(samples))
        first, second = before.run(feeds, names), after.run(feeds, names)
        for name in names:
            if isinstance(first[name], np.ndarray) and first[name].dtype.kind == "f":
                if first[name].shape != second[name].shape:
                    sums.setdefault(name, ComparisonSums()).noise = np.inf
                    continue
                sums.setdefault(name, ComparisonSums()).add(first[name], second[name])
    return [s.result(name) for name, s in sums.items()]


def latency(
    sessions: Sequence[Session], samples: Samples, seconds: float | None = None, most: int = 200
) -> list[float]:
    """Return the median milliseconds of each model for one sample (or one fixed batch).

    The models run in turn, at most `most` times each; seconds: for about how long, None for TIMED_SECONDS.
    """
    seconds = TIMED_SECONDS if seconds is None else seconds
    feeds = next(samples.batches(1))
    for session in sessions:
        session.run(feeds)
    times: list[list[float]] = [[] for _ in sessions]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < most):
        for session, spent in zip(sessions, times, strict=True):
            spent.append(session.milliseconds(feeds))
    return [float(np.median(t)) for t in times]


# where the scale of the weight stands among the inputs of an integer product
_SCALE_INPUT = {"QLinearConv": 4, "QGemm": 4, "QLinearMatMul": 4, "MatMulIntegerToFloat": 3, "MatMulNBits": 2}


def _layers_of(node: onnx.NodeProto) -> list[str]:
    """Return the layers whose constants a product of an optimized graph reads, by the names that write/ gives those."""
    if node.op_type in _SCALE_INPUT:
        names, ends = node.input[_SCALE_INPUT[node.op_type] :][:1], ("scale", "scale_T")
    elif node.op_type in FLOAT_PRODUCTS | {"ConvTranspose"}:
        names, ends = node.input, ("weight", "bias")
    else:
        return []
    parts = [name.rpartition(".") for name in names]
    return [layer for layer, _, end in parts if end in ends]


@dataclass(frozen=True)
class Kernels:
    """Describe the graph that ONNX Runtime executes.

    counts: nodes by op type
    float_behind_dequantize: the float products left behind a dequantization
    of_layer: the op type of the product that reads each layer's constants, by the layer's name
    """

    counts: dict[str, int]
    float_behind_dequantize: int
    of_layer: dict[str, str]

    @property
    def integer(self) -> dict[str, int]:
        """Return the integer kernels among them."""
        return {op: n for op, n in sorted(self.counts.items()) if op in INTEGER_KERNELS}

    @property
    def floating(self) -> dict[str, int]:
        """Return all others, those that only convert between integers and floats included."""
        return {op: n for op, n in sorted(self.counts.items()) if op not in INTEGER_KERNELS}


def executed_kernels(path: Path, device: str = "cpu") -> Kernels:
    """Let ONNX Runtime optimize the model at `path` and count what came out, subgraphs included."""
    with private_directory() as work:
        optimized = work / "optimized.onnx"
        Session(path, device, threads=1, optimized=optimized)
        graph = onnx.load(optimized, load_external_data=False).graph
    counts: Counter[str] = Counter()
    of_layer: dict[str, str] = {}
    left = 0
    pending = [graph]
    while pending:
        current = pending.pop()
        dequantized = {name for n in current.node if n.op_type == "DequantizeLinear" for name in n.output}
        for node in current.node:
            counts[node.op_type] += 1
            if node.op_type in FLOAT_PRODUCTS and dequantized & set(node.input):
                left += 1
            of_layer.update(dict.fromkeys(_layers_of(node), node.op_type))
            pending += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return Kernels(dict(counts), left, of_layer)
