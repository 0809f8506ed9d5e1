"""Test what stands in the HTML page, and that it needs nothing else."""

from __future__ import annotations

import functools
import re

from reports import Page, activation, layer, plan, report


@functools.cache
def html() -> str:
    """Render the page of the usual report, once."""
    return report().to_html()


def test_the_page_says_what_it_cost_and_won() -> None:
    text = Page(html()).text
    for words in ("0.60 MB", "15% of 4.00 MB", "2.00x", "24.3 dB", "97.0%", "56 samples that calibration never saw"):
        assert words in text
    assert "comq-onnx models/net.onnx --calib photos -o net_q.onnx" in text


def test_the_page_needs_nothing_else() -> None:
    page = Page(html())
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "iframe")]
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "@import" not in html()
    assert not re.findall(r"url\((?!#)", html())


def test_the_ids_of_a_page_are_unique_and_what_points_to_them_is_there() -> None:
    ids = re.findall(r'\bid="([^"]+)"', html())
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html())) <= {(i, "") for i in ids} | {
        ("", i) for i in ids
    }


def test_the_page_of_a_large_model_stays_below_a_megabyte() -> None:
    big = report(400, activations=[activation(i) for i in range(400)])
    assert len(big.to_html().encode()) < 1_000_000


def test_the_same_report_gives_the_same_page() -> None:
    assert html() == report().to_html()


def test_names_are_text_and_never_markup() -> None:
    name = "/<script>alert(1)</script>&\"'/conv"
    nasty = report(
        3, layers=[layer(0, name=name), layer(1), layer(2, name=name + "2", form="folded", kernel="Conv")],
        skipped={name: name}, warnings=[name], model=name, activations=[activation(0, name=name)],
    )  # fmt: skip
    page = nasty.to_html()
    assert "<script" not in page
    assert name in Page(page).text


def test_a_plan_has_a_page_too() -> None:
    text = Page(plan().to_html()).text
    assert "nothing was calibrated" in text
    assert "12 layers" in text
    assert "Error of each layer" not in text
    assert "nan" not in text


def test_every_layer_that_runs_in_float_has_a_reason() -> None:
    layers = [
        layer(0), layer(1, kernel="Conv"), layer(2, form="folded", op="ConvTranspose", kernel="ConvTranspose"),
        layer(3, form="blocked", op="MatMul", kernel="MatMulNBits"),
        layer(4, form="looked up", op="Gather", kernel=None),
    ]  # fmt: skip
    page = report(layers=layers).to_html()
    section = Page(page[page.index('<section id="float">') : page.index('<section id="inputs">')]).text
    assert "block0" not in section
    assert "block1/conv Conv Conv written for an integer kernel, but ONNX Runtime runs it as Conv" in section
    assert "no integer kernel for this ConvTranspose on ort-cpu" in section
    assert "weight-only" in section
    assert "an embedding" in section
    assert "its weight is computed at run time" in section
    assert "1 Softmax no integer kernel on ort-cpu" in section
    assert "2 Add could run in integers" in section
    assert "1 QuantizeLinear converts" in section
    none = report(layers=[layer(0, form="folded", kernel="Conv")], options={"activations": "none"}).to_html()
    assert "(--activations none)" in none


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    (tag, attributes), *rest = Page(report()._repr_html_()).elements
    assert (tag, rest) == ("iframe", [])
    assert attributes["srcdoc"] == html()
