"""Quantize a model of sweep.py, and check that whatever is wrong with the result is said."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _sweep_models import Made, make
from _sweep_parts import subgraphs

import comq_onnx
from comq_onnx.errors import ComqError, InternalError, RuntimeFailure
from comq_onnx.evaluate import speed
from comq_onnx.evaluate.kernels import FLOAT_PRODUCTS, INTEGER_PRODUCTS
from comq_onnx.evaluate.levels import LEAST_DB, MOST_DB, SAME_DB
from comq_onnx.evaluate.speed import latency
from comq_onnx.report.report import Report
from comq_onnx.runtime.session import Session
from comq_onnx.samples.samples import Samples
from comq_onnx.targets.catalog import TARGETS

LEVELS = (0, 1, 2, 99)
# what few samples that are held back may say about others
NEAR_DB = 3.0
# one sample that clips, among those held back, makes the report's figure so much worse than that of others
UNLUCKY_DB = 12.0
# and about what the levels change
OTHERS_DB = 1.0
# batches that differ by more say nothing about others
UNEVEN_DB = 10.0
# a solver may lose so much against plain rounding, on samples that it has not seen
WORSE_DB = 1.0
# what values of 8 bits hold at best, 6 dB for each bit: beyond it a difference is one of values that hardly change
FINE_DB = 48.0
# a file may be so many times slower than its source; timing noise is below it
SLOWER = 1.05
# what calls of the smallest models differ by, in milliseconds
JITTER_MS = 0.002
# one in so many models is quantized twice
REPEATED = 10
SAID_OF_LEVELS = ("optimizations change", "default optimizations fail", "rounds the inputs of weight-only")
FAR = "far from its source"


@dataclass
class Verdict:
    """Hold what became of one model.

    outcome: right, refused or wrong
    details: what is wrong; the message of a refusal
    traits, options: what the model is made of, and how it was quantized
    sqnr_db: the worst float output on samples that were not used
    """

    outcome: str
    details: list[str] = field(default_factory=list)
    traits: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    sqnr_db: float | None = None


def check(job: tuple[int, str, bool]) -> Verdict:
    """Make the model of a seed and a kind, quantize it, and look at the result.

    job: the seed, the kind, and whether it is timed
    """
    seed, kind, timed = job
    speed.TIMED_SECONDS = 0.5 if timed else 0.0
    made = make(seed, kind)
    with tempfile.TemporaryDirectory() as work:
        source, out = Path(work) / "model.onnx", Path(work) / "q.onnx"
        onnx.save(made.model, source, save_as_external_data=made.external, location="model.data", size_threshold=256)
        verdict = Verdict("right", traits=made.traits, options=made.options)
        before = _source_sessions(source, made, verdict)
        if before is None:
            return verdict
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                report = comq_onnx.quantize(source, out, made.samples, device="cpu", **made.options)
            except ComqError as error:
                fault = isinstance(error, (InternalError, RuntimeFailure)) or "quantized model: " in str(error)
                verdict.outcome = "wrong" if fault else "refused"
                verdict.details = [f"{type(error).__name__}: {error}".replace(work, "")]
                return verdict
        numbers = {str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)}
        verdict.details += [f"numpy: {message}" for message in sorted(numbers)]
        verdict.details += _findings(made, before, source, out, report, verdict)
        if seed % REPEATED == 0:
            verdict.details += _repeated(made, source, out)
        if timed and made.options.get("target", "ort-cpu") == "ort-cpu":
            verdict.details += _slower(made, source, out, report)
        verdict.outcome = "wrong" if verdict.details else "right"
        return verdict


def _source_sessions(source: Path, made: Made, verdict: Verdict) -> list[dict[str, Any]] | None:
    """Run the source on the unseen samples, batch by batch; None where it is not valid or does not run.

    That is a fault of the sweep.
    """
    try:
        onnx.checker.check_model(source)
        return _run(Session(source), made)
    except (ComqError, onnx.checker.ValidationError) as error:
        verdict.outcome, verdict.details = "wrong", [f"the sweep's own model: {error}"]
        return None


def _run(session: Session, made: Made) -> list[dict[str, Any]]:
    size = made.batch or 16
    count = len(next(iter(made.unseen.values())))
    return [session.run({n: a[i : i + size] for n, a in made.unseen.items()}) for i in range(0, count, size)]


def sqnr(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, float]:
    """Return the SQNR in dB of each float output over all batches, 200 where equal, -inf where shapes differ."""
    found = {}
    for name, first in before[0].items():
        if first.dtype.kind != "f":
            continue
        pairs = [
            (np.asarray(b[name], np.float64), np.asarray(a[name], np.float64))
            for b, a in zip(before, after, strict=True)
        ]
        if any(b.shape != a.shape for b, a in pairs):
            found[name] = -np.inf
            continue
        signal = sum(float((b**2).sum()) for b, _ in pairs)
        noise = sum(float(((b - a) ** 2).sum()) for b, a in pairs)
        if not np.isfinite(noise):
            found[name] = -np.inf
        elif noise == 0:
            found[name] = 200.0
        else:
            found[name] = 10 * float(np.log10(max(signal, 1e-300) / noise))
    return found


def _differ(one: float, other: float, slack: float) -> bool:
    """Tell whether two SQNRs are further apart than `slack`, where they are neither noise nor nearly exact."""
    a, b = min(one, MOST_DB), min(other, MOST_DB)
    return max(a, b) >= LEAST_DB and not abs(a - b) <= slack


def _is_even(parts: list[float]) -> bool:
    """Tell whether the SQNRs of batches are alike: where few samples make all of the error, others tell nothing."""
    return max(parts) - min(parts) <= UNEVEN_DB


def _findings(
    made: Made, before: list[dict[str, Any]], source: Path, out: Path, report: Report, verdict: Verdict
) -> Iterator[str]:
    """Say what is wrong with a written model, and what its report does not say."""
    said = " | ".join((*report.notes, *report.warnings))
    yield from _changed_interface(onnx.load(source), onnx.load(out))
    size = sum(f.stat().st_size for f in out.parent.glob("q.onnx*"))
    if report.size["after"] != size:
        yield f"the report says {report.size['after']} bytes, the files have {size}"
    if size >= report.size["before"] and "not smaller than its source" not in said:
        yield f"not smaller than its source: {report.size['before']} -> {size} bytes"
    target = TARGETS[made.options.get("target", "ort-cpu")]
    options = {"float_matmul_nbits": target.device != "cpu", "disable_qdq_fusion": target.runs_outside_ort}
    after = _run(Session(out, what="the quantized model", **options), made)
    found = sqnr(before, after)
    each = [sqnr([b], [a]) for b, a in zip(before, after, strict=True)]
    spread = {name: [min(part[name], MOST_DB) for part in each] for name in found}
    plain = {name: db for name, db in found.items() if name not in made.selected}
    verdict.sqnr_db = min(plain.values(), default=None)
    yield from _unlike_report(plain, spread, before, report, said)
    judged = {o.name for o in report.outputs if _is_even(spread.get(o.name, [0.0]))}
    yield from _levels(made, before, out, said, judged, target.device == "cuda")
    if target.device == "cpu":
        yield from _float_kernels(source, out, report)
    if made.options.get("solver", "comq") == "comq" and made.options.get("bits") != "auto":
        yield from _worse_than_rounding(made, before, source, plain, options, report)


def _unlike_report(
    found: Mapping[str, float],
    parts: Mapping[str, list[float]],
    before: list[dict[str, Any]],
    report: Report,
    said: str,
) -> Iterator[str]:
    """Say where the report's SQNR is not what other samples show, and which outputs it does not mention.

    parts: the SQNR of each batch of these samples
    """
    told = {o.name: o.sqnr_db for o in report.outputs}
    for name, db in found.items():
        spread = parts[name]
        slack = NEAR_DB if db < told.get(name, db) else UNLUCKY_DB
        if name in told and _is_even(spread) and all(_differ(part, told[name], slack) for part in (db, *spread)):
            yield f"{name}: {db:.1f} dB on other samples, the report says {told[name]:.1f} dB"
        if db < LEAST_DB - NEAR_DB and FAR not in said:
            yield f"{name}: {db:.1f} dB and no warning"
    mentioned = {*told, *(part.partition(": ")[0] for part in told), *(m.name for m in report.matches)}
    yield from (f"{name}: not in the report" for name in before[0] if name not in mentioned)


def _levels(
    made: Made, before: list[dict[str, Any]], out: Path, said: str, judged: Set[str], exact: bool
) -> Iterator[str]:
    """Say where the optimization level changes what the model computes, and the report does not say so.

    judged: the outputs that the report compares
    exact: the target does not round the inputs of weight-only products, as ONNX Runtime's CPU does
    """
    at: dict[int, dict[str, float]] = {}
    for level in LEVELS:
        try:
            session = Session(out, level=level, what="the quantized model", float_matmul_nbits=exact)
            at[level] = sqnr(before, _run(session, made))
        except ComqError as error:
            if not any(words in said for words in SAID_OF_LEVELS):
                yield f"level {level}: {error}"
    for name in next(iter(at.values()), {}):
        # of what is selected the report judges the values before
        if name not in judged or any(words in said for words in SAID_OF_LEVELS):
            continue
        values = [min(found[name], MOST_DB) for found in at.values()]
        if _differ(min(values), max(values), SAME_DB + OTHERS_DB):
            shown = ", ".join(f"{found[name]:.1f} at {level}" for level, found in at.items())
            yield f"{name}: levels differ: {shown} dB"


def _changed_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[str]:
    """Say which inputs and outputs have another name, type or dimensions than in the source, and what is not valid."""

    def described(values: Any) -> list[tuple[str, int, list[Any]]]:
        types = [(v.name, v.type.tensor_type) for v in values]
        return [(n, t.elem_type, [d.dim_param or d.dim_value for d in t.shape.dim]) for n, t in types]

    for what in ("input", "output"):
        first, second = described(getattr(before.graph, what)), described(getattr(after.graph, what))
        if first != second:
            yield f"{what}s {first} became {second}"
    try:
        onnx.checker.check_model(after)
    except onnx.checker.ValidationError as error:
        yield f"onnx.checker: {error}"


def _float_kernels(source: Path, out: Path, report: Report) -> Iterator[str]:
    """Say which planned layers ONNX Runtime does not run as planned."""
    left, found = (_dequantized_at_runs(path) for path in (source, out))
    if len(found) > len(left):
        yield f"weights are dequantized at every run: {', '.join(found)}"
    planned = [layer for layer in report.layers if layer.form in ("integer", "blocked")]
    for layer in planned:
        # a layer that shares its scales with another has no kernel of a name
        good = INTEGER_PRODUCTS | {None} if layer.form == "integer" else {"MatMulNBits", None}
        if layer.kernel not in good:
            yield f"layer {layer.name} ({layer.op}) is planned as {layer.form}, but runs as {layer.kernel}"
    count = sum(n for op, n in report.kernels.items() if op in INTEGER_PRODUCTS)
    if count < len(planned):
        yield f"{len(planned)} products are planned in integers or blocks, {count} run so"


def _dequantized_at_runs(path: Path) -> list[str]:
    """Name the constants that ONNX Runtime dequantizes at every run, for a product or a convolution."""
    with tempfile.TemporaryDirectory() as work:
        optimized = Path(work) / "optimized.onnx"
        Session(path, threads=1, optimized=optimized)
        graphs = subgraphs(onnx.load(optimized, load_external_data=False).graph)
    constants = {i.name for graph in graphs for i in graph.initializer}
    nodes = [node for graph in graphs for node in graph.node]
    dequantized = {
        n.output[0]: n.input[0] for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] in constants
    }
    readers = [n for n in nodes if n.op_type in FLOAT_PRODUCTS | {"ConvTranspose"}]
    return [dequantized[i] for n in readers for i in n.input if i in dequantized]


def _worse_than_rounding(
    made: Made, before: list[dict[str, Any]], source: Path, found: Mapping[str, float], options: dict[str, bool],
    report: Report,
) -> Iterator[str]:  # fmt: skip
    """Say which outputs plain rounding keeps better."""
    rounded = source.with_name("rtn.onnx")
    other = comq_onnx.quantize(source, rounded, made.samples, device="cpu", **{**made.options, "solver": "rtn"})
    told, others_told = ({o.name: o.sqnr_db for o in x.outputs} for x in (report, other))
    by_rounding = sqnr(before, _run(Session(rounded, **options), made))
    for name, db in found.items():
        # on both sets of samples: one alone may be chance
        worse = by_rounding[name] > db and others_told.get(name, 0.0) > told.get(name, 0.0)
        if worse and db < FINE_DB and _differ(by_rounding[name], db, WORSE_DB):
            yield f"{name}: {db:.1f} dB, plain rounding {by_rounding[name]:.1f} dB"


def _repeated(made: Made, source: Path, out: Path) -> Iterator[str]:
    again = out.with_name("again.onnx")
    comq_onnx.quantize(source, again, made.samples, device="cpu", **made.options)
    first, second = (hashlib.sha256(p.read_bytes()).hexdigest() for p in (out, again))
    if first != second:
        yield "a second run wrote other bytes"


def _slower(made: Made, source: Path, out: Path, report: Report) -> Iterator[str]:
    """Say that the result is slower than its source, where the report does not."""
    sessions = [Session(path, threads=1) for path in (source, out)]
    size = made.batch or 1
    samples = Samples({n: a[: 16 * size] for n, a in made.unseen.items()}, "sweep", fixed_batch=made.batch)
    before, after = latency(sessions, samples, seconds=0.5, most=2000)
    if after > SLOWER * before + JITTER_MS and not any("slower than its source" in w for w in report.warnings):
        yield f"slower than its source: {before:.3f} -> {after:.3f} ms"
