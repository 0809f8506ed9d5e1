"""Test the cuts: the input of a layer lies at the cut before it, and a cut holds exactly what is still to be read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from comq_onnx.calibrate.stages import Stage, cut, reads
from comq_onnx.model.layers import Layer, list_layers

WIDTH = 12
WEIGHT = np.eye(WIDTH, dtype=np.float32)


def model_of(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], extra: Sequence[str] = ()) -> ir.Model:
    """Build a model of named nodes on x [n, WIDTH].

    Initializers: w0, w1, ... as the MatMuls name them; extra: the names of conditions.
    """
    weights = {n for node in nodes for g in [node, *inner(node)] for n in g.input if n.startswith("w")}
    initializers = [onnx.numpy_helper.from_array(WEIGHT, n) for n in sorted(weights)]
    initializers += [onnx.numpy_helper.from_array(np.asarray(True), n) for n in extra]
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", WIDTH]) for n in outputs],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(model)


def inner(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """List the nodes of a node's subgraphs."""
    return [n for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for n in a.g.node]


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    """Make a node that is called by its operator and its output."""
    return helper.make_node(op, inputs.split(), [output], name=f"{op}_{output}", **attributes)


def cuts(model: ir.Model) -> list[Stage]:
    """Cut a model at all its layers."""
    layers, _ = list_layers(model)
    return cut(model, layers)


def names(stage: Stage) -> set[str]:
    """Return the names of a stage's layers."""
    return {layer.name for layer in stage.layers}


ATTENTION = [
    node("MatMul", "x wq", "q"),
    node("MatMul", "x wk", "k"),
    node("MatMul", "x wv", "v"),
    node("Transpose", "k", "kt", perm=[1, 0]),
    node("MatMul", "q kt", "s"),
    node("Softmax", "s", "p"),
    node("MatMul", "p v", "o"),
    node("MatMul", "o wo", "r"),
    node("Add", "r x", "y"),
]


def test_q_k_and_v_share_a_stage() -> None:
    first, second, third = cuts(model_of(ATTENTION, ["y"]))
    assert not first.layers
    assert names(second) == {"MatMul_q", "MatMul_k", "MatMul_v"}
    assert names(third) == {"MatMul_r"}
    # the float arithmetic of attention belongs to the stage that feeds it
    assert set(second.nodes) == names(second) | {"Transpose_kt", "MatMul_s", "Softmax_p", "MatMul_o"}
    assert second.reads == ("x",)
    assert second.live_after == {"o", "x"}
    assert set(third.reads) == {"o", "x"}
    assert third.live_after == frozenset()


def test_parallel_branches_share_a_stage_and_a_join_waits_for_both() -> None:
    first, one, two, three = cuts(
        model_of(
            [
                node("Relu", "x", "a"),
                node("MatMul", "a w0", "left"),
                node("MatMul", "x w1", "right"),
                node("MatMul", "left w2", "deeper"),
                node("Add", "deeper right", "joined"),
                node("MatMul", "joined w3", "y"),
            ],
            ["y"],
        )
    )
    assert names(one) == {"MatMul_left", "MatMul_right"}
    assert names(two) == {"MatMul_deeper"}
    assert names(three) == {"MatMul_y"}
    assert first.live_after == {"x", "a"}
    assert one.live_after == {"left", "right"}
    assert two.reads == ("left", "right")
    assert two.live_after == {"joined"}


def test_a_layer_that_is_not_to_be_solved_is_a_float_operator() -> None:
    model = model_of(ATTENTION, ["y"])
    layers, _ = list_layers(model)
    stages = cut(model, [layer for layer in layers if layer.name == "MatMul_r"])
    assert [names(stage) for stage in stages] == [set(), {"MatMul_r"}]
    assert cut(model, [])[0].nodes == tuple(n.name for n in ATTENTION)


def test_captured_values_of_an_if_are_read_by_it() -> None:
    def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
        return helper.make_graph(list(nodes), name, [], [out])

    nested = helper.make_node(
        "If",
        ["c"],
        ["deep"],
        name="If_deep",
        then_branch=branch("t2", node("Neg", "early", "n1")),
        else_branch=branch("e2", node("Identity", "x", "n2")),
    )
    choice = helper.make_node(
        "If",
        ["c"],
        ["chosen"],
        name="If_chosen",
        then_branch=branch("t", node("Relu", "late", "local"), node("Add", "local late", "t_out")),
        else_branch=branch("e", nested, node("Relu", "deep", "e_out")),
    )
    model = model_of(
        [
            node("Relu", "x", "early"),
            node("MatMul", "x w0", "late"),
            choice,
            node("MatMul", "chosen w1", "y"),
        ],
        ["y"],
        extra=["c"],
    )
    if_node = next(n for n in model.graph if n.name == "If_chosen")
    # its condition, what a branch captures and what an inner branch captures; nothing that a branch makes itself
    assert {v.name for v in reads(if_node)} == {"c", "late", "early", "x"}
    first, second, third = cuts(model)
    assert "If_chosen" in second.nodes
    assert first.live_after == {"x", "early"}
    assert set(second.reads) == {"x", "early"}
    assert second.live_after == {"chosen"}
    assert names(third) == {"MatMul_y"}


def test_a_branch_that_hands_out_an_outer_value_reads_it() -> None:
    out = helper.make_tensor_value_info("late", TensorProto.FLOAT, None)
    same = helper.make_graph([], "same", [], [out])
    other = helper.make_graph([node("Neg", "x", "m")], "m", [], [helper.make_tensor_value_info("m", 1, None)])
    choice = helper.make_node("If", ["c"], ["y"], name="If_y", then_branch=same, else_branch=other)
    model = model_of([node("MatMul", "x w0", "late"), choice], ["y"], extra=["c"])
    if_node = next(n for n in model.graph if n.name == "If_y")
    assert {v.name for v in reads(if_node)} == {"c", "late", "x"}


def test_layers_inside_a_branch_belong_to_their_if() -> None:
    out = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("a", "b")]
    then = helper.make_graph([node("MatMul", "x w0", "a")], "then", [], out[:1])
    other = helper.make_graph([node("MatMul", "x w1", "b")], "else", [], out[1:])
    choice = helper.make_node("If", ["c"], ["y"], name="If_y", then_branch=then, else_branch=other)
    stages = cuts(model_of([choice], ["y"], extra=["c"]))
    assert [stage.nodes for stage in stages] == [("If_y",)]
    assert not stages[0].layers


@st.composite
def graphs(draw: st.DrawFn) -> ir.Model:
    """Draw a random graph: layers (MatMul by a weight) and float operators on any earlier values, and some outputs."""
    values, nodes = ["x"], []
    for i in range(draw(st.integers(1, 14))):
        out = f"v{i}"
        first = draw(st.sampled_from(values[-4:]))
        op = draw(st.sampled_from(["MatMul", "MatMul", "Relu", "Add"]))
        second = {"MatMul": f"w{i}", "Relu": "", "Add": draw(st.sampled_from(values))}[op]
        nodes.append(node(op, f"{first} {second}", out))
        values.append(out)
    outputs = draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=3, unique=True))
    return model_of(nodes, outputs)


def depth(model: ir.Model, layers: dict[str, Layer], value: ir.Value) -> int:
    """Count the layers on the longest way to a value, by following every way."""
    maker = value.producer()
    if maker is None:
        return 0
    return max((depth(model, layers, v) for v in maker.inputs), default=0) + (maker.name in layers)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graphs())
def test_any_graph_is_cut_where_its_layers_read(model: ir.Model) -> None:
    layers = {layer.name: layer for layer in list_layers(model)[0]}
    stages = cut(model, list(layers.values()))
    stage_of = {name: stage.index for stage in stages for name in stage.nodes}
    assert [stage.index for stage in stages] == list(range(len(stages)))
    # every node is in one stage, in the order of the graph
    order = [str(n.name) for n in model.graph]
    assert sorted(stage_of) == sorted(order)
    assert sum(len(stage.nodes) for stage in stages) == len(order)
    assert all(list(stage.nodes) == [n for n in order if stage_of[n] == stage.index] for stage in stages)
    assert {layer.name for stage in stages for layer in stage.layers} == set(layers)

    makes = {"x": -1} | {name: stage.index for stage in stages for name in stage.makes}
    by_name = {str(n.name): n for n in model.graph}
    for name, n in by_name.items():
        assert stage_of[name] == depth(model, layers, n.outputs[0])
        assert makes[str(n.outputs[0].name)] == stage_of[name]
    used = {stage.index: {v.name for name in stage.nodes for v in by_name[name].inputs} for stage in stages}
    for stage in stages:
        assert all(makes[layer.input] < stage.index for layer in stage.layers)
        assert set(stage.reads) == {v for v in used[stage.index] if v in makes and makes[v] < stage.index}
        later = set().union(*(used[s.index] for s in stages if s.index > stage.index), set())
        assert stage.live_after == {v for v, made in makes.items() if made <= stage.index and v in later}
    # walking the stages never misses a tensor, and ends with none in hand
    held = {"x"}
    for stage in stages:
        assert set(stage.reads) <= held
        held = {v for v in held | set(stage.makes) if v in stage.live_after}
    assert not held
