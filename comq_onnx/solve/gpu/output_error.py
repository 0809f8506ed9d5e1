"""Measure what a quantized weight costs on the device of the moments: solve/output_error.py for torch tensors."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from comq_onnx.solve.grid import QuantizedWeight
from comq_onnx.solve.moments import Matrix, Moments

Tensor: TypeAlias = Any


class OutputError:
    """Measure the output error of a layer's quantized weights, channel by channel.

    energy: E (W x)^2 of each channel, x in the float model, [groups, out]
    """

    def __init__(self, weight: Tensor, centred: Moments) -> None:
        """Prepare what all quantized weights have in common.

        weight: the float weight, [groups, out, in]
        centred: the moments about the mean
        """
        self._weight = weight
        gram, mean, cross, residue, mean_error = (
            getattr(centred, name) for name in ("gram", "mean", "cross", "residue", "mean_error")
        )
        self._mean: Tensor = mean
        self._gram: Tensor = gram.float()
        self._cross: Tensor | None = None
        self._rest = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
        self._offset = torch.zeros_like(self._rest)
        if cross is not None and residue is not None and mean_error is not None:
            self._cross = weight @ cross.float().mT
            self._rest = _dot(weight @ residue.float(), weight)
            self._offset = torch.einsum("gmn,gn->gm", weight.double(), mean_error)
            mean = mean + mean_error
        energy = self._variance(weight) + torch.einsum("gmn,gn->gm", weight.double(), mean) ** 2
        self.energy: Matrix = energy.cpu().numpy()

    def of(self, quantized: QuantizedWeight) -> tuple[Matrix, Matrix]:
        """Return the variance and the mean of the error of each channel: [groups, out] each."""
        device = self._weight.device
        block = torch.as_tensor(quantized.grid.block_of(self._weight.shape[-1]), device=device)
        codes, scale, zero = (
            torch.as_tensor(x, device=device).float() for x in (quantized.codes, quantized.scale, quantized.zero_point)
        )
        difference = self._weight - (codes - zero[..., block]) * scale[..., block]
        offset = self._offset + torch.einsum("gmn,gn->gm", difference.double(), self._mean)
        return self._variance(difference).cpu().numpy(), offset.cpu().numpy()

    def _variance(self, difference: Tensor) -> Tensor:
        variance = _dot(difference @ self._gram, difference) + self._rest
        if self._cross is not None:
            variance = variance + 2 * _dot(difference, self._cross)
        return variance.clamp(min=0)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1, dtype=torch.float64)
