"""Define the exceptions of comq_onnx.

    ComqError                what went wrong, what was expected, what to do: one line
    ├── InternalError  (1)   a fault of comq_onnx itself, found before anything was written
    ├── OptionError    (2)   an option or an output path that cannot work
    ├── ModelError     (3)   the model cannot be read, run or quantized
    │   └── NothingToQuantize    it has no layer to quantize
    ├── SamplesError   (4)   the calibration samples do not fit the model
    └── RuntimeFailure (5)   ONNX Runtime is missing or failed
        └── OutOfMemory      there is not enough memory, even for one sample at a time

The number is the exit code of the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the word of `known` that is nearest to a mistyped one, or nothing."""
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), list(lower), n=1, cutoff=0.6)
    return f"; did you mean {lower[near[0]]}?" if near else ""


class ComqError(Exception):
    """Report an error that comq_onnx raises on purpose, the base of all.

    exit_code: the exit code of the command line
    """

    exit_code = 1


class InternalError(ComqError):
    """Report a fault of comq_onnx itself, found before anything was written."""


class OptionError(ComqError):
    """Report an option or an output path that cannot work."""

    exit_code = 2


class ModelError(ComqError):
    """Report a model that cannot be read, run or quantized."""

    exit_code = 3


class NothingToQuantize(ModelError):
    """Report a model that has no layer to quantize."""


class SamplesError(ComqError):
    """Report samples that do not fit the model."""

    exit_code = 4


class RuntimeFailure(ComqError):
    """Report that ONNX Runtime is missing, or failed where the model and the samples are not to blame."""

    exit_code = 5


class OutOfMemory(RuntimeFailure):
    """Report that there is not enough memory, even for one sample at a time."""
