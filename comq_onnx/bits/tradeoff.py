"""How many bits each layer gets: a budget of bytes, of mean bits or of accuracy, made into widths by layer.

The survey (sensitivity.py) says what each width of each layer costs the outputs, the emitted file how many bytes it
takes; allocate.py minimizes the one under the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from comq_onnx.bits.knapsack import Allocation, Choice, allocate
from comq_onnx.bits.survey import REFERENCE_BITS, Noise, Sensitivity
from comq_onnx.errors import OptionError
from comq_onnx.metrics import Floats, OutputComparison, deviation_for, expected_agreement
from comq_onnx.options.budgets import Drop

# what the layers that gain most may add to the file at a fixed number of bits
UPGRADE_SHARE = 0.03
FRONTIER_POINTS = 16
# of an accepted drop the expected one is to be the first share, and may be the second: a count on some hundred fresh
# samples varies as much
DROP_SHARE, ENOUGH_SHARE = 0.5, 0.75
SQNR_RESERVE_DB = 0.5
Bits = dict[str, int]


@dataclass(frozen=True)
class FrontierPoint:
    """One allocation of a frontier: bytes of the file, mean bits of a weight, predicted SQNR in dB and top-1 agreement
    (None where the model gives no class scores); chosen: it is the one that is used."""

    size: int
    mean_bits: float
    sqnr_db: float
    top1_agreement: float | None
    chosen: bool = False


def max_noise(drop: Drop, leads: Floats | None) -> float:
    """The noise at which a drop is just kept, with some reserve: relative for an SQNR, the leads' variance for points
    (leads: of the float model on many samples). Raises OptionError where points are asked for and there are no class
    scores."""
    if drop.sqnr_db is not None:
        return float(10 ** (-(drop.sqnr_db + SQNR_RESERVE_DB) / 10))
    if leads is None:
        raise OptionError(
            f"--max-drop {drop.points}: no output of this model looks like class scores; give an SQNR to keep, "
            "such as --max-drop 20dB"
        )
    assert drop.points is not None
    return deviation_for(leads, 1 - DROP_SHARE * drop.points / 100) ** 2


@dataclass(frozen=True)
class DropCheck:
    """Whether a model keeps the accuracy asked for: what was measured in words, and the noise that it may have over the
    noise that it has."""

    enough: bool
    said: str
    ratio: float


def check_drop(
    drop: Drop, leads: Floats | None, outputs: Sequence[OutputComparison], changes: Floats | None
) -> DropCheck:
    """leads: of the float model on many samples; outputs: of both models on samples held back; changes: of the leads
    there, for points."""
    if drop.sqnr_db is not None:
        worst = min((output.sqnr_db for output in outputs), default=np.inf)
        return DropCheck(worst >= drop.sqnr_db, f"{worst:.2f} dB remain", float(10 ** ((worst - drop.sqnr_db) / 10)))
    assert drop.points is not None
    assert changes is not None
    assert leads is not None
    variance = float(np.mean(changes**2))
    expected = 100 * (1 - expected_agreement(leads, np.sqrt(variance)))
    counted = 100 * (1 - next(o.top1_agreement for o in outputs if o.top1_agreement is not None))
    ratio = max_noise(drop, leads) / max(variance, 1e-30)
    said = f"{counted:.1f} points of agreement are lost ({expected:.2f} expected)"
    enough = counted <= drop.points and expected <= ENOUGH_SHARE * drop.points
    # a class may change by chance, whatever the noise
    return DropCheck(enough, said, ratio if enough else min(ratio, DROP_SHARE))


def node_bytes(
    groups: Mapping[str, Sequence[str]],
    code_bytes: Mapping[str, Mapping[int, int]],
    file_size: Callable[[Bits], int],
) -> dict[int, int]:
    """The bytes beside its codes that a layer takes at each width more than at REFERENCE_BITS, in the mean."""

    def rest(bits: int) -> int:
        whole = file_size({name: bits for members in groups.values() for name in members})
        return whole - sum(code_bytes[name][bits] for name in groups)

    usual = rest(REFERENCE_BITS)
    widths = next(iter(code_bytes.values()))
    return {bits: round((rest(bits) - usual) / len(groups)) if bits != REFERENCE_BITS else 0 for bits in widths}


@dataclass(frozen=True)
class Tradeoff:
    """All allocations there are, by groups of layers that share a weight, each named by its first layer.

    widths: the bits to choose among; code_bytes: what the codes take at each; node_bytes: what the nodes that unpack
    them take in the mean; counts: how many weights there are; file_size: the bytes of the file at given bits by layer;
    leads: of the float model's best class over the second on many samples, None without class scores.
    """

    sensitivity: Sensitivity
    widths: Mapping[str, Sequence[int]]
    code_bytes: Mapping[str, Mapping[int, int]]
    node_bytes: Mapping[int, int]
    counts: Mapping[str, int]
    file_size: Callable[[Bits], int]
    leads: Floats | None

    @property
    def names(self) -> list[str]:
        """The groups, in order."""
        return list(self.sensitivity.groups)

    def bits(self, allocation: Allocation) -> Bits:
        """The bits of each layer."""
        chosen = (choices[k].bits for choices, k in zip(self._choices, allocation.picked, strict=True))
        members = self.sensitivity.groups.values()
        return {name: bits for group, bits in zip(members, chosen, strict=True) for name in group}

    def noise(self, allocation: Allocation) -> Noise:
        """What is predicted for the outputs: see sensitivity.py."""
        return self.sensitivity.noise(self.bits(allocation))

    def mean_bits(self, bits: Bits) -> float:
        """The mean over all weights."""
        return sum(self.counts[n] * bits[n] for n in self.names) / sum(self.counts[n] for n in self.names)

    def limits(self) -> tuple[int, int]:
        """The fewest and the most bytes that the codes can take."""
        sizes = [[choice.size for choice in choices] for choices in self._choices]
        return sum(min(s) for s in sizes), sum(max(s) for s in sizes)

    def within_codes(self, budget: int) -> Allocation:
        """The least noise with codes of at most `budget` bytes. Raises ValueError where nothing fits."""
        return allocate(self._choices, budget)

    def within_size(self, size: int) -> Allocation:
        """The least noise in a file of at most `size` bytes. Raises OptionError where nothing fits."""
        least = self.within_codes(self.limits()[0])
        smallest = self.file_size(self.bits(least))
        if smallest > size:
            raise OptionError(
                f"--size: {size:,} bytes are asked for; the least for this model is {smallest:,}, at "
                f"{self.mean_bits(self.bits(least)):.1f} bits a weight"
            )
        found, budget = least, size - smallest + least.size
        while budget > least.size:
            found = self.within_codes(budget)
            excess = self.file_size(self.bits(found)) - size
            if excess <= 0:
                return found
            # the names of layers are longer or shorter than in the mean
            budget -= excess
        return least

    def within_mean(self, bits: float) -> Allocation:
        """The least noise at `bits` stored bits a weight, in the mean. Raises OptionError where nothing fits."""
        weights = sum(self.counts[n] for n in self.names)
        priced = self._choices
        bare = [
            [replace(choice, size=self.code_bytes[name][choice.bits]) for choice in choices]
            for name, choices in zip(self.names, priced, strict=True)
        ]
        try:
            found = allocate(bare, int(bits / 8 * weights))
        except ValueError:
            least = 8 * sum(min(choice.size for choice in choices) for choices in bare) / weights
            raise OptionError(
                f"--bits {bits:g}: the least that this model's weights take is {least:.2f} bits in the mean"
            ) from None
        return replace(found, size=sum(c[k].size for c, k in zip(priced, found.picked, strict=True)))

    def within_noise(self, most: float, kind: int) -> Allocation:
        """The fewest bytes whose predicted noise, relative (kind 0) or of the leads (1), is at most `most`; the least
        noise where none is that good."""
        low, high = self.limits()
        best = self.within_codes(high)
        # bytes beyond one in a thousand are not worth the search
        while high - low > max(1, high // 1000):
            middle = (low + high) // 2
            found = self.within_codes(middle)
            if self.noise(found)[kind] <= most:
                best, high = found, middle
            else:
                low = middle
        return best

    def frontier(self, chosen: Allocation) -> list[FrontierPoint]:
        """Allocations from the fewest bytes to the most, with the chosen one."""
        low, high = self.limits()
        budgets = np.unique(np.geomspace(max(low, 1), max(high, 1), FRONTIER_POINTS).astype(np.int64))
        found = [self.within_codes(max(int(b), low)) for b in budgets]
        rest = self.file_size(self.bits(chosen)) - chosen.size
        points = {a.size: self._point(a, rest, False) for a in found} | {chosen.size: self._point(chosen, rest, True)}
        return [points[size] for size in sorted(points)]

    def _point(self, allocation: Allocation, rest: int, chosen: bool) -> FrontierPoint:
        relative, variance = self.noise(allocation)
        agreement = None if self.leads is None else expected_agreement(self.leads, float(np.sqrt(variance)))
        return FrontierPoint(
            rest + allocation.size, self.mean_bits(self.bits(allocation)), -10 * float(np.log10(max(relative, 1e-20))),
            agreement, chosen,
        )  # fmt: skip

    @cached_property
    def _choices(self) -> list[list[Choice]]:
        damage = self.sensitivity.damage
        size, nodes = self.code_bytes, self.node_bytes
        return [[Choice(b, size[n][b] + nodes[b], damage(n, b)) for b in self.widths[n]] for n in self.names]
