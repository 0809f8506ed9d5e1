"""Test the rows of recurrent layers: times their matrices, they give the states that ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from recurrent import GATES, STEPS, recurrent, sequences

from comq_onnx.model.layers import Layer, list_layers, nodes_by_name
from comq_onnx.model.prepare import prepare_model
from comq_onnx.model.states import add_rows, follow
from models import Arrays, build, infer, normal, weight

Numbers = np.ndarray


def with_rows(source: onnx.ModelProto) -> tuple[ir.Model, list[Layer], list[str]]:
    """Return a prepared model with the rows of its layers as outputs, its layers, and the names of these outputs."""
    prepared = prepare_model(ir.from_proto(source), 17, 13)
    model, names = prepared.model, []
    nodes = nodes_by_name(model)
    for layer in prepared.layers:
        names.append(str(add_rows(model, nodes[layer.node], layer).name))
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    for name in names:
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(values[name])
    return model, prepared.layers, names


def sigmoid(x: Numbers) -> Numbers:
    return 1 / (1 + np.exp(-x))


def next_states(op: str, of_input: Numbers, of_state: Numbers, before: Numbers, bias: Numbers, after: bool) -> Numbers:
    """Return the states of a GRU or an RNN behind each step [n, hidden].

    of_input, of_state: the products of both weights [n, gates * hidden]
    before: the states before each step
    bias: [2 * gates * hidden]
    after: the reset gate comes after the product
    """
    total = of_input + bias[: of_input.shape[1]]
    fed_back = of_state + bias[of_input.shape[1] :]
    if op == "RNN":
        return np.tanh(total + fed_back)
    (z, r, h), (zs, rs, hs) = np.split(total, 3, axis=1), np.split(fed_back, 3, axis=1)
    update, reset = sigmoid(z + zs), sigmoid(r + rs)
    return (1 - update) * np.tanh(h + (reset * hs if after else hs)) + update * before


def lstm_states(of_input: Numbers, of_state: Numbers, bias: Numbers, lengths: Sequence[int], backward: bool) -> Numbers:
    """Return the states of an LSTM behind each step [n, hidden]; the steps of one sequence after the other."""
    total = of_input + of_state + bias[: of_input.shape[1]] + bias[of_input.shape[1] :]
    i, o, f, c = np.split(total, 4, axis=1)
    states, start = np.empty_like(i), 0
    for count in lengths:
        cell = np.zeros(i.shape[1], np.float32)
        for t in range(count)[:: -1 if backward else 1]:
            k = start + t
            cell = sigmoid(f[k]) * cell + sigmoid(i[k]) * np.tanh(c[k])
            states[k] = sigmoid(o[k]) * np.tanh(cell)
        start += count
    return states


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize(
    ("op", "attributes"), [("LSTM", {}), ("GRU", {}), ("GRU", {"linear_before_reset": 1}), ("RNN", {})]
)
def test_rows_times_matrices_are_what_makes_the_states(
    op: str, attributes: dict[str, Any], direction: str, lengths: bool, initial: bool
) -> None:
    source = recurrent(op, direction=direction, lengths=lengths, initial=initial, **attributes)
    feeds = sequences(source, count=3)
    model, layers, names = with_rows(source)
    made = infer(ir.to_proto(model), feeds)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in source.graph.initializer}
    x, h = (layer.kind.rows(made[name]) for layer, name in zip(layers, names, strict=True))
    of_input = x[0] @ layers[0].kind.to_matrix(weights["w"])[0].T
    of_state = h @ layers[1].kind.to_matrix(weights["r"]).swapaxes(1, 2)

    ends = [int(n) for n in feeds["lengths"]] if lengths else [STEPS] * 3
    backward = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    groups = len(h) // len(backward)
    for d, is_backward in enumerate(backward):
        wx = np.split(of_input, len(backward), axis=1)[d]
        mine = slice(d * groups, (d + 1) * groups)
        wh = np.concatenate(list(of_state[mine]), axis=1)
        expected = np.concatenate([made["y"][:n, d, k] for k, n in enumerate(ends)])
        bias = weights["b"][d]
        if op == "LSTM":
            found = lstm_states(wx, wh, bias, ends, is_backward)
        else:
            found = next_states(op, wx, wh, h[mine][0], bias, bool(attributes))
        # sigmoids and float32 sums of some 20 numbers near 1
        assert np.allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("activations", [["Tanh", "Tanh"], ["Relu", "Sigmoid"]])
def test_the_reset_gate_has_the_activation_and_the_clip_of_the_node(activations: list[str]) -> None:
    source = recurrent("GRU", activations=activations, clip=0.3)
    model, _, names = with_rows(source)
    made = infer(ir.to_proto(model), sequences(source, count=3))
    state, _, gated = made[names[1]].swapaxes(0, 1)
    reset = gated[np.abs(state) > 1e-3] / state[np.abs(state) > 1e-3]
    limit = np.tanh(0.3) if activations[0] == "Tanh" else 0.3
    assert reset.max() == pytest.approx(limit, rel=1e-5)
    assert reset.min() == pytest.approx(-limit if activations[0] == "Tanh" else 0, abs=1e-6, rel=1e-5)


def test_a_node_that_gives_only_its_last_state_has_the_rows_of_all() -> None:
    whole, last = recurrent("GRU"), recurrent("GRU")
    last.graph.node[1].output[:] = ["", "y"]
    last.graph.output[0].type.tensor_type.shape.dim.pop(0)
    feeds = sequences(whole, count=3)
    found: list[Arrays] = []
    for source in (whole, last):
        model, _, names = with_rows(source)
        found.append(infer(ir.to_proto(model), feeds) | {"names": names[1]})
    assert np.array_equal(*(made[str(made["names"])] for made in found))


def test_the_rows_follow_a_node_that_was_rewritten() -> None:
    """Give a GRU another input weight: its own reset gate, which the rows hold, is made with that one too."""
    source = recurrent("GRU")
    other = weight(1, 36, 16, fan=16, seed=9)
    model, _, names = with_rows(source)
    value = model.graph.initializers["w"]
    replaced = ir.Value(name="other", const_value=ir.tensor(other, name="other"), type=value.type, shape=value.shape)
    model.graph.register_initializer(replaced)
    nodes_by_name(model)["cell"].replace_input_with(1, replaced)
    feeds = sequences(source, count=3)
    before = infer(ir.to_proto(model), feeds)[names[1]]
    follow(model)
    after = infer(ir.to_proto(model), feeds)[names[1]]
    source.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(other, "w"))
    plain, _, _ = with_rows(source)
    expected = infer(ir.to_proto(plain), feeds)[names[1]]
    assert np.array_equal(before[:, 0], expected[:, 0])
    assert not np.allclose(before[:, 2], expected[:, 2], atol=1e-3)
    assert np.allclose(after, expected, atol=1e-6)


# What is no layer -----------------------------------------------------------------------------------------------------


def layers_of(source: onnx.ModelProto) -> tuple[list[str], dict[str, str]]:
    layers, skipped = list_layers(ir.from_proto(source))
    return [layer.name for layer in layers], skipped


@pytest.mark.parametrize("op", GATES)
def test_both_weights_of_a_node_are_layers(op: str) -> None:
    assert layers_of(recurrent(op)) == (["cell.W", "cell.R"], {})


def test_a_reset_gate_that_cannot_be_computed_leaves_the_state_float() -> None:
    gates = ["HardSigmoid", "Tanh"]
    found, skipped = layers_of(recurrent("GRU", activations=gates))
    assert found == ["cell.W"]
    assert "HardSigmoid" in skipped["cell.R"]
    assert layers_of(recurrent("GRU", activations=gates, linear_before_reset=1))[0] == ["cell.W", "cell.R"]


def test_batches_first_are_left_with_the_reason() -> None:
    found, skipped = layers_of(recurrent("LSTM", layout=1))
    assert found == []
    assert all("layout=1" in skipped[name] for name in ("cell.W", "cell.R"))


def test_a_weight_that_is_computed_is_left_with_the_reason() -> None:
    source = recurrent("LSTM")
    source.graph.node.insert(0, onnx.helper.make_node("Abs", ["w"], ["positive"]))
    source.graph.node[2].input[1] = "positive"
    found, skipped = layers_of(source)
    assert found == ["cell.R"]
    assert "run time" in skipped["cell.W"]


def test_no_other_layer_has_the_name_of_a_part() -> None:
    source = build(
        """g (float[5, batch, 16] x) => (float[5, 1, batch, 16] y) {
            ["cell.R"] h = MatMul (x, m)
            [cell] y = RNN <hidden_size = 16> (h, w, r)
        }""",
        {"m": weight(16, 16), "w": weight(1, 16, 16, fan=16), "r": normal(1, 16, 16, scale=0.2)},
    )
    names = [layer.name for layer in prepare_model(ir.from_proto(source), 17, 13).layers]
    assert len(set(names)) == 3
    assert {"cell.W", "cell.R"} < set(names)


def test_sequences_of_their_own_lengths_in_a_subgraph_are_left_with_the_reason() -> None:
    source = build(
        """g (float[5, batch, 16] x, int32[batch] n, bool up) => (float[5, 1, batch, 16] y) {
            y = If (up) <
                then_branch = a () => (float[5, 1, batch, 16] t) { [cell] t = RNN <hidden_size = 16> (x, w, r, , n) },
                else_branch = b () => (float[5, 1, batch, 16] e) { [plain] e = RNN <hidden_size = 16> (x, w, r) }
            >
        }""",
        {"w": weight(1, 16, 16, fan=16), "r": normal(1, 16, 16, scale=0.2)},
    )
    found, skipped = layers_of(source)
    assert found == ["plain.W", "plain.R"]
    assert all("lengths" in skipped[name] for name in ("cell.W", "cell.R"))
