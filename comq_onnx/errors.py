"""The exceptions of comq_onnx.

    ComqError                what went wrong, what was expected, what to do: one line
    ├── InternalError  (1)   a fault of comq_onnx itself, found before anything was written
    ├── OptionError    (2)   an option or an output path that cannot work
    ├── ModelError     (3)   the model cannot be read, run or quantized
    ├── SamplesError   (4)   the calibration samples do not fit the model
    └── RuntimeFailure (5)   ONNX Runtime is missing or failed
        └── OutOfMemory      there is not enough memory, even for one sample at a time

The number is the exit code of the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for what of `known` is nearest to a mistyped word, else nothing."""
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), list(lower), n=1, cutoff=0.6)
    return f"; did you mean {lower[near[0]]}?" if near else ""


class ComqError(Exception):
    """Base of every error comq_onnx raises on purpose; `exit_code` is the command line's."""

    exit_code = 1


class InternalError(ComqError):
    """A fault of comq_onnx itself, found before anything was written."""


class OptionError(ComqError):
    """An option, or an output path, that cannot work."""

    exit_code = 2


class ModelError(ComqError):
    """The model cannot be read, run or quantized."""

    exit_code = 3


class SamplesError(ComqError):
    """The samples do not fit the model."""

    exit_code = 4


class RuntimeFailure(ComqError):
    """ONNX Runtime is missing, or failed where the model and the samples are not to blame."""

    exit_code = 5


class OutOfMemory(RuntimeFailure):
    """There is not enough memory, even for one sample at a time."""
