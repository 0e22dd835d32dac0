"""The call of the Triton-Ascend kernel of the row norm: one read of the weight, and nothing of its size."""

import torch
import triton
from torch import Tensor

from sora_hw_kernels.npu import launch
from sora_hw_kernels.npu.scale_rank import PRECISION
from sora_hw_kernels.npu.tiles import row_norm_tiles
from sora_hw_kernels.triton_kernels.row_norm import row_norm_kernel


def factored_row_norm(weight: Tensor, norm_squared: Tensor, scale: Tensor | None, b: Tensor, a: Tensor) -> Tensor:
    """(out,); see `sora_hw.ops.factored_row_norm`."""
    (features, inputs), rank = weight.shape, b.shape[1]
    b_gram = (b @ (a @ a.t())).contiguous()
    # Row by row of inputs, and in the dtype of the weight: the matrix unit then loads it straight from memory.
    a = a.to(weight.dtype).t().contiguous()
    norm = torch.empty_like(norm_squared)
    tiles = row_norm_tiles(rank, weight.dtype)
    programs, steps = launch.share(triton.cdiv(features, tiles.rows), launch.ai_cores(weight.device))
    with launch.on_device_of(weight):
        row_norm_kernel[(programs,)](
            weight,
            norm_squared,
            scale,
            b.contiguous(),
            a,
            b_gram,
            norm,
            features,
            inputs,
            rank,
            *weight.stride(),
            a.stride(1),
            a.stride(0),
            STEPS=steps,
            HAS_SCALE=scale is not None,
            PRECISION=PRECISION,
            TILE_O=tiles.rows,
            TILE_I=tiles.features,
            TILE_R=tiles.rank,
        )
    return norm
