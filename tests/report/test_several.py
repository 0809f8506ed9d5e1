"""Test the comparison of several runs: the table, the page, and reports that come back from JSON."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from reports import Page, layer, report
from rich.console import Console

from comq_onnx.errors import OptionError
from comq_onnx.metrics import LanguageComparison, OutputComparison
from comq_onnx.report import several, several_page
from comq_onnx.report.changes import ChangedAnswer
from comq_onnx.report.read import read_runs
from comq_onnx.report.several import Run


def runs() -> list[Run]:
    """Make two runs of one model, one that failed and one that was copied."""
    better = report(
        latency_ms={"before": 10.0, "after": 4.0}, options={"bits": 8, "activations": "auto"},
        warnings=["a <b> warning"],
        outputs=[OutputComparison("logits", 31.0, 0.999, 0.99), OutputComparison("boxes", 28.5, 0.998, None)],
        layers=[layer(i, error_db=-40.0) for i in range(12)],
    )  # fmt: skip
    return [
        Run("four.onnx", report()), Run("eight.onnx", better), Run("bad.onnx", None, said="<no> model", failed=True),
        Run("post.onnx", None, said="it has no layer"),
    ]  # fmt: skip


def printed(shown: list[Run]) -> list[str]:
    """Return the lines that a terminal would show, each with one space between its words."""
    out = io.StringIO()
    Console(file=out, width=150).print(several.table(shown))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_the_table_has_a_line_for_each_with_the_worst_output() -> None:
    lines = printed(runs())
    assert lines[1] == "model MB size layers SQNR dB agreement speed s peak MB warnings"
    assert lines[2] == "four.onnx 4.00 -> 0.60 15% 12 24.3 97.0% 2.00x 11 500"
    assert lines[3] == "eight.onnx 4.00 -> 0.60 15% 12 28.5 99.0% 2.50x 11 500 1"
    assert lines[4:6] == ["bad.onnx failed", "post.onnx copied"]
    assert "failed: bad.onnx: <no> model" in lines
    assert "warning: eight.onnx: a <b> warning" in lines


def test_the_page_tells_all_of_them_and_needs_nothing_else(tmp_path: Path) -> None:
    several_page.save_html(runs(), tmp_path / "all.html")
    text = (tmp_path / "all.html").read_text(encoding="utf-8")
    page = Page(text)
    for words in (
        "2 of 4",
        "1 failed, 1 copied",
        "bad.onnx failed. <no> model",
        "a <b> warning",
        "it has no layer",
        "28.5",
    ):
        assert words in page.text
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == ["all_models/01-four.html", "all_models/02-eight.html"]
    assert all((tmp_path / str(link)).is_file() for link in links)
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "iframe", "img")]
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_page_shows_the_options_in_which_runs_differ() -> None:
    page = Page(several_page.render(runs(), "compared")).text
    assert re.search("Options that differ option 1 2 bits 4 8 Warnings", page)


def test_runs_of_the_same_layers_are_compared_layer_by_layer() -> None:
    assert 'id="errors"' in several_page.render(runs(), "compared")
    others = [*runs()[:1], Run("other.onnx", report(5))]
    assert 'id="errors"' not in several_page.render(others, "compared")


@pytest.mark.parametrize("empty", [[], [Run("bad.onnx", None, said="no", failed=True)]])
def test_where_none_was_quantized_there_is_a_page_too(empty: list[Run]) -> None:
    assert f"0 of {len(empty)}" in Page(several_page.render(empty, "compared")).text


def test_reports_come_back_from_json(tmp_path: Path) -> None:
    whole = report(
        language=LanguageComparison("logits", 0.1, 0.9, 100, {"before": 3.0, "after": 3.1}),
        peak_rss_mb=float("inf"), inputs=[], answers=[ChangedAnswer("logits", 3, 1, 2)],
    )  # fmt: skip
    whole.save_json(tmp_path / "one.json")
    (read,) = read_runs(tmp_path / "one.json")
    assert read.report == whole
    several.save_json(runs(), tmp_path / "all.json")
    found = read_runs(tmp_path / "all.json")
    assert [(run.name, run.said, run.failed) for run in found] == [(r.name, r.said, r.failed) for r in runs()]
    assert [run.report and run.report.layers for run in found] == [r.report and r.report.layers for r in runs()]


@pytest.mark.parametrize("content", ["no json", "[1]", "{}", '{"models": [1]}', '{"layers": 3}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(OptionError, match="is no report"):
        read_runs(tmp_path / "r.json")
