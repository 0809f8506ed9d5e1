"""Show what quantization changed: the weights of the worst layers, and the pictures whose answers became others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from comq_onnx.metrics import OutputComparison
from comq_onnx.report.inputs import is_image, picture

if TYPE_CHECKING:
    import numpy.typing as npt

    from comq_onnx.model.layers import Layer
    from comq_onnx.plan.solved import Solved

# how many layers have their weights shown, and in how many steps of size
WORST, BINS = 4, 40
# weights are counted of every second, third, ... channel or group where there are more; a layer that has far more is
# left out, since its weights would be in memory once more
MOST_COUNTED, MOST_READ = 1 << 21, 1 << 25
# how many answers are shown
MOST_ANSWERS = 12


@dataclass(frozen=True)
class WeightHistogram:
    """Count the weights of a layer by size, before and after.

    edges: the ends of the steps of size, one more than there are counts
    before, after: how many weights lie in each step
    """

    name: str
    edges: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class ChangedAnswer:
    """Describe a sample whose best class is another in the quantized model.

    output: the name of the output
    sample: its place among the samples held back
    before, after: the best class in both models
    picture: the sample, as a data URI of PNG; "" in a report from JSON
    """

    output: str
    sample: int
    before: int
    after: int
    picture: str = ""


def worst_weights(solved: Solved) -> list[WeightHistogram]:
    """Count the weights of the layers that lose most, the worst first."""
    layers = {x.name: x for x in solved.plan.layers if math.prod(x.weight_shape) <= MOST_READ}
    known = [name for name in solved.solutions if name in layers]
    worst = sorted(known, key=lambda name: (-solved.solutions[name].error, name))[:WORST]
    return [_of_layer(layers[name], solved) for name in worst]


def _of_layer(layer: Layer, solved: Solved) -> WeightHistogram:
    """Count the weights of one layer."""
    before = solved.plan.written.weight(layer)
    some, every = slice(None, None, -(-before.size // MOST_COUNTED)), slice(None)
    groups, channels = (some, every) if len(before) > 1 else (every, some)
    after = solved.solutions[layer.name].weight.part(groups, channels).dequantize()
    return _histogram(layer.name, before[groups, channels], after)


def _histogram(name: str, before: npt.NDArray[Any], after: npt.NDArray[Any]) -> WeightHistogram:
    edges = np.linspace(*_ends(before, after), BINS + 1)
    counts = [np.histogram(weights, edges)[0] for weights in (before, after)]
    return WeightHistogram(name, tuple(map(float, edges)), *(tuple(map(int, one)) for one in counts))


def _ends(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> tuple[float, float]:
    """Return the least and the greatest weight of both."""
    low, high = min(float(before.min()), float(after.min())), max(float(before.max()), float(after.max()))
    return (low, high) if high > low else (low - 1, high + 1)


def changed_answers(
    outputs: Sequence[OutputComparison], samples: Mapping[str, npt.NDArray[Any]]
) -> list[ChangedAnswer]:
    """Show the samples whose best class changed, where one input is a picture."""
    images = next((array for array in samples.values() if is_image(array)), None)
    if images is None:
        return []
    found = [
        ChangedAnswer(output.name, row, before, after, picture(images[row]))
        for output in outputs
        for row, before, after in output.changed
        if row < len(images)
    ]
    return found[:MOST_ANSWERS]
