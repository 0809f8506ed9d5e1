"""Draw the models and options of sweep.py: one to four blocks, perhaps with skip connections, and a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _sweep_blocks as blocks
import _sweep_parts as parts
import numpy as np
import onnx
from _fuzz_models import Dice
from _sweep_graph import Graph, Value, as_channels, as_sequence, to_half

from comq_onnx.errors import OptionError
from comq_onnx.options.options import Options

Block = Callable[[Graph, Value], Value]
# what a model has at least one of, by the name of its kind
BLOCKS: dict[str, Block] = {
    "conv": blocks.conv, "conv_transpose": blocks.conv_transpose, "gemm": blocks.gemm, "matmul": blocks.matmul,
    "table": blocks.table, "behind": blocks.behind, "degenerate_weight": blocks.degenerate_weight,
    "degenerate_activation": blocks.degenerate_activation, "copies": blocks.copies, "shared": blocks.shared,
    "partial": blocks.partial, "branch": parts.branch, "loop": parts.loop, "scan": parts.scan,
    "recurrent": parts.recurrent, "fused": parts.fused, "attention": parts.attention,
}  # fmt: skip
HEADS: dict[str, Callable[[Graph, Value], None]] = {
    "plain": parts.plain, "boxes": parts.boxes, "selection": parts.selection, "several": parts.several,
}  # fmt: skip
KINDS = (*BLOCKS, "boxes", "selection", "half", "bytes", "loud", "external")
COMMON = ("conv", "conv", "gemm", "matmul", "matmul", "behind", "behind", "attention")
# as many held back as unseen: both tell about the same
SAMPLES, UNSEEN = 192, 64
HIGHEST_OPSET = 24


@dataclass(frozen=True)
class Made:
    """Hold a model, its samples and the options to quantize it with.

    model: the source
    samples, unseen: arrays by input, to calibrate on and others
    batch: the size of its batch; None for any
    selected: the outputs whose rows depend on the data
    external: whether its constants are kept in a file of their own
    traits: what it is made of, in words
    """

    model: onnx.ModelProto
    samples: dict[str, np.ndarray]
    unseen: dict[str, np.ndarray]
    batch: int | None
    selected: frozenset[str]
    options: dict[str, Any]
    external: bool
    traits: tuple[str, ...]


def make(seed: int, kind: str) -> Made:
    """Draw the model of a seed and a kind; raises nothing that its seed does not raise again."""
    dice = Dice(seed, KINDS.index(kind))
    g = Graph(dice)
    g.loud, g.half = kind == "loud", kind == "half"
    v = _first(g, kind)
    drawn = [kind] if kind in BLOCKS else [dice.pick(COMMON)]
    drawn += [dice.pick(BLOCKS if g.chance(0.4) else COMMON) for _ in range(dice.below(4))]
    dice.rng.shuffle(drawn)
    for name in drawn:
        before, v = v, BLOCKS[name](g, v)
        if v.shape == before.shape and g.chance(0.4):
            v = Value(g.op("Add", *((v, before) if g.chance(0.5) else (before, v))), v.shape)
            drawn[drawn.index(name)] += " + skip"
    head = kind if kind in HEADS else dice.pick(("plain", "plain", "plain", *HEADS))
    HEADS[head](g, v)
    opset = dice.pick(range(g.opset, HIGHEST_OPSET + 1))
    free = g.chance(0.2)
    model = g.model(opset, free)
    samples, unseen = g.samples(SAMPLES, 0), g.samples(UNSEEN, 1)
    if kind == "half":
        model = to_half(model)
        samples, unseen = ({n: _half(a) for n, a in arrays.items()} for arrays in (samples, unseen))
    external = kind == "external" or g.chance(0.05)
    options = draw_options(dice, g)
    how = [
        f"opset {opset}",
        f"batch {g.batch or 'any'}",
        *(["odd names"] if g.odd else []),
        *(["free"] if free else []),
    ]
    return Made(
        model, samples, unseen, g.batch, frozenset(g.selected), options, external, (*drawn, head, *g.traits, *how)
    )


def _half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16) if array.dtype == np.float32 else array


def _first(g: Graph, kind: str) -> Value:
    """Begin the model with an input: an image, a sound, a volume, a sequence or a vector."""
    if kind == "bytes":
        return blocks.bytes_input(g)
    shapes = [(3, 12, 12), (8, 8, 8), (16, 24), (12, 32), (8, 24), (4, 4, 6, 6), (32,), (48,)]
    v = g.input("x", *g.dice.pick(shapes))
    if g.loud:
        g.need(17)
        v = as_sequence(g, v) if len(v.shape) < 3 else as_channels(g, v, len(v.shape) - 1)
        width = v.shape[-1]
        hidden = Value(g.op("MatMul", v, g.weight(width, width, fan=width, channels=1)), v.shape)
        v = Value(g.op("LayerNormalization", hidden, g.const(g.normal(width, scale=0.2, mean=1)), axis=-1), v.shape)
    return v


def draw_options(dice: Dice, g: Graph) -> dict[str, Any]:
    """Draw options that are possible together; they differ from the defaults in few or in many ways."""
    while True:
        drawn = _draw(dice)
        try:
            Options(**drawn)
        except OptionError:
            continue
        if g.excluded:
            drawn["exclude"] = tuple(g.excluded)
        return drawn


def _draw(dice: Dice) -> dict[str, Any]:
    bits = dice.pick((8, 8, 8, 4, 4, 4, 3, 2, 5, "auto", "auto", 3.5))
    drawn: dict[str, Any] = {
        "max_samples": SAMPLES - UNSEEN,
        "bits": bits,
        "activations": dice.pick(("auto", "auto", "auto", "none", "8", "8", "16")),
        "granularity": dice.pick(("channel", "channel", "channel", "tensor", "32", "128")),
        "symmetric": dice.pick((True, True, True, False)),
        "target": dice.pick(("ort-cpu", "ort-cpu", "ort-cpu", "ort-cpu", "ort-cuda", "tensorrt", "openvino")),
        "uniform": dice.pick((True, False, False)),
        "cpu": dice.pick(("any", "any", "vnni")),
        "solver": dice.pick(("comq", "comq", "comq", "comq", "rtn", "gptq", "paper")),
    }
    if bits == "auto":
        drawn |= dice.pick(({"max_drop": "20dB"}, {"max_drop": "12dB"}, {"size": "40%"}, {"size": "60%"}))
    # a call that names an option names it because it is not the default
    return {name: value for name, value in drawn.items() if value != getattr(DEFAULTS, name)}


DEFAULTS = Options()
