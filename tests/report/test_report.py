"""The report: what stands in the page and in the tables, the plots' marks, the advice, what goes into JSON."""

from __future__ import annotations

import functools
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from conftest import Done
from PIL import Image
from reports import activation, layer, plan, report
from rich.console import Console

import comq_onnx
from comq_onnx import errors
from comq_onnx.metrics import OutputComparison
from comq_onnx.plan.observed_range import ObservedRange
from comq_onnx.report import plots
from comq_onnx.report.advice import advise, pattern
from comq_onnx.report.inputs import describe
from comq_onnx.report.report import Report
from models import build, cnn, infer, mlp, normal, op_types, samples_for, sqnr, weight, worst_sqnr

SVG = "{http://www.w3.org/2000/svg}"
# elements of HTML that have no end tag
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The text of a page, its elements and their attributes; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def printed(shown: Report, verbose: bool = False) -> str:
    """What a terminal of 140 columns would show."""
    out = io.StringIO()
    Console(file=out, width=140).print(shown.rich(verbose))
    return out.getvalue()


# The page


@functools.cache
def html() -> str:
    """The page of the usual report."""
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


# The plots


def marks(svg: str, colour: str) -> dict[str, ET.Element]:
    """The marks of one colour in a plot, by the title of their group."""
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


# Advice


def test_a_good_run_needs_no_advice() -> None:
    assert advise(report()) == []
    assert advise(plan()) == []


def test_layers_that_lose_most_are_worth_more_bits() -> None:
    layers = [layer(i, error_db=-25.0) for i in range(9)] + [layer(9, error_db=-8.0), layer(10, error_db=-12.0)]
    (hint,) = advise(report(layers=layers))
    assert "block9/conv -8.0 dB" in hint.found
    assert hint.remedy == r"--bits-for '^(/features/block9/conv|/features/block10/conv)$=8'"
    assert advise(report(layers=[layer(i, error_db=-8.0, bits=8) for i in range(9)])) == []


def test_the_pattern_matches_those_layers_alone() -> None:
    odd = [layer(0, name="a.b[0]/c+d"), layer(1, name="x|y")]
    expression = re.compile(pattern(odd))
    assert all(expression.search(x.name) for x in odd)
    assert not any(expression.search(name) for name in ("a.b[0]/c+d2", "aab[0]/c+d", "x", "y", "xy"))


def test_outputs_that_moved_and_outliers_are_told() -> None:
    moved = [OutputComparison("logits", 5.0, 0.8, 0.81)]
    wild = [activation(i) for i in range(3)] + [activation(3, high=400.0)]
    found = advise(report(outputs=moved, activations=wild))
    assert "top-1 agreement 81.0%" in found[0].found
    assert "--bits 8" in found[0].remedy
    assert "x3 -1 to 400" in found[1].found
    wide = report(layers=[layer(0, bits=8)], outputs=moved, options={"activations": "none"})
    assert advise(wide)[0].remedy.startswith("--exclude")
    embedding = [OutputComparison("embedding", 5.0, 0.8, None)]
    assert "SQNR 5.0 dB" in advise(report(outputs=embedding))[0].found


def test_a_layer_that_missed_its_kernel_is_told() -> None:
    (hint,) = advise(report(layers=[layer(0), layer(1, kernel="Conv")]))
    assert "1 layer written for integer kernels" in hint.found
    assert "/features/block1/conv" in hint.found


def test_the_page_and_the_terminal_give_the_advice() -> None:
    moved = report(outputs=[OutputComparison("logits", 5.0, 0.8, 0.81)])
    assert "top-1 agreement 81.0%" in Page(moved.to_html()).text
    assert "hint: top-1 agreement 81.0%" in printed(moved)


# The terminal


def test_the_terminal_shows_the_worst_layers_or_all() -> None:
    many = report(40)
    assert printed(many).count("/features/") == 8
    assert printed(many, verbose=True).count("/features/") == 40
    assert "0.60 MB (15%)" in printed(many)


# Figures


def test_the_central_values_of_a_range_are_numpys_quantiles() -> None:
    seen = ObservedRange()
    values = np.concatenate([normal(200_000), [900.0, -50.0]]).astype(np.float32)
    for part in np.array_split(np.random.default_rng(1).permutation(values), 40):
        seen.observe(part)
    low, high = seen.between(0.999)
    # bins a quarter of a power of two wide, outwards
    for found, exact in ((low, np.quantile(values, 0.0005)), (high, np.quantile(values, 0.9995))):
        assert 0.97 <= found / exact <= 1.3
    assert (seen.low, seen.high) == (-50.0, 900.0)
    assert activation(0, low=-50, high=900, typical_low=low, typical_high=high).outlier_ratio > 80


@pytest.mark.parametrize("values", [[0.0], [0.0, 2.0], [-3.0, -1.0], [1e-30, 1e30]])
def test_all_of_a_range_lies_between_its_ends(values: list[float]) -> None:
    seen = ObservedRange()
    seen.observe(np.asarray(values, np.float32))
    low, high = seen.between(1.0)
    assert seen.low <= low <= high <= seen.high
    assert low == pytest.approx(seen.low)
    assert high == pytest.approx(seen.high)


def test_a_range_that_saw_nothing_is_empty() -> None:
    assert ObservedRange().between(0.999) == (0.0, 0.0)


# Samples


@pytest.mark.parametrize(
    ("shape", "pictures"),
    [((20, 3, 40, 40), 6), ((20, 40, 30, 3), 6), ((20, 1, 28, 28), 6), ((3, 1, 300, 200), 3), ((20, 3, 4, 4), 0),
     ((20, 7, 40, 40), 0), ((20, 40), 0)],
)  # fmt: skip
def test_what_looks_like_images_is_pictured(shape: tuple[int, ...], pictures: int) -> None:
    (given,) = describe({"x": normal(*shape)})
    assert len(given.pictures) == pictures
    assert bool(given.values) is not bool(pictures)
    assert given.shape == shape[1:]


def test_a_picture_is_the_sample() -> None:
    import base64

    array = np.zeros((1, 3, 40, 30), np.float32)
    array[0, 0, :, :15] = 2.0  # red on the left, black on the right
    (given,) = describe({"x": array})
    picture = Image.open(io.BytesIO(base64.b64decode(given.pictures[0].split(",")[1]))).convert("RGB")
    assert picture.size == (90, 120) or picture.size == (60, 80)
    assert picture.getpixel((3, 40)) == (255, 0, 0)
    assert picture.getpixel((picture.width - 3, 40)) == (0, 0, 0)


def test_tokens_and_texts_are_shown_as_they_are() -> None:
    found = describe({"ids": np.arange(12).reshape(2, 6), "text": np.array([["a"], ["b"]], object)})
    assert found[0].values == ("0", "1", "2", "3", "4", "5")
    assert (found[0].low, found[0].high) == (0.0, 11.0)
    assert (found[1].values, found[1].low) == (("a",), None)


# What a run fills in


def test_a_run_fills_the_report_in(quantized: Callable[..., Done]) -> None:
    done = quantized(cnn(), exclude=("head",), bits=8)
    found = done.report
    assert [x.kernel for x in found.layers] == ["QLinearConv"] * 3
    sizes = {x.name: (x.bytes_before, x.bytes_after) for x in found.layers}
    for name, (before, after) in sizes.items():
        assert before == 4 * np.prod(next(x.weight_shape for x in found.layers if x.name == name))
        # a byte a weight, and a float32 scale a channel
        assert after == before // 4 + 4 * next(x.weight_shape[0] for x in found.layers if x.name == name)
    names = [a.name for a in found.activations]
    image = found.activations[names.index("image")]
    used = found.inputs[0]
    assert (image.low, image.high) == pytest.approx((used.low, used.high))
    assert image.low <= image.typical_low < image.typical_high <= image.high
    assert found.float_kernels
    json.loads(found.to_json(), parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert "pictures" not in found.to_json()
    assert "in_memory" not in found.to_json()
    assert "head" in Page(found.to_html()).text


def test_a_value_with_the_name_of_a_layer_is_not_taken_for_it(quantized: Callable[..., Done]) -> None:
    # what comes out of `one` is called `one` and read by another product
    made = build(
        """g (float[batch, 32] x) => (float[batch, 8] y) {
            [one] one = MatMul (x, w)
            [two] two = Gemm <transB = 1> (one, v, b)
            [three] y = MatMul (two, u)
        }""",
        {"w": weight(32, 24), "v": weight(16, 24), "b": normal(16), "u": weight(16, 8)},
    )
    kernels = {x.name: x.kernel for x in quantized(made).report.layers}
    assert kernels == {"one": "QLinearMatMul", "two": "QGemm", "three": "MatMulIntegerToFloat"}


def test_a_float_layer_is_seen_as_float(quantized: Callable[..., Done]) -> None:
    found = quantized(cnn(), activations="none").report
    assert {x.form for x in found.layers} == {"folded", "blocked"}
    assert all(x.runs_in_float for x in found.layers if x.form == "folded")
    assert [x.kernel for x in found.layers if x.form == "blocked"] == ["MatMulNBits"]


def test_the_command_of_a_report_does_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex
    import sys

    from comq_onnx.cli import command as cli

    onnx.save(mlp(), tmp_path / "m.onnx")
    np.savez(tmp_path / "s.npz", **samples_for(mlp()))
    options = {
        "bits": 3, "symmetric": False, "bits_for": (("fc2", 8),), "max_samples": 30, "independent": True, "seed": 4,
        "memory_gb": 0.5,
    }  # fmt: skip
    found = comq_onnx.quantize(tmp_path / "m.onnx", tmp_path / "q 1.onnx", tmp_path / "s.npz", **options)
    first = (tmp_path / "q 1.onnx").read_bytes()
    (tmp_path / "q 1.onnx").unlink()
    monkeypatch.setattr(sys, "argv", shlex.split(found.command))
    cli.main()
    assert (tmp_path / "q 1.onnx").read_bytes() == first


# Graphs in and out


@pytest.mark.parametrize("kind", ["path", "proto", "graphsurgeon"])
def test_a_model_comes_in_any_form_and_stays_in_memory(tmp_path: Path, kind: str) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    given = {"path": tmp_path / "m.onnx", "proto": mlp(), "graphsurgeon": gs.import_onnx(mlp())}[kind]
    before = sorted(tmp_path.iterdir())
    found = comq_onnx.quantize(given, samples=samples_for(mlp()), bits=4)
    assert sorted(tmp_path.iterdir()) == before
    assert found.output is None
    model = found.onnx_model()
    onnx.checker.check_model(model)
    # 4 bits of normal weights in two layers
    assert worst_sqnr(mlp(), model, samples_for(mlp())) > 12
    graph = found.graph()
    assert isinstance(graph, gs.Graph)
    again = gs.export_onnx(graph)
    again.ir_version = model.ir_version
    assert op_types(again) == op_types(model)
    feeds = samples_for(mlp())
    for name, array in infer(model, feeds).items():
        assert sqnr(array, infer(again, feeds)[name]) > 100
    assert "-o OUTPUT" in found.command
    assert ("MODEL" in found.command) is (kind != "path")


def test_two_models_in_memory_are_compared() -> None:
    given = samples_for(mlp())
    found = comq_onnx.quantize(mlp(), samples=given, bits=8)
    compared = comq_onnx.compare(mlp(), found.graph(), given, count=30, seconds=0)
    assert compared.samples == 30
    # 8 bits of normal weights and activations in two layers
    assert compared.outputs[0].sqnr_db > 25
    assert compared.kernels["QGemm"] == 2
    assert compared.size["after"] < compared.size["before"]


def test_samples_may_be_samples() -> None:
    made = comq_onnx.Samples(samples_for(mlp()), "mine")
    one, other = (comq_onnx.quantize(mlp(), samples=x, bits=8).in_memory for x in (made, made.arrays))
    assert one == other


def test_a_report_reads_the_model_it_wrote(tmp_path: Path) -> None:
    found = comq_onnx.quantize(mlp(), tmp_path / "q.onnx", samples_for(mlp()))
    assert found.onnx_model() == onnx.load(tmp_path / "q.onnx")
    with pytest.raises(ValueError, match="plan"):
        comq_onnx.plan(mlp()).onnx_model()


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match="cannot be written"):
        report().save_html(tmp_path / "no" / "report.html")
    with pytest.raises(errors.OptionError, match="cannot be written"):
        report().save_json(tmp_path)
    assert list(tmp_path.iterdir()) == []
