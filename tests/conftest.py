"""Define fixtures: a quick comparison step, what the walk solves, and one call that quantizes a model and checks what
must always hold."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx
import pytest

import comq_onnx
from comq_onnx.calibrate import layer_solver
from comq_onnx.evaluate import speed
from comq_onnx.plan import integer_gain as gains
from comq_onnx.runtime import memory, session
from comq_onnx.solve import parallel
from comq_onnx.solve.moments import Moments
from models import Arrays, samples_for, signature, worst_sqnr

ROOT = Path(__file__).parents[1]
Kind = Callable[[Any], Any]
HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Share the tests among all cores; where a file or words choose a few, to start workers would take longer."""
    chosen = config.option.keyword or any(".py" in str(argument) for argument in config.invocation_params.args)
    return 0 if chosen else os.cpu_count() or 1


@pytest.fixture(autouse=True)
def _no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the memory of the tests' process without the limit that the command line sets for its own."""
    monkeypatch.setattr(memory, "limit", lambda: None)


@pytest.fixture(autouse=True)
def _quick_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time two runs in place of two seconds of them: no test here is about time."""
    monkeypatch.setattr(speed, "TIMED_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in one thread unless a test asks for more: pytest's workers share the cores."""
    made = session._session_options
    monkeypatch.setattr(session, "_session_options", lambda device, threads, *rest: made(device, threads or 1, *rest))
    monkeypatch.setattr(parallel.numba, "get_num_threads", lambda: 1)


@pytest.fixture(autouse=True)
def _integers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run layers in integers or with packed weights wherever there is a kernel: those of tests are too small for it."""
    if request.path.stem not in ("test_integer_gain", "test_golden", "test_docs"):
        monkeypatch.setattr(gains, "unpacked", lambda _prepared, _shapes, _target: frozenset())
        monkeypatch.setattr(gains, "choose", lambda _prepared, layers, plan, _shapes, _costs: plan(layers))


def torch_device() -> Any:
    """Return the device of the tensors in tests, COMQ_TEST_DEVICE: on a CPU they run the code that runs on a GPU."""
    torch = pytest.importorskip("torch", reason="pip install torch (a CPU build will do) for the code of the GPU")
    return torch.device(os.environ.get("COMQ_TEST_DEVICE", "cpu"))


def as_tensor(array: Any) -> Any:
    """Copy a numpy array to a tensor on the device of the tests."""
    device = torch_device()
    import torch

    return torch.as_tensor(array, device=device)


@pytest.fixture(params=["numpy", "torch"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Return a function that makes arrays of either kind of numpy's."""
    if request.param == "numpy":
        return lambda array: array
    torch_device()
    return as_tensor


@dataclass(frozen=True)
class Done:
    """Hold a finished quantization.

    source, out: the files of the float model and of the quantized one.
    model: what `out` holds.
    sqnr: the least SQNR of the outputs in dB, as a mean over the feeds.
    """

    report: comq_onnx.Report
    source: Path
    out: Path
    model: onnx.ModelProto
    samples: Arrays
    sqnr: float


@dataclass
class Solved:
    """Hold what the walk solved.

    on: the moments of each layer by its name.
    together: the names of layers that were solved as one.
    """

    on: dict[str, Moments] = field(default_factory=dict)
    together: list[list[str]] = field(default_factory=list)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Solved:
    """Record what the walks of this test solve; a later walk overwrites layers of the same name."""
    seen, solve = Solved(), layer_solver.solve_alike

    def spy(plan: Any, method: Any, observer: Any, together: Any, statistics: Moments) -> Any:
        seen.together.append([layer.name for layer in together])
        seen.on.update({layer.name: statistics for layer in together})
        return solve(plan, method, observer, together, statistics)

    monkeypatch.setattr(layer_solver, "solve_alike", spy)
    return seen


@pytest.fixture
def quantized(tmp_path: Path) -> Callable[..., Done]:
    """Quantize a model (8 bits unless told) and check what must hold for every model.

    The source's bytes, the inputs' and outputs' names, types and dimensions and the metadata stay as they were, and the
    file passes ONNX's checker and runs.

    floor: the least SQNR to the float model, in dB. 8 bits of a channel's or an activation's range give some 40 dB for
    a layer of normal weights; a few in a row lose up to 10 dB, so a small random net must have 25.
    per_item: the samples are complete tensors.
    """

    def run(
        model: onnx.ModelProto | Path,
        samples: Arrays | None = None,
        floor: float = 25.0,
        per_item: bool = False,
        **options: Any,
    ) -> Done:
        source = model if isinstance(model, Path) else tmp_path / "source.onnx"
        if not isinstance(model, Path):
            onnx.save(model, source)
        given = onnx.load(source)
        samples = samples_for(given) if samples is None else samples
        before = hashlib.sha256(source.read_bytes()).hexdigest()
        out = tmp_path / "out.onnx"
        report = comq_onnx.quantize(source, out, samples, **{"bits": 8, "device": "cpu", **options})
        assert hashlib.sha256(source.read_bytes()).hexdigest() == before
        written = onnx.load(out)
        onnx.checker.check_model(written)
        assert signature(written) == signature(given)
        kept = {p.key: p.value for p in written.metadata_props}
        assert {p.key: p.value for p in given.metadata_props}.items() <= kept.items()
        assert report.layers
        # with complete tensors each sample is a feed of its own
        feeds = [{k: a[i] for k, a in samples.items()} for i in range(5)] if per_item else [samples]
        reached = float(np.mean([worst_sqnr(source, out, f) for f in feeds]))
        assert reached >= floor
        return Done(report, source, out, written, samples, reached)

    return run
