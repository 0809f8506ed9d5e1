"""Make everything around a run fail, one fault at a time: the points of failure that kills.py checks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from _place import ROOT, SECONDS, Place, place
from _sandbox import Said
from onnx import helper, numpy_helper

UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", "--")
# the functions that a fault can come before: where each is called from, and its name there
STEPS = {
    "check the source": "comq_onnx.model.float_model:check_source",
    "load the samples": "comq_onnx.samples.dataset:load_samples",
    "specialize": "comq_onnx.plan.make:specialize",
    "calibrate": "comq_onnx.bits.choose:walk",
}
# runs before the command line, to make a fault happen between two steps
HOOK = """
import atexit, os, sys
from importlib import import_module
from pathlib import Path
from comq_onnx.calibrate import cut_tensors
from comq_onnx.cli import command as cli
folder = Path({folder!r})
steps = {steps!r}
def before(step, action):
    place, name = steps[step].split(":")
    module = import_module(place)
    true, calls = getattr(module, name), []
    def first(*arguments, **options):
        calls.append(step)
        action()
        return true(*arguments, **options)
    setattr(module, name, first)
    # a step that is called by another name by now would let the fault pass in silence
    atexit.register(lambda: calls or print(f"nothing calls {{steps[step]}}", file=sys.stderr))
{hook}
sys.argv = ["comq-onnx", *sys.argv[1:]]
cli.main()
"""


@dataclass(frozen=True)
class Fault:
    """Describe one point of failure.

    run: runs the command line and makes the fault happen
    words: what the error line must hold; none: the result is right in spite of the fault
    needs: the program without which the fault cannot be made
    """

    name: str
    run: Callable[[Place], Said]
    words: tuple[str, ...]
    needs: str = ""


def hooked(hook: str, *extra: object) -> Callable[[Place], Said]:
    """Make a run in which Python code makes something happen first."""

    def run(here: Place) -> Said:
        code = HOOK.format(folder=str(here.folder), steps=STEPS, hook=hook)
        return here.run([sys.executable, "-c", code, *here.command(*extra)[3:]])

    return run


def limited(limit: str, size: int, *extra: object) -> Callable[[Place], Said]:
    """Make a run under a resource limit."""

    def run(here: Place) -> Said:
        code = f"import resource; resource.setrlimit(resource.{limit}, ({size}, {size}))\n"
        code += HOOK.format(folder=str(here.folder), steps=STEPS, hook="")
        return here.run([sys.executable, "-c", code, *here.command(*extra)[3:]])

    return run


def on_a_disk(which: str, options: str) -> Callable[[Place], Said]:
    """Make a run with one of its directories on a small mount of its own."""

    def run(here: Place) -> Said:
        directory = here.folder / which
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)
        try:
            said = here.run(here.command())
            left = [] if "ro" in options.split(",") else list(directory.iterdir())
            return said if not left else Said(-1, "", f"{left} left")
        finally:
            subprocess.run(["umount", str(directory)], check=True)

    return run


def without_permission(which: str, mode: int, **environment: str) -> Callable[[Place], Said]:
    """Make a run as a user whom permissions bind; `mode` is that of the path `which`."""

    def run(here: Place) -> Said:
        here.environment |= environment
        target = here.folder / which
        target.chmod(mode)
        try:
            return here.run([*UNPRIVILEGED, *here.command()])
        finally:
            target.chmod(0o700)

    return run


def uncached(here: Place) -> Said:
    """Run from a package that cannot be written, without a home directory."""
    package = here.folder / "package"
    shutil.copytree(ROOT / "comq_onnx", package / "comq_onnx", ignore=shutil.ignore_patterns("__pycache__"))
    here.environment |= {"PYTHONPATH": str(package), "HOME": "/proc/nowhere", "PYTHONDONTWRITEBYTECODE": "1"}
    for path in [package, *package.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        return here.run([*UNPRIVILEGED, *here.command()])
    finally:
        for path in [package, *package.rglob("*")]:
            path.chmod(0o755)


def signalled(number: int) -> Callable[[Place], Said]:
    """Make a run that gets a signal while it calibrates."""

    def run(here: Place) -> Said:
        process = here.start(here.command())
        while process.poll() is None and not any(here.temporary.rglob("cut*.npy")):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=SECONDS)
        return Said(process.returncode, out, err)

    return run


def external(here: Place) -> None:
    """Move the weights of the model into a file of their own."""
    onnx.save(onnx.load(here.model), here.model, save_as_external_data=True, location="weights.bin", size_threshold=0)


def with_external(hook: str) -> Callable[[Place], Said]:
    """Make a run like `hooked`, of a model with external data."""

    def run(here: Place) -> Said:
        external(here)
        return hooked(hook)(here)

    return run


def large_activations(gigabytes: float) -> Callable[[Place], Said]:
    """Make a run of a model whose segments take 1 GB for each 8 samples, in a process that may have less."""

    def run(here: Place) -> Said:
        weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) / 8
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
            helper.make_node("Expand", ["h", "size"], ["e"]),
            helper.make_node("Tanh", ["e"], ["t"]),
            helper.make_node("ReduceMean", ["t", "axis"], ["m"], keepdims=0),
            helper.make_node("MatMul", ["m", "w"], ["y"], "second"),
        ]
        shape = onnx.TensorProto.FLOAT, ["n", 1, 64]
        graph = helper.make_graph(
            nodes, "large", [helper.make_tensor_value_info("x", *shape)],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 64])],
            [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([1, 1 << 19, 1]), "size"),
             numpy_helper.from_array(np.array([1]), "axis")],
        )  # fmt: skip
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), here.model)
        np.savez(here.samples, x=np.random.default_rng(1).standard_normal((48, 1, 64)).astype(np.float32))
        return limited("RLIMIT_DATA", int(gigabytes * 1e9))(here)

    return run


UNLINK = "(folder / 'in' / {!r}).unlink()"
FAULTS = (
    Fault("disk of temporary files full", on_a_disk("tmp", "size=64k"), ("TMPDIR",), "mount"),
    Fault("disk of temporary files full later", on_a_disk("tmp", "size=4m"), ("TMPDIR",), "mount"),
    Fault("disk of the output full", on_a_disk("out", "size=64k"), ("No space left", "q.onnx"), "mount"),
    Fault("disk of the output has no room for a file", on_a_disk("out", "nr_inodes=1"), ("No space left",), "mount"),
    Fault("output on a read-only disk", on_a_disk("out", "ro"), ("Read-only",), "mount"),
    Fault("temporary files on a read-only disk", on_a_disk("tmp", "ro"), (), "mount"),
    Fault("output directory without permission", without_permission("out", 0o500), ("Permission denied",), "setpriv"),
    Fault("model without permission", without_permission("in/model.onnx", 0o0), ("not readable",), "setpriv"),
    Fault("samples without permission", without_permission("in/samples.npz", 0o0), ("not readable",), "setpriv"),
    Fault("package and home without permission", uncached, (), "setpriv"),
    Fault("files limited to 64 kB", limited("RLIMIT_FSIZE", 1 << 16), ("TMPDIR",)),
    Fault("model vanishes after it was read",
          hooked(f"before('specialize', lambda: {UNLINK.format('model.onnx')})"), ("model.onnx",)),
    Fault("model vanishes before it is prepared",
          hooked(f"before('check the source', lambda: {UNLINK.format('model.onnx')})"), ("model.onnx",)),
    Fault("samples vanish before they are read",
          hooked(f"before('load the samples', lambda: {UNLINK.format('samples.npz')})"), ("samples.npz",)),
    Fault("external data vanishes after it was checked",
          with_external(f"before('check the source', lambda: {UNLINK.format('weights.bin')})"), ("weights.bin",)),
    Fault("external data cut off after it was checked",
          with_external("before('check the source', lambda: os.truncate(folder / 'in' / 'weights.bin', 100))"),
          ("model.onnx",)),
    Fault("external data cut off while calibrating",
          with_external("before('calibrate', lambda: os.truncate(folder / 'in' / 'weights.bin', 100))"),
          ("weights.bin", "changed")),
    Fault("external data overwritten while calibrating",
          with_external("data = folder / 'in' / 'weights.bin'\n"
                        "before('calibrate', lambda: data.write_bytes(bytes(data.stat().st_size)))"),
          ("weights.bin", "changed")),
    Fault("model overwritten with bad bytes after it was checked",
          hooked("before('check the source', lambda: (folder / 'in' / 'model.onnx').write_bytes(b'bad' * 999))"),
          ("model.onnx",)),
    Fault("output directory vanishes",
          hooked("import shutil; before('calibrate', lambda: shutil.rmtree(folder / 'out'))"), ("No such file",)),
    Fault("output becomes a directory",
          hooked("before('calibrate', lambda: (folder / 'out' / 'q.onnx').mkdir())"), ("Is a directory",)),
    Fault("spilled tensors cannot be written",
          hooked("import errno\ndef full(*_): raise OSError(errno.ENOSPC, 'No space left on device')\n"
                 "cut_tensors.np.save = full"), ("No space left", "TMPDIR")),
    Fault("hardly more memory than the libraries take",
          hooked("import resource\nheld = Path('/proc/self/status').read_text().split('VmData:')[1].split()[0]\n"
                 "most = (int(held) << 10) + (24 << 20)\nresource.setrlimit(resource.RLIMIT_DATA, (most, most))"),
          ("memory",)),
    Fault("less memory than batches of 16 take", large_activations(1.7), ()),
    Fault("less memory than one sample takes", large_activations(0.4), ("even for one sample",)),
    Fault("Ctrl-C", signalled(signal.SIGINT), ("interrupted",)),
    Fault("SIGTERM", signalled(signal.SIGTERM), ("stopped",)),
)  # fmt: skip


def check(fault: Fault) -> str:
    """Make a fault happen and tell what is wrong afterwards; where nothing is, `right` or the error line."""
    if fault.needs and not _possible(fault.needs):
        return f"skipped: {fault.needs} cannot be had here"
    with place() as here:
        said = fault.run(here)
        left = [n for n in here.left() if not n.startswith("out/q.onnx")]
        if left:
            return f"wrong: {left} left; {said.err}"
        if not fault.words:
            return "right" if said.code == 0 and here.out.is_file() else f"wrong: {said.code} {said.err}"
        lines = said.err.strip().splitlines()
        clear = said.code in (2, 3, 4, 5, 130, 143) and len(lines) == 1 and lines[0].startswith("comq-onnx: ")
        if not clear or not all(words in said.err for words in fault.words) or here.out.is_file():
            return f"wrong: {said.code} {said.err[-1500:]}"
        return lines[0].replace(str(here.folder), "")


def _possible(tool: str) -> bool:
    command = ["setpriv", "--version"] if tool == "setpriv" else ["mount", "--version"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return os.geteuid() == 0
