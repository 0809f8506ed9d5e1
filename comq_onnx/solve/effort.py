"""Say how long the default solver searches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """Say how long to search.

    factors: multiples of the scale that are tried beside 1
    rounds: further rounds of sweeps and refits of the scale
    pairs: codes among which moves of two are sought; 0 for none
    beam: roundings of a channel that are kept side by side; 0 for no beam
    bit_split: whether codes are refined bit plane by bit plane
    choose_ridge: whether the ridge is chosen on halves of the samples
    zero_points: whether zero points beside the best-fitting one are tried
    descend: whether codes are moved after the start
    """

    factors: tuple[float, ...]
    rounds: int
    pairs: int = 0
    beam: int = 0
    bit_split: bool = False
    choose_ridge: bool = True
    zero_points: bool = True
    descend: bool = True


EFFORTS = {
    "fast": Effort((), 0, choose_ridge=False, zero_points=False),
    "default": Effort((0.8, 0.88, 0.95, 1.06, 1.13), 0, pairs=24),
    "max": Effort((0.7, 0.76, 0.81, 0.85, 0.89, 0.93, 0.97, 1.03, 1.07, 1.12, 1.18), 3, 64, 8, True),
}
