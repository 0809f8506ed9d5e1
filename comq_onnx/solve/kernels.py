"""Run the inner loops of the solver, compiled by numba.

Output channels do not depend on one another: a kernel works on the channels it is given, in one thread, without
Python's lock; callers hand parts of a layer's channels to threads. Rounding one input after the other (`babai_block`)
has the channels as the contiguous axis, in tiles that stay in the cache; what works along one channel's inputs
(`sweep`, `move_best_first`) has the inputs as the contiguous axis.
"""

from __future__ import annotations

import numpy as np

from comq_onnx.solve.compiled import compiled

TILE = 64
WALL = np.float32(1e30)


@compiled
def babai_block(whole, target, unit, scale, zero, block, qmin, qmax, root, codes, wq, sums):  # type: ignore[no-untyped-def]
    """Round the inputs of one block, each from its target less what the ones before it in the block took.

    whole: M w* over M's diagonal, [b, m]
    target: the same less what earlier blocks took, [b, m]
    unit: M over its diagonal, [b, b]
    scale, zero: [blocks, m]
    block: the row of scale and zero of each input, [b]
    qmin, qmax: the lowest and the highest code
    root: M_ii, [b]
    codes, wq: written; codes less the zero point and their values, [b, m]
    sums: ||y||^2, <y, M wq> and ||M wq||^2, y = M (w* - wq), are added to it, [3, m]
    """
    rows, columns = whole.shape
    for tile in range((columns + TILE - 1) // TILE):
        first = tile * TILE
        width = min(TILE, columns - first)
        # one array: numba compiles each way to make one
        room = np.zeros((rows + 4, TILE), np.float32)
        t, loss, cross, norm, taken = room[0], room[1], room[2], room[3], room[4:]  # taken: wq, contiguous
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


@compiled
def _subtract(v, factor, row):  # type: ignore[no-untyped-def]
    for k in range(v.size):
        v[k] -= factor * row[k]


@compiled
def sweep(v, h, scale, zero, block, qmin, qmax, codes):  # type: ignore[no-untyped-def]
    """Pass once over every channel's inputs by coordinate descent; return how many codes changed.

    q_i <- clip(round(q_i + V_i / (scale H_ii))). A code that stays costs one rounding.

    v: the gradient (W* - Wq) H, which follows the codes, [m, n]
    h: H, [n, n]
    scale, zero: [m, blocks]
    block: the column of scale and zero of each input, [n]
    qmin, qmax: the lowest and the highest code
    codes: less the zero point, changed in place, [m, n]
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


@compiled
def move_best_first(v, h, scale, zero, block, qmin, qmax, codes, tolerance, pairs):  # type: ignore[no-untyped-def]
    """Move codes by one, in each channel the move first that lowers the objective most.

    Moves end when none lowers the objective by more than `tolerance` times a code's own curvature: below that float32
    decides by noise, and moves could cycle. When no single code is left to move, two at a time move.

    v, h, scale, zero, block, qmin, qmax, codes: as in `sweep`
    pairs: how many codes, those that cost least to move, are tried two at a time
    """
    columns, rows = v.shape
    room = np.zeros((5, rows), np.float32)
    # above, below: what a step up or down costs where there is no code to go to
    step, own, gain, above, below = room[0], room[1], room[2], room[3], room[4]
    few, near = np.zeros((7, pairs + 1), np.float32), np.zeros((pairs + 1, pairs + 1), np.float32)
    best, at = few[6], np.empty(pairs + 1, np.intp)
    for c in range(columns):
        slope, q = v[c], codes[c]
        for i in range(rows):
            step[i] = scale[c, block[i]]
            own[i] = h[i, i] * step[i] * step[i]
            above[i] = WALL if q[i] >= qmax - zero[c, block[i]] else np.float32(0)
            below[i] = WALL if q[i] <= qmin - zero[c, block[i]] else np.float32(0)
        for _ in range(2 * rows):
            top = _compute_gains(slope, step, own, above, below, gain)
            found = 0
            if top > 0:
                at[0] = _index_of(gain, top)
                if top > tolerance * own[at[0]]:
                    found = 1
                    few[5, 0] = 1 if slope[at[0]] * step[at[0]] > 0 else -1
            if found == 0 and pairs > 0:
                count = _find_cheapest(gain, pairs, best, at)
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


@compiled
def _move_pairs(few, near, count, tolerance):  # type: ignore[no-untyped-def]
    """Move one or two of a few codes by one each, the best move first; tell whether any moved.

    few: rows of scale * V, scale^2 H_ii, the code, its two bounds and, written, the change of the code; [6, codes]
    near: scale H scale among them, [codes, codes]
    """
    for a in range(count):
        few[5, a] = 0
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


@compiled
def _compute_gains(slope, step, own, above, below, gain):  # type: ignore[no-untyped-def]
    """Write to `gain` by how much the better step of each code lowers the objective; return the largest gain."""
    top = -WALL
    for i in range(gain.size):
        double = np.float32(2) * slope[i] * step[i]
        up, down = double - above[i], -double - below[i]
        one = (up if up > down else down) - own[i]
        gain[i] = one
        top = one if one > top else top
    return top


@compiled
def _index_of(values, wanted):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        if values[i] == wanted:
            return i
    return -1


@compiled
def _find_cheapest(gain, count, best, at):  # type: ignore[no-untyped-def]
    """Write to `at` the `count` codes that cost least to move; return how many there are."""
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


@compiled
def beam_block(target, unit, scale, zero, block, qmin, qmax, root, codes, wq, loss, origin):  # type: ignore[no-untyped-def]
    """Round as `babai_block` does, but keep the `width` roundings of each channel that have the least loss so far.

    target, codes, wq: [b, m, width]
    loss: ||y||^2 so far, infinite for a rounding not begun; [m, width], changed in place
    origin: written, which of the roundings before the block each one goes on from; [m, width]
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
                beside = near + (np.float32(1) if (t[k] > near * step) == (step > 0) else np.float32(-1))
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


@compiled
def paper_sweep(v, gram, visits, scale, zero, block, qmin, qmax, codes, wq):  # type: ignore[no-untyped-def]
    """Set q_i <- clip(round((V_i + G_ii wq_i) / (scale G_ii))) along each channel's own order.

    v: (W - Wq) G, which follows, [m, n]
    gram: G, [n, n]
    visits: the inputs of each channel in the order in which they are visited, [m, n]
    scale, zero: [m, blocks]
    block: the column of scale and zero of each input, [n]
    qmin, qmax: the lowest and the highest code
    codes, wq: codes less the zero point, written, and their values, changed in place; [m, n]
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
