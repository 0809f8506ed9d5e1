"""Make up reports in a moment, and read what is shown of them."""

from __future__ import annotations

import dataclasses
import io
from html.parser import HTMLParser
from typing import Any

import numpy as np
from rich.console import Console

from comq_onnx.bits.tradeoff import FrontierPoint
from comq_onnx.metrics import OutputComparison
from comq_onnx.report.changes import ChangedAnswer, WeightHistogram
from comq_onnx.report.inputs import describe, picture
from comq_onnx.report.report import ActivationReport, LayerReport, Report

# elements of HTML that have no end tag
VOID = {"meta", "img", "br", "hr", "link", "input"}


def layer(i: int, **changes: Any) -> LayerReport:
    """Make layer i of a made-up net, 6 dB better than rounding."""
    made = LayerReport(
        name=f"/features/block{i}/conv", op="Conv", weight_shape=(64, 32, 3, 3), bits=4, granularity="channel",
        form="integer", stage=i, error_db=-25.0 + i % 5, rtn_error_db=-19.0 + i % 5, seconds=0.1, input=f"x{i}",
        bytes_before=73728, bytes_after=9472, kernel="QLinearConv",
        before=(f"/features/block{i - 1}/conv",) if i else (),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def activation(i: int, **changes: Any) -> ActivationReport:
    """Make activation i of a made-up net, without outliers."""
    made = ActivationReport(f"x{i}", -1.0, 3.0 + i % 3, -0.9, 2.5 + i % 3, 0.0157, 64, "uint8")
    return dataclasses.replace(made, **changes)


def histogram(name: str) -> WeightHistogram:
    """Make the weights of a layer before and after, these on every fourth step."""
    before = [round(900 * np.exp(-(((i - 20) / 8) ** 2))) for i in range(40)]
    after = [sum(before[i : i + 4]) if i % 4 == 0 else 0 for i in range(40)]
    return WeightHistogram(name, tuple(i / 20 - 1.0 for i in range(41)), tuple(before), tuple(after))


def report(count: int = 12, **changes: Any) -> Report:
    """Make the report of a run on a made-up net of `count` layers."""
    images = np.random.default_rng(0).random((20, 3, 40, 40), np.float32)
    made = Report(
        model="models/net.onnx", output="net_q.onnx", version="0.1.0", target="ort-cpu", bits=4,
        layers=[layer(i) for i in range(count)],
        skipped={"/gate/MatMul": "MatMul: its weight is computed at run time"},
        options={"bits": 4, "activations": "auto"},
        runtime={"onnxruntime": "1.31.1", "device": "cpu", "opset": "21"},
        samples={"source": "photos", "used": 200, "held_back": 56},
        seconds={"load": 1.0, "calibrate": 10.0, "total": 11.0}, peak_rss_mb=500.0,
        size={"before": 4_000_000, "after": 600_000},
        outputs=[OutputComparison("logits", 24.3, 0.998, 0.97)], latency_ms={"before": 10.0, "after": 5.0},
        kernels={"QLinearConv": count}, float_kernels={"Softmax": 1, "Add": 2, "QuantizeLinear": 1},
        activations=[activation(i) for i in range(count)], inputs=describe({"image": images}),
        frontier=[FrontierPoint(100_000 * i, 1.0 + i, 10.0 + 5 * i, 0.9, i == 3) for i in range(1, 8)],
        histograms=[histogram(f"/features/block{i}/conv") for i in range(4)],
        answers=[ChangedAnswer("logits", 7 * i, i, i + 1, picture(images[i])) for i in range(3)],
        command="comq-onnx models/net.onnx --calib photos -o net_q.onnx",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def plan(count: int = 12) -> Report:
    """Make the report of a plan of the same net."""
    bare = {"error_db": None, "rtn_error_db": None, "seconds": None, "bytes_after": None, "kernel": None}
    return report(
        count, output=None, layers=[layer(i, **bare) for i in range(count)], size={}, outputs=[], latency_ms={},
        kernels={}, float_kernels={}, activations=[], peak_rss_mb=float("nan"), histograms=[], answers=[],
    )  # fmt: skip


class Page(HTMLParser):
    """Parse a page into its text, its elements and their attributes; fail where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def printed(shown: Report, verbose: bool = False) -> str:
    """Return what a terminal of 140 columns would show."""
    out = io.StringIO()
    Console(file=out, width=140).print(shown.rich(verbose))
    return out.getvalue()
