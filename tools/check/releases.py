"""Run what comq-onnx writes on several releases of ONNX Runtime, at every level of optimization, and compare.

    python tools/check/releases.py WORK [--release 1.23.2 ...]

Every form of a weight is written, with many operators around it, and run by each release in a virtual environment of
its own in the folder WORK. What comes out must be what the installed release computes without any optimization, up to
the rounding of its integer kernels. A release that refuses a file does so by an error, which is counted. Exits with 1
where a result is another.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime

import comq_onnx
from comq_onnx.metrics import sqnr_of
from comq_onnx.runtime.session import Session

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "support")]

import golden  # noqa: E402
from _run_release import LEVELS  # noqa: E402
from products import PRODUCTS, branches  # noqa: E402

import models  # noqa: E402  (the builders that the tests have)

RELEASES = ("1.23.2", "1.25.1", "1.29.0")
# what integer kernels that round their own way leave
LEAST_DB = 30.0
ROWS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "integers": {"activations": "8"}, "4 bits": {"activations": "none", "bits": 4},
    "8 bits": {"activations": "none"}, "2 bits": {"activations": "none", "bits": 2},
    "3 bits": {"activations": "8", "bits": 3},
    "blocks of 32": {"activations": "none", "bits": 4, "granularity": "32"},
    "asymmetric": {"activations": "none", "bits": 4, "symmetric": False},
    "one scale": {"activations": "none", "bits": 4, "granularity": "tensor"},
    "16-bit activations": {"activations": "16", "bits": 4},
}  # fmt: skip


def write_models(folder: Path) -> None:
    """Write quantized models, and a few samples for each, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {"bits": 8, "solver": "rtn", "uniform": True, "device": "cpu"}
    for product in PRODUCTS:
        for shape in ("2 open",) if product.startswith("gemm") else ("2 open", "3 open"):
            model, feeds = branches(product, shape)
            # it jumps: a tiny difference before it may be a large one behind it
            kept = [value for value in model.graph.output if not value.name.startswith("thresholded")]
            del model.graph.output[:]
            model.graph.output.extend(kept)
            for name, options in OPTIONS.items():
                _write(folder / f"{product}, {shape}, {name}", model, feeds, {**common, **options})
    for name, case in golden.CASES.items():
        model = case.model()
        feeds = case.samples() if case.samples is not None else models.samples_for(model, golden.SAMPLES)
        _write(folder / name, model, feeds, {"bits": 8, "device": "cpu", **case.options})


def _write(stem: Path, model: onnx.ModelProto, feeds: dict[str, np.ndarray], options: dict[str, Any]) -> None:
    path = Path(f"{stem}.onnx")
    comq_onnx.quantize(model, path, feeds, max_samples=golden.SAMPLES, **options)
    np.savez(f"{stem}.npz", **{name: array[:ROWS] for name, array in feeds.items()})


def interpreter(work: Path, release: str) -> Path:
    """Return the Python of a virtual environment with a release of ONNX Runtime; made where it is not there."""
    home = work / f"onnxruntime-{release}"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        venv.create(home, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "-q", f"onnxruntime=={release}", "numpy"]
        subprocess.run(command, check=True)
        (home / "ready").touch()
    return python


def compare(folder: Path, results: Path, expected: dict[str, dict[str, Any]]) -> dict[int, Counter[str]]:
    """Count, at each level, the models that are right, refused and wrong, and print the wrong ones."""
    found: dict[int, Counter[str]] = {level: Counter() for level in LEVELS}
    for path in sorted(folder.glob("*.onnx")):
        for level in LEVELS:
            result = results / f"{path.stem}.{level}"
            error = Path(f"{result}.txt")
            if error.exists():
                found[level]["refused"] += 1
                continue
            with np.load(f"{result}.npz") as stored:
                reached = sqnr_of(expected[path.stem], dict(stored))
            found[level]["right" if reached >= LEAST_DB else "wrong"] += 1
            found[level]["worst"] = int(min(found[level].get("worst", 200), reached))
            if reached < LEAST_DB:
                click.echo(f"  wrong: {path.stem} at level {level}: {reached:.1f} dB")
    return found


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.argument("work", type=click.Path(path_type=Path))
@click.option(
    "--release", "releases", multiple=True, help="A release; may be repeated.  [default: three and the newest]"
)
def main(work: Path, releases: tuple[str, ...]) -> None:
    """Write the models, run and compare them."""
    folder = work / "models"
    if not (folder / "ready").exists():
        write_models(folder)
        (folder / "ready").touch()
    expected = {}
    for path in folder.glob("*.onnx"):
        with np.load(path.with_suffix(".npz")) as stored:
            expected[path.stem] = Session(path, level=0).run(dict(stored))
    wrong = 0
    lines = ["| release | level | right | refused | wrong | worst dB |", "|---|---|---|---|---|---|"]
    for release in releases or (*RELEASES, onnxruntime.__version__):
        results = work / f"results-{release}"
        command = [str(interpreter(work, release)), str(HERE / "_run_release.py"), str(folder), str(results)]
        subprocess.run(command, check=True)
        for level, counts in compare(folder, results, expected).items():
            cells = [release, level, counts["right"], counts["refused"], counts["wrong"], counts["worst"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            wrong += counts["wrong"]
    click.echo("\n".join(lines))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
