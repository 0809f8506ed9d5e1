"""Test what a release needs beside `make release`: a typed example that runs, and data that is in the wheel."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from script import run_script

import comq_onnx

ROOT, PACKAGE = Path(__file__).parents[1], Path(comq_onnx.__file__).parent
MODELS = ROOT / "models"


def test_the_typed_example_runs(tmp_path: Path) -> None:
    done = run_script(ROOT / "tests" / "typed" / "example.py", MODELS / "fashion_cnn.onnx", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"Inspection 17 -\d+\.\d+ True 32 \[\] 2\n", done.out)


def test_mypy_checks_the_example() -> None:
    assert 'files = ["comq_onnx", "tests/typed"]' in (ROOT / "pyproject.toml").read_text()


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    text = (ROOT / "pyproject.toml").read_text().split("[tool.setuptools.package-data]")[1].split("\n\n")[0]
    declared = {
        name: re.findall(r'"([^"]+)"', files) for name, files in re.findall(r'^"?([\w.]+)"? = \[(.*)\]', text, re.M)
    }
    files = [
        path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".nbi", ".nbc")
    ]
    assert len(files) >= 5
    for path in files:
        package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        assert any(fnmatch(path.name, pattern) for pattern in declared[package]), path


def test_the_demo_is_a_model_of_the_repository_with_some_of_its_samples() -> None:
    assert (PACKAGE / "cli" / "demo.onnx").read_bytes() == (MODELS / "fashion_cnn.onnx").read_bytes()
    with np.load(PACKAGE / "cli" / "demo.npz") as demo, np.load(MODELS / "fashion_calib.npz") as whole:
        assert np.array_equal(demo["image"], whole["image"][:192])
