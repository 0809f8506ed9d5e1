"""Test which values stand for an output that says too little: parts that are joined, values that are selected from."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from detectors import joined, selecting

from comq_onnx.model.judged import Judged, judged
from models import attention, build, cnn, encoder, normal, tokens, weight


def of(model: onnx.ModelProto) -> Judged:
    return judged(ir.from_proto(onnx.shape_inference.infer_shapes(model)))


@pytest.mark.parametrize("make", [cnn, attention, encoder, tokens], ids=lambda make: make.__name__)
def test_an_output_of_one_unit_stands_for_itself(make: object) -> None:
    found = of(make())  # type: ignore[operator]
    assert found.is_plain
    assert found.whole == list(found.values)
    assert found.selected == frozenset()


@pytest.mark.parametrize("moved", [False, True])
def test_an_output_that_a_concat_joins_is_judged_by_its_parts(moved: bool) -> None:
    found = of(joined(moved))
    assert found.values == {"y": ("boxes", "scores")}
    assert not found.is_plain
    assert found.selected == frozenset()


def test_concats_of_concats_are_taken_apart_and_constants_left_out() -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 50] y) {
            a = MatMul (x, w)
            b = Sigmoid (a)
            c = Concat <axis = 1> (a, b)
            rows = Shape <start = 0, end = 1> (x)
            d = Concat <axis = 1> (c, x)
            e = Concat <axis = 1> (d, ones)
            y = Identity (e)
        }""",
        {"w": weight(32, 8), "ones": np.ones((1, 2), np.float32)},
    )
    assert of(model).values == {"y": ("a", "b", "x")}


def test_an_output_of_many_parts_is_judged_as_a_whole() -> None:
    parts = "\n".join(f"p{i} = Mul (x, s{i})" for i in range(20))
    joined_parts = ", ".join(f"p{i}" for i in range(20))
    model = build(
        f"g (float[batch, 4] x) => (float[batch, 80] y) {{ {parts}  y = Concat <axis = 1> ({joined_parts}) }}",
        {f"s{i}": np.float32(i) for i in range(20)},
    )
    assert of(model).is_plain


def test_what_is_selected_is_judged_by_what_it_is_selected_from() -> None:
    found = of(selecting())
    assert found.values == {"found": ("boxes", "scores"), "which": ("boxes", "scores")}
    assert found.selected == {"found", "which"}


def test_a_threshold_selects_by_the_scores_before_it() -> None:
    model = build(
        """g (float[batch, 32] x) => (int64[2, n] y) {
            [fc] a = MatMul (x, w)
            scores = Sigmoid (a)
            good = Greater (scores, limit)
            sure = And (good, good)
            y = NonZero (sure)
        }""",
        {"w": weight(32, 8), "limit": np.float32(0.5)},
    )
    assert of(model).values == {"y": ("scores",)}


def test_what_a_mask_selects_is_no_matter_of_quantization() -> None:
    model = build(
        """g (float[batch, 32] x, int64[batch] mask) => (float[n, 8] y) {
            places = NonZero (mask)
            flat = Transpose (places)
            rows = GatherND (x, flat)
            [fc] y = MatMul (rows, w)
        }""",
        {"w": weight(32, 8)},
    )
    assert of(model).is_plain


def test_the_best_rows_are_a_selection_and_a_router_inside_is_none() -> None:
    best = """g (float[batch, 32] x) => (float[batch, 3] y, int64[batch, 3] which) <int64[1] three = {3}> {
            [fc] a = MatMul (x, w)
            y, which = TopK (a, three)
        }"""
    assert of(build(best, {"w": weight(32, 8)})).values == {"y": ("a",), "which": ("a",)}
    routed = """g (float[batch, 32] x) => (float[batch, 3, 4] y) <int64[1] three = {3}> {
            [router] a = MatMul (x, w)
            best, which = TopK (a, three)
            chosen = Gather <axis = 0> (table, which)
            [expert] y = MatMul (chosen, v)
        }"""
    found = of(build(routed, {"w": weight(32, 8), "table": normal(8, 16), "v": weight(16, 4)}))
    assert found.is_plain
