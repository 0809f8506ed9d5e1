"""Two models on the same samples: how near the outputs are, how fast each runs, and what the runtime made of them."""

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

from comq_onnx.errors import ModelError
from comq_onnx.metrics import ComparisonSums, OutputComparison
from comq_onnx.model.files import private_directory
from comq_onnx.model.source import as_path, load_source
from comq_onnx.options.samples import SampleOptions
from comq_onnx.runtime import device as devices
from comq_onnx.runtime.session import Session
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


@dataclass(frozen=True)
class Comparison:
    """Two models on the same samples: how near each output is, bytes of both, median milliseconds of both for one
    sample on one thread, and the kernels that ONNX Runtime runs the second with (see `Kernels`)."""

    outputs: list[OutputComparison]
    size: dict[str, int]
    latency_ms: dict[str, float]
    kernels: dict[str, int]
    float_kernels: dict[str, int]
    samples: int


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
    seconds: float = 2.0,
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


def compare_outputs(
    before: Session,
    after: Session,
    samples: Samples,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[OutputComparison]:
    """Run both models on `samples` and compare every floating-point output they share; progress: called with the
    samples done and all of them."""
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


def latency(sessions: Sequence[Session], samples: Samples, seconds: float = 2.0, most: int = 200) -> list[float]:
    """Median milliseconds for one sample (or one fixed batch), each model in turn, for about `seconds` in all."""
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
    """The layers whose constants a product of an optimized graph reads, by the names that `qdq` gives those."""
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
    """The graph as ONNX Runtime executes it: nodes by op type, the float products left behind a dequantization, and the
    op type of the product that reads each layer's constants, by the layer's name (see `qdq` for their names)."""

    counts: dict[str, int]
    float_behind_dequantize: int
    of_layer: dict[str, str]

    @property
    def integer(self) -> dict[str, int]:
        """The integer kernels among them."""
        return {op: n for op, n in sorted(self.counts.items()) if op in INTEGER_KERNELS}

    @property
    def floating(self) -> dict[str, int]:
        """All others, those that only convert between integers and floats included."""
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
