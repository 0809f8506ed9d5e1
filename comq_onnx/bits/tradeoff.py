"""Find the best way to give bits to layers under a budget of bytes, of mean bits or of noise.

The survey (survey.py) tells how much noise each number of bits of each layer brings to the outputs, the emitted file
how many bytes it takes. knapsack.py minimizes the noise under a budget of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from comq_onnx.bits.knapsack import Allocation, Choice, allocate
from comq_onnx.bits.survey import Noise, Sensitivity
from comq_onnx.errors import OptionError
from comq_onnx.metrics import Floats, expected_agreement
from comq_onnx.plan.initial_bits import REFERENCE_BITS
from comq_onnx.plan.plan import Bits

# at a fixed number of bits, the share of the file that more bits for the layers that gain most may add
UPGRADE_SHARE = 0.03
# a higher predicted loss is as good as none, in nats
MOST_LOSS = 20.0
# the number of allocations of a frontier
FRONTIER_POINTS = 16


@dataclass(frozen=True)
class FrontierPoint:
    """Describe one allocation of a frontier.

    size: the bytes of the file
    mean_bits: the mean bits of a weight
    sqnr_db: the predicted SQNR of the outputs, in dB
    top1_agreement: the predicted share of samples with the same best class; None where the model gives no class scores
    perplexity_rise: the predicted perplexity over that of the float model; None for what is not judged by it
    chosen: whether this allocation is used
    """

    size: int
    mean_bits: float
    sqnr_db: float
    top1_agreement: float | None
    chosen: bool = False
    perplexity_rise: float | None = None


def node_bytes(
    groups: Mapping[str, Sequence[str]],
    code_bytes: Mapping[str, Mapping[int, int]],
    file_size: Callable[[Bits], int],
) -> dict[int, int]:
    """Return how many more bytes beside its codes a layer takes at each number of bits than at REFERENCE_BITS.

    It is the mean over all groups of layers.

    groups: the names of the layers that share a weight, by the name of the first of them
    code_bytes: the bytes of codes, by group and number of bits
    file_size: gives the bytes of the file for the bits of each layer
    """

    def rest(bits: int) -> int:
        whole = file_size({name: bits for members in groups.values() for name in members})
        return whole - sum(code_bytes[name][bits] for name in groups)

    usual = rest(REFERENCE_BITS)
    widths = next(iter(code_bytes.values()))
    return {bits: round((rest(bits) - usual) / len(groups)) if bits != REFERENCE_BITS else 0 for bits in widths}


@dataclass(frozen=True)
class Tradeoff:
    """Hold what every allocation of bits costs.

    Layers that share a weight are a group, which has the name of its first layer.

    sensitivity: the noise that each number of bits brings to the outputs
    widths: the numbers of bits to choose among, by group
    code_bytes: the bytes of codes, by group and number of bits
    node_bytes: how many more bytes the nodes that unpack codes take than at REFERENCE_BITS, by number of bits
    counts: the number of weights, by group
    file_size: gives the bytes of the file for the bits of each layer
    leads: those of the float model's best class over the second on many samples; None without class scores
    by_loss: whether the model is judged by its perplexity: the second noise is the divergence then
    """

    sensitivity: Sensitivity
    widths: Mapping[str, Sequence[int]]
    code_bytes: Mapping[str, Mapping[int, int]]
    node_bytes: Mapping[int, int]
    counts: Mapping[str, int]
    file_size: Callable[[Bits], int]
    leads: Floats | None
    by_loss: bool = False

    @property
    def names(self) -> list[str]:
        """Return the names of the groups, in order."""
        return list(self.sensitivity.groups)

    def bits(self, allocation: Allocation) -> Bits:
        """Return the bits that an allocation gives each layer."""
        chosen = (choices[k].bits for choices, k in zip(self._choices, allocation.picked, strict=True))
        members = self.sensitivity.groups.values()
        return {name: bits for group, bits in zip(members, chosen, strict=True) for name in group}

    def noise(self, allocation: Allocation) -> Noise:
        """Predict the noise in the outputs: see survey.py."""
        return self.sensitivity.noise(self.bits(allocation))

    def mean_bits(self, bits: Bits) -> float:
        """Return the mean bits over all weights."""
        return sum(self.counts[n] * bits[n] for n in self.names) / sum(self.counts[n] for n in self.names)

    def limits(self) -> tuple[int, int]:
        """Return the fewest and the most bytes that codes and the nodes that unpack them can take."""
        sizes = [[choice.size for choice in choices] for choices in self._choices]
        return sum(min(s) for s in sizes), sum(max(s) for s in sizes)

    def within_codes(self, budget: int) -> Allocation:
        """Find the least noise with codes and nodes of at most `budget` bytes. Raises ValueError where nothing fits."""
        return allocate(self._choices, budget)

    def within_size(self, size: int) -> Allocation:
        """Find the least noise in a file of at most `size` bytes. Raises OptionError where nothing fits."""
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
            # the names of layers take more or fewer bytes than in the mean
            budget -= excess
        return least

    def within_mean(self, bits: float) -> Allocation:
        """Find the least noise at a mean of `bits` stored bits a weight. Raises OptionError where nothing fits."""
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
        """Find the fewest bytes whose predicted noise is at most `most`, or the least noise where none is that good.

        kind: 0 for the relative noise, 1 for that of the choices
        """
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
        """Return allocations from the fewest bytes to the most, with the chosen one among them."""
        low, high = self.limits()
        budgets = np.unique(np.geomspace(max(low, 1), max(high, 1), FRONTIER_POINTS).astype(np.int64))
        found = [self.within_codes(max(int(b), low)) for b in budgets]
        rest = self.file_size(self.bits(chosen)) - chosen.size
        points = {a.size: self._point(a, rest, False) for a in found} | {chosen.size: self._point(chosen, rest, True)}
        return [points[size] for size in sorted(points)]

    def _point(self, allocation: Allocation, rest: int, chosen: bool) -> FrontierPoint:
        """Describe an allocation; rest: the bytes of the file beside codes and the nodes that unpack them."""
        relative, variance = self.noise(allocation)
        agreement = None if self.leads is None else expected_agreement(self.leads, float(np.sqrt(variance)))
        return FrontierPoint(
            rest + allocation.size, self.mean_bits(self.bits(allocation)), -10 * float(np.log10(max(relative, 1e-20))),
            agreement, chosen, float(np.exp(min(variance, MOST_LOSS))) if self.by_loss else None,
        )  # fmt: skip

    @cached_property
    def _choices(self) -> list[list[Choice]]:
        """Return the choices of each group."""
        damage = self.sensitivity.damage
        size, nodes = self.code_bytes, self.node_bytes
        return [[Choice(b, size[n][b] + nodes[b], damage(n, b)) for b in self.widths[n]] for n in self.names]
