"""The norm of the rows of a scaled weight plus a low-rank update: one read of the weight, and nothing of its size."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_hw_kernels.cuda.launch import RANK_TILES, Tiles, on_device_of, rank_tile, taken
from sora_hw_kernels.cuda.scale_rank import precision
from sora_hw_kernels.reference import row_norm as reference


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
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """TILE_O norms: `W0 a^T` summed in registers over tiles of inputs, then the three terms of the square."""
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    r = tl.arange(0, TILE_R)
    o_in, r_in = o < OUT, r < R
    o_wide = o.to(tl.int64)

    cross = tl.zeros((TILE_O, TILE_R), dtype=tl.float32)
    for first in range(0, IN, TILE_I):
        i = first + tl.arange(0, TILE_I)
        w_at = weight + o_wide[:, None] * weight_stride_o + i[None, :].to(tl.int64) * weight_stride_i
        w_tile = tl.load(w_at, mask=o_in[:, None] & (i < IN)[None, :], other=0.0)
        a_tile = tl.load(a + i[:, None] + r[None, :] * IN, mask=(i < IN)[:, None] & r_in[None, :], other=0.0)
        cross = tl.dot(w_tile, a_tile.to(weight.dtype.element_ty), cross, input_precision=PRECISION)

    b_tile = tl.load(b + o[:, None] * R + r[None, :], mask=o_in[:, None] & r_in[None, :], other=0.0)
    b_gram_tile = tl.load(b_gram + o[:, None] * R + r[None, :], mask=o_in[:, None] & r_in[None, :], other=0.0)
    low_rank = tl.sum(b_gram_tile * b_tile, axis=1)
    mixed = 2.0 * tl.sum(cross * b_tile, axis=1)
    base = tl.load(norm_squared + o, mask=o_in, other=0.0)
    if HAS_SCALE:
        c = tl.load(scale + o, mask=o_in, other=0.0)
        base *= c * c
        mixed *= c
    # Rounding can leave a vanishing row slightly below zero; its norm is zero then, not NaN.
    tl.store(norm + o, tl.sqrt(tl.maximum(base + mixed + low_rank, 0.0)), mask=o_in)


def row_norm_tiles(rank: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the kernel: `rows` of the weight, few, so that a small one fills the card; `features` of its inputs."""
    tile = rank_tile(rank, largest=RANK_TILES[-1])
    if tile == 128:
        return Tiles(rows=16, features=64, rank=tile, warps=8, stages=2)
    wide = tile <= 32 and dtype != torch.float32
    return Tiles(rows=16, features=128 if wide else 64, rank=tile, warps=4, stages=3)


def factored_row_norm(weight: Tensor, norm_squared: Tensor, scale: Tensor | None, b: Tensor, a: Tensor) -> Tensor:
    """(out,); see `sora_hw.ops.factored_row_norm`."""
    (features, inputs), rank = weight.shape, b.shape[1]
    if not taken(weight, norm_squared, scale, b, a) or rank > RANK_TILES[-1]:
        return reference.factored_row_norm(weight, norm_squared, scale, b, a)
    a, b = a.contiguous(), b.contiguous()
    norm = torch.empty_like(norm_squared)
    tiles = row_norm_tiles(rank, weight.dtype)
    with on_device_of(weight):
        row_norm_kernel[(triton.cdiv(features, tiles.rows),)](
            weight,
            norm_squared,
            scale,
            b,
            a,
            b @ (a @ a.t()),
            norm,
            features,
            inputs,
            rank,
            *weight.stride(),
            HAS_SCALE=scale is not None,
            PRECISION=precision(weight.dtype),
            TILE_O=tiles.rows,
            TILE_I=tiles.features,
            TILE_R=tiles.rank,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return norm
