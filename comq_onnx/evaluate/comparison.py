"""Compare any two models on the same samples, quantized by whatever tool."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from comq_onnx.errors import ModelError
from comq_onnx.evaluate.kernels import executed_kernels
from comq_onnx.evaluate.language import Language, language_of
from comq_onnx.evaluate.outputs import compare_sessions
from comq_onnx.evaluate.speed import TIMED_SECONDS, latency
from comq_onnx.metrics import LanguageComparison, OutputComparison, OutputMatch
from comq_onnx.model.files import private_directory
from comq_onnx.model.judged import judged
from comq_onnx.model.source import as_path, load_source, read_model
from comq_onnx.options.samples import SampleOptions
from comq_onnx.runtime import device as devices
from comq_onnx.runtime.session import Session
from comq_onnx.samples.language_inputs import token_inputs
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.next_token import predicts_next
from comq_onnx.samples.samples import Clues, Samples


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
    language: how near the distributions over a vocabulary are; None for what is no language model
    """

    outputs: list[OutputComparison]
    matches: list[OutputMatch]
    size: dict[str, int]
    latency_ms: dict[str, float]
    kernels: dict[str, int]
    float_kernels: dict[str, int]
    samples: int
    language: LanguageComparison | None = None


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
        language = _language(first, data)
        compared, _ = compare_sessions(first, second, data, batch_size, selected=selected, language=language)
        return Comparison(
            outputs=compared.outputs, matches=compared.matches,
            size={"before": sizes[0], "after": sizes[1]}, latency_ms={"before": times[0], "after": times[1]},
            kernels=kernels.integer, float_kernels=kernels.floating, samples=len(data), language=compared.language,
        )  # fmt: skip


def _language(session: Session, data: Samples) -> Language | None:
    """Find the logits over a vocabulary that a model gives for a sample; None where there are none."""
    if not token_inputs(session.inputs):
        return None
    feeds = next(data.batches(1))
    return language_of(session.inputs, feeds, session.run(feeds), predicts_next(session.inputs, Clues(run=session.run)))


def _check_outputs(first: Session, second: Session, paths: Sequence[Path]) -> None:
    """Raise ModelError where the second model lacks an output of the first."""
    missing = [name for name in first.output_names if name not in second.output_names]
    if missing:
        raise ModelError(
            f"{paths[1]}: lacks output {missing[0]!r} of {paths[0]} (it has {', '.join(second.output_names)}); "
            "compare a model with its quantized form"
        )
