"""Test the grid and the container that the form of a layer can carry."""

from __future__ import annotations

import onnx
import pytest
from zoo import model_of, node

from comq_onnx.model.layers import Layer
from comq_onnx.plan.activations import ActivationPlan
from comq_onnx.plan.forms import WeightForm, form_of, supported_grid
from comq_onnx.solve.grid import Grid
from comq_onnx.targets.catalog import ORT_CPU, TENSORRT


def layer_of(source: onnx.ModelProto) -> Layer:
    """Return the only layer of a model."""
    import onnx_ir as ir

    from comq_onnx.model.layers import list_layers

    (layer,) = list_layers(ir.from_proto(source))[0]
    return layer


WEIGHT_ONLY = ActivationPlan("float32")


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
    layer = layer_of(model_of([node(op, inputs, "y", **attributes)], {"w": weight}, {"x": x}, ["y"]))
    form = form_of(layer, WEIGHT_ONLY)
    grid = Grid(4, symmetric=False, block_size=32)
    assert supported_grid(layer, form, grid, ORT_CPU) == Grid(4, symmetric=False, block_size=block)
    assert supported_grid(layer, WeightForm.INTEGER, grid, ORT_CPU) == Grid(4, symmetric=False)
    assert supported_grid(layer, form, Grid(3), ORT_CPU) == Grid(3, signed=True)


def test_a_target_of_whole_blocks_gets_smaller_ones_that_fill_the_inputs() -> None:
    layer = layer_of(model_of([node("MatMul", "x w", "y")], {"w": (96, 8)}, {"x": (4, 96)}, ["y"]))
    for target, block in ((ORT_CPU, 64), (TENSORRT, 32)):
        grid = supported_grid(layer, WeightForm.BLOCKED, Grid(4, block_size=64), target)
        assert grid == Grid(4, block_size=block, signed=target.signed_scales)


def test_a_table_has_no_zero_point() -> None:
    table = layer_of(model_of([node("Gather", "w ids", "y")], {"w": (20, 16)}, {"ids": (4,)}, ["y"]))
    grid = supported_grid(table, WeightForm.LOOKED_UP, Grid(8, symmetric=False, block_size=16), ORT_CPU)
    assert grid == Grid(8, signed=True)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_has_a_container_at_every_opset(bits: int) -> None:
    for opset, wanted in ((13, "INT8"), (21, "INT8" if bits > 4 else "INT4"), (25, {2: "INT2"}.get(bits))):
        found = ORT_CPU.integer.container(bits, opset)[0]
        assert found == (wanted or ("INT8" if bits > 4 else "INT4"))
