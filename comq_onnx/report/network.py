"""Draw the network: its layers from left to right as they follow one another, coloured by error, shaped by form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from comq_onnx.report import plots

if TYPE_CHECKING:
    from comq_onnx.report.report import LayerReport

# by error in dB, from these on: colour, and what the legend says
HEAT = ((-np.inf, "heat1", "below -30 dB"), (-30.0, "heat2", "to -20 dB"), (-20.0, "heat3", "to -10 dB"),
        (-10.0, "heat4", "above -10 dB"))  # fmt: skip
# by form; others are crosses
SHAPES = {"integer": "s", "blocked": "o", "folded": "D", "looked up": "^"}
# inches between stages, and between the layers of a stage
STEP, LANE = 0.36, 0.26


@dataclass(frozen=True)
class _Place:
    """Hold where a layer stands: in which row of stages, and its coordinates (y grows downwards)."""

    row: int
    x: float
    y: float


def draw(name: str, layers: Sequence[LayerReport], size: tuple[float, float] = plots.WIDE) -> str:
    """Draw the network as lines of stages, as text is written."""
    room, stages = max(int(size[0] / STEP) - 1, 1), len({layer.stage for layer in layers})
    # rows of the same length
    width = -(-stages // -(-stages // room))
    places, lanes = _places(layers, width)
    series, shapes = _series(layers, places)

    def paint(axes: Axes) -> None:
        xs, ys = _lines(layers, places)
        axes.plot(xs, ys, color=plots.COLOURS["soft"], linewidth=0.8, zorder=1)
        for i, (marks, shape) in enumerate(zip(series, shapes, strict=True)):
            (drawn,) = axes.plot(
                marks.x, marks.y, shape, markersize=6.5, markeredgewidth=0, color=plots.COLOURS[marks.colour],
                label=marks.label, zorder=2,
            )  # fmt: skip
            drawn.set_gid(f"marks-{i}")
        axes.set_xlim(-0.8, max(width, room / 2) - 0.2)
        axes.set_ylim(lanes - 0.3, -0.9)
        axes.axis("off")

    legend = 0.2 * -(-len(series) // (5 if size[0] > plots.NARROW[0] else 2))
    height = LANE * (lanes + 0.8) + legend
    return plots.plot(name, series, ("", "layers, by error"), (size[0], height), paint, legend=True)


def _places(layers: Sequence[LayerReport], width: int) -> tuple[dict[str, _Place], float]:
    """Place the layers in rows of `width` stages, and return the lanes that all rows take, too."""
    by_stage: dict[int, list[LayerReport]] = {}
    for layer in layers:
        by_stage.setdefault(layer.stage, []).append(layer)
    stages = [by_stage[index] for index in sorted(by_stage)]
    found: dict[str, _Place] = {}
    top = 0.0
    for row in range(-(-len(stages) // width)):
        those = stages[row * width : (row + 1) * width]
        most = max(map(len, those))
        for x, members in enumerate(those):
            # beside what they read, so that few lines cross
            order = sorted(members, key=lambda layer: _height(layer, found))
            for lane, layer in enumerate(order):
                found[layer.name] = _Place(row, x, top + (most - len(members)) / 2 + lane)
        top += most + 0.8
    return found, top


def _height(layer: LayerReport, places: dict[str, _Place]) -> float:
    """Return the mean height of what a layer reads."""
    known = [places[name].y for name in layer.before if name in places]
    return float(np.mean(known)) if known else 0.0


def _series(layers: Sequence[LayerReport], places: dict[str, _Place]) -> tuple[list[plots.Marks], list[str]]:
    """Return the marks of each form and range of errors, and the shape of each."""
    groups: dict[tuple[str, str, str], list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault((layer.form, *_heat(layer.error_db)), []).append(layer)
    series = [
        plots.Marks(
            f"{form}, {said}" if said else form, [places[x.name].x for x in some], [places[x.name].y for x in some],
            [_title(x) for x in some], colour,
        )
        for (form, colour, said), some in sorted(groups.items())
    ]  # fmt: skip
    return series, [SHAPES.get(form, "X") for form, *_ in sorted(groups)]


def _heat(error_db: float | None) -> tuple[str, str]:
    """Return the colour of an error, and what the legend says."""
    if error_db is None:
        return "accent", ""
    return next((colour, said) for least, colour, said in reversed(HEAT) if error_db >= least)


def _title(layer: LayerReport) -> str:
    error = "" if layer.error_db is None else f", {layer.error_db:.1f} dB"
    return f"{layer.name}\n{layer.op}, {layer.bits} bits, {layer.form}{error}"


def _lines(layers: Sequence[LayerReport], places: dict[str, _Place]) -> tuple[list[float], list[float]]:
    """Return the lines between layers as one, with gaps; from row to row only their ends are drawn."""
    xs: list[float] = []
    ys: list[float] = []
    for layer in layers:
        end = places[layer.name]
        for start in (places[name] for name in layer.before if name in places):
            if start.row != end.row:
                xs += [start.x, start.x + 0.5, np.nan, end.x - 0.5, end.x, np.nan]
                ys += [start.y, start.y, np.nan, end.y, end.y, np.nan]
                continue
            # a line past other stages bends, or it would run through their layers
            bend = 0.0 if end.x - start.x <= 1 else min(0.25 + 0.05 * (end.x - start.x), 0.6)
            way = np.linspace(0, 1, 2 if bend == 0 else 9)
            xs += [*(start.x + (end.x - start.x) * way), np.nan]
            ys += [*(start.y + (end.y - start.y) * way - bend * 4 * way * (1 - way)), np.nan]
    return xs, ys
