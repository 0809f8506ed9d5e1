"""Show what quantization changed: the weights of the worst layers, and the pictures whose answers became others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from comq_onnx.metrics import OutputComparison
from comq_onnx.report.inputs import is_image, picture
from comq_onnx.solve.layer import error_db

if TYPE_CHECKING:
    import numpy.typing as npt

    from comq_onnx.plan.solved import Solved

# how many layers have their weights shown, and in how many steps of size
WORST, BINS = 4, 40
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
    worst = sorted(solved.solutions, key=lambda name: (-error_db(solved.solutions[name].error), name))[:WORST]
    layers = {layer.name: layer for layer in solved.plan.layers}
    return [
        _histogram(name, solved.plan.written.weight(layers[name]), solved.solutions[name].weight.dequantize())
        for name in worst
        if name in layers
    ]


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
