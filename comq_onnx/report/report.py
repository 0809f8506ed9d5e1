"""What a quantization did: one value with everything; as JSON, a table for the terminal, and one HTML page.

advice     what stands out, and what to do about it
terminal   tables for a terminal
plots      SVG by matplotlib
page       the HTML page, from page.html
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comq_onnx.bits.tradeoff import FrontierPoint
from comq_onnx.evaluate import FLOAT_PRODUCTS
from comq_onnx.metrics import OutputComparison
from comq_onnx.model.files import write_text
from comq_onnx.report.inputs import InputReport

if TYPE_CHECKING:
    import onnx
    from rich.console import RenderableType


@dataclass(frozen=True)
class LayerReport:
    """One layer: its grid, and ||X^ Wq - X W||^2 / ||X W||^2 in dB for the solution and for plain rounding.

    form: how the weight is written (see qdq); stage: which cut it was solved at; input: the activation it reads;
    bytes_before, bytes_after: what its weight takes in the source and in the result; kernel: the operator that ONNX
    Runtime runs it with, where that could be told; output_noise_db: the noise over the energy of the model's output
    that its quantization alone brings, by the survey; slower: weight-only because integers would take longer. What only
    a run finds out is None in a plan.
    """

    name: str
    op: str
    weight_shape: tuple[int, ...]
    bits: int
    granularity: str
    form: str
    stage: int
    error_db: float | None = None
    rtn_error_db: float | None = None
    seconds: float | None = None
    input: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None
    kernel: str | None = None
    output_noise_db: float | None = None
    slower: bool = False

    @property
    def gain_db(self) -> float | None:
        """By how much the solution's error is below that of plain rounding."""
        if self.error_db is None or self.rtn_error_db is None:
            return None
        return self.rtn_error_db - self.error_db

    @property
    def runs_in_float(self) -> bool:
        """Whether ONNX Runtime multiplies in float: by what it runs, or by the form where that is not known."""
        if self.kernel is not None:
            return self.kernel in FLOAT_PRODUCTS | {"ConvTranspose"}
        return self.form == "folded"


@dataclass(frozen=True)
class ActivationReport:
    """One quantized activation: the span seen, the span of the central 99.9% of its values (up to a quarter too wide),
    and its grid."""

    name: str
    low: float
    high: float
    typical_low: float
    typical_high: float
    scale: float
    zero_point: int
    dtype: str

    @property
    def outlier_ratio(self) -> float:
        """How many times as wide the whole span is as that of the central 99.9%; 1 where nothing stands out."""
        typical = max(self.typical_high, 0.0) - min(self.typical_low, 0.0)
        whole = max(self.high, 0.0) - min(self.low, 0.0)
        if not whole > 0:
            return 1.0
        return whole / typical if typical > 0 else math.inf


@dataclass(frozen=True)
class Report:
    """All that a run found out; `save_json` and `save_html` write it, `rich` shows it, a notebook renders it.

    command: the command line that does the same again. kernels, float_kernels: operators by type in the graph as ONNX
    Runtime runs it.
    """

    model: str
    output: str | None
    version: str
    target: str
    bits: int | float | str
    layers: list[LayerReport]
    skipped: dict[str, str]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, str] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_mb: float = 0.0
    size: dict[str, int] = field(default_factory=dict)
    outputs: list[OutputComparison] = field(default_factory=list)
    latency_ms: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    float_kernels: dict[str, int] = field(default_factory=dict)
    activations: list[ActivationReport] = field(default_factory=list)
    inputs: list[InputReport] = field(default_factory=list)
    frontier: list[FrontierPoint] = field(default_factory=list)
    command: str = ""
    in_memory: bytes | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, without pictures and the model itself."""
        values = dataclasses.asdict(dataclasses.replace(self, in_memory=None))
        del values["in_memory"]
        for given in values["inputs"]:
            del given["pictures"]
        return values

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def save_json(self, path: str | Path) -> None:
        """Write `to_json` to a file."""
        write_text(Path(path), self.to_json() + "\n")

    def to_html(self) -> str:
        """The report as one HTML page that needs nothing else: no scripts, no network."""
        from comq_onnx.report.page import render

        return render(self)

    def save_html(self, path: str | Path) -> None:
        """Write `to_html` to a file."""
        write_text(Path(path), self.to_html())

    def rich(self, verbose: bool = False) -> RenderableType:
        """The report for a terminal: what it cost and won, then the layers (all of them if `verbose`)."""
        from comq_onnx.report.terminal import render

        return render(self, verbose)

    def onnx_model(self) -> onnx.ModelProto:
        """The quantized model. Raises ValueError for a plan, which has none."""
        import onnx

        if self.in_memory is not None:
            return onnx.load_from_string(self.in_memory)
        if self.output is None:
            raise ValueError("a plan has no model; quantize() makes one")
        return onnx.load(self.output)

    def graph(self) -> Any:
        """The quantized model as an onnx-graphsurgeon Graph. Raises ValueError for a plan, which has none."""
        from comq_onnx.model.source import to_graphsurgeon

        return to_graphsurgeon(self.onnx_model())

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that its style and a notebook's do not meet."""
        from comq_onnx.report.page import frame

        return frame(self.to_html())
