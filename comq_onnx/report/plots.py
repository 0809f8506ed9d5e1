"""Draw plots as SVG text with matplotlib: small, without scripts; every mark says what it is when pointed at.

Colours are the CSS variables of the page, so that a plot is light or dark with the page. A plot is a list of `Marks`
and two labels: `points` and `bars` draw any plot, the functions above them the plots of a report.

    name: begins every id in the SVG, so it must be unique in a page
    size: width and height in inches
"""

from __future__ import annotations

import io
import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    from comq_onnx.bits.tradeoff import FrontierPoint
    from comq_onnx.report.changes import WeightHistogram
    from comq_onnx.report.report import ActivationReport, LayerReport

# stand-ins for the page's colours: matplotlib knows no CSS variables
COLOURS = {
    "ink": "#010101", "grid": "#020202", "soft": "#030303", "accent": "#040404", "warn": "#050505", "paper": "#060606",
    "heat1": "#070707", "heat2": "#080808", "heat3": "#090909", "heat4": "#0a0a0a",
}  # fmt: skip
# inches of 72 points: for pages as wide as a desktop and as a phone
WIDE, NARROW = (11.0, 2.7), (3.9, 2.5)
# and for half of a desktop, which fills a phone
HALF = (5.0, 2.2)
# an axis is logarithmic where the largest size is more than so many times the middle one
UNEVEN = 40
# of the labels that show when a mark is pointed at, in points: their letters are about so wide, their lines so high
LETTER, LINE, REACH = 4.9, 12.0, 9.0
_SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Marks:
    """Hold points or bars of one colour.

    label: what the legend says
    x, y: where each stands, and how high
    titles: what each says when pointed at
    colour: a key of COLOURS
    base: where each bar begins; None for 0
    names: what is written beside each point; () for nothing
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    titles: Sequence[str]
    colour: str = "accent"
    base: Sequence[float] | None = None
    names: Sequence[str] = ()


def errors(name: str, layers: Sequence[LayerReport], size: tuple[float, float] = WIDE) -> str:
    """Draw the error of each layer in graph order, beside that of plain rounding."""
    solved = [(i, x) for i, x in enumerate(layers) if x.error_db is not None and x.rtn_error_db is not None]
    places = [i for i, _ in solved]
    titles = [
        f"{x.name}\n{x.error_db:.1f} dB, plain rounding {x.rtn_error_db:.1f} dB\n{x.op}, {x.bits} bits"
        for _, x in solved
    ]
    return points(
        name,
        [
            Marks("plain rounding", places, [x.rtn_error_db or 0.0 for _, x in solved], titles, "soft"),
            Marks("as quantized", places, [x.error_db or 0.0 for _, x in solved], titles),
        ],
        ("layer, in graph order", "error, dB"), size, joined=True,
    )  # fmt: skip


def frontier(name: str, found: Sequence[FrontierPoint], size: tuple[float, float] = WIDE) -> str:
    """Draw predicted SQNR against the size of the file, and the allocation that was chosen."""

    def marks(label: str, some: Sequence[FrontierPoint], colour: str) -> Marks:
        titles = [
            f"{p.size / 1e6:,.2f} MB, {p.mean_bits:.2f} bits in the mean\npredicted {p.sqnr_db:.1f} dB"
            + ("" if p.top1_agreement is None else f", {p.top1_agreement:.1%} agreement")
            + ("" if p.perplexity_rise is None else f", {p.perplexity_rise:.3f} times the perplexity")
            for p in some
        ]
        return Marks(label, [p.size / 1e6 for p in some], [p.sqnr_db for p in some], titles, colour)

    others, chosen = [p for p in found if not p.chosen], [p for p in found if p.chosen]
    return points(
        name, [marks("possible", others, "soft"), marks("chosen", chosen, "accent")], ("MB", "predicted SQNR, dB"),
        size, lines=True, labelled=True,
    )  # fmt: skip


def sizes(name: str, layers: Sequence[LayerReport], size: tuple[float, float] = WIDE) -> str:
    """Draw the bytes of the weight of each layer, before and after."""
    known = [(i, x) for i, x in enumerate(layers) if x.bytes_before and x.bytes_after is not None]
    titles = [
        f"{x.name}\n{(x.bytes_before or 0) / 1e3:,.1f} kB -> {(x.bytes_after or 0) / 1e3:,.1f} kB\n{x.bits} bits, "
        f"{' x '.join(map(str, x.weight_shape))}"
        for _, x in known
    ]
    places = [i for i, _ in known]
    before = [(x.bytes_before or 0) / 1e3 for _, x in known]
    after = [(x.bytes_after or 0) / 1e3 for _, x in known]
    # beside an embedding the bars of all other layers would be flat
    uneven = bool(before) and max(before) > UNEVEN * float(np.median(before))
    base = [min(after) / 2] * len(known) if uneven else None
    return bars(
        name,
        [Marks("before", places, before, titles, "soft", base), Marks("after", places, after, titles, "accent", base)],
        ("layer, in graph order", "weight, kB" + (", logarithmic" if uneven else "")), size,
        _logarithmic if uneven else None,
    )  # fmt: skip


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def bits(name: str, layers: Sequence[LayerReport], size: tuple[float, float] = WIDE) -> str:
    """Draw the bits of the weight of each layer."""
    titles = [f"{x.name}\n{x.bits} bits, a scale per {x.granularity}" for x in layers]
    marks = Marks("bits", list(range(len(layers))), [x.bits for x in layers], titles)
    return bars(name, [marks], ("layer, in graph order", "bits"), (size[0], size[1] * 0.72), whole=True)


def ranges(name: str, activations: Sequence[ActivationReport], size: tuple[float, float] = WIDE) -> str:
    """Draw the range of each quantized activation, and that of the central 99.9% of its values.

    Where ranges differ much the axis is logarithmic beyond the smallest of them.
    """
    titles = [
        f"{a.name}\n{a.low:.4g} to {a.high:.4g}\n99.9% in {a.typical_low:.4g} to {a.typical_high:.4g}\n"
        f"scale {a.scale:.3g}, zero point {a.zero_point}"
        for a in activations
    ]
    places = list(range(len(activations)))
    spans = [span for a in activations if (span := max(abs(a.low), abs(a.high))) > 0]
    linear = float(np.percentile(spans, 10)) if spans else 1.0
    uneven = bool(spans) and max(spans) > UNEVEN / 2 * linear

    def adjust(axes: Axes) -> None:
        if uneven:
            axes.set_yscale("symlog", linthresh=linear, linscale=0.5)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.axhline(0, color=COLOURS["ink"], linewidth=0.6)

    return bars(
        name,
        [
            Marks("all values", places, [a.high for a in activations], titles, "soft", [a.low for a in activations]),
            Marks("99.9% of them", places, [a.typical_high for a in activations], titles, "accent",
                  [a.typical_low for a in activations]),
        ],
        ("quantized activation, in graph order", "value" + (", logarithmic" if uneven else "")), size, adjust,
    )  # fmt: skip


def weights(name: str, one: WeightHistogram, size: tuple[float, float] = HALF) -> str:
    """Draw how many weights of a layer have which size, before and after."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(one.edges)]
    step = one.edges[1] - one.edges[0]
    titles = [
        f"{a:.3g} to {b:.3g}\n{before:,} weights before, {after:,} after"
        for (a, b), before, after in zip(itertools.pairwise(one.edges), one.before, one.after, strict=True)
    ]
    places = [i + 0.5 for i in range(len(middles))]

    def adjust(axes: Axes) -> None:
        _logarithmic(axes)
        # whole steps from 0 without what rounding leaves
        first = one.edges[0] / step
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{step * round(first + at, 3):.2g}"))

    base = [0.5] * len(middles)
    return bars(
        name,
        [Marks("before", places, [max(n, 0.5) for n in one.before], titles, "soft", base),
         Marks("after", places, [max(n, 0.5) for n in one.after], titles, "accent", base)],
        ("weight", "how many, logarithmic"), size, adjust,
    )  # fmt: skip


def points(
    name: str,
    series: Sequence[Marks],
    labels: tuple[str, str],
    size: tuple[float, float] = WIDE,
    joined: bool = False,
    lines: bool = False,
    labelled: bool = False,
) -> str:
    """Draw series of points.

    labels: of the axes, x and y
    joined: a line joins the points of two series at one place
    lines: a line joins the points of a series, in order
    labelled: pointing at a point, or touching it, shows its title at once
    """

    def draw(axes: Axes) -> None:
        crowd = max((len(marks.x) for marks in series), default=1)
        radius = float(np.clip(size[0] * 36 / max(crowd, 1), 2.2, 5.0))
        if joined and len(series) == 2:
            first, second = series
            axes.vlines(first.x, first.y, second.y, colors=COLOURS["grid"], linewidth=1.2, zorder=1)
        for i, marks in enumerate(series):
            (drawn,) = axes.plot(
                marks.x, marks.y, "o-" if lines else "o", linewidth=1.2,
                color=COLOURS[marks.colour], markersize=radius, markeredgewidth=0,
                label=marks.label, zorder=2 + i,
            )  # fmt: skip
            drawn.set_gid(f"marks-{i}")
            for text, x, y in zip(marks.names, marks.x, marks.y, strict=False):
                axes.annotate(text, (x, y), (0, 6), textcoords="offset points", ha="center")
        named = any(marks.names for marks in series)
        axes.margins(x=0.06 if named else 0.02, y=0.25 if named else 0.12)

    return plot(name, series, labels, size, draw, labelled)


def bars(
    name: str,
    series: Sequence[Marks],
    labels: tuple[str, str],
    size: tuple[float, float] = WIDE,
    adjust: Callable[[Axes], None] | None = None,
    whole: bool = False,
) -> str:
    """Draw series of bars, each in front of the one before it.

    labels: of the axes, x and y
    adjust: changes the axes in the end
    whole: y has only whole numbers
    """

    def draw(axes: Axes) -> None:
        for i, marks in enumerate(series):
            base = list(marks.base) if marks.base is not None else [0.0] * len(marks.y)
            heights = [y - b for y, b in zip(marks.y, base, strict=True)]
            drawn = axes.bar(marks.x, heights, 0.8 - 0.3 * i, base, color=COLOURS[marks.colour], label=marks.label)
            for j, bar in enumerate(drawn):
                bar.set_gid(f"marks-{i}-{j}")
        axes.margins(x=0.02)
        if adjust is not None:
            adjust(axes)
        if whole:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))

    return plot(name, series, labels, size, draw)


def plot(
    name: str, series: Sequence[Marks], labels: tuple[str, str], size: tuple[float, float],
    draw: Callable[[Axes], None], labelled: bool = False, legend: bool = False,
) -> str:  # fmt: skip
    """Draw a plot with matplotlib.

    draw: puts the marks on the axes: those of series i in a group of the id `marks-i`, bar j as `marks-i-j`
    labelled: pointing at a mark shows its title at once
    legend: one series has a legend, too
    """
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.edgecolor": COLOURS["grid"],
        "axes.labelcolor": COLOURS["ink"], "text.color": COLOURS["ink"], "xtick.color": COLOURS["grid"],
        "ytick.color": COLOURS["grid"], "xtick.labelcolor": COLOURS["ink"], "ytick.labelcolor": COLOURS["ink"],
        "grid.color": COLOURS["grid"], "grid.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        draw(axes)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        places = all(isinstance(x, int) for marks in series for x in marks.x)
        axes.xaxis.set_major_locator(MaxNLocator(integer=places, nbins=10 if size[0] > 6 else 5))
        if len(series) > 1 or legend:
            columns = min(len(series), 5 if size[0] > NARROW[0] else 2)
            figure.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=1.2, borderpad=0)
        data = io.StringIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    # on a phone there is no pointer
    return _finish(data.getvalue(), name, series, labels, size[0] > NARROW[0], labelled)


def _finish(svg: str, name: str, series: Sequence[Marks], labels: tuple[str, str], titled: bool, labelled: bool) -> str:
    """Make the SVG of matplotlib ready for the page: marks with titles, colours and font of the page, unique ids."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(svg)
    groups = _group_marks(root, series, titled and not labelled)
    for title, group in groups.items() if labelled else ():
        _label(group, title, *map(float, root.get("viewBox", "").split()[2:]))
    root.set("role", "img")
    root.set("aria-label", f"{labels[1]} by {labels[0]}")
    for unwanted in ("width", "height"):
        root.attrib.pop(unwanted, None)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    text = ET.tostring(root, encoding="unicode")
    for colour, stand_in in COLOURS.items():
        text = text.replace(stand_in, f"var(--{colour})")
    text = re.sub(r"(font: [\d.]+px )[^;\"]+", r"\1sans-serif", text)
    # nobody sees a hundredth of a point
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)


def _label(group: ET.Element, title: str, width: float, height: float) -> None:
    """Add what shows when a mark is pointed at: its title beside it, within the plot; and make the mark easy to hit."""
    x, y = (float(group[0].get(axis, "0")) for axis in "xy")
    lines = title.split("\n")
    wide, high = max(map(len, lines)) * LETTER + 12, len(lines) * LINE + 6
    left, top = min(max(x - wide / 2, 1), max(width - wide - 1, 1)), y - high - REACH
    top = top if top > 0 else min(y + REACH, height - high)
    ET.SubElement(group, f"{{{_SVG}}}circle", {"class": "reach", "cx": f"{x}", "cy": f"{y}", "r": f"{REACH}"})
    label = ET.SubElement(group, f"{{{_SVG}}}g", {"class": "label"})
    sides = {"x": f"{left:.1f}", "y": f"{top:.1f}", "width": f"{wide:.1f}", "height": f"{high:.1f}", "rx": "3"}
    ET.SubElement(label, f"{{{_SVG}}}rect", sides)
    for i, line in enumerate(lines):
        place = {"x": f"{left + 6:.1f}", "y": f"{top + LINE * (i + 1):.1f}", "style": "font: 9px sans-serif"}
        ET.SubElement(label, f"{{{_SVG}}}text", place).text = line
    group.set("tabindex", "0")


def _group_marks(root: ET.Element, series: Sequence[Marks], titled: bool) -> dict[str, ET.Element]:
    """Put all marks of one title in one group, so that pointing at any of them shows it, and return the groups.

    titled: give each the title
    """
    parents = {child: parent for parent in root.iter() for child in parent}
    groups: dict[str, ET.Element] = {}
    for i, marks in sorted(_marks(root).items()):
        axes = parents[marks[0][0]]
        for place, (holder, mark) in enumerate(marks):
            title = series[i].titles[place]
            if title not in groups:
                groups[title] = ET.SubElement(axes, f"{{{_SVG}}}g", {"class": "mark"})
                if titled:
                    ET.SubElement(groups[title], f"{{{_SVG}}}title").text = title
            mark.attrib.pop("style", None)
            mark.set("class", series[i].colour)
            groups[title].append(mark)
            if holder in axes and not list(holder.iter(f"{{{_SVG}}}defs")):
                axes.remove(holder)
    return groups


def _marks(root: ET.Element) -> dict[int, list[tuple[ET.Element, ET.Element]]]:
    """Find the marks of each series in the order drawn: (the group that matplotlib put it in, the mark)."""
    found: dict[int, list[tuple[ET.Element, ET.Element]]] = {}
    for group in root.iter(f"{{{_SVG}}}g"):
        place = re.fullmatch(r"marks-(\d+)(-\d+)?", group.get("id", ""))
        if place is None:
            continue
        if place[2]:
            found.setdefault(int(place[1]), []).append((group, _rectangle(group)))
            continue
        for holder in group.iter(f"{{{_SVG}}}g"):
            uses = holder.findall(f"{{{_SVG}}}use")
            found.setdefault(int(place[1]), []).extend((group, use) for use in uses)
            for use in uses:
                holder.remove(use)
    return found


def _rectangle(group: ET.Element) -> ET.Element:
    """Return a bar, which matplotlib writes as a path, as a rectangle: a third of the text."""
    path = group.find(f"{{{_SVG}}}path")
    assert path is not None
    numbers = [float(n) for n in re.findall(r"-?[\d.]+(?:e-?\d+)?", path.get("d", ""))]
    xs, ys = numbers[::2], numbers[1::2]
    sides = {"x": min(xs), "y": min(ys), "width": max(xs) - min(xs), "height": max(ys) - min(ys)}
    return ET.Element(f"{{{_SVG}}}rect", {side: f"{value:.2f}" for side, value in sides.items()})
