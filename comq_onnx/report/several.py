"""Compare several runs: as one table for a terminal, and as one HTML page, from several.html."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from comq_onnx.model.files import write_text
from comq_onnx.model.judged import without_caches
from comq_onnx.report import plots
from comq_onnx.report.page import Drawing, environment
from comq_onnx.report.report import LayerReport, Report
from comq_onnx.write.provenance import version

# so many runs of the same layers are drawn in one plot, each in a colour of its own
COLOURS = ("accent", "warn", "soft", "ink")


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


@dataclass(frozen=True)
class _Row:
    """Hold a line of the table of the page."""

    number: int
    run: Run
    cells: list[str]


def save_json(runs: Sequence[Run], path: Path) -> None:
    """Write the reports of several runs as JSON. Raises OptionError where the file cannot be written."""
    models = [
        {"name": run.name, "failed": run.failed, "said": run.said, "report": run.report and run.report.to_dict()}
        for run in runs
    ]
    write_text(path, json.dumps({"models": models}, indent=2, default=str) + "\n")


def save_html(runs: Sequence[Run], path: Path) -> None:
    """Write the page that compares several runs, and beside it in a folder the page of each run.

    Raises OptionError where a file cannot be written.
    """
    folder = path.with_name(f"{path.stem}_models")
    linked = []
    for i, run in enumerate(runs):
        name = f"{i + 1:02d}-{re.sub(r'[^A-Za-z0-9.-]+', '_', Path(run.name).stem)}.html"
        if run.report is not None:
            folder.mkdir(exist_ok=True)
            run.report.save_html(folder / name)
        linked.append(run if run.report is None else replace(run, link=quote(f"{folder.name}/{name}")))
    write_text(path, render(linked, f"{len(runs)} models compared"))


# As one table
# ----------------------------------------------------------------------------------------------------------------------


def table(runs: Sequence[Run], verbose: bool = False) -> RenderableType:
    """Lay out one line for each run, and behind them errors and warnings; with `verbose` the notes too."""
    shown = Table(title=f"{len(runs)} models", title_justify="left", box=None, pad_edge=False, header_style="bold")
    shown.add_column("model", overflow="fold")
    columns = _used_columns(runs)
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


def _used_columns(runs: Sequence[Run]) -> dict[str, Callable[[Report], str]]:
    """Return the columns that any run fills, by their titles."""
    reports = [run.report for run in runs if run.report is not None]
    return {name: column for name, column in _COLUMNS.items() if any(column(report) for report in reports)}


def _size(report: Report) -> str:
    return f"{report.size['before'] / 1e6:.2f} -> {report.size['after'] / 1e6:.2f}" if report.size else ""


def _share(report: Report) -> str:
    return f"{report.size['after'] / report.size['before']:.0%}" if report.size else ""


def _worst_db(report: Report) -> float | None:
    """Return the SQNR of the worst output."""
    return min((o.sqnr_db for o in without_caches(report.outputs)), default=None)


def _sqnr(report: Report) -> str:
    worst = _worst_db(report)
    return "" if worst is None else f"{worst:.1f}"


def _agreement(report: Report) -> str:
    known = [o.top1_agreement for o in without_caches(report.outputs) if o.top1_agreement is not None]
    return f"{min(known):.1%}" if known else ""


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


# As one page
# ----------------------------------------------------------------------------------------------------------------------


def render(runs: Sequence[Run], title: str) -> str:
    """Render one page that compares several runs; the report of each is a page of its own."""
    columns = _used_columns(runs)
    rows = [
        _Row(i + 1, run, [column(run.report) for column in columns.values()] if run.report else [])
        for i, run in enumerate(runs)
    ]
    remarks = [(row.number, row.run.name, said) for row in rows if row.run.report for said in row.run.report.warnings]
    return environment().get_template("several.html").render(
        title=title, version=version(), rows=rows, columns=list(columns), tiles=_tiles(runs),
        figures=[figure.drawn() for figure in _figures(rows)], differing=_differing(runs), remarks=remarks,
    )  # fmt: skip


def _tiles(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Say what all runs cost and won together: (what, the figure, the text below it) for each tile."""
    failed, reports = sum(run.failed for run in runs), [run.report for run in runs if run.report is not None]
    copied = len(runs) - failed - len(reports)
    below = ", ".join([f"{failed} failed"] * bool(failed) + [f"{copied} copied"] * bool(copied)) or "none failed"
    tiles = [("quantized", f"{len(reports)} of {len(runs)}", below)]
    before, after = (sum(r.size.get(when, 0) for r in reports) for when in ("before", "after"))
    if before:
        tiles.append(("size", f"{after / before:.0%}", f"{before / 1e6:,.2f} MB to {after / 1e6:,.2f} MB in all"))
    speeds = [r.latency_ms["before"] / r.latency_ms["after"] for r in reports if r.latency_ms]
    if speeds:
        mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
        tiles.append(("speed", f"{mean:.2f}x", f"the geometric mean, {min(speeds):.2f}x to {max(speeds):.2f}x"))
    decibels = [db for r in reports if (db := _worst_db(r)) is not None]
    if decibels:
        tiles.append(("SQNR", f"{min(decibels):.1f} dB", f"the worst output of any; the best run {max(decibels):.1f}"))
    return tiles


def _differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the options in which runs differ, with the value of each run."""
    options = [run.report.options for run in runs if run.report is not None]
    names = list(dict.fromkeys(name for one in options for name in one if name != "workdir"))
    values = [(name, ["" if one.get(name) is None else str(one[name]) for one in options]) for name in names]
    return [(name, one) for name, one in values if len(set(one)) > 1]


def _figures(rows: Sequence[_Row]) -> Iterator[Drawing]:
    """Return the plots for which the runs have data."""
    sized = [p for p in map(_Point.of_size, rows) if p is not None]
    timed = [p for p in map(_Point.of_speed, rows) if p is not None]
    if len(sized) > 1:
        yield Drawing(
            "sizes", "Accuracy against size", "Each run, by its size in percent of its float model: up and to the left "
            "is better.", _scatter("size, % of the float model"), sized,
        )  # fmt: skip
    if len(timed) > 1:
        yield Drawing(
            "speeds", "Accuracy against speed", "Each run, by how many times as fast as its float model it is: up and "
            "to the right is better.", _scatter("speed, times that of the float model"), timed,
        )  # fmt: skip
    layers = {str(row.number): row.run.report.layers for row in rows if row.run.report is not None}
    names = [[layer.name for layer in of_run] for of_run in layers.values()]
    if 1 < len(layers) <= len(COLOURS) and all(one == names[0] for one in names):
        yield Drawing(
            "errors", "Error of each layer", "The error that quantization alone makes in each layer, in each run: "
            "lower is better.", _layer_errors, list(layers.items()),
        )  # fmt: skip


@dataclass(frozen=True)
class _Point:
    """Hold where a run stands in a plot."""

    number: int
    x: float
    y: float
    title: str

    @classmethod
    def of_size(cls, row: _Row) -> _Point | None:
        report = row.run.report
        share = 100 * report.size["after"] / report.size["before"] if report is not None and report.size else math.nan
        return cls._of(row, share, "{:.1f}% of the size")

    @classmethod
    def of_speed(cls, row: _Row) -> _Point | None:
        times = row.run.report.latency_ms if row.run.report is not None else {}
        return cls._of(row, times["before"] / times["after"] if times else math.nan, "{:.2f} times as fast")

    @classmethod
    def _of(cls, row: _Row, x: float, said: str) -> _Point | None:
        y = None if row.run.report is None else _worst_db(row.run.report)
        if y is None or not math.isfinite(x) or not math.isfinite(y):
            return None
        return cls(row.number, x, y, f"{row.number}. {row.run.name}\n{said.format(x)}, {y:.1f} dB")


def _scatter(label: str) -> Callable[..., str]:
    """Return what draws points of SQNR over something else."""

    def draw(name: str, found: Sequence[_Point], size: tuple[float, float]) -> str:
        marks = plots.Marks(
            "runs", [p.x for p in found], [p.y for p in found], [p.title for p in found],
            names=[str(p.number) for p in found],
        )  # fmt: skip
        return plots.points(name, [marks], (label, "SQNR, dB"), size)

    return draw


def _layer_errors(name: str, runs: Sequence[tuple[str, Sequence[LayerReport]]], size: tuple[float, float]) -> str:
    """Draw the error of each layer in each run."""
    series: list[Any] = []
    for (number, layers), colour in zip(runs, COLOURS, strict=False):
        solved = [(i, x, x.error_db) for i, x in enumerate(layers) if x.error_db is not None]
        titles = [f"{x.name}\nrun {number}: {db:.1f} dB, {x.bits} bits" for _, x, db in solved]
        series.append(plots.Marks(f"run {number}", [i for i, *_ in solved], [db for *_, db in solved], titles, colour))
    return plots.points(name, series, ("layer, in graph order", "error, dB"), size, joined=len(series) == 2)
