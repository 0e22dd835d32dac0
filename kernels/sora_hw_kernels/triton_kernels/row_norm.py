"""The norm of the rows of a scaled weight plus a low-rank update, for every device that Triton compiles for.

The programs share the tiles as those of `scale_rank` do.
"""

import triton
import triton.language as tl


@triton.jit
def row_norm_kernel(
    weight,
    norm_squared,
    scale,
    b,
    a,
    b_gram,
    norm,
    OUT,
    IN,
    R,
    weight_stride_o,
    weight_stride_i,
    a_stride_r,
    a_stride_i,
    STEPS,
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """TILE_O norms at a time: `W0 a^T` summed over tiles of inputs, then the three terms of the square."""
    for step in range(0, STEPS):
        tile = tl.program_id(0) + step * tl.num_programs(0)
        o = tile * TILE_O + tl.arange(0, TILE_O)
        r = tl.arange(0, TILE_R)
        o_in, r_in = o < OUT, r < R
        o_wide = o.to(tl.int64)

        cross = tl.zeros((TILE_O, TILE_R), dtype=tl.float32)
        for first in range(0, IN, TILE_I):
            i = first + tl.arange(0, TILE_I)
            w_at = weight + o_wide[:, None] * weight_stride_o + i[None, :].to(tl.int64) * weight_stride_i
            a_at = a + i[:, None] * a_stride_i + r[None, :] * a_stride_r
            w_tile = tl.load(w_at, mask=o_in[:, None] & (i < IN)[None, :], other=0.0)
            a_tile = tl.load(a_at, mask=(i < IN)[:, None] & r_in[None, :], other=0.0)
            cross = tl.dot(w_tile, a_tile.to(weight.dtype.element_ty), cross, input_precision=PRECISION)

        b_tile = tl.load(b + o[:, None] * R + r[None, :], mask=o_in[:, None] & r_in[None, :], other=0.0)
        b_gram_tile = tl.load(b_gram + o[:, None] * R + r[None, :], mask=o_in[:, None] & r_in[None, :], other=0.0)
        low_rank = tl.sum(b_gram_tile * b_tile, axis=1)
        mixed = 2.0 * tl.sum(cross * b_tile, axis=1)
        square = tl.load(norm_squared + o, mask=o_in, other=0.0)
        if HAS_SCALE:
            c = tl.load(scale + o, mask=o_in, other=0.0)
            square *= c * c
            mixed *= c
        # Rounding can leave a vanishing row slightly below zero; its norm is zero then, not NaN.
        tl.store(norm + o, tl.sqrt(tl.maximum(square + mixed + low_rank, 0.0)), mask=o_in)
