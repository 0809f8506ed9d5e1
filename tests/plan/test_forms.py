"""Test the grid and the container that the form of a layer can carry."""

from __future__ import annotations

import onnx
import pytest
from zoo import model_of, node

from comq_onnx.model.layers import Layer
from comq_onnx.plan.forms import supported_grid
from comq_onnx.solve.grid import Grid
from comq_onnx.targets.catalog import ORT_CPU


def layer_of(source: onnx.ModelProto) -> Layer:
    """Return the only layer of a model."""
    import onnx_ir as ir

    from comq_onnx.model.layers import list_layers

    (layer,) = list_layers(ir.from_proto(source))[0]
    return layer


@pytest.mark.parametrize(
    ("op", "inputs", "weight", "x", "attributes", "blocked"),
    [
        ("MatMul", "x w", (64, 8), (4, 64), {}, True),
        ("MatMul", "x w", (32, 8), (4, 32), {}, False),
        ("MatMul", "x w", (2, 64, 8), (2, 4, 64), {}, False),
        ("MatMul", "w x", (8, 64), (64, 4), {}, False),
        ("Gemm", "x w", (8, 64), (4, 64), {"transB": 1}, True),
        ("Conv", "x w", (8, 64, 1, 1), (1, 64, 4, 4), {}, False),
    ],
)
def test_blocks_are_for_matrices_with_more_inputs_than_a_block(
    op: str, inputs: str, weight: tuple, x: tuple, attributes: dict, blocked: bool
) -> None:
    layer = layer_of(model_of([node(op, inputs, "y", **attributes)], {"w": weight}, {"x": x}, ["y"]))
    grid = Grid(4, symmetric=False, block_size=32)
    assert supported_grid(layer, grid, ORT_CPU) == (grid if blocked else Grid(4, symmetric=False))
    assert supported_grid(layer, Grid(3), ORT_CPU) == Grid(3)


def test_a_grouped_transposed_convolution_has_one_scale_and_a_table_no_zero_point() -> None:
    up = layer_of(
        model_of([node("ConvTranspose", "x w", "y", group=2)], {"w": (16, 4, 2, 2)}, {"x": (1, 16, 4, 4)}, ["y"])
    )
    assert supported_grid(up, Grid(4), ORT_CPU) == Grid(4, per_tensor=True)
    table = layer_of(model_of([node("Gather", "w ids", "y")], {"w": (20, 16)}, {"ids": (4,)}, ["y"]))
    assert supported_grid(table, Grid(8, symmetric=False, block_size=16), ORT_CPU) == Grid(8)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_has_a_container_at_every_opset(bits: int) -> None:
    for opset, wanted in ((13, "INT8"), (21, "INT8" if bits > 4 else "INT4"), (25, {2: "INT2"}.get(bits))):
        found = ORT_CPU.integer.container(bits, opset)[0]
        assert found == (wanted or ("INT8" if bits > 4 else "INT4"))
