"""Test how recurrent layers are solved: W on the input, then R on the states that the node makes with its new W."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from recurrent import recurrent, sequences
from written import Written, quantize

import comq_onnx
from comq_onnx.errors import ModelError
from comq_onnx.model.layers import Layer
from comq_onnx.model.recurrent import RecurrentState
from comq_onnx.solve import layer as solve_layer
from comq_onnx.solve.moments import Moments
from comq_onnx.write.expose import expose, exposed
from models import Arrays, build, infer, normal, sqnr, weight

__all__ = ["quantize"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"direction": "bidirectional"}),
    ("LSTM", {"lengths": True, "initial": True, "direction": "reverse"}),
    ("GRU", {"direction": "bidirectional", "lengths": True}),
    ("GRU", {"linear_before_reset": 1}),
    ("RNN", {"clip": 2.0}),
]


@pytest.mark.parametrize(("op", "attributes"), CASES)
def test_the_file_holds_the_solution_and_is_better_than_rounding(
    quantize: Callable[..., Written], op: str, attributes: dict[str, Any]
) -> None:
    source = recurrent(op, inputs=32, hidden=24, **attributes)
    feeds, unseen = sequences(source, 96), sequences(source, 32, seed=4)
    expected = infer(source, unseen)["y"]
    reached = {}
    for solver in ("rtn", "comq"):
        written = quantize(source, feeds, bits=4, solver=solver)
        reached[solver] = sqnr(expected, infer(written.proto, unseen)["y"])
    # sequences whose inputs depend on one another: errors of rounding add up, those of COMQ make up for each other
    assert reached["comq"] > reached["rtn"] + 2

    assert list(written.layers) == ["cell.W", "cell.R"]
    for name, layer in written.layers.items():
        value = written.node("cell").input[layer.kind.weight_index]
        solution = written.solved.solutions[name]
        assert np.array_equal(written.value(value), layer.kind.from_matrix(solution.weight.dequantize()))
        assert layer.weight not in written.initializers
        assert sum(len(t.raw_data) for t in written.behind(value).values()) < 0.2 * 4 * np.prod(layer.weight_shape)
        assert solution.error < solution.rtn_error


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_eight_bits_leave_35_db(tmp_path: Path, op: str) -> None:
    source = recurrent(op, direction="bidirectional")
    feeds = sequences(source)
    comq_onnx.quantize(source, tmp_path / "q.onnx", feeds, bits=8, device="cpu")
    assert sqnr(infer(source, feeds)["y"], infer(tmp_path / "q.onnx", feeds)["y"]) >= 35


def one_sequence(source: onnx.ModelProto) -> Arrays:
    """Draw one sequence, as often as many: then it does not matter which are held back."""
    return {name: np.repeat(array, 40, axis=0) for name, array in sequences(source, 1).items()}


@pytest.mark.parametrize(("op", "attributes"), [("LSTM", {}), ("GRU", {})])
def test_the_state_is_solved_on_what_the_quantized_input_weight_makes(
    tmp_path: Path, op: str, attributes: dict[str, Any], solved: Any
) -> None:
    source = recurrent(op, **attributes)
    feeds = one_sequence(source)
    comq_onnx.quantize(source, tmp_path / "q.onnx", feeds, bits=2, uniform=True, device="cpu")
    # the model with only W quantized: its states before each step give the moments of R
    only_w = onnx.load(tmp_path / "q.onnx")
    cell = next(n for n in only_w.graph.node if n.name == "cell")
    cell.input[2] = "r"
    only_w.graph.initializer.append(next(t for t in source.graph.initializer if t.name == "r"))
    bias, plain = (
        next(t for t in model.graph.initializer if t.name == name)
        for model, name in ((only_w, cell.input[3]), (source, "b"))
    )
    new, old = (onnx.numpy_helper.to_array(t) for t in (bias, plain))
    both = np.concatenate([new[:, : new.shape[1] // 2], old[:, old.shape[1] // 2 :]], axis=1)
    bias.CopyFrom(onnx.numpy_helper.from_array(both, bias.name))
    found: Moments = solved.on["cell.R"]
    for model, gram in ((only_w, found.gram), (source, None)):
        states = infer(model, feeds)["y"][:, 0]
        before = np.concatenate([np.zeros_like(states[:1]), states[:-1]]).reshape(-1, states.shape[-1])
        expected = before.T.astype(np.float64) @ before / len(before)
        if gram is None:
            # E[x x^T] of the float model, of x = x^ + e
            assert found.cross is not None
            assert found.residue is not None
            gram = found.gram + found.cross + found.cross.swapaxes(1, 2) + found.residue
        assert np.allclose(gram[0], expected, atol=1e-5)


def test_later_layers_read_the_states_of_both_quantized_weights(tmp_path: Path, solved: Any) -> None:
    source = recurrent("LSTM")
    source.graph.node.append(onnx.helper.make_node("MatMul", ["y", "m"], ["z"], name="head"))
    source.graph.initializer.append(onnx.numpy_helper.from_array(weight(12, 16), "m"))
    source.graph.output[0].name = "z"
    source.graph.output[0].type.tensor_type.shape.dim[3].dim_value = 16
    feeds = one_sequence(source)
    comq_onnx.quantize(source, tmp_path / "q.onnx", feeds, bits=2, uniform=True, activations="none", device="cpu")
    made = onnx.load(tmp_path / "q.onnx")
    made.graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None))
    states = infer(made, feeds)["y"].reshape(-1, 12).astype(np.float64)
    assert np.allclose(solved.on["head"].gram[0], states.T @ states / len(states), atol=1e-5)


def test_either_weight_may_stay_float_and_be_quantized_later(tmp_path: Path) -> None:
    source = recurrent("LSTM")
    feeds = sequences(source)
    first = comq_onnx.quantize(source, tmp_path / "w.onnx", feeds, bits=8, exclude=(r"\.R$",), device="cpu")
    assert [x.name for x in first.layers] == ["cell.W"]
    assert "--exclude" in first.skipped["cell.R"]
    second = comq_onnx.quantize(tmp_path / "w.onnx", tmp_path / "q.onnx", feeds, bits=8, device="cpu")
    assert [x.name for x in second.layers] == ["cell.R"]
    assert "already" in second.skipped["cell.W"]
    assert sqnr(infer(source, feeds)["y"], infer(tmp_path / "q.onnx", feeds)["y"]) >= 35


def test_bits_are_chosen_for_both_weights(tmp_path: Path) -> None:
    source = recurrent("GRU", inputs=32, hidden=24)
    feeds = sequences(source, 80)
    report = comq_onnx.quantize(source, tmp_path / "q.onnx", feeds, bits="auto", size="30%", device="cpu")
    assert report.size["after"] <= 0.3 * report.size["before"]
    assert {x.name for x in report.layers} == {"cell.W", "cell.R"}
    assert all(x.output_noise_db is not None for x in report.layers)


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_a_node_in_the_body_of_a_loop_is_solved_on_all_its_turns(tmp_path: Path, op: str, solved: Any) -> None:
    gates = {"LSTM": 4, "GRU": 3}[op]
    source = build(
        f"""g (float[batch, 12] x) => (float[batch, 12] y) <int64 trips = {{3}}, bool yes = {{1}}> {{
            y = Loop (trips, yes, x) <
                body = body (int64 i, bool go, float[batch, 12] before) => (bool on, float[batch, 12] after) {{
                    on = Identity (go)
                    one = Unsqueeze (before, axes)
                    [cell] all, last = {op} <hidden_size = 12> (one, w, r, b, , state)
                    after = Squeeze (last, axes)
                }}
            >
        }}""",
        {
            "axes": np.array([0]),
            "w": weight(1, 12 * gates, 12, fan=12),
            "r": weight(1, 12 * gates, 12, fan=12),
            "b": normal(1, 24 * gates, scale=0.2),
            "state": normal(1, 1, 12),
        },
    )
    source.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    feeds = {"x": normal(40, 12)}
    report = comq_onnx.quantize(source, tmp_path / "q.onnx", feeds, bits=4, uniform=True, device="cpu")
    assert [x.name for x in report.layers] == ["cell.W", "cell.R"]
    assert solved.on["cell.W"].count == solved.on["cell.R"].count == 3 * report.samples["used"]
    assert all(x.error_db is not None and x.error_db < -15 for x in report.layers)


def test_states_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    source = recurrent("RNN", activations=["Relu"])
    source.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.full((1, 12, 12), 1e18, np.float32), "r"))
    with pytest.raises(ModelError, match=r"'cell.R.rows' \(read by 'cell.R'\)"):
        comq_onnx.quantize(source, tmp_path / "q.onnx", sequences(source), bits=4, uniform=True, device="cpu")


def test_layers_share_rows_of_states_only_with_their_own(solved: Any, tmp_path: Path) -> None:
    source = recurrent("RNN", direction="bidirectional")
    comq_onnx.quantize(source, tmp_path / "q.onnx", sequences(source), bits=4, uniform=True, device="cpu")
    assert solved.together == [["cell.W"], ["cell.R"]]
    assert len(solved.on["cell.R"].gram) == 2
    assert Layer("c.R", "RNN", RecurrentState((1, 4, 4), False), "y", "y", "r", part=".R").node == "c"


@pytest.mark.parametrize(("op", "attributes"), [("LSTM", {}), ("GRU", {"linear_before_reset": 1}), ("RNN", {})])
def test_the_bias_of_each_weight_takes_the_mean_of_its_error(
    quantize: Callable[..., Written], monkeypatch: pytest.MonkeyPatch, op: str, attributes: dict[str, Any]
) -> None:
    # also where it may be chance
    monkeypatch.setattr(solve_layer, "SIGNIFICANT", 0.0)
    monkeypatch.setattr(solve_layer, "TOGETHER", -np.inf)
    source = recurrent(op, **attributes)
    feeds = one_sequence(source)
    written = quantize(source, feeds, bits=2)
    bias = np.split(written.value(written.node("cell").input[3])[0], 2)
    own = {t.name: onnx.numpy_helper.to_array(t) for t in source.graph.initializer}
    new = {name: written.value(written.node("cell").input[1 if name == "w" else 2])[0] for name in ("w", "r")}

    def states(w: np.ndarray, b: np.ndarray) -> np.ndarray:
        model = recurrent(op, **attributes)
        for tensor, array in zip(model.graph.initializer, (w[None], own["r"], b[None]), strict=True):
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        y = infer(model, feeds)["y"][:, 0]
        return np.concatenate([np.zeros_like(y[:1]), y[:-1]]).reshape(-1, y.shape[-1])

    x = feeds["x"].reshape(-1, feeds["x"].shape[-1])
    plain = np.split(own["b"][0], 2)
    lost = (x @ own["w"][0].T - x @ new["w"].T).mean(axis=0)
    assert np.abs(lost).max() > 0.01
    assert np.allclose(bias[0] - plain[0], lost, atol=1e-5)
    # the states that W makes alone, quantized, with its part of the bias
    before, after = states(own["w"][0], own["b"][0]), states(new["w"], np.concatenate([bias[0], plain[1]]))
    assert np.allclose(bias[1] - plain[1], (before @ own["r"][0].T - after @ new["r"].T).mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_exposed_weights_make_what_is_written(quantize: Callable[..., Written], op: str) -> None:
    source = recurrent(op, direction="bidirectional")
    written = quantize(source, sequences(source), bits=2)
    plan, solutions = written.solved.plan, written.solved.solutions
    model = plan.written.model.clone()
    expose(model, plan.layers, solutions)
    proto, feeds = ir.to_proto(model), {**written.feeds}
    given = {value.name for value in proto.graph.input} - set(feeds)
    assert given == {"w", "r", "cell.W.bias", "cell.R.bias"}
    for layer in plan.layers:
        feeds |= exposed(plan.written.model, layer, solutions[layer.name])
    expected = infer(written.proto, written.feeds)["y"]
    assert sqnr(expected, infer(proto, feeds)["y"]) > 100


def test_a_bias_that_is_computed_stays(quantize: Callable[..., Written]) -> None:
    source = recurrent("LSTM")
    make = onnx.helper.make_node
    for node in (make("Add", ["b", "mean"], ["moved"]), make("ReduceMean", ["x"], ["mean"], keepdims=0)):
        source.graph.node.insert(0, node)
    source.graph.node[-1].input[3] = "moved"
    written = quantize(source, sequences(source), bits=4)
    assert written.node("cell").input[3] == "moved"
    assert [written.solved.solutions[name].shift for name in ("cell.W", "cell.R")] == [None, None]


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_the_batch_size_changes_no_byte(tmp_path: Path, op: str) -> None:
    source = recurrent(op, direction="bidirectional")
    feeds, written = sequences(source), []
    for batch_size in (16, 8, 24):
        comq_onnx.quantize(
            source, tmp_path / "q.onnx", feeds, bits=4, uniform=True, batch_size=batch_size, device="cpu"
        )
        written.append((tmp_path / "q.onnx").read_bytes())
    assert len(set(written)) == 1


def test_two_nodes_that_read_one_input_share_its_moments(tmp_path: Path, solved: Any) -> None:
    source = recurrent("RNN")
    other = onnx.helper.make_node(
        "RNN", ["xt", "w2", "r", "b"], ["z"], name="other", hidden_size=12, direction="reverse"
    )
    source.graph.node.append(other)
    source.graph.initializer.append(onnx.numpy_helper.from_array(weight(1, 12, 16, fan=16, seed=4), "w2"))
    source.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [6, 1, "batch", 12]))
    comq_onnx.quantize(source, tmp_path / "q.onnx", sequences(source), bits=4, uniform=True, device="cpu")
    assert ["cell.W", "other.W"] in solved.together
    # R is the same initializer, stored once, and read behind other states
    assert sqnr(*(infer(model, sequences(source))["z"] for model in (source, tmp_path / "q.onnx"))) > 12
