"""Test that no operator before or behind a quantized product makes ONNX Runtime compute that product in float."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from products import BEHIND, PRODUCTS, WIDTH, branches

import comq_onnx
from comq_onnx.evaluate.kernels import FLOAT_PRODUCTS, INTEGER_PRODUCTS, executed_kernels
from comq_onnx.metrics import sqnr_of
from comq_onnx.plan import integer_gain as gains
from comq_onnx.runtime.session import Session
from models import build, normal, weight


def check(path: Path, count: int) -> None:
    """Assert that all `count` products have an integer kernel at every level that has one."""
    for level in (2, 99):
        kernels = executed_kernels(path, level=level)
        assert kernels.float_behind_dequantize == 0, kernels.counts
        in_float = {layer: op for layer, op in kernels.of_layer.items() if op not in INTEGER_PRODUCTS}
        assert in_float == {}
        assert sum(n for op, n in kernels.counts.items() if op in INTEGER_PRODUCTS) == count
        assert not FLOAT_PRODUCTS & set(kernels.counts)


# with comq a product without a bias gets one; rounding alone leaves it without
ALONE = [
    *((product, "2 open", "rtn") for product in PRODUCTS),
    *((product, shape, "rtn") for product in ("matmul", "biased") for shape in ("3 open", "4 open")),
    ("gemm_of_one", "2 known", "rtn"), ("biased", "3 known", "rtn"), ("gemm_alone", "2 open", "comq"),
]  # fmt: skip


@pytest.mark.parametrize(("product", "shape", "solver"), ALONE)
@pytest.mark.parametrize("activations", ["none", "8"])
def test_no_operator_behind_a_product_makes_it_float(
    tmp_path: Path, product: str, shape: str, activations: str, solver: str
) -> None:
    model, feeds = branches(product, shape)
    comq_onnx.quantize(
        model, tmp_path / "q.onnx", feeds, bits=4, activations=activations, solver=solver, device="cpu", uniform=True
    )
    check(tmp_path / "q.onnx", len(BEHIND) + 1)
    feeds = {"given": feeds["given"][:8]}
    plain, optimized = (Session(tmp_path / "q.onnx", level=level).run(feeds) for level in (0, 99))
    # it jumps, so a tiny difference before it may be a large one behind it
    plain, optimized = ({k: v for k, v in x.items() if k != "thresholded_out"} for x in (plain, optimized))
    # MatMulNBits rounds its input to 8 bits, which leaves 6e-3, and integer kernels round their own way
    assert sqnr_of(plain, optimized) > 30


@pytest.mark.parametrize(
    ("activations", "product", "shape"),
    [("8", "gemm", "2 open"), ("8", "matmul", "3 open"), ("8", "biased", "2 open"), ("16", "gemm_of_rows", "2 open"),
     ("16", "biased", "2 open")],
)  # fmt: skip
def test_products_before_an_integer_layer_have_a_kernel(
    tmp_path: Path, product: str, shape: str, activations: str
) -> None:
    """What is behind the product is quantized for the next one. No kernel takes 16 bits: MatMulNBits is left."""
    model, feeds = branches(product, shape, "out = MatMul (r, tail_w)")
    comq_onnx.quantize(
        model, tmp_path / "q.onnx", feeds, bits=4, activations=activations, solver="rtn", device="cpu", uniform=True
    )
    check(tmp_path / "q.onnx", 2 * len(BEHIND) + 1)


@pytest.mark.parametrize(
    ("product", "shape"), [("matmul", "2 open"), ("biased", "3 known"), ("gemm_of_rows", "2 open")]
)
def test_weight_only_products_before_an_integer_layer_have_a_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, product: str, shape: str
) -> None:
    def tails(_prepared: Any, layers: Any, plan: Any, _shapes: Any, _costs: Any) -> Any:
        return plan([layer for layer in layers if layer.weight.endswith("tail_w")])

    monkeypatch.setattr(gains, "choose", tails)
    monkeypatch.setattr(gains, "is_measured", lambda _layer: True)
    model, feeds = branches(product, shape, "out = MatMul (r, tail_w)")
    comq_onnx.quantize(model, tmp_path / "q.onnx", feeds, bits=4, solver="rtn", device="cpu", uniform=True)
    check(tmp_path / "q.onnx", 2 * len(BEHIND) + 1)
    forms = {"MatMulNBits", "MatMulIntegerToFloat"}
    assert forms <= set(executed_kernels(tmp_path / "q.onnx").counts)


@pytest.mark.parametrize("before", ["Transpose", "Mul", "Div", "LayerNormalization", "Relu", "Softmax"])
@pytest.mark.parametrize("behind", ["r = Relu (v)", "a = Add (v, bias)\n r = Transpose (a)", "r = Mul (v, two)"])
@pytest.mark.parametrize("activations", ["none", "8"])
def test_no_operator_before_a_product_makes_it_float(
    tmp_path: Path, before: str, behind: str, activations: str
) -> None:
    others = {"Mul": ", two", "Div": ", two", "LayerNormalization": ", many"}.get(before, "")
    weights = {"w": weight(WIDTH, WIDTH), "front": weight(WIDTH, WIDTH, seed=2), "bias": normal(WIDTH)}
    weights |= {"two": np.asarray(2, np.float32), "many": 1 + normal(WIDTH)}
    text = f"""g (float[{WIDTH}, {WIDTH}] given) => (float[{WIDTH}, {WIDTH}] y) {{
        [first] f = MatMul (given, front)
        x = Tanh (f)
        b = {before} (x{others})
        [second] v = MatMul (b, w)
        {behind}
        y = Abs (r)
    }}"""
    read = set(re.findall(r"\w+", text))
    model = build(text, {n: w for n, w in weights.items() if n in read}, opset=18)
    comq_onnx.quantize(
        model, tmp_path / "q.onnx", {"given": normal(24 * WIDTH, WIDTH)}, bits=4, activations=activations,
        solver="rtn", device="cpu", uniform=True,
    )  # fmt: skip
    check(tmp_path / "q.onnx", 2)


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_files_for_other_runtimes_have_no_copies(tmp_path: Path, target: str) -> None:
    model, feeds = branches("matmul", "2 open")
    comq_onnx.quantize(model, tmp_path / "q.onnx", feeds, bits=8, target=target, solver="rtn", device="cpu")
    assert "Sum" not in {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}


@pytest.mark.parametrize("product", ["matmul", "biased", "gemm", "gemm_alone"])
def test_a_product_that_is_read_quantized_and_in_float_has_a_kernel(tmp_path: Path, product: str) -> None:
    part = re.sub(r"(\w+) = (MatMul|Gemm) ", r"[product] \1 = \2 ", PRODUCTS[product], count=1)
    text = f"""g (float[n, {WIDTH}] given) => (float[n, {WIDTH}] y, float[n, {WIDTH}] z) {{
        x = Tanh (given)
        {part}
        [behind] y = MatMul (v, w2)
        z = Tanh (v)
    }}"""
    weights = {"w": weight(WIDTH, WIDTH), "w2": weight(WIDTH, WIDTH, seed=2), "bias": normal(WIDTH)}
    weights["single"] = np.ones(1, np.float32)
    read = set(re.findall(r"\w+", text))
    model = build(text, {n: w for n, w in weights.items() if n in read}, opset=18)
    comq_onnx.quantize(
        model, tmp_path / "q.onnx", {"given": normal(64, WIDTH)}, bits=4, activations="8", solver="rtn", device="cpu",
        uniform=True,
    )  # fmt: skip
    check(tmp_path / "q.onnx", 2)


@pytest.mark.parametrize("moved", ["Relu (c)", "Reshape (c, flat)", "Transpose <perm = [0, 2, 3, 1]> (c)"])
def test_a_product_in_blocks_behind_and_before_quantized_convolutions_has_a_kernel(tmp_path: Path, moved: str) -> None:
    """ONNX Runtime moves their DequantizeLinear and QuantizeLinear over what only moves numbers."""
    width = 64 if "flat" in moved else 32
    text = f"""g (float[2, 32, 2, 32] given) => (float[2, 32, 2, 32] y)
    <int64[3] flat = {{0, 32, 64}}, int64[4] image = {{0, 32, 2, 32}}> {{
        [first] c = Conv <pads = [1, 1, 1, 1]> (given, w1)
        x = {moved}
        [blocks] m = MatMul (x, w2)
        b = Reshape (m, image)
        [last] y = Conv <pads = [1, 1, 1, 1]> (b, w1)
    }}"""
    weights = {"w1": weight(32, 32, 3, 3, fan=288), "w2": weight(width, width)}
    comq_onnx.quantize(
        build(text, weights, opset=18), tmp_path / "q.onnx", {"given": normal(16, 32, 2, 32)}, bits=4,
        granularity="16", activations="8", solver="rtn", device="cpu", uniform=True,
    )  # fmt: skip
    kernels = executed_kernels(tmp_path / "q.onnx")
    assert kernels.of_layer["blocks"] in INTEGER_PRODUCTS, kernels.of_layer


@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_a_subgraph_that_reads_a_moved_activation_does_not_end_onnx_runtime(tmp_path: Path, target: str) -> None:
    text = """g (float[n, 8, 8, 4] given, bool[n, 1] use) => (float[n, 32, 8] y) <int64[3] flat = {0, 8, 32}> {
        [first] c = Conv <pads = [1, 1, 1, 1]> (given, w1)
        r = Relu (c)
        x = Reshape (r, flat)
        t = Transpose <perm = [0, 2, 1]> (x)
        some = Cast <to = 1> (use)
        most = ReduceMax <keepdims = 0> (some)
        any = Cast <to = 9> (most)
        y = If (any) <
            then_branch = yes () => (float[n, 32, 8] a) { a = Tanh (t) },
            else_branch = no () => (float[n, 32, 8] b) { b = Abs (t) }
        >
    }"""
    model = build(text, {"w1": weight(8, 8, 3, 3, fan=72)}, opset=17)
    feeds = {"given": normal(32, 8, 8, 4), "use": normal(32, 1) > 1}
    comq_onnx.quantize(
        model, tmp_path / "q.onnx", feeds, bits=8, activations="8", target=target, solver="rtn", device="cpu"
    )
    onnx.save(model, tmp_path / "m.onnx")
    wanted = Session(tmp_path / "m.onnx").run(feeds)
    for level in (0, 1, 2, 99):
        assert sqnr_of(wanted, Session(tmp_path / "q.onnx", level=level).run(feeds)) > 30


@pytest.mark.parametrize("product", ["matmul", "gemm", "gemm_alone"])
@pytest.mark.parametrize("activations", ["none", "8"])
def test_a_product_that_is_transposed_has_a_kernel(tmp_path: Path, product: str, activations: str) -> None:
    part = re.sub(r"(\w+) = (MatMul|Gemm) ", r"[product] \1 = \2 ", PRODUCTS[product], count=1)
    text = f"g (float[8, {WIDTH}] x) => (float[{WIDTH}, 8] y) {{ {part}\n t = Transpose (v)\n y = Tanh (t) }}"
    weights = {"w": weight(WIDTH, WIDTH), "bias": normal(WIDTH)}
    model = build(text, {n: w for n, w in weights.items() if re.search(rf"\b{n}\b", text)}, opset=18)
    comq_onnx.quantize(
        model, tmp_path / "q.onnx", {"x": normal(64, WIDTH)}, bits=4, activations=activations, solver="rtn"
    )
    check(tmp_path / "q.onnx", 1)


def test_what_a_gemm_adds_zero_times_does_not_make_it_float(tmp_path: Path) -> None:
    text = f"""g (float[8, {WIDTH}] given) => (float[8, {WIDTH}] y) {{
        x = Tanh (given)
        [product] y = Gemm <beta = 0.0> (x, w, rows)
    }}"""
    model = build(text, {"w": weight(WIDTH, WIDTH), "rows": normal(8, WIDTH)}, opset=18)
    comq_onnx.quantize(model, tmp_path / "q.onnx", {"given": normal(64, WIDTH)}, bits=4, activations="8", solver="rtn")
    check(tmp_path / "q.onnx", 1)
