"""The inner loops of the solver, compiled by numba.

Output channels do not depend on one another: a kernel works on the channels it is given, in one thread, without
Python's lock; callers hand parts of a layer's channels to threads. Rounding one input after the other (`babai_block`)
has the channels as the contiguous axis, in tiles that stay in the cache; what works along one channel's inputs
(`sweep`, `flip`, `flip_pairs`) has the inputs as the contiguous axis. Compiled code is cached beside the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

TILE = 64
WALL = np.float32(1e30)
F = TypeVar("F", bound=Callable[..., Any])


def _compiled(function: F, *reordering: str) -> F:
    # nnan and nsz let a maximum be vectorized; sums keep their order
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"nnan", "nsz", *reordering}}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # nowhere to keep it: a package nobody may write to, and no home
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


def _reordered(function: F) -> F:
    return _compiled(function, "reassoc", "contract")


@_compiled
def babai_block(whole, target, unit, scale, zero, block, qmin, qmax, root, codes, wq, sums):  # type: ignore[no-untyped-def]
    """Round the inputs of one block, each from its target less what the ones before it in the block took.

    whole [b, m] is M w* over M's diagonal, target [b, m] the same less what earlier blocks took, unit [b, b] M over its
    diagonal, block [b] the row of scale and zero [blocks, m], root [b] is M_ii. Writes codes and wq [b, m]; adds
    ||y||^2, <y, M wq> and ||M wq||^2, y = M (w* - wq), to sums [3, m].
    """
    rows, columns = whole.shape
    for tile in range((columns + TILE - 1) // TILE):
        first = tile * TILE
        width = min(TILE, columns - first)
        taken = np.zeros((rows, TILE), np.float32)  # wq, contiguous
        t = np.zeros(TILE, np.float32)
        loss, cross, norm = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
        for i in range(rows):
            for c in range(width):
                t[c] = target[i, first + c]
            # eight at a time: t stays in registers that much longer
            eights = i // 8 * 8
            for k in range(0, eights, 8):
                f0, f1, f2, f3 = unit[i, k], unit[i, k + 1], unit[i, k + 2], unit[i, k + 3]
                f4, f5, f6, f7 = unit[i, k + 4], unit[i, k + 5], unit[i, k + 6], unit[i, k + 7]
                for c in range(TILE):
                    t[c] -= (
                        f0 * taken[k, c] + f1 * taken[k + 1, c] + f2 * taken[k + 2, c] + f3 * taken[k + 3, c]
                        + f4 * taken[k + 4, c] + f5 * taken[k + 5, c] + f6 * taken[k + 6, c] + f7 * taken[k + 7, c]
                    )  # fmt: skip
            for k in range(eights, i):
                factor = unit[i, k]
                for c in range(TILE):
                    t[c] -= factor * taken[k, c]
            of, own = block[i], root[i]
            for c in range(width):
                step = scale[of, first + c]
                low, high = qmin - zero[of, first + c], qmax - zero[of, first + c]
                q = np.rint(t[c] / step)
                # not min and max: their care for NaN keeps the loop from being vectorized
                q = low if q < low else q
                q = high if q > high else q
                codes[i, first + c] = q
                taken[i, c] = q * step
                wq[i, first + c] = q * step
                y = own * (t[c] - q * step)
                image = own * whole[i, first + c] - y
                loss[c] += y * y
                cross[c] += y * image
                norm[c] += image * image
        for c in range(width):
            sums[0, first + c] += loss[c]
            sums[1, first + c] += cross[c]
            sums[2, first + c] += norm[c]


@_compiled
def _subtract(v, factor, row):  # type: ignore[no-untyped-def]
    for k in range(v.size):
        v[k] -= factor * row[k]


@_compiled
def sweep(v, h, scale, zero, block, qmin, qmax, codes):  # type: ignore[no-untyped-def]
    """One pass of coordinate descent over every channel's inputs; a code that stays costs one rounding.

    v [m, n] = (W* - Wq) H follows the codes [m, n] (less the zero point); scale and zero [m, blocks]. Returns how many
    codes changed.
    """
    columns, rows = v.shape
    changed = 0
    for c in range(columns):
        for i in range(rows):
            step = scale[c, block[i]]
            old = codes[c, i]
            q = np.rint(old + v[c, i] / (step * h[i, i]))
            if q == old:
                continue
            low, high = qmin - zero[c, block[i]], qmax - zero[c, block[i]]
            q = low if q < low else q
            q = high if q > high else q
            if q == old:
                continue
            change = (q - old) * step
            codes[c, i] = q
            changed += 1
            _subtract(v[c], change, h[i])
    return changed


@_compiled
def flip(v, h, scale, zero, block, qmin, qmax, codes, tolerance, pairs):  # type: ignore[no-untyped-def]
    """Move codes by one, in each channel first what lowers the objective most, until nothing does by more than
    `tolerance` times a code's own curvature (below that float32 decides by noise, and moves could cycle).

    When no single code is left to move, the `pairs` codes that cost least are moved two at a time. v [m, n] =
    (W* - Wq) H follows the codes [m, n]; scale and zero [m, blocks].
    """
    columns, rows = v.shape
    step, own, gain = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
    # what a step up or down costs where there is no code to go to
    above, below = np.empty(rows, np.float32), np.empty(rows, np.float32)
    best, at = np.empty(pairs + 1, np.float32), np.empty(pairs + 1, np.intp)
    few, near = np.empty((6, pairs + 1), np.float32), np.empty((pairs + 1, pairs + 1), np.float32)
    for c in range(columns):
        slope, q = v[c], codes[c]
        for i in range(rows):
            step[i] = scale[c, block[i]]
            own[i] = h[i, i] * step[i] * step[i]
            above[i] = WALL if q[i] >= qmax - zero[c, block[i]] else np.float32(0)
            below[i] = WALL if q[i] <= qmin - zero[c, block[i]] else np.float32(0)
        for _ in range(2 * rows):
            top = _gains(slope, step, own, above, below, gain)
            found = 0
            if top > 0:
                at[0] = _find(gain, top)
                if top > tolerance * own[at[0]]:
                    found = 1
                    few[5, 0] = 1 if slope[at[0]] > 0 else -1
            if found == 0 and pairs > 0:
                count = _least(gain, pairs, best, at)
                for a in range(count):
                    i = at[a]
                    of = block[i]
                    few[0, a], few[1, a], few[2, a] = slope[i] * step[i], own[i], q[i]
                    few[3, a], few[4, a] = qmin - zero[c, of], qmax - zero[c, of]
                    for b in range(a):
                        near[a, b] = near[b, a] = h[i, at[b]] * step[i] * step[at[b]]
                    near[a, a] = own[i]
                if _move_pairs(few, near, count, tolerance):
                    found = count
            if found == 0:
                break
            for a in range(found):
                if few[5, a] != 0:
                    i = at[a]
                    q[i] += few[5, a]
                    above[i] = WALL if q[i] >= qmax - zero[c, block[i]] else np.float32(0)
                    below[i] = WALL if q[i] <= qmin - zero[c, block[i]] else np.float32(0)
                    _subtract(slope, few[5, a] * step[i], h[i])


@_compiled
def _move_pairs(few, near, count, tolerance):  # type: ignore[no-untyped-def]
    """Move one or two of a few codes by one each, what lowers the objective most first; if any moved.

    few: rows of scale * V, scale^2 H_ii, code, its bounds, and, written, what each code changed by; near: scale H
    scale among them.
    """
    few[5, :count] = 0
    any_moved = False
    for _ in range(4 * count):
        most, first, second = np.float32(0), -1, -1
        for a in range(count):
            up = np.float32(1) if few[0, a] > 0 else np.float32(-1)
            if few[2, a] + up < few[3, a] or few[2, a] + up > few[4, a]:
                continue
            one = np.float32(2) * abs(few[0, a]) - few[1, a]
            if one > most and one > tolerance * few[1, a]:
                most, first, second = one, a, -1
            for b in range(a):
                other = np.float32(1) if few[0, b] > 0 else np.float32(-1)
                both = one + np.float32(2) * (abs(few[0, b]) - up * other * near[a, b]) - few[1, b]
                if both > most and both > tolerance * (few[1, a] + few[1, b]):
                    if few[2, b] + other < few[3, b] or few[2, b] + other > few[4, b]:
                        continue
                    most, first, second = both, a, b
        if first < 0:
            break
        any_moved = True
        up = np.float32(1) if few[0, first] > 0 else np.float32(-1)
        other = np.float32(0)
        if second >= 0:
            other = np.float32(1) if few[0, second] > 0 else np.float32(-1)
            few[2, second] += other
            few[5, second] += other
        few[2, first] += up
        few[5, first] += up
        for a in range(count):
            few[0, a] -= up * near[first, a]
            if second >= 0:
                few[0, a] -= other * near[second, a]
    return any_moved


@_compiled
def _gains(slope, step, own, above, below, gain):  # type: ignore[no-untyped-def]
    """What each code's better step lowers the objective by, into `gain`; the most of it."""
    top = -WALL
    for i in range(gain.size):
        double = np.float32(2) * slope[i] * step[i]
        up, down = double - above[i], -double - below[i]
        one = (up if up > down else down) - own[i]
        gain[i] = one
        top = one if one > top else top
    return top


@_compiled
def _find(values, wanted):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        if values[i] == wanted:
            return i
    return -1


@_compiled
def _least(gain, count, best, at):  # type: ignore[no-untyped-def]
    """The `count` codes that cost least to move: how many there are, and in `at` which."""
    found = 0
    for i in range(gain.size):
        if gain[i] <= -0.5 * WALL:
            continue
        cost = gain[i]
        if found == count and cost <= best[found - 1]:
            continue
        k = found if found < count else count - 1
        while k > 0 and best[k - 1] < cost:
            best[k], at[k] = best[k - 1], at[k - 1]
            k -= 1
        best[k], at[k] = cost, i
        found = min(found + 1, count)
    return found


@_compiled
def beam_block(target, unit, scale, zero, block, qmin, qmax, root, codes, wq, loss, origin):  # type: ignore[no-untyped-def]
    """babai_block with several roundings of each channel kept: the likeliest few of all that the next code allows.

    target, codes, wq [b, m, width]; loss [m, width] is ||y||^2 so far, infinite for a rounding not begun;
    origin [m, width] tells which of the roundings before the block each one goes on from.
    """
    rows, columns, width = target.shape
    taken, number = np.empty((rows, width), np.float32), np.empty((rows, width), np.float32)
    t = np.empty(width, np.float32)
    best, parent, choice = np.empty(width, np.float32), np.empty(width, np.intp), np.empty(width, np.float32)
    line, moved = np.empty(width, np.intp), np.empty(width, np.intp)
    for c in range(columns):
        for k in range(width):
            line[k] = k
        for i in range(rows):
            step, own = scale[block[i], c], root[i]
            low, high = qmin - zero[block[i], c], qmax - zero[block[i], c]
            # parents share what they took before only by their line: target is of the rounding before the block
            for k in range(width):
                t[k] = target[i, c, line[k]]
            for j in range(i):
                factor = unit[i, j]
                for k in range(width):
                    t[k] -= factor * taken[j, k]
            for k in range(width):
                best[k] = np.inf
                parent[k], choice[k] = 0, 0
            for k in range(width):
                if loss[c, k] == np.inf:
                    continue
                near = np.float32(np.rint(t[k] / step))
                near = min(max(near, low), high)
                beside = near + (np.float32(1) if t[k] > near * step else np.float32(-1))
                for q in (near, beside):
                    if q < low or q > high:
                        continue
                    y = own * (t[k] - q * step)
                    total = loss[c, k] + y * y
                    if total >= best[width - 1]:
                        continue
                    a = width - 1
                    while a > 0 and best[a - 1] > total:
                        best[a], parent[a], choice[a] = best[a - 1], parent[a - 1], choice[a - 1]
                        a -= 1
                    best[a], parent[a], choice[a] = total, k, q
            for k in range(width):
                moved[k] = line[parent[k]]
            for k in range(width):
                line[k] = moved[k]
                loss[c, k] = best[k]
            for j in range(i):
                for k in range(width):
                    t[k] = taken[j, parent[k]]
                for k in range(width):
                    taken[j, k] = t[k]
                for k in range(width):
                    t[k] = number[j, parent[k]]
                for k in range(width):
                    number[j, k] = t[k]
            for k in range(width):
                number[i, k] = choice[k]
                taken[i, k] = choice[k] * step
        for i in range(rows):
            for k in range(width):
                codes[i, c, k], wq[i, c, k] = number[i, k], taken[i, k]
        for k in range(width):
            origin[c, k] = line[k]


@_compiled
def paper_sweep(v, gram, visits, scale, zero, block, qmin, qmax, codes, wq):  # type: ignore[no-untyped-def]
    """q_i <- clip(round((V_i + G_ii wq_i) / (scale G_ii))) along each channel's own order, visits [m, n].

    v [m, n] = (W - Wq) G follows; codes and wq [m, n] are written; scale and zero [m, blocks].
    """
    columns, rows = v.shape
    for c in range(columns):
        for k in range(rows):
            i = visits[c, k]
            step, own = scale[c, block[i]], gram[i, i]
            low, high = qmin - zero[c, block[i]], qmax - zero[c, block[i]]
            # a dead input: plain rounding
            target = wq[c, i] + v[c, i] / own if own > 0 else wq[c, i]
            q = np.rint(target / step)
            q = low if q < low else q
            q = high if q > high else q
            change = q * step - wq[c, i]
            codes[c, i] = q
            wq[c, i] += change
            _subtract(v[c], change, gram[i])


@_compiled
def span_errors(weight, shrinks, qmin, qmax, symmetric, start, stop, least, most, errors):  # type: ignore[no-untyped-def]
    """Squared error of plain rounding of weight [rows, inputs], inputs start to stop, at each shrink of its span.

    errors [rows, shrinks] is written. least and most widen every span (0: each row has its own). The arithmetic is
    grid.fit_minmax's.
    """
    for r in range(weight.shape[0]):
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
            # in steps of the grid: no square overflows
            steps = _rounding_error(weight[r, start:stop], np.float32(1) / scale, floor, ceiling)
            errors[r, s] = np.float64(steps) * np.float64(scale) * np.float64(scale)


@_reordered
def _rounding_error(weight, inverse, floor, ceiling):  # type: ignore[no-untyped-def]
    """The sum of (t - clip(round(t)))^2, t = weight * inverse; its order is the compiler's, to be vectorized."""
    total = np.float32(0)
    for i in range(weight.size):
        t = weight[i] * inverse
        q = np.rint(t)
        q = floor if q < floor else q
        q = ceiling if q > ceiling else q
        total += (t - q) * (t - q)
    return total


@_compiled
def solve_small(h, unit, optimum, start, zero, qmin, qmax, factors, codes, scale):  # type: ignore[no-untyped-def]
    """Near-exact codes and scale of every channel of problems with few inputs (depthwise convolutions).

    For each factor on the start scale: Babai rounding, then single and pair moves of the codes and refits of the scale
    in turn until nothing falls; the factor with the least objective wins. h, unit [groups, n, n]; optimum, codes
    [groups, n, m]; start, zero, scale [groups, m].
    """
    groups, n, columns = optimum.shape
    for g in range(groups):
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


@_compiled
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


@_compiled
def rounding_error(x, scale, zero, low, high):  # type: ignore[no-untyped-def]
    """What x [n, channels] loses by rounding: (q - zero) * scale - x of the codes q = clip(rint(x / scale) + zero, low,
    high)."""
    error = np.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            code = min(max(np.rint(x[n, c] / scale) + zero, low), high)
            error[n, c] = (code - zero) * scale - x[n, c]
    return error
