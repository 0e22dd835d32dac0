"""Tile sizes that fit into the unified buffer, the 192 KiB of memory of one vector core.

A kernel whose tiles do not fit does not compile, or overwrites itself. So each function below counts, for one element
of a tile, the bytes of everything that is there at once: what is loaded and what is stored twice, since the compiler
overlaps the copies of one tile with the arithmetic on another, and what lies between in float32. Products of matrices
come from the matrix unit, also twice. The operands of those products stay in that unit's own buffers.
"""

from dataclasses import dataclass

import torch

from sora_hw_kernels.triton_kernels.inputs import RANK_TILES, rank_tile

UNIFIED_BUFFER_BYTES = 192 * 1024
COPIES = 2
FLOAT32_BYTES = 4
# Every size is a power of two, for Triton, and of at least 16: the matrix unit works on blocks of 16 by 16.
SMALLEST = 16


@dataclass(frozen=True)
class Tiles:
    """One launch configuration.

    Attributes:
        rows: rows of (N, out), or of (out, in), in a tile.
        features: columns of (N, out), or of (out, in), in a tile.
        rank: columns of the rank dimension in a tile.
        bytes: what a tile takes of the unified buffer.
    """

    rows: int
    features: int
    rank: int
    bytes: int


def forward_tiles(rank: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the forward kernel; larger ranks are walked through in tiles of 32."""
    # base, mask and y in copies; z b^T in copies; base, mask and the sum in float32; scale and bias for every row.
    element = COPIES * (2 * dtype.itemsize + torch.bool.itemsize) + COPIES * FLOAT32_BYTES + 5 * FLOAT32_BYTES
    feature = COPIES * 2 * FLOAT32_BYTES  # scale and bias
    rows, used = _rows_that_fit(features=128, element=element, feature=feature)
    return Tiles(rows, 128, rank_tile(rank, largest=32), used)


def backward_tiles(dtype: torch.dtype) -> Tiles:
    """Tiles of the backward kernel, of 512 bytes in a row: it multiplies no matrices, so the rank does not matter."""
    features = 512 // dtype.itemsize
    # grad, saved and dbase in copies; grad, saved, their product, dbase, scale and bias for every row in float32.
    element = COPIES * 3 * dtype.itemsize + 6 * FLOAT32_BYTES
    feature = COPIES * 4 * FLOAT32_BYTES  # scale, bias and the two sums
    rows, used = _rows_that_fit(features, element, feature)
    return Tiles(rows, features, SMALLEST, used)


def row_norm_tiles(rank: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the row norm: 512 bytes of a row at once, and few enough rows for every core to get some."""
    tile = rank_tile(rank, largest=RANK_TILES[-1])
    # In the unified buffer a row is as long as the rank. W0 a^T, b and b a a^T in copies; the sum and two products.
    element = COPIES * 3 * FLOAT32_BYTES + 3 * FLOAT32_BYTES
    row = COPIES * 3 * FLOAT32_BYTES + 4 * FLOAT32_BYTES  # norms, scale, the result; the terms between
    rows, used = _rows_that_fit(features=tile, element=element, row=row, largest=64)
    return Tiles(rows, 512 // dtype.itemsize, tile, used)


def _rows_that_fit(features: int, element: int, feature: int = 0, row: int = 0, largest: int = 1024) -> tuple[int, int]:
    """The most rows of a tile that fit, and the bytes that they take, from the bytes of an element, a column, a row."""
    rows = largest
    while (used := rows * features * element + features * feature + rows * row) > UNIFIED_BUFFER_BYTES:
        rows //= 2
        if rows < SMALLEST:
            raise ValueError(f"{SMALLEST} rows of {features} features do not fit into {UNIFIED_BUFFER_BYTES} bytes")
    return rows, used
