"""Compare several runs: as one table for a terminal, and in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from comq_onnx.model.files import write_text
from comq_onnx.model.judged import without_caches
from comq_onnx.report.report import Report


@dataclass(frozen=True)
class Run:
    """Hold what became of one model of several, or one run of several on a model.

    name: what tells it from the others
    report: None where it failed, or was copied as it is
    link: the address of the page of its report, beside this page; "" where there is none
    said: why it failed or was copied
    """

    name: str
    report: Report | None
    link: str = ""
    said: str = ""
    failed: bool = False


def save_json(runs: Sequence[Run], path: Path) -> None:
    """Write the reports of several runs as JSON. Raises OptionError where the file cannot be written."""
    models = [
        {"name": run.name, "failed": run.failed, "said": run.said, "report": run.report and run.report.to_dict()}
        for run in runs
    ]
    write_text(path, json.dumps({"models": models}, indent=2, default=str) + "\n")


# As one table
# ----------------------------------------------------------------------------------------------------------------------


def table(runs: Sequence[Run], verbose: bool = False) -> RenderableType:
    """Lay out one line for each run, and behind them errors and warnings; with `verbose` the notes too."""
    title = "1 model" if len(runs) == 1 else f"{len(runs)} models"
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    shown.add_column("model", overflow="fold")
    columns = used_columns(runs)
    for name in columns:
        shown.add_column(name, justify="right")
    for run in runs:
        cells = [column(run.report) for column in columns.values()] if run.report else []
        shown.add_row(Text(run.name), *(cells or ["failed" if run.failed else "copied"]))
    parts: list[RenderableType] = [shown]
    for run in runs:
        if run.report is None:
            how = Text(f"failed: {run.name}: {run.said}", style="red")
            parts.append(how if run.failed else Text(f"note: {run.name}: copied as it is: {run.said}"))
            continue
        parts += [Text(f"note: {run.name}: {note}") for note in (run.report.notes if verbose else [])]
        parts += [Text(f"warning: {run.name}: {warning}", style="yellow") for warning in run.report.warnings]
    return Group(*parts)


def used_columns(runs: Sequence[Run]) -> dict[str, Callable[[Report], str]]:
    """Return the columns that any run fills, by their titles."""
    reports = [run.report for run in runs if run.report is not None]
    return {name: column for name, column in _COLUMNS.items() if any(column(report) for report in reports)}


def _size(report: Report) -> str:
    return f"{report.size['before'] / 1e6:.2f} -> {report.size['after'] / 1e6:.2f}" if report.size else ""


def _share(report: Report) -> str:
    return f"{report.size['after'] / report.size['before']:.0%}" if report.size else ""


def worst_db(report: Report) -> float | None:
    """Return the SQNR of the worst output."""
    return min((o.sqnr_db for o in without_caches(report.outputs)), default=None)


def _sqnr(report: Report) -> str:
    worst = worst_db(report)
    return "" if worst is None else f"{worst:.1f}"


def least_agreement(report: Report) -> float | None:
    """Return the top-1 agreement of the output where it is least; None where no output holds class scores."""
    known = [o.top1_agreement for o in without_caches(report.outputs) if o.top1_agreement is not None]
    return min(known, default=None)


def _agreement(report: Report) -> str:
    least = least_agreement(report)
    return "" if least is None else f"{least:.1%}"


def _perplexity(report: Report) -> str:
    rise = report.language.rise if report.language is not None else None
    return "" if rise is None else f"{rise:.3f}x"


def _ratio(milliseconds: Mapping[str, float]) -> str:
    """Return how many times as fast the quantized model is; "" where it was not timed."""
    return f"{milliseconds['before'] / milliseconds['after']:.2f}x" if milliseconds else ""


def _seconds(report: Report) -> str:
    return f"{report.seconds['total']:.0f}" if "total" in report.seconds else ""


def _peak(report: Report) -> str:
    return f"{report.peak_rss_mb:,.0f}" if report.peak_rss_mb > 0 else ""


_COLUMNS: dict[str, Callable[[Report], str]] = {
    "MB": _size,
    "size": _share,
    "layers": lambda report: str(len(report.layers)),
    "SQNR dB": _sqnr,
    "agreement": _agreement,
    "perplexity": _perplexity,
    "speed": lambda report: _ratio(report.latency_ms),
    "a token": lambda report: _ratio(report.decoding_ms),
    "s": _seconds,
    "peak MB": _peak,
    "warnings": lambda report: str(len(report.warnings)) if report.warnings else "",
}
