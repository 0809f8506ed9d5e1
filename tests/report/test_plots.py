"""Test the marks of the plots: one for each layer or activation, as high as its value, with its name."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from reports import activation, layer

from comq_onnx.report import plots

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
