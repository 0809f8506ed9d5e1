"""Describe the inputs of models as a runtime tells them, for tests that read samples without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Input:
    """Describe an input by its name, type and dimensions (None where free; all None: rank unknown)."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | None, ...] | None


def an_input(*dims: int | None, name: str = "x", dtype: Any = np.float32) -> Input:
    """Make an input of these dimensions, None where free."""
    return Input(name, np.dtype(dtype), dims)


VECTOR = [an_input(None, 32)]
NCHW = [an_input(None, 3, 16, 16, name="image")]
NHWC = [an_input(None, 16, 16, 3, name="image")]
GREY = [an_input(None, 1, 16, 16, name="image")]
IDS = an_input(None, None, name="input_ids", dtype=np.int64)
MASK = an_input(None, None, name="attention_mask", dtype=np.int64)
SEGMENTS = an_input(None, None, name="token_type_ids", dtype=np.int64)
POSITIONS = an_input(None, None, name="position_ids", dtype=np.int64)
BERT = [IDS, MASK, SEGMENTS]
