"""The inner loops of the solver, compiled by numba: columns (output channels) are the contiguous axis, in tiles.

Every array is [inputs, columns] in C order. A tile of TILE columns stays in the cache while one input after the other
is decided; columns do not depend on one another, so the tiles run in parallel and the result does not depend on how
many threads there are. Compiled code is cached beside the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

TILE = 64

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(function: F) -> F:
    return numba.njit(cache=True, parallel=True, error_model="numpy", boundscheck=False)(function)  # type: ignore[no-any-return]


@_compiled
def babai_block(target, unit, optimum, scale, zero, block, qmin, qmax, power, codes, gap, loss):  # type: ignore[no-untyped-def]
    """Round the inputs of one block, each from its target plus what the ones before it in the block left.

    target [b, m] holds w* and what earlier blocks contribute, unit [b, b] is M over its diagonal, block [b] the row of
    scale and zero [blocks, m], power [b] is M_ii^2. Writes codes, gap = w* - wq [b, m] and adds to loss [m].
    """
    rows, columns = target.shape
    for tile in numba.prange((columns + TILE - 1) // TILE):
        first = tile * TILE
        width = min(TILE, columns - first)
        left = np.zeros((rows, TILE), np.float32)  # gap, contiguous
        t = np.empty(TILE, np.float32)
        total = np.zeros(TILE, np.float32)
        for i in range(rows):
            for c in range(width):
                t[c] = target[i, first + c]
            # four at a time: t stays in registers that much longer
            fours = i // 4 * 4
            for k in range(0, fours, 4):
                f0, f1, f2, f3 = unit[i, k], unit[i, k + 1], unit[i, k + 2], unit[i, k + 3]
                for c in range(TILE):
                    t[c] += f0 * left[k, c] + f1 * left[k + 1, c] + f2 * left[k + 2, c] + f3 * left[k + 3, c]
            for k in range(fours, i):
                factor = unit[i, k]
                for c in range(TILE):
                    t[c] += factor * left[k, c]
            of, own = block[i], power[i]
            for c in range(width):
                step = scale[of, first + c]
                low, high = qmin - zero[of, first + c], qmax - zero[of, first + c]
                q = np.rint(t[c] / step)
                # not min and max: their care for NaN keeps the loop from being vectorized
                q = low if q < low else q
                q = high if q > high else q
                wq = q * step
                codes[i, first + c] = q
                left[i, c] = optimum[i, first + c] - wq
                total[c] += own * (t[c] - wq) * (t[c] - wq)
        for i in range(rows):
            for c in range(width):
                gap[i, first + c] = left[i, c]
        for c in range(width):
            loss[first + c] += total[c]


@_compiled
def sweep_block(v, h, scale, zero, block, qmin, qmax, codes, delta):  # type: ignore[no-untyped-def]
    """One pass of coordinate descent over a block of inputs; v [b, m] follows it.

    h [b, b] is the block's part of H. Changes codes [b, m] and writes the change of wq into delta [b, m].
    """
    rows, columns = v.shape
    for tile in numba.prange((columns + TILE - 1) // TILE):
        first = tile * TILE
        width = min(TILE, columns - first)
        local = np.zeros((rows, TILE), np.float32)  # v, contiguous
        change = np.zeros(TILE, np.float32)
        for i in range(rows):
            for c in range(width):
                local[i, c] = v[i, first + c]
        for i in range(rows):
            of, curvature = block[i], h[i, i]
            moved = np.float32(0)
            for c in range(width):
                step = scale[of, first + c]
                low, high = qmin - zero[of, first + c], qmax - zero[of, first + c]
                old = codes[i, first + c]
                q = np.rint(old + local[i, c] / (step * curvature))
                q = low if q < low else q
                q = high if q > high else q
                change[c] = (q - old) * step
                codes[i, first + c] = q
                delta[i, first + c] = change[c]
                moved += abs(q - old)
            if moved > 0:
                for j in range(rows):
                    factor = h[j, i]
                    for c in range(TILE):
                        local[j, c] -= factor * change[c]
        for i in range(rows):
            for c in range(width):
                v[i, first + c] = local[i, c]


@_compiled
def flip(v, h, scale, zero, block, qmin, qmax, codes, tolerance):  # type: ignore[no-untyped-def]
    """Move single codes by one, in each column the one that lowers the objective most, until none does by more than
    `tolerance` times its own curvature (below that float32 decides by noise, and flips could cycle).

    v [m, n] is the gradient with columns first. Changes codes [n, m].
    """
    columns, rows = v.shape
    for c in numba.prange(columns):
        for _ in range(rows):
            best = np.float32(0)
            at, move = -1, np.float32(0)
            for i in range(rows):
                step = scale[block[i], c]
                own = h[i, i] * step * step
                slope = 2 * v[c, i] * step
                direction = np.float32(1) if slope > 0 else np.float32(-1)
                gain = abs(slope) - own
                if gain <= tolerance * own or gain <= best:
                    continue
                q = codes[i, c] + direction
                low, high = qmin - zero[block[i], c], qmax - zero[block[i], c]
                if q < low or q > high:
                    continue
                best, at, move = gain, i, direction
            if at < 0:
                break
            codes[at, c] += move
            change = move * scale[block[at], c]
            for i in range(rows):
                v[c, i] -= h[at, i] * change


@_compiled
def span_errors(weight, shrinks, qmin, qmax, symmetric, start, stop, least, most, errors):  # type: ignore[no-untyped-def]
    """Squared error of plain rounding of weight [rows, inputs], inputs start to stop, at each shrink of its span.

    errors [rows, shrinks] is written. least and most widen every span (0: each row has its own). The arithmetic is
    grid.fit_minmax's.
    """
    for r in numba.prange(weight.shape[0]):
        low, high = least, most
        for i in range(start, stop):
            low, high = min(low, weight[r, i]), max(high, weight[r, i])
        for s in range(shrinks.size):
            # float64, as the span of float32's largest numbers is none of them
            lower, upper = np.float64(low) * shrinks[s], np.float64(high) * shrinks[s]
            span = max(-lower, upper) / qmax if symmetric else (upper - lower) / (qmax - qmin)
            scale = np.float32(span)
            if not scale > np.float32(3e-36):
                scale = np.float32(1)
            zero = np.float32(0)
            if not symmetric:
                zero = np.float32(min(max(np.rint(qmin - lower / scale), qmin), qmax))
            floor, ceiling = np.float32(qmin) - zero, np.float32(qmax) - zero
            total = 0.0
            for i in range(start, stop):
                q = np.rint(weight[r, i] / scale)
                q = floor if q < floor else q
                q = ceiling if q > ceiling else q
                rest = np.float64(weight[r, i]) - np.float64(q * scale)
                total += rest * rest
            errors[r, s] = total


@_compiled
def solve_small(h, unit, optimum, start, zero, qmin, qmax, factors, codes, scale):  # type: ignore[no-untyped-def]
    """Near-exact codes and scale of every channel of problems with few inputs (depthwise convolutions).

    For each factor on the start scale: Babai rounding, then single and pair moves of the codes and refits of the scale
    in turn until nothing falls; the factor with the least objective wins. h, unit [groups, n, n]; optimum, codes
    [groups, n, m]; start, zero, scale [groups, m].
    """
    groups, n, columns = optimum.shape
    for g in numba.prange(groups):
        gap, q, kept, v = np.empty(n), np.empty(n), np.empty(n), np.empty(n)
        for c in range(columns):
            low, high = qmin - zero[g, c], qmax - zero[g, c]
            best = np.inf
            for factor in factors:
                s = np.float64(start[g, c]) * factor
                for i in range(n):
                    t = np.float64(optimum[g, i, c])
                    for k in range(i):
                        t += unit[g, i, k] * gap[k]
                    q[i] = min(max(np.rint(t / s), low), high)
                    gap[i] = optimum[g, i, c] - q[i] * s
                for _ in range(8):
                    above, below = 0.0, 0.0
                    for i in range(n):
                        for k in range(n):
                            above += q[i] * h[g, i, k] * optimum[g, k, c]
                            below += q[i] * h[g, i, k] * q[k]
                    if below > 0 and above > 0:
                        # float32, or the codes would be judged at a scale that is not the one written
                        s = np.float64(np.float32(above / below))
                    if not _move_codes(h[g], optimum[g, :, c], s, low, high, q, v):
                        break
                loss = 0.0
                for i in range(n):
                    for k in range(n):
                        loss += (optimum[g, i, c] - q[i] * s) * h[g, i, k] * (optimum[g, k, c] - q[k] * s)
                if loss < best:
                    best = loss
                    scale[g, c] = s
                    kept[:] = q
            for i in range(n):
                codes[g, i, c] = kept[i]


@numba.njit(cache=True, error_model="numpy")
def _move_codes(h, optimum, s, low, high, q, v):  # type: ignore[no-untyped-def]
    """Single moves, then moves of two codes by one each, the best first, until none lowers the objective; if any
    did."""
    n = q.size
    for i in range(n):
        v[i] = 0.0
        for k in range(n):
            v[i] += h[i, k] * (optimum[k] - q[k] * s)
    any_moved = False
    for _ in range(16 * n):
        best, at, other, first, second = 0.0, -1, -1, 0.0, 0.0
        for i in range(n):
            for d in (-1.0, 1.0):
                if q[i] + d < low or q[i] + d > high:
                    continue
                own = 2 * d * s * v[i] - h[i, i] * s * s
                if own > best:
                    best, at, other, first, second = own, i, -1, d, 0.0
                for k in range(i):
                    for e in (-1.0, 1.0):
                        if q[k] + e < low or q[k] + e > high:
                            continue
                        both = own + 2 * e * s * v[k] - h[k, k] * s * s - 2 * d * e * s * s * h[i, k]
                        if both > best:
                            best, at, other, first, second = both, i, k, d, e
        if at < 0 or best <= 1e-6 * h[at, at] * s * s:
            break
        any_moved = True
        q[at] += first
        for i in range(n):
            v[i] -= h[i, at] * first * s
        if other >= 0:
            q[other] += second
            for i in range(n):
                v[i] -= h[i, other] * second * s
    return any_moved
