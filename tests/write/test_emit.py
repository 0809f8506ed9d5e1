"""Test the file that is written as a whole: its numbers are those of the solution, whatever computes them."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper
from written import (
    INTEGER,
    PRODUCTS,
    WEIGHT_ONLY,
    Quantize,
    Written,
    holds_the_solution,
    no_float_as_large_as_a_weight,
    quantize,
)
from zoo import ZOO_FEEDS, zoo

from comq_onnx.metrics import sqnr_of
from comq_onnx.model.operators import Gather
from comq_onnx.model.source import read_model
from comq_onnx.plan.forms import code_bytes
from comq_onnx.runtime.session import Session
from comq_onnx.targets.catalog import TARGETS
from comq_onnx.write.check import lint


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("activations", ["auto", "none"])
@pytest.mark.parametrize(("symmetric", "granularity"), [(True, "channel"), (False, "channel"), (True, "tensor")])
def test_the_file_holds_the_solutions_weights(
    quantize: Quantize, bits: int, activations: str, symmetric: bool, granularity: str
) -> None:
    options = {"symmetric": symmetric, "granularity": granularity, "activations": activations}
    written = quantize(zoo(), ZOO_FEEDS, bits=bits, **options)
    holds_the_solution(written, bits, INTEGER if activations == "auto" else WEIGHT_ONLY)
    no_float_as_large_as_a_weight(written)
    activations_have_rank_zero(written)
    biases_have_the_products_scale(written)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("activations", ["auto", "none"])
@pytest.mark.parametrize("target", ["ort-cuda", "ort-web", "tensorrt", "openvino"])
def test_every_target_holds_the_solutions_weights(quantize: Quantize, bits: int, activations: str, target: str) -> None:
    written = quantize(zoo(), ZOO_FEEDS, bits=bits, target=target, activations=activations)
    integer = activations == "auto" and target != "ort-cuda"
    weight_only = WEIGHT_ONLY if TARGETS[target].packed_products else WEIGHT_ONLY | dict.fromkeys(PRODUCTS, "folded")
    holds_the_solution(written, bits, INTEGER if integer else weight_only)
    stored = {t.name: t for t in written.proto.graph.initializer}
    plan = written.solved.plan
    for layer in written.layers.values():
        width = 8 if isinstance(layer.kind, Gather) else bits
        wanted = code_bytes(layer, plan.form(layer), width, TARGETS[target], plan.opset)
        assert len(stored[f"{layer.weight}.codes"].raw_data) == wanted
    types = {stored[n.input[2]].data_type for n in written.proto.graph.node if n.op_type == "QuantizeLinear"}
    signed = {name: {TensorProto.UINT8} for name in TARGETS} | {"tensorrt": {TensorProto.INT8}}
    assert types == (signed[target] if integer else set())
    assert lint(read_model(written.path), TARGETS[target]) == []
    before = Session(written.source.SerializeToString()).run(written.feeds)
    after = Session(written.path, float_matmul_nbits=True, disable_qdq_fusion=True).run(written.feeds)
    # 45.8 to 48.3, 24.2 to 24.6 and 9.2 to 9.4 dB were seen
    assert sqnr_of(before, after) > {8: 43, 4: 22, 2: 7}[bits]


def activations_have_rank_zero(written: Written) -> None:
    """Check that activations have scales of rank 0: one of shape [1] makes QLinearAdd fail to load."""
    pairs = [n for n in written.proto.graph.node if n.op_type == "QuantizeLinear"]
    assert bool(pairs) == bool(written.solved.plan.activations.values)
    for pair in pairs:
        reader = next(n for n in written.proto.graph.node if pair.output[0] in n.input)
        assert reader.op_type == "DequantizeLinear"
        assert list(reader.input[1:]) == list(pair.input[1:])
        scale, zero = (written.initializers[n] for n in pair.input[1:])
        assert (list(scale.dims), list(zero.dims)) == ([], [])
        assert (scale.data_type, zero.data_type) == (TensorProto.FLOAT, TensorProto.UINT8)


def biases_have_the_products_scale(written: Written) -> None:
    """Check that integer biases have the scale s_x * s_w to the last bit: with any other the layer stays in float."""
    checked = 0
    for name, layer in written.layers.items():
        if name not in written.solved.plan.activations.integer_layers or layer.bias_node is None:
            continue
        bias = written.producer(next(n for n in written.node(layer.bias_node).input if n.endswith(".bias")))
        codes, scale = written.array(bias.input[0]), written.value(bias.input[1])
        step = written.array(written.producer(written.node(name).input[0]).input[1])
        weights = written.array(written.producer(written.node(name).input[1]).input[1])
        assert codes.dtype == np.int32
        assert np.array_equal(scale, np.broadcast_to(step * weights, scale.shape))
        solution, original = written.solved.solutions[name], 0.0
        if layer.bias is not None:
            source = next(t for t in written.source.graph.initializer if t.name == layer.bias)
            original = numpy_helper.to_array(source) * (2.0 if name == "gemm" else 1.0)
        shift = solution.shift.reshape(-1)
        # half a step of rounding, and the float32 sum of bias and shift
        assert (np.abs(codes * scale.astype(np.float64) - (original + shift)) <= 0.501 * np.abs(scale) + 1e-6).all()
        checked += 1
    assert checked == (5 if written.solved.plan.activations.values else 0)


@pytest.mark.parametrize(
    ("activations", "bits", "floor"),
    [
        # an integer kernel rounds what lies between two codes its own way: some activations differ by a code of 256
        ("auto", 8, 35),
        ("auto", 4, 35),
        # only sums in another order; MatMulNBits rounds its input to 8 bits, which leaves 6e-3
        ("none", 8, 35),
        ("none", 4, 35),
    ],
)
def test_every_optimization_level_computes_the_same(
    quantize: Quantize, activations: str, bits: int, floor: float
) -> None:
    written = quantize(zoo(), ZOO_FEEDS, bits=bits, activations=activations)
    plain, *others = (Session(written.path, level=level).run(ZOO_FEEDS) for level in (0, 1, 2, 99))
    assert sqnr_of(plain, others[0]) > 100  # constant folding only
    for optimized in others[1:]:
        assert sqnr_of(plain, optimized) > floor


def test_eight_bits_weight_only_are_near_the_float_model(quantize: Quantize) -> None:
    written = quantize(zoo(), ZOO_FEEDS, bits=8, activations="none")
    before = Session(zoo().SerializeToString()).run(ZOO_FEEDS)
    # 8 bits leave about 1/256 of each channel's range, some -45 dB a layer, of which up to 9 lie in a row
    assert sqnr_of(before, Session(written.path, level=0).run(ZOO_FEEDS)) > 30
