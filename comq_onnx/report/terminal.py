"""Lay a report out as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from comq_onnx.bits.tradeoff import FrontierPoint
from comq_onnx.metrics import LanguageComparison, OutputComparison, OutputMatch
from comq_onnx.model.judged import without_caches
from comq_onnx.report.advice import advise

if TYPE_CHECKING:
    from comq_onnx.report.report import LayerReport, Report


def render(report: Report, verbose: bool = False) -> RenderableType:
    """Lay out the layers (all of them if `verbose`), what they cost and won, remarks, and what to do about them."""
    ranked = bool(report.options.get("sensitivity"))
    parts: list[RenderableType] = [_layer_table(report.layers, verbose, ranked)]
    if report.skipped:
        parts.append(_skipped_table(report.skipped, verbose))
    if report.frontier and report.output is None:
        parts.append(_frontier_table(report.frontier))
    if report.outputs:
        parts.append(_output_table(report.outputs))
    if report.language is not None:
        parts.append(Text(describe_language(report.language)))
    if report.matches:
        parts.append(_match_table(report.matches))
    if report.size:
        parts.append(Text(_gains_text(report)))
    parts += [Text(f"note: {note}") for note in report.notes]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    parts += [Text(f"hint: {hint.found}: try {hint.remedy}", style="cyan") for hint in advise(report)]
    return Group(*parts)


def _layer_table(layers: list[LayerReport], verbose: bool, ranked: bool) -> Table:
    """Lay the layers out; ranked: all of them, those first that cost the outputs most."""
    solved = any(layer.error_db is not None for layer in layers)
    table = Table(title=f"{len(layers)} layers", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold", max_width=46)
    table.add_column("op")
    table.add_column("weight", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("scale per")
    table.add_column("runs")
    if solved:
        table.add_column("error dB", justify="right")
        table.add_column("rounding dB", justify="right")
    else:
        table.add_column("stage", justify="right")
    surveyed = not solved and any(layer.output_noise_db is not None for layer in layers)
    if surveyed:
        table.add_column("output dB", justify="right")
    if ranked:
        layers, verbose = sorted(layers, key=lambda layer: -(layer.output_noise_db or 0.0)), True
    for layer in _layers_shown(layers, verbose, solved):
        if layer is None:
            table.add_row("...")
            continue
        last = [_db(layer.error_db), _db(layer.rtn_error_db)] if solved else [str(layer.stage)]
        last += [_db(layer.output_noise_db)] if surveyed else []
        shape = "x".join(str(d) for d in layer.weight_shape)
        table.add_row(Text(layer.name), layer.op, shape, str(layer.bits), layer.granularity, layer.form, *last)
    return table


def _layers_shown(layers: list[LayerReport], verbose: bool, solved: bool) -> Iterable[LayerReport | None]:
    """Return all layers, or where there are many the eight that lose most, and None for the rest."""
    if verbose or len(layers) <= 16 or not solved:
        return layers
    worst = sorted(layers, key=lambda layer: -(layer.error_db or 0.0))[:8]
    return [*worst, None]


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _skipped_table(skipped: dict[str, str], verbose: bool) -> Table:
    table = Table(title=f"{len(skipped)} left as they are", title_justify="left", box=None, pad_edge=False)
    table.add_column("name", overflow="fold", max_width=46)
    table.add_column("reason", overflow="fold")
    items = list(skipped.items())
    for name, reason in items if verbose else items[:6]:
        table.add_row(Text(name), Text(reason))
    if not verbose and len(items) > 6:
        table.add_row("...", f"{len(items) - 6} more with -v")
    return table


def _match_table(matches: list[OutputMatch]) -> Table:
    """Lay out the outputs of whole numbers, and those whose rows depend on the data."""
    table = Table(title="the same on those samples", title_justify="left", box=None, pad_edge=False)
    table.add_column("output", overflow="fold", max_width=46)
    for name in ("float model", "quantized", "in both"):
        table.add_column(name, justify="right")
    for match in matches:
        table.add_row(
            Text(match.name), f"{match.before:,}", f"{match.after:,}", f"{match.matched:,} ({match.share:.1%})"
        )
    return table


def _output_table(outputs: list[OutputComparison]) -> Table:
    table = Table(title="on samples held back from calibration", title_justify="left", box=None, pad_edge=False)
    table.add_column("output", overflow="fold", max_width=46)
    for name in ("SQNR dB", "cosine", "top-1 agreement"):
        table.add_column(name, justify="right")
    shown = without_caches(outputs)
    for output in shown:
        agreement = "" if output.top1_agreement is None else f"{output.top1_agreement:.1%}"
        table.add_row(Text(output.name), f"{output.sqnr_db:.1f}", f"{output.cosine:.4f}", agreement)
    caches = [o for o in outputs if o not in shown]
    if caches:
        worst, cosine = min(o.sqnr_db for o in caches), min(o.cosine for o in caches)
        table.add_row(f"{len(caches)} caches, the worst", f"{worst:.1f}", f"{cosine:.4f}", "")
    return table


def describe_language(language: LanguageComparison) -> str:
    """Write how near the distributions over a vocabulary are, in one line."""
    found = f"KL {language.divergence:.3g}, the same likeliest token at {language.top1_agreement:.1%}"
    where = f"{found} of {language.positions:,} positions of {language.name}"
    if language.rise is None:
        return where
    before, after = (f"{language.perplexity[model]:.4g}" for model in ("before", "after"))
    return f"perplexity {before} -> {after} ({language.rise:.3f}x), {where}"


def _frontier_table(frontier: list[FrontierPoint]) -> Table:
    by_loss = any(point.perplexity_rise is not None for point in frontier)
    table = Table(title="size against predicted accuracy", title_justify="left", box=None, pad_edge=False)
    for name in ("MB", "mean bits", "SQNR dB", "perplexity" if by_loss else "top-1 agreement", ""):
        table.add_column(name, justify="right")
    for point in frontier:
        agreement = "" if point.top1_agreement is None else f"{point.top1_agreement:.1%}"
        agreement = agreement if point.perplexity_rise is None else f"{point.perplexity_rise:.3f}x"
        table.add_row(
            f"{point.size / 1e6:.2f}", f"{point.mean_bits:.2f}", f"{point.sqnr_db:.1f}", agreement,
            "<- chosen" if point.chosen else "",
        )  # fmt: skip
    return table


def _gains_text(report: Report) -> str:
    """Write size, latency, kernels and time, a line each."""
    before, after = report.size["before"], report.size["after"]
    text = f"size     {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({after / before:.0%})"
    if report.latency_ms:
        slow, fast = report.latency_ms["before"], report.latency_ms["after"]
        text += f"\nlatency  {slow:.2f} ms -> {fast:.2f} ms ({slow / fast:.2f}x, one sample, one thread)"
    if report.decoding_ms:
        slow, fast = report.decoding_ms["before"], report.decoding_ms["after"]
        text += f"\ndecoding {slow:.2f} ms -> {fast:.2f} ms a token ({slow / fast:.2f}x, behind one sample, one thread)"
    if report.kernels:
        text += "\ninteger  " + ", ".join(f"{n} {op}" for op, n in report.kernels.items())
    if report.seconds:
        text += f"\ntook     {report.seconds['total']:.1f} s, {report.peak_rss_mb:,.0f} MB at the peak"
    return text
