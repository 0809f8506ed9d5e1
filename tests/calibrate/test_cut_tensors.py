"""Test tensors at a cut: ONNX Runtime takes them without a copy, they are kept where there is room, no walk changes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import as_tensor, torch_device
from recurrent import recurrent, sequences

import comq_onnx
from comq_onnx import arrays
from comq_onnx.arrays import on_host
from comq_onnx.bits import choose
from comq_onnx.calibrate import cut_tensors
from comq_onnx.calibrate.walk import walk
from comq_onnx.errors import OutOfMemory, RuntimeFailure
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.solved import Solved
from comq_onnx.runtime.session import Session
from models import attention, build, cnn, mlp, normal, samples_for, sentences, tokens, weight

torch_device()
torch = pytest.importorskip("torch")

LARGE = (128, 256)  # 131 kB: worth moving


# ONNX Runtime ---------------------------------------------------------------------------------------------------------


def session(text: str) -> Session:
    """Load a model in ONNX's text form."""
    return Session(build(text).SerializeToString(), str(torch_device()))


def test_tensors_go_in_and_out_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = session("g (float[n, 8] x) => (float[n, 8] y) { y = Relu (x) }")
    seen: dict[str, int] = {}
    out, into = torch.from_dlpack, comq_onnx.runtime.session.ort.OrtValue.from_dlpack
    monkeypatch.setattr(torch, "from_dlpack", lambda v: seen.setdefault("out", v.data_ptr()) and out(v))

    class Spy:
        @staticmethod
        def from_dlpack(x: Any) -> Any:
            value = into(x)
            seen["in"] = value.data_ptr()
            return value

    monkeypatch.setattr(comq_onnx.runtime.session.ort, "OrtValue", Spy)
    x = as_tensor(normal(5, 8))
    y = runner.run_tensors({"x": x})["y"]
    assert seen == {"in": x.data_ptr(), "out": y.data_ptr()}
    assert y.device == x.device
    # the memory is ONNX Runtime's, and lives as long as the tensor does
    del runner
    gc.collect()
    assert torch.equal(y, x.relu())


def test_integers_and_bools_come_as_arrays_and_go_in_as_such() -> None:
    runner = session("""g (float[n, 4] x, int64[n] k) => (float[n, 4] y, bool[n, 4] p, int64[r] s, double[n] d) {
        y = Neg (x)
        p = Greater (x, y)
        s = Shape (x)
        d = Cast <to = 11> (k)
    }""")
    for n in (3, 0):
        x = normal(n, 4)
        # a transposed tensor, and one of numpy's
        for given in (as_tensor(np.ascontiguousarray(x.T)).T, x):
            found = runner.run_tensors({"x": given, "k": np.arange(n)}, ["s", "y", "p", "d"])
            assert {k: arrays.is_tensor(v) for k, v in found.items()} == {"s": False, "y": True, "p": False, "d": True}
            assert np.array_equal(on_host(found["y"]), -x)
            assert np.array_equal(found["p"], x > -x)
            assert found["p"].dtype == np.bool_
            assert found["s"].tolist() == [n, 4]
            assert on_host(found["d"]).tolist() == list(range(n))


def test_strings_and_sequences_go_by_the_host() -> None:
    runner = session("""g (float[n, 4] x, string[n] w) => (float[n, 4] y, seq(float[n, 4]) z, string[n] v) {
        y = Neg (x)
        z = SequenceConstruct (x, y)
        v = Identity (w)
    }""")
    x = as_tensor(normal(2, 4))
    found = runner.run_tensors({"x": x, "w": np.array(["a", "b"], object)})
    assert torch.equal(found["y"], -x)
    assert np.array_equal(found["z"][1], on_host(-x))
    assert found["v"].tolist() == ["a", "b"]


def test_what_fails_is_told_as_without_tensors() -> None:
    runner = session("g (float[n, 4] x, float[m, 4] z) => (float[p, 4] y) { y = Add (x, z) }")
    with pytest.raises(RuntimeFailure, match="failed running the model"):
        runner.run_tensors({"x": as_tensor(normal(2, 4)), "z": as_tensor(normal(3, 4))})


# Keeping --------------------------------------------------------------------------------------------------------------


def device(budget: int, memory: int, directory: Path) -> cut_tensors.Device:
    """Make a place for tensors: `budget` bytes on the device, `memory` bytes on the host, the rest in files."""
    return cut_tensors.Device(str(torch_device()), budget, cut_tensors.Host(memory, directory))


def test_tensors_are_kept_on_the_device_then_on_the_host_then_in_files(tmp_path: Path) -> None:
    size = 4 * LARGE[0] * LARGE[1]
    where = device(size, size, tmp_path)
    given = [as_tensor(normal(*LARGE, seed=i)) for i in range(3)]
    kept = [where.keep(tensor) for tensor in given]
    assert kept[0] is given[0]
    assert arrays.is_tensor(kept[1])
    assert kept[1].device.type == "cpu"
    assert kept[1].data_ptr() != given[1].data_ptr()
    assert isinstance(kept[2], np.memmap)
    for back, tensor in zip(where.ahead(3, lambda i: where.fetch(kept[i])), given, strict=True):
        assert back.device == tensor.device
        assert torch.equal(back, tensor)
    # small ones are not moved, and a tensor that is deleted leaves its room to others
    small = as_tensor(normal(3, 4))
    assert where.keep(small) is small
    kept.clear()
    given.clear()
    del back, tensor, small
    gc.collect()
    assert not list(tmp_path.iterdir())
    again = as_tensor(normal(*LARGE))
    assert where.keep(again) is again


def test_what_is_no_tensor_is_kept_on_the_host_and_stays_what_it_is(tmp_path: Path) -> None:
    where = device(1 << 30, 0, tmp_path)
    large = np.arange(1 << 16)
    assert isinstance(where.keep(large), np.memmap)
    for value in (np.arange(3), np.array(["a"], object), [normal(2, 2)]):
        assert where.fetch(where.keep(value)) is value
    assert torch.equal(where.fetch(normal(2, 3)), as_tensor(normal(2, 3)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_activations_are_rounded_on_the_device_as_on_the_host(dtype: str) -> None:
    x = normal(200, 200, scale=3)
    # ties, and numbers off the range
    grid = ActivationGrid(np.float32(0.037), 117, dtype)
    x[:2] = (np.arange(400, dtype=np.float32).reshape(2, 200) - 200.5) * grid.scale
    found = cut_tensors.Device(str(torch_device()), 0, cut_tensors.Host(0, Path())).fake_quantize(grid, as_tensor(x))
    assert np.array_equal(on_host(found), grid.fake_quantize(x))


def test_too_little_memory_of_a_gpu_is_told_as_such_and_other_errors_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_tensors, "uses_tensors", lambda _device: True)
    name = str(torch_device())
    with pytest.raises(OutOfMemory, match=f"no memory on {name}: CUDA out of memory"), \
            cut_tensors.opened(name, 0, tmp_path):  # fmt: skip
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="another"), cut_tensors.opened(name, 0, tmp_path):
        raise RuntimeError("another")


# The walk -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def walked() -> Callable[..., Solved]:
    """Make a function that quantizes, on tensors or on arrays, and returns what the walk solved."""

    def run(model: onnx.ModelProto, samples: Any, tensors: bool, **options: Any) -> Solved:
        found = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cut_tensors, "uses_tensors", lambda _device: tensors)
            patch.setattr(choose, "walk", lambda *a, **k: found.append(walk(*a, **k)) or found[-1])
            where = str(torch_device()) if tensors else "cpu"
            comq_onnx.quantize(model, None, samples, **{"bits": 4, "uniform": True, "device": where, **options})
        return found[-1]

    return run


CASES: dict[str, tuple[Callable[[], onnx.ModelProto], dict[str, Any]]] = {
    "mlp": (mlp, {}),
    "convolutions": (lambda: cnn(size=12), {"effort": "fast"}),
    "attention, weight-only": (attention, {"activations": "none", "effort": "fast"}),
    "masked tokens": (tokens, {"effort": "fast", "batch_size": 5}),
    "sequences": (lambda: recurrent("GRU", lengths=True, direction="bidirectional"), {"batch_size": 5}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_walk_on_tensors_is_the_walk_on_arrays(walked: Callable[..., Solved], name: str) -> None:
    make, options = CASES[name]
    model = make()
    made = {"masked tokens": lambda: sentences(pad=3), "sequences": lambda: sequences(model)}
    samples = made.get(name, lambda: samples_for(model))()
    ours, theirs = (walked(model, samples, tensors, **options) for tensors in (True, False))
    assert ours.solutions.keys() == theirs.solutions.keys()
    pairs = [(ours.solutions[key], solution) for key, solution in theirs.solutions.items()]
    equal = [(a.weight.codes == b.weight.codes).ravel() for a, b in pairs]
    assert np.concatenate(equal).mean() >= 0.999
    for a, b in pairs:
        # sums of float32 in another order
        np.testing.assert_allclose(a.error, b.error, rtol=1e-4)
        np.testing.assert_allclose(a.rtn_error, b.rtn_error, rtol=1e-4)
    for key, grid in theirs.activation_grids.items():
        np.testing.assert_allclose(ours.activation_grids[key].scale, grid.scale, rtol=1e-4)


def test_where_tensors_are_kept_changes_no_byte(walked: Callable[..., Solved], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_tensors, "LEAST_BYTES", 0)
    model = mlp()
    found = []
    for memory, share in ((None, 1), (None, 1 << 40), (0.0, 1)):
        monkeypatch.setattr(cut_tensors.device, "SHARE", share)  # 1 << 40: nothing stays on the device
        found.append(walked(model, samples_for(model), True, effort="fast", memory_gb=memory))
    for other in found[1:]:
        for key, solution in found[0].solutions.items():
            assert solution.weight.codes.tobytes() == other.solutions[key].weight.codes.tobytes()
            assert solution.weight.scale.tobytes() == other.solutions[key].weight.scale.tobytes()


def test_numbers_that_are_not_finite_are_told_by_layer_and_sample(walked: Callable[..., Solved]) -> None:
    model = build(
        "g (float[batch, 32] x) => (float[batch, 16] y) { h = MatMul (x, w)  l = Log (h)  y = MatMul (l, v) }",
        {"w": np.abs(weight(32, 16)), "v": weight(16, 16)},
    )
    samples = {"x": np.abs(normal(40, 32))}
    samples["x"][7] *= -1
    with pytest.raises(comq_onnx.ModelError, match="NaN or Inf") as ours:
        walked(model, samples, True, activations="none")
    with pytest.raises(comq_onnx.ModelError) as theirs:
        walked(model, samples, False, activations="none")
    assert str(ours.value) == str(theirs.value)
