"""COMQ: quantize a weight by coordinate minimization of the layer's output error, on Gram matrices.

For a layer Y = W X (X holds one input position a column) and its quantized weight Wq, COMQ (Zhang, Yang, Liu,
Kailkhura, Yin, Xin: "COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization", arXiv 2403.07134)
minimizes

    || Wq X - W X ||^2,    Wq = scale * Q,    Q integer

one coordinate at a time, everything else fixed. With the Gram G = E[x x^T] and V = (W - Wq) G both steps are closed
forms:

    q_i   <- clip(round(q_i + V_i / (scale G_ii)))            (the paper's eq. for a code)
    scale <- <q, G w> / <q, G q>                              (the paper's eq. for a scale)

Methods: `comq`, the default, keeps the two closed forms and goes beyond the paper in what surrounds them (comq.py);
`paper` is the authors' algorithm (paper.py); `gptq` is one Babai pass at the MSE-best scale, without mean, mismatch or
descent (Frantar et al., arXiv 2210.17323, with inputs in decreasing order of their power); `rtn` is plain rounding.

What the rest of the project adds to every method: inputs of the model quantized so far, and never worse than plain
rounding, channel by channel.

Shapes: weight [groups, out, in]; gram [groups, in, in].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_onnx import arrays
from comq_onnx.solve.comq import EFFORTS, SMALL, solve_comq, solve_gptq
from comq_onnx.solve.grid import Array, Codes, Grid, QuantizedWeight, fit_mse, round_to_grid, rtn
from comq_onnx.solve.moments import Matrix, Moments
from comq_onnx.solve.output_error import Judge
from comq_onnx.solve.paper import ORDERS, SWEEPS, solve_paper

METHODS = ("comq", "paper", "gptq", "rtn")


@dataclass(frozen=True)
class Method:
    """Which solver, and what it may be told: effort is comq's; order, sweeps and shrink (None: by the bits) are the
    paper's. Raises ValueError for a name that does not exist."""

    solver: str = "comq"
    effort: str = "default"
    order: str = "greedy"
    sweeps: int = SWEEPS
    shrink: float | None = None

    def __post_init__(self) -> None:
        for what, name, names in (
            ("solver", self.solver, METHODS), ("effort", self.effort, EFFORTS), ("order", self.order, ORDERS)
        ):  # fmt: skip
            if name not in names:
                raise ValueError(f"no {what} {name!r}; there are {', '.join(names)}")

    def __call__(self, weight: Array, moments: Moments, grid: Grid) -> QuantizedWeight:
        """The quantized weight that the solver finds."""
        if self.solver == "comq":
            return solve_comq(weight, moments, grid, self.effort)
        if self.solver == "paper":
            return solve_paper(weight, moments, grid, self.order, self.sweeps, self.shrink)
        return solve_gptq(weight, moments, grid) if self.solver == "gptq" else rtn(weight, grid)

    def on_device(self, inputs: int, grid: Grid) -> bool:
        """Whether a layer of so many inputs is solved on the device where its moments lie, not on the CPU."""
        if self.solver != "comq":
            return self.solver != "paper"
        search = EFFORTS[self.effort]
        small = inputs <= SMALL and not grid.per_tensor and grid.blocks(inputs) == 1
        return not (small or search.beam or search.bit_split)


COMQ = Method()


@dataclass(frozen=True)
class Solution:
    """A layer's quantized weight, what to add to its bias, and what it costs.

    error and rtn_error are ||X^ Wq + shift - X W||^2 / ||X W||^2, for plain rounding on the same grid without a shift;
    shift [groups, out] is None where the layer has no bias to carry it.
    """

    weight: QuantizedWeight
    shift: Array | None
    error: float
    rtn_error: float


def error_db(error: float) -> float:
    """10 log10 of a relative squared error; -200 for none at all."""
    return 10 * float(np.log10(max(error, 1e-20)))


def solve(
    weight: Array, moments: Moments, grid: Grid, method: Method = COMQ, has_bias: bool = False
) -> Solution:  # fmt: skip
    """Quantize one layer's weight [groups, out, in] on `grid`.

    has_bias: a shift of the bias may carry the mean of the error (comq's alone).
    """
    return solve_together([weight], moments, grid, method, has_bias)[0]


def solve_together(
    weights: Sequence[Array], moments: Moments, grid: Grid, method: Method = COMQ, has_bias: bool = False
) -> list[Solution]:
    """`solve` for layers that read the same input: what depends on it is computed once.

    weights: [groups, out, in] each, of any outs. Not for a per-tensor grid, unless there is one weight.
    """
    return _solve(weights, moments, moments.centred(), grid, method, has_bias)


def errors_at(
    weight: Array, moments: Moments, grids: Sequence[Grid], method: Method = COMQ, has_bias: bool = False
) -> list[float]:  # fmt: skip
    """The relative error of the solution of a weight [groups, out, in] on each grid."""
    centred = moments.centred()
    return [_solve([weight], moments, centred, grid, method, has_bias)[0].error for grid in grids]


def _solve(
    weights: Sequence[Array], moments: Moments, centred: Moments, grid: Grid, method: Method, has_bias: bool
) -> list[Solution]:
    """centred: `moments`, centred."""
    centre = has_bias and method.solver == "comq"
    if arrays.is_tensor(centred.gram) and not method.on_device(weights[0].shape[-1], grid):
        moments, centred = moments.on_host(), centred.on_host()
    ends = np.cumsum([w.shape[1] for w in weights])[:-1]
    whole = weights[0] if len(weights) == 1 else np.concatenate(weights, axis=1)
    given = centred if centre else moments
    rounded, solved, judge, energies = (
        _on_device(whole, given, centred, grid, method)
        if arrays.is_tensor(centred.gram)
        else _on_host(whole, given, centred, grid, method)
    )
    ours, theirs = judge(solved), judge(rounded)
    found = []
    for k in np.split(np.arange(whole.shape[1]), ends):
        variance, offset = ours[0][:, k], ours[1][:, k]
        plain_variance, plain_offset = theirs[0][:, k], theirs[1][:, k]
        plain = plain_variance + plain_offset**2
        error, rtn_error = (variance, plain_variance) if centre else (variance + offset**2, plain)
        worse = error > rtn_error
        if grid.per_tensor:
            worse = np.full_like(worse, error.sum() > rtn_error.sum())
        energy = max(float(energies[:, k].sum()), float(np.finfo(np.float64).tiny))
        shift = np.where(worse, plain_offset, offset).astype(np.float32) if centre else None
        best = _take_channels(worse, _channels(rounded, k), _channels(solved, k))
        total = float(np.where(worse, rtn_error, error).sum())
        found.append(Solution(best, shift, total / energy, float(plain.sum()) / energy))
    return found


Judged = tuple[QuantizedWeight, QuantizedWeight, Callable[[QuantizedWeight], tuple[Matrix, Matrix]], Matrix]


def _on_host(whole: Array, given: Moments, centred: Moments, grid: Grid, method: Method) -> Judged:
    """A weight rounded and solved, what judges both, and the energy of each channel's output."""
    rounded = rtn(whole, grid)
    judge = Judge(whole, centred)
    return rounded, rounded if method.solver == "rtn" else method(whole, given, grid), judge, judge.energy


def _on_device(whole: Array, given: Moments, centred: Moments, grid: Grid, method: Method) -> Judged:
    """The same where the moments are torch tensors."""
    import torch

    from comq_onnx.solve.gpu import solver as gpu

    device: Any = centred.gram.device
    weight = torch.as_tensor(whole, device=device)
    rounded = gpu.round_to_nearest(weight, grid)
    solved = rounded
    if method.solver == "comq":
        solved = gpu.solve_comq(weight, given, grid, EFFORTS[method.effort])
    elif method.solver == "gptq":
        solved = gpu.solve_gptq(weight, given, grid)
    judge = gpu.Judge(weight, centred)
    return rounded, solved, judge, judge.energy


def _channels(weight: QuantizedWeight, k: npt.NDArray[np.intp]) -> QuantizedWeight:
    """Some of the channels."""
    return QuantizedWeight(weight.codes[:, k], weight.scale[:, k], weight.zero_point[:, k], weight.grid)


def _take_channels(mask: npt.NDArray[np.bool_], first: QuantizedWeight, second: QuantizedWeight) -> QuantizedWeight:
    """The channels of `first` where mask [groups, out] holds, of `second` elsewhere."""
    if not mask.any():
        return second
    pick = mask[..., None]
    return QuantizedWeight(
        np.where(pick, first.codes, second.codes),
        np.where(pick, first.scale, second.scale),
        np.where(pick, first.zero_point, second.zero_point),
        second.grid,
    )


def round_rows(weight: Array, grid: Grid) -> Solution:
    """Quantize a table [1, rows, columns] that only gets looked up (an embedding): plain rounding at the MSE-best
    scale."""
    best = round_to_grid(weight, *fit_mse(weight, grid), grid)
    energy = max(float((weight.astype(np.float64) ** 2).sum()), np.finfo(np.float64).tiny)

    def cost(quantized: QuantizedWeight) -> float:
        return float(((quantized.dequantize().astype(np.float64) - weight) ** 2).sum()) / energy

    return Solution(best, None, cost(best), cost(rtn(weight, grid)))


def blank(weight: Array, grid: Grid) -> Solution:
    """A solution of the right shape that says nothing, to see what it takes in a file."""
    shape = (*weight.shape[:2], 1 if grid.per_tensor else grid.blocks(weight.shape[-1]))
    zero_point = np.full(shape, 0 if grid.symmetric else 1, np.int8)
    quantized = QuantizedWeight(np.zeros(weight.shape, np.int8), np.ones(shape, np.float32), zero_point, grid)
    return Solution(quantized, np.zeros(weight.shape[:2], np.float32), 0.0, 0.0)


def check_codes(weight: QuantizedWeight) -> Codes:
    """The codes, after making sure that they lie on the grid and the scales are positive numbers. Raises ValueError."""
    if weight.codes.min() < weight.grid.qmin or weight.codes.max() > weight.grid.qmax:
        raise ValueError(f"codes outside [{weight.grid.qmin}, {weight.grid.qmax}]")
    if not (np.isfinite(weight.scale).all() and (weight.scale > 0).all()):
        raise ValueError("a scale is not a positive number")
    return weight.codes
