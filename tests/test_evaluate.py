"""Test how near two outputs are, against numpy; the counts of kernels in ONNX Runtime's graph; exact sessions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from detectors import images, selecting
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import comq_onnx
from comq_onnx.evaluate import speed
from comq_onnx.evaluate.kernels import INTEGER_KERNELS, executed_kernels
from comq_onnx.evaluate.outputs import compare_outputs
from comq_onnx.evaluate.speed import latency
from comq_onnx.metrics import looks_like_scores, sqnr_of
from comq_onnx.runtime.session import Session
from comq_onnx.samples.load import load_samples
from models import mlp, samples_for


def sqnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the SQNR of one output in dB, by its definition."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum())


def model(op: str, *outputs: str, **attributes: object) -> bytes:
    """Build a model of one operator on x, once for each of the outputs."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], [n], **attributes) for n in outputs],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 12])],
        values,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return made.SerializeToString()


def session(op: str, *outputs: str, **attributes: object) -> Session:
    """Load a model of one operator."""
    return Session(model(op, *outputs, **attributes), threads=1)


# sqnr_of --------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.floats(1e-4, 10), st.sampled_from([np.float16, np.float32, np.float64]))
def test_the_sqnr_of_one_output_is_the_definition(seed: int, noise: float, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((4, 9)).astype(dtype)
    b = (a + noise * rng.standard_normal((4, 9))).astype(dtype)
    if (a == b).all():
        return
    # both add up in float64
    assert sqnr_of({"y": a}, {"y": b}) == pytest.approx(sqnr(a, b), abs=1e-9)


def test_the_worst_output_counts() -> None:
    a = np.asarray([1.0, 2.0, 3.0], np.float32)
    near, far = a + np.float32(0.01), a + np.float32(1)
    found = sqnr_of({"p": a, "q": a}, {"p": near, "q": far})
    assert found == sqnr_of({"p": a, "q": a}, {"p": far, "q": near}) == pytest.approx(sqnr(a, far))


def test_equal_outputs_have_the_highest_sqnr_there_is() -> None:
    a = np.ones((2, 3), np.float32)
    assert sqnr_of({"y": a}, {"y": a.copy()}) == 200
    assert sqnr_of({}, {}) == 200
    assert sqnr_of({"y": np.zeros(3, np.float32)}, {"y": np.zeros(3, np.float32)}) == 200


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.ones((2, 3), np.float32), np.ones((3, 2), np.float32)),
        (np.arange(3), np.asarray([0, 1, 3])),
        (np.asarray([True, False]), np.asarray([True, True])),
        (np.asarray(["a", "b"], object), np.asarray(["a", "c"], object)),
        (np.ones(3, np.float32), [np.ones(3, np.float32)]),
    ],
)
def test_what_is_not_the_same_has_no_sqnr(first: object, second: object) -> None:
    assert sqnr_of({"y": first}, {"y": second}) == -np.inf
    assert sqnr_of({"y": first, "z": np.ones(1, np.float32)}, {"y": second, "z": np.ones(1, np.float32)}) == -np.inf


def test_an_output_that_is_gone_has_no_sqnr() -> None:
    assert sqnr_of({"y": np.ones(3, np.float32)}, {}) == -np.inf


def test_integers_and_strings_need_only_be_equal() -> None:
    both = {"i": np.arange(3), "s": np.asarray(["a"], object), "b": np.asarray([True])}
    assert sqnr_of(both, {k: v.copy() for k, v in both.items()}) == 200


def test_the_same_infinities_agree_and_others_are_all_noise() -> None:
    a = np.asarray([1, 2, np.inf, -np.inf], np.float32)
    assert sqnr_of({"y": a}, {"y": a.copy()}) == 200
    b = np.asarray([1, 2.5, np.inf, -np.inf], np.float32)
    assert sqnr_of({"y": a}, {"y": b}) == pytest.approx(sqnr(a[:2], b[:2]))
    # a number that an infinity replaces counts as much noise as the mean square of the signal: 2.5 against 5
    for wrong in ([1, 2, -np.inf, -np.inf], [1, 2, 7, -np.inf], [1, 2, np.nan, -np.inf]):
        found = sqnr_of({"y": a}, {"y": np.asarray(wrong, np.float32)})
        assert found == pytest.approx(10 * np.log10(5 / 2.5))
    assert np.isfinite(sqnr_of({"y": a}, {"y": np.full(4, np.nan, np.float32)}))


def test_nan_agrees_with_nothing() -> None:
    a = np.asarray([1, np.nan], np.float32)
    assert sqnr_of({"y": a}, {"y": a.copy()}) < 200


# Class scores ---------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((5, 10)).astype(np.float32)
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
EMBEDDINGS = LOGITS / np.linalg.norm(LOGITS, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("output", "scores"),
    [
        (LOGITS, True),
        (PROBABILITIES, True),
        (PROBABILITIES.astype(np.float16), True),
        (PROBABILITIES[None], True),
        (EMBEDDINGS, False),
        (LOGITS[0], False),
        (LOGITS[:, :1], False),
        (LOGITS[:0], False),
        (LOGITS.astype(np.int64), False),
        (LOGITS[None], False),
        (np.tile(LOGITS, (1, 100))[None], True),
        (RNG.standard_normal((2, 3, 8, 8)).astype(np.float32), False),
        (RNG.standard_normal((2, 3, 8, 2000)).astype(np.float32), False),
    ],
)
def test_what_looks_like_class_scores(output: np.ndarray, scores: bool) -> None:
    assert looks_like_scores(output) is scores


# Whole models ---------------------------------------------------------------------------------------------------------


def samples(array: np.ndarray, of: Session):
    return load_samples({"x": array}, of.inputs, None, len(array), 0)


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_outputs_are_compared_over_all_batches(batch: int) -> None:
    """Load an array as the samples of a model's input x."""
    x = RNG.standard_normal((20, 12)).astype(np.float32)
    before, after = session("Elu", "y", alpha=1.0), session("Elu", "y", alpha=0.5)
    (found,) = compare_outputs(before, after, samples(x, before), batch)
    a, b = before.run({"x": x})["y"].astype(np.float64), after.run({"x": x})["y"].astype(np.float64)
    # both add up in float64, in other orders
    assert found.name == "y"
    assert found.sqnr_db == pytest.approx(sqnr(a, b), abs=1e-9)
    assert found.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    assert found.top1_agreement == np.mean(a.argmax(-1) == b.argmax(-1))


def test_top1_agreement_counts_the_rows_whose_winner_stays() -> None:
    x = RNG.standard_normal((20, 12)).astype(np.float32)
    before, after = session("Identity", "y"), session("Abs", "y")
    (found,) = compare_outputs(before, after, samples(x, before), 8)
    wanted = np.mean(x.argmax(-1) == np.abs(x).argmax(-1))
    assert found.top1_agreement == wanted
    assert 0 < wanted < 1


def test_embeddings_have_no_agreement() -> None:
    x = RNG.standard_normal((6, 12)).astype(np.float32)
    before, after = session("LpNormalization", "y", axis=-1, p=2), session("LpNormalization", "y", axis=-1, p=1)
    (found,) = compare_outputs(before, after, samples(x, before), 4)
    assert found.top1_agreement is None
    assert found.cosine == pytest.approx(1, abs=0.02)


def test_equal_models_agree_wholly() -> None:
    x = RNG.standard_normal((6, 12)).astype(np.float32)
    one = session("Relu", "y")
    (found,) = compare_outputs(one, session("Relu", "y"), samples(x, one), 4)
    assert (found.sqnr_db, found.top1_agreement) == (200, 1)
    assert found.cosine == pytest.approx(1, rel=1e-12)


def test_a_dead_output_has_no_similarity_and_two_dead_ones_have_all() -> None:
    x = -np.abs(RNG.standard_normal((6, 12)).astype(np.float32))
    dead, alive = session("Relu", "y"), session("Neg", "y")
    assert compare_outputs(dead, session("Relu", "y"), samples(x, dead), 4)[0].cosine == 1
    found = compare_outputs(alive, dead, samples(x, alive), 4)[0]
    assert found.cosine == 0
    assert found.sqnr_db == 0


def test_only_outputs_of_both_are_compared_and_shapes_must_match() -> None:
    x = RNG.standard_normal((4, 12)).astype(np.float32)
    before, after = session("Relu", "y", "only before"), session("Relu", "only after", "y")
    assert [f.name for f in compare_outputs(before, after, samples(x, before), 4)] == ["y"]
    flat = session("ReduceSum", "y", keepdims=0)
    (found,) = compare_outputs(session("Relu", "y"), flat, samples(x, before), 4)
    assert found.sqnr_db == -np.inf
    assert found.top1_agreement is None


def test_integers_are_not_compared() -> None:
    x = RNG.standard_normal((4, 12)).astype(np.float32)
    proto = onnx.load_from_string(model("ArgMax", "y"))
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    one = Session(proto.SerializeToString(), threads=1)
    assert compare_outputs(one, one, samples(x, one), 4) == []


def test_every_model_is_timed() -> None:
    x = RNG.standard_normal((4, 12)).astype(np.float32)
    pair = [session("Relu", "y"), session("Erf", "y")]
    times = latency(pair, samples(x, pair[0]), seconds=0)
    assert len(times) == 2
    assert all(t > 0 for t in times)


def test_the_kernels_of_a_graph_are_counted_subgraphs_included(tmp_path: Path) -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        nodes = [helper.make_node(op, ["x"], [f"{name}_in"]), helper.make_node("Erf", [f"{name}_in"], [name])]
        return helper.make_graph(nodes, name, [], [out])

    graph = helper.make_graph(
        [
            helper.make_node("If", ["c"], ["y"], then_branch=branch("a", "Neg"), else_branch=branch("b", "Abs")),
            helper.make_node("Sqrt", ["y"], ["z"]),
        ],
        "choice",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3]), helper.make_tensor_value_info("c", 9, [])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [3])],
    )
    path = tmp_path / "choice.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    found = executed_kernels(path)
    assert found.counts == {"If": 1, "Sqrt": 1, "Neg": 1, "Abs": 1, "Erf": 2}
    assert found.integer == {}
    assert found.float_behind_dequantize == 0
    assert [p.name for p in tmp_path.iterdir()] == ["choice.onnx"]


def test_a_float_product_behind_a_dequantization_is_found(tmp_path: Path) -> None:
    """Test a weight-only Conv in QDQ form, which ONNX Runtime dequantizes at every call."""
    scale = onnx.numpy_helper.from_array(np.asarray(0.1, np.float32), "s")
    weight = onnx.numpy_helper.from_array(RNG.integers(-9, 9, (4, 3, 3, 3)).astype(np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["w", "s"], ["wf"]), helper.make_node("Conv", ["x", "wf"], ["y"])],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight, scale],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    found = executed_kernels(tmp_path / "m.onnx")
    assert found.float_behind_dequantize == 1
    assert not INTEGER_KERNELS & set(found.counts)


# Sessions -------------------------------------------------------------------------------------------------------------


def weight_only(codes: np.ndarray, scale: np.ndarray, block: int) -> bytes:
    """Build x @ (codes * scale), which becomes MatMulNBits.

    codes: [in, out], stored as INT4; scale: [in / block, out]
    """
    weight = helper.make_tensor("w", TensorProto.INT4, codes.shape, codes.ravel())
    attributes = {"axis": 0, "block_size": block}
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["wf"], **attributes),
            helper.make_node("MatMul", ["x", "wf"], ["y"]),
        ],
        "weight only",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", len(codes)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight, onnx.numpy_helper.from_array(scale, "s")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return made.SerializeToString()


def test_an_exact_session_keeps_activations_float() -> None:
    codes = RNG.integers(-8, 8, (128, 48))
    scale = RNG.uniform(0.05, 0.2, (4, 48)).astype(np.float32)
    x = RNG.standard_normal((32, 128)).astype(np.float32)
    model = weight_only(codes, scale, 32)
    reference = x.astype(np.float64) @ (codes * np.repeat(scale, 32, axis=0))
    exact, default = (Session(model, threads=1, float_matmul_nbits=exact).run({"x": x})["y"] for exact in (True, False))
    # float32 sums of 128 products: 7 digits less one
    assert sqnr(reference, exact) >= 80
    # int8 of a block of 32 normal numbers is 127 steps up to some 2.2 deviations: 45 dB, where there is such a kernel
    assert sqnr(reference, default) >= 38


def test_an_exact_session_changes_nothing_without_such_products() -> None:
    x = RNG.standard_normal((4, 12)).astype(np.float32)
    one, other = (
        Session(model("Erf", "y"), threads=1, float_matmul_nbits=exact).run({"x": x})["y"] for exact in (True, False)
    )
    assert np.array_equal(one, other)


def test_models_that_select_are_compared_by_the_rows_that_both_give(tmp_path: Path) -> None:
    onnx.save(selecting(), tmp_path / "before.onnx")
    comq_onnx.quantize(tmp_path / "before.onnx", tmp_path / "after.onnx", images(), bits=8, device="cpu")
    found = comq_onnx.compare(tmp_path / "before.onnx", tmp_path / "after.onnx", images(16), seconds=0.0)
    assert found.outputs == []
    assert [match.name for match in found.matches] == ["found", "which"]
    assert min(match.share for match in found.matches) > 0.8


@pytest.mark.parametrize(("given", "advised"), [("none", "auto"), ("auto", "none"), ("8", "none")])
def test_a_slower_model_is_warned_of_with_an_option_that_was_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, advised: str
) -> None:
    monkeypatch.setattr(speed, "latency", lambda *_: [1.0, 2.0])
    source = mlp()
    report = comq_onnx.quantize(source, tmp_path / "q.onnx", samples_for(source), activations=given, device="cpu")
    warning = next(w for w in report.warnings if "slower than its source (2 against 1 ms)" in w)
    assert f"--activations {advised}," in warning
