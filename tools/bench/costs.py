"""Measure what operators take in ONNX Runtime on one thread, and print the lines of comq_onnx/targets/costs.py.

    python tools/bench/costs.py

Every operator runs in chains of eight, of many sizes, in float, in integers, and weight-only where there is a kernel
for that. The time of one is an eighth of that of the chain: the low quintile of its runs, which alternate with those of
the other forms. A line is the least squares fit of relative errors with no negative part; the last columns say how far
it is off in the median, and how many sizes it is drawn through. The quantization of the input is taken out of the
products in integers. Operators that integer convolutions have beside them with the channels last (pools, Concat) cannot
be measured alone: their lines come from profiles of real models.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import nnls

import comq_onnx

DEPTH, SECONDS = 8, 0.1
# the most multiplications and numbers of one operator
MOST_PRODUCTS, MOST_NUMBERS = 1.2e8, 1e6
ROWS = (1, 4, 16, 64, 256)
WIDTHS = (
    (32, 32), (64, 64), (64, 256), (128, 128), (128, 512), (256, 256), (256, 1024), (512, 512), (768, 768),
    (1024, 1024),
)  # fmt: skip
CHANNELS, SIZES = (16, 32, 64, 128, 256), (4, 7, 14, 28, 56)
CONVOLUTIONS = {"pointwise": (1, False), "window": (3, False), "depthwise": (3, True)}
# operators of a value and the input of the chain
OPERATORS = ("Add", "Mul")
# the opset of the chains
OPSET = 17
Step = Callable[[int, str, str], Sequence[onnx.NodeProto]]
# what the time of an operator depends on, and its microseconds
Point = tuple[list[float], float]


def chain(shape: Sequence[int], step: Step, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Build x -> step -> ... -> y; step: makes the nodes from one value to the next."""
    nodes = [node for i in range(DEPTH) for node in step(i, f"v{i}", f"v{i + 1}")]
    nodes[0].input[0] = "v0"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("v0", f"v{DEPTH}")]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def pair(value: str) -> list[onnx.NodeProto]:
    """Return the nodes that quantize a value and dequantize it again, as `value`.d."""
    parts = ["scale", "zero"]
    return [
        helper.make_node("QuantizeLinear", [value, *parts], [f"{value}.q"]),
        helper.make_node("DequantizeLinear", [f"{value}.q", *parts], [f"{value}.d"]),
    ]


GRID = {"scale": np.float32(0.05), "zero": np.uint8(128)}


def times(paths: Sequence[Path], shape: Sequence[int]) -> list[float]:
    """Return the microseconds of one operator of each chain."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    sessions = [onnxruntime.InferenceSession(str(p), options, providers=["CPUExecutionProvider"]) for p in paths]
    feeds = {"v0": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    spent: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        session.run(None, feeds)
    begun = time.perf_counter()
    while time.perf_counter() - begun < SECONDS * len(paths) or len(spent[0]) < 5:
        for session, runs in zip(sessions, spent, strict=True):
            start = time.perf_counter()
            session.run(None, feeds)
            runs.append(time.perf_counter() - start)
    return [float(np.quantile(runs, 0.2)) * 1e6 / DEPTH for runs in spent]


def quantized(path: Path, shape: Sequence[int], target: str, activations: str) -> Path:
    """Quantize a chain to 8 bits; how well is no matter here."""
    out = path.with_name(f"{target}.onnx")
    samples = {"v0": np.random.default_rng(1).standard_normal((8, *shape)).astype(np.float32)}
    comq_onnx.quantize(
        path, out, samples, bits=8, target=target, activations=activations, solver="rtn", uniform=True, device="cpu"
    )
    return out


def products(work: Path) -> Iterator[tuple[str, str, Point]]:
    """Yield the points of matrix products: what a line is for, its form, and one point of it."""
    for rows in ROWS:
        for inputs, outputs in WIDTHS:
            if rows * inputs * outputs > MOST_PRODUCTS:
                continue
            sides = [(inputs, outputs), (outputs, inputs)]
            weights = {f"w{i}": _weight(sides[i % 2], inputs) for i in range(DEPTH)}

            def step(i: int, value: str, made: str) -> list[onnx.NodeProto]:
                return [helper.make_node("MatMul", [value, f"w{i}"], [made])]

            shape = (1, rows, inputs)
            path = work / "float.onnx"
            onnx.save(chain(shape, step, weights), path)
            # what ort-cuda reads is weight-only, and the CPU reads it too
            paths = [path, quantized(path, shape, "ort-cuda", "none"), quantized(path, shape, "ort-cpu", "8")]
            on = [1.0, rows * inputs * outputs, inputs * outputs, rows * (inputs + outputs)]
            for form, found in zip(("float", "weight-only", "integer"), times(paths, shape), strict=True):
                yield "matrix", form, (on, found)


def convolutions(work: Path) -> Iterator[tuple[str, str, Point]]:
    """Yield the points of convolutions with a Relu, as `products` does."""
    for kind, (window, depthwise) in CONVOLUTIONS.items():
        for channels in CHANNELS:
            for size in SIZES:
                inputs = 1 if depthwise else channels
                numbers = channels * size * size
                if numbers > MOST_NUMBERS or numbers * inputs * window**2 > MOST_PRODUCTS:
                    continue
                weights = {
                    f"w{i}": _weight((channels, inputs, window, window), inputs * window**2) for i in range(DEPTH)
                }

                def step(i: int, value: str, made: str) -> list[onnx.NodeProto]:
                    conv = helper.make_node(
                        "Conv", [value, f"w{i}"], [f"{made}.c"], pads=[window // 2] * 4,  # noqa: B023
                        group=channels if depthwise else 1,  # noqa: B023
                    )  # fmt: skip
                    return [conv, helper.make_node("Relu", [f"{made}.c"], [made])]

                shape = (1, channels, size, size)
                path = work / "float.onnx"
                onnx.save(chain(shape, step, weights), path)
                on = [1.0, numbers * inputs * window**2, channels * inputs * window**2, 2 * numbers]
                found = times([path, quantized(path, shape, "ort-cpu", "8")], shape)
                for form, one in zip(("float", "integer"), found, strict=True):
                    yield kind, form, (on, one)


def operators(work: Path) -> Iterator[tuple[str, str, Point]]:
    """Yield the points of other operators and of quantization."""
    for channels in CHANNELS:
        for size in SIZES:
            shape = (1, channels, size, size)
            numbers = float(np.prod(shape))
            if numbers > MOST_NUMBERS:
                continue
            on = [1.0, numbers]
            for op in OPERATORS:

                def plain(_i: int, value: str, made: str) -> list[onnx.NodeProto]:
                    return [helper.make_node(op, [value, "v0"], [made])]  # noqa: B023

                def integer(i: int, value: str, made: str) -> list[onnx.NodeProto]:
                    node = helper.make_node(op, [f"{value}.d", "v0.d"], [made])  # noqa: B023
                    return [*(pair(value) if i == 0 else []), node, *(pair(made) if i < DEPTH - 1 else [])]

                found = times([_saved(work, name, shape, s) for name, s in (("a", plain), ("b", integer))], shape)
                yield op, "float", (on, found[0])
                yield op, "integer", (on, found[1])
            steps: dict[str, Step] = {
                "nothing": lambda _i, value, made: [helper.make_node("Neg", [value], [made])],
                "pair": lambda _i, value, made: [*pair(value), helper.make_node("Neg", [f"{value}.d"], [made])],
            }
            nothing, both = times([_saved(work, name, shape, step) for name, step in steps.items()], shape)
            # each of the two takes about half
            yield "QuantizeLinear", "", (on, max(both - nothing, 0.1) / 2)


def _saved(work: Path, name: str, shape: Sequence[int], step: Step) -> Path:
    path = work / f"{name}.onnx"
    onnx.save(chain(shape, step, GRID), path)
    return path


def _weight(shape: Sequence[int], fan: int) -> np.ndarray:
    return (np.random.default_rng(2).standard_normal(shape) / np.sqrt(fan)).astype(np.float32)


def fit(points: Sequence[Point]) -> tuple[np.ndarray, float]:
    """Return the line through points with the least relative errors, and how far it is off in the median."""
    terms, spent = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    scale = 1 / np.maximum(spent, 1)
    line = nnls(terms * scale[:, None], spent * scale)[0]
    return line, float(np.median(np.abs(terms @ line - spent) / spent))


@click.command(help=__doc__)
def main() -> None:
    """Measure all and print the lines."""
    points: dict[tuple[str, str], list[Point]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for measure in (operators, products, convolutions):
            for what, form, point in measure(Path(folder)):
                points[what, form].append(point)
    click.echo(f"onnxruntime {onnxruntime.__version__}")
    click.echo("| | form | fixed us | ns a product | ns a weight | ns a number | off | sizes |")
    click.echo("|---|---|---|---|---|---|---|---|")
    lines = {name: fit(some) for name, some in points.items()}
    for (what, form), some in points.items():
        line, off = lines[what, form]
        if (what, form) == ("matrix", "integer"):
            # of half of the numbers that a product reads and writes
            fixed, number = lines["QuantizeLinear", ""][0]
            line = line - np.array([fixed, 0, 0, number / 2])
        of_weights = [f"{x * 1e3:.4f}" for x in line[1:3]] if len(line) == 4 else ["", ""]
        cells = [what, form, f"{line[0]:.2f}", *of_weights, f"{line[-1] * 1e3:.4f}", f"{off:.0%}", str(len(some))]
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
