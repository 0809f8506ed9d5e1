"""Test how weights are written: in blocks, in bit planes, folded and looked up."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto
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
from zoo import ZOO_FEEDS, Feeds, model_of, node, noise, zoo

from comq_onnx.metrics import sqnr_of
from comq_onnx.plan import forms as weight_forms
from comq_onnx.runtime.session import Session


def test_tensorrt_takes_blocks_that_fill_the_inputs_twice(quantize: Quantize) -> None:
    nodes = [node("MatMul", f"x{k} w{k}", f"y{k}") for k in (96, 40, 32, 16)]
    shapes = {f"w{k}": (k, 48) for k in (96, 40, 32, 16)}
    inputs = {f"x{k}": ["n", k] for k in (96, 40, 32, 16)}
    source = model_of(nodes, shapes, inputs, [f"y{k}" for k in (96, 40, 32, 16)])
    feeds = {f"x{k}": noise(24, k) for k in (96, 40, 32, 16)}
    written = quantize(source, feeds, bits=4, target="tensorrt", activations="none")
    attributes = {
        k: {a.name: a.i for a in written.node(f"y{k}.weight").attribute} for k in (96, 40, 32, 16)
    }  # fmt: skip
    # no power of two from 16 on divides 40, and none fits into 16 twice: these have one scale for a channel
    blocks = {96: {"axis": 0, "block_size": 32}, 32: {"axis": 0, "block_size": 16}, 40: {"axis": 1}, 16: {"axis": 1}}
    assert attributes == blocks
    of_eight = quantize(source, feeds, bits=8, target="tensorrt", activations="none")
    assert {a.name for a in of_eight.node("y96.weight").attribute} == {"axis"}


@pytest.mark.parametrize("activations", ["auto", "none"])
@pytest.mark.parametrize("granularity", ["channel", "16"])
def test_codes_of_three_bits_are_planes_where_that_saves_bytes(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch, activations: str, granularity: str
) -> None:
    monkeypatch.setattr(weight_forms, "PLANE_NODE_BYTES", 0)
    written = quantize(zoo(), ZOO_FEEDS, bits=3, activations=activations, granularity=granularity)
    forms = INTEGER if activations == "auto" else WEIGHT_ONLY
    if granularity == "16":
        forms = forms | dict.fromkeys(PRODUCTS, "blocked")
    holds_the_solution(written, 3, forms, planes=True)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_file_holds_the_solutions_weights_in_blocks(quantize: Quantize, bits: int, symmetric: bool) -> None:
    written = quantize(zoo(), ZOO_FEEDS, bits=bits, symmetric=symmetric, granularity="16")
    # 8 and 16 inputs are no more than a block, and 5 or kernels of 9 do not fill one: whole channels, as in integers
    holds_the_solution(written, bits, INTEGER | dict.fromkeys(PRODUCTS, "blocked"))
    grids = {n: s.weight.grid.block_size for n, s in written.solved.solutions.items()}
    assert grids == dict.fromkeys(written.layers) | {"matmul": 16, "up": 16, "y3": 16}


def test_a_folded_weight_in_blocks_has_no_scale_as_large_as_itself(quantize: Quantize) -> None:
    no_float_as_large_as_a_weight(quantize(zoo(), ZOO_FEEDS, bits=4, granularity="16"))


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("granularity", ["channel", "16", "tensor"])
@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt", "openvino"])
@pytest.mark.parametrize(
    ("nodes", "weight", "x"),
    [
        (node("ConvTranspose", "x w b", "y", strides=[2, 2], group=4), (32, 5, 2, 2), ("n", 32, 5, 5)),
        (node("ConvTranspose", "x w b", "y", group=32), (32, 2, 3, 3), ("n", 32, 5, 5)),
        (node("ConvTranspose", "x w b", "y", group=2), (32, 3, 3), ("n", 32, 5)),
        (node("Conv", "x w b", "y", group=2), (8, 16, 2, 2), ("n", 32, 5, 5)),
        (node("MatMul", "x w", "y"), (3, 32, 8), ("n", 3, 5, 32)),
        (node("MatMul", "w x", "y"), (8, 32), ("n", 32, 5)),
    ],
    ids=["transposed in groups", "transposed, depthwise", "transposed, 1-D", "Conv in groups", "stack", "left"],
)
def test_scales_of_any_shape_are_folded_at_load(
    quantize: Quantize, bits: int, granularity: str, target: str, nodes: onnx.NodeProto, weight: tuple, x: tuple
) -> None:
    outs = (
        weight[0]
        if nodes.op_type == "Conv"
        else weight[1] * next((a.i for a in nodes.attribute if a.name == "group"), 1)
    )
    weights = {"w": weight} | ({"b": (outs,)} if "b" in nodes.input else {})
    feeds = {"x": noise(24, *x[1:])}
    options = {"activations": "none", "granularity": granularity, "target": target, "uniform": True}
    written = quantize(model_of([nodes], weights, {"x": list(x)}, ["y"]), feeds, bits=bits, **options)
    (layer,) = written.layers.values()
    solution = written.solved.solutions[layer.name].weight
    assert solution.grid.per_tensor == (granularity == "tensor")
    held = written.value(f"{layer.name}.weight", {})
    assert np.array_equal(held, layer.kind.from_matrix(solution.dequantize()))
    # ONNX Runtime runs the product alone; it folds no DequantizeLinear, which TensorRT wants
    assert target == "tensorrt" or len(written.kernels.counts) == 1


def lookup() -> tuple[onnx.ModelProto, Feeds]:
    """Build an embedding before a layer, and samples for it."""
    nodes = [node("Gather", "table ids", "e"), node("Tanh", "e", "t"), node("MatMul", "t w", "y")]
    source = model_of(nodes, {"table": (500, 32), "w": (32, 32)}, {"ids": ["n", 6]}, ["y"])
    return source, {"ids": np.random.default_rng(0).integers(0, 500, (24, 6))}


def test_a_lookup_dequantizes_only_the_rows_that_it_finds(quantize: Quantize) -> None:
    written = quantize(*lookup(), bits=4)
    gathered = [written.initializers[n.input[0]] for n in written.proto.graph.node if n.op_type == "Gather"]
    # embeddings keep 8 bits unless told otherwise
    assert sorted((t.data_type, tuple(t.dims)) for t in gathered) == [
        (TensorProto.FLOAT, (500, 1)),
        (TensorProto.INT8, (500, 32)),
    ]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_lookup_may_have_fewer_bits(quantize: Quantize, bits: int) -> None:
    written = quantize(*lookup(), bits=4, bits_for=(("^e$", bits),))
    rows = np.arange(504).reshape(-1, 6) % 500
    solved = written.solved.solutions["e"].weight
    assert np.array_equal(written.value("e", {"ids": rows}).reshape(504, 32)[:500], solved.dequantize()[0])


def test_a_lookup_whose_rows_an_integer_layer_reads(quantize: Quantize) -> None:
    nodes = [node("Gather", "table ids", "e"), node("MatMul", "e w", "y")]
    source = model_of(nodes, {"table": (500, 32), "w": (32, 32)}, {"ids": ["n", 6]}, ["y"])
    written = quantize(source, {"ids": np.random.default_rng(0).integers(0, 500, (24, 6))}, bits=8)
    assert written.kernels.float_behind_dequantize == 0
    assert sum(written.kernels.integer.values()) == 1


def weight_only_before_integer(quantize: Quantize, bias: bool) -> Written:
    """Quantize two layers in blocks of 32; the second has 32 inputs, one block, and could run in integers."""
    nodes = [node("Gemm", "x w0 b" if bias else "x w0", "h"), node("MatMul", "h w1", "y")]
    weights = {"w0": (64, 32), "w1": (32, 16)} | ({"b": (32,)} if bias else {})
    return quantize(model_of(nodes, weights, {"x": ["n", 64]}, ["y"]), {"x": noise(64, 64)}, bits=8, granularity="32")


@pytest.mark.parametrize("bias", [True, False])
def test_with_blocks_every_matmul_is_weight_only(quantize: Quantize, bias: bool) -> None:
    written = weight_only_before_integer(quantize, bias)
    assert {n: written.solved.plan.form(layer).value for n, layer in written.layers.items()} == {
        "h": "blocked",
        "y": "blocked",
    }
    before = Session(written.source.SerializeToString()).run(written.feeds)
    # two layers at 8 bits, one of them with its input at 8 bits
    assert sqnr_of(before, Session(written.path).run(written.feeds)) > 33


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_only_gemm_before_an_integer_layer_is_not_dequantized_at_every_call(
    quantize: Quantize, bias: bool
) -> None:
    found = weight_only_before_integer(quantize, bias).kernels
    assert found.float_behind_dequantize == 0
    assert sum(found.integer.values()) == 2


def test_two_layers_of_one_weight_both_hold_its_codes(quantize: Quantize) -> None:
    source = model_of(
        [node("MatMul", "x w", "m"), node("Tanh", "m", "t"), node("MatMul", "t w", "y")],
        {"w": (16, 16)},
        {"x": ["n", 16]},
        ["y"],
    )
    written = quantize(source, {"x": noise(32, 16)}, bits=4)
    first, second = (written.value(written.node(n).input[1]) for n in ("m", "y"))
    assert np.array_equal(first, second)
    assert "w" not in written.initializers
