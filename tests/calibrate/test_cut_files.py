"""Test tensors at a cut that lie in files: what was read of them does not stay in memory, and the files vanish."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np

from comq_onnx.calibrate.cut_tensors import Host


def resident_kb(path: Path) -> int:
    """Return how much of a mapped file lies in the memory of this process, in kB."""
    total, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_what_was_read_of_a_file_is_given_back(tmp_path: Path) -> None:
    host = Host(0, tmp_path)
    arrays = [np.random.default_rng(i).normal(size=1 << 18) for i in range(3)]
    kept = [host.keep(array) for array in arrays]
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 3
    sums = []
    for one in host.ahead(3, lambda i: kept[i]):
        sums.append(float(one.sum()))
        assert resident_kb(paths[len(sums) - 1]) >= 2048
        # those before it
        assert all(resident_kb(path) == 0 for path in paths[: len(sums) - 1])
    assert sums == [float(array.sum()) for array in arrays]
    # they can be read again
    assert all(np.array_equal(a, b) for a, b in zip(kept, arrays, strict=True))


def test_files_vanish_with_their_arrays(tmp_path: Path) -> None:
    host = Host(0, tmp_path)
    kept = [host.keep(np.zeros(1 << 18)) for _ in range(2)]
    del kept[0]
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    assert list(host.ahead(1, lambda _: 7)) == [7]
    kept.clear()
    gc.collect()
    assert not list(tmp_path.iterdir())
