"""Lay out what became of several models as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from comq_onnx.folders import Done
from comq_onnx.model.judged import without_caches


def render(done: Sequence[Done], verbose: bool = False) -> RenderableType:
    """Lay out one line for each model, and behind them the warnings; with `verbose` the notes too."""
    table = Table(title=f"{len(done)} models", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for name in ("MB", "", "layers", "worst output dB", "speed", "a token", "s"):
        table.add_column(name, justify="right")
    for one in done:
        table.add_row(Text(str(one.output)), *_figures(one))
    parts: list[RenderableType] = [table]
    for one in done:
        if one.report is None:
            parts.append(Text(f"note: {one.output}: copied as it is: {one.reason}"))
            continue
        notes = one.report.notes if verbose else []
        parts += [Text(f"note: {one.output}: {note}") for note in notes]
        parts += [Text(f"warning: {one.output}: {warning}", style="yellow") for warning in one.report.warnings]
    return Group(*parts)


def _figures(done: Done) -> list[str]:
    """Return the columns of a model behind its name."""
    report = done.report
    if report is None:
        return ["", "copied"]
    before, after = report.size["before"], report.size["after"]
    worst = min((o.sqnr_db for o in without_caches(report.outputs)), default=None)
    return [
        f"{before / 1e6:.2f} -> {after / 1e6:.2f}", f"{after / before:.0%}", str(len(report.layers)),
        "" if worst is None else f"{worst:.1f}", _ratio(report.latency_ms), _ratio(report.decoding_ms),
        f"{report.seconds['total']:.0f}",
    ]  # fmt: skip


def _ratio(milliseconds: Mapping[str, float]) -> str:
    """Return how many times as fast the quantized model is; "" where it was not timed."""
    return f"{milliseconds['before'] / milliseconds['after']:.2f}x" if milliseconds else ""
