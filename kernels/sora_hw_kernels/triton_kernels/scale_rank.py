"""The tiles of `y = scale * base + z b^T + bias` and of its gradients, for every device that Triton compiles for.

Program p of P takes the tiles p, p + P, p + 2 P, ..., STEPS of them. A GPU is given a program a tile: Triton makes a
constant of an argument that is 1, and the loop is gone. An NPU is given a program a core. What lies beyond the last
tile has neither rows nor features: nothing is read there, and the sums that are written are zero.
"""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    base,
    scale,
    z,
    b,
    bias,
    mask,
    y,
    mask_scale,
    N,
    OUT,
    R,
    CHUNK,
    base_stride,
    z_stride_n,
    z_stride_r,
    b_stride_o,
    b_stride_r,
    STEPS,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ONE_RANK_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """CHUNK rows of one tile of features at a time of `y = scale * base + mask * mask_scale * (z b^T) + bias`, rounded
    once. With ONE_RANK_TILE, that is R <= TILE_R, the tile of `b` is loaded once for all those rows.
    """
    tiles_o = tl.cdiv(OUT, TILE_O)
    for step in range(0, STEPS):
        tile = tl.program_id(0) + step * tl.num_programs(0)
        chunk = tile // tiles_o
        o = (tile % tiles_o) * TILE_O + tl.arange(0, TILE_O)
        o_in = o < OUT
        r = tl.arange(0, TILE_R)
        if ONE_RANK_TILE:
            b_at = b + r[:, None] * b_stride_r + o[None, :] * b_stride_o
            b_tile = tl.load(b_at, mask=(r < R)[:, None] & o_in[None, :], other=0.0).to(tl.float32)
        if HAS_SCALE:
            scale_row = tl.load(scale + o, mask=o_in, other=0.0)[None, :]
        if HAS_BIAS:
            bias_row = tl.load(bias + o, mask=o_in, other=0.0)[None, :]

        if ONE_RANK_TILE and STAGES > 1:
            n_wide = (chunk * CHUNK + tl.arange(0, TILE_N)).to(tl.int64)
            z_next = _rank_tile(z, n_wide, N, r, R, z_stride_n, z_stride_r)
        for first_n in tl.range(chunk * CHUNK, min((chunk + 1) * CHUNK, N), TILE_N, num_stages=STAGES):
            n = first_n + tl.arange(0, TILE_N)
            n_wide = n.to(tl.int64)
            inside = (n < N)[:, None] & o_in[None, :]
            base_tile = tl.load(base + n_wide[:, None] * base_stride + o[None, :], mask=inside, other=0.0)
            total = tl.zeros((TILE_N, TILE_O), dtype=tl.float32)
            if ONE_RANK_TILE:
                if STAGES > 1:
                    z_tile = z_next
                    z_next = _rank_tile(z, n_wide + TILE_N, N, r, R, z_stride_n, z_stride_r)
                else:
                    z_tile = _rank_tile(z, n_wide, N, r, R, z_stride_n, z_stride_r)
                total = tl.dot(z_tile.to(tl.float32), b_tile, total, input_precision=PRECISION)
            else:
                for first_r in range(0, R, TILE_R):
                    z_tile = _rank_tile(z, n_wide, N, first_r + r, R, z_stride_n, z_stride_r)
                    b_at = b + (first_r + r)[:, None] * b_stride_r + o[None, :] * b_stride_o
                    b_in = (first_r + r < R)[:, None] & o_in[None, :]
                    b_tile = tl.load(b_at, mask=b_in, other=0.0).to(tl.float32)
                    total = tl.dot(z_tile.to(tl.float32), b_tile, total, input_precision=PRECISION)
            if HAS_MASK:
                kept = tl.load(mask + n_wide[:, None] * OUT + o[None, :], mask=inside, other=0)
                total = tl.where(kept != 0, total * mask_scale, 0.0)
            if HAS_SCALE:
                total += base_tile.to(tl.float32) * scale_row
            else:
                total += base_tile.to(tl.float32)
            if HAS_BIAS:
                total += bias_row
            tl.store(y + n_wide[:, None] * OUT + o[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad,
    saved,
    scale,
    z,
    b,
    bias,
    dbase,
    dz_parts,
    db_parts,
    product_parts,
    grad_parts,
    N,
    OUT,
    R,
    CHUNK,
    grad_stride,
    saved_stride,
    z_stride_n,
    z_stride_r,
    STEPS,
    HAS_RANK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NEED_BASE: tl.constexpr,
    SUBTRACT_BIAS: tl.constexpr,
    SUM_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """CHUNK rows of one tile of features at a time: one read of the gradient for all the sums it enters.

    Writes `dbase`; over this tile's features the partial sums of `dz`, (tiles_o, N, R); over these rows those of `db`,
    (chunks, OUT, R), of `colsum(grad * saved)` and of `colsum(grad)`, both (chunks, OUT).
    """
    tiles_o = tl.cdiv(OUT, TILE_O)
    for step in range(0, STEPS):
        tile = tl.program_id(0) + step * tl.num_programs(0)
        tile_o = tile % tiles_o
        chunk = tile // tiles_o
        o = tile_o * TILE_O + tl.arange(0, TILE_O)
        o_in = o < OUT
        r = tl.arange(0, TILE_R)
        r_in = r < R

        if HAS_RANK:
            b_tile = tl.load(b + o[:, None] * R + r[None, :], mask=o_in[:, None] & r_in[None, :], other=0.0)
            b_tile = b_tile.to(grad.dtype.element_ty)
            db = tl.zeros((TILE_O, TILE_R), dtype=tl.float32)
        if HAS_SCALE:
            scale_row = tl.load(scale + o, mask=o_in, other=0.0)[None, :]
            products = tl.zeros((TILE_O,), dtype=tl.float32)
            if SUBTRACT_BIAS:
                bias_row = tl.load(bias + o, mask=o_in, other=0.0)[None, :]
        if SUM_GRAD:
            grads = tl.zeros((TILE_O,), dtype=tl.float32)

        if HAS_RANK and STAGES > 1:
            n_wide = (chunk * CHUNK + tl.arange(0, TILE_N)).to(tl.int64)
            z_next = _rank_tile(z, n_wide, N, r, R, z_stride_n, z_stride_r)
        for first in tl.range(chunk * CHUNK, min((chunk + 1) * CHUNK, N), TILE_N, num_stages=STAGES):
            n = first + tl.arange(0, TILE_N)
            n_wide = n.to(tl.int64)
            inside = (n < N)[:, None] & o_in[None, :]
            g = tl.load(grad + n_wide[:, None] * grad_stride + o[None, :], mask=inside, other=0.0)
            if HAS_RANK:
                rank_in = (n < N)[:, None] & r_in[None, :]
                if STAGES > 1:
                    z_tile = z_next
                    z_next = _rank_tile(z, n_wide + TILE_N, N, r, R, z_stride_n, z_stride_r)
                else:
                    z_tile = _rank_tile(z, n_wide, N, r, R, z_stride_n, z_stride_r)
                db = tl.dot(tl.trans(g), z_tile, db, input_precision=PRECISION)
                dz = tl.dot(g, b_tile, input_precision=PRECISION)
                dz_row = tile_o.to(tl.int64) * N + n_wide
                tl.store(dz_parts + dz_row[:, None] * R + r[None, :], dz, mask=rank_in)
            wide = g.to(tl.float32)
            if SUM_GRAD:
                grads += tl.sum(wide, axis=0)
            if HAS_SCALE:
                kept = tl.load(saved + n_wide[:, None] * saved_stride + o[None, :], mask=inside, other=0.0)
                kept = kept.to(tl.float32)
                if SUBTRACT_BIAS:
                    kept -= bias_row
                products += tl.sum(wide * kept, axis=0)
                if NEED_BASE:
                    scaled = (wide * scale_row).to(dbase.dtype.element_ty)
                    tl.store(dbase + n_wide[:, None] * OUT + o[None, :], scaled, mask=inside)

        sums_at = chunk * OUT + o
        if HAS_RANK:
            db_at = db_parts + sums_at.to(tl.int64)[:, None] * R + r[None, :]
            tl.store(db_at, db, mask=o_in[:, None] & r_in[None, :])
        if HAS_SCALE:
            tl.store(product_parts + sums_at, products, mask=o_in)
        if SUM_GRAD:
            tl.store(grad_parts + sums_at, grads, mask=o_in)


# One variant for all sizes: nothing in it is faster for a number of parts that is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["TILES_O", "CHUNKS", "DZ_PROGRAMS"])
def sums_kernel(
    dz,
    db,
    dscale,
    dbias,
    dz_parts,
    db_parts,
    product_parts,
    grad_parts,
    scale,
    b,
    N,
    OUT,
    R,
    TILES_O,
    CHUNKS,
    DZ_PROGRAMS,
    dz_stride_n,
    dz_stride_r,
    HAS_RANK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SUBTRACT_RANK: tl.constexpr,
    SUM_GRAD: tl.constexpr,
    PARTS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """Adds up what `backward_kernel` has left, in a fixed order: ELEMENTS of `dz` a program, then TILE features of
    everything else. `dscale` from the output that was saved in the place of the base product is
    `(colsum(grad * saved) - rowsum(b * db)) / scale`. Without HAS_RANK `db` is there already.
    """
    program = tl.program_id(0)
    r = tl.arange(0, TILE_R)
    # The flag comes first: without it there is no `dz_parts`, and a load from nothing does not compile.
    if HAS_RANK and program < DZ_PROGRAMS:
        # Every part as one row of N R numbers, wherever its own rows begin: wide loads, and none beyond the rank.
        size = tl.cast(N, tl.int64) * R
        at = program.to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        dz_sums = tl.zeros((PARTS, ELEMENTS), dtype=tl.float32)
        for first in range(0, TILES_O, PARTS):
            part = (first + tl.arange(0, PARTS))[:, None]
            inside = (part < TILES_O) & (at < size)[None, :]
            dz_sums += tl.load(dz_parts + part * size + at[None, :], mask=inside, other=0.0)
        dz_at = dz + (at // R) * dz_stride_n + (at % R) * dz_stride_r
        tl.store(dz_at, tl.sum(dz_sums, axis=0).to(dz.dtype.element_ty), mask=at < size)
    else:
        o = (program - DZ_PROGRAMS) * TILE + tl.arange(0, TILE)
        o_in = o < OUT
        chunk = tl.arange(0, AT_ONCE)
        with_b = tl.zeros((TILE,), dtype=tl.float32)
        if HAS_RANK:
            rank_in = o_in[:, None] & (r < R)[None, :]
            db_sums = tl.zeros((AT_ONCE, TILE, TILE_R), dtype=tl.float32)
            for first in range(0, CHUNKS, AT_ONCE):
                row = (first + chunk).to(tl.int64)[:, None, None] * OUT + o[None, :, None]
                inside = (first + chunk < CHUNKS)[:, None, None] & rank_in[None, :, :]
                db_sums += tl.load(db_parts + row * R + r[None, None, :], mask=inside, other=0.0)
            total = tl.sum(db_sums, axis=0)
            tl.store(db + o[:, None] * R + r[None, :], total, mask=rank_in)
            if HAS_SCALE and SUBTRACT_RANK:
                with_b += tl.sum(total * tl.load(b + o[:, None] * R + r[None, :], mask=rank_in, other=0.0), axis=1)
        elif HAS_SCALE and SUBTRACT_RANK:
            for first in range(0, R, TILE_R):
                rank_in = o_in[:, None] & (first + r < R)[None, :]
                at = o[:, None] * R + first + r[None, :]
                db_tile = tl.load(db + at, mask=rank_in, other=0.0)
                with_b += tl.sum(db_tile * tl.load(b + at, mask=rank_in, other=0.0), axis=1)
        if HAS_SCALE:
            products = _column_sums(product_parts, o, OUT, CHUNKS, AT_ONCE, TILE)
            if SUBTRACT_RANK:
                products = (products - with_b) / tl.load(scale + o, mask=o_in, other=1.0)
            tl.store(dscale + o, products, mask=o_in)
        if SUM_GRAD:
            tl.store(dbias + o, _column_sums(grad_parts, o, OUT, CHUNKS, AT_ONCE, TILE), mask=o_in)


@triton.jit
def _column_sums(parts, o, OUT, CHUNKS, AT_ONCE: tl.constexpr, TILE: tl.constexpr):
    """The sum over the chunks of `parts`, (chunks, OUT), at the features `o`."""
    sums = tl.zeros((AT_ONCE, TILE), dtype=tl.float32)
    for first in range(0, CHUNKS, AT_ONCE):
        chunk = (first + tl.arange(0, AT_ONCE))[:, None]
        inside = (chunk < CHUNKS) & (o < OUT)[None, :]
        sums += tl.load(parts + chunk.to(tl.int64) * OUT + o[None, :], mask=inside, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _rank_tile(z, n, N, r, R, z_stride_n, z_stride_r):
    """Rows `n` and columns `r` of `z`, (N, R); zeros beyond it."""
    z_at = z + n[:, None] * z_stride_n + r[None, :].to(tl.int64) * z_stride_r
    return tl.load(z_at, mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
