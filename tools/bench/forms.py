"""Time the QDQ forms that comq_onnx.write chooses between, in ONNX Runtime on one thread: see docs/runtimes.md.

    python tools/bench/forms.py

It prints a line for each: the form, milliseconds (median, all forms of a group in turn), speed over the float form, and
the operators that ONNX Runtime made of it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from comq_onnx.evaluate.kernels import executed_kernels
from comq_onnx.runtime.session import Session
from comq_onnx.write.codes import field_table, pack_plane

Model = onnx.ModelProto
RNG = np.random.default_rng(0)
X_SCALE, Y_SCALE, MIDDLE = np.float32(0.02), np.float32(2.0), np.uint8(128)


def model(nodes: list[Any], constants: dict[str, Any], shape: list[Any], dtype: int = TensorProto.FLOAT) -> Model:
    """Build a model from x to y."""
    graph = helper.make_graph(
        nodes, "form", [helper.make_tensor_value_info("x", dtype, shape)], [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def node(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    """Build a node from names written in one string."""
    return helper.make_node(op, inputs.split(), [output], **attributes)


QUANTIZE_X = [node("QuantizeLinear", "x xs xz", "xq"), node("DequantizeLinear", "xq xs xz", "xd")]
UNPACK = node("Cast", "w4", "w8", to=TensorProto.INT8)


def conv_forms() -> dict[str, Model]:
    """Build a 3x3 convolution, 64 to 64 channels at 56x56, in each form."""
    w = RNG.integers(-7, 8, (64, 64, 3, 3)).astype(np.int8)
    scale = (RNG.random(64) * 0.1 + 0.01).astype(np.float32)
    common = {"s": scale, "xs": X_SCALE, "xz": MIDDLE, "ys": Y_SCALE}
    wide = scale[:, None, None, None]
    shape, pads = [1, 64, 56, 56], [1, 1, 1, 1]
    out = [node("QuantizeLinear", "c ys xz", "cq"), node("DequantizeLinear", "cq ys xz", "y")]
    conv = node("Conv", "xd w", "c", pads=pads)
    dequantize = node("DequantizeLinear", "w8 s", "w", axis=0)
    w4 = w.astype(ml_dtypes.int4)
    return {
        "float": model([node("Conv", "x w", "y", pads=pads)], {"w": w * wide}, shape),
        "integer, INT8": model([*QUANTIZE_X, dequantize, conv, *out], common | {"w8": w}, shape),
        "integer, INT4 + Cast": model([*QUANTIZE_X, UNPACK, dequantize, conv, *out], common | {"w4": w4}, shape),
        "integer, 6 bits as planes of 4 and 2": planes(w, common, [dequantize, conv, *out], shape),
        "INT4 straight into the DequantizeLinear": model(
            [*QUANTIZE_X, node("DequantizeLinear", "w4 s", "w", axis=0), conv, *out], common | {"w4": w4}, shape
        ),
        "weight-only, INT4 DequantizeLinear": model(
            [node("DequantizeLinear", "w4 s", "w", axis=0), node("Conv", "x w", "y", pads=pads)],
            {"w4": w4, "s": scale}, shape,
        ),
        "weight-only, INT4 folded (Cast, Mul)": model(
            [node("Cast", "w4", "f", to=TensorProto.FLOAT), node("Mul", "f s", "w"),
             node("Conv", "x w", "y", pads=pads)],
            {"w4": w4, "s": wide}, shape,
        ),
    }  # fmt: skip


def planes(w: Any, common: dict[str, Any], rest: list[Any], shape: list[Any]) -> Model:
    """Build a model that joins codes from bit planes when it is loaded: see comq_onnx.write.codes."""
    constants = {"shape": np.array(w.shape), "flat": np.array([-1])}
    nodes = []
    for k, (width, shift) in enumerate(((4, 2), (2, 0))):
        constants |= {f"b{k}": pack_plane(w, width, shift), f"t{k}": field_table(width, shift, signed=k == 0)}
        nodes += [
            node("Cast", f"b{k}", f"i{k}", to=TensorProto.INT32), node("Gather", f"t{k} i{k}", f"g{k}"),
            node("Reshape", f"g{k} flat", f"f{k}"),
        ]  # fmt: skip
    join = [node("BitwiseOr", "f0 f1", "joined"), node("Reshape", "joined shape", "w8")]
    return model([*QUANTIZE_X, *nodes, *join, *rest], common | constants, shape)


def matmul_forms(shape: list[Any]) -> dict[str, Model]:
    """Build x [.., 128, 768] times a weight [768, 3072] plus a bias, in integers; the bias is written in three ways."""
    w = RNG.integers(-7, 8, (768, 3072)).astype(np.int8)
    scale = (RNG.random(3072) * 0.1 + 0.01).astype(np.float32)
    bias = RNG.standard_normal(3072).astype(np.float32)
    common = {"s": scale, "z": np.zeros(3072, np.int8), "xs": X_SCALE, "xz": MIDDLE, "w4": w.astype(ml_dtypes.int4)}
    with_zero = [*QUANTIZE_X, UNPACK, node("DequantizeLinear", "w8 s z", "w", axis=1), node("MatMul", "xd w", "p")]
    without = [*QUANTIZE_X, UNPACK, node("DequantizeLinear", "w8 s", "w", axis=1), node("MatMul", "xd w", "p")]
    integer = {
        "b32": np.rint(bias / (X_SCALE * scale)).astype(np.int32),
        "bs": X_SCALE * scale,
        "bz": np.zeros(3072, np.int32),
    }
    add = [node("DequantizeLinear", "b32 bs bz", "b", axis=0), node("Add", "p b", "y")]
    return {
        "float": model([node("MatMul", "x w", "p"), node("Add", "p b", "y")], {"w": w * scale, "b": bias}, shape),
        "float bias": model([*with_zero, node("Add", "p b", "y")], common | {"b": bias}, shape),
        "int32 bias, no weight zero point": model([*without, *add], common | integer, shape),
        "int32 bias": model([*with_zero, *add], common | integer, shape),
    }


def gather_forms() -> dict[str, Model]:
    """Build a look-up of 128 rows in a table of 30,522 x 384, in each form."""
    codes = RNG.integers(-127, 128, (30522, 384)).astype(np.int8)
    scale = (RNG.random((30522, 1)) * 0.01).astype(np.float32)
    shape = [1, 128]
    return {
        "float": model([node("Gather", "w x", "y")], {"w": codes * scale}, shape, TensorProto.INT64),
        "DequantizeLinear of the table": model(
            [node("DequantizeLinear", "q s", "w", axis=0), node("Gather", "w x", "y")],
            {"q": codes, "s": scale[:, 0]}, shape, TensorProto.INT64,
        ),
        "codes and scales looked up": model(
            [node("Gather", "q x", "c"), node("Cast", "c", "f", to=TensorProto.FLOAT), node("Gather", "s x", "r"),
             node("Mul", "f r", "y")],
            {"q": codes, "s": scale}, shape, TensorProto.INT64,
        ),
    }  # fmt: skip


def evened_forms() -> dict[str, Model]:
    """Build a product whose input channels get factors before one scale serves all: by a Mul, or a scale for each."""
    weights = RNG.integers(-127, 128, (1536, 384)).astype(np.int8)
    scale, factors = np.full(384, 0.01, np.float32), RNG.uniform(0.5, 2, 1536).astype(np.float32)
    constants = {
        "q": weights, "s": scale, "z": np.zeros(384, np.int8), "sx": X_SCALE, "zx": MIDDLE, "t": factors,
        "each": X_SCALE / factors, "middles": np.full(1536, MIDDLE),
    }  # fmt: skip
    product = [
        node("DequantizeLinear", "xq sx zx", "xd"), node("DequantizeLinear", "q s z", "w", axis=1),
        node("MatMul", "xd w", "y"),
    ]  # fmt: skip
    return {
        "float": model([node("MatMul", "x w", "y")], {"w": weights * scale}, [1, 128, 1536]),
        "integer": model([node("QuantizeLinear", "x sx zx", "xq"), *product], constants, [1, 128, 1536]),
        "... with a Mul": model(
            [node("Mul", "x t", "e"), node("QuantizeLinear", "e sx zx", "xq"), *product], constants, [1, 128, 1536]
        ),
        "... with a scale per channel": model(
            [node("QuantizeLinear", "x each middles", "xq", axis=-1), *product], constants, [1, 128, 1536]
        ),
    }


GROUPS: dict[str, tuple[Callable[[], dict[str, Model]], Any]] = {
    "Conv 3x3, 64 -> 64, 56x56": (conv_forms, RNG.standard_normal((1, 64, 56, 56)).astype(np.float32)),
    "MatMul 768 -> 3072 + bias, x [1,128,768]": (
        lambda: matmul_forms([1, 128, 768]), RNG.standard_normal((1, 128, 768)).astype(np.float32),
    ),
    "MatMul 768 -> 3072 + bias, x [n,t,768]": (
        lambda: matmul_forms(["n", "t", 768]), RNG.standard_normal((1, 128, 768)).astype(np.float32),
    ),
    "MatMul 768 -> 3072 + bias, x [n,768]": (
        lambda: matmul_forms(["n", 768]), RNG.standard_normal((128, 768)).astype(np.float32),
    ),
    "MatMul 1536 -> 384, x [1,128,1536]": (evened_forms, RNG.standard_normal((1, 128, 1536)).astype(np.float32)),
    "Gather of 128 rows": (gather_forms, RNG.integers(0, 30522, (1, 128))),
}  # fmt: skip


@click.command()
@click.option("--rounds", default=30, show_default=True, help="Runs of each form.")
def main(rounds: int) -> None:
    """Time every form of every group."""
    click.echo(f"onnxruntime {onnxruntime.__version__}, one thread")
    for title, (build, x) in GROUPS.items():
        click.echo(f"\n| {title} | ms | over float | ONNX Runtime runs |\n|---|---|---|---|")
        with tempfile.TemporaryDirectory() as work:
            paths = {}
            for i, (name, proto) in enumerate(build().items()):
                paths[name] = Path(work) / f"{i}.onnx"
                onnx.save(proto, paths[name])
            sessions = {name: Session(path, threads=1) for name, path in paths.items()}
            times: dict[str, list[float]] = {name: [] for name in paths}
            for _ in range(rounds):
                for name, session in sessions.items():
                    start = time.perf_counter()
                    session.run({"x": x})
                    times[name].append((time.perf_counter() - start) * 1e3)
            medians = {name: float(np.median(t)) for name, t in times.items()}
            for name, spent in medians.items():
                ops = ", ".join(sorted(executed_kernels(paths[name]).counts))
                click.echo(f"| {name} | {spent:.2f} | {medians['float'] / spent:.2f}x | {ops} |")


if __name__ == "__main__":
    main()
