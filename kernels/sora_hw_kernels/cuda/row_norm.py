"""The norm of the rows of a scaled weight plus a low-rank update: one read of the weight, and nothing of its size."""

from functools import cache

import torch
from torch import Tensor

from sora_hw_kernels.cuda.launch import Launch, Tiles
from sora_hw_kernels.cuda.scale_rank import STEPS, precision
from sora_hw_kernels.reference import row_norm as reference
from sora_hw_kernels.triton_kernels.inputs import RANK_TILES, rank_tile, taken
from sora_hw_kernels.triton_kernels.row_norm import row_norm_kernel


@cache
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
    row_norm_launch(rank, weight.dtype, scale is not None)(
        -(-features // tiles.rows),
        (weight, norm_squared, scale, b, a, b @ (a @ a.t()), norm),
        (features, inputs, rank, *weight.stride(), *a.stride(), STEPS),
    )
    return norm


@cache
def row_norm_launch(rank: int, dtype: torch.dtype, scale: bool) -> Launch:
    tiles = row_norm_tiles(rank, dtype)
    return Launch(
        row_norm_kernel,
        tiles.warps,
        tiles.stages,
        HAS_SCALE=scale,
        PRECISION=precision(dtype),
        TILE_O=tiles.rows,
        TILE_I=tiles.features,
        TILE_R=tiles.rank,
    )
