"""Render the page that compares several runs, from several.html.

It draws, with matplotlib, which takes long to import: who imports it does so where a page is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from comq_onnx.model.files import write_text
from comq_onnx.report import plots
from comq_onnx.report.page import Drawing, environment
from comq_onnx.report.report import LayerReport
from comq_onnx.report.several import Run, used_columns, worst_db
from comq_onnx.write.provenance import version

# so many runs of the same layers are drawn in one plot, each in a colour of its own
COLOURS = ("accent", "warn", "soft", "ink")


@dataclass(frozen=True)
class _Row:
    """Hold a line of the table of the page."""

    number: int
    run: Run
    cells: list[str]


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


def render(runs: Sequence[Run], title: str) -> str:
    """Render one page that compares several runs; the report of each is a page of its own."""
    columns = used_columns(runs)
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
    decibels = [db for r in reports if (db := worst_db(r)) is not None]
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
        y = None if row.run.report is None else worst_db(row.run.report)
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
