"""Run models with onnxruntime-web under Node: WebAssembly, one thread, as a browser runs it.

Needs Node and npm. The package is installed into a folder once (build/web by default) and used from there.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
FOLDER = Path("build/web")
SCRIPT = Path(__file__).with_name("web.mjs")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Ran:
    """Hold what a model did in WebAssembly.

    error: why it does not load or run; "" where it does
    load_ms, times_ms: the milliseconds of loading, and of each run
    outputs: of the first run
    """

    error: str
    load_ms: float = 0.0
    times_ms: tuple[float, ...] = ()
    outputs: Mapping[str, Array] | None = None


def install(folder: Path) -> Path:
    """Return the folder of onnxruntime-web, which npm installs below `folder`. Raises ClickException."""
    package = folder / "node_modules" / PACKAGE
    found = package / "package.json"
    if found.is_file() and json.loads(found.read_text())["version"] == VERSION:
        return package.resolve()
    if not (shutil.which("node") and shutil.which("npm")):
        raise click.ClickException("node and npm are needed (apt-get install nodejs npm), and not found here")
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-save"]
    command = ["npm", "install", *flags, "--prefix", str(folder), f"{PACKAGE}@{VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    if done.returncode or not found.is_file():
        raise click.ClickException(f"npm did not install {PACKAGE} {VERSION}: {done.stderr.strip()[-500:]}")
    return package.resolve()


class Wasm:
    """Run models in one Node process, whose code is optimized once."""

    def __init__(self, package: Path) -> None:
        """Start it; package: the folder of onnxruntime-web."""
        command = ["node", "--no-liftoff", str(SCRIPT), str(package)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self, groups: Sequence[tuple[Sequence[Path], Mapping[str, Array]]], seconds: float = 0.0
    ) -> list[list[Ran]]:
        """Run groups of models, those of a group in turn on the same feeds, each for so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as work:
            out, job = Path(work) / "out.json", Path(work) / "job.json"
            told = [
                {"models": [str(p.resolve()) for p in models], "feeds": _stored(feeds, Path(work), i)}
                for i, (models, feeds) in enumerate(groups)
            ]
            job.write_text(json.dumps({"groups": told, "seconds": seconds, "out": str(out)}))
            self._process.stdin.write(f"{job}\n")
            self._process.stdin.flush()
            while (line := self._process.stdout.readline()) not in ("done\n", ""):
                click.echo(line, err=True, nl=False)
            if not out.is_file():
                raise click.ClickException("Node ended before it was done; what it said stands above")
            return [[_read(one) for one in group] for group in json.loads(out.read_text())]

    def __enter__(self) -> Wasm:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.communicate("")


def _stored(feeds: Mapping[str, Array], work: Path, number: int) -> dict[str, Any]:
    """Write feeds to files, and tell where."""
    stored = {}
    for k, (name, array) in enumerate(feeds.items()):
        path = work / f"{number}_{k}.bin"
        np.ascontiguousarray(array).tofile(path)
        stored[name] = {"type": array.dtype.name, "dims": list(array.shape), "file": str(path)}
    return stored


def _read(one: Mapping[str, Any]) -> Ran:
    if "error" in one:
        return Ran(one["error"])
    outputs = {
        name: np.frombuffer(base64.b64decode(made["data"]), made["type"]).reshape(made["dims"])
        for name, made in one["outputs"].items()
    }
    return Ran("", one["load"], tuple(one["times"]), outputs)
