"""Run the command line in the process of the tests: fixtures for all tests of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from comq_onnx.cli import command
from models import cnn, mlp, samples_for


@dataclass(frozen=True)
class Said:
    """Hold what a run of the command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run `main` in this process with some arguments."""

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["comq-onnx", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            command.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Make a directory with mlp.onnx, cnn.onnx and the samples of both."""
    onnx.save(mlp(), tmp_path / "mlp.onnx")
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    np.savez(tmp_path / "mlp.npz", **samples_for(mlp()))
    np.savez(tmp_path / "cnn.npz", **samples_for(cnn()))
    return tmp_path
