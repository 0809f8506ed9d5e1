"""Test what a report shows of changes: weights of the worst layers, answers, and which layers a layer reads."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Done

from comq_onnx.metrics import MOST_CHANGED, ComparisonSums, OutputComparison
from comq_onnx.model.prepare import prepare_model
from comq_onnx.report import changes, flow
from comq_onnx.report.changes import BINS, MOST_ANSWERS, changed_answers
from models import build, cnn, normal


def test_a_run_counts_the_weights_of_the_layers_that_lose_most(quantized: Callable[..., Done]) -> None:
    found = quantized(cnn(), bits=3, uniform=True, floor=5.0).report
    layers = {layer.name: layer for layer in found.layers}
    worst = sorted(found.layers, key=lambda layer: -(layer.error_db or 0.0))[:4]
    assert [one.name for one in found.histograms] == [layer.name for layer in worst]
    for one in found.histograms:
        count = np.prod(layers[one.name].weight_shape)
        assert (sum(one.before), sum(one.after)) == (count, count)
        assert len(one.edges) == BINS + 1
        # a code of 3 bits stands for few sizes, and they are about where the weights were
        middles = (np.array(one.edges[1:]) + one.edges[:-1]) / 2
        spread = [float(np.average(middles**2, weights=counts)) for counts in (one.before, one.after)]
        assert spread[1] == pytest.approx(spread[0], rel=0.4)


def test_of_large_layers_some_channels_are_counted_and_of_the_largest_none(
    quantized: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MOST_COUNTED", 100)
    monkeypatch.setattr(changes, "MOST_READ", 1000)
    found = quantized(cnn(), uniform=True).report
    sizes = {layer.name: math.prod(layer.weight_shape) for layer in found.layers}
    assert {one.name for one in found.histograms} == {name for name, size in sizes.items() if size <= 1000}
    for one in found.histograms:
        assert sum(one.before) == sum(one.after)
        # of 144 weights every second, of 432 and 160 every fifth and second
        assert sum(one.before) <= 112 < 144 <= sizes[one.name]


def test_rows_with_another_best_class_are_known() -> None:
    before, after = np.eye(5, 4, dtype=np.float32)[[0, 1, 2, 3, 0]], np.eye(5, 4, dtype=np.float32)[[0, 2, 2, 1, 0]]
    sums = ComparisonSums()
    sums.add(before, after)
    sums.add(before, after)
    assert sums.result("y").changed == ((1, 1, 2), (3, 3, 1), (6, 1, 2), (8, 3, 1))
    for _ in range(20):
        sums.add(before, after)
    assert len(sums.result("y").changed) == MOST_CHANGED
    # positions of a text are no samples
    longer = ComparisonSums(scores=True)
    longer.add(before[None], after[None])
    assert longer.result("y").changed == ()
    same = ComparisonSums()
    same.add(before, before)
    assert same.result("y").changed == ()


def test_answers_that_changed_are_shown_where_samples_are_pictures() -> None:
    images = np.random.default_rng(0).random((9, 3, 20, 20), np.float32)
    outputs = [
        OutputComparison("y", 20.0, 1.0, 0.9, ((1, 3, 4), (8, 0, 2), (9, 1, 2))),
        OutputComparison("z", 9.0, 1.0, None),
    ]
    found = changed_answers(outputs, {"n": np.zeros((9, 2)), "x": images})
    # row 9 is no sample: the output has more rows than there are samples
    assert [(a.output, a.sample, a.before, a.after) for a in found] == [("y", 1, 3, 4), ("y", 8, 0, 2)]
    assert all(answer.picture.startswith("data:image/png;base64,") for answer in found)
    assert found[0].picture != found[1].picture
    assert changed_answers(outputs, {"n": np.zeros((9, 2))}) == []
    many = [OutputComparison(str(i), 20.0, 1.0, 0.9, ((1, 3, 4),)) for i in range(20)]
    assert len(changed_answers(many, {"x": images})) == MOST_ANSWERS


def test_a_layer_reads_those_whose_outputs_come_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: normal(16, 16) for name in ("a", "b", "c", "d")}
    model = build(
        """g (float[n, 16] x) => (float[n, 16] y) {
          p = MatMul (x, a)
          q = Relu (p)
          r = MatMul (q, b)
          s = Add (r, q)
          t = MatMul (s, c)
          y = MatMul (t, d)
        }""",
        weights,
    )
    prepared = prepare_model(ir.from_proto(model), 21, 21)
    first, second, third, fourth = (layer.name for layer in prepared.layers)
    assert flow.layers_before(prepared.model, prepared.layers) == {
        first: (), second: (first,), third: (first, second), fourth: (third,),
    }  # fmt: skip
    # of many the nearest
    monkeypatch.setattr(flow, "MOST_BEFORE", 1)
    assert flow.layers_before(prepared.model, prepared.layers)[third] == (second,)
