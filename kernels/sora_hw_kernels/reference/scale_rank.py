"""`y = scale * base + z b^T + bias` and its gradients, in row blocks.

What costs here is traffic over (N, out), not arithmetic: R is small. So both passes walk over blocks of rows that stay
in the cache while everything that touches them is done, accumulate in float32 (float64 for float64), and round once.
"""

import torch
from torch import Tensor

from sora_hw.ops import empty_gradients

# Working set of one block in the accumulation dtype. Measured on two x86-64 server parts: from 256 KiB to 2 MiB the
# time is flat within noise; below, the calls cost, above, the blocks leave the second-level cache.
_BLOCK_BYTES = 512 * 1024


def forward(base: Tensor, scale: Tensor | None, z: Tensor, b: Tensor, bias: Tensor | None, keep_base: bool) -> Tensor:
    """(N, out); see `sora_hw.ops.scale_rank_update`. `keep_base` concerns autograd only."""
    dtype = torch.promote_types(base.dtype, torch.float32)
    b_t = b.to(dtype).t()
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    for rows in _row_blocks(base, dtype):
        block = y[rows] if y.dtype == dtype else torch.empty_like(y[rows], dtype=dtype)
        if scale is None:
            block.copy_(base[rows])
        else:
            torch.mul(base[rows], scale, out=block)
        block.addmm_(z[rows].to(dtype), b_t)
        if bias is not None:
            block.add_(bias)
        if y.dtype != dtype:
            y[rows].copy_(block)
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
    """The gradients of base, z, b, scale and bias from one read of `grad` (N, out).

    The gradient of `scale` is `colsum(grad * base)`. Where only the output was saved, it follows without the base
    product as `(colsum(grad * (y - bias)) - rowsum(b * db)) / scale`.
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    dbase, dz, db, dscale, dbias = empty_gradients(grad, scale, z, b, bias, need_base)
    b_wide = b.to(dtype)
    out, rank = b.shape
    db_sum = torch.zeros(out, rank, dtype=dtype, device=b.device)
    dscale_sum = torch.zeros(dscale.shape, dtype=dtype, device=b.device)
    dbias_sum = torch.zeros(dbias.shape, dtype=dtype, device=b.device)

    for rows in _row_blocks(grad, dtype):
        g = grad[rows].to(dtype)
        dz[rows].copy_(g @ b_wide)
        db_sum.addmm_(g.t(), z[rows].to(dtype))
        if bias is not None:
            dbias_sum += g.sum(0)
        if scale is not None:
            if need_base:
                torch.mul(g, scale, out=dbase[rows]) if dbase.dtype == dtype else dbase[rows].copy_(g * scale)
            product = saved[rows].to(dtype)
            if bias is not None and not saved_base:
                product = product - bias
            dscale_sum += torch.linalg.vecdot(g, product, dim=0)

    if scale is not None:
        if not saved_base:
            dscale_sum = (dscale_sum - (b_wide * db_sum).sum(1)) / scale
        dscale.copy_(dscale_sum)
    db.copy_(db_sum)
    dbias.copy_(dbias_sum)
    return dbase, dz, db, dscale, dbias


def _row_blocks(t: Tensor, dtype: torch.dtype) -> list[slice]:
    rows, width = t.shape
    step = max(16, _BLOCK_BYTES // max(1, width * dtype.itemsize))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
