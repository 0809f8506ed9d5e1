"""Put thousands of broken, hostile and odd inputs through comq-onnx; each must be refused in one line or be right.

    python tools/check/fuzz.py [--inputs 5000] [--seed 0] [--json FILE]

Inputs are small models, samples and folders with seeded mutations of four kinds:

- bytes: the model's file with bits flipped, ranges cut, copied, blown up or spliced in from another model;
- model: the parsed model with nodes, names, types, dimensions, attributes, weights, versions or external data changed;
- samples: .npz, .npy and pictures with the same done to their bytes, their arrays or their headers;
- folder: models in folders with others, links, missing data, outputs that cannot be, and what killed runs left.

Right means: exit code 0, the model written runs and keeps 5 dB SQNR on samples it was not calibrated on, or the report
warns that it does not. In every case the inputs keep their bytes, nothing else is left in the folder or among temporary
files. Exits with 1 where anything else happened.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import onnx
import onnxruntime
from _folder_mutations import mutate_folder
from _fuzz_models import TEXTS, Dice, base, samples_of
from _model_mutations import mutate_bytes, mutate_model
from _sample_mutations import mutate_samples, save
from _sandbox import Outcome, Said, command_line, each, quickly, snapshot, table

from comq_onnx.errors import ComqError, SamplesError
from comq_onnx.evaluate.levels import LEAST_DB
from comq_onnx.metrics import sqnr_of
from comq_onnx.runtime.session import Session

KINDS = ("bytes", "model", "samples", "folder")
# what the report finds on the few samples it held back may differ from what is found on others
SLACK_DB = 3.0
ADDRESS_SPACE = 8 << 30


@dataclass(frozen=True)
class Result:
    """Hold the result of an input: right, refused, wrong or crash; and why."""

    kind: str
    detail: str


def check(job: tuple[str, int, int]) -> Result:
    """Make one input, run it and look at what is there afterwards."""
    kind, seed, number = job
    dice = Dice(seed, KINDS.index(kind), number)
    name = dice.pick(TEXTS)
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as temporary:
        folder = Path(work)
        arguments = make_input(kind, name, folder, dice)
        before = _state(folder)
        tempfile.tempdir = temporary
        own_report = [] if "--json" in arguments else ["--json", folder / "report.json"]
        said = command_line(*arguments, "--device", "cpu", *own_report)
        tempfile.tempdir = None
        after = _state(folder)
        has_report = after.pop("report.json", None) is not None
        left = os.listdir(temporary)
        if fault := _changed_files(before, after) or (left and f"temporary files left: {left}"):
            return Result("crash", fault)
        if fault := _unclear_end(said, before.get("q.onnx") != after.get("q.onnx"), has_report):
            return Result("crash", fault)
        if said.refused:
            return Result("refused", said.err.strip())
        if "--plan" in arguments or not has_report:
            return Result("right", "")
        # odd samples make a model for odd samples
        source = folder / "model.onnx"
        same = source if kind != "samples" and source.is_file() else None
        return _compare(same, folder / "q.onnx", name, json.loads((folder / "report.json").read_text()))


def make_input(kind: str, name: str, folder: Path, dice: Dice) -> list[object]:
    """Write a model and samples into a folder, one of them mutated; return the arguments that name them."""
    model, arrays = base(name), samples_of(name)
    source = folder / "model.onnx"
    (folder / "weights.bin").write_bytes(bytes(20_000))
    save(folder / "good.npz", arrays)
    onnx.save(model, source)
    arguments: list[object] = [source, "-o", folder / "q.onnx"]
    samples: list[object] = ["--calib", folder / "good.npz"]
    if kind == "bytes":
        other = base(dice.pick(TEXTS)).SerializeToString()
        source.write_bytes(mutate_bytes(source.read_bytes(), dice, other))
    elif kind == "model":
        mutate_model(model, dice)
        source.write_bytes(model.SerializeToString())
    elif kind == "samples":
        samples = mutate_samples(folder, arrays, dice)
    else:
        arguments = mutate_folder(folder, model, dice)
    bits = [] if "--bits" in arguments else ["--bits", dice.pick((8, 8, 4))]
    return [*arguments, *samples, *bits]


def _changed_files(before: dict[str, str], after: dict[str, str]) -> str | None:
    """Tell which files changed, beside the output and what a killed run had left."""

    def kept(state: dict[str, str]) -> set[tuple[str, str]]:
        swept = {n for n in before if n.startswith(".comq-held-left")}
        return {(n, v) for n, v in state.items() if n != "q.onnx" and n not in swept}

    changed = kept(before) ^ kept(after)
    return f"files changed: {sorted(changed)}" if changed else None


def _unclear_end(said: Said, output_changed: bool, has_report: bool) -> str | None:
    """Tell what is wrong with the end of a run: it wrote although it refused, or neither refused nor went well."""
    if said.refused:
        # a report that cannot be written is noticed when the model is there
        told = "the model was written" in said.err
        return f"refused, but wrote: {said.err}" if (output_changed and not told) or has_report else None
    return f"exit code {said.code}: {said.err[-3000:]}" if said.code or said.err else None


def _state(folder: Path) -> dict[str, str]:
    """Map every file under a folder to its digest; pipes to `other`."""
    found = {
        n: hashlib.sha256(v.encode() if isinstance(v, str) else v).hexdigest() for n, v in snapshot(folder).items()
    }
    return found | {str(p.relative_to(folder)): "other" for p in folder.rglob("*") if p.is_fifo()}


def _compare(source: Path | None, out: Path, name: str, report: dict[str, Any]) -> Result:
    """Compare the model at `out` with its source on new samples; without a source, by the report on those held back."""
    if any("random" in w or "other outputs each time" in w for w in report["warnings"]):
        return Result("right", "not compared")
    feeds = samples_of(name, 6, seed=1)
    try:
        if source is None:
            raise SamplesError("other samples than these are meant")
        before = Session(source)
        wanted = before.run({i.name: feeds["x"] for i in before.inputs})
    except ComqError:
        # a mutation changed what it takes: the report's own comparison is there
        worst = min((o["sqnr_db"] for o in report["outputs"]), default=200.0)
        if worst is None or worst >= LEAST_DB or any("far from its source" in w for w in report["warnings"]):
            return Result("right", "compared by the report")
        return Result("wrong", f"SQNR {worst} dB, and no warning")
    after = Session(out)
    found = sqnr_of(wanted, after.run({i.name: feeds["x"] for i in after.inputs}))
    if found >= LEAST_DB - SLACK_DB or any("far from its source" in w for w in report["warnings"]):
        return Result("right", f"SQNR {found:.1f} dB")
    return Result("wrong", f"SQNR {found:.1f} dB, and no warning")


@click.command()
@click.option("--inputs", default=5000, show_default=True, help="How many inputs in all.")
@click.option("--seed", default=0, show_default=True, help="Another seed gives other inputs.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), default=KINDS, help="Only these kinds.")
@click.option("--only", "only", multiple=True, type=int, help="Only the inputs of these numbers.")
@click.option("--seconds", default=60.0, show_default=True, help="What an input may take before it counts as a hang.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every outcome as JSON.")
def main(
    inputs: int, seed: int, kinds: tuple[str, ...], only: tuple[int, ...], seconds: float, json_path: Path | None
) -> None:
    """Fuzz comq-onnx with mutated models, samples and folders."""
    quickly()
    click.echo(
        f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, {platform.machine()}, "
        f"Python {platform.python_version()}, seed {seed}"
    )
    numbers = only or range(inputs // len(kinds))
    jobs = [(kind, seed, number) for number in numbers for kind in kinds]
    found: list[tuple[tuple[str, int, int], Outcome, Result]] = []
    start = time.perf_counter()
    for job, outcome in each(jobs, check, seconds, ADDRESS_SPACE):
        result = outcome.value if outcome.kind == "done" else Result(outcome.kind, str(outcome.value)[-3000:])
        found.append((job, outcome, result))
        if result.kind not in ("right", "refused"):
            click.echo(f"{result.kind}: {job[0]} {job[2]}: {result.detail}", err=True)
    outcomes = ("right", "refused", "wrong", "crash", "hang")
    counts = {kind: Counter(r.kind for j, _, r in found if j[0] == kind) for kind in kinds}
    click.echo(
        table(("inputs", "all", *outcomes), [(k, c.total(), *(c[o] for o in outcomes)) for k, c in counts.items()])
    )
    lines = {r.detail for _, _, r in found if r.kind == "refused"}
    slowest, largest = max(o.seconds for _, o, _ in found), max(o.peak_mb for _, o, _ in found)
    click.echo(
        f"\n{len(found)} inputs in {time.perf_counter() - start:.0f} s, {len(lines)} different messages; the slowest "
        f"took {slowest:.1f} s, the most memory of a process was {largest:,.0f} MB"
    )
    if json_path:
        rows = [{"kind": j[0], "number": j[2], "outcome": r.kind, "detail": r.detail} for j, _, r in found]
        json_path.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(r.kind not in ("right", "refused") for _, _, r in found))


if __name__ == "__main__":
    main()
