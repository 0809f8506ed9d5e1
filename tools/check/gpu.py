"""Check and time everything that runs on a GPU, in one command that needs no network, and print one table.

    python tools/check/gpu.py                      # cuda, some minutes; exit code 1 if anything is wrong
    python tools/check/gpu.py --device cuda:1 --json gpu.json
    python tools/check/gpu.py --device cpu         # the same code on torch's CPU, small: that the check itself works

- environment: packages, driver, GPU, what ONNX Runtime and Triton say;
- correctness: each part against the CPU: tensors out of ONNX Runtime, Grams, the in-block kernel, the solver (codes,
  objective), whole models of models/ (codes, SQNR), `compare`, TensorRT where it is there; and the tests of these
  parts with their tensors on the device, where pytest is installed;
- timings: float32 matrix products (the peak that the rest is measured by), Grams of rows and of patches, the solver on
  the sizes of bench/solve.py with its share of the limit that flops set, and how many samples a second calibration
  takes.

Times are medians after a warm-up, with the device synchronized before each reading of the clock.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

import comq_onnx
from comq_onnx.calibrate import cut_tensors
from comq_onnx.errors import ComqError
from comq_onnx.runtime import device as devices
from comq_onnx.runtime import session as runtime
from comq_onnx.runtime.session import Session
from comq_onnx.solve.effort import EFFORTS
from comq_onnx.solve.gpu import solver as gpu
from comq_onnx.solve.gpu import step
from comq_onnx.solve.grid import Grid
from comq_onnx.solve.layer import solve
from comq_onnx.solve.moments import Moments, MomentSums
from comq_onnx.solve.patches import patch_gram

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

from bench.solve import SIZES, limit, make_layer, milliseconds  # noqa: E402

TESTS = (
    "solve/test_gpu.py",
    "solve/test_moments.py",
    "solve/test_patches.py",
    "calibrate/test_cut_tensors.py",
)
GRID = Grid(4, symmetric=False)


@dataclass(frozen=True)
class Row:
    """Hold one line of the table; good: None where nothing is wanted."""

    part: str
    what: str
    found: str
    wanted: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Scale:
    """Set the sizes of a check, or of its smoke test."""

    sizes: tuple[str, ...]
    product: int
    positions: int
    samples: int
    runs: int
    effort: str


FULL = Scale(SIZES, 8192, 32768, 256, 5, "default")
SMOKE = Scale(("96x64",), 256, 512, 16, 1, "fast")


class Check:
    """Check every part on one device."""

    def __init__(self, name: str, scale: Scale) -> None:
        self.name, self.scale = name, scale
        self.device = torch.device(name)
        self.rng = np.random.default_rng(0)

    def environment(self) -> Iterator[Row]:
        """List what is installed and what it finds."""
        found = {
            "python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__,
            "ONNX Runtime": ", ".join(f"{k} {v}" for k, v in devices.installed().items()) or runtime.version(),
            "providers": ", ".join(runtime.providers()),
            "Triton": (
                "none: the step is torch's" if step.triton_kernel() is None else importlib.metadata.version("triton")
            ),
        }  # fmt: skip
        if self.device.type == "cuda":
            card = torch.cuda.get_device_properties(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            found["GPU"] = (
                f"{card.name}, {card.multi_processor_count} SMs, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
            )
            found["CUDA of torch"] = f"{torch.version.cuda}, capability {card.major}.{card.minor}"
            found["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        for what, value in found.items():
            yield Row("environment", what, str(value))

    # correctness

    def tensors(self) -> Iterator[Row]:
        """Check that a session's inputs and outputs are torch's own memory."""
        text = '<ir_version: 8, opset_import: ["": 17]> g (float[n, 32] x) => (float[n, 32] y) { y = Relu (x) }'
        session = Session(onnx.parser.parse_model(text).SerializeToString(), self.name)
        x = torch.randn(64, 32, device=self.device)
        y = session.run_tensors({"x": x})["y"]
        yield self.wanted("ONNX Runtime's output is a tensor", str(y.device), str(x.device), y.device == x.device)
        yield self.wanted("and right", f"{float((y - x.relu()).abs().max()):.1e}", "0", torch.equal(y, x.relu()))

    def grams(self) -> Iterator[Row]:
        """Check the Grams of rows and of patches against float64."""
        x = self.rng.standard_normal((1, self.scale.positions, 256)).astype(np.float32)
        sums = MomentSums()
        sums.add(torch.as_tensor(x, device=self.device), None)
        off = _off(sums.moments().on_host().gram[0] * x.shape[1], x[0].astype(np.float64).T @ x[0])
        # TF32 would give 3e-4
        yield self.wanted("Gram of rows, relative error", f"{off:.1e}", "2e-6", off < 2e-6)
        a = self.rng.standard_normal((4, 16, 30, 30)).astype(np.float32)
        tensor = torch.as_tensor(a, device=self.device)
        off = _off(patch_gram(tensor, tensor, (3, 3)).cpu().numpy(), patch_gram(a, a, (3, 3)))
        yield self.wanted("Gram of patches, against numpy", f"{off:.1e}", "2e-6", off < 2e-6)

    def kernel(self) -> Iterator[Row]:
        """Check the in-block step of Triton against torch's."""
        if step.triton_kernel() is None or (self.device.type != "cuda" and not step.is_interpreted()):
            yield Row("correct", "Triton kernel", "not run here")
            return
        random = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Any:
            return torch.randn(shape, generator=random, device=self.device)

        v, a, own = 3 * normal(1, 128, 999), 0.1 * normal(1, 128, 128), normal(1, 128).abs() + 0.5
        size, low = normal(1, 1, 999).abs() + 0.1, torch.full((1, 1, 999), -8.0, device=self.device)
        block = torch.zeros((1, 128), dtype=torch.int64, device=self.device)
        found = []
        for run in (step.step_in_torch, step.step):
            codes = torch.zeros_like(v)
            run(v.clone(), a, own, size, low, low + 15, block, codes)
            found.append(codes)
        share = float((found[0] == found[1]).float().mean())
        yield self.wanted("Triton kernel, codes as torch's", f"{share:.3%}", "99.9%", share >= 0.999)

    def solver(self) -> Iterator[Row]:
        """Check layers solved on the device against the CPU's solutions."""
        for size in self.scale.sizes[:2]:
            n, m = map(int, size.split("x"))
            layer = make_layer(n, m, 0)
            theirs = solve(layer.weight, layer.seen, GRID, has_bias=True)
            ours = solve(layer.weight, self.on_device(layer.seen), GRID, has_bias=True)
            share, off = float((ours.weight.codes == theirs.weight.codes).mean()), abs(ours.error / theirs.error - 1)
            yield self.wanted(f"solver {size}, codes as the CPU's", f"{share:.3%}", "99.9%", share >= 0.999)
            yield self.wanted(f"solver {size}, objective off by", f"{off:.1e}", "1e-4", off < 1e-4)

    def models(self) -> Iterator[Row]:
        """Whole models of models/, quantized with the walk on tensors and with the walk on numpy."""
        with tempfile.TemporaryDirectory() as work:
            for stem, activations in (("fashion_cnn", "auto"), ("fashion_vit", "none"))[: self.scale.runs]:
                model = ROOT / "models" / f"{stem}.onnx"
                calib, test = ROOT / "models" / "fashion_calib.npz", ROOT / "models" / "fashion_test.npz"
                options: dict[str, Any] = {"bits": 4, "uniform": True, "activations": activations,
                                           "max_samples": self.scale.samples, "effort": self.scale.effort}  # fmt: skip
                paths = {name: Path(work) / f"{stem}_{name}.onnx" for name in ("cpu", "device")}
                reports = {
                    "cpu": comq_onnx.quantize(model, paths["cpu"], calib, device="cpu", **options),
                    "device": self.quantize(model, paths["device"], calib, options),
                }
                share = _same_codes(*(onnx.load(path) for path in paths.values()))
                # activations that another convolution rounds to the next code change what layers behind them see
                least = 0.98 if activations == "none" else 0.8
                yield self.wanted(f"{stem}, codes as the CPU's", f"{share:.2%}", f"{least:.0%}", share >= least)
                found = comq_onnx.compare(model, paths["device"], test, count=self.scale.samples, device=self.name,
                                          seconds=0.2)  # fmt: skip
                reached, wanted = found.outputs[0].sqnr_db, reports["cpu"].outputs[0].sqnr_db
                good = reached > wanted - 3
                yield self.wanted(f"{stem}, SQNR on the device", f"{reached:.1f} dB", f"{wanted - 3:.1f} dB", good)
                for where, report in reports.items():
                    rate = self.scale.samples / max(report.seconds["calibrate"], 1e-9)
                    yield Row("timing", f"{stem}, calibration on the {where}", f"{rate:,.0f} samples/s")
                if devices.TENSORRT in runtime.providers():
                    index = self.device.index or 0
                    found = comq_onnx.compare(model, paths["device"], test, count=64, device=f"tensorrt:{index}")
                    reached = found.outputs[0].sqnr_db
                    yield self.wanted(f"{stem}, SQNR by TensorRT", f"{reached:.1f} dB", f"{wanted - 3:.1f} dB",
                                      reached > wanted - 3)  # fmt: skip

    def quantize(self, model: Path, out: Path, calib: Path, options: dict[str, Any]) -> comq_onnx.Report:
        """Quantize with the walk on tensors, on the CPU too."""
        with walk_on_tensors():
            return comq_onnx.quantize(model, out, calib, device=self.name, **options)

    def tests(self) -> Iterator[Row]:
        """Run the tests of all this with their tensors on the device."""
        if importlib.util.find_spec("pytest") is None or not (ROOT / "tests").is_dir():
            yield Row("correct", "tests", "not run: no pytest, or no tests/ here")
            return
        if self.device.type == "cpu":
            yield Row("correct", "tests", "not run: they use the CPU anyway")
            return
        files = [str(ROOT / "tests" / name) for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
        environment = {**os.environ, "COMQ_TEST_DEVICE": self.name}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        last = (done.stdout.strip().splitlines() or ["nothing was said"])[-1].strip("= ")
        yield self.wanted(f"tests with tensors on {self.name}", last, "all pass", done.returncode == 0)

    # timings

    def timings(self) -> Iterator[Row]:
        """Measure rates, and their share of the measured peak."""
        a = torch.randn(self.scale.product, self.scale.product, device=self.device)
        peak = 2 * self.scale.product**3 / self.median(lambda: a @ a) / 1e9
        yield Row("timing", f"float32 matrix product, {self.scale.product}", f"{peak:.2f} TFLOP/s")
        for n in sorted({int(size.split("x")[0]) for size in self.scale.sizes}):
            x = torch.randn(1, self.scale.positions, n, device=self.device)
            spent = self.median(lambda x=x: MomentSums().add(x, None))
            rate = 2 * self.scale.positions * n * n / spent / 1e9
            yield Row("timing", f"Gram of {n} inputs", f"{rate:.2f} TFLOP/s, {rate / peak:.0%} of peak")
        images = torch.randn(16, 64, 56, 56, device=self.device)[:, : 8 if self.scale is SMOKE else 64]
        spent = self.median(lambda: patch_gram(images, images, (3, 3)))
        taken = 2 * images.shape[0] * 54 * 54 * (9 * images.shape[1]) ** 2 / spent / 1e9
        yield Row("timing", "Gram of 3x3 patches, as if by rows", f"{taken:.2f} TFLOP/s")
        for size in self.scale.sizes:
            n, m = map(int, size.split("x"))
            layer = make_layer(n, m, 0)
            weight = torch.as_tensor(layer.weight, device=self.device)
            moments = self.on_device(layer.seen).centred()
            for effort in ("fast", "default"):
                spent = self.median(lambda e=effort, w=weight, s=moments: gpu.solve_comq(w, s, GRID, EFFORTS[e]))
                share = limit(n, m, GRID, effort) / (peak * 1e9) / spent
                yield Row("timing", f"solver {size}, {effort}", f"{spent:.1f} ms, {share:.0%} of the flops' limit")

    def median(self, run: Callable[[], Any]) -> float:
        """Time a function after a warm-up: the median in milliseconds."""

        def whole() -> None:
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        whole()
        return milliseconds(whole, self.scale.runs)

    def on_device(self, statistics: Moments) -> Moments:
        """Copy moments to the device as tensors."""
        half = None if statistics.half is None else self.on_device(statistics.half)
        names = ("gram", "mean", "cross", "residue", "mean_error")
        found = {name: getattr(statistics, name) for name in names}
        return replace(
            statistics, half=half,
            **{k: None if v is None else torch.as_tensor(v, device=self.device) for k, v in found.items()},
        )  # fmt: skip

    @staticmethod
    def wanted(what: str, found: str, wanted: str, good: bool) -> Row:
        """Make a row that is right or wrong."""
        return Row("correct", what, found, wanted, bool(good))


@contextmanager
def walk_on_tensors() -> Iterator[None]:
    """Let the pipeline walk on torch's tensors, whatever the device."""
    true = cut_tensors.uses_tensors
    cut_tensors.uses_tensors = lambda _device: True
    try:
        yield
    finally:
        cut_tensors.uses_tensors = true


def rows(name: str, scale: Scale) -> Iterator[Row]:
    """Yield the whole table; an error becomes a row that is wrong."""
    try:
        chosen = devices.choose(name).device
    except ComqError as error:
        yield Row("environment", name, str(error), "a GPU that works", False)
        return
    check = Check(chosen, scale)
    for part in (
        check.environment, check.tensors, check.grams, check.kernel, check.solver, check.models, check.timings,
        check.tests,
    ):  # fmt: skip
        try:
            yield from part()
        except Exception as error:
            yield Row("correct", part.__name__, f"{type(error).__name__}: {runtime.one_line(error)}", "no error", False)


def _off(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def _same_codes(first: onnx.ModelProto, second: onnx.ModelProto) -> float:
    """Compute the share of equal numbers in the integer constants, of 64 numbers or more, of two models."""
    codes = {x.name: numpy_helper.to_array(x).astype(np.int16) for x in first.graph.initializer if "int" in _kind(x)}
    others = {x.name: numpy_helper.to_array(x).astype(np.int16) for x in second.graph.initializer if x.name in codes}
    large = [name for name, x in codes.items() if x.size >= 64 and name in others and others[name].shape == x.shape]
    equal = sum(int((codes[name] == others[name]).sum()) for name in large)
    return equal / max(sum(codes[name].size for name in large), 1)


def _kind(tensor: onnx.TensorProto) -> str:
    return onnx.TensorProto.DataType.Name(tensor.data_type).lower()


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"


@click.command()
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:N, or cpu for a small smoke test.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the table as JSON.")
def main(device: str, json_path: Path | None) -> None:
    """Check and time everything that runs on a GPU; exit code 1 if anything is wrong."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    found = []
    for row in rows(device, SMOKE if device == "cpu" else FULL):
        found.append(row)
        if sys.stderr.isatty():
            print(re.sub(r"\s+", " ", f"{row.part}: {row.what}: {row.found}"), file=sys.stderr)
    table = Table("", "what", "found", "wanted", "", box=None, pad_edge=False)
    for row in found:
        mark = {None: "", True: "ok", False: "WRONG"}[row.good]
        table.add_row(row.part, row.what, row.found, row.wanted, mark)
    console.print(table)
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(row) for row in found], indent=1))
    wrong = sum(row.good is False for row in found)
    console.print(f"{wrong} wrong" if wrong else "all is right")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
