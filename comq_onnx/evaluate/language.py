"""Find what a language model is judged by: its logits over a vocabulary, and the tokens that really follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_onnx.metrics import ComparisonSums, LanguageComparison, LanguageSums
from comq_onnx.samples.dataset import Dataset
from comq_onnx.samples.language_inputs import role_of, token_inputs
from comq_onnx.samples.next_token import LEAST_VOCABULARY
from comq_onnx.samples.samples import ModelInput

Arrays = Mapping[str, Any]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Language:
    """Name what a model over a vocabulary reads and gives.

    output: the output with the logits [samples, positions, vocabulary]
    tokens: the input with the token of each position
    mask: the input whose zeros are padding; None where there is none
    predicts_next: whether the logits of a position are those of the token behind it
    """

    output: str
    tokens: str
    mask: str | None
    predicts_next: bool

    def kept(self, feeds: Arrays) -> Mask:
        """Return which positions [samples, positions] of a batch are no padding."""
        shape = feeds[self.tokens].shape
        if self.mask is None:
            return np.ones(shape, bool)
        return np.asarray(feeds[self.mask][:, -shape[1] :] != 0)

    def following(self, feeds: Arrays) -> npt.NDArray[np.int64]:
        """Return the token behind each position [samples, positions] of a batch; -1 where there is none."""
        tokens, kept = feeds[self.tokens], self.kept(feeds)
        found = np.full(tokens.shape, -1, np.int64)
        if self.predicts_next:
            found[:, :-1] = np.where(kept[:, :-1] & kept[:, 1:], tokens[:, 1:], -1)
        return found


def language_of(inputs: Sequence[ModelInput], feeds: Arrays, outputs: Arrays, predicts_next: bool) -> Language | None:
    """Find the logits over a vocabulary among the outputs for a batch; None where there are none.

    predicts_next: whether the model predicts the next token
    """
    names = [i.name for i in token_inputs(inputs)]
    # of an encoder and a decoder in one model, the decoder's
    names.sort(key=lambda name: "decoder" not in name.lower())
    for name, array in outputs.items():
        if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind != "f":
            continue
        tokens = next((n for n in names if feeds[n].shape == array.shape[:2]), None)
        if tokens is None or array.shape[-1] < LEAST_VOCABULARY or array.shape[-1] <= feeds[tokens].max(initial=0):
            continue
        masks = (i.name for i in inputs if role_of(i.name) == "mask" and _masks(feeds[i.name], feeds[tokens]))
        return Language(name, tokens, next(masks, None), predicts_next)
    return None


def language_of_data(inputs: Sequence[ModelInput], data: Dataset) -> Language | None:
    """Find the logits over a vocabulary that a model gives for the first batch of its samples; None without any."""
    return language_of(inputs, data.first_feeds, data.first_outputs, data.is_of_decoder)


def _masks(mask: Any, tokens: Any) -> bool:
    """Tell whether a mask is of the tokens, and perhaps of a past before them."""
    return bool(mask.ndim == 2 and len(mask) == len(tokens) and mask.shape[1] >= tokens.shape[1])


class LanguageOutput:
    """Add up both comparisons of an output with logits: as numbers, and as distributions; padding is left out."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self.numbers = ComparisonSums(scores=True)
        self.sums = LanguageSums()

    def add(self, feeds: Arrays, before: npt.NDArray[Any], after: npt.NDArray[Any]) -> None:
        """Add the logits of both models for a batch [samples, positions, vocabulary], sample by sample."""
        kept, following = self.language.kept(feeds), self.language.following(feeds)
        for a, b, mine, next_ones in zip(before, after, kept, following, strict=True):
            if not mine.all():
                a, b, next_ones = a[mine], b[mine], next_ones[mine]
            self.numbers.add(a, b)
            self.sums.add(a, b, next_ones)

    def result(self) -> LanguageComparison | None:
        """Return the comparison as distributions; None where no position was compared."""
        return self.sums.result(self.language.output) if self.sums.positions else None
