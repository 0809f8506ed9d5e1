"""Test that evening out channels keeps the float model, makes the quantized one better, and is done where it pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Done

from comq_onnx.model.layers import Prepared
from comq_onnx.model.prepare import prepare_model
from comq_onnx.plan import smoothing
from comq_onnx.plan.activations import ActivationPlan, plan_activations
from comq_onnx.solve.grid import Grid
from comq_onnx.targets.catalog import ORT_CPU
from models import Arrays, build, infer, mlp, normal, weight

# a few channels far larger than the rest, as in transformers
SIZES = np.where(np.arange(64) % 20 == 3, 60, 1).astype(np.float32)


def between(middle: str, **weights: np.ndarray) -> onnx.ModelProto:
    """Build x [n, 12, 64] -> the nodes of `middle` -> v -> MatMul of 160 outputs -> y."""
    return build(
        f"""between (float[n, 12, 64] x) => (float[n, 12, 160] y) {{
            {middle}
            [reader] y = MatMul (v, w)
        }}""",
        {"w": weight(64, 160) / SIZES[:, None], **weights},
    )


NORM = between("v = LayerNormalization (x, gamma, beta)", gamma=SIZES, beta=SIZES * normal(64, seed=3, scale=0.3))
AFFINE = between(
    """n = LayerNormalization (x, ones)
    m = Mul (n, gamma)
    v = Add (m, beta)""",
    ones=np.ones(64, np.float32), gamma=SIZES, beta=SIZES * normal(64, seed=3, scale=0.3),
)  # fmt: skip
BRANCHED = build(
    """branched (float[n, 12, 64] x) => (float[n, 12, 160] y, float[n, 12, 64] z) {
        v = LayerNormalization (x, gamma)
        [reader] y = MatMul (v, w)
        z = Tanh (v)
    }""",
    {"w": weight(64, 160) / SIZES[:, None], "gamma": SIZES},
)


def unsized() -> onnx.ModelProto:
    """Build a layer that reads x itself, which another operator reads too."""
    return build(
        """unsized (float[n, 12, 64] x) => (float[n, 12, 160] y, float[n, 12, 64] z) {
            z = Tanh (x)
            [reader] y = MatMul (x, w)
        }""",
        {"w": weight(64, 160)},
    )


FED = between("v = Mul (x, sizes)", sizes=SIZES[None, None])


def opened(model: onnx.ModelProto) -> tuple[Prepared, ActivationPlan, dict[str, Grid]]:
    """Prepare a model; return it with its activation plan and grids of 8 bits."""
    prepared = prepare_model(ir.from_proto(model), 17, 13)
    plan = plan_activations(prepared.model, prepared.layers, ORT_CPU, "uint8")
    return prepared, plan, {layer.name: Grid(8) for layer in prepared.layers}


def factors_of(model: onnx.ModelProto, samples: Arrays, bits: int = 8) -> tuple[Prepared, smoothing.Factors]:
    """Prepare a model and find the factors of its channels."""
    prepared, plan, grids = opened(model)
    among = smoothing.candidates(prepared, plan)
    names = list(among)
    part = ir.to_proto(smoothing.graphs.with_outputs(prepared.model, names))
    values: Iterator[Mapping[str, np.ndarray]] = iter([infer(part, samples)] if names else [])
    grids = {name: Grid(bits) for name in grids}
    return prepared, smoothing.find_factors(prepared, among, plan.dtype, grids, values, [None] * bool(names))


@pytest.mark.parametrize(("model", "nodes"), [(NORM, 0), (AFFINE, 0), (BRANCHED, 1), (FED, 1)])
def test_the_model_stays_what_it_is(model: onnx.ModelProto, nodes: int) -> None:
    samples = {"x": normal(64, 12, 64)}
    before = infer(model, samples)
    prepared, factors = factors_of(model, samples)
    assert list(factors) == ["v"]
    count = sum(node.op_type == "Mul" for node in prepared.model.graph)
    layers = smoothing.apply(prepared.model, prepared.layers, factors)
    assert sum(node.op_type == "Mul" for node in prepared.model.graph) == count + nodes
    assert layers[0].input == ("v.evened" if nodes else "v")
    after = infer(ir.to_proto(prepared.model), samples)
    assert all(np.allclose(before[name], after[name], rtol=1e-4, atol=1e-4) for name in before)
    # and the channels are of more equal sizes
    seen = infer(ir.to_proto(smoothing.graphs.with_outputs(prepared.model, [layers[0].input])), samples)[
        layers[0].input
    ]
    sizes = np.abs(seen).max(axis=(0, 1))
    assert sizes.max() / np.median(sizes) < 20


def test_a_gemm_with_a_transposed_weight_and_a_graph_input() -> None:
    model, samples = mlp(), {"x": normal(64, 32) * np.where(np.arange(32) == 5, 40, 1).astype(np.float32)}
    before = infer(model, samples)["y"]
    prepared, plan, _ = opened(model)
    factors = {"x": np.exp(normal(32, seed=4)), "r": np.exp(normal(48, seed=5))}
    assert set(smoothing.candidates(prepared, plan)) == set(factors)
    layers = smoothing.apply(prepared.model, prepared.layers, factors)
    assert [layer.input for layer in layers] == ["x.evened", "r.evened"]
    assert np.allclose(infer(ir.to_proto(prepared.model), samples)["y"], before, rtol=1e-4, atol=1e-4)


def test_even_channels_get_no_node() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (64, 12, 64)).astype(np.float32)
    assert factors_of(unsized(), {"x": x})[1] == {}


def test_what_the_weight_would_lose_counts() -> None:
    """Test rare outliers: smaller channels help the activation; at 2 bits the weight loses more by it than at 8."""
    x = normal(64, 12, 64)
    x[..., 3].reshape(-1)[::100] *= 60
    eight, two = (factors_of(unsized(), {"x": x}, bits)[1]["x"] for bits in (8, 2))
    assert eight.argmin() == two.argmin() == 3
    assert eight[3] < 0.5 * two[3]


def test_a_weight_of_two_layers_is_left_alone() -> None:
    model = build(
        """shared (float[n, 12, 64] x) => (float[n, 12, 64] y) {
            v = LayerNormalization (x, gamma)
            [first] a = MatMul (v, w)
            b = Tanh (a)
            [second] y = MatMul (b, w)
        }""",
        {"w": weight(64, 64), "gamma": SIZES},
    )
    prepared, plan, _ = opened(model)
    assert smoothing.candidates(prepared, plan) == {}


def test_convolutions_are_left_alone() -> None:
    model = build(
        "g (float[n, 8, 9, 9] x) => (float[n, 32, 7, 7] y) { y = Conv (x, w) }", {"w": weight(32, 8, 3, 3, fan=72)}
    )
    prepared, plan, _ = opened(model)
    assert smoothing.candidates(prepared, plan) == {}


@pytest.mark.parametrize("model", [NORM, BRANCHED, FED])
def test_smoothing_raises_the_sqnr(
    quantized: Callable[..., Done], model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = {"x": normal(64, 12, 64)}
    done = quantized(model, samples)
    assert any("evened out" in note for note in done.report.notes)
    monkeypatch.setattr(smoothing, "candidates", lambda *_: {})
    assert done.sqnr > quantized(model, samples, floor=10).sqnr + 5


def test_inside_a_branch_that_is_taken(quantized: Callable[..., Done]) -> None:
    """Test that the graph that is walked and the one that is written, which differ here, are evened out alike."""
    model = build(
        """chosen (float[n, 12, 64] x) => (float[n, 12, 160] y) {
            m = Mul (x, sizes)
            [reader] a = MatMul (m, w)
            flag = Constant <value = bool {1}> ()
            many = Shape (x)
            y = If (flag) <
                then_branch = then () => (float[n, 12, 160] t) { t = Relu (a) },
                else_branch = other () => (float[n, 12, 160] e) { e = Tanh (a) }
            >
        }""",
        {"w": weight(64, 160) / SIZES[:, None], "sizes": SIZES[None, None]},
    )
    done = quantized(model, {"x": normal(64, 12, 64)})
    assert any("evened out" in note for note in done.report.notes)
    assert done.sqnr > 30
