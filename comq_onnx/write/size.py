"""Compare the size of a written model with that of its source: quantization is to make a model smaller."""

from __future__ import annotations

import math
from collections.abc import Iterator

from comq_onnx.context import Context
from comq_onnx.errors import ModelError
from comq_onnx.model.float_model import FloatModel
from comq_onnx.write.emit import Emitted

# the number of weights that one line names at most
MOST_NAMED = 3
# a file may grow by so many bytes, of nodes: those of models that have hardly any weights do
TOLERATED_GROWTH = 16_384


def check_smaller(emitted: Emitted, size: int, source: FloatModel, context: Context) -> None:
    """Compare the bytes of a written model, `size`, with those of its source.

    Warns where it is no smaller, or a little larger. Raises ModelError where it is larger by more.
    """
    growth = size - source.file.size
    if growth < 0:
        return
    sizes = f"({size:,} bytes, not {source.file.size:,})"
    layers, stored = emitted.solved.plan.layers, sum(emitted.stored_bytes.values())
    if growth <= TOLERATED_GROWTH:
        before = sum(math.prod(layer.weight_shape) for layer in layers) * (2 if source.is_half else 4)
        context.journal.warnings.append(
            f"the quantized model is not smaller than its source {sizes}: {before:,} bytes of weights became "
            f"{stored:,}, and the new nodes take more than that saves"
        )
        return
    reasons = [*_left_float(emitted)]
    if source.is_half:
        reasons.append("what stays float has become float32")
    why = "; ".join(reasons) or "the new nodes take more than smaller weights save"
    raise ModelError(f"the quantized model is not smaller than its source {sizes}: {why}")


def _left_float(emitted: Emitted) -> Iterator[str]:
    """Say which float weights stay beside their codes, and which weights are left as they are."""
    skipped = emitted.solved.plan.written.skipped
    beside = [f"{name!r} (for {reader!r})" for name, reader in _beside_codes(emitted)]
    if beside:
        yield f"float weights stay beside their codes: {_few(beside)}; --include or --exclude all layers that read them"
    if skipped:
        yield f"{len(skipped)} layers stay float: {_few([f'{name} ({why})' for name, why in skipped.items()])}"


def _beside_codes(emitted: Emitted) -> Iterator[tuple[str, str]]:
    """Yield the float weights of quantized layers that are still read, and the name of a node that reads each."""
    for name in dict.fromkeys(layer.weight for layer in emitted.solved.plan.layers):
        value = emitted.model.graph.initializers.get(name)
        if value is not None and value.uses():
            yield name, str(next(iter(value.uses()))[0].name)


def _few(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
