"""The NPU's tiles: they fit into the unified buffer, none with twice the rows would, and the cores share them all."""

import pytest
import torch
from sora_hw_kernels.npu import launch, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (1, 16, 17, 32, 33, 64, 100, 128, 200)


def every_configuration():
    for dtype in DTYPES:
        yield tiles.backward_tiles(dtype)
        for rank in RANKS:
            yield tiles.forward_tiles(rank, dtype)
            if rank <= 128:
                yield tiles.row_norm_tiles(rank, dtype)


def test_every_tile_fits_and_has_sizes_that_the_hardware_takes():
    for tile in every_configuration():
        assert 0 < tile.bytes <= tiles.UNIFIED_BUFFER_BYTES == 196_608
        for size in (tile.rows, tile.features, tile.rank):
            assert size >= 16 and size & (size - 1) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_of_the_tiles_counted_by_hand(dtype):
    """Each tensor of a tile written out: (how many at once, elements, bytes of one element)."""
    size = dtype.itemsize
    n, o = tiles.forward_tiles(16, dtype).rows, 128
    forward = [(2, n * o, size), (2, n * o, 1), (2, n * o, size)]  # base, mask, y
    forward += [(2, n * o, 4)] + 5 * [(1, n * o, 4)]  # z b^T; base, mask, sum, scale, bias
    forward += 2 * [(2, o, 4)]  # scale, bias
    assert tiles.forward_tiles(16, dtype).bytes == sum(a * b * c for a, b, c in forward)

    n, o = tiles.backward_tiles(dtype).rows, 512 // size
    backward = 3 * [(2, n * o, size)] + 6 * [(1, n * o, 4)] + 4 * [(2, o, 4)]
    assert tiles.backward_tiles(dtype).bytes == sum(a * b * c for a, b, c in backward)

    n, r = tiles.row_norm_tiles(64, dtype).rows, 64
    norm = 3 * [(2, n * r, 4)] + 3 * [(1, n * r, 4)] + 3 * [(2, n, 4)] + 4 * [(1, n, 4)]
    assert tiles.row_norm_tiles(64, dtype).bytes == sum(a * b * c for a, b, c in norm)


def test_no_tile_of_twice_the_rows_would_fit():
    """All that a tile takes doubles with its rows, but for the vectors with one element a feature."""
    for dtype in DTYPES:
        backward = tiles.backward_tiles(dtype)
        vectors = {tiles.forward_tiles(32, dtype): 16 * 128, backward: 32 * backward.features}
        for tile, bytes_of_vectors in (vectors | {tiles.row_norm_tiles(128, dtype): 0}).items():
            assert 2 * tile.bytes - bytes_of_vectors > tiles.UNIFIED_BUFFER_BYTES


def test_what_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(tiles, "UNIFIED_BUFFER_BYTES", 16 * 1024)
    with pytest.raises(ValueError, match="16 rows of 128 features do not fit into 16384 bytes"):
        tiles.forward_tiles(16, torch.bfloat16)


@pytest.mark.parametrize("cores", [1, 24, 48])
@pytest.mark.parametrize("count", [1, 23, 24, 25, 48, 65_535, 65_536, 262_144, 10_000_019])
def test_the_cores_take_every_tile_within_the_limit_of_the_grid(count, cores):
    programs, steps = launch.share(count, cores)
    assert programs <= min(cores, launch.GRID_LIMIT, count)
    assert programs * (steps - 1) < count <= programs * steps


def test_more_cores_than_a_grid_may_have_programs():
    assert launch.share(100_000, 70_000) == (65_535, 2)
