"""Put the `onnx` package's own backend tests through comq-onnx at 8 bits, and account for every one.

    python tools/check/backend_tests.py [--only REGEX] [--json FILE]

Each test is a model with inputs and the outputs that the ONNX standard expects. It goes through the command line in
three forms:

- as is: as the package has it. Most are one operator without a weight.
- weights inside: where a layer's weight is an input of the graph it becomes a constant, and a layer may have as few
  weights as it likes, so that every Conv, ConvTranspose, Gemm, MatMul and Gather of the tests is quantized.
- before a layer: what the test gives is also read by a MatMul of 8-bit weights (beside one, where it gives no numbers),
  so that every operator passes through folding, opset conversion, the walk and emission.

Outcomes: quantized (every output of the model written is what the test expects: to 25 dB SQNR where a quantized layer
lies before it, else to the test's own tolerance), refused (one line, nothing written), and what must not be: wrong,
crash, hang. Where ONNX Runtime's own result is not what the test expects, its result is what is expected here.
Exits with 1 if anything was wrong, crashed or hung.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from _sandbox import Outcome, Said, command_line, each, quickly, snapshot, table
from onnx import helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

from comq_onnx.metrics import sqnr_of
from comq_onnx.model import layers
from comq_onnx.runtime.session import Session

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "real")
FORMS = ("as is", "weights inside", "before a layer")
# one layer of 8-bit weights and activations keeps some 40 dB, a few in a row lose up to 10
FLOOR_DB = 25.0
COPIES = 4
MOST_FEATURES = 4096
# the index of the weight of a layer, and of what may be constant beside it
WEIGHTS = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (1, 2), "MatMul": (1,), "Gather": (0,)}
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
# operators that draw random numbers: nothing can be expected of their outputs
RANDOM = frozenset(
    {"Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"}
)


@dataclass(frozen=True)
class Job:
    """Hold one test in one form: the name, the model's bytes, inputs by name, expected outputs by name."""

    name: str
    form: str
    model: bytes
    feeds: dict[str, Any]
    expected: dict[str, Any]
    rtol: float
    atol: float


@dataclass(frozen=True)
class Result:
    """Hold the result of a test: quantized, refused, wrong or crash, and the reason or the figures."""

    kind: str
    detail: str
    layers: int = 0
    runtime_differs: bool = False


def jobs(only: str | None, forms: Sequence[str]) -> Iterator[Job]:
    """Yield every test in every form that it has."""
    for kind in KINDS:
        with warnings.catch_warnings():
            # the reference outputs of some tests overflow on purpose
            warnings.simplefilter("ignore")
            cases = load_model_tests(kind=kind)
        for case in cases:
            if only and not re.search(only, f"{kind}/{case.name}"):
                continue
            model, inputs, outputs = _read(case)
            name = f"{kind}/{case.name}"
            for form, changed, feeds in _forms(model, inputs, outputs, forms):
                expected = dict(zip((o.name for o in model.graph.output), outputs, strict=False))
                yield Job(name, form, changed.SerializeToString(), feeds, expected, case.rtol, case.atol)


def _read(case: Any) -> tuple[onnx.ModelProto, list[Any], list[Any]]:
    """Read the model of a test, and its first set of inputs and expected outputs."""
    if case.model is not None:
        inputs, outputs = case.data_sets[0]
        return case.model, [_array(v) for v in inputs], [_array(v) for v in outputs]
    if case.model_dir is not None:
        folder = Path(case.model_dir)
        model = onnx.load(folder / "model.onnx")
        data = folder / "test_data_set_0"
        return model, *(_numbered(data, kind) for kind in ("input", "output"))
    # as the package's own runner feeds the models whose weights were left out
    path = LIGHT / Path(case.url).name
    model = onnx.load(path)
    constants = {i.name for i in model.graph.initializer}
    shapes = [
        [d.dim_value or 1 for d in i.type.tensor_type.shape.dim] for i in model.graph.input if i.name not in constants
    ]
    inputs = [(np.arange(np.prod(s)).reshape(s) / np.prod(s)).astype(np.float32) for s in shapes]
    return model, inputs, [_tensor(path.with_name(f"{path.stem}_output_0.pb"))]


def _array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _numbered(folder: Path, kind: str) -> list[Any]:
    files = sorted(folder.glob(f"{kind}_*.pb"), key=lambda p: int(p.stem.rpartition("_")[2]))
    return [_tensor(file) for file in files]


def _tensor(path: Path) -> Any:
    """Read the tensor in a file; None where the file holds something else."""
    try:
        return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))
    except (ValueError, TypeError, onnx.onnx_cpp2py_export.checker.ValidationError):
        return None


def _forms(
    model: onnx.ModelProto, inputs: list[Any], outputs: list[Any], forms: Sequence[str]
) -> Iterator[tuple[str, onnx.ModelProto, dict[str, Any]]]:
    constants = {i.name for i in model.graph.initializer}
    free = [i.name for i in model.graph.input if i.name not in constants]
    # some sets give the initializers as inputs too
    names = free if len(inputs) <= len(free) else [i.name for i in model.graph.input]
    feeds = {n: v for n, v in zip(names, inputs, strict=False) if n in free and v is not None}
    if FORMS[0] in forms:
        yield FORMS[0], model, feeds
    if FORMS[1] in forms and (found := weights_inside(model, feeds)) is not None:
        yield FORMS[1], *found
    if FORMS[2] in forms:
        yield FORMS[2], *before_a_layer(model, feeds, outputs)


def weights_inside(model: onnx.ModelProto, feeds: dict[str, Any]) -> tuple[onnx.ModelProto, dict[str, Any]] | None:
    """Turn the inputs that are a layer's weight or bias into constants.

    Returns the model and the other inputs; None where there is no such input, or no other one.
    """
    inside = {
        node.input[i]
        for node in model.graph.node
        for i in WEIGHTS.get(node.op_type, ())
        if node.domain in ("", "ai.onnx") and len(node.input) > i and isinstance(feeds.get(node.input[i]), np.ndarray)
    }
    if not inside or inside >= set(feeds):
        return None
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    kept = [i for i in changed.graph.input if i.name not in inside]
    del changed.graph.input[:]
    changed.graph.input.extend(kept)
    changed.graph.initializer.extend(numpy_helper.from_array(feeds[name], name) for name in sorted(inside))
    return changed, {n: v for n, v in feeds.items() if n not in inside}


def before_a_layer(
    model: onnx.ModelProto, feeds: dict[str, Any], outputs: list[Any]
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Add a MatMul behind each output that holds numbers; where none does, one beside them with an input of its own.

    Returns the model and its inputs.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph, rng = changed.graph, np.random.default_rng(0)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if opset is None:
        opset = 17
        changed.opset_import.append(helper.make_opsetid("", opset))

    def layer(source: str, features: int, name: str) -> None:
        width = max(16, -(-layers.MIN_WEIGHTS // features))
        weight = rng.standard_normal((features, width)).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(weight, f"{name}.weight"))
        graph.node.append(helper.make_node("MatMul", [source, f"{name}.weight"], [name], name))
        graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, width]))

    added = 0
    for value, array in zip(model.graph.output, outputs, strict=False):
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or not 0 < array.size <= MOST_FEATURES:
            continue
        if opset < 6:
            continue
        name = f"comq_{added}"
        graph.initializer.append(numpy_helper.from_array(np.array([1, array.size]), f"{name}.shape"))
        graph.node.append(helper.make_node("Cast", [value.name], [f"{name}.float"], f"{name}.cast", to=1))
        graph.node.append(helper.make_node("Reshape", [f"{name}.float", f"{name}.shape"], [f"{name}.flat"]))
        layer(f"{name}.flat", array.size, name)
        added += 1
    if added:
        return changed, feeds
    graph.input.append(helper.make_tensor_value_info("comq_x", onnx.TensorProto.FLOAT, [1, 16]))
    layer("comq_x", 16, "comq_0")
    return changed, {**feeds, "comq_x": rng.standard_normal((1, 16)).astype(np.float32)}


def check(job: Job) -> Result:
    """Put one test through the command line and compare what came out."""
    layers.MIN_WEIGHTS = 1 if job.form == "weights inside" else 128
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        source, out = folder / "model.onnx", folder / "q.onnx"
        source.write_bytes(job.model)
        samples = _save_samples(folder, job)
        before = snapshot(folder)
        report = folder / "report.json"
        said = command_line(source, "-o", out, "--bits", 8, "--device", "cpu", "--json", report, *samples)
        after = snapshot(folder)
        written, told = after.pop("q.onnx", None), after.pop("report.json", b"{}")
        if after != before:
            return Result("crash", f"files changed: {sorted(set(before) ^ set(after))}")
        if said.refused:
            return Result("refused", reason(said)) if written is None else Result("crash", "refused, but wrote")
        if said.code or said.err or written is None:
            return Result("crash", f"exit code {said.code}: {said.err[-1500:]}")
        return compare(job, source, out, [layer["name"] for layer in json.loads(told)["layers"]])


def _save_samples(folder: Path, job: Job) -> list[object]:
    """Store the inputs several times over, as complete tensors, and return the options that name them.

    There are no options where the inputs cannot be stored as samples.
    """
    if not job.feeds or not all(isinstance(v, np.ndarray) for v in job.feeds.values()):
        return []
    arrays = {name: np.stack([v] * COPIES) for name, v in job.feeds.items()}
    if any(a.dtype.kind == "O" for a in arrays.values()):
        arrays = {n: a.astype(str) if a.dtype.kind == "O" else a for n, a in arrays.items()}
    if any(a.dtype.kind not in "fiubUS" for a in arrays.values()):
        return []
    np.savez(folder / "samples.npz", **arrays)
    return ["--calib", folder / "samples.npz"]


def compare(job: Job, source: Path, out: Path, quantized: list[str]) -> Result:
    """Compare the outputs of the model at `out`, whose layers `quantized` are quantized, with the expected ones."""
    onnx.checker.check_model(str(out))
    layers = len(quantized)
    if any(node.op_type in RANDOM for node in onnx.load(source).graph.node) or "Dropout" in job.name:
        return Result("quantized", "random", layers)
    feeds = {n: v.astype(object) if v.dtype.kind in "US" else v for n, v in job.feeds.items()}
    before, after = Session(source).run(feeds), Session(out).run(feeds)
    differs = any(not _close(before[n], v, job) for n, v in job.expected.items() if n in before)
    worst = 200.0
    # behind nothing but float operators the outputs are what they were
    float_only = all(name.startswith("comq_") for name in quantized)
    for name, wanted in before.items():
        exact = float_only and not name.startswith("comq_")
        if exact and not _close(after[name], wanted, job):
            return Result("wrong", f"output {name!r}: {_brief(after[name])}, not {_brief(wanted)}", layers, differs)
        if not exact:
            worst = min(worst, sqnr_of({name: wanted}, {name: after[name]}))
    if worst < FLOOR_DB:
        return Result("wrong", f"SQNR {worst:.1f} dB", layers, differs)
    return Result("quantized", f"SQNR {worst:.1f} dB", layers, differs)


def _close(got: Any, wanted: Any, job: Job) -> bool:
    """Tell whether an output is what a test expects, to its tolerance."""
    if not isinstance(wanted, np.ndarray) or not isinstance(got, np.ndarray):
        return isinstance(wanted, np.ndarray) == isinstance(got, np.ndarray) or wanted is None
    if got.shape != wanted.shape or got.dtype.kind != wanted.dtype.kind:
        return got.dtype.kind in "OUS" and wanted.dtype.kind in "OUS"
    if got.dtype.kind != "f":
        return bool(np.array_equal(got, wanted))
    return bool(np.allclose(got, wanted, rtol=job.rtol, atol=max(job.atol, 1e-5), equal_nan=True))


def _brief(value: Any) -> str:
    return np.array2string(np.asarray(value).ravel()[:4], precision=4) if isinstance(value, np.ndarray) else str(value)


def reason(said: Said) -> str:
    """Return the error line of a refusal without the paths of the test."""
    line = said.err.strip().removeprefix("comq-onnx: ")
    return re.sub(r"\S*/model\.onnx", "MODEL", re.sub(r"\S*/samples\.npz", "SAMPLES", line))


def kind_of(line: str) -> str:
    """Return the group of a refusal in the table."""
    for words, what in (
        ("no layer to quantize", "no layer to quantize"),
        ("already quantized", "already quantized"),
        ("which samples cannot be made for", "an input of a type that samples cannot have"),
        ("ONNX Runtime", "ONNX Runtime cannot load or run it"),
        ("NaN or Inf", "NaN or Inf in samples or activations"),
        ("synthetic", "the model cannot run on synthetic samples"),
    ):
        if words in line:
            return what
    return re.sub(r"'[^']*'|\d+", "…", line)[:90]


@click.command()
@click.option("--only", metavar="RE", help="Only the tests whose kind/name matches.")
@click.option("--form", "forms", multiple=True, type=click.Choice(FORMS), default=FORMS, help="Only these forms.")
@click.option("--seconds", default=120.0, show_default=True, help="What a test may take before it counts as a hang.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every outcome as JSON.")
def main(only: str | None, forms: tuple[str, ...], seconds: float, json_path: Path | None) -> None:
    """Run the backend tests of the onnx package through comq-onnx."""
    quickly()
    click.echo(
        f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, {platform.machine()}, "
        f"Python {platform.python_version()}"
    )
    found: list[tuple[Job, Result]] = []
    for job, outcome in each(jobs(only, forms), check, seconds):
        result = _result(outcome)
        found.append((job, result))
        if result.kind not in ("quantized", "refused"):
            click.echo(f"{result.kind}: {job.name} ({job.form}): {result.detail}", err=True)
    _print(found, forms)
    if json_path:
        rows = [{"test": j.name, "form": j.form, "outcome": r.kind, "detail": r.detail} for j, r in found]
        json_path.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(r.kind not in ("quantized", "refused") for _, r in found) or not found)


def _result(outcome: Outcome) -> Result:
    if outcome.kind == "done":
        return outcome.value
    return Result(outcome.kind, str(outcome.value)[-1500:])


def _print(found: list[tuple[Job, Result]], forms: Sequence[str]) -> None:
    kinds = ("quantized", "refused", "wrong", "crash", "hang")
    counts = {form: Counter(r.kind for j, r in found if j.form == form) for form in forms}
    rows = [(form, counts[form].total(), *(counts[form][k] for k in kinds)) for form in forms]
    click.echo(table(("form", "tests", *kinds), rows))
    refusals = Counter(kind_of(r.detail) for _, r in found if r.kind == "refused")
    click.echo("\n" + table(("refused because", "tests"), refusals.most_common()))
    differ = len({j.name for j, r in found if r.runtime_differs})
    click.echo(f"\n{len({j.name for j, _ in found})} tests; ONNX Runtime itself gives something else in {differ}")


if __name__ == "__main__":
    main()
