"""Test how functions are compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from comq_onnx.solve import compiled


def test_without_a_place_for_compiled_code_kernels_compile_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def njit(cache: bool = False, **_: object) -> Callable[[object], object]:
        asked.append(cache)
        if cache:  # what numba says where neither the package nor the home directory can be written
            raise RuntimeError("cannot cache function 'double': no locator available for file 'double.py'")
        return lambda function: function

    monkeypatch.setattr(compiled.numba, "njit", njit)
    assert compiled.compiled(lambda x: 2 * x)(21) == 42
    assert asked == [True, False]
