"""Tell where a model computes other outputs at ONNX Runtime's default optimization level than as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from comq_onnx.context import Context
from comq_onnx.errors import ModelError, RuntimeFailure
from comq_onnx.evaluate.outputs import QUANTIZED, Compared, Failure
from comq_onnx.metrics import OutputComparison
from comq_onnx.model.judged import without_caches
from comq_onnx.runtime.session import Session

# an output with a lower SQNR is hardly of use; few bits may cost that much, but never without a warning
LEAST_DB = 5.0
# what ONNX Runtime's optimizations may change of an output's SQNR before it is said, and an SQNR above which
# differences are those of float32 sums
SAME_DB, MOST_DB = 1.0, 60.0


def other_level(path: Path, context: Context) -> Session | Failure:
    """Load a quantized model the other way than for its target: by default, or as it is written where that is default.

    Returns the error where ONNX Runtime's default optimizations, which the target does not need, cannot load it.
    """
    if not context.target.runs_outside_ort:
        return Session(path, context.device, what=QUANTIZED, disable_qdq_fusion=True, small=True)
    try:
        return Session(path, context.device, what=QUANTIZED)
    except (ModelError, RuntimeFailure) as error:
        return error


def warn_of_levels(
    compared: Compared, other: Compared | Failure, exactly: Callable[[], Compared], context: Context
) -> None:
    """Say where a model gives other outputs as it is written than at ONNX Runtime's default optimization level.

    compared: how near they are as the target computes them
    other: how near they are with the session of `other_level`, or its error
    exactly: compares the model at the default level with float activations of weight-only products

    Optimizations that fuse integers may change what a model computes; rounding the inputs of weight-only products to 8
    bits is what ONNX Runtime's CPU does by default.
    """
    journal, outside = context.journal, context.target.runs_outside_ort
    if isinstance(other, Failure):
        if not outside:
            raise other
        journal.warnings.append(f"ONNX Runtime's default optimizations fail on the quantized model: {other}")
        return
    written, default = (compared, other) if outside else (other, compared)
    apart = _apart(written.outputs, default.outputs)
    if not apart:
        return
    if _apart(written.outputs, exactly().outputs):
        journal.warnings.append(
            f"ONNX Runtime's optimizations change what the quantized model computes (SQNR {apart}): judge it on its "
            "own runtime, or set session.disable_quant_qdq=1"
        )
    else:
        journal.notes.append(
            f"ONNX Runtime's CPU rounds the inputs of weight-only products to 8 bits: {apart}; the session option "
            "session.qdq_matmulnbits_accuracy_level=1 keeps them float"
        )


def _apart(written: Sequence[OutputComparison], default: Sequence[OutputComparison]) -> str:
    """Name the outputs whose SQNR is another as written than by default, with both figures; "" where there are none."""
    pairs = list(zip(without_caches(written), without_caches(default), strict=True))
    return ", ".join(
        f"{one.name} {one.sqnr_db:.1f} dB as written, {other.sqnr_db:.1f} dB by default"
        for one, other in pairs
        # outputs that are noise in both differ by chance
        if max(one.sqnr_db, other.sqnr_db) >= LEAST_DB
        and not abs(min(one.sqnr_db, MOST_DB) - min(other.sqnr_db, MOST_DB)) <= SAME_DB
    )
