"""Find the layers that share a weight with an earlier one: it gets the moments of all their inputs.

Its codes are chosen when the first of its layers is reached. What the later ones will read in the quantized model is
not known by then: their inputs in the float model stand in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from comq_onnx.calibrate.stages import Stage
from comq_onnx.model.layers import Layer


def later_readers(parts: Sequence[Stage], key: Callable[[Layer], Hashable]) -> dict[str, list[Layer]]:
    """Return the layers that read other rows with the weight of an earlier layer, by the name of the first of each.

    key: what layers with the same codes have in common
    """
    first: dict[Hashable, Layer] = {}
    later: dict[str, dict[Hashable, Layer]] = {}
    for stage in parts:
        for layer in stage.layers:
            if layer.input in stage.makes:
                continue
            root = first.setdefault(key(layer), layer)
            rows = (layer.input, layer.kind.rows_key())
            if rows != (root.input, root.kind.rows_key()):
                later.setdefault(root.name, {}).setdefault(rows, layer)
    return {name: list(layers.values()) for name, layers in later.items()}
