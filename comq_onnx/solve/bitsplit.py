"""Refine codes by bit-split: take them apart into bit planes, optimize each in turn with its own scale, and stitch.

After Wang, Chen, He, Cheng: "Towards Accurate Post-training Network Quantization via Bit-Split and Stitching", ICML
2020. With q = sum_b 2^b t_b, t_b in {-1, 0, 1}, plane b by plane b, the highest first,

    alpha_b <- alpha_b + <t_b, V> / <t_b, H t_b>,    t_b,i <- clip(round(t_b,i + V_i / (alpha_b H_ii)))

both of them COMQ's closed forms, for the plane instead of the code. The planes are stitched by leaving the alphas out;
the caller refits the one scale and keeps what lowers the objective.
"""

from __future__ import annotations

import numpy as np

from comq_onnx.solve import kernels
from comq_onnx.solve.grid import Array
from comq_onnx.solve.problem import Part
from comq_onnx.solve.rounding import common_factor


def refine(part: Part, codes: Array, scale: Array, zero: Array) -> Array:
    """Return codes [channels, in] after one turn of every bit plane, back on the grid; arguments as in Rounding."""
    problem = part.problem
    # as many planes as the grid's codes may have: those of a channel must not depend on other channels
    planes = split(codes, problem.grid.bits)
    v = part.gradient(codes, scale)
    none = np.zeros_like(zero)
    for b in reversed(range(len(planes))):
        plane = planes[b]
        step = scale * np.float32(2**b)
        # the closed form of alpha_b, a common factor on the plane's steps
        values = plane * step[:, problem.block]
        image = values @ problem.h
        by = common_factor(np.einsum("cn,cn->c", values, v), np.einsum("cn,cn->c", values, image))[:, None]
        v -= by * image
        kernels.sweep(v, problem.h, step * (1 + by), none, problem.block, np.float32(-1), np.float32(1), plane)
    low, high = (np.float32(bound) - zero[:, problem.block] for bound in problem.bounds)
    return np.clip(stitch(planes), low, high)


def split(codes: Array, count: int) -> Array:
    """Return the bit planes [count, ...] of integer codes: t_b is the code's sign where its magnitude has bit b."""
    magnitude = np.abs(codes).astype(np.int32)
    bits = magnitude[None] >> np.arange(count).reshape(-1, *[1] * codes.ndim) & 1
    return np.ascontiguousarray(bits * np.sign(codes), np.float32)


def stitch(planes: Array) -> Array:
    """Return the codes of bit planes [count, ...]."""
    return np.asarray(np.tensordot(2.0 ** np.arange(len(planes)), planes, axes=1), np.float32)
