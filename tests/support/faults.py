"""Make something wrong with m.onnx, its samples or the system, for the tests of error lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from PIL import Image

from comq_onnx.model import prepare as prepare_module
from comq_onnx.runtime import device
from comq_onnx.runtime import session as runtime
from models import build, mlp, normal, samples_for, weight

Setup = Callable[[pytest.MonkeyPatch], None]


def nothing(_: pytest.MonkeyPatch) -> None:
    """Leave the model and samples as they are."""


def model(made: onnx.ModelProto) -> Setup:
    """Write another m.onnx."""
    return lambda _: onnx.save(made, "m.onnx")


def samples(**arrays: np.ndarray) -> Setup:
    """Write another s.npz."""
    return lambda _: np.savez("s.npz", **arrays)


def both(first: onnx.ModelProto, **arrays: np.ndarray) -> Setup:
    """Write another m.onnx and another s.npz; where no arrays are given, samples that fit the model."""

    def write(_: pytest.MonkeyPatch) -> None:
        onnx.save(first, "m.onnx")
        np.savez("s.npz", **(arrays or samples_for(first)))

    return write


def text(name: str, content: str | bytes) -> Setup:
    """Write a file with this content."""
    return lambda _: Path(name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def folder(name: str, **files: object) -> Setup:
    """Make a folder of files: `a_npz` with arrays, `a_png` with a picture of a size, anything else with bytes."""

    def write(_: pytest.MonkeyPatch) -> None:
        Path(name).mkdir()
        for file, content in files.items():
            path = Path(name) / file.replace("_", ".")
            if isinstance(content, dict):
                np.savez(path, **content)
            elif isinstance(content, tuple):
                Image.new("RGB", content).save(path)
            else:
                path.write_bytes(bytes(content))  # type: ignore[call-overload]

    return write


def external(location: str, offset: int = 0, size: int = 4) -> Setup:
    """Write m.onnx with its first weight in external data at `location`, and w.data of `size` bytes."""

    def write(_: pytest.MonkeyPatch) -> None:
        made = mlp()
        tensor = made.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(offset))):
            tensor.external_data.add(key=key, value=value)
        Path("m.onnx").write_bytes(made.SerializeToString())
        if size:
            Path("w.data").write_bytes(bytes(size))

    return write


def raising(module: object, name: str, error: BaseException) -> Setup:
    """Let a function of a module raise an error."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return lambda patch: patch.setattr(module, name, fail)


def before(module: object, name: str, act: Callable[[], object]) -> Setup:
    """Do something right before a function of a module is called."""
    true = getattr(module, name)

    def first(*arguments: object, **options: object) -> object:
        act()
        return true(*arguments, **options)

    return lambda patch: patch.setattr(module, name, first)


def not_finite_weight() -> onnx.ModelProto:
    """Build the MLP with NaN in its first weight."""
    made = mlp()
    made.graph.initializer[0].raw_data = np.full((48, 32), np.nan, np.float32).tobytes()
    return made


def name_in_latin_1() -> Setup:
    """Write m.onnx with an input whose name is Latin-1, not UTF-8."""
    made = mlp().SerializeToString()
    # a byte of its length stands before each name
    return lambda _: Path("m.onnx").write_bytes(made.replace(b"\x01x", b"\x01\xe9")) and None


def no_converter(made: onnx.ModelProto) -> Setup:
    """Write m.onnx, and let no converter raise it to another opset."""

    def write(patch: pytest.MonkeyPatch) -> None:
        onnx.save(made, "m.onnx")
        raising(prepare_module.version_converter, "convert_version", RuntimeError("no adapter"))(patch)

    return write


def no_driver() -> None:
    """Raise what torch raises without a driver."""
    raise RuntimeError("Found no NVIDIA driver\non your system.")


def cuda(packages: dict[str, str] | None = None, torch: object = SimpleNamespace(), gpus: int | None = None) -> Setup:
    """Pretend that ONNX Runtime has CUDA.

    packages: those that bring ONNX Runtime, with versions
    torch: the module, None where it is not installed
    gpus: how many GPUs there are; None asks torch
    """

    def write(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(device, "installed", lambda: packages or {"onnxruntime-gpu": "1.31.0"})
        patch.setattr(runtime, "providers", lambda: [device.CUDA, "CPUExecutionProvider"])
        patch.setattr(device.importlib.util, "find_spec", lambda _: torch)
        patch.setitem(sys.modules, "torch", torch)
        if gpus is not None:
            patch.setattr(device, "_gpus", lambda _: gpus)

    return write


def several(*setups: Setup) -> Setup:
    """Do several things, one after the other."""

    def write(patch: pytest.MonkeyPatch) -> None:
        for setup in setups:
            setup(patch)

    return write


# Models ---------------------------------------------------------------------------------------------------------------

LOG = build(
    "g (float[batch, 32] x) => (float[batch, 16] y) {\n h = MatMul (x, w)\n l = Log (h)\n y = MatMul (l, v) }",
    {"w": weight(32, 16), "v": weight(16, 16)},
)
TOKENS = build(
    "g (int64[batch, 5] ids) => (float[batch, 5, 8] y) {\n e = Gather (t, ids)\n y = MatMul (e, w) }",
    {"t": normal(50, 24), "w": weight(24, 8)},
)
EMPTY = build(
    """g (float[batch, 32] x) => (float[k, 16] y) {
        z = Constant <value_int = 0> ()
        s = Constant <value_ints = [0]> ()
        e = Slice (x, s, s)
        [fc] y = MatMul (e, w)
    }""",
    {"w": weight(32, 16)},
)
BRANCHES = build(
    """g (float[n, 32] x, bool c) => (float[n, 16] y) {
        y = If (c) <
            then_branch = t () => (float[n, 16] a) { [fc] a = MatMul (x, w) },
            else_branch = e () => (float[n, 16] b) { b = Slice (x, s, f, s1) }
        >
    }""",
    {"w": weight(32, 16), "s": np.array([0]), "f": np.array([16]), "s1": np.array([1])},
)
PAIR = build(
    "g (float[2, 32] x, float[3, 32] z) => (float[2, 16] y) {\n a = MatMul (x, w)\n b = MatMul (z, v)\n"
    "c = ReduceSum <keepdims = 0> (b)\n y = Add (a, c) }",
    {"w": weight(32, 16), "v": weight(32, 16)},
)
SEQUENCE = build(
    "g (seq(float[32]) x, float[batch, 32] z) => (int64 y, float[batch, 32] v) {"
    "y = SequenceLength (x)\n v = MatMul (z, w) }",
    {"w": weight(32, 32)},
)
# length 1: no class scores
UNIT = build(
    "g (float[n, 32] x) => (float[n, 16] y) {\n a = MatMul (x, w)\n y = LpNormalization <axis = 1, p = 2> (a) }",
    {"w": weight(32, 16)},
)
NO_INPUTS = build("g () => (float[32, 16] y) {\n r = RandomNormal <shape = [32, 32]> ()\n y = MatMul (r, w) }",
                  {"w": weight(32, 16)})  # fmt: skip
