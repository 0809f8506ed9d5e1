"""Run the command in a process of its own, and check the one line of an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from command import Said

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"OMP_NUM_THREADS": "1"}


def in_shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m comq_onnx` in a process of its own."""
    command = [sys.executable, "-m", "comq_onnx", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


def assert_one_line(said: Said, code: int, words: str, folder: Path) -> None:
    """Check that a run ended with one line on stderr that holds `words`, nothing on stdout, and no file in `folder`."""
    assert (said.code, said.out) == (code, "")
    assert len(said.err.splitlines()) == 1
    assert said.err.endswith("\n")
    assert "Traceback" not in said.err
    assert words in said.err
    assert not [p for p in folder.iterdir() if p.name.startswith((".comq", "q.onnx"))]
