"""Guess the preprocessing that a model was trained with, as far as the model itself tells."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from comq_onnx.errors import ComqError
from comq_onnx.samples.images.pixels import geometry, to_input
from comq_onnx.samples.images.preprocess import PREPROCESS, Found, Preprocess
from comq_onnx.samples.samples import AnyArray, Clues, Feeds, ModelInput

PLAIN_NAME = "imagenet-inception"  # pixels of -1..1, for all channels alike
TRIED = 8  # pictures to guess by, at most
# the mean of ImageNet's pixels 0..255: early models subtract it and do no more
CENTRED_NAME = "raw --mean 123.675,116.28,103.53"
CENTRED = Preprocess(scale=1.0, mean=(123.675, 116.28, 103.53))
# the outputs of the other scale must vary by this factor more for it to be chosen
VARIETY_RATIO = 2.0


def guess_preprocess(pictures: AnyArray, info: ModelInput, last: bool | None, clues: Clues) -> Found:
    """Find the preprocessing with which the first layers see what they saw in training.

    pictures: [n, height, width, channels]
    last: whether the graph shows NHWC; None where it does not tell

    Where the model has BatchNormalizations, their statistics choose among all presets. Folded BatchNormalizations leave
    biases, which tell pixels of 0..255 from those of about -1..1. So does the difference of the outputs from picture to
    picture: it is next to nothing where the biases outweigh the pixels. The origin of the answer is empty where nothing
    in the model tells.
    """
    grey = geometry(info, Preprocess(), last)[1] == 1
    candidates = {name: c for name, c in PREPROCESS.items() if not (grey and len(c.mean) == 3)}
    if not grey:
        candidates[CENTRED_NAME] = CENTRED

    def feeds(name: str) -> Feeds:
        preprocess = candidates[name]
        grey_or_not = (to_grey(p, info, preprocess, last) for p in pictures[:TRIED])
        return {info.name: np.stack([to_input(p, info, preprocess, last) for p in grey_or_not])}

    name, reason = None, ""
    try:
        if clues.misfit is not None:
            name = _choose_by_misfit(candidates, clues.misfit, feeds)
            reason = "the statistics of the model's BatchNormalizations"
        elif clues.balance is not None and clues.run is not None:
            name = _choose_by_scale("raw" if grey else CENTRED_NAME, clues.balance, clues.run, feeds)
            reason = "the size of the model's first biases and the variety of its outputs"
    except ComqError:  # the model takes other feeds, or other sizes, so it cannot tell
        pass
    if name is None:
        return Found(candidates[PLAIN_NAME], "", _note(PLAIN_NAME, "a guess: nothing in the model tells"))
    return Found(candidates[name], name, _note(name, reason))


def _choose_by_misfit(
    candidates: Iterable[str], misfit: Callable[[Feeds], float], feeds: Callable[[str], Feeds]
) -> str:
    """Choose the preprocessing with the least misfit to the first BatchNormalizations; of near ties the first."""
    misfits = {name: misfit(feeds(name)) for name in candidates}
    # imagenet and clip are nearly the same: then the more usual one
    return next(name for name in misfits if misfits[name] <= 1.2 * min(misfits.values()) + 1e-3)


def _choose_by_scale(
    large: str, balance: Callable[[Feeds], float], run: Callable[[Feeds], Feeds], feeds: Callable[[str], Feeds]
) -> str:
    """Choose between pixels of about -1..1 and of 0..255 (`large`), by the first biases and by the outputs."""
    off = {name: abs(np.log(balance(feeds(name)))) for name in (PLAIN_NAME, large)}
    best, other = (PLAIN_NAME, large) if off[PLAIN_NAME] <= off[large] else (large, PLAIN_NAME)
    return other if _variety(run(feeds(other))) > VARIETY_RATIO * _variety(run(feeds(best))) else best


def _variety(outputs: Feeds) -> float:
    """Measure how much outputs differ from sample to sample.

    It is the norm of the standard deviation over samples, over the norm of the mean; the largest of all outputs.
    """
    ratios = [
        float(np.linalg.norm(a.std(axis=0)) / max(float(np.linalg.norm(a.mean(axis=0))), 1e-12))
        for a in outputs.values()
        if isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.ndim
    ]
    return max(ratios, default=0.0)


def _note(name: str, reason: str) -> str:
    return f"synthetic pictures preprocessed as {name} (by {reason}): --preprocess says another"


def to_grey(picture: AnyArray, info: ModelInput, preprocess: Preprocess, last: bool | None) -> AnyArray:
    """Return a picture [height, width, channels], in grey where the input has one channel."""
    if geometry(info, preprocess, last)[1] != 1 or picture.shape[-1] == 1:
        return picture
    # ITU-R BT.601, as Pillow converts
    grey: Any = np.rint(picture @ np.array([0.299, 0.587, 0.114]))
    return np.asarray(grey, np.uint8)[..., None]
