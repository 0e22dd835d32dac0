"""The calls of the Triton-Ascend kernels of `y = scale * base + z b^T + bias` and its gradients.

The forward kernel multiplies the skinny factors in the matrix unit and does the rest in the vector cores: one read of
`base`, one write of `y`. The backward kernel runs in the vector cores alone: one read of the gradient and of what was
saved gives the gradients of `base`, `scale` and `bias`. The gradients of `z` and `b` are the vendor's products: the two
kinds of core share no memory, so the matrix unit would read the gradient for itself all the same.
"""

import torch
import triton
from torch import Tensor

from sora_hw.ops import empty_gradients
from sora_hw_kernels.npu import launch
from sora_hw_kernels.npu.composition import rank_gradients, scale_gradient
from sora_hw_kernels.npu.tiles import backward_tiles, forward_tiles
from sora_hw_kernels.triton_kernels.inputs import with_unit_columns
from sora_hw_kernels.triton_kernels.scale_rank import backward_kernel, forward_kernel

# Float32 operands are multiplied as they are, not rounded to HF32.
PRECISION = "ieee"
# Parts of the rows, by cores: enough for the last step to leave few cores idle.
_PARTS_A_CORE = 4


def forward(base: Tensor, scale: Tensor | None, z: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """(N, out); see `sora_hw.ops.scale_rank_update`."""
    return _update(base, z, b.t(), scale=scale, bias=bias)


def input_gradient(grad: Tensor, dz: Tensor, a: Tensor, mask: Tensor | None, mask_scale: float) -> Tensor:
    """(N, in); see `sora_hw_kernels.reference.scale_rank.input_gradient`. The same update, on the other side."""
    return _update(grad, dz, a, mask=mask, mask_scale=mask_scale)


def _update(
    base: Tensor,
    z: Tensor,
    b: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    mask_scale: float = 1.0,
) -> Tensor:
    base, scale, bias = (None if t is None else with_unit_columns(t) for t in (base, scale, bias))
    mask = None if mask is None else mask.contiguous()
    # The small factors in float32 and row by row: the matrix unit then loads them straight from memory.
    z, b = z.float().contiguous(), b.float().contiguous()
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    (rows, features), rank = base.shape, z.shape[1]
    tiles = forward_tiles(rank, base.dtype)
    programs, steps = launch.share(
        triton.cdiv(rows, tiles.rows) * triton.cdiv(features, tiles.features), launch.ai_cores(base.device)
    )
    with launch.on_device_of(base):
        forward_kernel[(programs,)](
            base,
            scale,
            z,
            b,
            bias,
            mask,
            y,
            mask_scale,
            rows,
            features,
            rank,
            tiles.rows,
            base.stride(0),
            *z.stride(),
            b.stride(1),
            b.stride(0),
            STEPS=steps,
            HAS_SCALE=scale is not None,
            HAS_BIAS=bias is not None,
            HAS_MASK=mask is not None,
            ONE_RANK_TILE=rank <= tiles.rank,
            PRECISION=PRECISION,
            TILE_N=tiles.rows,
            TILE_O=tiles.features,
            TILE_R=tiles.rank,
            STAGES=1,
        )
    return y


def backward(
    grad: Tensor,
    saved: Tensor,
    scale: Tensor | None,
    z: Tensor,
    b: Tensor,
    bias: Tensor | None,
    saved_base: bool,
    need_base: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of base, z, b, scale and bias; see `sora_hw_kernels.reference.scale_rank.backward`."""
    dbase, dz, db, dscale, dbias = gradients = empty_gradients(grad, scale, z, b, bias, need_base)
    rank_gradients(grad, z, b, dz, db)
    if scale is None and bias is None:
        return gradients
    grad, saved, scale, bias = (None if t is None else with_unit_columns(t) for t in (grad, saved, scale, bias))
    products, grads = _column_sums(grad, saved, scale, bias, dbase, saved_base, need_base)
    if bias is not None:
        dbias.copy_(grads)
    if scale is not None:
        dscale.copy_(scale_gradient(products, scale, b, db, saved_base))
    return gradients


def _column_sums(
    grad: Tensor,
    saved: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    dbase: Tensor,
    saved_base: bool,
    need_base: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`colsum(grad * saved)`, without the bias in `saved`, and `colsum(grad)`, where they are wanted; fills `dbase`.

    Parts of the rows are summed each by one program, and the parts in a fixed order: results repeat bit for bit.
    """
    rows, features = grad.shape
    tiles = backward_tiles(grad.dtype)
    cores = launch.vector_cores(grad.device)
    tiles_o = triton.cdiv(features, tiles.features)
    chunk = tiles.rows * triton.cdiv(triton.cdiv(rows, tiles.rows), triton.cdiv(_PARTS_A_CORE * cores, tiles_o))
    chunks = triton.cdiv(rows, chunk)
    programs, steps = launch.share(tiles_o * chunks, cores)
    # The last step may reach beyond the last chunk: room for what it writes, which is not read.
    room = (triton.cdiv(programs * steps, tiles_o), features)
    product_parts, grad_parts = (
        torch.empty(room, dtype=torch.float32, device=grad.device) if wanted else None
        for wanted in (scale is not None, bias is not None)
    )
    with launch.on_device_of(grad):
        backward_kernel[(programs,)](
            grad,
            saved,
            scale,
            None,
            None,
            bias,
            dbase,
            None,
            None,
            product_parts,
            grad_parts,
            rows,
            features,
            0,
            chunk,
            grad.stride(0),
            saved.stride(0),
            0,
            0,
            STEPS=steps,
            HAS_RANK=False,
            HAS_SCALE=scale is not None,
            NEED_BASE=need_base,
            SUBTRACT_BIAS=bias is not None and not saved_base,
            SUM_GRAD=bias is not None,
            PRECISION=PRECISION,
            TILE_N=tiles.rows,
            TILE_O=tiles.features,
            TILE_R=tiles.rank,
            STAGES=1,
        )
    return tuple(None if parts is None else parts[:chunks].sum(0) for parts in (product_parts, grad_parts))
