"""Take the in-block step in a Triton kernel: one program for a tile of columns, its rows of v in registers all along.

The Gram block is the same for all programs of a group and read a column at a time: at 64 KB it stays in the L1 cache,
the memory that shared memory is made of.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]
    v, a, own, scale, low, high, block, codes, change, rows, columns, scales, v_group, v_row, code_group, code_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Take step.step; v and change [groups, rows, columns], a [groups, rows, rows] transposed."""
    group = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    row = tl.arange(0, ROWS)
    tile = v + group * v_group + row[:, None] * v_row + column[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    left = tl.load(tile, mask=mask, other=0.0)
    for i in range(rows):
        mine = tl.sum(tl.where(row[:, None] == i, left, 0.0), axis=0)
        of = group * scales + tl.load(block + group * rows + i)
        size = tl.load(scale + of * columns + column, mask=inside, other=1.0)
        least = tl.load(low + of * columns + column, mask=inside, other=0.0)
        most = tl.load(high + of * columns + column, mask=inside, other=0.0)
        place = codes + group * code_group + i * code_row + column
        old = tl.load(place, mask=inside, other=0.0)
        # IEEE division, as torch and numpy have it; clipped to whole numbers first, so that rounding by adding and
        # taking away 1.5 * 2^23 is exact, half to even
        q = old + tl.div_rn(mine, size * tl.load(own + group * rows + i))
        q = tl.minimum(tl.maximum(q, least), most)
        q = (q + 12582912.0) - 12582912.0
        moved = (q - old) * size
        tl.store(place, q, mask=inside)
        tl.store(change + group * v_group + i * v_row + column, moved, mask=inside)
        factor = tl.load(a + (group * rows + i) * rows + row, mask=(row > i) & (row < rows), other=0.0)
        left -= factor[:, None] * moved[None, :]
    tl.store(tile, left, mask=mask)
