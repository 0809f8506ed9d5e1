"""Compile functions with numba; the compiled code is cached beside the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F, *reordering: str) -> F:
    """Compile a function without Python's lock; sums keep their order unless `reordering` flags of LLVM are given."""
    # nnan and nsz let a maximum be vectorized
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"nnan", "nsz", *reordering}}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # nowhere to keep it: a package nobody may write to, and no home
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


def compiled_reordered(function: F) -> F:
    """Compile a function whose sums the compiler may reorder, so that they are vectorized."""
    return compiled(function, "reassoc", "contract")
