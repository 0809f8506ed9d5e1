"""Test that layers inside If, Loop and Scan are quantized, whether the samples reach them or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import comq_onnx
from comq_onnx.bits import survey
from comq_onnx.errors import ModelError
from models import build, codes, normal, samples_for, weight, worst_sqnr

Run = Callable[..., Any]
DRAWN = {"w1": weight(32, 16), "w2": weight(16, 10)}


def forms(report: comq_onnx.Report) -> dict[str, str]:
    """Return the form of each layer of a report, by its name."""
    return {layer.name: layer.form for layer in report.layers}


def branches(condition: str) -> onnx.ModelProto:
    """Build a layer in each branch of an If, whose condition `flag` is made by `condition`."""
    return build(
        f"""g (float[batch, 32] x) => (float[batch, 10] y) {{
            [fc1] h = MatMul (x, w1)
            {condition}
            b = If (flag) <
                then_branch = then_graph () => (float[batch, 16] t) {{
                    [then_layer] tm = MatMul (h, wt)
                    t = Tanh (tm)
                }},
                else_branch = else_graph () => (float[batch, 16] e) {{
                    [else_layer] em = MatMul (h, we)
                    e = Tanh (em)
                }}
            >
            [fc2] y = MatMul (b, w2)
        }}""",
        {
            **DRAWN,
            "wt": weight(16, 16),
            "we": weight(16, 16, seed=5),
            "zero": np.float32(0),
            "many": np.int64(1000),
            "axes": np.array([0, 1]),
        },
    )


# more than 1000 numbers: a batch of more than 31 rows of 32
BY_SIZE = "n = Size (x)\nflag = Greater (n, many)"
BY_SIGN = "s = ReduceSum <keepdims = 0> (x, axes)\nflag = Greater (s, zero)"
ALWAYS = "a = Abs (x)\ns = ReduceSum <keepdims = 0> (a, axes)\nflag = Greater (s, zero)"


def test_the_layers_of_a_branch_that_all_samples_take_are_quantized(quantized: Run) -> None:
    report = quantized(branches(ALWAYS), activations="8").report
    assert forms(report) == {
        "fc1": "integer", "then_layer": "integer", "else_layer": "folded", "fc2": "integer",
    }  # fmt: skip


def test_both_branches_work_after_quantization(tmp_path: Path) -> None:
    out, model, x = tmp_path / "q.onnx", branches(BY_SIZE), normal(40, 32)
    report = comq_onnx.quantize(model, out, {"x": x}, bits=8, device="cpu", batch_size=16)
    # batches of 16 hold 512 numbers: all of them take the else branch
    assert set(forms(report)) == {"fc1", "then_layer", "else_layer", "fc2"}
    for count in (16, 40):
        assert worst_sqnr(model, out, {"x": x[:count]}) >= 25


def test_the_layers_of_both_branches_are_calibrated_on_the_samples_that_take_them(quantized: Run, solved: Any) -> None:
    samples = {"x": normal(48, 6, 32)}
    positive = sum(x.sum() > 0 for x in samples["x"])
    assert 12 < positive < 36
    model = branches(BY_SIGN)
    reached = {}
    for solver in ("rtn", "comq"):
        done = quantized(model, samples, per_item=True, bits=3, solver=solver, uniform=True, floor=5)
        assert set(forms(done.report)) == {"fc1", "then_layer", "else_layer", "fc2"}
        assert not [note for note in done.report.notes if "do not reach" in note]
        reached[solver] = done.sqnr
    assert reached["comq"] > reached["rtn"] + 1
    # six positions each of the calibration samples
    assert solved.on["then_layer"].count + solved.on["else_layer"].count == solved.on["fc1"].count


def test_a_branch_that_the_surveyed_samples_do_not_take_is_surveyed_on_all(
    quantized: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "SURVEYED", 2)
    x = np.abs(normal(48, 6, 32))
    x[::8] *= -1
    report = quantized(branches(BY_SIGN), {"x": x}, per_item=True, bits=3, floor=3).report
    assert set(forms(report)) == {"fc1", "then_layer", "else_layer", "fc2"}


def test_layers_of_one_name_in_two_branches_are_told_apart(quantized: Run) -> None:
    model = branches(ALWAYS)
    for node in model.graph.node:
        for attribute in node.attribute:
            for inner in attribute.g.node:
                inner.name = f"same_{inner.op_type}"
    # had the untaken branch's layer been solved in place of the taken one's, its weight would be another
    report = quantized(model).report
    assert len(report.layers) == 4
    assert not report.skipped


def test_a_nested_if_is_followed(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 10] y) {
            [fc1] h = MatMul (x, w1)
            a = Abs (x)
            s = ReduceMax <keepdims = 0> (a)
            outer = GreaterOrEqual (s, zero)
            b = If (outer) <
                then_branch = one () => (float[batch, 16] t) {
                    inner = Less (s, zero)
                    t = If (inner) <
                        then_branch = two () => (float[batch, 16] u) { u = Relu (h) },
                        else_branch = three () => (float[batch, 16] v) { [deep] v = MatMul (h, wt) }
                    >
                },
                else_branch = four () => (float[batch, 16] e) { e = Tanh (h) }
            >
            [fc2] y = MatMul (b, w2)
        }""",
        {**DRAWN, "wt": weight(16, 16), "zero": np.float32(0)},
    )
    assert set(forms(quantized(model).report)) == {"fc1", "deep", "fc2"}


def test_a_constant_condition_is_no_condition(quantized: Run) -> None:
    model = branches("flag = Identity (yes)")
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    first, inner, last = forms(quantized(model).report)
    assert (first, last) == ("fc1", "fc2")
    assert inner.endswith("then_layer")


def test_layers_in_the_body_of_a_loop_are_listed_and_the_loop_still_runs(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 16] y) <int64 trips = {3}, bool yes = {1}> {
            [fc] h = MatMul (x, w1)
            [loop] y = Loop (trips, yes, h) <
                body = body (int64 i, bool go, float[batch, 16] before) => (bool go_on, float[batch, 16] after) {
                    [inner] m = MatMul (before, w)
                    after = Tanh (m)
                    go_on = Identity (go)
                }
            >
        }""",
        {"w1": DRAWN["w1"], "w": weight(16, 16)},
    )
    assert forms(quantized(model).report) == {"fc": "integer", "inner": "folded"}


def test_layers_in_the_body_of_a_scan_are_listed_and_the_scan_still_runs(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 16] y) {
            [fc] h = MatMul (x, w1)
            [scan] y = Scan <num_scan_inputs = 1,
                body = body (float[16] row) => (float[16] out) {
                    [inner] m = MatMul (row, w)
                    out = Tanh (m)
                }
            > (h)
        }""",
        {"w1": DRAWN["w1"], "w": weight(16, 16)},
    )
    assert forms(quantized(model).report) == {"fc": "integer", "inner": "folded"}


def shared(condition: str = "flag = Identity (use)") -> onnx.ModelProto:
    """Build an If whose branches read the same two weights, as a merged decoder's do."""
    return build(
        f"""g (float[batch, 48] x, bool[1] use) => (float[batch, 48] y) {{
            {condition}
            y = If (flag) <
                then_branch = one () => (float[batch, 48] t) {{
                    [then_up] ta = MatMul (x, up)
                    tb = Relu (ta)
                    [then_down] t = MatMul (tb, down)
                }},
                else_branch = two () => (float[batch, 48] e) {{
                    [else_up] ea = MatMul (x, up)
                    eb = Tanh (ea)
                    [else_down] e = MatMul (eb, down)
                }}
            >
        }}""",
        {"up": weight(48, 96), "down": weight(96, 48)},
    )


@pytest.mark.parametrize("taken", ["both", "then", "else"])
@pytest.mark.parametrize("activations", ["none", "8"])
def test_a_weight_that_branches_share_is_quantized_once(quantized: Run, taken: str, activations: str) -> None:
    use = {"both": np.arange(40)[:, None] % 2 == 0, "then": np.ones((40, 1), bool), "else": np.zeros((40, 1), bool)}
    samples = {"x": normal(40, 1, 48), "use": use[taken]}
    done = quantized(shared(), samples, per_item=True, activations=activations)
    assert set(forms(done.report)) == {"then_up", "then_down", "else_up", "else_down"}
    assert set(codes(done.out)) == {"up.codes", "down.codes"}
    # also the nodes that unpack it in each branch
    assert done.out.stat().st_size < 0.42 * done.source.stat().st_size
    # also in the branch that no sample takes
    for flag in (True, False):
        assert worst_sqnr(shared(), done.out, {"x": samples["x"][:, 0], "use": np.array([flag])}) >= 25
    notes = [note for note in done.report.notes if "do not reach" in note]
    assert bool(notes) == (taken != "both")
    assert all("2 take the weights of others" in note for note in notes)


def test_layers_that_no_sample_shows_are_rounded_to_eight_bits(quantized: Run) -> None:
    done = quantized(branches(ALWAYS), bits=3, floor=8, uniform=True)
    assert {x.name: x.bits for x in done.report.layers if "layer" in x.name} == {"then_layer": 3, "else_layer": 8}
    (note,) = [note for note in done.report.notes if "do not reach" in note]
    assert "1 are rounded to 8 bits: else_layer (MatMul: in a branch that no sample takes)" in note
    asked = quantized(branches(ALWAYS), bits=3, bits_for=(("else_layer", 5),), floor=8, uniform=True)
    assert {x.bits for x in asked.report.layers if x.name == "else_layer"} == {5}


@pytest.mark.parametrize("options", [{"bits": "auto", "size": "95%"}, {"bits": "auto", "max_drop": "20dB"}])
def test_a_budget_leaves_unseen_layers_their_bits(quantized: Run, options: dict[str, Any]) -> None:
    report = quantized(branches(ALWAYS), floor=5, **options).report
    assert {x.bits for x in report.layers if x.name == "else_layer"} == {8}


def test_samples_that_reach_no_layer_are_refused(tmp_path: Path) -> None:
    model = build(
        """g (float[batch, 32] x, bool[1] use) => (float[batch, 16] y) {
            y = If (use) <
                then_branch = one () => (float[batch, 16] t) { [layer] t = MatMul (x, w1) },
                else_branch = two () => (float[batch, 16] e) { e = Slice (x, zero, end, axis) }
            >
        }""",
        {"w1": DRAWN["w1"], "zero": np.array([0]), "end": np.array([16]), "axis": np.array([1])},
    )
    samples = {"x": normal(8, 1, 32), "use": np.zeros((8, 1), bool)}
    with pytest.raises(ModelError, match=r"reach no layer .*in a branch that no sample takes"):
        comq_onnx.quantize(model, tmp_path / "q.onnx", samples)


def test_layers_of_a_body_that_read_from_outside_are_calibrated(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 16] y) <int64 trips = {3}, bool yes = {1}> {
            [fc] h = MatMul (x, w1)
            y = Loop (trips, yes, h) <
                body = body (int64 i, bool go, float[batch, 16] before) => (bool go_on, float[batch, 16] after) {
                    [outside] m = MatMul (x, w)
                    [inside] n = MatMul (before, w3)
                    s = Add (m, n)
                    after = Tanh (s)
                    go_on = Identity (go)
                }
            >
        }""",
        {"w1": DRAWN["w1"], "w": weight(32, 16, seed=3), "w3": weight(16, 16)},
    )
    report = quantized(model, samples_for(model)).report
    assert forms(report) == {"fc": "integer", "outside": "folded", "inside": "folded"}
    assert not [note for note in report.notes if "do not reach" in note]


def test_layers_too_deep_to_be_calibrated_are_rounded(quantized: Run) -> None:
    model = build(
        """g (float[batch, 16] x) => (float[batch, 16] y) <int64 trips = {2}, bool yes = {1}> {
            [fc] h = MatMul (x, w0)
            y = Loop (trips, yes, h) <
                body = body (int64 i, bool go, float[batch, 16] before) => (bool go_on, float[batch, 16] after) {
                    t = If (go) <
                        then_branch = one () => (float[batch, 16] u) { [deep] u = MatMul (before, w) },
                        else_branch = two () => (float[batch, 16] v) { v = Relu (before) }
                    >
                    after = Tanh (t)
                    go_on = Identity (go)
                }
            >
        }""",
        {"w": weight(16, 16), "w0": weight(16, 16, seed=2)},
    )
    report = quantized(model).report
    assert forms(report) == {"fc": "integer", "deep": "folded"}
    (note,) = [note for note in report.notes if "do not reach" in note]
    assert "too deep in the subgraphs of a Loop" in note
