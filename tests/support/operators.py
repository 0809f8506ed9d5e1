"""Make single operators and their inputs, and run them in ONNX Runtime, to test the kinds of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from comq_onnx.model.op_kind import OpKind

ort.set_default_logger_severity(4)


class Refused(Exception):
    """Say that ONNX Runtime does not run this combination of attributes."""


def whole(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(np.float32)


def computed(op: str, arrays: list[np.ndarray], attributes: dict[str, Any]) -> np.ndarray:
    """Run one operator in ONNX Runtime. Raises Refused."""
    inputs = [f"in{i}" for i in range(len(arrays))]
    node = onnx.helper.make_node(op, inputs, ["y"], **attributes)
    values = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(inputs, arrays, strict=True)
    ]
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node], "one", values, [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    try:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, dict(zip(inputs, arrays, strict=True)))[0]
    except Exception as error:
        raise Refused(str(error)) from error


def kind_of(factory: Any, op: str, weight: np.ndarray, attributes: dict[str, Any]) -> OpKind:
    return factory.of(ir.node(op, [], attributes), weight.shape)


def mostly(check: Callable[[Any], None], cases: st.SearchStrategy[Any], examples: int) -> None:
    """Check all of `cases`; those that ONNX Runtime refuses do not count, and must be few."""
    ran, refused = [0], [0]

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(cases)
    def counted(case: Any) -> None:
        try:
            check(case)
        except Refused:
            refused[0] += 1
            assume(False)
        ran[0] += 1

    counted()
    assert ran[0] >= examples // 2
    assert ran[0] >= 3 * refused[0]


seeds = st.integers(0, 2**32 - 1)


@st.composite
def windows(draw: st.DrawFn, rank: int, transposed: bool) -> tuple[tuple[int, ...], tuple[int, ...], int, dict, int]:
    """Draw shapes of input and weight, group, attributes and seed; attributes that are defaults are often left out."""
    group = draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = group * draw(st.integers(1, 3)), group * draw(st.integers(1, 3))
    if draw(st.sampled_from([False, False, True])):
        group = out = channels  # depthwise

    def each(low: int, high: int, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    kernel, strides, dilations = each(1, 3), each(1, 3), each(1, 2)
    size = [draw(st.integers(1 if transposed else (k - 1) * d + 1, 7)) for k, d in zip(kernel, dilations, strict=True)]
    attributes: dict[str, Any] = {"group": group} if group > 1 or draw(st.booleans()) else {}
    for name, value in (("kernel_shape", kernel), ("strides", strides), ("dilations", dilations)):
        if (name != "kernel_shape" and any(v > 1 for v in value)) or draw(st.booleans()):
            attributes[name] = value
    auto_pad = draw(st.sampled_from([None, None, "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto_pad is not None:
        attributes["auto_pad"] = auto_pad
    if auto_pad in ("SAME_UPPER", "SAME_LOWER") and not transposed:
        # ONNX Runtime pads dilated kernels only where the amounts are given
        attributes.pop("dilations", None)
    full = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(size, strides, kernel, dilations, strict=True)]
    if transposed:
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(strides, dilations, strict=True)]
        if any(extra):
            attributes["output_padding"] = extra
        full = [f + e for f, e in zip(full, extra, strict=True)]
        if draw(st.sampled_from([False, False, True])):
            attributes["output_shape"] = [draw(st.integers(max(1, f - 3), f)) for f in full]
    if auto_pad in (None, "NOTSET") and "output_shape" not in attributes and draw(st.booleans()):
        most = min(2, (min(full) - 1) // 2) if transposed else 2
        attributes["pads"] = each(0, most, 2 * rank)
    weight = (channels, out // group, *kernel) if transposed else (out, channels // group, *kernel)
    return (draw(st.integers(1, 2)), channels, *size), weight, group, attributes, draw(seeds)
