"""Measure what operators take in ONNX Runtime on one thread, and print the lines of comq_onnx/targets/costs.py.

    python tools/bench/costs.py zoo squeezenet minilm open_nsfw ppocr_det ppocr_cls ppocr_rec efficientnet_lite0

Each model of the zoo (tools/zoo/export.py) runs as it is, in integers wherever there is a kernel, and weight-only. The
time of a node is the median over some runs; a line is the least squares fit of relative errors with no negative part.
The last columns say how far the line is off a node in the median, and how many nodes it is drawn through.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from onnx import helper
from scipy.optimize import nnls

import comq_onnx

RUNS = 15
FORMS = {"float": None, "integer": "8", "weight-only": "none"}
PRODUCTS = (
    "Conv", "FusedConv", "QLinearConv", "MatMul", "FusedMatMul", "Gemm", "MatMulIntegerToFloat", "QGemm", "MatMulNBits",
)  # fmt: skip


OPERATORS = (
    "Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool", "MaxPool", "Sigmoid", "LeakyRelu", "QuantizeLinear",
    "DequantizeLinear", "ReorderInput", "ReorderOutput", "Transpose",
)  # fmt: skip


def nodes(path: Path, feeds: dict[str, Any]) -> Iterator[tuple[onnx.NodeProto, dict[str, list[int]], float, list[int]]]:
    """Yield every node that runs, the shapes of the weights, its median microseconds and the sizes of its tensors.

    The sizes of the tensors that it reads come first.
    """
    with tempfile.TemporaryDirectory() as work:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        options.enable_profiling, options.profile_file_prefix = True, str(Path(work) / "profile")
        options.optimized_model_filepath = str(Path(work) / "optimized.onnx")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS):
            session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(options.optimized_model_filepath).graph
    by_name = {node.name: node for node in graph.node}
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    spent, shapes = defaultdict(list), {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            spent[name].append(event["dur"])
            shapes[name] = [*event["args"]["input_type_shape"], *event["args"]["output_type_shape"]]
    for name, times in spent.items():
        if name in by_name:
            sizes = [int(np.prod(next(iter(shape.values())), dtype=np.int64)) for shape in shapes[name]]
            yield by_name[name], weights, float(np.median(times)), sizes


def place(node: onnx.NodeProto, weights: dict[str, list[int]], sizes: list[int]) -> tuple[str, list[float]] | None:
    """Return the line that a node belongs to, and what its time depends on: 1, products, numbers."""
    plain = node.op_type.removeprefix("QLinear").removeprefix("Nhwc")
    if plain in OPERATORS:
        return plain, [1.0, max(sizes)]
    if node.op_type not in PRODUCTS:
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "MatMulNBits":
        inputs, outputs = attributes["K"], attributes["N"]
        return "matrix", [1.0, sizes[-1] * inputs, sizes[0] + sizes[-1]]
    shape = next((weights[i] for i in node.input[1:] if i in weights and len(weights[i]) in (2, 4)), None)
    if shape is None:
        return None
    if len(shape) == 2:
        outputs = shape[0] if attributes.get("transB") else shape[1]
        return "matrix", [1.0, sizes[-1] * (int(np.prod(shape)) // outputs), sizes[0] + sizes[-1]]
    depthwise = attributes.get("group", 1) > 1 and shape[1] == 1
    kind = "depthwise" if depthwise else "pointwise" if shape[2] * shape[3] == 1 else "window"
    return kind, [1.0, sizes[-1] * int(np.prod(shape[1:])), sizes[0] + sizes[-1]]


@click.command(help=__doc__)
@click.argument("zoo", type=click.Path(exists=True, path_type=Path))
@click.argument("models", nargs=-1, required=True)
def main(zoo: Path, models: tuple[str, ...]) -> None:
    """Measure the models and print the lines."""
    lines: dict[tuple[str, str], list[tuple[list[float], float]]] = defaultdict(list)
    for name in models:
        source, samples = zoo / name / "model.onnx", zoo / name / "calib.npz"
        feeds = {key: array[:1] for key, array in np.load(samples).items()}
        for form, activations in FORMS.items():
            with tempfile.TemporaryDirectory() as work:
                path = source
                if activations is not None:
                    path = Path(work) / "quantized.onnx"
                    # how well is no matter here
                    comq_onnx.quantize(
                        source, path, samples, bits=8, activations=activations, solver="rtn", max_samples=8
                    )
                for node, weights, time, sizes in nodes(path, feeds):
                    found = place(node, weights, sizes)
                    # float layers count as the source has them
                    if found is not None and (form == "float" or node.op_type not in ("Conv", "FusedConv")):
                        kind = "weight-only" if node.op_type == "MatMulNBits" else form
                        if node.op_type.startswith(("QLinear", "Nhwc")):
                            kind = "integer"
                        elif found[0] in OPERATORS:
                            kind = "float"
                        lines[found[0], kind].append((found[1], time))
    click.echo(
        f"onnxruntime {onnxruntime.__version__}\n| | form | fixed us | ns a product | ns a number | off | nodes |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    for (kind, form), points in sorted(lines.items()):
        if len(points) < 3:
            continue
        terms, times = np.array([p[0] for p in points]), np.array([p[1] for p in points])
        scale = 1 / np.maximum(times, 5)
        found = nnls(terms * scale[:, None], times * scale)[0]
        off = np.median(np.abs(terms @ found - times) / times)
        products = f"{found[1] * 1e3:.4f}" if len(found) == 3 else ""
        click.echo(
            f"| {kind} | {form} | {found[0]:.1f} | {products} | {found[-1] * 1e3:.3f} | {off:.0%} | {len(times)} |"
        )


if __name__ == "__main__":
    main()
