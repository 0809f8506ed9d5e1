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
import numpy.typing as npt
import onnx

from comq_onnx import device as devices
from comq_onnx.errors import ModelError
from comq_onnx.graph import as_path, load, private_directory
from comq_onnx.runtime import Session
from comq_onnx.samples import Recipe, Samples, load_samples

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


@dataclass(frozen=True)
class OutputComparison:
    """One output of two models: SQNR in dB, cosine similarity, top-1 agreement (None where it holds no class
    scores)."""

    name: str
    sqnr_db: float
    cosine: float
    top1_agreement: float | None


class _Sums:
    """Running sums over an output of both models."""

    def __init__(self) -> None:
        self.signal = self.noise = self.dot = self.energy = 0.0
        self.agree = self.rows = 0
        self.scores: bool | None = None

    def add(self, before: npt.NDArray[Any], after: npt.NDArray[Any]) -> None:
        a, b = before.astype(np.float64).ravel(), after.astype(np.float64).ravel()
        finite = np.isfinite(a) & np.isfinite(b)
        # where both say the same infinity they agree; anything else that is not finite is all noise
        if not finite.all():
            same = (a == b) & ~finite
            self.noise += float(np.count_nonzero(~finite & ~same)) * float(
                (a[finite] ** 2).mean() if finite.any() else 1
            )
            a, b = a[finite], b[finite]
        self.signal += float(a @ a)
        self.noise += float((a - b) @ (a - b))
        self.dot += float(a @ b)
        self.energy += float(b @ b)
        if self.scores is None:
            self.scores = looks_like_scores(before)
        if self.scores:
            first, second = before.argmax(-1), after.argmax(-1)
            self.agree += int((first == second).sum())
            self.rows += first.size

    def result(self, name: str) -> OutputComparison:
        ratio = max(self.signal, 1e-300) / self.noise if self.noise else 1e20
        sqnr = 10 * float(np.log10(ratio)) if ratio > 0 else -np.inf
        length = float(np.sqrt(self.signal * self.energy))
        cosine = self.dot / length if length > 0 else float(self.noise == 0)
        return OutputComparison(name, sqnr, cosine, self.agree / self.rows if self.rows else None)


def looks_like_scores(output: npt.NDArray[Any]) -> bool:
    """Whether the last axis holds class scores: probabilities, logits [n, classes], or logits over a vocabulary."""
    if output.ndim < 2 or output.shape[-1] < 2 or output.dtype.kind != "f" or not output.size:
        return False
    rows = output.reshape(-1, output.shape[-1]).astype(np.float64)
    if (rows >= 0).all() and np.allclose(rows.sum(axis=1), 1, atol=1e-2):
        return True
    if output.ndim != 2:
        return output.ndim == 3 and output.shape[-1] >= 1000
    # vectors of length 1 are embeddings
    return not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-2)


def scores_among(outputs: Mapping[str, Any]) -> str | None:
    """The first output that looks like class scores."""
    return next((name for name, x in outputs.items() if isinstance(x, np.ndarray) and looks_like_scores(x)), None)


def doubtful(name: str, output: Any) -> str | None:
    """Why class scores [samples, classes] of the float model make one doubt its input; None where they do not.

    Photographs through EfficientNet-Lite0 and SqueezeNet give scores of 0.2 to 0.35 of the most entropy there can be;
    pixels of the wrong scale, layout or offset 0.5 to 1, or one class for all. Fewer than 8 samples or 10 classes say
    nothing.
    """
    if not isinstance(output, np.ndarray) or output.ndim != 2 or not looks_like_scores(output):
        return None
    rows, classes = output.shape
    if rows < 8 or classes < 10 or not np.isfinite(output).all():
        return None
    given = output.astype(np.float64)
    scores = softmax(given)
    named = scores is given or any(word in name.lower() for word in ("logit", "prob", "score", "class", "softmax"))
    entropy = float(-(scores * np.log(scores + 1e-300)).sum(axis=-1).mean() / np.log(classes))
    top = float(scores.max(axis=-1).mean())
    look = "look at them with --inspect-samples, and see that they are preprocessed as the model was trained"
    # features of a backbone are flat too
    if entropy > 0.45 and (named or entropy < 0.9):
        return (
            f"the float model is undecided about these samples: its best class of {classes} in {name!r} gets "
            f"{top:.1%} on average; {look}"
        )
    if named and len(set(scores.argmax(axis=-1).tolist())) == 1:
        return f"the float model gives all of the first {rows} samples the same of {classes} classes ({name!r}); {look}"
    return None


def softmax(scores: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Probabilities along the last axis; scores that are probabilities already stay as they are."""
    if (scores >= 0).all() and np.allclose(scores.sum(-1), 1, atol=1e-2):
        return scores
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


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
        sizes = [load(path)[1].size for path in paths]
        first, second = (Session(path, device, what=str(path)) for path in paths)
        missing = [name for name in first.output_names if name not in second.output_names]
        if missing:
            raise ModelError(
                f"{paths[1]}: lacks output {missing[0]!r} of {paths[0]} (it has {', '.join(second.output_names)}); "
                "compare a model with its quantized form"
            )
        data = load_samples(samples, first.inputs, Recipe(preprocess=preprocess), count, seed)
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
    sums: dict[str, _Sums] = {}
    names = [name for name in before.output_names if name in after.output_names]
    for feeds, count in zip(samples.batches(batch_size), samples.batch_counts(batch_size), strict=True):
        done += count
        progress(done, len(samples))
        first, second = before.run(feeds, names), after.run(feeds, names)
        for name in names:
            if isinstance(first[name], np.ndarray) and first[name].dtype.kind == "f":
                if first[name].shape != second[name].shape:
                    sums.setdefault(name, _Sums()).noise = np.inf
                    continue
                sums.setdefault(name, _Sums()).add(first[name], second[name])
    return [s.result(name) for name, s in sums.items()]


def sqnr_of(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The lowest SQNR in dB over the floating-point outputs of one run of two models; -inf where shapes differ."""
    worst = 200.0
    for name, a in first.items():
        b = second.get(name)
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.shape != b.shape:
            worst = worst if type(a) is type(b) and not isinstance(a, np.ndarray) else -np.inf
        elif a.dtype.kind == "f":
            sums = _Sums()
            sums.scores = False
            sums.add(a, b)
            worst = min(worst, sums.result(name).sqnr_db)
        elif not np.array_equal(a, b):
            worst = -np.inf
    return worst


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
