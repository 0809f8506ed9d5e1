"""Kill comq-onnx at random moments and let everything around it fail: the source stays as it was, nothing partial is
left.

    python tools/check/kills.py [--kills 50] [--seed 0] [--faults WORDS | --no-faults]

Kills: a run is killed (SIGKILL) at a random moment of the processor time that a whole one takes, which is the same
however busy the machine is. It is a process forked when everything is imported: what it holds on disk begins behind
that. Then the source has its bytes, the output is absent or
complete (the bytes that an undisturbed run gives), what else is left are private work directories, and a new run in the
same place removes those and gives the same bytes.

Faults: full disks, directories that cannot be written, files that vanish or are damaged between two steps, too little
memory, signals. Each must end in one clear line with nothing left, or in the right bytes. Full and read-only disks are
small mounts, and permissions hold for root only without its capabilities: where mount or setpriv cannot be had, those
points are said to be skipped. Exits with 1 where anything else happened.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import click
import numpy as np
import onnx
from _sandbox import Said, command_line, quickly, table
from onnx import helper, numpy_helper

ROOT = Path(__file__).parents[2]
MODEL, SAMPLES = ROOT / "models" / "fashion_cnn.onnx", ROOT / "models" / "fashion_calib.npz"
# everything spills to disk, so that there is something to leave behind
OPTIONS = ("--samples", "48", "--effort", "fast", "--memory", "0", "--device", "cpu")
SECONDS = 600
UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", "--")
# runs before the command line, to make a fault happen between two steps
HOOK = """
import os, sys
from pathlib import Path
from comq_onnx import calibrate, cli, graph, pipeline
folder = Path({folder!r})
def before(module, name, action):
    true = getattr(module, name)
    def first(*arguments, **options):
        action()
        return true(*arguments, **options)
    setattr(module, name, first)
{hook}
sys.argv = ["comq-onnx", *sys.argv[1:]]
cli.main()
"""


@dataclass
class Place:
    """A folder of its own for one run: the model, samples, and a directory for temporary files."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.folder / "in" / "model.onnx"

    @property
    def samples(self) -> Path:
        return self.folder / "in" / "samples.npz"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def out(self) -> Path:
        return self.folder / "out" / "q.onnx"

    def command(self, *extra: object) -> list[str]:
        """The command line."""
        arguments = [self.model, "--calib", self.samples, "-o", self.out, *OPTIONS, *extra]
        return [sys.executable, "-m", "comq_onnx", *map(str, arguments)]

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        """Begin a run."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary), **self.environment}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
            # a shell has jobs in the background ignore it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def run(self, command: list[str]) -> Said:
        """A whole run."""
        process = self.start(command)
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Said(-1, "", f"no end after {SECONDS} s")
        return Said(process.returncode, out, err)

    def fork(self) -> BaseProcess:
        """Begin a run in a process that has everything imported."""
        process = multiprocessing.get_context("fork").Process(target=self._inside)
        process.start()
        return process

    def _inside(self) -> None:
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)
        said = command_line(*self.command()[3:])
        self.said.write_text(said.err)
        os._exit(said.code)

    @property
    def said(self) -> Path:
        """Where a forked run leaves what it printed as errors."""
        return self.folder / "said.txt"

    def left(self) -> list[str]:
        """What lies beside the inputs and the output."""
        found = [*self.out.parent.iterdir(), *self.temporary.iterdir()] if self.out.parent.is_dir() else []
        return sorted(str(p.relative_to(self.folder)) for p in found if p != self.out)


@contextmanager
def place() -> Iterator[Place]:
    """A fresh folder."""
    with tempfile.TemporaryDirectory() as work:
        made = Place(Path(work))
        for name in ("in", "tmp", "out"):
            (made.folder / name).mkdir()
        shutil.copy(MODEL, made.model)
        shutil.copy(SAMPLES, made.samples)
        yield made


def digest(path: Path) -> str | None:
    """The SHA-256 of a file; None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


# Kills


def kill_at(moment: float, wanted: str) -> str:
    """Kill a run after `moment` seconds of processor time; what is wrong afterwards, or how far it was."""
    with place() as here:
        before = digest(here.model), digest(here.samples)
        process = here.fork()
        while process.is_alive() and _processor_seconds(process) < moment:
            time.sleep(0.002)
        process.kill()
        process.join()
        if (digest(here.model), digest(here.samples)) != before:
            return "wrong: the source has other bytes"
        if digest(here.out) not in (None, wanted):
            return "wrong: a partial output"
        left = [here.folder / name for name in here.left()]
        if bad := [p.name for p in left if not p.name.startswith(".comq-") or p.stat().st_mode & 0o77]:
            return f"wrong: {bad} left, or readable by others"
        for directory in left:  # as if they had lain for a while
            os.utime(directory, (0, 0))
        done = "finished" if digest(here.out) else "work left" if left else "nothing left"
        process = here.fork()
        process.join()
        if process.exitcode or digest(here.out) != wanted:
            return f"wrong: a new run ends with {process.exitcode} {here.said.read_text()}"
        if here.left():
            return f"wrong: {here.left()} left after a new run"
        return done


def _processor_seconds(process: BaseProcess) -> float:
    """What a process has taken so far."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it is over
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Faults


@dataclass(frozen=True)
class Fault:
    """One point of failure. run: makes it happen; the words that its line must hold (none: it comes out right)."""

    name: str
    run: Callable[[Place], Said]
    words: tuple[str, ...]
    needs: str = ""


def hooked(hook: str, *extra: object) -> Callable[[Place], Said]:
    """A run in which Python code makes something happen first."""

    def run(here: Place) -> Said:
        code = HOOK.format(folder=str(here.folder), hook=hook)
        return here.run([sys.executable, "-c", code, *here.command(*extra)[3:]])

    return run


def limited(limit: str, size: int, *extra: object) -> Callable[[Place], Said]:
    """A run under a resource limit."""

    def run(here: Place) -> Said:
        code = f"import resource; resource.setrlimit(resource.{limit}, ({size}, {size}))\n"
        code += HOOK.format(folder=str(here.folder), hook="")
        return here.run([sys.executable, "-c", code, *here.command(*extra)[3:]])

    return run


def on_a_disk(which: str, options: str) -> Callable[[Place], Said]:
    """A run with one of its directories on a small mount of its own."""

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
    """A run by somebody who obeys permissions."""

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
    """A run from a package that cannot be written, without a home."""
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
    """A run that is asked to end when it calibrates."""

    def run(here: Place) -> Said:
        process = here.start(here.command())
        while process.poll() is None and not any(here.temporary.rglob("cut*.npy")):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=SECONDS)
        return Said(process.returncode, out, err)

    return run


def external(here: Place) -> None:
    """Move the weights into a file of their own."""
    onnx.save(onnx.load(here.model), here.model, save_as_external_data=True, location="weights.bin", size_threshold=0)


def with_external(hook: str) -> Callable[[Place], Said]:
    """A hooked run of a model with external data."""

    def run(here: Place) -> Said:
        external(here)
        return hooked(hook)(here)

    return run


def large_activations(gigabytes: float) -> Callable[[Place], Said]:
    """A model whose segments take 1 GB for each 8 samples, in a process that may have less."""

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
          hooked(f"before(pipeline, 'specialize', lambda: {UNLINK.format('model.onnx')})"), ("model.onnx",)),
    Fault("model vanishes before it is prepared",
          hooked(f"before(pipeline, 'check_source', lambda: {UNLINK.format('model.onnx')})"), ("model.onnx",)),
    Fault("samples vanish before they are read",
          hooked(f"before(pipeline, 'load_samples', lambda: {UNLINK.format('samples.npz')})"), ("samples.npz",)),
    Fault("external data vanishes after it was checked",
          with_external(f"before(pipeline, 'check_source', lambda: {UNLINK.format('weights.bin')})"), ("weights.bin",)),
    Fault("external data cut off after it was checked",
          with_external("before(pipeline, 'check_source', lambda: os.truncate(folder / 'in' / 'weights.bin', 100))"),
          ("model.onnx",)),
    Fault("external data cut off while calibrating",
          with_external("before(pipeline, 'walk', lambda: os.truncate(folder / 'in' / 'weights.bin', 100))"),
          ("weights.bin", "changed")),
    Fault("external data overwritten while calibrating",
          with_external("data = folder / 'in' / 'weights.bin'\n"
                        "before(pipeline, 'walk', lambda: data.write_bytes(bytes(data.stat().st_size)))"),
          ("weights.bin", "changed")),
    Fault("model overwritten with bad bytes after it was checked",
          hooked("before(pipeline, 'check_source', lambda: (folder / 'in' / 'model.onnx').write_bytes(b'bad' * 999))"),
          ("model.onnx",)),
    Fault("output directory vanishes",
          hooked("import shutil; before(pipeline, 'walk', lambda: shutil.rmtree(folder / 'out'))"), ("No such file",)),
    Fault("output becomes a directory",
          hooked("before(pipeline, 'walk', lambda: (folder / 'out' / 'q.onnx').mkdir())"), ("Is a directory",)),
    Fault("spilled tensors cannot be written",
          hooked("import errno\ndef full(*_): raise OSError(errno.ENOSPC, 'No space left on device')\n"
                 "calibrate.np.save = full"), ("No space left", "TMPDIR")),
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
    """What is wrong after a fault; `right` or the line it was told in where nothing is."""
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


@click.command()
@click.option("--kills", default=50, show_default=True, help="How many runs are killed.")
@click.option("--seed", default=0, show_default=True, help="Another seed gives other moments.")
@click.option("--faults", metavar="WORDS", default="", help="Only the faults whose name holds this.")
@click.option("--no-faults", is_flag=True, help="Only kill.")
def main(kills: int, seed: int, faults: str, no_faults: bool) -> None:
    """Kill comq-onnx and make everything around it fail."""
    failed = False
    if kills:
        failed = not _kill(kills, seed)
    rows = []
    for fault in FAULTS:
        if faults in fault.name and not no_faults:
            found = check(fault)
            click.echo(f"{fault.name}: {found}", err=True)
            failed |= found.startswith("wrong")
            rows.append((fault.name, found.replace("|", "/").replace("\n", " ")))
    if rows:
        click.echo(table(("fault", "what came of it"), rows))
    sys.exit(failed)


def _kill(kills: int, seed: int) -> bool:
    quickly()
    with place() as here:
        said = here.run(here.command())
        wanted = digest(here.out)
        if said.code or wanted is None:
            click.echo(f"an undisturbed run fails: {said.err}", err=True)
            return False
    with place() as here:
        before = _children_seconds()
        here.fork().join()
        whole = _children_seconds() - before
    found = []
    for number, moment in enumerate(np.random.default_rng(seed).uniform(0, 1.05 * whole, kills), 1):
        found.append(kill_at(moment, wanted))
        click.echo(f"kill {number} at {moment:.2f} s: {found[-1]}", err=True)
    kinds = ("nothing left", "work left", "finished")
    counts = [(f"killed, {kind}" if kind != "finished" else "was done before", found.count(kind)) for kind in kinds]
    wrong = sum(f not in kinds for f in found)
    click.echo(f"{kills} kills within {1.05 * whole:.1f} s of processor time\n")
    click.echo(table(("what", "runs"), [*counts, ("anything else", wrong)]) + "\n")
    return not wrong


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
