"""Test how models are prepared: every place where a weight can be, and every model that cannot be quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import comq_onnx
from comq_onnx.errors import ModelError, OptionError
from comq_onnx.model.prepare import prepare_model
from models import (
    batchnorm_cnn,
    build,
    cnn,
    codes,
    infer,
    mlp,
    normal,
    op_types,
    samples_for,
    several_inputs,
    sqnr,
    tokens,
    weight,
    worst_sqnr,
)

Run = Callable[..., Any]
DRAWN = {"w1": weight(32, 16), "w2": weight(16, 10)}


def names(report: comq_onnx.Report) -> list[str]:
    """List the layers of a report."""
    return [layer.name for layer in report.layers]


def two_layers(way: str, weights: dict[str, np.ndarray], **options: Any) -> onnx.ModelProto:
    """Build x [batch, 32] -> MatMul by `w`, which `way` makes -> Relu -> MatMul -> y [batch, 10]."""
    return build(
        f"""g (float[batch, 32] x) => (float[batch, 10] y) {{
            {way}
            [fc1] h = MatMul (x, w)
            r = Relu (h)
            [fc2] y = MatMul (r, w2)
        }}""",
        {"w2": DRAWN["w2"], **weights},
        **options,
    )


# Ordinary models


@pytest.mark.parametrize("make", [mlp, cnn, batchnorm_cnn, several_inputs])
def test_small_models_keep_their_outputs_at_8_bits(quantized: Run, make: Callable[[], onnx.ModelProto]) -> None:
    # the least of these nets reaches 35 dB
    quantized(make(), floor=30)


@pytest.mark.parametrize("int_type", ["int64", "int32"])
def test_an_embedding_is_a_layer(quantized: Run, int_type: str) -> None:
    report = quantized(tokens(int_type)).report
    assert names(report) == ["embed", "proj", "head"]
    assert (report.layers[0].op, report.layers[0].bits) == ("Gather", 8)


def test_an_embedding_behind_which_float_operators_stand_is_a_layer(quantized: Run) -> None:
    model = build(
        """g (int64[batch, seq] ids) => (float[batch, seq, 10] y) <int64[1] last = {-1}> {
            [embed] e = Gather (table, ids)
            n = LayerNormalization (e, one, zero)
            [fc] y = MatMul (n, w)
        }""",
        {
            "table": normal(50, 16),
            "one": np.ones(16, np.float32),
            "zero": np.zeros(16, np.float32),
            "w": weight(16, 10),
        },
    )
    assert names(quantized(model).report) == ["embed", "fc"]


# Where weights hide


WAYS = {
    "Constant": ("w = Constant <value = float[32, 16] w_value {NUMBERS}> ()", {}),
    "Identity": ("w = Identity (w1)", {"w1": DRAWN["w1"]}),
    "two Identities": ("wi = Identity (w1)\nw = Identity (wi)", {"w1": DRAWN["w1"]}),
    "Transpose": ("w = Transpose <perm = [1, 0]> (w1)", {"w1": DRAWN["w1"].T.copy()}),
    "Reshape": ("w = Reshape (w1, shape)", {"w1": DRAWN["w1"].reshape(-1), "shape": np.array([32, 16])}),
    "Cast": ("w = Cast <to = 1> (w1)", {"w1": DRAWN["w1"].astype(np.float16)}),
    "Unsqueeze": ("w = Squeeze (w1, axes)", {"w1": DRAWN["w1"][None], "axes": np.array([0])}),
    "Transpose of a Cast": (
        "wc = Cast <to = 1> (w1)\nw = Transpose <perm = [1, 0]> (wc)",
        {"w1": DRAWN["w1"].T.astype(np.float16)},
    ),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_behind_an_operator_is_found_and_folded(quantized: Run, way: str, bits: int) -> None:
    text, weights = WAYS[way]
    numbers = ", ".join(f"{n:.6f}" for n in DRAWN["w1"].ravel())
    # 4 bits give some 17 dB for one layer of normal weights; two in a row and ragged widths a little less
    done = quantized(
        two_layers(text.replace("NUMBERS", numbers), weights), bits=bits, floor={8: 30, 4: 12}[bits], solver="comq"
    )
    assert names(done.report) == ["fc1", "fc2"]
    assert all(
        numpy_helper.to_array(t).dtype.kind != "f" or t.dims[:2] != [32, 16] for t in done.model.graph.initializer
    )


def test_a_weight_two_layers_share_is_stored_once(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 32] y) {
            [a] h = MatMul (x, w)
            r = Tanh (h)
            [b] s = MatMul (r, w)
            [c] y = MatMul (s, w3)
        }""",
        {"w": weight(32, 32), "w3": weight(32, 32, seed=3)},
    )
    done = quantized(model)
    assert names(done.report) == ["a", "b", "c"]
    codes = [t for t in done.model.graph.initializer if list(t.dims) == [32, 32]]
    assert len(codes) == 2


def test_one_weight_on_one_input_is_solved_for_both_readers(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 16] y, float[batch, 16] z) {
            [a] y = MatMul (x, w)
            [b] h = MatMul (x, w)
            z = Neg (h)
        }""",
        {"w": weight(32, 16)},
    )
    done = quantized(model)
    outputs = infer(done.out, done.samples)
    np.testing.assert_array_equal(outputs["y"], -outputs["z"])


def test_an_initializer_that_is_also_an_input_is_a_weight(quantized: Run) -> None:
    # IR 3, as old exporters write: every initializer is listed among the inputs
    model = mlp(opset=9, ir_version=3)
    for tensor in list(model.graph.initializer):
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert names(quantized(model).report) == ["fc1", "fc2"]


def test_a_layer_inside_a_function_is_inlined(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 10] y) {
            h = local.dense (x, w1)
            y = local.dense (h, w2)
        }
        <domain: "local", opset_import: ["" : 17]>
        dense (a, b) => (c) {
            m = MatMul (a, b)
            c = Relu (m)
        }""",
        DRAWN,
        domains=["local"],
    )
    done = quantized(model)
    assert len(done.report.layers) == 2
    assert not done.model.functions


@pytest.mark.parametrize("op", ["Gelu", "CDist"])
def test_an_operator_of_another_domain_is_passed_through(quantized: Run, op: str) -> None:
    text = {"Gelu": "r = com.microsoft.Gelu (h)", "CDist": 'r = com.microsoft.CDist <metric = "euclidean"> (h, w3)'}
    model = build(
        f"""g (float[batch, 32] x) => (float[batch, 10] y) {{
            [fc1] h = MatMul (x, w1)
            {text[op]}
            [fc2] y = MatMul (r, w2)
        }}""",
        {**DRAWN, "w3": weight(16, 16)},
        domains=["com.microsoft"],
    )
    done = quantized(model)
    assert op in op_types(done.model)
    assert names(done.report) == ["fc1", "fc2"]
    assert ("CDist" in str(done.report.skipped)) == (op == "CDist")


def test_dropout_and_identity_vanish(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 10] y) {
            i = Identity (x)
            [fc1] h = MatMul (i, w1)
            d = Dropout (h)
            e = Identity (d)
            [fc2] y = MatMul (e, w2)
        }""",
        DRAWN,
    )
    done = quantized(model)
    assert names(done.report) == ["fc1", "fc2"]
    assert not {"Dropout", "Identity"} & set(op_types(done.model))


def test_a_model_whose_output_is_an_input_as_it_came_is_quantized(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 10] y, float[batch, 32] same) {
            [fc1] h = MatMul (x, w1)
            [fc2] y = MatMul (h, w2)
            same = Identity (x)
        }""",
        DRAWN,
    )
    done = quantized(model)
    np.testing.assert_array_equal(infer(done.out, done.samples)["same"], done.samples["x"])


def test_an_intermediate_that_is_an_output_too_keeps_its_name(quantized: Run) -> None:
    model = build(
        """g (float[batch, 3, 8, 8] x) => (float[batch, 8, 6, 6] r, float[batch, 8, 4, 4] y) {
            [a] h = Conv (x, w1)
            r = Relu (h)
            [b] y = Conv (r, w2)
        }""",
        {"w1": weight(8, 3, 3, 3, fan=27), "w2": weight(8, 8, 3, 3, fan=72)},
    )
    quantized(model)


# BatchNorm


def test_outputs_keep_the_dimensions_that_the_source_declares(quantized: Run) -> None:
    model = cnn(opset=13)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    shown = quantized(model).model.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param for dim in shown] == ["batch", "classes"]


def test_two_flattens_of_one_value_are_kept(quantized: Run) -> None:
    """Folding makes Reshapes of them, whose shapes are two constants of one name."""
    model = build(
        """two (float[batch, 4, 8] x) => (float[batch, 10] y, float[batch, 12] z) {
            r = Relu (x)
            a = Flatten (r)
            y = MatMul (a, w1)
            b = Flatten (r)
            z = MatMul (b, w2)
        }""",
        {"w1": weight(32, 10), "w2": weight(32, 12)},
    )
    assert len(quantized(model, bits=4, floor=15).report.layers) == 2


def test_folding_a_batchnorm_changes_no_output() -> None:
    model = ir.from_proto(batchnorm_cnn())
    prepared = prepare_model(model, 17, 13)
    assert "BatchNormalization" not in {node.op_type for node in prepared.model.graph}
    assert len(prepared.layers) == 2
    # a float32 sum in another order: 24 bits less the logarithm of some hundred terms is well above 90 dB
    assert worst_sqnr(batchnorm_cnn(), ir.to_proto(prepared.model), samples_for(batchnorm_cnn())) > 90


def test_a_folded_batchnorm_leaves_the_convolutions_their_names(quantized: Run) -> None:
    done = quantized(batchnorm_cnn())
    assert "BatchNormalization" not in op_types(done.model)
    assert names(done.report) == ["conv1", "conv2"]


def test_a_batchnorm_whose_convolution_has_another_reader_is_left(quantized: Run) -> None:
    model = build(
        """g (float[batch, 3, 8, 8] x) => (float[batch, 8, 6, 6] y, float[batch, 8, 6, 6] z) {
            [a] h = Conv (x, w1)
            y = BatchNormalization (h, scale, shift, mean, var)
            z = Relu (h)
        }""",
        {
            "w1": weight(8, 3, 3, 3, fan=27),
            "scale": 1 + normal(8, scale=0.3),
            "shift": normal(8),
            "mean": normal(8, scale=0.3, seed=4),
            "var": np.abs(1 + normal(8, scale=0.2)),
        },
    )
    quantized(model)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1), (1, 1, 1), (1,), (6,), (6, 6), (8, 6, 6), (2, 1, 1, 1)])
def test_a_constant_added_behind_a_convolution_stays_what_it_was(shape: tuple[int, ...]) -> None:
    model = build(
        """g (float[2, 3, 8, 8] x) => (float[2, 8, 6, 6] y) {
            [a] h = Conv (x, w1)
            y = Add (h, constant)
        }""",
        {"w1": weight(8, 3, 3, 3, fan=27), "constant": normal(*shape)},
    )
    prepared = prepare_model(ir.from_proto(model), 17, 13)
    # as with the BatchNorm: a float32 sum in another order
    assert worst_sqnr(model, ir.to_proto(prepared.model), {"x": normal(2, 3, 8, 8)}) > 90


def test_a_hardswish_written_out_stays_what_it_was(quantized: Run) -> None:
    model = build(
        """g (float[batch, 3, 8, 8] x) => (float[batch, 8, 6, 6] y)
        <float three = {3}, float zero = {0}, float six = {6}> {
            [a] h = Conv (x, w1)
            p = Add (h, three)
            c = Clip (p, zero, six)
            m = Mul (h, c)
            y = Div (m, six)
        }""",
        {"w1": weight(8, 3, 3, 3, fan=27)},
    )
    quantized(model, {"x": normal(40, 3, 8, 8, scale=3)})


# Opsets


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21, 22])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_any_opset_ends_where_4_bit_weights_exist(
    quantized: Run, make: Callable[..., onnx.ModelProto], opset: int
) -> None:
    # 4 bits of normal weights give some 17 dB a layer, random nets of a few layers 12 and more
    done = quantized(make(opset=opset), bits=4, floor=10)
    assert max(o.version for o in done.model.opset_import if o.domain == "") >= 21
    assert any(t.data_type == TensorProto.INT4 for t in done.model.graph.initializer)


def test_an_opset_above_the_needed_one_is_kept(quantized: Run) -> None:
    done = quantized(mlp(opset=22), bits=8)
    assert [o.version for o in done.model.opset_import if o.domain == ""] == [22]


# Other number types


def half(dtype: int) -> onnx.ModelProto:
    """Build a Conv, a Gemm and a scaling, everything in float16 or bfloat16."""
    name = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}[dtype]
    model = build(
        f"""g ({name}[batch, 3, 8, 8] x) => ({name}[batch, 10] y) {{
            [conv] a = Conv <kernel_shape = [3, 3]> (x, w1)
            r = Relu (a)
            g = GlobalAveragePool (r)
            f = Flatten (g)
            [head] l = Gemm (f, w2, b2)
            y = Mul (l, two)
        }}"""
    )
    arrays = {
        "w1": weight(16, 3, 3, 3, fan=27),
        "w2": weight(16, 10),
        "b2": normal(10, scale=0.1),
        "two": np.array(2.0),
    }
    for key, array in arrays.items():
        model.graph.initializer.append(helper.make_tensor(key, dtype, array.shape, array.ravel().tolist()))
    return model


def test_a_float16_model_keeps_float16_inputs_and_outputs(quantized: Run) -> None:
    done = quantized(half(TensorProto.FLOAT16))
    assert names(done.report) == ["conv", "head"]
    assert infer(done.out, done.samples)["y"].dtype == np.float16
    assert any("half-precision" in note for note in done.report.notes)


def test_a_float16_table_too_large_to_widen_stays_float16(quantized: Run) -> None:
    model = build(
        """g (float16[batch, 40] x) => (float16[batch, 40] y) {
            [fc] h = MatMul (x, w1)
            y = Add (h, large)
        }""",
        {"w1": weight(40, 40, dtype=np.float16), "large": normal(1, 40, dtype=np.float16)},
    )
    quantized(model)


def test_a_large_float16_embedding_is_quantized(quantized: Run) -> None:
    model = build(
        """g (int64[batch, 4] ids) => (float16[batch, 4, 10] y) {
            [embed] e = Gather (table, ids)
            [fc] y = MatMul (e, w)
        }""",
        {"table": normal(60, 32, dtype=np.float16), "w": weight(32, 10, dtype=np.float16)},
    )
    assert names(quantized(model).report) == ["embed", "fc"]


def test_bfloat16_layers_that_the_cpu_cannot_run_are_quantized(tmp_path: Path) -> None:
    source, out = tmp_path / "bf16.onnx", tmp_path / "q.onnx"
    model = half(TensorProto.BFLOAT16)
    onnx.save(_between_casts(model), source)
    report = comq_onnx.quantize(source, out, {"x": normal(40, 3, 8, 8)}, bits=8, device="cpu")
    assert names(report) == ["conv", "head"]
    assert any("bfloat16" in note for note in report.notes)
    assert infer(out, {"x": normal(2, 3, 8, 8)})["y"].dtype == np.float32
    assert report.outputs[0].sqnr_db > 25


def _between_casts(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the model a float32 input and output, with Casts."""
    model.graph.node[0].input[0] = "x16"
    model.graph.node[-1].output[0] = "y16"
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.BFLOAT16))
    model.graph.node.append(helper.make_node("Cast", ["y16"], ["y"], to=TensorProto.FLOAT))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def test_a_bfloat16_input_is_refused_by_its_name(tmp_path: Path) -> None:
    # numpy has no bfloat16, so ONNX Runtime's Python interface takes no such samples
    with pytest.raises(ModelError, match=r"'x'.*bfloat16"):
        comq_onnx.quantize(half(TensorProto.BFLOAT16), tmp_path / "q.onnx", {"x": normal(40, 3, 8, 8)}, device="cpu")


def test_float64_weights_are_skipped_with_the_reason(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 10] y) {
            [fc1] h = MatMul (x, w1)
            d = Cast <to = 11> (h)
            [wide] e = MatMul (d, w2)
            y = Cast <to = 1> (e)
        }""",
        {"w1": DRAWN["w1"], "w2": DRAWN["w2"].astype(np.float64)},
    )
    report = quantized(model).report
    assert names(report) == ["fc1"]
    assert "float64" in report.skipped["wide"]


# What is left as it is


def recurrent(op: str) -> onnx.ModelProto:
    """Build a MatMul, then an LSTM or a GRU over 5 steps."""
    gates = {"LSTM": 4, "GRU": 3}[op]
    return build(
        f"""g (float[5, batch, 32] x) => (float[5, 1, batch, 8] y) {{
            [fc] h = MatMul (x, w1)
            [cell] y = {op} <hidden_size = 8> (h, w, r)
        }}""",
        {"w1": DRAWN["w1"], "w": weight(1, 8 * gates, 16, fan=16), "r": weight(1, 8 * gates, 8, fan=8)},
    )


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_both_weights_of_a_recurrent_cell_are_layers(quantized: Run, op: str) -> None:
    model = recurrent(op)
    # the batch is the second axis, so samples are complete tensors; a cell feeds its errors back to itself
    report = quantized(model, {"x": normal(40, 5, 3, 32)}, floor=20, per_item=True).report
    assert names(report) == ["fc", "cell.W", "cell.R"]
    assert not report.skipped


def joined(op: str) -> onnx.ModelProto:
    """Build a cell whose weights other nodes make of constants, as exporters do."""
    model = recurrent(op)
    model.graph.node[1].name = "cell"
    for name in ("w", "r"):
        stored = next(t for t in model.graph.initializer if t.name == name)
        whole = numpy_helper.to_array(stored)[0]
        stored.CopyFrom(numpy_helper.from_array(np.tile(whole, (8, 16)), name))
        cut = f"{name}_cut"
        bounds = {"zero": [0, 0], f"{name}_ends": [*whole.shape], "axes": [0, 1], "first": [0]}
        nodes = [
            onnx.helper.make_node("Slice", [name, "zero", f"{name}_ends", "axes"], [f"{cut}2"]),
            onnx.helper.make_node("Unsqueeze", [f"{cut}2", "first"], [f"{cut}3"]),
            onnx.helper.make_node("Concat", [f"{cut}3"], [cut], axis=0),
        ]
        held = {t.name for t in model.graph.initializer}
        for key, numbers in bounds.items():
            if key not in held:
                model.graph.initializer.append(numpy_helper.from_array(np.array(numbers), key))
        for node in reversed(nodes):
            model.graph.node.insert(0, node)
        cell = model.graph.node[-1]
        cell.input[1 if name == "w" else 2] = cut
    return model


def test_weights_that_are_cut_and_joined_are_folded(quantized: Run) -> None:
    report = quantized(joined("LSTM"), {"x": normal(40, 5, 3, 32)}, floor=20, per_item=True).report
    assert names(report) == ["fc", "cell.W", "cell.R"]


def test_an_einsum_is_listed_with_a_reason(quantized: Run) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 10] y) {
            [fc] h = MatMul (x, w1)
            [sum] y = Einsum <equation = "bi,ij->bj"> (h, w2)
        }""",
        DRAWN,
    )
    report = quantized(model).report
    assert names(report) == ["fc"]
    assert "Einsum" in report.skipped["sum"]


def test_a_tiny_weight_is_listed_with_its_size(quantized: Run) -> None:
    model = two_layers("w = Identity (w1)", {"w1": DRAWN["w1"], "w2": weight(16, 4)})
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4
    report = quantized(model).report
    assert names(report) == ["fc1"]
    assert "64 weights" in report.skipped["fc2"]


def test_a_convolution_whose_weight_is_computed_is_listed() -> None:
    model = build(
        """g (float[batch, 4, 8, 8] x, float[8, 4, 3, 3] filter) => (float[batch, 8, 4, 4] y) {
            [a] h = Conv (x, w1)
            [b] y = Conv (h, filter)
        }""",
        {"w1": weight(4, 4, 3, 3, fan=36)},
    )
    samples = {"x": normal(10, 2, 4, 8, 8), "filter": normal(10, 8, 4, 3, 3)}
    report = comq_onnx.plan(model, samples, device="cpu")
    assert names(report) == ["a"]
    assert "run time" in report.skipped["b"]


# What is refused


SCALES = {"s": np.float32(0.1), "z": np.uint8(128)}
ALREADY = {
    "QLinearConv": (
        """g (uint8[batch, 3, 8, 8] x) => (uint8[batch, 8, 6, 6] y) {
            y = QLinearConv (x, s, z, w, s, zw, s, z)
        }""",
        {**SCALES, "w": np.ones((8, 3, 3, 3), np.int8), "zw": np.int8(0)},
    ),
    "MatMulNBits": (
        """g (float[batch, 32] x) => (float[batch, 16] y) {
            y = com.microsoft.MatMulNBits <K = 32, N = 16, bits = 4, block_size = 32> (x, codes, scales)
        }""",
        {"codes": np.zeros((16, 1, 16), np.uint8), "scales": np.ones(16, np.float32)},
    ),
}


@pytest.mark.parametrize("op", ALREADY)
def test_a_quantized_model_is_refused(tmp_path: Path, op: str) -> None:
    text, weights = ALREADY[op]
    onnx.save(build(text, weights, domains=["com.microsoft"]), tmp_path / "q.onnx")
    with pytest.raises(ModelError, match=rf"already quantized \(the weights of 1 {op}"):
        comq_onnx.quantize(tmp_path / "q.onnx", tmp_path / "out.onnx")


@pytest.mark.parametrize("why", ["elementwise", "tiny", "float64"])
def test_a_model_without_a_layer_is_refused(tmp_path: Path, why: str) -> None:
    text = {
        "elementwise": "y = Relu (x)",
        "tiny": "[small] h = MatMul (x, t)\ny = MatMul (h, t)",
        "float64": "d = Cast <to = 11> (x)\n[wide] e = MatMul (d, w)\ny = Cast <to = 1> (e)",
    }[why]
    weights = {"tiny": {"t": weight(8, 8)}, "float64": {"w": weight(32, 32, dtype=np.float64)}}.get(why, {})
    width = 8 if why == "tiny" else 32
    model = build(f"g (float[batch, {width}] x) => (float[batch, {width}] y) {{ {text} }}", weights)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="no layer to quantize") as refusal:
        comq_onnx.quantize(tmp_path / "m.onnx", tmp_path / "out.onnx", samples_for(model))
    assert {"elementwise": "", "tiny": "64 weights", "float64": "float64"}[why] in str(refusal.value)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["Gemm", "Gather"])
def test_weights_that_are_not_numbers_are_refused_with_the_layers_name(tmp_path: Path, bad: float, kind: str) -> None:
    if kind == "Gemm":
        model, weight_name, layer = mlp(), "w1", "fc1"
    else:
        model, weight_name, layer = tokens(), "table", "embed"
    tensor = next(t for t in model.graph.initializer if t.name == weight_name)
    array = numpy_helper.to_array(tensor).copy()
    # row 40 of the table is looked up by no sample
    array[40 if kind == "Gather" else 3, 5] = bad
    tensor.CopyFrom(numpy_helper.from_array(array, weight_name))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=layer):
        comq_onnx.quantize(tmp_path / "m.onnx", tmp_path / "out.onnx", samples_for(model), bits=8)
    assert not (tmp_path / "out.onnx").exists()


# Choosing layers


def test_only_included_layers_are_quantized(quantized: Run) -> None:
    report = quantized(cnn(), include=("stem", "head")).report
    assert names(report) == ["stem", "head"]
    assert report.skipped["point"] == "Conv: matches no --include"


def test_excluded_layers_stay_as_they_were(quantized: Run) -> None:
    done = quantized(mlp(), exclude=("fc1",))
    assert names(done.report) == ["fc2"]
    kept = {t.name: numpy_helper.to_array(t) for t in done.model.graph.initializer}
    np.testing.assert_array_equal(kept["w1"], numpy_helper.to_array(mlp().graph.initializer[0]))


def test_other_bits_reach_the_layers_that_match(quantized: Run) -> None:
    done = quantized(cnn(), bits=8, bits_for=(("head", 4), ("^point$", 5)), floor=15)
    assert {layer.name: layer.bits for layer in done.report.layers} == {
        "stem": 8,
        "depthwise": 8,
        "point": 5,
        "head": 4,
    }
    counts = Counter(t.data_type for t in done.model.graph.initializer)
    assert counts[TensorProto.INT4] == 1


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("include", ("nothing",), "--include 'nothing' matches none"),
        ("exclude", ("nothing",), "--exclude 'nothing' matches none"),
        ("bits_for", (("nothing", 8),), "--bits-for nothing=8 matches none"),
        ("include", ("(",), "not a regular expression"),
        ("exclude", ("[",), "not a regular expression"),
        ("bits_for", (("*", 8),), "not a regular expression"),
        ("bits_for", (("fc", 99),), "99 bits"),
        ("bits", 0, "0 bits"),
        ("bits", 17, "17 bits"),
        ("granularity", "7", "--granularity 7"),
        ("target", "toaster", "--target toaster"),
        ("solver", "magic", "--solver magic"),
        ("activations", "9", "--activations 9"),
        ("max_samples", 0, "--samples 0"),
        ("batch_size", 0, "--batch-size 0"),
    ],
)
def test_an_option_that_cannot_work_is_named(tmp_path: Path, option: str, value: Any, words: str) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    with pytest.raises(OptionError) as refusal:
        comq_onnx.quantize(tmp_path / "m.onnx", tmp_path / "out.onnx", samples_for(mlp()), **{option: value})
    assert words in str(refusal.value)
    assert not (tmp_path / "out.onnx").exists()


def test_excluding_everything_leaves_no_layer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="excluded by --exclude"):
        comq_onnx.quantize(mlp(), tmp_path / "out.onnx", samples_for(mlp()), exclude=("fc",))


# Forms of the same thing


@pytest.mark.parametrize("activations", ["auto", "none", "16"])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_way_of_writing_a_weight_runs(
    quantized: Run, activations: str, granularity: str, symmetric: bool
) -> None:
    options = {"activations": activations, "granularity": granularity, "symmetric": symmetric}
    quantized(mlp(), **options)


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("bits", [2, 3, 5, 7])
def test_every_number_of_bits_runs(quantized: Run, make: Callable[[], onnx.ModelProto], bits: int) -> None:
    # a bit is worth 6 dB; 8 bits give these nets about 40, so 6 a bit less 14 leaves 6 dB to all of them
    quantized(make(), bits=bits, floor=max(0, 6 * bits - 14))


def test_more_bits_are_nearer_to_the_float_model(tmp_path: Path) -> None:
    samples = samples_for(cnn())
    reference = infer(cnn(), samples)["logits"]
    reached = []
    for bits in (2, 4, 8):
        comq_onnx.quantize(cnn(), tmp_path / "q.onnx", samples, bits=bits, device="cpu")
        reached.append(sqnr(reference, infer(tmp_path / "q.onnx", samples)["logits"]))
    assert reached == sorted(reached)


# Weights that are stored more than once


@pytest.mark.parametrize("way", ["Identity (w)", "Cast <to = 1> (w)", "Reshape (w, shape)"])
def test_copies_of_a_weight_are_stored_once(quantized: Run, way: str) -> None:
    model = build(
        f"""g (float[batch, 64] x) => (float[batch, 64] y) {{
            [first] a = MatMul (x, w)
            b = Tanh (a)
            copy = {way}
            [second] c = MatMul (b, copy)
            d = Tanh (c)
            [third] y = MatMul (d, equal)
        }}""",
        {"w": weight(64, 64), "equal": weight(64, 64), **({"shape": np.array([64, 64])} if "shape" in way else {})},
    )
    done = quantized(model)
    assert names(done.report) == ["first", "second", "third"]
    assert len(codes(done.out)) == 1
    assert done.out.stat().st_size < 4096 + 8000


def test_weights_that_differ_in_one_number_are_two(quantized: Run) -> None:
    other = weight(64, 64)
    other[63, 62] += 0.01
    model = build(
        """g (float[batch, 64] x) => (float[batch, 64] y) {
            [first] a = MatMul (x, w)
            b = Tanh (a)
            [second] y = MatMul (b, other)
        }""",
        {"w": weight(64, 64), "other": other},
    )
    assert len(codes(quantized(model).out)) == 2
