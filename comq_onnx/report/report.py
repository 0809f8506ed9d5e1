"""Hold everything that a run found out, in one value that can be saved as JSON or HTML, and shown in a terminal."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comq_onnx.bits.tradeoff import FrontierPoint
from comq_onnx.evaluate.kernels import FLOAT_PRODUCTS
from comq_onnx.metrics import LanguageComparison, OutputComparison, OutputMatch
from comq_onnx.model.files import write_text
from comq_onnx.report.changes import ChangedAnswer, WeightHistogram
from comq_onnx.report.inputs import InputReport

if TYPE_CHECKING:
    import onnx
    from rich.console import RenderableType


@dataclass(frozen=True)
class LayerReport:
    """Describe one layer: its grid, its errors, its bytes. What only a run finds out is None in a plan.

    op: the type of its operator
    bits: of a weight
    granularity: what shares a scale
    form: how the weight is written
    stage: the cut that it was solved at
    error_db, rtn_error_db: ||X^ Wq - X W||^2 / ||X W||^2 in dB, for the solution and for plain rounding
    seconds: that solving took
    input: the activation that it reads
    bytes_before, bytes_after: that its weight takes in the source and in the result
    kernel: the operator that ONNX Runtime runs it with; None where that cannot be told
    output_noise_db: the noise that its quantization alone brings to the outputs of the model, over their energy, in dB,
        as the survey measured it
    slower: it is weight-only because integers would take longer
    before: the nearest layers whose outputs come to it through no other layer
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
    before: tuple[str, ...] = ()

    @property
    def gain_db(self) -> float | None:
        """Return by how many dB the error of the solution is below that of plain rounding."""
        if self.error_db is None or self.rtn_error_db is None:
            return None
        return self.rtn_error_db - self.error_db

    @property
    def runs_in_float(self) -> bool:
        """Tell whether ONNX Runtime multiplies in float: by its kernel, or by the form where no kernel is known."""
        if self.kernel is not None:
            return self.kernel in FLOAT_PRODUCTS | {"ConvTranspose"}
        return self.form == "folded"


@dataclass(frozen=True)
class ActivationReport:
    """Describe one quantized activation: the ranges of its values, and its grid.

    low, high: the least and the greatest value seen
    typical_low, typical_high: the range of the central 99.9% of the values, up to a quarter too wide
    scale, zero_point, dtype: the grid
    """

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
        """Return the width of the whole range over that of the central 99.9%; 1 where nothing stands out."""
        typical = max(self.typical_high, 0.0) - min(self.typical_low, 0.0)
        whole = max(self.high, 0.0) - min(self.low, 0.0)
        if not whole > 0:
            return 1.0
        return whole / typical if typical > 0 else math.inf


@dataclass(frozen=True)
class Report:
    """Hold everything that a run found out. `save_json` and `save_html` write it, `rich` shows it, notebooks render it.

    model, output: paths of the source and of the result; output is None for a plan and for a result in memory
    version: of this package
    target: the name of what will run the model
    bits: as asked for
    layers: what is quantized, in graph order
    skipped: why others are left as they are, by name
    notes, warnings: what else was found or decided, and what may be wrong
    options: all of them, by field of Options
    runtime: versions, the device and the opset
    samples: their source, and how many are used and held back
    seconds: that each part of the run took, and all of it (`total`)
    peak_rss_mb: the most memory that the process took, in MB; NaN where the system does not tell
    size: bytes of the model before and after
    outputs: how each output compares with that of the source, on samples held back; and each part that it is judged by
    language: how near the distributions over a vocabulary are, with the perplexity; None for what is no language model
    matches: how many rows or whole numbers of an output are those of the source, where noise tells nothing
    latency_ms: of one sample in one thread, before and after
    decoding_ms: of one token behind a cache that holds a sample, likewise; empty for what is no decoder with a cache
    kernels, float_kernels: how many operators of each type ONNX Runtime runs in integers, and how many in float
    activations: the quantized ones, in graph order
    inputs: the samples, described
    frontier: what other budgets would give, as predicted
    histograms: the weights of the layers that lose most, by size
    answers: samples whose best class became another, where they are pictures
    command: the command line that does the same again
    in_memory: the result, where it was not written to a file
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
    language: LanguageComparison | None = None
    matches: list[OutputMatch] = field(default_factory=list)
    latency_ms: dict[str, float] = field(default_factory=dict)
    decoding_ms: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    float_kernels: dict[str, int] = field(default_factory=dict)
    activations: list[ActivationReport] = field(default_factory=list)
    inputs: list[InputReport] = field(default_factory=list)
    frontier: list[FrontierPoint] = field(default_factory=list)
    histograms: list[WeightHistogram] = field(default_factory=list)
    answers: list[ChangedAnswer] = field(default_factory=list)
    command: str = ""
    in_memory: bytes | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, without pictures and the model itself."""
        values = dataclasses.asdict(dataclasses.replace(self, in_memory=None))
        del values["in_memory"]
        for given in values["inputs"]:
            del given["pictures"]
        for answer in values["answers"]:
            del answer["picture"]
        return values

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def save_json(self, path: str | Path) -> None:
        """Write the report as JSON. Raises OptionError where the file cannot be written."""
        write_text(Path(path), self.to_json() + "\n")

    def to_html(self) -> str:
        """Render the report as one HTML page that needs nothing else: no scripts, no network."""
        from comq_onnx.report.page import render

        return render(self)

    def save_html(self, path: str | Path) -> None:
        """Write the report as an HTML page. Raises OptionError where the file cannot be written."""
        write_text(Path(path), self.to_html())

    def rich(self, verbose: bool = False) -> RenderableType:
        """Lay the report out for a terminal; `verbose` shows all layers instead of the worst."""
        from comq_onnx.report.terminal import render

        return render(self, verbose)

    def onnx_model(self) -> onnx.ModelProto:
        """Load the quantized model. Raises ValueError for a plan, which has none."""
        import onnx

        if self.in_memory is not None:
            return onnx.load_from_string(self.in_memory)
        if self.output is None:
            raise ValueError("a plan has no model; quantize() makes one")
        return onnx.load(self.output)

    def graph(self) -> Any:
        """Load the quantized model as an onnx-graphsurgeon Graph. Raises ValueError for a plan, which has none."""
        from comq_onnx.model.source import to_graphsurgeon

        return to_graphsurgeon(self.onnx_model())

    def _repr_html_(self) -> str:
        """Render the page in a frame, so that its style and that of a notebook do not meet."""
        from comq_onnx.report.page import frame

        return frame(self.to_html())
