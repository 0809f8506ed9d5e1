"""Take the in-block step of the solver, all but the matrix products: in Triton on CUDA, else in torch.

Inputs are decided one after the other, all columns (channels of all scales and zero points) at once:

    q_i <- clip(round(q_i + v_i / (scale own_i))),    v_j <- v_j - a_ji scale (q_i's change)    for j > i

From q = 0 with own = 1 and a = M over its diagonal that is Babai rounding, v being what is left of each target; from
codes with own = H_ii and a = H it is a sweep of coordinate descent, v being the gradient.
"""

from __future__ import annotations

import functools
import os
from typing import Any, TypeAlias

import torch

Tensor: TypeAlias = Any
# columns of a program; its tile of v, 128 rows of them, stays in the registers of 4 warps
COLUMNS, WARPS = 32, 4


def step(
    v: Tensor, a: Tensor, own: Tensor, scale: Tensor, low: Tensor, high: Tensor, block: Tensor, codes: Tensor
) -> Tensor:
    """Decide the inputs of one block; return by how much each weight changed, [groups, block, columns].

    v: [groups, block, columns], left as each row was when its turn came
    a: read below the diagonal, [groups, block, block]
    own: [groups, block]
    scale: [groups, scales, columns]
    low, high: the codes' bounds less the zero point, [groups, scales, columns]
    block: the row of scale of each input, [groups, block]
    codes: less the zero point, changed in place, [groups, block, columns]
    """
    if (v.is_cuda or is_interpreted()) and triton_kernel() is not None:
        return step_in_triton(v, a, own, scale, low, high, block, codes)
    return step_in_torch(v, a, own, scale, low, high, block, codes)


def step_in_torch(
    v: Tensor, a: Tensor, own: Tensor, scale: Tensor, low: Tensor, high: Tensor, block: Tensor, codes: Tensor
) -> Tensor:
    """Take `step` as a loop of torch's operators."""
    change = torch.empty_like(v)
    for i in range(v.shape[1]):
        steps, least, most = (_row(rows, block[:, i]) for rows in (scale, low, high))
        q = torch.round(codes[:, i] + v[:, i] / (steps * own[:, i, None]))
        q = torch.minimum(torch.maximum(q, least), most)
        change[:, i] = (q - codes[:, i]) * steps
        codes[:, i] = q
        v[:, i + 1 :] -= a[:, i + 1 :, i, None] * change[:, i, None]
    return change


def step_in_triton(
    v: Tensor, a: Tensor, own: Tensor, scale: Tensor, low: Tensor, high: Tensor, block: Tensor, codes: Tensor
) -> Tensor:
    """Take `step` as a Triton kernel."""
    groups, rows, columns = v.shape
    assert v.stride(2) == codes.stride(2) == 1
    change = torch.empty_like(v)
    # a column of `a` is read at a time
    by_column = a.mT.contiguous()
    blocks, scales = block.to(torch.int32).contiguous(), scale.shape[1]
    triton_kernel()[(-(-columns // COLUMNS), groups)](
        v, by_column, own.contiguous(), scale.contiguous(), low.contiguous(), high.contiguous(), blocks, codes, change,
        rows, columns, scales, *v.stride()[:2], *codes.stride()[:2],
        ROWS=max(2, 1 << (rows - 1).bit_length()), COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return change


@functools.cache
def triton_kernel() -> Any:
    """Return the Triton kernel; None where Triton is not installed."""
    try:
        from comq_onnx.solve.gpu import triton_step
    except ImportError:
        return None
    return triton_step.kernel


def is_interpreted() -> bool:
    """Tell whether Triton interprets its kernels, on tensors of the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _row(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows[g, index[g]] of [groups, scales, columns]."""
    if rows.shape[1] == 1:
        return rows[:, 0]
    return torch.take_along_dim(rows, index[:, None, None], 1)[:, 0]
