"""Test what is pointed out in a report, and that the page and the terminal show it."""

from __future__ import annotations

import re

from reports import Page, activation, layer, plan, printed, report

from comq_onnx.metrics import OutputComparison
from comq_onnx.report.advice import advise, pattern


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


def test_no_advice_names_what_was_given() -> None:
    moved = [OutputComparison("embedding", 5.0, 0.8, None)]
    given = {"used": 112, "held_back": 16}
    for options, words in (
        ({"bits": 4, "activations": "auto"}, "--bits 8 or --activations none;"),
        ({"bits": 4, "activations": "none"}, "--bits 8;"),
        ({"bits": "auto", "activations": "none"}, "a larger --size or a smaller --max-drop;"),
    ):
        (hint,) = advise(report(layers=[layer(0)], outputs=moved, options=options, samples=given))
        assert hint.remedy.startswith(words)
    (hint,) = advise(report(layers=[layer(0)], outputs=moved, samples={"used": 28, "held_back": 4}))
    assert "128 samples or more" in hint.remedy


def test_a_part_that_is_noise_is_told_beside_classes_that_agree() -> None:
    outputs = [OutputComparison("logits", 25.0, 1.0, 0.99), OutputComparison("y: scores", 4.0, 0.7, None)]
    assert advise(report(outputs=outputs))[0].found == "SQNR 4.0 dB"


def test_a_layer_that_missed_its_kernel_is_told() -> None:
    (hint,) = advise(report(layers=[layer(0), layer(1, kernel="Conv")]))
    assert "1 layer written for integer kernels" in hint.found
    assert "/features/block1/conv" in hint.found


def test_the_page_and_the_terminal_give_the_advice() -> None:
    moved = report(outputs=[OutputComparison("logits", 5.0, 0.8, 0.81)])
    assert "top-1 agreement 81.0%" in Page(moved.to_html()).text
    assert "hint: top-1 agreement 81.0%" in printed(moved)


def test_the_terminal_shows_the_worst_layers_or_all() -> None:
    many = report(40)
    assert printed(many).count("/features/") == 8
    assert printed(many, verbose=True).count("/features/") == 40
    assert "0.60 MB (15%)" in printed(many)
