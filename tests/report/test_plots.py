"""Test the marks of the plots: one for each layer or activation, as high as its value, with its name."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from reports import activation, layer, report

from comq_onnx.report import network, plots
from comq_onnx.report.changes import WeightHistogram

SVG = "{http://www.w3.org/2000/svg}"


def marks(svg: str, colour: str) -> dict[str, ET.Element]:
    """Return the marks of one colour in a plot, by the title of their group."""
    groups = [g for g in ET.fromstring(svg).iter(f"{SVG}g") if g.get("class") == "mark"]
    found = {str(g.findtext(f"{SVG}title")): [e for e in g if e.get("class") == colour] for g in groups}
    assert all(len(elements) == 1 for elements in found.values())
    return {title: elements[0] for title, elements in found.items()}


def names(svg: str, colour: str) -> list[str]:
    return [title.split("\n")[0] for title in marks(svg, colour)]


@pytest.mark.parametrize("count", [1, 2, 3, 40, 211])
def test_every_layer_has_a_mark_that_says_its_name(count: int) -> None:
    layers = [layer(i) for i in range(count)]
    for draw, colours in ((plots.errors, 2), (plots.sizes, 2), (plots.bits, 1)):
        for colour in ("accent", "soft")[:colours]:
            assert names(draw("p", layers), colour) == [x.name for x in layers]
    svg = plots.ranges("p", [activation(i) for i in range(count)])
    assert names(svg, "accent") == names(svg, "soft") == [f"x{i}" for i in range(count)]


def test_a_lower_error_stands_lower() -> None:
    svg = plots.errors("p", [layer(0, error_db=-30.0), layer(1, error_db=-20.0), layer(2, error_db=-10.0)])
    heights = [float(mark.get("y", "nan")) for mark in marks(svg, "accent").values()]
    # y grows downwards; equal steps of dB are equal steps of height
    assert heights[0] > heights[1] > heights[2]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.02)
    assert "-30.0 dB, plain rounding -19.0 dB" in next(iter(marks(svg, "accent")))


def test_layers_without_an_error_have_no_mark() -> None:
    svg = plots.errors("p", [layer(0), layer(1, error_db=None), layer(2)])
    assert names(svg, "accent") == ["/features/block0/conv", "/features/block2/conv"]


def test_a_bar_is_as_high_as_its_bytes() -> None:
    svg = plots.sizes("p", [layer(i, bytes_before=n, bytes_after=n // 8) for i, n in enumerate((8000, 4000))])
    heights = [float(e.get("height", "nan")) for colour in ("soft", "accent") for e in marks(svg, colour).values()]
    assert [h / heights[0] for h in heights] == pytest.approx([1, 0.5, 0.125, 0.0625], abs=1e-3)


def test_a_plot_for_a_phone_has_the_same_marks_without_titles() -> None:
    narrow = plots.errors("p", [layer(i) for i in range(5)], plots.NARROW)
    assert "<title>" not in narrow
    assert narrow.count('class="mark"') == 5


def test_any_points_can_be_drawn_with_a_line() -> None:
    marked = plots.Marks("found", [1.5, 2.25, 4.0], [10.0, 20.0, 25.0], ["a", "b", "c"])
    plain, lined = (plots.points("p", [marked], ("MB", "SQNR, dB"), lines=lines) for lines in (False, True))
    assert names(plain, "accent") == names(lined, "accent") == ["a", "b", "c"]
    assert lined.count("stroke: var(--accent)") == plain.count("stroke: var(--accent)") + 1
    # an axis of sizes has more than whole numbers
    assert ">1.5<" in lined.replace("\n", "")


def test_plots_have_the_pages_colours_only() -> None:
    for svg in (plots.errors("p", [layer(0)]), plots.ranges("p", [activation(0)])):
        drawn = svg.replace("#ffffff", "")
        assert not re.findall(r"#[0-9a-f]{6}\b", drawn)
        assert "var(--accent)" in svg
        assert "var(--ink)" in svg


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0, 1e-9), (-1e30, 1e30), (5.0, 5.0)])
def test_odd_ranges_are_drawn(values: tuple[float, float]) -> None:
    low, high = values
    svg = plots.ranges("p", [activation(0, low=low, high=high, typical_low=low, typical_high=high), activation(1)])
    assert len(names(svg, "soft")) == 2
    assert "nan" not in svg.lower().replace("nan-", "")


def test_a_point_of_the_frontier_says_what_it_is_when_pointed_at() -> None:
    for size in (plots.WIDE, plots.NARROW):
        root = ET.fromstring(plots.frontier("p", report().frontier, size))
        width, height = map(float, root.get("viewBox", "").split()[2:])
        labels = [g for g in root.iter(f"{SVG}g") if g.get("class") == "label"]
        assert [label[1].text for label in labels] == [
            f"0.{i}0 MB, {1 + i}.00 bits in the mean" for i in (1, 2, 4, 5, 6, 7, 3)
        ]
        for rect in (label[0] for label in labels):
            x, y, wide, high = (float(rect.get(side, "nan")) for side in ("x", "y", "width", "height"))
            assert 0 <= x <= x + wide <= width
            assert 0 <= y <= y + high <= height


def test_a_bar_of_a_histogram_counts_the_weights() -> None:
    svg = plots.weights("p", WeightHistogram("fc", (-1.0, 0.0, 1.0), (10, 1000), (0, 1010)))
    assert list(marks(svg, "accent")) == [
        "-1 to 0\n10 weights before, 0 after", "0 to 1\n1,000 weights before, 1,010 after",
    ]  # fmt: skip
    before, after = ([float(e.get("height", "nan")) for e in marks(svg, c).values()] for c in ("soft", "accent"))
    # logarithmic from a half on: 10 is 20 halves, 1,000 is 2,000, and none is no height
    assert before[0] / before[1] == pytest.approx(np.log(20) / np.log(2000), abs=0.01)
    assert after[0] == 0


# The network


def test_the_network_shows_every_layer_in_the_colour_of_its_error() -> None:
    layers = [layer(i, error_db=db) for i, db in enumerate((-45.0, -30.0, -20.0, -9.0))]
    root = ET.fromstring(network.draw("p", layers))
    groups = [g for g in root.iter(f"{SVG}g") if g.get("class") == "mark"]
    shown = {str(g.findtext(f"{SVG}title")).split("\n")[0]: [e.get("class") for e in g][1:] for g in groups}
    assert shown == {layers[i].name: [f"heat{i + 1}"] for i in range(4)}
    assert names(network.draw("p", [layer(0, error_db=None)]), "accent") == [layers[0].name]


def test_the_network_runs_from_left_to_right_and_line_by_line() -> None:
    places, lanes = network._places([layer(i, stage=i // 2) for i in range(20)], 4)
    at = [places[layer(i).name] for i in range(20)]
    assert [(p.row, p.x) for p in at] == [(i // 2 // 4, i // 2 % 4) for i in range(20)]
    # layers of a stage stand below one another, and rows too
    assert all(len({p.y for p in at[i : i + 2]}) == 2 for i in range(0, 20, 2))
    assert max(p.y for p in at if p.row == 0) < min(p.y for p in at if p.row == 1)
    assert max(p.y for p in at) < lanes


def test_lines_of_the_network_end_at_the_layers_they_join() -> None:
    layers = [layer(0, stage=0), layer(1, stage=1), layer(2, stage=2, before=(layer(0).name, layer(1).name))]
    places, _ = network._places(layers, 3)
    xs, ys = network._lines(layers, places)
    ends = {(0.0, 0.0), (1.0, 0.0), (2.0, 0.0)}
    assert ends <= set(zip(xs, ys, strict=True))
    # the one past layer 1 does not run through it
    assert (1.0, 0.0) not in list(zip(xs, ys, strict=True))[2:-4]
    other, _ = network._places(layers, 2)
    assert [place.row for place in other.values()] == [0, 0, 1]
    assert max(x for x in network._lines(layers, other)[0] if x == x) == 1.5
