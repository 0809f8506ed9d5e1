"""Store integer codes as constants of a graph: in a container of their width, or as bit planes where none fits.

ONNX has integers of 2, 4 and 8 bits. Codes of 3, 5, 6 or 7 bits would waste up to 3 bits of a container each; as bit
planes (3 = 2 + 1, 7 = 4 + 2 + 1) they take no more bits than they have. A plane is stored as bytes of 8 / width fields.
Each byte is looked up in a table of the numbers that its fields stand for, and the planes are joined by BitwiseOr. All
of it is constant, and so folded when a runtime loads the model: what runs is INT8.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx.model import graph as graphs

Numbers = npt.NDArray[Any]
_TYPES = {"INT8": np.int8, "INT4": ml_dtypes.int4, "INT2": ml_dtypes.int2}


def pack(codes: Numbers, container: str) -> Numbers:
    """Convert integer codes to the dtype of a container: INT8, INT4 or INT2 (stored packed in the file)."""
    return np.asarray(codes.astype(_TYPES[container]))


def pack_plane(codes: Numbers, width: int, shift: int) -> npt.NDArray[np.uint8]:
    """Pack bits shift..shift+width-1 of int8 codes into bytes [n], the first code in the lowest bits.

    width: 1, 2 or 4
    """
    each = 8 // width
    fields = (np.ascontiguousarray(codes, np.int8).ravel().view(np.uint8) >> shift) & ((1 << width) - 1)
    fields = np.pad(fields, (0, -fields.size % each)).reshape(-1, each)
    return np.asarray(np.bitwise_or.reduce(fields << (width * np.arange(each, dtype=np.uint8)), axis=1), np.uint8)


def field_table(width: int, shift: int, signed: bool) -> npt.NDArray[np.int8]:
    """Return the parts of codes that the fields of each byte of `pack_plane` stand for: int8 [256, 8 // width].

    signed: whether the plane holds the highest bits, and so the sign
    """
    fields = (np.arange(256)[:, None] >> (width * np.arange(8 // width))) & ((1 << width) - 1)
    if signed:
        fields = np.where(fields >> (width - 1), fields - (1 << width), fields)
    return (fields << shift).astype(np.int8)


def store(model: ir.Model, name: str, codes: Numbers, container: str, planes: tuple[int, ...] = ()) -> ir.Value:
    """Store int8 `codes` in a graph once under one name, and return their value.

    container: the type of the initializer, where there are no planes
    planes: the widths of bit planes, the highest bits first; with them the value is INT8, joined from the planes
    """
    if not planes:
        return shared_constant(model.graph, f"{name}.codes", pack(codes, container))
    graph = model.graph
    for node in graph:
        known = node.outputs[0].meta.get("codes") if node.name == f"{name}.codes" else None
        if known is not None and known.shape == codes.shape and np.array_equal(known, codes):
            return node.outputs[0]
    return _join_planes(graph, name, codes, planes)


def _join_planes(graph: ir.Graph, name: str, codes: Numbers, planes: tuple[int, ...]) -> ir.Value:
    """Store codes as bit planes at the start of a graph, with the nodes that join them to INT8."""
    first = next(iter(graph))
    whole: ir.Value | None = None
    flat = shared_constant(graph, "comq_onnx.flat", np.array([-1]))
    for k, width in enumerate(planes):
        shift = sum(planes[k + 1 :])
        plane = graphs.add_initializer(graph, f"{name}.codes.plane_{k}", pack_plane(codes, width, shift))
        table = shared_constant(
            graph, f"comq_onnx.fields_{width}_{shift}_{k}", field_table(width, shift, signed=k == 0)
        )
        bytes_ = graphs.insert(first, "Cast", [plane], {"to": ir.DataType.INT32}, f"{name}.bytes_{k}")
        fields = graphs.insert(first, "Gather", [table, bytes_], {}, f"{name}.fields_{k}")
        value = graphs.insert(first, "Reshape", [fields, flat], {}, f"{name}.padded_{k}")
        if codes.size % (8 // width):
            begin = shared_constant(graph, "comq_onnx.begin", np.array([0]))
            end = shared_constant(graph, f"{name}.count", np.array([codes.size]))
            value = graphs.insert(first, "Slice", [value, begin, end], {}, f"{name}.bits_{k}")
        whole = value if whole is None else graphs.insert(first, "BitwiseOr", [whole, value], {}, f"{name}.joined_{k}")
    shape = graphs.add_initializer(graph, f"{name}.shape", np.array(codes.shape))
    result = graphs.insert(first, "Reshape", [whole, shape], {}, f"{name}.codes")
    result.type, result.shape = ir.TensorType(ir.DataType.INT8), ir.Shape(codes.shape)
    result.meta["codes"] = codes
    return result


def shared_constant(graph: ir.Graph, name: str, numbers: Numbers) -> ir.Value:
    """Return the initializer of this name with these numbers; a new one where there is none."""
    known = graph.initializers.get(name)
    if known is not None and known.const_value is not None:
        stored = known.const_value.numpy()
        if stored.dtype == numbers.dtype and stored.shape == numbers.shape and np.array_equal(stored, numbers):
            return known
    return graphs.add_initializer(graph, name, numbers)


def for_one_reader(graph: ir.Graph, before: ir.Node, value: ir.Value, name: str) -> ir.Value:
    """Return a constant of the numbers of a stored one that no other node reads, by nodes in front of `before`.

    graph: the main graph, which holds the stored constant

    The first reader takes the stored constant itself, unless it lies in a subgraph: there ONNX Runtime makes a
    MatMulNBits only of the subgraph's own constants, such as it makes of any operator on others when it loads the
    model. For each other reader it makes a constant: of reshapes to and fro over one axis more than for the reader
    before, or it would take equal ones for the same. There are no reshapes of packed integers, and ONNX Runtime fails
    to fold a Cast to INT2.
    """
    inside = before.graph is not graph
    count = sum(reader.graph is before.graph or not inside for reader, _ in value.uses())
    if not (count or inside):
        return value
    shape, dtype = value.shape, value.dtype
    assert shape is not None
    dims = [int(d) for d in shape if isinstance(d, int)]
    packed = dtype in (ir.DataType.INT4, ir.DataType.INT2)
    if packed:
        value = graphs.insert(before, "Cast", [value], {"to": ir.DataType.INT8}, f"{name}.int8")
    plain = f"comq_onnx.shape_{'x'.join(map(str, dims))}"
    if count:
        longer = shared_constant(graph, f"{plain}_{count}", np.array([1] * count + dims))
        value = graphs.insert(before, "Reshape", [value, longer], {}, f"{name}.longer")
    if count or not packed:
        whole = shared_constant(graph, plain, np.array(dims))
        value = graphs.insert(before, "Reshape", [value, whole], {}, f"{name}.plain" if packed else name)
    value.type, value.shape = ir.TensorType(ir.DataType.INT8 if packed or dtype is None else dtype), shape
    if packed:
        value = graphs.insert(before, "Cast", [value], {"to": ir.DataType.INT4}, name)
    return value
