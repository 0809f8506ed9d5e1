"""Render a report as one HTML page that needs nothing else: no scripts, no network, light or dark like its reader."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from comq_onnx.evaluate.kernels import FLOAT_PRODUCTS
from comq_onnx.model.judged import without_caches
from comq_onnx.report import network, plots
from comq_onnx.report.advice import advise
from comq_onnx.report.terminal import describe_language
from comq_onnx.targets.catalog import TARGETS

if TYPE_CHECKING:
    from comq_onnx.report.report import LayerReport, Report

FRAME_HEIGHT = 900
# a plot of more marks than these is drawn once, and a narrow page scrolls it
MOST_TWICE = 250
# activations and skipped nodes beyond these are counted, not listed
MOST_ROWS = 400
# the network of more layers is not drawn
MOST_DRAWN = 600

# by the form of a layer, why it does not run in integers
WHY = {
    "blocked": "weight-only: its activations stay float, the kernel unpacks the weight as it multiplies",
    "looked up": "an embedding: only the rows that are looked up are unpacked",
}


def render(report: Report) -> str:
    """Render a report as a page."""
    template = environment().get_template("page.html")
    return template.render(
        report=report,
        title=re.split(r"[\\/]", report.model)[-1],
        tiles=_tiles(report),
        advice=advise(report),
        language=None if report.language is None else describe_language(report.language),
        figures=_figures(report),
        histograms=[
            {"title": one.name, "drawn": Markup(plots.weights(f"weights-{i}", one))}
            for i, one in enumerate(report.histograms)
        ],
        why=lambda layer: _why(layer, report),
        float_operators=_float_operators(report),
        in_float=[x for x in report.layers if x.form != "integer" or x.runs_in_float],
        outliers=sorted(report.activations, key=lambda a: -a.outlier_ratio)[:MOST_ROWS],
        skipped=list(report.skipped.items())[:MOST_ROWS],
        most=MOST_ROWS,
    )


def frame(page: str) -> str:
    """Put a page in a frame inside another one, apart from its style; for notebooks."""
    style = f"width:100%;height:{FRAME_HEIGHT}px;border:0"
    return f'<iframe srcdoc="{html.escape(page)}" style="{style}"></iframe>'


def environment() -> Environment:
    """Make the environment of the pages, with their filters."""
    loader = PackageLoader("comq_onnx.report", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["kb"] = lambda size: "" if size is None else f"{size / 1e3:,.1f}"
    environment.filters["db"] = lambda value: "" if value is None else f"{value:.1f}"
    environment.filters["figure"] = _write_number
    return environment


def _write_number(value: float | None) -> str:
    """Write a number as people do: whole numbers with commas, others with four digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Say what the run cost and won: (what, the figure, the text below it) for each tile."""
    tiles = [*_size_tiles(report), *_output_tiles(report)]
    if not tiles:
        bits = sorted({layer.bits for layer in report.layers})
        tiles.append(("planned", f"{len(report.layers)} layers", f"at {' and '.join(map(str, bits))} bits"))
    return tiles


def _size_tiles(report: Report) -> list[tuple[str, str, str]]:
    tiles = []
    if report.size:
        before, after = report.size["before"], report.size["after"]
        share = f"{after / before:.0%} of {before / 1e6:,.2f} MB"
        tiles.append(("size", f"{after / 1e6:,.2f} MB", share))
    if report.latency_ms:
        slow, fast = report.latency_ms["before"], report.latency_ms["after"]
        tiles.append(("speed", f"{slow / fast:.2f}x", f"{slow:,.2f} ms to {fast:,.2f} ms, one sample, one thread"))
    if report.decoding_ms:
        slow, fast = report.decoding_ms["before"], report.decoding_ms["after"]
        tiles.append(("decoding", f"{slow / fast:.2f}x", f"{slow:,.2f} ms to {fast:,.2f} ms a token, one thread"))
    return tiles


def _output_tiles(report: Report) -> list[tuple[str, str, str]]:
    if not report.outputs:
        return []
    outputs = without_caches(report.outputs)
    worst = min(outputs, key=lambda o: o.sqnr_db)
    which = f"of {worst.name}" + (f", the worst of {len(outputs)}" if len(outputs) > 1 else "")
    tiles = [("SQNR", f"{worst.sqnr_db:.1f} dB", f"{which}; cosine {worst.cosine:.4f}")]
    if report.language is not None and report.language.rise is not None:
        before, after = (report.language.perplexity[model] for model in ("before", "after"))
        below = f"{before:.4g} to {after:.4g}; KL {report.language.divergence:.3g}"
        tiles.append(("perplexity", f"{report.language.rise:.3f}x", below))
    agreements = [(o.top1_agreement, o.name) for o in outputs if o.top1_agreement is not None]
    if agreements:
        agreement, name = min(agreements)
        tiles.append(("agreement", f"{agreement:.1%}", f"same top-1 class in {name}"))
    return tiles


@dataclass(frozen=True)
class Drawing:
    """Describe a plot of the page.

    draw: makes its SVG from an id, `data` and a size
    """

    id: str
    title: str
    text: str
    draw: Callable[..., str]
    data: Sequence[Any]

    def drawn(self) -> dict[str, Any]:
        """Draw the plot for a wide and for a narrow page, as page.html wants it."""
        few = len(self.data) <= MOST_TWICE
        # safe as markup: it is made here, and matplotlib and ElementTree escape the names in it
        wide = Markup(self.draw(f"{self.id}-wide", self.data, plots.WIDE))
        narrow = Markup(self.draw(f"{self.id}-narrow", self.data, plots.NARROW)) if few else None
        return {"id": self.id, "title": self.title, "text": self.text, "wide": wide, "narrow": narrow}


def _figures(report: Report) -> list[dict[str, Any]]:
    """Draw the plots for which the report has data."""
    layers = report.layers
    figures = [
        (any(layer.error_db is not None for layer in layers), Drawing(
            "errors", "Error of each layer",
            "The squared error of a layer's output relative to that output: lower is better. Grey is plain rounding on "
            "the same grid, blue what was written.", plots.errors, layers,
        )),
        (any(layer.bytes_after is not None for layer in layers), Drawing(
            "sizes", "Bytes of each layer", "What the weight takes in the source (grey) and in the result (blue).",
            plots.sizes, layers,
        )),
        (True, Drawing("bits", "Bits of each layer", "Bits of a weight.", plots.bits, layers)),
        (len(report.frontier) > 1, Drawing(
            "frontier", "Size against accuracy",
            "What other budgets would give, as predicted before anything was solved: the order is reliable, and the "
            "accuracy mostly better.", plots.frontier, report.frontier,
        )),
        (0 < len(layers) <= MOST_DRAWN, Drawing(
            "network", "The network",
            "The layers from left to right as they follow one another, line by line; what lies between them is left "
            "out. A layer's shape tells how it is written, its colour the error of its output.", network.draw, layers,
        )),
        (bool(report.activations), Drawing(
            "ranges", "Ranges of activations",
            "The span of each quantized activation over the samples (grey), and that of the central 99.9% of its "
            "values (blue). Where grey goes far beyond blue, a few outliers take the codes from all others.",
            plots.ranges, report.activations,
        )),
    ]  # fmt: skip
    return [figure.drawn() for known, figure in figures if known]


def _why(layer: LayerReport, report: Report) -> str:
    """Say why a layer does not run in integers; nothing where it does."""
    if layer.form == "integer":
        return (
            f"written for an integer kernel, but ONNX Runtime runs it as {layer.kernel}: see --exclude"
            if layer.runs_in_float
            else ""
        )
    if layer.slower:
        return "weight-only: quantizing what is around it would take longer than integer products win"
    if layer.form in WHY:
        return WHY[layer.form]
    if report.options.get("activations") == "none":
        return "activations stay float (--activations none); its weight is unpacked once, at load"
    return f"no integer kernel for this {layer.op} on {report.target}; its weight is unpacked once, at load"


def _float_operators(report: Report) -> list[tuple[str, str]]:
    """Count the operators that are no integer kernels: (counts by type, why they are not) for each reason."""
    target = TARGETS[report.target]
    by_reason: dict[str, list[str]] = {}
    for op, count in report.float_kernels.items():
        if op in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            reason = "converts between integers and floats"
        elif op in FLOAT_PRODUCTS | {"ConvTranspose"}:
            reason = "a product whose weight is float or not constant: a layer named here, or one of two activations"
        elif op in target.any_scale | target.same_scale:
            reason = "could run in integers, but what it reads or who reads it is float"
        else:
            reason = f"no integer kernel on {report.target}"
        by_reason.setdefault(reason, []).append(f"{count} {op}")
    return [(", ".join(ops), reason) for reason, ops in by_reason.items()]
