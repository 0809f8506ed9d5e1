"""Compare the weight solvers on whole models, weight-only: activations stay float.

    python tools/zoo/export.py zoo
    python tools/bench/accuracy.py zoo
    python tools/bench/accuracy.py zoo --models minilm --bits 4 --granularity channel --granularity 32 --effort max

All methods take the same walk over the same samples onto the same grid (asymmetric, unless --symmetric); only the
solver differs. Embeddings stay float. Split 0 calibrates on calib.npz and measures on test.npz, split 1 the
other way round, and each further split deals all these samples anew, by a seeded permutation, into parts of the same
sizes. It prints the mean over the splits, and behind it each split's value.

The first table is about the model: SQNR of the worst output, its cosine similarity (the mean over samples), top-1
agreement where an output holds class scores, the mean over layers of the error that the solver reports, and seconds of
solving. The second is about the solvers alone: each layer is solved on the moments of its input in the float model
over the calibration samples, and judged on those over the test samples, || X Wq + shift - X W ||^2 / || X W ||^2 in dB;
means over layers, less is better. There comq may shift every layer's bias by the mean of the error. GPTQ as published
does not; "all shifted" lets every method do so.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numba
import numpy as np
import onnxruntime

from comq_onnx import Options, version
from comq_onnx.calibrate.walk import walk
from comq_onnx.context import Context
from comq_onnx.evaluate.outputs import compare_outputs
from comq_onnx.model.files import private_directory, to_bytes_or_file
from comq_onnx.model.layers import Layer, calibrated
from comq_onnx.model.prepare import prepare_model
from comq_onnx.model.source import read_model
from comq_onnx.plan.activations import plan_activations
from comq_onnx.plan.forms import supported_grid
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.subgraphs import specialize
from comq_onnx.runtime.session import Session
from comq_onnx.samples import padding
from comq_onnx.samples.dataset import Dataset
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Samples
from comq_onnx.solve.effort import EFFORTS
from comq_onnx.solve.grid import Array, Grid
from comq_onnx.solve.layer import METHODS, Method, error_db, solve
from comq_onnx.solve.moments import Moments
from comq_onnx.targets.catalog import TARGETS
from comq_onnx.write.emit import emit_model
from comq_onnx.write.finish import finish

OWN_FOLDER = Path(__file__).parents[2] / "models"
OWN = ("fashion_cnn", "fashion_vit")
ZOO = ("minilm", "efficientnet_lite0", "vit_s_saliency", "squeezenet")
TARGET = TARGETS["ort-cpu"]
# where the solver does not matter
METHOD = Method()
BATCH = 16
Methods = Mapping[str, Method]
Values = dict[str, list[Any]]  # one entry per split

ACCURACY = {
    "SQNR dB": ("sqnr_db", "{:.2f}"),
    "cosine": ("cosine", "{:.4f}"),
    "top-1 agreement": ("agreement", "{:.1%}"),
    "mean layer error dB": ("layer_db", "{:.2f}"),
    "seconds": ("seconds", "{:.1f}"),
}
LAYERS = {
    "held out dB": ("held_out", "{:.2f}"),
    "less GPTQ's": ("difference", "{:+.2f}"),
    "less GPTQ's, all shifted": ("shifted_difference", "{:+.2f}"),
}


@dataclass(frozen=True)
class Subject:
    """Hold a model ready to be quantized.

    plan: of weights alone, without embeddings
    mask: the input that hides padding, if there is one
    """

    name: str
    source: Session
    calib: Samples
    test: Samples
    plan: Plan
    mask: str | None

    def split(self, k: int) -> tuple[Samples, Samples]:
        """Return the samples of split k, to calibrate on and to measure on."""
        if k < 2:
            return (self.calib, self.test) if k == 0 else (self.test, self.calib)
        parts = (self.calib.arrays, self.test.arrays)
        pool = replace(self.calib, arrays={name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
        return pool.split(len(self.calib), len(self.test), seed=k)

    def grids(self, grid: Grid) -> dict[str, Grid]:
        """Return the grid of each layer, by name."""
        return {layer.name: supported_grid(layer, self.plan.form(layer), grid, TARGET) for layer in self.plan.layers}


def find(zoo: Path, name: str) -> tuple[Path, Path, Path]:
    """Return the paths of a model, of its calibration samples and of its test samples."""
    if name in OWN:
        return OWN_FOLDER / f"{name}.onnx", OWN_FOLDER / "fashion_calib.npz", OWN_FOLDER / "fashion_test.npz"
    return zoo / name / "model.onnx", zoo / name / "calib.npz", zoo / name / "test.npz"


def open_subject(name: str, paths: tuple[Path, Path, Path], bits: Sequence[int]) -> Subject:
    """Load a model and its samples, prepare it for weights of `bits`, find its layers and its mask of padding."""
    source = Session(paths[0])
    calib, test = (load_samples(path, source.inputs) for path in paths[1:])
    # blocks, and Casts of packed codes, came with opset 21
    opset = max(21, *(TARGET.weight_only.container(b)[1] for b in bits))
    prepared = prepare_model(read_model(paths[0]), opset, TARGET.min_opset)
    found = specialize(prepared, calib, context_for(METHOD))
    layers = list(calibrated(found.prepared.layers))
    activations = plan_activations(found.prepared.model, [], TARGET, None)
    plan = Plan(
        replace(prepared, layers=layers), replace(found.prepared, layers=layers), found.probes, activations, TARGET
    )
    mask = None if calib.per_item else padding.find_mask(calib.arrays)
    if mask is not None and not padding.is_ignored(source.run, next(calib.batches(BATCH)), mask):
        mask = None
    return Subject(name, source, calib, test, plan, mask)


def context_for(method: Method, independent: bool = False) -> Context:
    """Return what a walk with a solver is asked for."""
    options = Options(
        solver=method.solver, effort=method.effort, batch_size=BATCH, independent=independent, device="cpu"
    )
    return Context.of(options)


def dataset(subject: Subject, calib: Samples, test: Samples) -> Dataset:
    """Return the samples of a walk."""
    return Dataset(calib, test, {}, {}, subject.mask, 16)


# The whole model ------------------------------------------------------------------------------------------------------


def measure(
    subject: Subject, grids: Mapping[str, Grid], method: Method, calib: Samples, test: Samples
) -> dict[str, Any]:
    """Quantize with `method` on `calib`, compare with the float model on `test`."""
    context = context_for(method)
    found = walk(replace(subject.plan, grids=grids), dataset(subject, calib, test), context)
    with private_directory() as work:
        model = to_bytes_or_file(finish(emit_model(found), {}, frozenset()).model, work, "quantized")
        quantized = Session(model, float_matmul_nbits=True)
        outputs = compare_outputs(subject.source, quantized, test, BATCH)
        worst = min(outputs, key=lambda o: o.sqnr_db)
        cosine = mean_cosine(subject.source, quantized, worst.name, test)
    return {
        "sqnr_db": worst.sqnr_db,
        "cosine": cosine,
        "agreement": min((o.top1_agreement for o in outputs if o.top1_agreement is not None), default=None),
        "layer_db": float(np.mean([error_db(s.error) for s in found.solutions.values()])),
        "seconds": context.journal.seconds["solve"],
    }


def mean_cosine(before: Session, after: Session, output: str, samples: Samples) -> float:
    """Compute the mean over samples of the cosine similarity of one output of two models, flattened."""
    found: list[float] = []
    for count, feeds in zip(samples.batch_counts(BATCH), samples.batches(BATCH), strict=True):
        a, b = (s.run(feeds, [output])[output].astype(np.float64).reshape(count, -1) for s in (before, after))
        length = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        found += list((a * b).sum(axis=1) / np.maximum(length, np.finfo(np.float64).tiny))
    return float(np.mean(found))


def warm_up(methods: Methods) -> None:
    """Let every method solve two small models, so that no row's seconds hold the compilation of kernels."""
    for name in OWN:
        subject = open_subject(name, find(OWN_FOLDER, name), bits=[4])
        grids, few = subject.grids(Grid(4)), subject.calib.take(range(BATCH))
        for method in methods.values():
            measure(subject, grids, method, few, few)


# Layers alone, held out -----------------------------------------------------------------------------------------------


def rows_of(layer: Layer) -> tuple[object, ...]:
    """Return what the rows of a layer's input depend on."""
    return layer.input, layer.kind.rows_key()


def moments(subject: Subject, samples: Samples) -> dict[tuple[object, ...], Moments]:
    """Gather the moments of the layers' inputs in the float model, by `rows_of`, in a walk."""
    # one layer for each input: those that read the same rows, or share a weight, are not solved one by one
    weights = {layer.weight: layer for layer in reversed(subject.plan.layers)}
    readers = {rows_of(layer): layer for layer in weights.values()}
    layers = [x for x in subject.plan.layers if x in readers.values()]
    plan = replace(
        subject.plan,
        written=replace(subject.plan.written, layers=layers),
        walked=replace(subject.plan.walked, layers=layers),
        grids={layer.name: Grid(8) for layer in layers},
    )

    def keep(together: Sequence[Layer], _weights: Sequence[Array], seen: Moments, _bias: bool) -> dict[str, Moments]:
        return {layer.name: seen for layer in together}

    found = walk(plan, dataset(subject, samples, samples), context_for(Method("rtn"), independent=True), keep)
    return {rows_of(layer): found.observed[layer.name] for layer in layers if layer.name in found.observed}


def judge_layers(
    subject: Subject, combinations: Mapping[tuple[int, str], Grid], methods: Methods, calib: Samples, test: Samples
) -> dict[tuple[int, str, str], dict[str, float]]:
    """Compute for each grid and method the held-out objective and its difference to GPTQ's, as means over layers."""
    known, unknown = moments(subject, calib), moments(subject, test)
    layers = [layer for layer in subject.plan.layers if rows_of(layer) in known]
    found = {}
    for (bits, granularity), grid in combinations.items():
        grids = subject.grids(grid)

        def judged(method: Method, grids: Mapping[str, Grid] = grids) -> np.ndarray[Any, Any]:
            pairs = [(layer, subject.plan.written.weight(layer), rows_of(layer)) for layer in layers]
            return np.array([held_out(w, known[r], unknown[r], grids[x.name], method) for x, w, r in pairs])

        gptq = judged(Method("gptq"))
        for label, method in methods.items():
            own = gptq if label == "gptq" else judged(method)
            difference = (own - gptq).mean(axis=0)
            found[bits, granularity, label] = {
                "held_out": float(own[:, 0].mean()),
                "difference": float(difference[0]),
                "shifted_difference": float(difference[1]),
            }
    return found


def held_out(weight: Array, known: Moments, unknown: Moments, grid: Grid, method: Method) -> tuple[float, float]:
    """Solve on the moments `known` and judge on `unknown`.

    Returns the objective in dB with the method's own shift, and with a shift by the mean of the error.
    """
    solution = solve(weight, known, grid, method, has_bias=True)
    w = weight.astype(np.float64)
    d = w - solution.weight.dequantize()
    mean = np.einsum("gmn,gn->gm", d, unknown.mean)
    energy, error = (float(np.einsum("gmn,gmn->", rows @ unknown.gram, rows)) for rows in (w, d))
    energy = max(energy, np.finfo(np.float64).tiny)

    def with_shift(shift: Any) -> float:
        return error_db((error + float((shift * (shift - 2 * mean)).sum())) / energy)

    own = 0 if solution.shift is None else solution.shift
    return with_shift(own), with_shift(np.einsum("gmn,gn->gm", d, known.mean))


# Tables ---------------------------------------------------------------------------------------------------------------


def head(first: Sequence[str], columns: Mapping[str, Any]) -> str:
    """Format the head of a Markdown table."""
    names = [*first, *columns]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def row(first: Sequence[object], values: Values, columns: Mapping[str, tuple[str, str]]) -> str:
    """Format one line of a Markdown table."""
    cells = [cell(values[key], form) for key, form in columns.values()]
    return f"| {' | '.join([*map(str, first), *cells])} |"


def cell(values: Sequence[Any], form: str) -> str:
    """Format the mean of the values, and in brackets each of them."""
    if any(v is None for v in values):
        return ""
    mean = form.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ({' '.join(form.format(v) for v in values)})"


def gather(singles: Sequence[Mapping[str, Any]]) -> Values:
    """Turn a list of dictionaries into a dictionary of lists."""
    return {key: [one[key] for one in singles] for key in singles[0]}


def subjects(zoo: Path, names: Sequence[str], bits: Sequence[int]) -> Iterator[Subject]:
    """Open the models one after the other; what is missing is named."""
    for name in names:
        paths = find(zoo, name)
        missing = [path for path in paths if not path.is_file()]
        if missing:
            click.echo(f"{name}: skipped, there is no {missing[0]}", err=True)
            continue
        yield open_subject(name, paths, bits)


def about(symmetric: bool, splits: int) -> str:
    """Describe what a table was made with."""
    return (
        f"comq-onnx {version()}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {os.cpu_count()} cores, {numba.get_num_threads()} solver thread(s); "
        f"{'symmetric' if symmetric else 'asymmetric'} weights, float activations; {splits} split(s) of the samples"
    )


def choose_methods(names: Sequence[str], efforts: Sequence[str]) -> dict[str, Method]:
    """Return the methods by label; comq once for each effort."""
    chosen: dict[str, Method] = {}
    for name in names:
        chosen |= {f"comq {e}": Method("comq", e) for e in efforts} if name == "comq" else {name: Method(name)}
    return chosen


def possible(subject: Subject, asked: Mapping[tuple[int, str], Grid]) -> dict[tuple[int, str], Grid]:
    """Select the grids that some layer of a model can have; the others are named."""
    combinations = {}
    for (bits, granularity), grid in asked.items():
        if grid.block_size and not any(one.block_size for one in subject.grids(grid).values()):
            click.echo(f"{subject.name}: no layer can have scales per block of {granularity}, skipped", err=True)
            continue
        combinations[bits, granularity] = grid
    return combinations


@click.command()
@click.argument("zoo", type=click.Path(file_okay=False, path_type=Path))
@click.option("--models", multiple=True, default=(*ZOO, *OWN), show_default=True)
@click.option("--bits", multiple=True, type=click.IntRange(2, 8), default=(8, 4, 3, 2), show_default=True)
@click.option(
    "--granularity", multiple=True, default=("channel",), show_default=True, help="channel, tensor, or BLOCK."
)
@click.option("--methods", multiple=True, type=click.Choice(METHODS), default=METHODS[::-1], show_default=True)
@click.option("--effort", multiple=True, type=click.Choice([*EFFORTS]), default=("default",), show_default=True)
@click.option("--splits", type=click.IntRange(1), default=3, show_default=True)
@click.option("--symmetric", is_flag=True, help="Weights with zero point 0.")
@click.option("--layers/--no-layers", default=True, show_default=True, help="Whether to make the second table.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write both tables as JSON.")
def main(
    zoo: Path, models: tuple[str, ...], bits: tuple[int, ...], granularity: tuple[str, ...], methods: tuple[str, ...],
    effort: tuple[str, ...], splits: int, symmetric: bool, layers: bool, json_path: Path | None,
) -> None:  # fmt: skip
    """Compare weight solvers on models of ZOO and of the repository; embeddings and activations stay float."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    chosen = choose_methods(methods, effort)
    asked = {(b, g): Options(bits=b, granularity=g, symmetric=symmetric).grid(b) for b in bits for g in granularity}
    said: dict[str, Any] = {"about": about(symmetric, splits), "accuracy": [], "layers": []}
    first = ["model", "samples", "bits", "granularity", "method"]
    click.echo(f"{said['about']}\n\n{head(first, ACCURACY)}")

    def tell(table: str, keys: Sequence[object], values: Values) -> None:
        said[table].append(dict(zip(first, keys, strict=True)) | values)
        if json_path:
            json_path.write_text(json.dumps(said, indent=2) + "\n")

    warm_up(chosen)
    second = []
    for subject in subjects(zoo, models, bits):
        samples = f"{len(subject.calib)} + {len(subject.test)}"
        combinations = possible(subject, asked)
        for (b, g), grid in combinations.items():
            grids = subject.grids(grid)
            for label, method in chosen.items():
                keys = (subject.name, samples, b, g, label)
                values = gather([measure(subject, grids, method, *subject.split(k)) for k in range(splits)])
                click.echo(row(keys, values, ACCURACY))
                tell("accuracy", keys, values)
        if layers:
            judged = [judge_layers(subject, combinations, chosen, *subject.split(k)) for k in range(splits)]
            for b, g, label in judged[0]:
                keys = (subject.name, samples, b, g, label)
                values = gather([one[b, g, label] for one in judged])
                second.append(row(keys, values, LAYERS))
                tell("layers", keys, values)
    if second:
        click.echo("\n".join(["", head(first, LAYERS), *second]))


if __name__ == "__main__":
    main()
