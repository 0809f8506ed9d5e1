"""Descend from a rounding: sweeps over the codes, refits of the scales, and moves of one and two codes, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from comq_onnx.solve import kernels
from comq_onnx.solve.effort import Effort
from comq_onnx.solve.grid import Array
from comq_onnx.solve.problem import Part
from comq_onnx.solve.rounding import Rounding, common_factor, pool_if_shared

# a move must lower the objective by this share of the code's curvature
MOVE_TOLERANCE = 1e-4


def descend(parts: Sequence[Part], start: Sequence[Rounding], effort: Effort) -> list[Rounding]:
    """Sweep the codes and refit the scales in turn; at the end move single codes and pairs, best first.

    `start` keeps its arrays. One scale a channel is the best for the start's codes already, and is refitted once more
    at the end, where it costs no product; several scales are refitted together before.
    """
    if not effort.descend:
        return list(start)
    now = [replace(one, codes=one.codes.copy()) for one in start]
    several = now[0].scale.shape[1] > 1
    for _ in range(effort.rounds + several):
        gradients = sweep(parts, now)
        now = refit(parts, now, gradients)
    gradients = sweep(parts, now)
    for part, one, v in zip(parts, now, gradients, strict=True):
        problem = part.problem
        kernels.move_best_first(
            v, problem.h, one.scale, one.zero, problem.block, *problem.bounds, one.codes, np.float32(MOVE_TOLERANCE),
            effort.pairs,
        )  # fmt: skip
    return now if several else refit(parts, now, gradients)


def sweep(parts: Sequence[Part], now: Sequence[Rounding]) -> list[Array]:
    """Sweep twice over the codes, which change in place, and return the gradients after that."""
    gradients = [part.gradient(one.codes, one.scale) for part, one in zip(parts, now, strict=True)]
    for part, one, v in zip(parts, now, gradients, strict=True):
        for _ in range(2):
            problem = part.problem
            kernels.sweep(v, problem.h, one.scale, one.zero, problem.block, *problem.bounds, one.codes)
    return gradients


def refit(parts: Sequence[Part], now: Sequence[Rounding], gradients: Sequence[Array]) -> list[Rounding]:
    """Set the scales to the best for their codes, from the gradients at the present ones.

    Scales per block by least squares, else the closed form <q, H w*> / <q, H q> = scale (1 + <wq, V> / <wq, H wq>).
    """
    if now[0].scale.shape[1] > 1:
        systems = [_block_system(part, one, v) for part, one, v in zip(parts, now, gradients, strict=True)]
        if parts[0].problem.grid.tied:
            systems = [tuple(sum(numbers) for numbers in zip(*systems, strict=True))] * len(systems)
        return [_refit_blocks(one, *system) for one, system in zip(now, systems, strict=True)]
    slopes = [np.einsum("cn,cn->c", one.codes * one.scale, v) for one, v in zip(now, gradients, strict=True)]
    norms = [one.norm for one in now]
    factors = [
        common_factor(slope, norm)
        for slope, norm in zip(pool_if_shared(parts, slopes), pool_if_shared(parts, norms), strict=True)
    ]
    return [replace(one, scale=one.scale * (1 + by)[:, None], norm=one.norm * (1 + by) ** 2)
            for one, by in zip(now, factors, strict=True)]  # fmt: skip


def refit_to_float(parts: Sequence[Part], now: Sequence[Rounding]) -> list[Rounding]:
    """Set one scale a channel to the best for its codes where the target is the output of the float model.

    Codes are sought for half of the mismatch, since all of it would fit the noise of few samples. One number a channel
    is certain enough for all of it: otherwise outputs shrink a little from layer to layer. At the best scale for one
    half <wq, V> is 0, so that the other half adds <wq, B> / <wq, H wq>. Scales per block stay as they are.
    """
    pulls = [part.pull for part in parts if part.pull is not None]
    if not pulls or now[0].scale.shape[1] > 1:
        return list(now)
    slopes = [np.einsum("cn,cn->c", one.codes * one.scale, pull) for one, pull in zip(now, pulls, strict=True)]
    norms = pool_if_shared(parts, [one.norm for one in now])
    factors = [common_factor(*pair) for pair in zip(pool_if_shared(parts, slopes), norms, strict=True)]
    return [replace(one, scale=one.scale * (1 + by)[:, None]) for one, by in zip(now, factors, strict=True)]


def _block_system(part: Part, now: Rounding, v: Array) -> tuple[Array, Array]:
    """Return <q_a, H q_b> of the codes of all blocks and <q_b, V>: [channels, blocks, blocks] and [channels, blocks].

    v: the gradient, [channels, in]
    """
    problem, blocks = part.problem, now.scale.shape[1]
    rows = [np.flatnonzero(problem.block == b) for b in range(blocks)]
    by_block = np.concatenate(rows)
    edges = np.concatenate([[0], np.cumsum([len(r) for r in rows])[:-1]])
    codes = np.ascontiguousarray(now.codes[:, by_block])
    products = np.empty((len(codes), blocks, blocks), np.float32)
    for b, r in enumerate(rows):
        image = now.codes[:, r] @ problem.h[np.ix_(r, by_block)]
        products[:, b] = np.add.reduceat(image * codes, edges, axis=1)
    return products, np.add.reduceat(v[:, by_block] * codes, edges, axis=1)


def _refit_blocks(now: Rounding, products: Array, slopes: Array) -> Rounding:
    """Refit all scales of a channel at once, from what `_block_system` gives.

    With q_b the codes of block b, the changes d solve

        sum_a <q_b, H q_a> d_a = <q_b, V>

    and are kept for the channels whose objective falls and whose scales are at most halved or doubled.
    """
    products = products.copy()
    diagonal = np.einsum("cbb->cb", products)
    # without this, blocks of zeros and blocks of equal codes make the system singular
    diagonal += 1e-4 * diagonal.mean(axis=1, keepdims=True) + np.float32(np.finfo(np.float32).tiny)
    change = np.linalg.solve(products.astype(np.float64), slopes[..., None].astype(np.float64))[..., 0]
    moved = (now.scale + change).astype(np.float32)
    gain = 2 * np.einsum("cb,cb->c", change, slopes) - np.einsum("ca,cab,cb->c", change, products, change)
    ratio = moved / now.scale
    good = (gain > 0) & ((ratio > 0.5) & (ratio < 2)).all(axis=1)
    return replace(now, scale=np.where(good[:, None], moved, now.scale))
