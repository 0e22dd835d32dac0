"""The coefficients of a first-order rotation: two launches forward and two backward."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sora_hw_kernels.cuda.launch import Launch
from sora_hw_kernels.reference import rotation as reference
from sora_hw_kernels.triton_kernels.inputs import rank_tile
from sora_hw_kernels.triton_kernels.rotation import (
    backward_kernel,
    backward_sums_kernel,
    forward_kernel,
    forward_sums_kernel,
)

# Programs of the first launch; each of the second adds up what they leave.
PARTS = 32
# Rows that a program of the first launch takes at a time.
SUMS_ROWS = 64
# Beyond this rank a tile holds too few rows for what each of its programs adds up: products in their place.
LARGEST_RANK = 128


def tiles(rank: int) -> dict[str, int]:
    """Of the second launch: as many rows as registers hold three tiles of."""
    tile = rank_tile(rank, largest=LARGEST_RANK)
    return {"TILE_O": 32 if tile <= 32 else 8, "TILE_R": tile, "warps": 4 if tile <= 64 else 8}


def sums_tiles(rank: int) -> dict[str, int]:
    """Of the first launch."""
    return {**tiles(rank), "TILE_O": SUMS_ROWS}


class Launches(NamedTuple):
    """The two launches of one pass, and the rows that a program of the second takes."""

    sums: Launch
    rows: Launch
    tile: int


@cache
def forward_launches(rank: int, turns_b: bool, scale: bool, bounded: bool) -> Launches:
    return _launches(forward_sums_kernel, forward_kernel, rank, turns_b, scale, bounded)


@cache
def backward_launches(rank: int, turns_b: bool, scale: bool, bounded: bool) -> Launches:
    return _launches(backward_sums_kernel, backward_kernel, rank, turns_b, scale, bounded)


def _launches(sums_kernel, rows_kernel, rank: int, turns_b: bool, scale: bool, bounded: bool) -> Launches:
    tile = tiles(rank)
    flags = {"TURNS_B": turns_b, "HAS_SCALE": scale, "BOUNDED": bounded, "PARTS": PARTS}
    sums = Launch(sums_kernel, TURNS_B=turns_b, **sums_tiles(rank))
    return Launches(sums, Launch(rows_kernel, **flags, **tile), tile["TILE_O"])


def _taken(b: Tensor, *others: Tensor | None) -> bool:
    tensors = [b, *(t for t in others if t is not None)]
    return b.shape[1] <= LARGEST_RANK and all(t.dtype == torch.float32 for t in tensors)


def forward(
    b: Tensor, c: Tensor, e: Tensor, scale: Tensor | None, turns_b: bool, bounded: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `sora_hw_kernels.reference.rotation.forward`."""
    if not _taken(b, c, e, scale):
        return reference.forward(b, c, e, scale, turns_b, bounded, eps)
    b, c, e = b.contiguous(), c.contiguous(), e.contiguous()
    (out, r), rp = b.shape, c.shape[1]
    columns = 2 * rp * r * turns_b + 2
    parts, sums = b.new_empty(PARTS, columns), b.new_empty(columns)
    turned, q_t = b.new_empty(out, r + 2 * rp), b.new_empty(2 * rp, out)
    launches = forward_launches(r, turns_b, scale is not None, bounded)
    launches.sums(PARTS, (b, c, e, parts), (out, r, rp, columns))
    launches.rows(-(-out // launches.tile), (b, c, e, scale, parts, turned, q_t, sums), (eps, out, r, rp, columns))
    return turned, q_t, sums


def backward(
    dturned: Tensor,
    dq_t: Tensor,
    b: Tensor,
    c: Tensor,
    e: Tensor,
    scale: Tensor | None,
    sums: Tensor,
    turns_b: bool,
    bounded: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `sora_hw_kernels.reference.rotation.backward`."""
    if not _taken(b, c, e, scale, dturned, dq_t):
        return reference.backward(dturned, dq_t, b, c, e, scale, sums, turns_b, bounded, eps)
    dturned, dq_t, b, c, e = (t.contiguous() for t in (dturned, dq_t, b, c, e))
    (out, r), rp = b.shape, c.shape[1]
    columns = 2 * rp * r * turns_b + 1
    parts = b.new_empty(PARTS, columns)
    db, dc, de = torch.empty_like(b), torch.empty_like(c), torch.empty_like(e)
    dscale = b.new_empty(0 if scale is None else out)
    launches = backward_launches(r, turns_b, scale is not None, bounded)
    launches.sums(PARTS, (dturned, c, e, parts), (out, r, rp, columns))
    launches.rows(
        -(-out // launches.tile),
        (dturned, dq_t, b, c, e, scale, sums, parts, db, dc, de, dscale),
        (eps, out, r, rp, columns),
    )
    return db, dc, de, dscale
