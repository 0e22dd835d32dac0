"""`y = scale * base + z b^T + bias` and its gradients: one pass over (N, out) forward, one backward.

Both are bound by memory traffic. The forward kernel reads `base` and writes `y`. The backward kernel reads the incoming
gradient once for everything that needs it: the gradients of `base`, `z`, `b`, `scale` and `bias`. Sums over rows and
over features go through buffers of partial sums that are added up in a fixed order, so that results repeat bit for bit.
"""

from functools import cache

import torch
from torch import Tensor

from sora_hw.ops import empty_gradients
from sora_hw_kernels.cuda.launch import Launch, Tiles
from sora_hw_kernels.reference import scale_rank as reference
from sora_hw_kernels.triton_kernels.inputs import rank_tile, taken, with_unit_columns
from sora_hw_kernels.triton_kernels.scale_rank import backward_kernel, forward_kernel, sums_kernel

# Up to this rank one read of the gradient gives every sum. Beyond it the partial sums of `dz`, R / 16 bytes beside the
# 2 of each element of the gradient, written and read, cost more than the vendor's products, which read it again.
LARGEST_ONE_READ_RANK = 32
# Programs of one launch on the 128 multiprocessors of an RTX 4090 or the 132 of an H100. In the forward pass a program
# keeps its tile of `b` for a chunk of rows. In the backward pass every chunk adds partial sums of `db`: no more of them
# than keep the card busy.
FORWARD_PROGRAMS = 264
BACKWARD_PROGRAMS = 132
# The kernels walk over several tiles on devices that start a program a core; here each takes one.
STEPS = 1
# What one program adds up: numbers of `dz`, in so many of its parts at once, or features in so many chunks at once.
SUMS = {"PARTS": 32, "ELEMENTS": 32, "AT_ONCE": 8, "TILE": 4}
SUMS_WARPS = 1


@cache
def forward_tiles(rank: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the forward kernel; larger ranks are walked through in tiles of 32, without a pipeline of loads."""
    rows, tile = 32 if dtype == torch.float32 else 64, rank_tile(rank, largest=32)
    return Tiles(rows=rows, features=64, rank=tile, warps=4, stages=3 if rank <= tile else 1)


@cache
def backward_tiles(rank: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the backward kernel."""
    tile = rank_tile(rank, largest=LARGEST_ONE_READ_RANK)
    if dtype == torch.float32:
        return Tiles(rows=16, features=64, rank=tile, warps=8)
    return Tiles(rows=64, features=64, rank=tile, warps=4, stages=3)


def chunk_of(rows: int, features: int, tiles: Tiles, programs: int) -> int:
    """Rows of a chunk, whole tiles of them, that gives about as many programs, one for each tile of features in it."""
    chunks = -(-programs // -(-features // tiles.features))
    return tiles.rows * -(-rows // (tiles.rows * chunks))


def precision(dtype: torch.dtype) -> str:
    """How the tensor cores multiply float32 operands.

    For float32 rows in three TF32 products, which keep its digits; for half ones in one, since TF32 holds them exactly.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """The vendor's product of half operands, not rounded to half: the gradient of `scale` is a difference with it."""
    return torch.mm(a, b, out_dtype=torch.float32)


def forward(base: Tensor, scale: Tensor | None, z: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """(N, out); see `sora_hw.ops.scale_rank_update`."""
    if not taken(base, scale, bias):
        return reference.forward(base, scale, z, b, bias)
    return _update(base, z, b, scale=scale, bias=bias)


def input_gradient(grad: Tensor, dz: Tensor, a: Tensor, mask: Tensor | None, mask_scale: float) -> Tensor:
    """(N, in); see `sora_hw_kernels.reference.scale_rank.input_gradient`. The same update, on the other side."""
    if not taken(grad):
        return reference.input_gradient(grad, dz, a, mask, mask_scale)
    return _update(grad, dz, a.t(), mask=mask, mask_scale=mask_scale)


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
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    (rows, features), rank = base.shape, z.shape[1]
    if y.numel() == 0:
        return y
    tiles = forward_tiles(rank, base.dtype)
    chunk = chunk_of(rows, features, tiles, FORWARD_PROGRAMS)
    forward_launch(rank, base.dtype, scale is not None, bias is not None, mask is not None)(
        -(-rows // chunk) * -(-features // tiles.features),
        (base, scale, z, b, bias, mask, y),
        (mask_scale, rows, features, rank, chunk, base.stride(0), *z.stride(), *b.stride(), STEPS),
    )
    return y


@cache
def forward_launch(rank: int, dtype: torch.dtype, scale: bool, bias: bool, mask: bool) -> Launch:
    tiles = forward_tiles(rank, dtype)
    return Launch(
        forward_kernel,
        tiles.warps,
        HAS_SCALE=scale,
        HAS_BIAS=bias,
        HAS_MASK=mask,
        ONE_RANK_TILE=rank <= tiles.rank,
        PRECISION=precision(dtype),
        TILE_N=tiles.rows,
        TILE_O=tiles.features,
        TILE_R=tiles.rank,
        STAGES=tiles.stages,
    )


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
    if not taken(grad, scale, bias, b) or z.dtype != grad.dtype:
        return reference.backward(grad, saved, scale, z, b, bias, saved_base, need_base)
    grad, saved, scale, b, bias = (None if t is None else with_unit_columns(t) for t in (grad, saved, scale, b, bias))
    _, dz, db, _, _ = gradients = empty_gradients(grad, scale, z, b, bias, need_base)
    if grad.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients

    in_one_read = z.shape[1] <= LARGEST_ONE_READ_RANK
    if not in_one_read:
        torch.mm(grad, b.to(grad.dtype), out=dz)
        db.copy_(float32_product(grad.t(), z))
    if in_one_read or scale is not None or bias is not None:
        _sums(grad, saved, scale, z, b, bias, gradients, saved_base, need_base, in_one_read)
    return gradients


def _sums(
    grad: Tensor,
    saved: Tensor,
    scale: Tensor | None,
    z: Tensor,
    b: Tensor,
    bias: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    saved_base: bool,
    need_base: bool,
    with_rank: bool,
) -> None:
    """Fills `gradients` from one read of the gradient; those of `z` and `b` only `with_rank`."""
    dbase, dz, db, dscale, dbias = gradients
    (rows, features), rank = grad.shape, z.shape[1]
    tiles = backward_tiles(rank, grad.dtype)
    tiles_o = -(-features // tiles.features)
    chunk = chunk_of(rows, features, tiles, BACKWARD_PROGRAMS)
    chunks = -(-rows // chunk)
    parts = [
        torch.empty(shape, dtype=torch.float32, device=grad.device) if wanted else None
        for wanted, shape in (
            (with_rank, (tiles_o, rows, rank)),
            (with_rank, (chunks, features, rank)),
            (scale is not None, (chunks, features)),
            (bias is not None, (chunks, features)),
        )
    ]
    has_scale, has_bias = scale is not None, bias is not None
    backward_launch(rank, grad.dtype, with_rank, has_scale, has_bias, need_base, saved_base)(
        tiles_o * chunks,
        (grad, saved, scale, z, b, bias, dbase, *parts),
        (rows, features, rank, chunk, grad.stride(0), saved.stride(0), *z.stride(), STEPS),
    )
    dz_programs = -(-dz.numel() // SUMS["ELEMENTS"]) if with_rank else 0
    sums_launch(rank, with_rank, has_scale, has_bias, saved_base)(
        dz_programs + -(-features // SUMS["TILE"]),
        (dz, db, dscale, dbias, *parts, scale, b),
        (rows, features, rank, tiles_o, chunks, dz_programs, *dz.stride()),
    )


@cache
def backward_launch(
    rank: int, dtype: torch.dtype, with_rank: bool, scale: bool, bias: bool, need_base: bool, saved_base: bool
) -> Launch:
    tiles = backward_tiles(rank, dtype)
    return Launch(
        backward_kernel,
        tiles.warps,
        HAS_RANK=with_rank,
        HAS_SCALE=scale,
        NEED_BASE=need_base,
        SUBTRACT_BIAS=bias and not saved_base,
        SUM_GRAD=bias,
        PRECISION=precision(dtype),
        TILE_N=tiles.rows,
        TILE_O=tiles.features,
        TILE_R=tiles.rank,
        STAGES=tiles.stages,
    )


@cache
def sums_launch(rank: int, with_rank: bool, scale: bool, bias: bool, saved_base: bool) -> Launch:
    return Launch(
        sums_kernel,
        SUMS_WARPS,
        HAS_RANK=with_rank,
        HAS_SCALE=scale,
        SUBTRACT_RANK=not saved_base,
        SUM_GRAD=bias,
        **SUMS,
        TILE_R=rank_tile(rank, largest=LARGEST_ONE_READ_RANK),
    )
