"""Hold what a set of small runs writes: the SHA-256 of each file, and its structure.

    python tools/check/golden.py record golden.json       before a change that is not to change any output
    python tools/check/golden.py compare golden.json      after it
    python tools/check/golden.py structure tests/golden.json

It prints one line for each run: its digests, or whether they are still the same (exit code 1 where one is not).

Bytes may differ between processors, so a record of them is compared on the machine that made it. The structure (types
of operators, and the type and shape of every stored tensor) is the same on all: tests/golden.json keeps it, and
`structure` rewrites that file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx

import comq_onnx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import models  # noqa: E402  (the builders that the tests have)

SAMPLES = 48
# what differs from run to run
TIMED = ("seconds", "peak_rss_mb", "latency_ms", "runtime", "version", "output", "model", "command")


@dataclass(frozen=True)
class Case:
    """Describe one run.

    model: builds its model
    options: those of `quantize`
    samples: makes its samples; None for random ones
    """

    model: Callable[[], onnx.ModelProto]
    options: dict[str, Any] = field(default_factory=dict)
    samples: Callable[[], dict[str, np.ndarray]] | None = None

    @property
    def is_surveyed(self) -> bool:
        """Tell whether the bits of layers depend on measured noise, and so perhaps on the processor."""
        return not self.options.get("uniform") and self.options.get("bits") != 8


def _fashion(name: str) -> Callable[[], onnx.ModelProto]:
    """Make a function that loads a trained model of the repository."""
    return lambda: onnx.load(ROOT / "models" / f"{name}.onnx")


def _photos() -> dict[str, np.ndarray]:
    """Load stored calibration images."""
    with np.load(ROOT / "models" / "fashion_calib.npz") as stored:
        return {"image": stored["image"][: 2 * SAMPLES]}


def _convolutions() -> onnx.ModelProto:
    """Build a grouped and a dilated convolution, a transposed one and a grouped transposed one."""
    return models.build(
        """convolutions (float[batch, 8, 10, 10] x) => (float[batch, 6, 22, 22] y) {
            [grouped] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 2> (x, w1, b1)
            ar = Relu (a)
            [dilated] d = Conv <kernel_shape = [3, 3], pads = [2, 2, 2, 2], dilations = [2, 2]> (ar, w2)
            dr = Clip (d, low, high)
            [up] u = ConvTranspose <kernel_shape = [2, 2], strides = [2, 2]> (dr, w3, b3)
            ur = LeakyRelu (u)
            [grouped_up] y = ConvTranspose <kernel_shape = [3, 3], group = 2> (ur, w4)
        }""",
        {
            "w1": models.weight(12, 4, 3, 3, fan=36),
            "b1": models.normal(12, scale=0.1),
            "w2": models.weight(10, 12, 3, 3, fan=108),
            "w3": models.weight(10, 8, 2, 2, fan=40),
            "b3": models.normal(8, scale=0.1),
            "w4": models.weight(8, 3, 3, 3, fan=36),
            "low": np.float32(0),
            "high": np.float32(6),
        },
    )


def _branches() -> onnx.ModelProto:
    """Build an If whose branches have a layer each, and a Loop with a layer in its body."""
    return models.build(
        """branches (float[batch, 32] x) => (float[batch, 10] y) <int64 three = {3}, bool yes = {1}> {
            [first] h = MatMul (x, w1)
            s = ReduceSum <keepdims = 0> (h)
            big = Greater (s, limit)
            t = If (big) <
                then_branch = then () => (float[batch, 32] a) { [then_fc] a = MatMul (h, w2) },
                else_branch = other () => (float[batch, 32] b) { [else_fc] b = MatMul (h, w3) }
            >
            l = Loop (three, yes, t) <
                body = once (int64 i, bool go_in, float[batch, 32] v) => (bool go, float[batch, 32] v_out) {
                    go = Identity (go_in)
                    [inside] m = MatMul (v, w4)
                    v_out = Tanh (m)
                }
            >
            [last] y = MatMul (l, w5)
        }""",
        {
            **{f"w{i}": models.weight(32, 32, seed=i) for i in range(1, 5)},
            "w5": models.weight(32, 10),
            "limit": np.float32(-1e9),
        },
    )


def _half() -> onnx.ModelProto:
    """Build the perceptron of the tests in float16."""
    return models.build(
        """half (float16[batch, 32] x) => (float16[batch, 10] y) {
            [fc1] h = Gemm <transB = 1> (x, w1, b1)
            r = Relu (h)
            [fc2] y = MatMul (r, w2)
        }""",
        {
            "w1": models.weight(48, 32, fan=32, dtype=np.float16),
            "b1": models.normal(48, scale=0.1, dtype=np.float16),
            "w2": models.weight(48, 10, dtype=np.float16),
        },
    )


def _wide() -> onnx.ModelProto:
    return models.mlp(width=64)


CASES: dict[str, Case] = {
    "cnn": Case(_fashion("fashion_cnn"), {}, _photos),
    "cnn, 2 bits": Case(_fashion("fashion_cnn"), {"bits": 2, "uniform": True}, _photos),
    "cnn, 3 bits": Case(_fashion("fashion_cnn"), {"bits": 3, "uniform": True}, _photos),
    "cnn, a quarter of the size": Case(_fashion("fashion_cnn"), {"bits": "auto", "size": "25%"}, _photos),
    "cnn, 20 dB": Case(_fashion("fashion_cnn"), {"bits": "auto", "max_drop": "20dB"}, _photos),
    "cnn, 3.5 bits": Case(_fashion("fashion_cnn"), {"bits": 3.5}, _photos),
    "vit": Case(_fashion("fashion_vit"), {}, _photos),
    "vit, 8 bits": Case(_fashion("fashion_vit"), {"bits": 8}, _photos),
    "vit, blocks": Case(
        _fashion("fashion_vit"), {"activations": "none", "granularity": "32", "symmetric": False, "uniform": True},
        _photos,
    ),
    "convolutions": Case(_convolutions, {"bits": 4}),
    "convolutions, per tensor": Case(
        _convolutions, {"bits": 4, "granularity": "tensor", "activations": "8", "uniform": True}
    ),
    "branches": Case(_branches, {"bits": 4, "uniform": True}),
    "sentences": Case(models.encoder, {"bits": 4}, models.sentences),
    "sentences, 8 bits": Case(models.encoder, {"bits": 8}, models.sentences),
    "tokens": Case(models.tokens, {"bits": 5, "bits_for": (("head", 8),), "uniform": True}, models.sentences),
    "attention, wide activations": Case(models.attention, {"bits": 4, "activations": "16", "uniform": True}),
    "half precision": Case(_half, {"bits": 4}),
    **{
        f"{target}, {name}": Case(model, {"target": target, "bits": 4, "uniform": True})
        for target in ("ort-cuda", "tensorrt", "openvino")
        for name, model in (("cnn", models.cnn), ("encoder", models.encoder))
    },
    "paper": Case(_wide, {"solver": "paper", "order": "cyclic", "sweeps": 2, "uniform": True}),
    "gptq": Case(_wide, {"solver": "gptq", "exclude": ("fc2",), "uniform": True}),
    "rtn": Case(_wide, {"solver": "rtn"}),
    "effort fast": Case(_wide, {"effort": "fast", "bits": 3, "uniform": True}),
    "effort max": Case(_wide, {"effort": "max", "bits": 2, "uniform": True}),
    "independent": Case(_wide, {"independent": True, "include": ("fc",), "seed": 3}),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Hold what a run gave: the digest of the file, that of the report without times, and the file's structure."""

    sha256: str
    report: str
    structure: dict[str, Any]


def run(case: Case) -> Result:
    """Quantize a case's model and describe what was written."""
    model = case.model()
    samples = case.samples() if case.samples is not None else models.samples_for(model, SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.onnx"
        report = comq_onnx.quantize(model, out, samples, device="cpu", max_samples=SAMPLES, **case.options)
        return Result(hashlib.sha256(out.read_bytes()).hexdigest(), _digest(report), structure(onnx.load(out)))


def structure(model: onnx.ModelProto) -> dict[str, Any]:
    """Describe what no processor changes: opset, operators and how many of each, types and shapes of constants."""
    nodes: Counter[str] = Counter()
    graphs = [model.graph]
    while graphs:
        for node in graphs.pop().node:
            nodes[node.op_type] += 1
            graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    constants = Counter(
        f"{onnx.TensorProto.DataType.Name(t.data_type)}[{','.join(map(str, t.dims))}]" for t in model.graph.initializer
    )
    return {
        "opset": max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        "nodes": dict(sorted(nodes.items())),
        "constants": dict(sorted(constants.items())),
    }


def _digest(report: comq_onnx.Report) -> str:
    """Return the digest of a report without what differs from run to run."""
    values = {k: v for k, v in report.to_dict().items() if k not in TIMED}
    for layer in values["layers"]:
        del layer["seconds"]
    values["warnings"] = [w for w in values["warnings"] if "slower" not in w]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


@click.group(help=__doc__, context_settings={"max_content_width": 120})
def main() -> None:
    """Choose what to do."""


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
def record(path: Path) -> None:
    """Write the digests of all cases to a file."""
    found = {}
    for name, case in CASES.items():
        result = run(case)
        found[name] = {"sha256": result.sha256, "report": result.report}
        click.echo(f"{result.sha256[:12]} {result.report[:12]} {name}")
    path.write_text(json.dumps(found, indent=1) + "\n")


@main.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--only", metavar="TEXT", default="", help="Only the cases with this in their name.")
def compare(path: Path, only: str) -> None:
    """Run all cases and say which give other bytes, or another report, than those in a file."""
    before = json.loads(path.read_text())
    differing = 0
    for name, case in CASES.items():
        if only not in name:
            continue
        result = run(case)
        changed = [k for k in ("sha256", "report") if getattr(result, k) != before[name][k]]
        differing += bool(changed)
        click.echo(f"{'DIFFERS in ' + ' and '.join(changed) if changed else 'same':<28} {name}")
    sys.exit(1 if differing else 0)


@main.command("structure")
@click.argument("path", type=click.Path(path_type=Path))
def write_structure(path: Path) -> None:
    """Write the structure of what the cases without a survey give to a file."""
    found = {name: run(case).structure for name, case in CASES.items() if not case.is_surveyed}
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
