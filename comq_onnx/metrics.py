"""Measure how near two outputs are: SQNR, cosine, class scores, loss of language models, the best class under noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Floats = npt.NDArray[np.float64]

# rows match where each number is as near as this share of the range of its column
MATCHED_SHARE = 0.05
# so many numbers are looked at together: logits over a vocabulary are too many for a copy of them
PIECE = 1 << 20
# so many rows with another best class are kept
MOST_CHANGED = 12

# Outputs of two models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputComparison:
    """Describe how near one output of two models is.

    name: of the output
    sqnr_db: signal to quantization noise in dB
    cosine: the cosine of the angle between both outputs
    top1_agreement: the share of rows with the same best class; None where the output holds no class scores
    changed: of the first rows of an output [rows, classes] with another best class: (row, class before, class after)
    """

    name: str
    sqnr_db: float
    cosine: float
    top1_agreement: float | None
    changed: tuple[tuple[int, int, int], ...] = ()


class ComparisonSums:
    """Add up what an OutputComparison needs, part of the samples after part."""

    def __init__(self, scores: bool | None = None) -> None:
        """Start with nothing; scores: whether the output holds class scores, None to see it from the first part."""
        self.signal = self.noise = self.dot = self.energy = 0.0
        self.agree = self.rows = 0
        self.scores = scores
        self.changed: list[tuple[int, int, int]] = []

    def add(self, before: npt.NDArray[Any], after: npt.NDArray[Any]) -> None:
        """Add an output of the model before and after quantization, of the same shape.

        Where both have the same infinity they agree; any other number that is not finite is all noise.
        """
        a, b = before.ravel(), after.ravel()
        for start in range(0, a.size, PIECE):
            piece = slice(start, start + PIECE)
            self._add_piece(a[piece].astype(np.float64), b[piece].astype(np.float64))
        if self.scores is None:
            self.scores = looks_like_scores(before)
        if self.scores:
            first, second = before.argmax(-1).ravel(), after.argmax(-1).ravel()
            room = MOST_CHANGED - len(self.changed) if before.ndim == 2 else 0
            for row in np.flatnonzero(first != second)[:room]:
                self.changed.append((self.rows + int(row), int(first[row]), int(second[row])))
            self.agree += int((first == second).sum())
            self.rows += first.size

    def _add_piece(self, a: Floats, b: Floats) -> None:
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            same = (a == b) & ~finite
            self.noise += float(np.count_nonzero(~finite & ~same)) * float(
                (a[finite] ** 2).mean() if finite.any() else 1
            )
            a, b = a[finite], b[finite]
        self.signal += float(a @ a)
        self.noise += float((a - b) @ (a - b))
        self.dot += float(a @ b)
        self.energy += float(b @ b)

    def result(self, name: str) -> OutputComparison:
        """Return the comparison of the output `name` over all that was added."""
        ratio = max(self.signal, 1e-300) / self.noise if self.noise else 1e20
        sqnr = 10 * float(np.log10(ratio)) if ratio > 0 else -np.inf
        length = float(np.sqrt(self.signal * self.energy))
        cosine = self.dot / length if length > 0 else float(self.noise == 0)
        agreement = self.agree / self.rows if self.rows else None
        return OutputComparison(name, sqnr, cosine, agreement, tuple(self.changed))


@dataclass(frozen=True)
class OutputMatch:
    """Describe how far two models agree on an output that is compared by equality, not by noise.

    name: of the output
    before, after: how many rows (or whole numbers) each model gives
    matched: how many of them both give
    """

    name: str
    before: int
    after: int
    matched: int

    @property
    def share(self) -> float:
        """Return the share of all rows that both models give; 1 where neither gives any."""
        return 2 * self.matched / (self.before + self.after) if self.before + self.after else 1.0


def match_values(before: npt.NDArray[Any], after: npt.NDArray[Any], name: str = "") -> OutputMatch:
    """Count the whole numbers that are equal at the same place; where shapes differ, match rows."""
    if before.shape != after.shape:
        return match_rows(before, after, name)
    return OutputMatch(name, before.size, after.size, int((before == after).sum()))


def match_rows(before: npt.NDArray[Any], after: npt.NDArray[Any], name: str = "") -> OutputMatch:
    """Match the rows [n, ...] of two outputs, each with the nearest one that is left, whatever their order.

    Rows of whole numbers match where they are equal, rows of floats where no number is further away than MATCHED_SHARE
    of the range of its column.
    """
    a, b = (x.reshape(len(x), math.prod(x.shape[1:])).astype(np.float64) for x in (before, after))
    matched = 0
    if len(a) and len(b) and a.shape[1] == b.shape[1]:
        tolerance = MATCHED_SHARE * np.ptp(a, axis=0) if before.dtype.kind == "f" else np.zeros(a.shape[1])
        left = np.ones(len(b), bool)
        for row in a:
            near = left & (np.abs(b - row) <= tolerance).all(axis=1)
            if near.any():
                distance = np.where(near, np.abs(b - row).sum(axis=1), np.inf)
                left[distance.argmin()] = False
                matched += 1
    return OutputMatch(name, len(a), len(b), matched)


def add_matches(one: OutputMatch, other: OutputMatch) -> OutputMatch:
    """Add up the matches of two parts of the samples."""
    return OutputMatch(
        one.name or other.name, one.before + other.before, one.after + other.after, one.matched + other.matched
    )


def sqnr_of(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Return the lowest SQNR in dB over the floating-point outputs of one run of two models, at most 200.

    It is -inf where shapes or other outputs differ.
    """
    worst = 200.0
    for name, a in first.items():
        b = second.get(name)
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.shape != b.shape:
            worst = worst if type(a) is type(b) and not isinstance(a, np.ndarray) else -np.inf
        elif a.dtype.kind == "f":
            sums = ComparisonSums(scores=False)
            sums.add(a, b)
            worst = min(worst, sums.result(name).sqnr_db)
        elif not np.array_equal(a, b):
            worst = -np.inf
    return worst


# Language models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageComparison:
    """Describe how near the distributions over a vocabulary are that two models give.

    name: of the output with the logits
    perplexity: of each model, `before` and `after`: e to the mean loss of the tokens that follow; empty for models that
        do not predict the next token
    divergence: the mean Kullback-Leibler divergence of the second's distribution from the first's, in nats
    top1_agreement: the share of positions with the same likeliest token
    positions: how many positions were compared
    """

    name: str
    perplexity: dict[str, float]
    divergence: float
    top1_agreement: float
    positions: int

    @property
    def rise(self) -> float | None:
        """Return the perplexity after over that before; None where there is none."""
        return self.perplexity["after"] / self.perplexity["before"] if self.perplexity else None


class LanguageSums:
    """Add up what a LanguageComparison needs, some positions at a time."""

    def __init__(self) -> None:
        self.divergence = 0.0
        self.loss = np.zeros(2)
        self.positions = self.agree = self.tokens = 0

    def add(self, before: npt.NDArray[Any], after: npt.NDArray[Any], following: npt.NDArray[Any]) -> None:
        """Add the logits of both models, [positions, vocabulary].

        following: the token that follows each position, -1 where none does
        """
        rows = max(1, PIECE // before.shape[-1])
        for start in range(0, len(before), rows):
            piece = slice(start, start + rows)
            self._add_piece(_log_softmax(before[piece]), _log_softmax(after[piece]), following[piece])

    def _add_piece(self, a: npt.NDArray[Any], b: npt.NDArray[Any], following: npt.NDArray[Any]) -> None:
        self.divergence += float(_divergences(a, b).sum())
        self.agree += int((a.argmax(-1) == b.argmax(-1)).sum())
        self.positions += len(a)
        known = np.flatnonzero(following >= 0)
        self.loss -= [float(x[known, following[known]].sum(dtype=np.float64)) for x in (a, b)]
        self.tokens += len(known)

    def result(self, name: str) -> LanguageComparison:
        """Return the comparison of the output `name` over all that was added."""
        count = max(self.positions, 1)
        with np.errstate(over="ignore"):
            mean = np.exp(self.loss / max(self.tokens, 1)).tolist()
        perplexity = dict(zip(("before", "after"), mean, strict=True)) if self.tokens else {}
        return LanguageComparison(name, perplexity, self.divergence / count, self.agree / count, self.positions)


def divergence(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> float:
    """Return the mean Kullback-Leibler divergence of the distributions of logits [positions, vocabulary], in nats."""
    sums = LanguageSums()
    sums.add(before, after, np.full(len(before), -1))
    return sums.result("").divergence


def _divergences(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Floats:
    """Return the divergence of each row of logarithms of probabilities."""
    p = np.exp(a)
    with np.errstate(invalid="ignore"):
        parts = np.where(p > 0, p * (a - b), 0)
    return np.asarray(np.maximum(parts.sum(axis=-1, dtype=np.float64), 0.0))


def _log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the logarithms of the probabilities of each row, in float32 or better."""
    x = logits.astype(np.promote_types(logits.dtype, np.float32))
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


# Class scores ---------------------------------------------------------------------------------------------------------


def looks_like_scores(output: npt.NDArray[Any]) -> bool:
    """Tell whether the last axis holds class scores.

    These are probabilities, logits [n, classes], or logits over a vocabulary [n, length, classes].
    """
    if output.ndim < 2 or output.shape[-1] < 2 or output.dtype.kind != "f" or not output.size:
        return False
    rows = output.reshape(-1, output.shape[-1])
    if rows.min() >= 0 and np.allclose(rows.sum(axis=1, dtype=np.float64), 1, atol=1e-2):
        return True
    if output.ndim != 2:
        return output.ndim == 3 and output.shape[-1] >= 1000
    # vectors of length 1 are embeddings
    return not np.allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=1e-2)


def scores_among(outputs: Mapping[str, Any]) -> str | None:
    """Return the name of the first output that looks like class scores; None where there is none."""
    return next((name for name, x in outputs.items() if isinstance(x, np.ndarray) and looks_like_scores(x)), None)


def softmax(scores: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return probabilities along the last axis; scores that are probabilities already stay as they are."""
    if (scores >= 0).all() and np.allclose(scores.sum(-1), 1, atol=1e-2):
        return scores
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def suspicious_scores(name: str, output: Any) -> str | None:
    """Say why class scores [samples, classes] of the float model cast doubt on its input; None where they do not.

    Photographs through EfficientNet-Lite0 and SqueezeNet give scores of 0.2 to 0.35 of the largest possible entropy;
    pixels of the wrong scale, layout or offset give 0.5 to 1, or one class for all. Fewer than 8 samples or 10 classes
    tell nothing.
    """
    if not isinstance(output, np.ndarray) or output.ndim != 2 or not looks_like_scores(output):
        return None
    rows, classes = output.shape
    if rows < 8 or classes < 10 or not np.isfinite(output).all():
        return None
    given = output.astype(np.float64)
    scores = softmax(given)
    named = scores is given or any(word in name.lower() for word in ("logit", "prob", "score", "class", "softmax"))
    entropy = float(-(scores * np.log(scores + 1e-300)).sum(axis=-1).mean() / np.log(classes))
    top = float(scores.max(axis=-1).mean())
    look = "look at them with --inspect-samples, and see that they are preprocessed as the model was trained"
    # features of a backbone are flat too
    if entropy > 0.45 and (named or entropy < 0.9):
        return (
            f"the float model is undecided about these samples: its best class of {classes} in {name!r} gets "
            f"{top:.1%} on average; {look}"
        )
    if named and len(set(scores.argmax(axis=-1).tolist())) == 1:
        return f"the float model gives all of the first {rows} samples the same of {classes} classes ({name!r}); {look}"
    return None


# The best class under noise -------------------------------------------------------------------------------------------


def leads(scores: npt.NDArray[Any]) -> Floats:
    """Return by how much the highest score of each row leads the second highest: [..., classes] -> [rows]."""
    top = np.partition(_rows(scores), -2, axis=-1)[:, -2:]
    return np.asarray(top[:, 1] - top[:, 0])


def lead_changes(before: npt.NDArray[Any], after: npt.NDArray[Any], rivals: int = 1) -> Floats:
    """Return by how much the leads of the class that is best in `before` over its rivals change.

    The result is [rows * rivals], shorter where there are fewer classes.

    before, after: scores [..., classes]
    rivals: so many classes that come next in `before`
    """
    a = _rows(before)
    order = np.argsort(a, axis=-1, kind="stable")[:, ::-1][:, : rivals + 1]
    changes = np.take_along_axis(_rows(after) - a, order, axis=-1)
    return np.asarray((changes[:, :1] - changes[:, 1:]).ravel())


def expected_agreement(margins: Floats, deviation: float) -> float:
    """Return the share of rows whose best class stays ahead under normal noise.

    margins: the lead of each row's best class, [rows]
    deviation: the standard deviation of the noise on the lead
    """
    return float(ndtr(margins / max(deviation, 1e-30)).mean())


def deviation_for(margins: Floats, agreement: float) -> float:
    """Return the largest deviation at which `expected_agreement` is at least `agreement`; 0 where there is none."""
    low, high = 0.0, float(max(margins.max(initial=0), 1e-30)) * 10
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_agreement(margins, middle) >= agreement else (low, middle)
    return low


def _rows(scores: npt.NDArray[Any]) -> Floats:
    return np.asarray(scores.reshape(-1, scores.shape[-1]), np.float64)
