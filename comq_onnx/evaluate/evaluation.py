"""Compare a quantized model with its source: outputs, loss, times and kernels, and what stands out among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comq_onnx.context import Context
from comq_onnx.errors import RuntimeFailure
from comq_onnx.evaluate import speed
from comq_onnx.evaluate.kernels import Kernels, executed_kernels
from comq_onnx.evaluate.language import language_of_data
from comq_onnx.evaluate.levels import LEAST_DB, other_level, warn_of_levels
from comq_onnx.evaluate.outputs import QUANTIZED, Compared, compare_parts, compare_sessions, quantized_session
from comq_onnx.metrics import LanguageComparison, OutputComparison, OutputMatch
from comq_onnx.model.float_model import FloatModel
from comq_onnx.model.judged import without_caches
from comq_onnx.model.layers import Prepared
from comq_onnx.model.source import read_model
from comq_onnx.runtime.session import Session, has_device, time_in_turn
from comq_onnx.samples.dataset import Dataset
from comq_onnx.samples.decoding import decoding_feeds
from comq_onnx.solve.grid import MAX_BITS

# more samples than these rarely help
ENOUGH_SAMPLES = 128
# a model that takes so many times as long as its source gets a warning
SLOWER = 1.05


@dataclass(frozen=True)
class Evaluation:
    """Hold the comparison of a quantized model with its source on the samples held back.

    outputs: how near each output is, and each value that it is judged by
    matches: the outputs of whole numbers, and those whose rows depend on the data
    latency_ms: the median milliseconds of both, before and after; empty where ONNX Runtime lacks the target's device
    decoding_ms: likewise for one token behind a cache that is full of a sample; empty for what is no decoder with one
    kernels: the operators that run on the target's device; None where ONNX Runtime lacks that device
    language: how near the distributions over a vocabulary are; None for what is no language model
    """

    outputs: list[OutputComparison]
    matches: list[OutputMatch]
    latency_ms: dict[str, float]
    kernels: Kernels | None
    decoding_ms: dict[str, float] = field(default_factory=dict)
    language: LanguageComparison | None = None


def evaluate(source: FloatModel, prepared: Prepared, path: Path, data: Dataset, context: Context) -> Evaluation:
    """Compare the quantized model at `path` with its source on the samples held back.

    Warns where an output is mostly noise, where it depends on ONNX Runtime's optimizations, or where the model is
    slower than its source. Closes the source's session.

    prepared: the model that was quantized
    """
    journal = context.journal
    compared = _compare(source, prepared, path, data, context)
    outputs = compared.outputs + compare_parts(prepared, read_model(path), data, context)
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
        return Evaluation(outputs, compared.matches, {}, None, language=compared.language)
    sessions = [Session(x, device, threads=1) for x in (source.reference, path)]
    spent = [
        speed.latency(sessions, data.held_back),
        *([time_in_turn(sessions, step, speed.TIMED_SECONDS)] if step else []),
    ]
    times = [dict(zip(("before", "after"), x, strict=True)) for x in spent]
    _warn_of_speed(times[-1], context)
    return Evaluation(
        outputs, compared.matches, times[0], executed_kernels(path, device), times[1] if step else {}, compared.language
    )


def _compare(source: FloatModel, prepared: Prepared, path: Path, data: Dataset, context: Context) -> Compared:
    """Compare the quantized model with its source, as its target computes it, and say where that is not the default."""
    size, selected = context.options.batch_size, prepared.judged.selected
    language = language_of_data(source.session.inputs, data)
    other = other_level(path, context)
    compared, beside = compare_sessions(
        source.session, quantized_session(path, context), data.held_back, size,
        lambda done, total: context.progress("compare", done, total), selected, language,
        other if isinstance(other, Session) else None,
    )  # fmt: skip

    def exactly() -> Compared:
        session = Session(path, context.device, what=QUANTIZED, float_matmul_nbits=True)
        return compare_sessions(source.session, session, data.held_back, size, selected=selected, language=language)[0]

    found = beside if isinstance(other, Session) else other
    assert found is not None
    warn_of_levels(compared, found, exactly, context)
    return compared


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
