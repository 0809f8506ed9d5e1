"""The file that is written: its weights are the solution's, packed, and ONNX Runtime makes integer kernels of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import comq_onnx
from comq_onnx import evaluate
from comq_onnx.evaluate import Kernels, executed_kernels
from comq_onnx.metrics import sqnr_of
from comq_onnx.model.layers import Layer
from comq_onnx.model.operators import Gather, Gemm
from comq_onnx.model.source import read_model
from comq_onnx.plan import forms as weight_forms
from comq_onnx.plan.activations import ActivationPlan
from comq_onnx.plan.forms import WeightForm, code_bytes, form_of, supported_grid
from comq_onnx.plan.solved import Solved
from comq_onnx.runtime.session import Session
from comq_onnx.solve.grid import Grid
from comq_onnx.targets.catalog import ORT_CPU, TARGETS, TENSORRT
from comq_onnx.write import emit as emitting
from comq_onnx.write.check import lint
from comq_onnx.write.emit import emit

ort.set_default_logger_severity(4)
PACKED = {8: TensorProto.INT8, 4: TensorProto.INT4, 3: TensorProto.INT4, 2: TensorProto.INT2}
WIDTHS = {TensorProto.INT8: 8, TensorProto.INT4: 4, TensorProto.INT2: 2}
NO_INT2 = PACKED | {2: TensorProto.INT4}
ALL_INT8 = dict.fromkeys(PACKED, TensorProto.INT8)
# containers by bits of layers that run in integers, and of all others
CONTAINERS = {
    "ort-cpu": (PACKED, PACKED), "ort-cuda": (NO_INT2, NO_INT2), "tensorrt": (ALL_INT8, NO_INT2),
    "openvino": (NO_INT2, NO_INT2),
}  # fmt: skip
Feeds = dict[str, np.ndarray]


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=output, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, Any],
    inputs: dict[str, Sequence[int | str]],
    outputs: Sequence[str],
    opset: int = 21,
) -> onnx.ModelProto:
    """A model with random weights of the shapes given, or the arrays themselves."""
    rng = np.random.default_rng(0)

    def array(given: Any) -> np.ndarray:
        if isinstance(given, tuple):
            return (rng.standard_normal(given) / np.sqrt(np.prod(given[1:]))).astype(np.float32)
        return np.asarray(given, np.float32 if isinstance(given, float) else None)

    types = {n: TensorProto.INT64 if n == "ids" else TensorProto.FLOAT for n in inputs}
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(n, types[n], shape) for n, shape in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(array(w), n) for n, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@dataclass(frozen=True)
class Written:
    """What a run left: the file, what was to be written into it, the samples, the float model."""

    path: Path
    proto: onnx.ModelProto
    solved: Solved
    feeds: Feeds
    source: onnx.ModelProto

    @property
    def layers(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.solved.plan.layers}

    @property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        return {t.name: t for t in self.proto.graph.initializer}

    @property
    def kernels(self) -> Kernels:
        return executed_kernels(self.path)

    def producer(self, name: str) -> onnx.NodeProto:
        return next(n for n in self.proto.graph.node if name in n.output)

    def node(self, name: str) -> onnx.NodeProto:
        return next(n for n in self.proto.graph.node if n.name == name)

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.initializers[name])

    def before(self, name: str) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that make a value, and the names of all they read."""
        wanted, nodes = {name}, []
        for n in reversed(self.proto.graph.node):
            if wanted & set(n.output):
                nodes.insert(0, n)
                wanted |= set(n.input)
        return nodes, wanted

    def behind(self, name: str) -> dict[str, onnx.TensorProto]:
        """The initializers that a value is made of."""
        return {n: self.initializers[n] for n in self.before(name)[1] if n in self.initializers}

    def value(self, name: str, feeds: Feeds | None = None) -> np.ndarray:
        """What the file holds for a value: only the nodes before it, run as they are written."""
        nodes, wanted = self.before(name)
        graph = helper.make_graph(
            nodes,
            "part",
            [i for i in self.proto.graph.input if i.name in wanted],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
            [t for t in self.proto.graph.initializer if t.name in wanted],
        )
        part = helper.make_model(graph, opset_imports=self.proto.opset_import, ir_version=self.proto.ir_version)
        return Session(part.SerializeToString(), threads=1, level=0).run(feeds or {})[name]


Quantize = Callable[..., Written]


@pytest.fixture
def quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quantize:
    """comq_onnx.quantize, telling what it emits; without the timings of its report."""

    def run(source: onnx.ModelProto, feeds: Feeds, **options: Any) -> Written:
        emitted = []

        def spy(model: Any, solved: Solved) -> None:
            emitted.append(solved)
            emit(model, solved)

        monkeypatch.setattr(emitting, "emit", spy)
        monkeypatch.setattr(evaluate, "latency", lambda pair, _samples: [1.0] * len(pair))
        path = tmp_path / "quantized.onnx"
        comq_onnx.quantize(source, path, feeds, device="cpu", **({"uniform": True} | options))
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
        return Written(path, proto, emitted[-1], feeds, source)

    return run


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


# Weights --------------------------------------------------------------------------------------------------------------

# samples of their own brightness and colour, or the pool in the middle would give all of them the same features
TINTED = normal(24, 8, 6, 6) + 2 * np.random.default_rng(3).standard_normal((24, 8, 1, 1)).astype(np.float32)
ZOO_FEEDS = {"x": TINTED, "ids": np.random.default_rng(2).integers(0, 20, (24, 5))}


def zoo() -> onnx.ModelProto:
    """A layer of every kind."""
    same = {"pads": [1, 1, 1, 1]}
    return model(
        [
            node("Conv", "x w_conv b16", "conv", **same),
            node("Relu", "conv", "relu"),
            node("Conv", "relu w_depthwise b16", "depthwise", group=16, **same),
            node("Conv", "depthwise w_grouped", "grouped", group=4, **same),
            node("ConvTranspose", "grouped w_up b8", "up", group=2, strides=[2, 2]),
            node("ConvTranspose", "up w_up1", "up1"),
            node("GlobalAveragePool", "up1", "pool"),
            node("Flatten", "pool", "flat"),
            node("Gemm", "flat w_gemm b24", "gemm", transB=1, alpha=0.5, beta=2.0),
            node("MatMul", "gemm w_matmul", "matmul"),
            node("Add", "matmul b32", "y1"),
            node("Transpose", "y1", "turned", perm=[1, 0]),
            node("Gemm", "turned w_left", "y3", transA=1),
            node("Gather", "table ids", "gather"),
            node("Tanh", "gather", "embedding"),
            node("MatMul", "embedding w_rank3", "rank3"),
            node("Tanh", "rank3", "tanh"),
            node("MatMul", "w_onleft tanh", "onleft"),
            node("Unsqueeze", "onleft one", "wide"),
            node("MatMul", "wide w_stack", "y2"),
        ],
        {
            "w_conv": (16, 8, 3, 3), "b16": (16,), "w_depthwise": (16, 1, 3, 3), "w_grouped": (16, 4, 3, 3),
            "w_up": (16, 4, 2, 2), "b8": (8,), "w_up1": (8, 8, 3, 3), "w_gemm": (24, 8), "b24": (24,),
            "w_matmul": (24, 32), "b32": (32,), "w_left": (32, 12), "table": (20, 16), "w_rank3": (16, 24),
            "w_onleft": (32, 5), "one": [1], "w_stack": (2, 24, 8),
        },
        {"x": ["n", 8, 6, 6], "ids": ["n", 5]},
        ["y1", "y2", "y3"],
    )  # fmt: skip


ALWAYS = {"up": "folded", "up1": "folded", "y3": "folded", "onleft": "folded", "y2": "folded", "gather": "looked up"}
CONVS, PRODUCTS = ["conv", "depthwise", "grouped"], ["gemm", "matmul", "rank3"]
INTEGER = ALWAYS | dict.fromkeys([*CONVS, *PRODUCTS], "integer")
WEIGHT_ONLY = ALWAYS | dict.fromkeys(CONVS, "folded") | dict.fromkeys(PRODUCTS, "blocked")


def holds_the_solution(written: Written, bits: int, forms: dict[str, str], planes: bool = False) -> None:
    """Every weight of the zoo's file is the solution's, packed, in the form wanted, and no float weight is left.

    planes: 3 bits are bit planes of 2 and 1, but where MatMulNBits wants 4.
    """
    solved = written.solved
    assert {n: solved.plan.form(layer).value for n, layer in written.layers.items()} == forms
    for name, layer in written.layers.items():
        weight = solved.solutions[name].weight
        # embeddings keep 8 bits unless told otherwise
        width = 8 if isinstance(layer.kind, Gather) else bits
        assert weight.grid.bits == width
        wanted = layer.kind.from_matrix(weight.dequantize())
        if isinstance(layer.kind, Gather):
            rows = np.arange(20).reshape(4, 5)
            found = written.value("gather", {"ids": rows}).reshape(20, 16)
            found_in = written.behind("gather")
        else:
            blocked_gemm = isinstance(layer.kind, Gemm) and forms[name] == "blocked"
            reader = written.node(f"{name}.matmul" if blocked_gemm else name)
            value = reader.input[1 if blocked_gemm else layer.kind.weight_index]
            found, found_in = written.value(value), written.behind(value)
            if blocked_gemm and layer.kind.trans_b:
                wanted = wanted.T
        # one multiplication of the same two float32 numbers
        assert np.array_equal(found, wanted), name
        assert layer.weight not in written.initializers
        stored = [t for tensor, t in sorted(found_in.items()) if tensor.startswith(f"{layer.weight}.codes")]
        container = CONTAINERS[solved.plan.target.name][forms[name] != "integer"][width]
        widths = [2, 1] if planes and width == 3 and forms[name] != "blocked" else [WIDTHS[container]]
        assert {t.data_type for t in stored} == {container if len(widths) == 1 else TensorProto.UINT8}
        assert [len(t.raw_data) for t in stored] == [-(-np.prod(layer.weight_shape) * w // 8) for w in widths]


def no_float_as_large_as_a_weight(written: Written) -> None:
    sizes = {t.name: np.prod(t.dims) for t in written.proto.graph.initializer if t.data_type == TensorProto.FLOAT}
    assert max(sizes.values()) < min(np.prod(layer.weight_shape) for layer in written.layers.values()), sizes


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
@pytest.mark.parametrize("target", ["ort-cuda", "tensorrt", "openvino"])
def test_every_target_holds_the_solutions_weights(quantize: Quantize, bits: int, activations: str, target: str) -> None:
    written = quantize(zoo(), ZOO_FEEDS, bits=bits, target=target, activations=activations)
    integer = activations == "auto" and target != "ort-cuda"
    holds_the_solution(written, bits, INTEGER if integer else WEIGHT_ONLY)
    stored = {t.name: t for t in written.proto.graph.initializer}
    plan, opset = written.solved.plan.activations, written.solved.plan.opset
    for layer in written.layers.values():
        width = 8 if isinstance(layer.kind, Gather) else bits
        wanted = code_bytes(layer, width, plan, TARGETS[target], opset)
        assert len(stored[f"{layer.weight}.codes"].raw_data) == wanted
    types = {stored[n.input[2]].data_type for n in written.proto.graph.node if n.op_type == "QuantizeLinear"}
    signed = {"tensorrt": {TensorProto.INT8}, "openvino": {TensorProto.UINT8}}
    assert types == (signed[target] if integer else set())
    assert lint(read_model(written.path), TARGETS[target]) == []
    before = Session(written.source.SerializeToString()).run(written.feeds)
    after = Session(written.path, float_matmul_nbits=True, disable_qdq_fusion=True).run(written.feeds)
    # 45.8 to 48.3, 24.2 to 24.6 and 9.2 to 9.4 dB were seen
    assert sqnr_of(before, after) > {8: 43, 4: 22, 2: 7}[bits]


def test_tensorrt_takes_blocks_that_fill_the_inputs_twice(quantize: Quantize) -> None:
    nodes = [node("MatMul", f"x{k} w{k}", f"y{k}") for k in (96, 40, 32, 16)]
    shapes = {f"w{k}": (k, 48) for k in (96, 40, 32, 16)}
    inputs = {f"x{k}": ["n", k] for k in (96, 40, 32, 16)}
    source = model(nodes, shapes, inputs, [f"y{k}" for k in (96, 40, 32, 16)])
    feeds = {f"x{k}": normal(24, k) for k in (96, 40, 32, 16)}
    written = quantize(source, feeds, bits=4, target="tensorrt", activations="none")
    attributes = {
        k: {a.name: a.i for a in written.node(f"y{k}.weight").attribute} for k in (96, 40, 32, 16)
    }  # fmt: skip
    # 40 has no power of two from 16 on, 16 none that is there twice: one scale for the channel
    blocks = {96: {"axis": 0, "block_size": 32}, 32: {"axis": 0, "block_size": 16}, 40: {"axis": 1}, 16: {"axis": 1}}
    assert attributes == blocks
    of_eight = quantize(source, feeds, bits=8, target="tensorrt", activations="none")
    assert {a.name for a in of_eight.node("y96.weight").attribute} == {"axis"}


def test_the_skip_of_a_residual_is_quantized_and_outputs_are_not(quantize: Quantize) -> None:
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", "x w0", "c0", **pads), node("Relu", "c0", "r0"), node("Conv", "r0 w1", "c1", **pads),
        node("Add", "r0 c1", "s1"), node("Relu", "s1", "r1"), node("Conv", "r1 w2", "c2", **pads),
        node("Conv", "r1 w3", "c3", **pads), node("Add", "c2 c3", "s2"), node("Conv", "s2 w4", "y", **pads),
    ]  # fmt: skip
    source = model(nodes, {f"w{i}": (8, 8, 3, 3) for i in range(5)}, {"x": ["n", 8, 6, 6]}, ["y"])
    written = quantize(source, {"x": normal(24, 8, 6, 6)}, bits=8, target="tensorrt")
    quantized = {n.input[0] for n in written.proto.graph.node if n.op_type == "QuantizeLinear"}
    # c1 and c2 are added to as they come out of the product; s2 is the input of a layer
    assert quantized == {"x", "r0", "r1", "c3", "s2"}
    assert [i.endswith(".dequantized") for i in written.node("s1").input] == [True, False]
    assert [i.endswith(".dequantized") for i in written.node("s2").input] == [False, True]


def test_queries_keys_and_values_of_one_product_leave_it_quantized_for_tensorrt(quantize: Quantize) -> None:
    nodes = [
        node("MatMul", "x w0", "m"), node("Add", "m b", "qkv"), node("Reshape", "qkv shape", "h"),
        *(node("Gather", f"h {i}", f"part{i}", axis=2) for i in ("zero", "one")),
        node("Mul", "partzero partone", "product"), node("MatMul", "product w1", "y"),
    ]  # fmt: skip
    constants = {
        "w0": (16, 48), "b": (48,), "w1": (24, 8), "shape": [0, 0, 2, 24], "zero": np.int64(0), "one": np.int64(1)
    }  # fmt: skip
    source = model(nodes, constants, {"x": ["n", 4, 16]}, ["y"])
    for target, expected in (("tensorrt", {"x", "qkv", "product"}), ("ort-cpu", {"x", "product"})):
        written = quantize(source, {"x": normal(24, 4, 16)}, bits=8, target=target)
        assert {n.input[0] for n in written.proto.graph.node if n.op_type == "QuantizeLinear"} == expected


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


def activations_have_rank_zero(written: Written) -> None:
    """A scale of shape [1] makes QLinearAdd fail to load."""
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
    """With any other scale than s_x * s_w, to the last bit, ONNX Runtime keeps the layer in float."""
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
        assert (np.abs(codes * scale.astype(np.float64) - (original + shift)) <= 0.501 * scale + 1e-6).all()
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


@pytest.mark.parametrize(
    "size",
    [
        0,
        1e-4,
        1e-6,
        1e-20,
    ],
)
def test_the_bias_of_a_channel_of_tiny_weights_survives(quantize: Quantize, size: float) -> None:
    """A folded BatchNorm leaves such channels: all that they give is their bias."""
    weight = normal(16, 8, 3, 3)
    weight[5] *= np.float32(size)
    weights = {"w": weight, "b": np.linspace(50, 200, 16).astype(np.float32)}
    source = model([node("Conv", "x w b", "c"), node("Relu", "c", "y")], weights, {"x": ["n", 8, 6, 6]}, ["y"])
    feeds = {"x": normal(24, 8, 6, 6)}
    written = quantize(source, feeds, bits=8)
    before, after = (Session(m).run(feeds) for m in (source.SerializeToString(), written.path))
    # one layer at 8 bits, its input and output at 8 bits
    assert sqnr_of(before, after) > 35


# Kernels --------------------------------------------------------------------------------------------------------------

IMAGE = {"x": ["n", 8, 12, 12]}
IMAGE_FEEDS = {"x": normal(24, 8, 12, 12)}
CONV = {"w0": (8, 8, 3, 3), "w1": (8, 8, 3, 3), "b": (8,)}
PADS = {"pads": [1, 1, 1, 1]}


# what stands at the ends: the conversions, and the change of layout that ONNX Runtime makes for its convolutions
AROUND = {"QuantizeLinear", "DequantizeLinear", "Transpose"}


def all_in_integers(written: Written, **kernels: int) -> None:
    """Just these kernels between the first quantization and the last dequantization, and near the float model."""
    found = written.kernels
    assert found.float_behind_dequantize == 0, found.counts
    ours = {op: n for op, n in found.counts.items() if op not in AROUND}
    assert ours == kernels
    before = Session(written.source.SerializeToString()).run(written.feeds)
    # a few layers in a row at 8 bits each, every one about -40 dB
    assert sqnr_of(before, Session(written.path).run(written.feeds)) > 28


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_conv_and_relu_become_one_integer_kernel(quantize: Quantize, bits: int) -> None:
    nodes = [node("Conv", "x w0 b", "c", **PADS), node("Relu", "c", "y")]
    written = quantize(model(nodes, CONV, IMAGE, ["y"]), IMAGE_FEEDS, bits=bits)
    found = written.kernels
    assert found.integer == {"QLinearConv": 1}
    assert set(found.counts) == AROUND | {"QLinearConv"}


@pytest.mark.parametrize("scale", [0.5, 10.0])
def test_conv_and_relu6_become_one_integer_kernel(quantize: Quantize, scale: float) -> None:
    """Whether the values reach 6 or not."""
    nodes = [node("Conv", "x w0 b", "c", **PADS), node("Clip", "c low high", "y")]
    weights = {"w0": normal(8, 8, 3, 3) * np.float32(scale / 8), "b": (8,), "low": 0.0, "high": 6.0}
    all_in_integers(quantize(model(nodes, weights, IMAGE, ["y"]), IMAGE_FEEDS, bits=8), QLinearConv=1)


@pytest.mark.parametrize(
    ("weight", "x", "attributes"),
    [
        ((16, 8, 3), (24, 8, 20), {}),
        ((16, 8, 2, 2, 2), (24, 8, 4, 4, 4), {}),
        ((16, 2, 3, 3), (24, 8, 9, 9), {"group": 4}),
        ((16, 1, 3, 3), (24, 16, 9, 9), {"group": 16}),
        ((16, 8, 3, 3), (24, 8, 9, 9), {"strides": [2, 2], "dilations": [2, 2]}),
    ],
)
def test_every_convolution_becomes_an_integer_kernel(
    quantize: Quantize, weight: tuple, x: tuple, attributes: dict
) -> None:
    source = model([node("Conv", "x w", "y", **attributes)], {"w": weight}, {"x": ["n", *x[1:]]}, ["y"])
    all_in_integers(quantize(source, {"x": normal(*x)}, bits=8), QLinearConv=1)


@pytest.mark.parametrize("deep", [False, True])
def test_parts_of_a_concat_are_copied_where_they_are_made_together(quantize: Quantize, deep: bool) -> None:
    """One more layer in a branch and the scale of the whole is not known in time: each has its own."""
    middle = [node("Conv", "r0 w1 b", "d0", **PADS), node("Relu", "d0", "e0")] if deep else [node("Relu", "c0", "e0")]
    source = model(
        [
            node("Conv", "x w0 b", "c0", **PADS),
            *([node("Relu", "c0", "r0")] if deep else []),
            *middle,
            node("Conv", "x w2 b", "c1", **PADS),
            node("Relu", "c1", "e1"),
            node("Concat", "e0 e1", "both", axis=1),
            node("Conv", "both w4 b", "y", **PADS),
        ],
        CONV | {"w2": (8, 8, 3, 3), "w4": (8, 16, 3, 3)},
        IMAGE,
        ["y"],
    )
    written = quantize(source, IMAGE_FEEDS, bits=8)
    assert written.kernels.integer == {"QLinearConv": 4 if deep else 3, "QLinearConcat": 1}
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(written.path).graph.initializer}
    scales = [float(tensors[f"{name}.scale"]) for name in ("e0", "e1", "both")]
    assert scales[0] == scales[2]
    assert scales[1] <= scales[2] if deep else scales[1] == scales[2]
    before = Session(written.source.SerializeToString()).run(written.feeds)
    assert sqnr_of(before, Session(written.path).run(written.feeds)) > 28


def test_a_residual_network_runs_in_integers_from_end_to_end(quantize: Quantize) -> None:
    source = model(
        [
            node("Conv", "x w0 b", "c0", **PADS),
            node("Relu", "c0", "r0"),
            node("Conv", "r0 w1 b", "c1", **PADS),
            node("Add", "c1 r0", "a"),
            node("Relu", "a", "r1"),
            node("MaxPool", "r1", "m", kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", "m w2 b", "c2", **PADS),
            node("Relu", "c2", "r2"),
            node("GlobalAveragePool", "r2", "g"),
            node("Flatten", "g", "f"),
            node("Gemm", "f w3 b3", "y", transB=1),
        ],
        CONV | {"w2": (8, 8, 3, 3), "w3": (20, 8), "b3": (20,)},
        IMAGE,
        ["y"],
    )
    written = quantize(source, IMAGE_FEEDS, bits=8)
    found = written.kernels
    all_in_integers(
        written, QLinearConv=3, QLinearAdd=1, NhwcMaxPool=1, QLinearGlobalAveragePool=1, QGemm=1,
        **{op: n for op, n in found.counts.items() if op in ("Flatten", "Reshape")},
    )  # fmt: skip
    # in at the beginning, out at the end
    assert (found.counts["QuantizeLinear"], found.counts.get("DequantizeLinear", 0)) == (1, 0)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_matmul_becomes_an_integer_kernel(quantize: Quantize, static: bool, rank: int, bias: bool, bits: int) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "a")] if bias else [node("MatMul", "x w", "a")]
    nodes += [node("Tanh", "a", "y")]
    weights = {"w": (64, 32)} | ({"b": (32,)} if bias else {})
    shape = (24, 5, 64) if rank == 3 else (24, 64)
    inputs = {"x": list(shape) if static else [*["n", "m"][: rank - 1], 64]}
    if static:
        inputs["x"][0] = 4
    written = quantize(model(nodes, weights, inputs, ["y"]), {"x": normal(*shape)}, bits=bits)
    found = written.kernels
    assert found.float_behind_dequantize == 0, found.counts
    assert sum(found.integer.values()) == 1, found.counts
    assert not {"MatMul", "Gemm", "FusedMatMul"} & set(found.counts)


@pytest.mark.parametrize("shape", [["n", 64], ["n", 5, 64], [4, 5, 64]])
def test_nothing_of_a_bias_is_dequantized_at_run_time(quantize: Quantize, shape: list[Any]) -> None:
    """Behind a MatMul that cannot become a Gemm it is float, elsewhere the kernel takes it in."""
    source = model(
        [node("MatMul", "x w", "m"), node("Add", "m b", "y")], {"w": (64, 32), "b": (32,)}, {"x": shape}, ["y"]
    )
    written = quantize(source, {"x": normal(24, *shape[1:])}, bits=8)
    found = written.kernels
    assert sum(found.integer.values()) == 1, found.counts
    if shape == ["n", 5, 64]:
        assert not {"DequantizeLinear", "Gemm", "MatMul"} & set(found.counts)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 3.0)])
def test_a_gemm_becomes_an_integer_kernel(
    quantize: Quantize, trans_b: int, bias: bool, alpha: float, beta: float
) -> None:
    weights = {"w": (32, 64) if trans_b else (64, 32)} | ({"b": (32,)} if bias else {})
    nodes = [node("Gemm", "x w b" if bias else "x w", "y", transB=trans_b, alpha=alpha, beta=beta)]
    written = quantize(model(nodes, weights, {"x": ["n", 64]}, ["y"]), {"x": normal(64, 64)}, bits=8)
    all_in_integers(written, QGemm=1)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("granularity", ["channel", "32"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_only_matmul_becomes_matmulnbits(quantize: Quantize, bits: int, granularity: str, bias: bool) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "y")] if bias else [node("MatMul", "x w", "y")]
    weights = {"w": (128, 32)} | ({"b": (32,)} if bias else {})
    source = model(nodes, weights, {"x": ["n", 5, 128]}, ["y"])
    written = quantize(source, {"x": normal(24, 5, 128)}, bits=bits, activations="none", granularity=granularity)
    found = written.kernels
    assert found.integer == {"MatMulNBits": 1}
    assert found.float_behind_dequantize == 0
    assert not {"MatMul", "FusedMatMul", "DequantizeLinear"} & set(found.counts)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("columns", [5, 10, 16, 63])
def test_a_weight_only_matmul_of_any_number_of_outputs_computes_what_is_written(
    quantize: Quantize, bits: int, columns: int
) -> None:
    source = model([node("MatMul", "x w", "y")], {"w": (128, columns)}, {"x": ["n", 5, 128]}, ["y"])
    feeds = {"x": normal(24, 5, 128)}
    written = quantize(source, feeds, bits=bits, activations="none")
    plain, fused = (Session(written.path, level=level).run(feeds) for level in (0, 99))
    # MatMulNBits rounds its input to 8 bits, which leaves 6e-3; of INT2 codes of 5 outputs it made garbage
    assert sqnr_of(plain, fused) > 35


def test_a_weight_only_matmul_without_a_bias_gets_one_that_carries_the_mean(quantize: Quantize) -> None:
    source = model([node("MatMul", "x w", "y")], {"w": (128, 32)}, {"x": ["n", 5, 128]}, ["y"])
    feeds = {"x": normal(24, 5, 128) + np.float32(2)}
    written = quantize(source, feeds, bits=3, activations="none")
    wanted, got = (Session(m).run(feeds)["y"] for m in (source.SerializeToString(), written.path))
    lost = np.abs((got - wanted).mean(axis=(0, 1)))
    assert [n.op_type for n in written.proto.graph.node] == ["DequantizeLinear", "MatMul", "Add"]
    # what is left is how well some hundred positions tell a mean; without a bias it outweighs the rest of the error
    assert lost.max() < 0.25 * (got - wanted).std()


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_only_gemm_becomes_matmulnbits(quantize: Quantize, trans_b: int, bias: bool) -> None:
    weights = {"w": (32, 128) if trans_b else (128, 32)} | ({"b": (32,)} if bias else {})
    nodes = [node("Gemm", "x w b" if bias else "x w", "y", transB=trans_b, alpha=0.5, beta=3.0)]
    written = quantize(
        model(nodes, weights, {"x": ["n", 128]}, ["y"]), {"x": normal(64, 128)}, bits=8, activations="none"
    )
    assert written.kernels.integer == {"MatMulNBits": 1}
    assert written.kernels.float_behind_dequantize == 0
    before = Session(written.source.SerializeToString()).run(written.feeds)
    assert sqnr_of(before, Session(written.path, level=0).run(written.feeds)) > 35


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("activations", ["auto", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.25), (0.25, 1.0), (4.0, 0.5)])
def test_a_gemms_alpha_and_beta_count_once(
    tmp_path: Path, trans_a: int, activations: str, bias: bool, alpha: float, beta: float
) -> None:
    # no bias of the source's own: nothing else than the layer's product is in the output
    weights = {"w": (32, 16)} | ({"b": np.zeros(16, np.float32)} if bias else {})
    nodes = [node("Gemm", "x w b" if bias else "x w", "y", transA=trans_a, alpha=alpha, beta=beta)]
    source = model(nodes, weights, {"x": [32, "n"] if trans_a else ["n", 32]}, ["y"])
    # a mean, so that the bias carries a shift
    x = normal(32, 48) + np.float32(2) if trans_a else normal(48, 32) + np.float32(2)
    samples = {"x": np.stack([x] * 4)} if trans_a else {"x": x}
    options = {"bits": 4, "activations": activations, "device": "cpu"}
    report = comq_onnx.quantize(source, tmp_path / "q.onnx", samples, **options)
    before = Session(source.SerializeToString()).run({"x": x})
    after = Session(tmp_path / "q.onnx", level=0).run({"x": x})
    # 8-bit activations, and of 48 samples some that were held back
    assert sqnr_of(before, after) > -report.layers[0].error_db - 4


def test_a_weight_only_convolution_costs_no_dequantization_at_run_time(quantize: Quantize) -> None:
    """A DequantizeLinear would run at every call; Cast and Mul are folded when the model is loaded."""
    nodes = [node("Conv", "x w0 b", "c", **PADS), node("Relu", "c", "y")]
    written = quantize(model(nodes, CONV, IMAGE, ["y"]), IMAGE_FEEDS, bits=4, activations="none")
    counts = written.kernels.counts
    assert sum(n for op, n in counts.items() if op in ("Conv", "FusedConv")) == 1
    assert not {"DequantizeLinear", "Cast", "Mul"} & set(counts)


def lookup() -> tuple[onnx.ModelProto, Feeds]:
    nodes = [node("Gather", "table ids", "e"), node("Tanh", "e", "t"), node("MatMul", "t w", "y")]
    source = model(nodes, {"table": (500, 32), "w": (32, 32)}, {"ids": ["n", 6]}, ["y"])
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
    source = model(nodes, {"table": (500, 32), "w": (32, 32)}, {"ids": ["n", 6]}, ["y"])
    written = quantize(source, {"ids": np.random.default_rng(0).integers(0, 500, (24, 6))}, bits=8)
    assert written.kernels.float_behind_dequantize == 0
    assert sum(written.kernels.integer.values()) == 1


def weight_only_before_integer(quantize: Quantize, bias: bool) -> Written:
    """Blocks of 32 for the first layer; the second has 32 inputs, one block, and could run in integers."""
    nodes = [node("Gemm", "x w0 b" if bias else "x w0", "h"), node("MatMul", "h w1", "y")]
    weights = {"w0": (64, 32), "w1": (32, 16)} | ({"b": (32,)} if bias else {})
    return quantize(model(nodes, weights, {"x": ["n", 64]}, ["y"]), {"x": normal(64, 64)}, bits=8, granularity="32")


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
    source = model(
        [node("MatMul", "x w", "m"), node("Tanh", "m", "t"), node("MatMul", "t w", "y")],
        {"w": (16, 16)},
        {"x": ["n", 16]},
        ["y"],
    )
    written = quantize(source, {"x": normal(32, 16)}, bits=4)
    first, second = (written.value(written.node(n).input[1]) for n in ("m", "y"))
    assert np.array_equal(first, second)
    assert "w" not in written.initializers


# Grids ----------------------------------------------------------------------------------------------------------------


def layer_of(source: onnx.ModelProto) -> Layer:
    import onnx_ir as ir

    from comq_onnx.model.layers import list_layers

    (layer,) = list_layers(ir.from_proto(source))[0]
    return layer


NO_ACTIVATIONS = ActivationPlan("float32")


@pytest.mark.parametrize(
    ("op", "inputs", "weight", "x", "attributes", "block"),
    [
        ("MatMul", "x w", (64, 8), (4, 64), {}, 32),
        ("MatMul", "x w", (32, 8), (4, 32), {}, None),
        # a MatMul's last block may be smaller, where the target takes that; all other blocks must fill the inputs
        ("MatMul", "x w", (80, 8), (4, 80), {}, 32),
        ("MatMul", "x w", (2, 64, 8), (2, 4, 64), {}, 32),
        ("MatMul", "x w", (2, 80, 8), (2, 4, 80), {}, 16),
        ("MatMul", "w x", (8, 64), (64, 4), {}, 32),
        ("MatMul", "w x", (8, 72), (72, 4), {}, None),
        ("Gemm", "x w", (8, 64), (4, 64), {"transB": 1}, 32),
        ("Gemm", "x w", (64, 8), (64, 4), {"transA": 1}, 32),
        ("Conv", "x w", (8, 64, 1, 1), (1, 64, 4, 4), {}, 32),
        ("Conv", "x w", (8, 16, 3, 3), (1, 16, 4, 4), {}, 16),
        ("Conv", "x w", (64, 1, 3, 3), (1, 64, 4, 4), {"group": 64}, None),
        # whole kernels of 4 numbers, and of 9
        ("ConvTranspose", "x w", (32, 4, 2, 2), (1, 32, 4, 4), {"group": 2}, 32),
        ("ConvTranspose", "x w", (32, 8, 3, 3), (1, 32, 4, 4), {}, None),
    ],
)
def test_blocks_are_what_the_form_of_a_layer_can_hold(
    op: str, inputs: str, weight: tuple, x: tuple, attributes: dict, block: int | None
) -> None:
    layer = layer_of(model([node(op, inputs, "y", **attributes)], {"w": weight}, {"x": x}, ["y"]))
    form = form_of(layer, NO_ACTIVATIONS)
    grid = Grid(4, symmetric=False, block_size=32)
    assert supported_grid(layer, form, grid, ORT_CPU) == Grid(4, symmetric=False, block_size=block)
    assert supported_grid(layer, WeightForm.INTEGER, grid, ORT_CPU) == Grid(4, symmetric=False)
    assert supported_grid(layer, form, Grid(3), ORT_CPU) == Grid(3)


def test_a_target_of_whole_blocks_gets_smaller_ones_that_fill_the_inputs() -> None:
    layer = layer_of(model([node("MatMul", "x w", "y")], {"w": (96, 8)}, {"x": (4, 96)}, ["y"]))
    for target, block in ((ORT_CPU, 64), (TENSORRT, 32)):
        grid = supported_grid(layer, WeightForm.BLOCKED, Grid(4, block_size=64), target)
        assert grid == Grid(4, block_size=block)


def test_a_table_has_no_zero_point() -> None:
    table = layer_of(model([node("Gather", "w ids", "y")], {"w": (20, 16)}, {"ids": (4,)}, ["y"]))
    grid = supported_grid(table, WeightForm.LOOKED_UP, Grid(8, symmetric=False, block_size=16), ORT_CPU)
    assert grid == Grid(8)


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
    feeds = {"x": normal(24, *x[1:])}
    options = {"activations": "none", "granularity": granularity, "target": target, "uniform": True}
    written = quantize(model([nodes], weights, {"x": list(x)}, ["y"]), feeds, bits=bits, **options)
    (layer,) = written.layers.values()
    solution = written.solved.solutions[layer.name].weight
    assert solution.grid.per_tensor == (granularity == "tensor")
    held = written.value(f"{layer.name}.weight", {})
    assert np.array_equal(held, layer.kind.from_matrix(solution.dequantize()))
    # ONNX Runtime runs the product alone; it folds no DequantizeLinear, which TensorRT wants
    assert target == "tensorrt" or len(written.kernels.counts) == 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_has_a_container_at_every_opset(bits: int) -> None:
    for opset, wanted in ((13, "INT8"), (21, "INT8" if bits > 4 else "INT4"), (25, {2: "INT2"}.get(bits))):
        found = ORT_CPU.integer.container(bits, opset)[0]
        assert found == (wanted or ("INT8" if bits > 4 else "INT4"))
