"""Sources that are quantized in part: what is left as it is, what is done beside it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from stages import planned

import comq_onnx
from comq_onnx.calibrate import stages
from comq_onnx.errors import ModelError
from comq_onnx.evaluate.kernels import executed_kernels
from comq_onnx.model.layers import list_layers
from comq_onnx.model.prepare import prepare_model
from comq_onnx.model.source import read_model
from models import Arrays, build, cnn, encoder, mlp, normal, op_types, samples_for, sentences, weight

Run = Callable[..., Any]
# steps of activations about as large as 1/255 and 1/20 of what random nets have
CONSTANTS: Arrays = {
    "s": np.float32(1 / 255), "s1": np.array([1 / 255], np.float32), "z1": np.array([0], np.uint8),
    "s2": np.float32(0.02), "z": np.uint8(0), "middle": np.uint8(128), "si": np.float32(0.04), "zi": np.int8(0),
}  # fmt: skip


def net(
    front: str = "xd = Identity (x)", back: str = "rd = Identity (r)", dtype: str = "float", opset: int = 17
) -> onnx.ModelProto:
    """Build x -> `front` makes xd -> Conv, Relu, r -> `back` makes rd -> Conv, Relu, mean, Gemm -> y [batch, 10]."""
    text = f"""net ({dtype}[batch, 3, 12, 12] x) => (float[batch, 10] y) {{
        {front}
        [c1] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (xd, w1, b1)
        r = Relu (a)
        {back}
        [c2] b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (rd, w2, b2)
        rb = Relu (b)
        g = GlobalAveragePool (rb)
        f = Flatten (g)
        [head] y = Gemm <transB = 1> (f, w3, b3)
    }}"""
    weights = {
        "w1": weight(16, 3, 3, 3, fan=27), "b1": normal(16, scale=0.1), "w2": weight(16, 16, 3, 3, fan=144),
        "b2": normal(16, scale=0.1), "w3": weight(10, 16, fan=16), "b3": normal(10, scale=0.1), **CONSTANTS,
    }  # fmt: skip
    words = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    return build(text, {name: array for name, array in weights.items() if name in words}, opset=opset)


def pixels(count: int = 40) -> Arrays:
    return {"x": np.random.default_rng(3).integers(0, 256, (count, 3, 12, 12)).astype(np.uint8)}


def samples(model: onnx.ModelProto) -> Arrays:
    return pixels() if model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8 else samples_for(model)


def nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the node that makes each value."""
    return {name: node for node in model.graph.node for name in node.output}


def chain(model: onnx.ModelProto, layer: str) -> list[str]:
    """Return the operators that make a layer's input, from the last back to an operator of another type."""
    made = nodes(model)
    name = next(node for node in model.graph.node if node.name == layer).input[0]
    found = []
    while name in made and "quantizeLinear" in made[name].op_type.replace("Q", "q"):
        found.append(made[name].op_type)
        name = made[name].input[0]
    return found


def constants(model: onnx.ModelProto) -> Mapping[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


# Quantized activations
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [10, 13, 21])
def test_an_image_behind_a_dequantize_linear_is_no_quantized_model(quantized: Run, opset: int) -> None:
    model = net("xd = DequantizeLinear (x, s, z)", dtype="uint8", opset=opset)
    done = quantized(model, pixels(), activations="8", floor=35)
    assert [layer.form for layer in done.report.layers] == ["integer"] * 3
    # its codes are those of the image: it is not rounded again
    assert chain(done.model, "c1") == ["DequantizeLinear"]
    assert done.report.kernels["QLinearConv"] == 2


PAIR = "q = QuantizeLinear (r, {0})\nrd = DequantizeLinear (q, {0})"
ACTIVATIONS = {
    "unsigned": (PAIR.format("s2, z"), 2),
    "one element": (PAIR.format("s1, z1"), 2),
    "signed": (PAIR.format("si, zi"), 6),
    "without a zero point": (PAIR.format("s2"), 6),
    "dynamic": ("q, qs, qz = DynamicQuantizeLinear (r)\nrd = DequantizeLinear (q, qs, qz)", 6),
}


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_a_pair_of_the_source_is_taken_over_where_it_has_the_form_of_the_target(quantized: Run, form: str) -> None:
    back, pairs = ACTIVATIONS[form]
    done = quantized(net(back=back), activations="8", floor=30)
    assert done.report.kernels["QLinearConv"] == 2
    # in another form, pairs of our own stand before and behind the source's
    assert len(chain(done.model, "c2")) == pairs


def test_a_pair_of_the_source_is_read_by_layers_that_read_its_input(quantized: Run) -> None:
    # the pair comes after the first reader of r, and that one is told apart
    pair = PAIR.format("s2, z").replace("rd", "d")
    back = f"m = MaxPool <kernel_shape = [1, 1]> (r)\n{pair}\nrd = Add (m, d)"
    done = quantized(net(back=back), activations="8", floor=30)
    made = nodes(done.model)
    assert made[made["m"].input[0]].op_type == "DequantizeLinear"
    assert sum(node.op_type == "QuantizeLinear" and node.input[0] == "r" for node in done.model.graph.node) == 1
    assert done.report.kernels["QLinearConv"] == 2


def test_a_relu_that_the_pair_behind_it_does_not_hold_leaves_its_layer_in_floats(quantized: Run) -> None:
    # codes below 128 stand for negative numbers, so that ONNX Runtime keeps the Relu, and with it the Conv in floats
    done = quantized(net(back=PAIR.format("si, middle")), activations="8", floor=30)
    assert {x.name: (x.form, x.kernel) for x in done.report.layers} == {
        "c1": ("folded", "Conv"),
        "c2": ("integer", "QLinearConv"),
        "head": ("integer", "QGemm"),
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_between_pairs_is_not_rounded_twice(quantized: Run, bits: int) -> None:
    # ONNX Runtime would round a float weight between two pairs to 8 bits, whatever it was rounded to before
    between = "q = QuantizeLinear (r, s2, z)\nrd = DequantizeLinear (q, s2, z)"
    text = net("xd = DequantizeLinear (x, s, z)", between, dtype="uint8")
    done = quantized(text, pixels(), activations="none", bits=bits, uniform=True, floor=15)
    assert [(x.name, x.form) for x in done.report.layers] == [("c1", "integer"), ("c2", "folded"), ("head", "blocked")]
    assert executed_kernels(done.out).of_layer["c1"] == "QLinearConv"
    # nothing is rounded that was not before
    assert op_types(done.model).count("QuantizeLinear") == 1


def test_half_precision_behind_a_dequantize_linear(quantized: Run) -> None:
    model = build(
        """g (uint8[batch, 32] x) => (float16[batch, 16] y) {
            h = DequantizeLinear <output_dtype = 10> (x, s, z)
            [fc] y = MatMul (h, w)
        }""",
        {"w": weight(32, 16, dtype=np.float16), "s": np.float32(0.01), "z": np.uint8(0)},
        opset=23,
        ir_version=10,
    )
    done = quantized(model, {"x": np.random.default_rng(0).integers(0, 256, (40, 32)).astype(np.uint8)}, floor=35)
    assert [x.name for x in done.report.layers] == ["fc"]


def test_other_runtimes_are_warned_of_pairs_that_they_do_not_read(quantized: Run) -> None:
    model = net(back=PAIR.format("si, middle"))
    assert not [w for w in quantized(model, activations="8").report.warnings if "source itself" in w]
    (warning,) = [w for w in quantized(model, target="tensorrt").report.warnings if "source itself" in w]
    assert "activations are uint8; tensorrt takes int8 and 1 more" in warning


# Quantized weights
# ----------------------------------------------------------------------------------------------------------------------


def in_part(tmp_path: Path, model: onnx.ModelProto, given: Arrays, **options: Any) -> Path:
    """Quantize some layers of a model, and return the file."""
    path = tmp_path / "part.onnx"
    made = comq_onnx.quantize(model, None, given, device="cpu", **options).onnx_model()
    # those of the second run take their place
    del made.metadata_props[:]
    onnx.save(made, path)
    return path


OWN: dict[str, tuple[onnx.ModelProto, dict[str, Any]]] = {
    "integer": (cnn(), {"include": ("stem", "point"), "bits": 8, "activations": "8"}),
    "packed": (cnn(), {"exclude": ("head",), "bits": 4, "activations": "8"}),
    "folded": (cnn(), {"include": ("stem",), "bits": 4, "activations": "none"}),
    "planes": (mlp(width=256), {"include": ("fc1",), "bits": 3, "activations": "8"}),
    "blocks": (mlp(), {"include": ("fc2",), "bits": 4, "activations": "none"}),
    "looked up": (encoder(), {"include": ("embed", "q"), "bits": 4}),
    "looked up, TensorRT": (encoder(), {"exclude": ("up",), "bits": 4, "target": "tensorrt"}),
}


@pytest.mark.parametrize("activations", ["8", "none"])
@pytest.mark.parametrize("form", OWN)
def test_what_was_quantized_before_stays_and_the_rest_is_done(
    quantized: Run, tmp_path: Path, form: str, activations: str
) -> None:
    model, options = OWN[form]
    given = sentences() if form.startswith("looked") else samples_for(model)
    path = in_part(tmp_path, model, given, **options)
    before = onnx.load(path)
    done = quantized(path, given, activations=activations, floor=25)
    first = [x.name for x in comq_onnx.plan(model, given, **options).layers]
    second = [x.name for x in done.report.layers]
    whole = [x.name for x in comq_onnx.plan(model, given, bits=8).layers]
    assert sorted([*first, *second]) == sorted(whole)
    assert sum("quantized already" in reason for reason in done.report.skipped.values()) == len(first)
    # what was stored is stored as it was: no codes have become floats, and none were rounded again
    old, new = constants(before), constants(done.model)
    for name, array in old.items():
        if ".codes" in name:
            assert np.array_equal(array.astype(int), new[name].astype(int)), name
    names = [node.name for node in done.model.graph.node]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "ort-cuda"])
def test_pairs_of_the_source_are_no_fault_of_ours(tmp_path: Path, target: str) -> None:
    # its names are those of our own nodes
    path = in_part(tmp_path, encoder(), sentences(), include=("embed", "q"), bits=4)
    report = comq_onnx.quantize(path, tmp_path / "out.onnx", sentences(), device="cpu", bits=8, target=target)
    assert min(o.sqnr_db for o in report.outputs) > 25
    assert {"k", "v", "out", "up", "head"} == {x.name for x in report.layers}


def test_weights_behind_a_quantize_linear_are_quantized(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 16] y) {
            wq = QuantizeLinear (w, s, z)
            wd = DequantizeLinear (wq, s, z)
            [fc1] h = MatMul (x, wd)
            [fc2] y = MatMul (h, v)
        }""",
        {"w": weight(32, 32), "v": weight(32, 16), "s": np.float32(0.01), "z": np.int8(0)},
    )
    done = quantized(model, floor=30)
    assert [x.name for x in done.report.layers] == ["fc2"]
    assert done.report.skipped == {"fc1": "MatMul: its weight is quantized already (FLOAT behind a QuantizeLinear)"}


OPERATORS = {
    "ConvInteger": (
        """q, qs, qz = DynamicQuantizeLinear (x)
        i = ConvInteger <kernel_shape = [3, 3]> (q, w, qz)
        c = Cast <to = 1> (i)
        h = Mul (c, qs)""",
        {"w": np.random.default_rng(0).integers(-9, 9, (8, 3, 3, 3)).astype(np.int8)},
    ),
    "QLinearConv": (
        """q = QuantizeLinear (x, s, z)
        i = QLinearConv (q, s, z, w, sw, zw, so, z)
        h = DequantizeLinear (i, so, z)""",
        {
            "w": np.random.default_rng(0).integers(-99, 99, (8, 3, 3, 3)).astype(np.int8), "s": np.float32(0.03),
            "z": np.uint8(128), "sw": np.float32(0.002), "zw": np.int8(0), "so": np.float32(0.03),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", OPERATORS)
def test_operators_of_integer_weights_are_left(quantized: Run, op: str) -> None:
    text, weights = OPERATORS[op]
    model = build(
        f"""g (float[batch, 3, 8, 8] x) => (float[batch, 12, 4, 4] y) {{
            {text}
            [rest] y = Conv <kernel_shape = [3, 3]> (h, v)
        }}""",
        {**weights, "v": weight(12, 8, 3, 3, fan=72)},
    )
    done = quantized(model, floor=25)
    assert [x.name for x in done.report.layers] == ["rest"]
    assert list(done.report.skipped.values()) == [f"{op}: its weight is quantized already (INT8)"]
    assert op in op_types(done.model)


def test_a_table_of_one_number_a_row_is_left(tmp_path: Path) -> None:
    model = build(
        """g (int64[batch, seq] ids) => (float[batch, seq, 8] y) {
            [scales] s = Gather (column, ids)
            [words] e = Gather (table, ids)
            p = Mul (s, e)
            [fc] y = MatMul (p, w)
        }""",
        {"column": normal(500, 1), "table": normal(500, 16), "w": weight(16, 8)},
    )
    onnx.save(model, tmp_path / "m.onnx")
    layers, skipped = list_layers(prepare_model(read_model(tmp_path / "m.onnx"), 17, 13).model)
    assert [x.name for x in layers] == ["words", "fc"]
    assert skipped == {"scales": "Gather: one number a row, for which a scale would take as much"}


def test_weights_that_nodes_make_are_kept_at_no_cut(tmp_path: Path) -> None:
    path = in_part(tmp_path, encoder(), sentences(), include=("out", "head"), bits=8, activations="8")
    plan = planned(path, sentences()).plan
    parts = stages.cut(plan.walked.model, plan.walked.layers)
    cut = {name for stage in parts for name in (*stage.live_after, *stage.makes)}
    assert {"out.weight", "head.weight"} <= {v.name for node in plan.walked.model.graph for v in node.outputs}
    assert not cut & {"out.weight", "head.weight"}


# What is refused
# ----------------------------------------------------------------------------------------------------------------------


def all_quantized(tmp_path: Path) -> Path:
    return in_part(tmp_path, mlp(), samples_for(mlp()), bits=8)


def test_its_own_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refusal:
        comq_onnx.quantize(all_quantized(tmp_path), tmp_path / "again.onnx", samples_for(mlp()))
    assert str(refusal.value).endswith(
        "already quantized (the weights of 1 Gemm, 1 MatMul are, and no other layer has as many as 128); give the "
        "float model it was made from"
    )
    assert not (tmp_path / "again.onnx").exists()


def test_a_float_weight_that_comes_by_other_nodes_is_no_quantized_model(quantized: Run) -> None:
    # seen before anything is folded
    model = build(
        """g (float[batch, 32] x) => (float[batch, 16] y) {
            wd = DequantizeLinear <axis = 1> (w, s)
            [fc1] h = MatMul (x, wd)
            t = Transpose <perm = [1, 0]> (v)
            [fc2] y = MatMul (h, t)
        }""",
        {
            "w": np.random.default_rng(0).integers(-99, 99, (32, 32)).astype(np.int8),
            "s": np.full(32, 0.002, np.float32), "v": weight(16, 32),
        },
    )  # fmt: skip
    done = quantized(model, floor=25)
    assert [x.name for x in done.report.layers] == ["fc2"]


def test_what_is_left_out_does_not_make_a_model_quantized(tmp_path: Path) -> None:
    path = in_part(tmp_path, mlp(), samples_for(mlp()), include=("fc1",), bits=8)
    with pytest.raises(
        ModelError, match=r"no layer to quantize .*left out: fc1: Gemm: its weight is quantized already"
    ):
        comq_onnx.quantize(path, tmp_path / "out.onnx", samples_for(mlp()), exclude=("fc2",))
