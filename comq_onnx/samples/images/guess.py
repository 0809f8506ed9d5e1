"""Which preprocessing a model was trained with, as far as the model itself tells."""

from __future__ import annotations

from typing import Any

import numpy as np

from comq_onnx.errors import ComqError
from comq_onnx.samples.images.pixels import geometry, to_input
from comq_onnx.samples.images.preprocess import PREPROCESS, Found, Preprocess
from comq_onnx.samples.samples import AnyArray, Clues, Feeds, ModelInput

TRIED = 8  # pictures, at the most
# ImageNet's mean of pixels 0..255, which models of the first years subtract and leave at that
CENTRED_NAME = "raw --mean 123.675,116.28,103.53"
CENTRED = Preprocess(scale=1.0, mean=(123.675, 116.28, 103.53))
# by how much more the outputs must vary for the other scale
VARIES = 2.0


def guess_preprocess(pictures: AnyArray, info: ModelInput, last: bool | None, clues: Clues) -> Found:
    """The preprocessing of `pictures` [n, height, width, channels] under which the first layers see what they saw in
    training; its origin is empty where nothing in the model tells.

    Where the model has BatchNormalizations their statistics choose among all presets. Folded ones leave biases, which
    tell pixels of 0..255 from those of about -1..1; so does how much the outputs differ from picture to picture, which
    is next to nothing where the biases outweigh the pixels.
    """
    one = geometry(info, Preprocess(), last)[1] == 1
    candidates = {name: how for name, how in PREPROCESS.items() if not (one and len(how.mean) == 3)}
    if not one:
        candidates[CENTRED_NAME] = CENTRED

    def feeds(name: str) -> dict[str, AnyArray]:
        how = candidates[name]
        return {info.name: np.stack([to_input(to_grey(p, info, how, last), info, how, last) for p in pictures[:TRIED]])}

    try:
        if clues.misfit is not None:
            misfits = {name: clues.misfit(feeds(name)) for name in candidates}
            # imagenet and clip are nearly the same: the commoner one, then
            best = next(name for name in candidates if misfits[name] <= 1.2 * min(misfits.values()) + 1e-3)
            return _chosen(candidates, best, "the statistics of the model's BatchNormalizations")
        if clues.balance is not None and clues.run is not None:
            small, large = "imagenet-inception", "raw" if one else CENTRED_NAME
            off = {name: abs(np.log(clues.balance(feeds(name)))) for name in (small, large)}
            best, other = (small, large) if off[small] <= off[large] else (large, small)
            if _variety(clues.run(feeds(other))) > VARIES * _variety(clues.run(feeds(best))):
                best = other
            return _chosen(candidates, best, "the size of the model's first biases and the variety of its outputs")
    except ComqError:  # the model alone cannot tell: it takes other feeds, or other sizes
        pass
    return Found(
        candidates["imagenet-inception"], "", _note("imagenet-inception", "a guess: nothing in the model tells")
    )


def _variety(outputs: Feeds) -> float:
    """The deviation of the outputs from sample to sample over their mean."""
    ratios = [
        float(np.linalg.norm(a.std(axis=0)) / max(float(np.linalg.norm(a.mean(axis=0))), 1e-12))
        for a in outputs.values()
        if isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.ndim
    ]
    return max(ratios, default=0.0)


def _chosen(candidates: dict[str, Preprocess], name: str, why: str) -> Found:
    return Found(candidates[name], name, _note(name, why))


def _note(name: str, why: str) -> str:
    return f"synthetic pictures preprocessed as {name} (by {why}): --preprocess says another"


def to_grey(picture: AnyArray, info: ModelInput, how: Preprocess, last: bool | None) -> AnyArray:
    """A picture [height, width, channels] with one channel where the input has one."""
    if geometry(info, how, last)[1] != 1 or picture.shape[-1] == 1:
        return picture
    # ITU-R BT.601, as Pillow converts
    grey: Any = np.rint(picture @ np.array([0.299, 0.587, 0.114]))
    return np.asarray(grey, np.uint8)[..., None]
