"""Test which activations are quantized: what integer layers read, never a mask, and what a Clip lets through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from comq_onnx.model.layers import Prepared
from comq_onnx.model.prepare import prepare_model
from comq_onnx.plan.activations import ActivationPlan, clip_bounds, plan_activations, runs_in_integers
from comq_onnx.targets.catalog import ORT_CPU


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "opset", "bounds"),
    [
        ("Relu", {}, {}, 21, (0, np.inf)),
        ("Clip", {"min": 0.0, "max": 6.0}, {}, 21, (0, 6)),
        ("Clip", {"min": 0.0}, {}, 21, (0, np.inf)),
        ("Clip", {"": None, "max": 6.0}, {}, 21, (-np.inf, 6)),
        ("Clip", {}, {}, 21, (-np.inf, np.inf)),
        ("Clip", {"min": -1.0, "max": 1.0}, {}, 21, (-1, 1)),
        ("Clip", {}, {"min": 0.0, "max": 6.0}, 6, (0, 6)),
        ("Clip", {"min": 0.5, "max": 6.0}, {}, 21, None),
        ("Clip", {"min": -2.0, "max": -1.0}, {}, 21, None),
        ("Clip", {"min": -2.0, "max": 0.0}, {}, 21, None),
        ("Clip", {"min": None, "max": 6.0}, {}, 21, None),
    ],
)
def test_what_a_clip_lets_through(op: str, inputs: dict, attributes: dict, opset: int, bounds: object) -> None:
    constants = [onnx.numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in inputs.items() if v is not None]
    free = [n for n, v in inputs.items() if v is None and n]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *inputs], ["y"], **attributes)],
        "clip",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, []) for n in ("x", *free)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        constants,
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10))
    assert clip_bounds(next(iter(model.graph))) == bounds


# Plans ----------------------------------------------------------------------------------------------------------------


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    """Make a node that is called like its first output."""
    return helper.make_node(op, inputs.split(), output.split(), name=output.split()[0], **attributes)


def prepare(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, tuple[int, ...] | np.ndarray | np.float32],
    x: Sequence[int | str],
    outputs: Sequence[str],
) -> Prepared:
    """Build a model of nodes and prepare it; weights: arrays, or the shapes of random ones."""
    rng = np.random.default_rng(0)
    arrays = {
        n: np.asarray(w) if isinstance(w, (np.ndarray, np.float32)) else 0.1 * rng.standard_normal(w).astype(np.float32)
        for n, w in weights.items()
    }
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return prepare_model(ir.from_proto(model), 21, 13)


def planned(prepared: Prepared, dtype: str | None = "uint8") -> ActivationPlan:
    """Plan the activations of a prepared model for ort-cpu."""
    return plan_activations(prepared.model, prepared.layers, ORT_CPU, dtype)


CONV = {"pads": [1, 1, 1, 1]}
IMAGE = ("n", 8, 12, 12)


def test_an_attention_mask_never_gets_a_scale() -> None:
    mask = np.triu(np.full((6, 6), np.finfo(np.float32).min, np.float32), 1)
    prepared = prepare(
        [
            node("MatMul", "x wq", "q0"),
            node("Add", "q0 bq", "q"),
            node("MatMul", "x wk", "k"),
            node("MatMul", "x wv", "v"),
            node("Transpose", "k", "kt", perm=[0, 2, 1]),
            node("MatMul", "q kt", "scores"),
            node("Mul", "scores tenth", "scaled"),
            node("Add", "scaled mask", "masked"),
            node("Softmax", "masked", "p"),
            node("MatMul", "p v", "o"),
            node("MatMul", "o wo", "r"),
            node("Add", "r x", "residual"),
            node("LayerNormalization", "residual gain", "normal"),
            node("MatMul", "normal w1", "up"),
            node("Relu", "up", "middle"),
            node("MatMul", "middle w2", "y"),
        ],
        {
            "wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "wo": (16, 16), "w1": (16, 32), "w2": (32, 16),
            "bq": (16,), "tenth": np.float32(0.1), "mask": mask, "gain": (16,),
        },
        ("n", 6, 16),
        ["y"],
    )  # fmt: skip
    plan = planned(prepared)
    assert len(plan.integer_layers) == 6
    # the inputs of the layers and nothing else: no mask, no masked scores, no residual, no softmax
    assert list(plan.values) == ["x", "o", "normal", "middle"]
    assert not any(v.everywhere for v in plan.values.values())
    assert all(plan.root(name) == name for name in plan.values)


def test_the_adds_of_a_residual_network_run_in_integers() -> None:
    prepared = prepare(
        [
            node("Conv", "x w0 b", "c0", **CONV),
            node("Relu", "c0", "r0"),
            node("Conv", "r0 w1 b", "c1", **CONV),
            node("Add", "c1 r0", "a1"),
            node("Relu", "a1", "r1"),
            node("Conv", "r1 w2 b", "c2", **CONV),
            node("Add", "c2 r1", "a2"),
            node("Relu", "a2", "r2"),
            node("GlobalAveragePool", "r2", "g"),
            node("Flatten", "g", "f"),
            node("Gemm", "f w3", "y"),
        ],
        {"w0": (8, 8, 3, 3), "w1": (8, 8, 3, 3), "w2": (8, 8, 3, 3), "b": (8,), "w3": (8, 20)},
        IMAGE,
        ["y"],
    )
    plan = planned(prepared)
    assert list(plan.values) == ["x", "r0", "c1", "r1", "c2", "r2", "g", "f"]
    assert plan.integer_layers == {layer.name for layer in prepared.layers}
    relu = (0.0, np.inf)
    assert {n: v.bounds for n, v in plan.values.items()} == {
        "x": None, "r0": relu, "c1": None, "r1": relu, "c2": None, "r2": relu, "g": None, "f": None,
    }  # fmt: skip
    assert [n for n, v in plan.values.items() if not v.everywhere] == ["x"]
    # Flatten only moves numbers: it keeps the scale of the pool
    assert plan.root("f") == "g"


def test_a_convolution_read_in_float_and_in_integers_has_one_value_for_all() -> None:
    prepared = prepare(
        [
            node("Conv", "x w0", "c0", **CONV),
            node("Conv", "c0 w1", "c1", **CONV),
            node("Erf", "c0", "e"),
            node("Add", "c1 e", "y"),
        ],
        {"w0": (8, 8, 3, 3), "w1": (8, 8, 3, 3)},
        IMAGE,
        ["y"],
    )
    plan = planned(prepared)
    # not y: one of the two that it adds is float
    assert list(plan.values) == ["x", "c0", "c1"]
    assert plan.values["c0"].everywhere
    assert not plan.values["x"].everywhere


def test_an_add_that_nothing_in_integers_reads_stays_float() -> None:
    prepared = prepare(
        [
            node("Conv", "x w0", "c0", **CONV),
            node("Conv", "x w1", "c1", **CONV),
            node("Add", "c0 c1", "a"),
            node("MaxPool", "a", "m", kernel_shape=[2, 2]),
            node("Erf", "m", "y"),
        ],
        {"w0": (8, 8, 3, 3), "w1": (8, 8, 3, 3)},
        IMAGE,
        ["y"],
    )
    assert list(planned(prepared).values) == ["x", "c0", "c1"]


def test_pools_and_reshapes_share_the_scale_of_what_they_read() -> None:
    prepared = prepare(
        [
            node("Conv", "x w0", "c0", **CONV),
            node("Clip", "c0 low high", "r0"),
            node("MaxPool", "r0", "m", kernel_shape=[2, 2], strides=[2, 2]),
            node("Transpose", "m", "t", perm=[0, 1, 3, 2]),
            node("Conv", "t w1", "y", **CONV),
        ],
        {"w0": (8, 8, 3, 3), "w1": (8, 8, 3, 3), "low": np.float32(0), "high": np.float32(6)},
        IMAGE,
        ["y"],
    )
    plan = planned(prepared)
    assert {n: plan.root(n) for n in plan.values} == {"x": "x", "r0": "r0", "m": "r0", "t": "r0", "y": "y"}
    assert plan.values["r0"].bounds == (0, 6)


def branches(left: str, right: str) -> Prepared:
    """Build two convolutions with an operator behind each, joined by a Concat and read by a third one."""
    return prepare(
        [
            node("Conv", "x w0", "c0", **CONV),
            node(left, "c0", "r0"),
            node("Conv", "x w1", "c1", **CONV),
            node(right, "c1", "r1"),
            node("Concat", "r0 r1", "both", axis=1),
            node("Conv", "both w2", "y", **CONV),
        ],
        {"w0": (8, 8, 3, 3), "w1": (8, 8, 3, 3), "w2": (8, 16, 3, 3)},
        IMAGE,
        ["y"],
    )


def test_what_is_only_put_together_shares_the_scale_of_the_whole() -> None:
    plan = planned(branches("Relu", "Relu"))
    assert {n: plan.root(n) for n in plan.values} == {"x": "x", "r0": "both", "r1": "both", "both": "both", "y": "y"}
    # no code of the whole is negative, or the Relus would not be fused
    assert plan.values["both"].bounds == (0, np.inf)


def test_parts_with_other_bounds_keep_their_own_scales() -> None:
    plan = planned(branches("Relu", "Identity"))
    assert all(plan.root(name) == name for name in plan.values)


def test_a_relu_that_others_look_behind_is_not_fused() -> None:
    prepared = prepare(
        [
            node("Conv", "x w0", "c0", **CONV),
            node("Relu", "c0", "r0"),
            node("Conv", "r0 w1", "c1", **CONV),
            node("Mul", "c1 c0", "y"),
        ],
        {"w0": (8, 8, 3, 3), "w1": (8, 8, 3, 3)},
        IMAGE,
        ["y"],
    )
    plan = planned(prepared)
    assert plan.values["c0"].everywhere
    assert plan.values["c0"].bounds is None
    assert not plan.values["r0"].everywhere


def test_without_activations_nothing_is_planned() -> None:
    prepared = prepare([node("Conv", "x w0", "y", **CONV)], {"w0": (8, 8, 3, 3)}, IMAGE, ["y"])
    plan = planned(prepared, None)
    assert not plan.values
    assert not plan.integer_layers


def test_sixteen_bits_are_planned_like_eight() -> None:
    prepared = prepare([node("Conv", "x w0", "y", **CONV)], {"w0": (8, 8, 3, 3)}, IMAGE, ["y"])
    assert planned(prepared, "uint16") == replace(planned(prepared), dtype="uint16")


@pytest.mark.parametrize(
    ("op", "inputs", "weight", "x", "attributes", "integer"),
    [
        ("Conv", "x w", (8, 8, 3, 3), IMAGE, {}, True),
        ("Conv", "x w", (8, 8, 3), ("n", 8, 12), {}, True),
        ("Conv", "x w", (16, 1, 3, 3), ("n", 16, 12, 12), {"group": 16}, True),
        ("ConvTranspose", "x w", (8, 8, 3, 3), IMAGE, {}, False),
        ("MatMul", "x w", (16, 16), ("n", 16), {}, True),
        ("MatMul", "x w", (16, 16), ("n", 5, 16), {}, True),
        ("MatMul", "w x", (16, 16), (16, "n"), {}, False),
        ("MatMul", "x w", (2, 16, 16), ("n", 2, 5, 16), {}, False),
        ("Gemm", "x w", (16, 16), ("n", 16), {"transB": 1}, True),
        ("Gemm", "x w", (16, 16), (16, "n"), {"transA": 1}, False),
    ],
)
def test_which_layers_run_in_integers(
    op: str, inputs: str, weight: tuple, x: tuple, attributes: dict, integer: bool
) -> None:
    prepared = prepare([node(op, inputs, "y", **attributes)], {"w": weight}, x, ["y"])
    (layer,) = prepared.layers
    assert runs_in_integers(layer, ORT_CPU) is integer
    assert planned(prepared).integer_layers == ({layer.name} if integer else set())
    assert ("x" in planned(prepared).values) is integer
