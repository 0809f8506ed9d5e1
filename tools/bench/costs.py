"""Measure what operators take in ONNX Runtime on one thread, and print the lines of comq_onnx/targets/costs.py.

    python tools/bench/costs.py
    python tools/bench/costs.py --web build/web

The second measures onnxruntime-web under Node, as web.py beside this runs it.

Every operator runs in chains of eight, of many sizes, in float, in integers, and weight-only where there is a kernel
for that. The time of one is an eighth of that of the chain: the low quintile of its runs, which alternate with those of
the other forms. A line is the least squares fit of relative errors with no negative part; the last columns say how far
it is off in the median, and how many sizes it is drawn through. The quantization of the input is taken out of the
products in integers. Pools in integers and changes of layout are what a chain of convolutions takes more with them
between; their lines for ONNX Runtime on the CPU, and that of Concat, come from profiles of real models instead.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
from _web import VERSION, Wasm, install
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import nnls

import comq_onnx

DEPTH, SECONDS = 8, 0.1
# the most multiplications and numbers of one operator, here and in WebAssembly, which takes about four times as long
MOST_PRODUCTS, MOST_NUMBERS = 1.2e8, 1e6
MOST_IN_WASM = 3e7
ROWS = (1, 4, 16, 64, 256)
WIDTHS = (
    (32, 32), (64, 64), (64, 256), (128, 128), (128, 512), (256, 256), (256, 1024), (512, 512), (768, 768),
    (1024, 1024),
)  # fmt: skip
CHANNELS, SIZES = (16, 32, 64, 128, 256), (4, 7, 14, 28, 56)
CONVOLUTIONS = {"pointwise": (1, False), "window": (3, False), "depthwise": (3, True)}
# operators of a value and the input of the chain, and of a value alone
WITH_INPUT = {"Add": {}, "Mul": {}, "Concat": {"axis": 1}}
WINDOW = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
ALONE = {"Sigmoid": {}, "LeakyRelu": {}}
# in integers between convolutions, whose layout they take
POOLS = {"AveragePool": WINDOW, "MaxPool": WINDOW}
# with an Add of the input of the chain behind it, which is taken out
POOL = "GlobalAveragePool"
# the opset of the chains
OPSET = 17
Step = Callable[[int, str, str], Sequence[onnx.NodeProto]]
# what the time of an operator depends on, its microseconds, and the time that errors are relative to
Point = tuple[list[float], float, float]


@dataclass(frozen=True)
class Clock:
    """Measure the microseconds of one operator of each chain, for an input of a shape.

    most: multiplications of one operator, at most
    packed: whether there is a kernel for weight-only products that is worth measuring
    """

    measure: Callable[[Sequence[Path], Sequence[int]], list[float]]
    most: float
    packed: bool

    def __call__(self, paths: Sequence[Path], shape: Sequence[int]) -> list[float]:
        """Measure chains, whose runs alternate."""
        return self.measure(paths, shape)


def chain(shape: Sequence[int], step: Step, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Build x -> step -> ... -> y; step: makes the nodes from one value to the next."""
    nodes = [node for i in range(DEPTH) for node in step(i, f"v{i}", f"v{i + 1}")]
    nodes[0].input[0] = "v0"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("v0", shape), (f"v{DEPTH}", None))]
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


def here(paths: Sequence[Path], shape: Sequence[int]) -> list[float]:
    """Measure with ONNX Runtime in this process."""
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


def in_wasm(wasm: Wasm) -> Clock:
    """Return what measures with onnxruntime-web."""

    def measure(paths: Sequence[Path], shape: Sequence[int]) -> list[float]:
        feeds = {"v0": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        found = wasm.run([(paths, feeds)], SECONDS)[0]
        if failed := [ran.error for ran in found if ran.error]:
            raise click.ClickException(failed[0])
        return [float(np.quantile(ran.times_ms, 0.2)) * 1e3 / DEPTH for ran in found]

    return Clock(measure, MOST_IN_WASM, packed=False)


def quantized(path: Path, shape: Sequence[int], target: str, activations: str) -> Path:
    """Quantize a chain to 8 bits; how well is no matter here."""
    out = path.with_name(f"{target}.onnx")
    samples = {"v0": np.random.default_rng(1).standard_normal((8, *shape)).astype(np.float32)}
    comq_onnx.quantize(
        path, out, samples, bits=8, target=target, activations=activations, solver="rtn", uniform=True, device="cpu"
    )
    return out


def products(work: Path, times: Clock) -> Iterator[tuple[str, str, Point]]:
    """Yield the points of matrix products: what a line is for, its form, and one point of it."""
    for rows in ROWS:
        for inputs, outputs in WIDTHS:
            if rows * inputs * outputs > times.most:
                continue
            sides = [(inputs, outputs), (outputs, inputs)]
            weights = {f"w{i}": _weight(sides[i % 2], inputs) for i in range(DEPTH)}

            def step(i: int, value: str, made: str) -> list[onnx.NodeProto]:
                return [helper.make_node("MatMul", [value, f"w{i}"], [made])]

            shape = (1, rows, inputs)
            path = work / "float.onnx"
            onnx.save(chain(shape, step, weights), path)
            # what ort-cuda reads is weight-only, and the CPU reads it too
            packed = [quantized(path, shape, "ort-cuda", "none")] if times.packed else []
            paths = [path, quantized(path, shape, "ort-cpu", "8"), *packed]
            on = [1.0, rows * inputs * outputs, inputs * outputs, rows * (inputs + outputs)]
            for form, found in zip(("float", "integer", "weight-only"), times(paths, shape), strict=times.packed):
                yield "matrix", form, (on, found, found)


def convolutions(work: Path, times: Clock) -> Iterator[tuple[str, str, Point]]:
    """Yield the points of convolutions with a Relu, as `products` does."""
    for kind, (window, depthwise) in CONVOLUTIONS.items():
        for channels in CHANNELS:
            for size in SIZES:
                inputs = 1 if depthwise else channels
                numbers = channels * size * size
                if numbers > MOST_NUMBERS or numbers * inputs * window**2 > times.most:
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
                    yield kind, form, (on, one, one)


def image_shapes() -> Iterator[tuple[int, int, int, int]]:
    """Yield the shapes on which operators are timed: of all channels and sizes, those that are not too large."""
    for channels in CHANNELS:
        for size in SIZES:
            if channels * size**2 <= MOST_NUMBERS / 4:
                yield 1, channels, size, size


def operators(work: Path, times: Clock) -> Iterator[tuple[str, str, Point]]:
    """Yield the points of other operators and of quantization."""
    for shape in image_shapes():
        added: dict[str, float] = {}
        for op in (*WITH_INPUT, *ALONE, POOL):
            # the mean of a chain whose values grow
            numbers = float(np.prod(shape)) * ((DEPTH + 3) / 2 if op == "Concat" else 1)
            paths = [_saved(work, name, shape, step) for name, step in zip("ab", _steps(op), strict=True)]
            for form, found in zip(("float", "integer"), times(paths, shape), strict=True):
                added.setdefault(form, found)  # that of Add, the first of them
                yield op, form, ([1.0, numbers], found - added[form] if op == POOL else found, found)
        steps: dict[str, Step] = {
            "nothing": lambda _i, value, made: [helper.make_node("Neg", [value], [made])],
            "pair": lambda _i, value, made: [*pair(value), helper.make_node("Neg", [f"{value}.d"], [made])],
        }
        nothing, both = times([_saved(work, name, shape, step) for name, step in steps.items()], shape)
        # each of the two takes about half
        on = [1.0, float(np.prod(shape))]
        yield "QuantizeLinear", "", (on, (both - nothing) / 2, both)
        alone, together = _between(work, times, shape, "Neg")
        yield "layout", "", (on, (alone - together - both) / 2, alone)


def pools(work: Path, times: Clock) -> Iterator[tuple[str, str, Point]]:
    """Yield the points of pools, which take the layout of the convolutions beside them."""
    for shape in image_shapes():
        on = [1.0, float(np.prod(shape))]
        for op in POOLS:
            found = times([_saved(work, "a", shape, _steps(op)[0])], shape)[0]
            yield op, "float", (on, found, found)
            alone, together = _between(work, times, shape, op)
            yield op, "integer", (on, alone - together, alone)


def _steps(op: str) -> tuple[Step, Step]:
    """Return the steps of an operator in float and in integers."""
    attributes, further = (WITH_INPUT | ALONE | POOLS).get(op, {}), ["v0"] if op in WITH_INPUT else []

    def plain(_i: int, value: str, made: str) -> list[onnx.NodeProto]:
        if op == POOL:
            return [
                helper.make_node(POOL, [value], [f"{made}.g"]),
                helper.make_node("Add", [f"{made}.g", "v0"], [made]),
            ]
        return [helper.make_node(op, [value, *further], [made], **attributes)]

    def integer(i: int, value: str, made: str) -> list[onnx.NodeProto]:
        first, last = pair(value) if i == 0 else [], pair(made) if i < DEPTH - 1 else []
        if op == POOL:
            pool = helper.make_node(POOL, [f"{value}.d"], [f"{made}.g"])
            return [*first, pool, *pair(f"{made}.g"), helper.make_node("Add", [f"{made}.g.d", "v0.d"], [made]), *last]
        node = helper.make_node(op, [f"{value}.d", *(f"{v}.d" for v in further)], [made], **attributes)
        return [*first, node, *last]

    return plain, integer


def _between(work: Path, times: Clock, shape: Sequence[int], op: str) -> tuple[float, float]:
    """Return what convolutions in integers take with an operator between them, and without one."""
    channels = shape[1]
    weights = {f"w{i}": _weight((channels, channels, 1, 1), channels) for i in range(DEPTH)}

    def joined(i: int, value: str, made: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Conv", [value, f"w{i}"], [f"{made}.c"]), helper.make_node("Relu", [f"{made}.c"], [made])
        ]  # fmt: skip

    def apart(i: int, value: str, made: str) -> list[onnx.NodeProto]:
        return [*joined(i, value, f"{made}.r"), helper.make_node(op, [f"{made}.r"], [made], **POOLS.get(op, {}))]

    paths = []
    for name, step in (("joined", joined), ("apart", apart)):
        path = work / f"{name}.onnx"
        onnx.save(chain(shape, step, weights), path)
        paths.append(quantized(path, shape, "ort-cpu", "8").rename(work / f"{name}_q.onnx"))
    together, alone = times(paths, shape)
    return alone, together


def _saved(work: Path, name: str, shape: Sequence[int], step: Step) -> Path:
    path = work / f"{name}.onnx"
    onnx.save(chain(shape, step, GRID), path)
    return path


def _weight(shape: Sequence[int], fan: int) -> np.ndarray:
    return (np.random.default_rng(2).standard_normal(shape) / np.sqrt(fan)).astype(np.float32)


def fit(points: Sequence[Point]) -> tuple[np.ndarray, float]:
    """Return the line through points with the least relative errors, and how far it is off in the median."""
    terms, spent = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    scale = 1 / np.maximum([p[2] for p in points], 1)
    line = nnls(terms * scale[:, None], spent * scale)[0]
    return line, float(np.median(np.abs(terms @ line - spent) * scale))


MEASURED = {"operators": operators, "pools": pools, "products": products, "convolutions": convolutions}


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(MEASURED)), help="Measure these")
@click.option("--web", type=click.Path(file_okay=False, path_type=Path),
              help="Measure onnxruntime-web under Node; npm installs it into this folder.")  # fmt: skip
def main(only: tuple[str, ...], web: Path | None) -> None:
    """Measure all and print the lines."""
    points: dict[tuple[str, str], list[Point]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, Wasm(install(web)) if web else nullcontext() as wasm:
        times = in_wasm(wasm) if wasm else Clock(here, MOST_PRODUCTS, packed=True)
        for measure in (MEASURED[name] for name in only or MEASURED):
            for what, form, point in measure(Path(folder), times):
                points[what, form].append(point)
    click.echo(f"onnxruntime-web {VERSION}" if web else f"onnxruntime {onnxruntime.__version__}")
    click.echo("| | form | fixed us | ns a product | ns a weight | ns a number | off | sizes |")
    click.echo("|---|---|---|---|---|---|---|---|")
    lines = {name: fit(some) for name, some in points.items()}
    for (what, form), some in points.items():
        line, off = lines[what, form]
        if (what, form) == ("matrix", "integer") and ("QuantizeLinear", "") in lines:
            # of half of the numbers that a product reads and writes
            fixed, number = lines["QuantizeLinear", ""][0]
            line = line - np.array([fixed, 0, 0, number / 2])
        of_weights = [f"{x * 1e3:.4f}" for x in line[1:3]] if len(line) == 4 else ["", ""]
        cells = [what, form, f"{line[0]:.2f}", *of_weights, f"{line[-1] * 1e3:.4f}", f"{off:.0%}", str(len(some))]
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
