"""Test which layers run in integers because that is faster: predicted times, regions left float, and the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Done

import comq_onnx
from comq_onnx.model import graph as graphs
from comq_onnx.model.convolutions import Conv
from comq_onnx.model.layers import Layer, Prepared
from comq_onnx.model.prepare import prepare_model
from comq_onnx.plan import integer_gain
from comq_onnx.plan.activations import ActivationPlan, plan_activations
from comq_onnx.plan.integer_gain import CostModel
from comq_onnx.targets.catalog import ORT_CPU, ORT_WEB
from comq_onnx.targets.costs import ORT_CPU_COSTS
from comq_onnx.targets.target import Target
from models import build, cnn, infer, normal, op_types, samples_for, weight


def opened(model: onnx.ModelProto, samples: dict[str, np.ndarray]) -> tuple[Prepared, integer_gain.Shapes]:
    """Prepare a model; return it with the shapes of all its values."""
    prepared = prepare_model(ir.from_proto(model), 17, 13)
    names = [str(v.name) for node in prepared.model.graph for v in node.outputs]
    one = {name: array[:1] for name, array in samples.items()}
    part = ir.to_proto(graphs.with_outputs(prepared.model, names))
    return prepared, {name: np.shape(array) for name, array in {**one, **infer(part, one)}.items()}


def planner(prepared: Prepared) -> integer_gain.Planner:
    """Make a function that plans the activations for some layers in integers."""

    def plan(layers: object) -> ActivationPlan:
        return plan_activations(prepared.model, layers, ORT_CPU, "uint8")  # type: ignore[arg-type]

    return plan


def net(channels: int, size: int, middle: str = "b = HardSwish (a)") -> onnx.ModelProto:
    """Build two 3 x 3 convolutions with a float operator between them."""
    return build(
        f"""net (float[n, {channels}, {size}, {size}] x) => (float[n, {channels}, {size}, {size}] y) {{
            [first] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
            {middle}
            [second] y = Conv <pads = [1, 1, 1, 1]> (b, w2)
        }}""",
        {name: weight(channels, channels, 3, 3, fan=9 * channels, seed=i) for i, name in enumerate(("w1", "w2"))},
    )


def chosen(model: onnx.ModelProto, target: Target = ORT_CPU) -> frozenset[str]:
    """Return the layers that are chosen to run in integers."""
    prepared, shapes = opened(model, samples_for(model))
    return integer_gain.choose(prepared, prepared.layers, planner(prepared), shapes, target).integer_layers


def test_large_layers_gain_and_small_ones_do_not() -> None:
    assert chosen(net(64, 16)) == {"first", "second"}
    assert chosen(net(4, 16)) == frozenset()


def test_what_gains_differs_between_targets() -> None:
    model = build(
        """g (float[n, 32, 28, 28] x) => (float[n, 32, 28, 28] y) {
            [first] a = Conv (x, w1)
            b = Relu (a)
            [second] y = Conv (b, w2)
        }""",
        {"w1": weight(32, 32, 1, 1, fan=32), "w2": weight(32, 32, 1, 1, fan=32, seed=1)},
    )
    assert chosen(model) == {"first", "second"}
    assert chosen(model, ORT_WEB) == frozenset()
    assert chosen(net(64, 16), ORT_WEB) == {"first", "second"}


def test_convolutions_of_signals_stay_in_integers() -> None:
    model = build(
        "g (float[n, 4, 64] x) => (float[n, 16, 62] y) { [layer] y = Conv (x, w) }", {"w": weight(16, 4, 3, fan=12)}
    )
    assert chosen(model) == {"layer"}


def test_what_gains_stays_beside_what_does_not() -> None:
    model = build(
        """g (float[n, 64, 14, 14] x) => (float[n, 64, 14, 14] y) {
            [wide] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
            b = HardSwish (a)
            [deep] c = Conv <pads = [1, 1, 1, 1], group = 64> (b, w2)
            d = HardSwish (c)
            [last] y = Conv <pads = [1, 1, 1, 1]> (d, w3)
        }""",
        {"w1": weight(64, 64, 3, 3, fan=576), "w2": weight(64, 1, 3, 3, fan=9), "w3": weight(64, 64, 3, 3, fan=576)},
    )
    assert chosen(model) == {"wide", "last"}


def test_no_float_layer_is_left_between_quantized_values() -> None:
    """Test it because ONNX Runtime would round such a layer's weights itself, to 8 bits of its own choice."""
    model = build(
        """g (float[n, 64, 14, 14] x) => (float[n, 64, 14, 14] y) {
            [wide] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
            b = Relu (a)
            [deep] c = Conv <pads = [1, 1, 1, 1], group = 64> (b, w2)
            d = Relu (c)
            [last] y = Conv <pads = [1, 1, 1, 1]> (d, w3)
        }""",
        {"w1": weight(64, 64, 3, 3, fan=576), "w2": weight(64, 1, 3, 3, fan=9), "w3": weight(64, 64, 3, 3, fan=576)},
    )
    assert chosen(model) == {"wide", "deep", "last"}
    prepared, shapes = opened(model, samples_for(model))
    cost_model = CostModel(prepared, shapes, ORT_CPU)
    outer = [layer for layer in prepared.layers if layer.name != "deep"]
    assert cost_model.time(planner(prepared)(outer)) > integer_gain.FORBIDDEN_US


def test_the_time_is_the_sum_of_its_lines() -> None:
    model = net(8, 10)
    prepared, shapes = opened(model, samples_for(model))
    cost_model, plan = CostModel(prepared, shapes, ORT_CPU), planner(prepared)
    number, products = 8 * 10 * 10, 8 * 10 * 10 * 8 * 9
    costs = ORT_CPU_COSTS

    def layer(form: str) -> float:
        return costs.layers["window"][form].of(products, 8 * 8 * 9, 2 * number)

    layout = costs.layout.of(number)
    # in float the layout changes before and after each convolution, since HardSwish has no blocked kernel
    assert cost_model.time(plan([])) == pytest.approx(2 * layer("float") + 4 * layout)
    # in integers the inputs of both are quantized besides, and the outputs of both dequantized
    whole = 2 * layer("integer") + 2 * costs.quantize.of(number) + 2 * costs.dequantize.of(number) + 4 * layout
    assert cost_model.time(plan(prepared.layers)) == pytest.approx(whole)


def test_a_choice_is_never_predicted_slower_than_all_or_none() -> None:
    model = cnn(size=32)
    prepared, shapes = opened(model, samples_for(model))
    cost_model, plan = CostModel(prepared, shapes, ORT_CPU), planner(prepared)
    best = integer_gain.choose(prepared, prepared.layers, plan, shapes, ORT_CPU)
    matrices = [layer for layer in prepared.layers if not isinstance(layer.kind, Conv)]
    assert cost_model.time(best) <= min(
        cost_model.time(plan(prepared.layers)), cost_model.time(plan(matrices)) * (1 + integer_gain.WORTH)
    )


@pytest.mark.parametrize(("activations", "forms"), [("auto", {"folded"}), ("8", {"integer"})])
def test_activations_of_8_bits_run_every_layer_in_integers(
    quantized: Callable[..., Done], activations: str, forms: set[str]
) -> None:
    done = quantized(net(4, 16), activations=activations)
    assert {layer.form for layer in done.report.layers} == forms
    assert ("QuantizeLinear" in op_types(done.model)) == (activations == "8")
    assert any("slower" in note for note in done.report.notes) == (activations == "auto")
    assert {layer.slower for layer in done.report.layers} == {activations == "auto"}


def test_sequences_have_no_shape(tmp_path: Path) -> None:
    model = build(
        """g (float[n, 4, 16, 16] x) => (float[n, 4, 16, 16] y) {
            [layer] a = Conv <pads = [1, 1, 1, 1]> (x, w)
            parts = SplitToSequence <axis = 1> (a, sizes)
            y = ConcatFromSequence <axis = 1> (parts)
        }""",
        {"w": weight(4, 4, 3, 3, fan=36), "sizes": np.array([1, 3])},
    )
    report = comq_onnx.quantize(model, tmp_path / "q.onnx", {"x": normal(40, 4, 16, 16)}, device="cpu")
    assert {layer.form for layer in report.layers} == {"folded"}


def test_a_layer_in_a_branch_is_planned_as_it_is_walked(tmp_path: Path) -> None:
    model = build(
        """g (float[n, 4, 16, 16] x) => (float[n, 4, 16, 16] y) {
            [outer] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
            flag = Constant <value = bool {1}> ()
            y = If (flag) <
                then_branch = then () => (float[n, 4, 16, 16] t) { [inner] t = Conv <pads = [1, 1, 1, 1]> (a, w2) },
                else_branch = other () => (float[n, 4, 16, 16] e) { e = Tanh (a) }
            >
        }""",
        {name: weight(4, 4, 3, 3, fan=36, seed=i) for i, name in enumerate(("w1", "w2"))},
    )
    report = comq_onnx.quantize(model, tmp_path / "q.onnx", {"x": normal(40, 4, 16, 16)}, device="cpu")
    assert {layer.form for layer in report.layers} == {"folded"}


def test_every_kind_of_layer_has_costs() -> None:
    kinds = {integer_gain._kind(layer) for layer in _layers()}
    assert kinds == set(ORT_CPU_COSTS.layers)


def _layers() -> list[Layer]:
    """List layers of every kind."""
    model = cnn()
    return prepare_model(ir.from_proto(model), 17, 13).layers + prepare_model(ir.from_proto(net(4, 8)), 17, 13).layers


# Products and tables


def product(width: int, rows: int) -> onnx.ModelProto:
    """Build a product of [rows, width] by a square weight."""
    return build(
        f"g (float[n, {rows}, {width}] x) => (float[n, {rows}, {width}] y) {{ [layer] y = MatMul (x, w) }}",
        {"w": weight(width, width)},
    )


@pytest.mark.parametrize(
    ("width", "rows", "auto", "alone"),
    [
        # tiny: floats; one row of a large weight: packed weights; many rows: integers, or else floats
        (32, 1, "folded", "folded"), (32, 64, "folded", "folded"), (512, 1, "blocked", "blocked"),
        (256, 64, "integer", "folded"), (1024, 16, "integer", "blocked"),
    ],
)  # fmt: skip
def test_a_product_gets_the_form_that_takes_least(
    quantized: Callable[..., Done], width: int, rows: int, auto: str, alone: str
) -> None:
    model = product(width, rows)
    for activations, form in (("auto", auto), ("none", alone)):
        done = quantized(model, {"x": normal(16, rows, width)}, activations=activations, solver="rtn")
        assert [layer.form for layer in done.report.layers] == [form]
        kernels = {"folded": "MatMul", "blocked": "MatMulNBits", "integer": "MatMulIntegerToFloat"}
        assert [layer.kernel for layer in done.report.layers] == [kernels[form]]


def test_tables_of_few_rows_are_unpacked(quantized: Callable[..., Done]) -> None:
    for rows, form in ((64, "folded"), (5000, "looked up")):
        model = build(
            "g (int64[n, 6] ids) => (float[n, 6, 16] y) { [table] y = Gather (w, ids) }", {"w": normal(rows, 16)}
        )
        done = quantized(model, {"ids": np.random.default_rng(0).integers(0, rows, (20, 6))})
        assert [layer.form for layer in done.report.layers] == [form]


def described(model: onnx.ModelProto) -> set[str]:
    """Return the values between nodes whose shapes a model tells."""
    made = {name for node in model.graph.node for name in node.output}
    return made & {value.name for value in model.graph.value_info}


def test_the_source_alone_tells_the_shapes_of_values(quantized: Callable[..., Done]) -> None:
    """Test it because ONNX Runtime makes other kernels where it knows more shapes, and some are slower."""
    model = cnn()
    assert not described(quantized(model).model)
    told = onnx.shape_inference.infer_shapes(model)
    kept = described(quantized(told).model)
    assert kept
    assert kept <= described(told)
