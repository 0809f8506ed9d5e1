"""Test the contract of every kind of layer: its rows times its matrix are what ONNX Runtime computes, to the last bit.

Inputs and weights are small whole numbers, so every sum is exact in float32 in whatever order it is added up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import HAS_TORCH, as_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import computed, kind_of, mostly, whole, windows

from comq_onnx.arrays import on_host
from comq_onnx.model.convolutions import Conv
from comq_onnx.model.op_kind import NotQuantizable, OpKind
from comq_onnx.model.operators import OP_KINDS, Gather, Gemm, MatMul, MatMulLeft
from comq_onnx.model.recurrent import RecurrentInput, RecurrentState
from comq_onnx.model.transposed import ConvTranspose
from comq_onnx.solve import patches


def product(kind: OpKind, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return rows(x) @ to_matrix(weight)^T, after checking everything else that a kind promises about them."""
    matrix, rows = kind.to_matrix(weight), kind.rows(x)
    groups, out, inputs = matrix.shape
    assert (groups, groups * out, inputs) == (kind.groups, kind.outputs, kind.inputs)
    assert rows.dtype == np.float32
    assert rows.shape == (groups, kind.positions(x), inputs)

    back = kind.from_matrix(matrix)
    assert back.dtype == weight.dtype
    assert back.flags.c_contiguous
    assert np.array_equal(back, weight)

    for block in range(1, inputs + 1):
        if block == inputs or kind.takes_blocks(block):
            blocks = inputs // block
            scale = np.arange(1, 1 + groups * out * blocks, dtype=np.float32).reshape(groups, out, blocks)
            scaled = weight.reshape(kind.scaled_shape(blocks)) * kind.spread_scale(scale)
            expected = kind.from_matrix(matrix * np.repeat(scale, block, axis=-1))
            assert np.array_equal(expected, scaled.reshape(weight.shape))
    scale = np.arange(1, 1 + groups * out, dtype=np.float32).reshape(groups, out, 1)
    spread = kind.spread_scale(scale)
    if kind.axis is not None:
        # no Reshape, and what DequantizeLinear does along the axis
        assert kind.scaled_shape() == weight.shape
        along = [1] * weight.ndim
        along[kind.axis] = -1
        assert np.array_equal(
            np.broadcast_to(spread, weight.shape), np.broadcast_to(scale.reshape(along), weight.shape)
        )

    positions = kind.positions(x)
    pick = np.random.default_rng(0).permutation(positions)[: positions // 2 + 1]
    assert np.array_equal(kind.rows(x, pick), rows[:, pick])
    if HAS_TORCH:
        given = as_tensor(np.ascontiguousarray(x))
        assert kind.positions(given) == positions
        assert np.array_equal(on_host(kind.rows(given)), rows)
        assert np.array_equal(on_host(kind.rows(given, pick)), rows[:, pick])
    return rows @ matrix.swapaxes(1, 2)


# Matrices -------------------------------------------------------------------------------------------------------------


def check_matmul(x: np.ndarray, weight: np.ndarray) -> None:
    kind = kind_of(MatMul, "MatMul", weight, {})
    expected = computed("MatMul", [x, weight], {})
    groups, out = kind.groups, weight.shape[-1]
    # undo rows(): the weight's own leading axes first, then what x has more, then the positions
    lead = weight.shape[:-2]
    full = np.broadcast_shapes(x.shape[:-2], lead)
    y = expected.reshape(*full, -1, out)
    wide = [1] * (len(full) - len(lead)) + list(lead)
    order = [i for i, n in enumerate(wide) if n > 1] + [i for i, n in enumerate(wide) if n == 1]
    y = y.transpose(*order, len(full), len(full) + 1).reshape(groups, -1, out)
    found = product(kind, x, weight)
    assert found.shape == y.shape
    # which position stands where is no promise, as long as all inputs share it
    assert np.array_equal(by_row(found), by_row(y))


def by_row(rows: np.ndarray) -> np.ndarray:
    """Sort the rows [groups, positions, out] of each group in lexical order."""
    return np.stack([group[np.lexsort(group.T[::-1])] for group in rows])


@pytest.mark.parametrize("x_shape", [(5,), (3, 5), (1, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5)])
def test_matmul_with_one_matrix(x_shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    check_matmul(whole(rng, x_shape), whole(rng, (5, 4)))
    check_matmul(whole(rng, x_shape if len(x_shape) > 1 else (1, 5)), whole(rng, (1, 5, 4)))


@pytest.mark.parametrize(
    ("x_lead", "lead"),
    [
        ((3,), (3,)),
        ((1,), (3,)),
        ((), (3,)),
        ((2, 3), (3,)),
        ((2, 1), (3,)),
        ((2, 3), (2, 3)),
        ((1, 3), (2, 3)),
        ((4, 2, 3), (2, 3)),
        ((4, 1, 3), (2, 1)),
        ((2, 3), (2, 1)),
        ((1, 3), (1, 3)),
    ],
)
def test_matmul_with_a_stack_of_matrices(x_lead: tuple[int, ...], lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    check_matmul(whole(rng, (*x_lead, 3, 5)), whole(rng, (*lead, 5, 4)))


@pytest.mark.parametrize(
    ("x_lead", "lead"),
    [
        ((2, 3), (1, 3)),
        ((2, 4, 3), (1, 3)),
        ((2, 3, 4), (2, 1, 4)),
        ((2, 3, 4), (1, 3, 1)),
        ((5, 1, 3), (1, 1, 3)),
    ],
)
def test_a_stack_whose_axes_of_one_are_broadcast(x_lead: tuple[int, ...], lead: tuple[int, ...]) -> None:
    """Multiply heads [1, heads, in, out] with a batch [batch, heads, m, in]."""
    rng = np.random.default_rng(0)
    check_matmul(whole(rng, (*x_lead, 3, 5)), whole(rng, (*lead, 5, 4)))


def test_matmul_of_a_vector_with_a_stack_of_matrices() -> None:
    rng = np.random.default_rng(0)
    x, weight = whole(rng, (5,)), whole(rng, (3, 5, 4))
    kind = kind_of(MatMul, "MatMul", weight, {})
    assert np.array_equal(product(kind, x, weight)[:, 0], computed("MatMul", [x, weight], {}))


def test_matmul_by_a_vector_is_no_layer() -> None:
    with pytest.raises(NotQuantizable, match="vector"):
        kind_of(MatMul, "MatMul", np.zeros(5, np.float32), {})


@pytest.mark.parametrize("x_shape", [(5,), (5, 3), (2, 5, 3), (2, 4, 5, 1)])
def test_matmul_with_the_weight_on_the_left(x_shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, weight = whole(rng, x_shape), whole(rng, (4, 5))
    expected = computed("MatMul", [weight, x], {})
    columns = expected[:, None] if x.ndim == 1 else expected
    kind = kind_of(MatMulLeft, "MatMul", weight, {})
    assert np.array_equal(product(kind, x, weight), columns.swapaxes(-1, -2).reshape(1, -1, 4))
    assert (kind.input_index, kind.weight_index) == (1, 0)


def test_a_stack_of_matrices_on_the_left_is_no_layer() -> None:
    with pytest.raises(NotQuantizable, match="rank 3"):
        kind_of(MatMulLeft, "MatMul", np.zeros((2, 5, 4), np.float32), {})


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (-2.0, 0.0), (0.25, -0.5)])
def test_gemm(trans_a: int, trans_b: int, alpha: float, beta: float) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = (
        whole(rng, (5, 3) if trans_a else (3, 5)),
        whole(rng, (4, 5) if trans_b else (5, 4)),
        whole(rng, (4,)),
    )
    attributes = {"transA": trans_a, "transB": trans_b, "alpha": alpha, "beta": beta}
    kind = kind_of(Gemm, "Gemm", weight, attributes)
    assert np.array_equal(product(kind, x, weight)[0], computed("Gemm", [x, weight], attributes))
    with_bias = computed("Gemm", [x, weight, bias], attributes)
    assert np.array_equal(product(kind, x, weight)[0] + np.float32(kind.beta) * bias, with_bias)


def test_gemm_without_attributes_has_the_specifications_defaults() -> None:
    kind = kind_of(Gemm, "Gemm", np.zeros((5, 4), np.float32), {})
    assert kind == Gemm((5, 4), False, False, 1.0, 1.0)


def test_an_embeddings_rows_are_one_hot() -> None:
    rng = np.random.default_rng(0)
    table, indices = whole(rng, (7, 3)), np.asarray([[0, 6, 3], [-1, 2, 2]])
    kind = kind_of(Gather, "Gather", table, {})
    rows = kind.rows(indices)
    assert rows.shape == (1, kind.positions(indices), 7)
    # a lookup is its one-hot rows times the table: the matrix as it lies, since its rows are what shares a scale
    found = (rows @ kind.to_matrix(table)).reshape(2, 3, 3)
    assert np.array_equal(found, computed("Gather", [table, indices], {}))
    assert np.array_equal(kind.rows(indices, np.asarray([4, 1])), rows[:, [4, 1]])
    assert np.array_equal(kind.from_matrix(kind.to_matrix(table)), table)
    scale = np.arange(1, 8, dtype=np.float32)
    assert np.array_equal(
        kind.from_matrix(kind.to_matrix(table) * scale[:, None]), table * kind.spread_scale(scale[None, :, None])
    )
    assert kind.to_matrix(table).shape == (kind.groups, kind.outputs, kind.inputs) == (1, 7, 3)


@pytest.mark.parametrize(("shape", "axis"), [((7,), 0), ((7, 3, 2), 0), ((7, 3), 1)])
def test_a_lookup_that_is_not_of_rows_is_no_embedding(shape: tuple[int, ...], axis: int) -> None:
    with pytest.raises(NotQuantizable, match="axis 0"):
        kind_of(Gather, "Gather", np.zeros(shape, np.float32), {"axis": axis})


# Convolutions ---------------------------------------------------------------------------------------------------------


def check_window(factory: Any, case: tuple[tuple[int, ...], tuple[int, ...], int, dict, int]) -> None:
    x_shape, weight_shape, group, attributes, seed = case
    rng = np.random.default_rng(seed)
    x, weight = whole(rng, x_shape), whole(rng, weight_shape)
    expected = computed(factory.op_type, [x, weight], attributes)
    found = product(kind_of(factory, factory.op_type, weight, attributes), x, weight)
    n, out = expected.shape[:2]
    wanted = expected.reshape(n, group, out // group, -1).transpose(1, 0, 3, 2).reshape(group, -1, out // group)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv(rank: int) -> None:
    mostly(lambda case: check_window(Conv, case), windows(rank, False), examples=100)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv_transpose(rank: int) -> None:
    mostly(lambda case: check_window(ConvTranspose, case), windows(rank, True), examples=100)


@pytest.mark.parametrize(("op", "factory"), [("Conv", Conv), ("ConvTranspose", ConvTranspose)])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_where_rows_are_patches_their_gram_is_that_of_the_padded_input(op: str, factory: Any, data: Any) -> None:
    """Compare them for all pads, automatic pads and zeros between the elements, and in the order of the rows."""
    x_shape, weight_shape, _, attributes, seed = data.draw(windows(2, op == "ConvTranspose"))
    kind = kind_of(factory, op, np.zeros(weight_shape), attributes)
    x = whole(np.random.default_rng(seed), x_shape)
    seen = []

    def pays(*call: Any) -> bool:
        seen.append(call)
        _, kernel, strides, dilations, group = call
        return len(kernel) == 2 and group == 1 and all(step == 1 for step in (*strides, *dilations))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "pays", pays)
        padded = kind.patches(x)
    assert len(seen) == 1
    assert seen[0][1] == kind.kernel == weight_shape[2:]
    if op == "Conv" and (attributes.get("strides", [1, 1]) != [1, 1] or kind.groups > 1):
        assert padded is None
    if padded is not None:
        rows = kind.rows(x)[0].astype(np.float64)
        assert np.array_equal(patches.patch_gram(padded, padded, kind.kernel), rows.T @ rows)
        assert np.array_equal(patches.patch_sum(padded, kind.kernel), rows.sum(axis=0))
        assert len(rows) == len(x) * np.prod([n - k + 1 for n, k in zip(padded.shape[2:], kind.kernel, strict=True)])


@pytest.mark.parametrize(
    ("kind", "x_shape"),
    [
        (MatMul((5, 4)), (9, 5)),
        (MatMulLeft((4, 5)), (5, 9)),
        (Gemm((5, 4), False, False, 1.0, 1.0), (9, 5)),
        (Gather((7, 5)), (9,)),
    ],
    ids=["MatMul", "MatMulLeft", "Gemm", "Gather"],
)
def test_what_is_no_convolution_has_no_patches(kind: OpKind, x_shape: tuple[int, ...]) -> None:
    assert kind.patches(np.zeros(x_shape, np.float32)) is None
    assert kind.kernel == ()


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3])
def test_automatic_pads(auto_pad: str, size: int, stride: int, kernel: int) -> None:
    attributes = {"auto_pad": auto_pad, "strides": [stride]}
    check_window(Conv, ((2, 3, size), (4, 3, kernel), 1, attributes, 0))
    check_window(ConvTranspose, ((2, 3, size), (3, 4, kernel), 1, attributes, 0))


def test_an_output_shape_may_name_batch_and_channels_too() -> None:
    kind = kind_of(ConvTranspose, "ConvTranspose", np.zeros((3, 4, 2, 2), np.float32), {"output_shape": [1, 4, 9, 8]})
    assert isinstance(kind, ConvTranspose)
    assert kind.output_shape == (9, 8)


def test_only_a_grouped_transposed_convolution_and_a_stack_have_no_axis_of_channels() -> None:
    assert kind_of(ConvTranspose, "ConvTranspose", np.zeros((4, 2, 3)), {"group": 2}).axis is None
    assert kind_of(ConvTranspose, "ConvTranspose", np.zeros((4, 2, 3)), {}).axis == 1
    assert kind_of(Conv, "Conv", np.zeros((4, 2, 3)), {"group": 2}).axis == 0
    assert kind_of(MatMul, "MatMul", np.zeros((3, 5, 4)), {}).axis is None
    assert kind_of(MatMul, "MatMul", np.zeros((1, 5, 4)), {}).axis == 2


# Recurrent nodes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_both_weights_of_a_recurrent_node(direction: str) -> None:
    """Add both products: without an activation they are the state."""
    rng = np.random.default_rng(0)
    directions = 2 if direction == "bidirectional" else 1
    x, w, r = whole(rng, (4, 3, 5)), whole(rng, (directions, 6, 5)), whole(rng, (directions, 6, 6))
    attributes = {
        "direction": direction, "hidden_size": 6, "activations": ["Affine"] * directions,
        "activation_alpha": [1.0] * directions, "activation_beta": [0.0] * directions,
    }  # fmt: skip
    y = computed("RNN", [x, w, r], attributes)
    before = np.zeros_like(y)
    for d in range(directions):
        if direction == "reverse" or d == 1:
            before[:-1, d] = y[1:, d]
        else:
            before[1:, d] = y[:-1, d]
    steps = np.ascontiguousarray(x.swapaxes(0, 1)).reshape(3 * 4, 5)
    of_input = product(kind_of(RecurrentInput, "RNN", w, attributes), steps, w)[0]
    of_input = of_input.reshape(3 * 4, directions, 6).swapaxes(0, 1)
    states = np.ascontiguousarray(before.transpose(2, 0, 1, 3)).reshape(3 * 4, directions, 6)
    of_state = product(kind_of(RecurrentState, "RNN", r, attributes), states, r)
    assert np.array_equal(of_input + of_state, y.transpose(1, 2, 0, 3).reshape(directions, 3 * 4, 6))


def test_a_gate_before_the_product_makes_a_group_of_each_gate() -> None:
    rng = np.random.default_rng(0)
    weight = whole(rng, (2, 18, 6))
    kind = kind_of(RecurrentState, "GRU", weight, {"hidden_size": 6})
    rows = whole(rng, (7, 6, 6))
    expected = np.einsum("ndgi,dgoi->dgno", rows.reshape(7, 2, 3, 6), weight.reshape(2, 3, 6, 6))
    assert np.array_equal(product(kind, rows, weight), expected.reshape(6, 7, 6))
    assert kind_of(RecurrentState, "GRU", weight, {"linear_before_reset": 1}).groups == 2


# Questions that others ask about a kind ------------------------------------------------------------------------------

KINDS: dict[str, OpKind] = {
    "MatMul": MatMul((5, 4)),
    "MatMul of one matrix in a stack": MatMul((1, 5, 4)),
    "MatMul of a stack": MatMul((3, 5, 4)),
    "MatMulLeft": MatMulLeft((4, 5)),
    "Gemm": Gemm((5, 4), False, False, 0.5, 2.0),
    "Gemm, transB": Gemm((4, 5), False, True, 1.0, 1.0),
    "Gemm, transA": Gemm((5, 4), True, False, 1.0, 1.0),
    "Gather": Gather((7, 5)),
    "Conv": kind_of(Conv, "Conv", np.zeros((4, 3, 3, 3)), {}),
    "Conv in groups": kind_of(Conv, "Conv", np.zeros((4, 2, 3)), {"group": 2}),
    "Conv, depthwise": kind_of(Conv, "Conv", np.zeros((4, 1, 3)), {"group": 2}),
    "ConvTranspose": kind_of(ConvTranspose, "ConvTranspose", np.zeros((4, 2, 3)), {}),
    "ConvTranspose in groups": kind_of(ConvTranspose, "ConvTranspose", np.zeros((4, 2, 3)), {"group": 2}),
    "ConvTranspose, depthwise": kind_of(ConvTranspose, "ConvTranspose", np.zeros((2, 3, 3)), {"group": 2}),
    "LSTM, input": RecurrentInput((2, 16, 5)),
    "LSTM, state": RecurrentState((2, 16, 4), False),
}
MATRICES = {"MatMul", "Gemm", "Gemm, transB"}
CONVOLUTIONS = {"Conv", "Conv in groups", "Conv, depthwise"}
RECURRENT = {"LSTM, input", "LSTM, state"}
STACKS = {"MatMul of one matrix in a stack", "MatMul of a stack"}


@pytest.mark.parametrize(
    ("question", "those"),
    [
        ("is_lookup", {"Gather"}),
        ("is_recurrent", RECURRENT),
        ("reads_own_output", {"LSTM, state"}),
        ("is_matrix", MATRICES),
        ("is_convolution", CONVOLUTIONS),
        ("is_depthwise", {"Conv, depthwise", "ConvTranspose, depthwise"}),
        ("has_integer_form", MATRICES | CONVOLUTIONS | {"ConvTranspose"}),
        ("has_leading_axes", STACKS | {"MatMul"}),
        ("has_flat_rows", {"Gemm", "Gemm, transB", "Gemm, transA"}),
        ("takes_scalar_scale", set(KINDS) - STACKS - RECURRENT - {"MatMul"}),
        ("rows_follow_samples", set(KINDS) - {"MatMul of a stack", "MatMulLeft", "Gemm, transA"}),
    ],
)
def test_a_kind_answers_for_its_operator(question: str, those: set[str]) -> None:
    assert {name for name, kind in KINDS.items() if getattr(kind, question)} == those


def test_a_kind_knows_its_weight_and_its_numbers() -> None:
    assert {kind.outputs for name, kind in KINDS.items() if kind.is_matrix} == {4}
    assert KINDS["MatMul of a stack"].outputs == 12
    assert KINDS["Conv in groups"].outputs == KINDS["ConvTranspose in groups"].outputs == 4
    assert all(np.prod(kind.weight_shape) == kind.outputs * kind.inputs for kind in KINDS.values())


def test_only_a_gemm_multiplies_its_product_and_its_bias() -> None:
    factors = {name: (kind.alpha, kind.beta) for name, kind in KINDS.items()}
    assert factors.pop("Gemm") == (0.5, 2.0)
    assert set(factors.values()) == {(1.0, 1.0)}


def random_input(kind: OpKind) -> np.ndarray:
    """Draw an input [4, ...] of a kind whose first axis holds samples."""
    if kind.is_recurrent:
        return whole(np.random.default_rng(0), (4, 2, 4) if kind.reads_own_output else (4, 5))
    shape = {"MatMul": (4, 6, 5), "Gemm": (4, 5), "Gather": (4, 3)}.get(kind.op_type)
    if shape is None:
        channels = kind.weight_shape[0] if kind.op_type == "ConvTranspose" else kind.weight_shape[1] * kind.groups
        shape = (4, channels, *(5 for _ in kind.kernel))
    rng = np.random.default_rng(0)
    return rng.integers(0, 7, shape) if kind.is_lookup else whole(rng, shape)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.rows_follow_samples])
def test_where_rows_follow_samples_batches_may_be_cut_and_joined(name: str) -> None:
    kind = KINDS[name]
    x = random_input(kind)
    parts = [kind.rows(x[:1]), kind.rows(x[1:])]
    assert np.array_equal(np.concatenate(parts, axis=1), kind.rows(x))


# Sharing rows ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_kinds_with_equal_keys_have_equal_rows(data: st.DataObject) -> None:
    """Compare keys and rows: the calibration gathers the moments of layers with equal keys once."""
    rank = data.draw(st.integers(1, 2))
    transposed = data.draw(st.booleans())
    op, factory = ("ConvTranspose", ConvTranspose) if transposed else ("Conv", Conv)
    x_shape, shape, _, attributes, seed = data.draw(windows(rank, transposed))
    other = dict(attributes)
    change = data.draw(st.sampled_from(["out", "strides", "dilations", "pads", "auto_pad"]))
    if change == "strides":
        other["strides"] = data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    elif change == "dilations":
        other["dilations"] = data.draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    elif change == "pads":
        other["pads"] = data.draw(st.lists(st.integers(0, 1), min_size=2 * rank, max_size=2 * rank))
    elif change == "auto_pad":
        other["auto_pad"] = data.draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    more = (shape[0], shape[1] * 2) if transposed else (shape[0] * 2, shape[1])
    wider = (*more, *shape[2:]) if change == "out" else shape
    x = whole(np.random.default_rng(seed), x_shape)
    first = kind_of(factory, op, np.zeros(shape), attributes)
    second = kind_of(factory, op, np.zeros(wider), other)
    if change == "out":
        assert first.rows_key() == second.rows_key()
    if first.rows_key() == second.rows_key():
        assert np.array_equal(first.rows(x), second.rows(x))


def test_other_outputs_do_not_change_the_rows_of_a_matrix_but_its_inputs_do() -> None:
    def key(factory: Any, op: str, shape: tuple[int, ...], **attributes: Any) -> tuple[object, ...]:
        return kind_of(factory, op, np.zeros(shape), attributes).rows_key()

    assert key(MatMul, "MatMul", (5, 4)) == key(MatMul, "MatMul", (5, 9))
    assert key(MatMul, "MatMul", (5, 4)) != key(MatMul, "MatMul", (6, 4))
    assert key(MatMul, "MatMul", (2, 5, 4)) != key(MatMul, "MatMul", (5, 4))
    assert key(MatMul, "MatMul", (2, 5, 4)) != key(MatMul, "MatMul", (2, 1, 5, 4))
    assert key(MatMulLeft, "MatMul", (4, 5)) == key(MatMulLeft, "MatMul", (9, 5))
    assert key(MatMulLeft, "MatMul", (4, 5)) != key(MatMul, "MatMul", (5, 4))
    assert key(Gemm, "Gemm", (5, 4)) == key(Gemm, "Gemm", (7, 5), transB=1, beta=0.5)
    assert key(Gemm, "Gemm", (5, 4)) != key(Gemm, "Gemm", (5, 4), transA=1)
    assert key(Gemm, "Gemm", (5, 4)) != key(Gemm, "Gemm", (5, 4), alpha=0.5)


def equal_keys_mean_equal_rows(first: OpKind, second: OpKind, x: np.ndarray) -> None:
    assert first.rows_key() == second.rows_key()
    assert np.array_equal(first.rows(x), second.rows(x))


def test_matrices_of_other_outputs_share_their_rows() -> None:
    x = whole(np.random.default_rng(0), (3, 4))
    equal_keys_mean_equal_rows(MatMul((4, 5)), MatMul((4, 9)), x)
    equal_keys_mean_equal_rows(MatMulLeft((5, 3)), MatMulLeft((9, 3)), x)
    equal_keys_mean_equal_rows(Gemm((4, 5), False, False, 2, 1), Gemm((9, 4), False, True, 2, 0), x)
    equal_keys_mean_equal_rows(Gemm((3, 5), True, False, 1, 1), Gemm((9, 3), True, True, 1, 1), x)


def test_tables_of_other_lengths_do_not_share_their_rows() -> None:
    assert Gather((7, 3)).rows_key() == Gather((7, 5)).rows_key()
    assert Gather((7, 3)).rows_key() != Gather((9, 3)).rows_key()


def test_every_kind_is_found_by_its_operator() -> None:
    single = {op: kinds[""].op_type for op, kinds in OP_KINDS.items() if "" in kinds}
    assert single == {op: op for op in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")}
    recurrent = {op: [*kinds] for op, kinds in OP_KINDS.items() if op not in single}
    assert recurrent == {op: [".W", ".R"] for op in ("LSTM", "GRU", "RNN")}
