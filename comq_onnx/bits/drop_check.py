"""Check whether a model keeps the accuracy that a user wants, by what is measured on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from comq_onnx.errors import OptionError
from comq_onnx.evaluate.outputs import Compared
from comq_onnx.metrics import Floats, LanguageComparison, deviation_for, expected_agreement
from comq_onnx.model.judged import without_caches
from comq_onnx.options.budgets import Drop

# the expected drop is to be the first share of the accepted one, and may be the second: a count on some hundred new
# samples varies that much
DROP_SHARE, ENOUGH_SHARE = 0.5, 0.75
SQNR_RESERVE_DB = 0.5


def max_noise(drop: Drop, leads: Floats | None) -> float:
    """Return the most noise with which a drop is kept, with some reserve.

    It is relative noise where the drop is an SQNR, the variance of the leads where it is points of agreement, and the
    divergence of the distributions where it is a rise of perplexity: the mean loss rises by about the divergence.

    leads: those of the float model on many samples; None where it gives no class scores

    Raises OptionError where points are asked for and there are no class scores.
    """
    if drop.sqnr_db is not None:
        return float(10 ** (-(drop.sqnr_db + SQNR_RESERVE_DB) / 10))
    if drop.rise is not None:
        return DROP_SHARE * math.log1p(drop.rise / 100)
    if leads is None:
        raise OptionError(
            f"--max-drop {drop.points}: no output of this model looks like class scores; give an SQNR to keep, "
            "such as --max-drop 20dB"
        )
    assert drop.points is not None
    return deviation_for(leads, 1 - DROP_SHARE * drop.points / 100) ** 2


@dataclass(frozen=True)
class DropCheck:
    """Hold the result of a check.

    enough: whether the model keeps the accuracy that is asked for
    said: what was measured, in words
    ratio: the noise that the model may have over the noise that it has
    """

    enough: bool
    said: str
    ratio: float


def check_drop(drop: Drop, leads: Floats | None, compared: Compared, changes: Floats | None) -> DropCheck:
    """Check whether a model keeps the accuracy that is asked for.

    leads: those of the float model on many samples; None where it gives no class scores
    compared: the outputs of both models on the samples held back
    changes: the changes of the leads on these samples; None where the drop is an SQNR
    """
    if drop.sqnr_db is not None:
        worst = min((output.sqnr_db for output in without_caches(compared.outputs)), default=np.inf)
        return DropCheck(worst >= drop.sqnr_db, f"{worst:.2f} dB remain", float(10 ** ((worst - drop.sqnr_db) / 10)))
    if drop.rise is not None:
        return _check_rise(drop, compared.language)
    assert drop.points is not None
    assert changes is not None
    assert leads is not None
    variance = float(np.mean(changes**2))
    expected = 100 * (1 - expected_agreement(leads, np.sqrt(variance)))
    counted = 100 * (1 - next(o.top1_agreement for o in compared.outputs if o.top1_agreement is not None))
    ratio = max_noise(drop, leads) / max(variance, 1e-30)
    said = f"{counted:.1f} points of agreement are lost ({expected:.2f} expected)"
    enough = counted <= drop.points and expected <= ENOUGH_SHARE * drop.points
    # a class may change by chance, even with little noise
    return DropCheck(enough, said, ratio if enough else min(ratio, DROP_SHARE))


def _check_rise(drop: Drop, language: LanguageComparison | None) -> DropCheck:
    """Check whether the perplexity rises by no more than asked for, measured and as the divergence foretells."""
    assert drop.rise is not None
    assert language is not None
    assert language.rise is not None
    most = math.log1p(drop.rise / 100)
    expected = 100 * math.expm1(min(language.divergence, 100.0))
    said = f"the perplexity rises by {100 * (language.rise - 1):.2f}% ({expected:.2f}% expected)"
    ratio = DROP_SHARE * most / max(language.divergence, 1e-30)
    enough = math.log(language.rise) <= most and language.divergence <= ENOUGH_SHARE * most
    return DropCheck(enough, said, ratio if enough else min(ratio, DROP_SHARE))
