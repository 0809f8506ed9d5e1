"""Run two models on the same samples: compare outputs and times, and count the kernels that the runtime executes."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from comq_onnx.context import Context
from comq_onnx.errors import ModelError, RuntimeFailure
from comq_onnx.metrics import ComparisonSums, OutputComparison, OutputMatch, add_matches, match_rows, match_values
from comq_onnx.model.files import private_directory
from comq_onnx.model.float_model import FloatModel
from comq_onnx.model.judged import Judged, judged, without_caches
from comq_onnx.model.judged_session import JudgedSession
from comq_onnx.model.layers import Prepared
from comq_onnx.model.source import as_path, load_source, read_model
from comq_onnx.options.samples import SampleOptions
from comq_onnx.runtime import device as devices
from comq_onnx.runtime.session import Session, has_device, time_in_turn
from comq_onnx.samples.dataset import Dataset
from comq_onnx.samples.decoding import decoding_feeds
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Samples
from comq_onnx.solve.grid import MAX_BITS

# op types of matrix products and convolutions in integers, in graphs that ONNX Runtime has optimized
INTEGER_PRODUCTS = frozenset(
    {
        "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "MatMulNBits", "ConvInteger",
    }
)  # fmt: skip
# those in floats
FLOAT_PRODUCTS = frozenset({"Conv", "FusedConv", "MatMul", "Gemm", "FusedMatMul", "FusedGemm"})
# all op types that run in integers
INTEGER_KERNELS = INTEGER_PRODUCTS | frozenset(
    {
        "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool",
        "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax",
    }
)  # fmt: skip
# models are timed for about so long, in turn
TIMED_SECONDS = 1.0
# what messages call the quantized model
QUANTIZED = "the quantized model"
# an output with a lower SQNR is hardly of use; few bits may cost that much, but never without a warning
LEAST_DB = 5.0
# more samples than these rarely help
ENOUGH_SAMPLES = 128
# what ONNX Runtime's optimizations may change of an output's SQNR before it is said, and an SQNR above which
# differences are those of float32 sums
SAME_DB, MOST_DB = 1.0, 60.0
# a model that takes so many times as long as its source gets a warning
SLOWER = 1.05


@dataclass(frozen=True)
class Comparison:
    """Hold the comparison of two models on the same samples.

    outputs: how near each output of the second model is to that of the first
    matches: the outputs of whole numbers, and those whose rows depend on the data
    size: the bytes of both files, before and after
    latency_ms: the median milliseconds of both for one sample on one thread, before and after
    kernels, float_kernels: the integer operators of the second and all others, by type, as ONNX Runtime runs it (see
        `Kernels`)
    samples: how many samples were compared
    """

    outputs: list[OutputComparison]
    matches: list[OutputMatch]
    size: dict[str, int]
    latency_ms: dict[str, float]
    kernels: dict[str, int]
    float_kernels: dict[str, int]
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """Hold the comparison of a quantized model with its source on the samples held back.

    outputs: how near each output is, and each value that it is judged by
    matches: the outputs of whole numbers, and those whose rows depend on the data
    latency_ms: the median milliseconds of both, before and after; empty where ONNX Runtime lacks the target's device
    decoding_ms: likewise for one token behind a cache that is full of a sample; empty for what is no decoder with one
    kernels: the operators that run on the target's device; None where ONNX Runtime lacks that device
    """

    outputs: list[OutputComparison]
    matches: list[OutputMatch]
    latency_ms: dict[str, float]
    kernels: Kernels | None
    decoding_ms: dict[str, float] = field(default_factory=dict)


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
    """Run two models on the same samples, and tell how near the second is to the first.

    before, after, samples, preprocess: as `quantize` takes them
    count: the most samples
    batch_size: how many samples run at once
    seed: the seed for choosing samples
    device: as `quantize` takes it, or tensorrt
    seconds: for about how long both models are timed

    Raises ComqError: see comq_onnx.errors.
    """
    device = devices.choose(device, ("tensorrt",)).device
    with private_directory() as work:
        paths = [as_path(model, work) for model in (before, after)]
        sizes = [load_source(path)[1].size for path in paths]
        first, second = (Session(path, device, what=str(path)) for path in paths)
        _check_outputs(first, second, paths)
        found = load_samples(samples, first.inputs, SampleOptions(preprocess=preprocess), count, seed)
        data = found.take(np.arange(min(count, len(found))))
        selected = judged(read_model(paths[0])).selected
        times = latency([Session(path, device, threads=1) for path in paths], data, seconds)
        kernels = executed_kernels(paths[1], device)
        return Comparison(
            outputs=compare_outputs(first, second, data, batch_size, selected=selected),
            matches=match_outputs(first, second, data, batch_size, selected),
            size={"before": sizes[0], "after": sizes[1]}, latency_ms={"before": times[0], "after": times[1]},
            kernels=kernels.integer, float_kernels=kernels.floating, samples=len(data),
        )  # fmt: skip


def _check_outputs(first: Session, second: Session, paths: Sequence[Path]) -> None:
    """Raise ModelError where the second model lacks an output of the first."""
    missing = [name for name in first.output_names if name not in second.output_names]
    if missing:
        raise ModelError(
            f"{paths[1]}: lacks output {missing[0]!r} of {paths[0]} (it has {', '.join(second.output_names)}); "
            "compare a model with its quantized form"
        )


def evaluate(source: FloatModel, prepared: Prepared, path: Path, data: Dataset, context: Context) -> Evaluation:
    """Compare the quantized model at `path` with its source on the samples held back.

    Warns where an output is mostly noise, where it depends on ONNX Runtime's optimizations, or where the model is
    slower than its source. Closes the source's session.

    prepared: the model that was quantized
    """
    journal = context.journal
    session = quantized_session(path, context)
    outputs = compare_outputs(
        source.session, session, data.held_back, context.options.batch_size,
        lambda done, total: context.progress("compare", done, total), prepared.judged.selected,
    )  # fmt: skip
    _compare_levels(outputs, source, path, data, context, prepared.judged.selected)
    outputs += compare_parts(prepared, read_model(path), data, context)
    matches = match_outputs(
        source.session, session, data.held_back, context.options.batch_size, prepared.judged.selected
    )
    step = _step_of_decoding(source, next(data.held_back.batches(1)), context) if data.is_of_decoder else None
    source.session.close()
    source.file.check()
    _warn_of_noise(outputs, data, context)
    device = context.target.device
    if device is None or not has_device(device):
        journal.notes.append(
            f"compared by ONNX Runtime, not on {context.target.name}: docs/deploy.md tells how to see kernels and "
            "speed there"
        )
        return Evaluation(outputs, matches, {}, None)
    sessions = [Session(x, device, threads=1) for x in (source.reference, path)]
    spent = [latency(sessions, data.held_back), *([time_in_turn(sessions, step, TIMED_SECONDS)] if step else [])]
    times = [dict(zip(("before", "after"), x, strict=True)) for x in spent]
    _warn_of_speed(times[-1], context)
    return Evaluation(outputs, matches, times[0], executed_kernels(path, device), times[1] if step else {})


def _step_of_decoding(source: FloatModel, feeds: Mapping[str, Any], context: Context) -> dict[str, Any] | None:
    """Return the feeds of the token behind a sample; None where the float model does not go on with its own cache."""
    step = decoding_feeds(source.session.inputs, feeds, source.session.run(feeds))
    try:
        return step if step is None or source.session.run(step) else None
    except RuntimeFailure as error:
        context.journal.notes.append(f"the speed of one token is not measured: the float model fails there: {error}")
        return None


def _warn_of_speed(times: Mapping[str, float], context: Context) -> None:
    """Warn where the quantized model is slower than its source; times: the milliseconds of both."""
    if times["after"] > SLOWER * times["before"]:
        other = "auto" if context.options.activations == "none" else "none"
        context.journal.warnings.append(
            f"the quantized model is slower than its source ({times['after']:.3g} against {times['before']:.3g} ms): "
            f"try --activations {other}, or --exclude the layers of least weight"
        )


def _warn_of_noise(outputs: Sequence[OutputComparison], data: Dataset, context: Context) -> None:
    """Warn where an output is mostly noise."""
    lost = [f"{o.name} {o.sqnr_db:.1f} dB" for o in without_caches(outputs) if not o.sqnr_db >= LEAST_DB]
    if lost:
        context.journal.warnings.append(
            f"the quantized model's outputs are far from its source's (SQNR {', '.join(lost)}): "
            + remedies(context.options.bits, len(data.calibration) + len(data.held_back), context.options.activations)
        )


def remedies(bits: int | float | str, samples: int, activations: str) -> str:
    """Say what may bring outputs nearer to the source's: options that were not given yet, in words.

    bits: as asked for, or the fewest of any layer; samples: how many were given; activations: as asked for
    """
    found = []
    if bits == "auto":
        found.append("a larger --size or a smaller --max-drop")
    elif not isinstance(bits, str) and bits < MAX_BITS:
        found.append(f"--bits {min(2 * math.ceil(bits), MAX_BITS)}")
    if samples < ENOUGH_SAMPLES:
        found.append(f"{ENOUGH_SAMPLES} samples or more")
    if activations != "none":
        found.append("--activations none")
    return f"try {' or '.join(found)}" if found else "try --exclude for the layers that lose most"


def quantized_session(model: Path | bytes | str, context: Context) -> Session:
    """Load a quantized model to compute what its target would, as far as ONNX Runtime can."""
    # only ONNX Runtime on a CPU rounds the activations of weight-only products
    return Session(
        model, context.device, what=QUANTIZED, float_matmul_nbits=context.device != context.target.device,
        disable_qdq_fusion=context.target.runs_outside_ort,
    )  # fmt: skip


def compare_parts(prepared: Prepared, quantized: ir.Model, data: Dataset, context: Context) -> list[OutputComparison]:
    """Compare, on the samples held back, the values that stand for outputs which do not stand for themselves."""
    found = prepared.judged
    own = set(found.whole)
    label = {value: f"{output}: {value}" for output, values in found.values.items() for value in values}
    parts = Judged({o: values for o, values in found.values.items() if o not in own}, found.selected)
    if not parts.values:
        return []
    before = JudgedSession.of(prepared.model, parts, lambda x: Session(x, context.device, what="the prepared model"))
    after = JudgedSession.of(quantized, parts, lambda x: quantized_session(x, context))
    sums: dict[str, ComparisonSums] = {}
    for feeds in data.held_back.batches(context.options.batch_size):
        first, second = before.run(feeds), after.run(feeds)
        for name in parts.names:
            if isinstance(first[name], np.ndarray) and first[name].shape == second[name].shape:
                sums.setdefault(name, ComparisonSums(scores=False)).add(first[name], second[name])
    return [s.result(label[name]) for name, s in sums.items()]


def match_outputs(
    before: Session, after: Session, samples: Samples, batch_size: int, selected: Collection[str]
) -> list[OutputMatch]:
    """Run both models on `samples` and match the outputs of whole numbers, and those whose rows depend on the data.

    selected: the outputs whose rows depend on the data
    """
    names = [name for name in before.output_names if name in selected or name in before.whole_numbers]
    found: dict[str, OutputMatch] = {}
    for feeds in samples.batches(batch_size) if names else ():
        first, second = before.run(feeds, names), after.run(feeds, names)
        for name in names:
            match = match_rows if name in selected else match_values
            one = match(first[name], second[name], name)
            found[name] = add_matches(found[name], one) if name in found else one
    return list(found.values())


def _compare_levels(
    outputs: Sequence[OutputComparison],
    source: FloatModel,
    path: Path,
    data: Dataset,
    context: Context,
    selected: Collection[str],
) -> None:
    """Say where a model gives other outputs as it is written than at ONNX Runtime's default optimization level.

    outputs: how near they are as the target computes them. Optimizations that fuse integers may change what a model
    computes; rounding the inputs of weight-only products to 8 bits is what ONNX Runtime's CPU does by default.
    """

    def compared(fused: bool = True, exact: bool = False) -> list[OutputComparison]:
        session = Session(path, context.device, what=QUANTIZED, float_matmul_nbits=exact, disable_qdq_fusion=not fused)
        return compare_outputs(source.session, session, data.held_back, context.options.batch_size, selected=selected)

    if context.target.runs_outside_ort:
        try:
            written, default = list(outputs), compared()
        except (ModelError, RuntimeFailure) as error:
            context.journal.warnings.append(
                f"ONNX Runtime's default optimizations fail on the quantized model: {error}"
            )
            return
    else:
        written, default = compared(fused=False), list(outputs)
    apart = _apart(written, default)
    if not apart:
        return
    if _apart(written, compared(exact=True)):
        context.journal.warnings.append(
            f"ONNX Runtime's optimizations change what the quantized model computes (SQNR {apart}): judge it on its "
            "own runtime, or set session.disable_quant_qdq=1"
        )
    else:
        context.journal.notes.append(
            f"ONNX Runtime's CPU rounds the inputs of weight-only products to 8 bits: {apart}; the session option "
            "session.qdq_matmulnbits_accuracy_level=1 keeps them float"
        )


def _apart(written: Sequence[OutputComparison], default: Sequence[OutputComparison]) -> str:
    """Name the outputs whose SQNR is another as written than by default, with both figures; "" where there are none."""
    pairs = list(zip(without_caches(written), without_caches(default), strict=True))
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
    selected: Collection[str] = (),
) -> list[OutputComparison]:
    """Run both models on `samples` and compare every floating-point output that they have in common.

    progress: called with the number of samples that are done, and of all
    selected: outputs whose rows depend on the data, which are left out
    """
    done = 0
    sums: dict[str, ComparisonSums] = {}
    names = [name for name in before.output_names if name in after.output_names and name not in selected]
    for feeds, count in zip(samples.batches(batch_size), samples.batch_counts(batch_size), strict=True):
        if not names:
            break
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
    """Return the median milliseconds of each model for one sample (or one batch of fixed size).

    seconds: for about how long; None for TIMED_SECONDS
    most: how often each model runs at most
    """
    return time_in_turn(sessions, next(samples.batches(1)), TIMED_SECONDS if seconds is None else seconds, most)


# the index of the weight's scale among the inputs of an integer product
_SCALE_INPUT = {"QLinearConv": 4, "QGemm": 4, "QLinearMatMul": 4, "MatMulIntegerToFloat": 3, "MatMulNBits": 2}


def _layers_of(node: onnx.NodeProto) -> list[str]:
    """Return the layers whose constants a product of an optimized graph reads, by the names that write/ gives them."""
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

    counts: the number of nodes by op type
    float_behind_dequantize: how many float products still read a dequantized value
    of_layer: the op type of the product that reads a layer's constants, by the name of the layer
    """

    counts: dict[str, int]
    float_behind_dequantize: int
    of_layer: dict[str, str]

    @property
    def integer(self) -> dict[str, int]:
        """Return the number of integer kernels by op type."""
        return {op: n for op, n in sorted(self.counts.items()) if op in INTEGER_KERNELS}

    @property
    def floating(self) -> dict[str, int]:
        """Return the number of all other nodes by op type, with those that only convert between integers and floats."""
        return {op: n for op, n in sorted(self.counts.items()) if op not in INTEGER_KERNELS}


def executed_kernels(path: Path, device: str = "cpu", level: int | None = None) -> Kernels:
    """Let ONNX Runtime optimize the model at `path`, and count the nodes of the result, with those in subgraphs.

    level: of the optimization, as `Session` takes it
    """
    with private_directory() as work:
        optimized = work / "optimized.onnx"
        Session(path, device, threads=1, level=level, optimized=optimized)
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
