"""Test how much memory is found, and that too little of it is an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from comq_onnx.runtime import memory


def test_what_is_free_is_part_of_all() -> None:
    total = memory.total()
    assert total is not None
    assert 0 < memory.free() <= total


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("123456789\n")
    monkeypatch.setattr(memory, "_LIMITS", (str(tmp_path / "memory.max"),))
    assert memory.total() == 123456789
    assert memory.free() <= 123456789
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.total() != 123456789


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count other things")
def test_allocations_beyond_the_limit_fail() -> None:
    code = (
        "import numpy as np\nfrom comq_onnx.runtime import memory\nmemory.total = lambda: 1 << 30\nmemory.limit()\n"
        "np.ones(1 << 20)\ntry:\n    np.ones(1 << 28)\nexcept MemoryError:\n    print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count other things")
def test_a_limit_that_is_there_stays() -> None:
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_DATA, (1 << 32, 1 << 33))\n"
        "from comq_onnx.runtime import memory\nmemory.limit()\nprint(resource.getrlimit(resource.RLIMIT_DATA))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"({1 << 32}, {1 << 33})\n", done.stderr
