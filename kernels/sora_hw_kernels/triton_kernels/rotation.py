"""The coefficients of a first-order rotation and their gradients, for every device that Triton compiles for.

Everything is small, (out, r) and (out, rp), so what counts is the number of launches: forward and backward take two
each. PARTS programs leave partial sums over the output features; every program of the second launch adds them up, in
the same order. The columns of the factors are walked through one by one. Formulas: `sora_hw.ops.taylor_rotation`.
"""

import triton
import triton.language as tl


@triton.jit
def total(parts, columns, column, inside, PARTS: tl.constexpr):
    """The sums over the rows of `parts`, (PARTS, columns), at some of its columns."""
    at = parts + tl.arange(0, PARTS)[:, None] * columns + column[None, :]
    return tl.sum(tl.load(at, mask=tl.broadcast_to(inside[None, :], at.shape), other=0.0), axis=0)


@triton.jit
def scale_and_slopes(square_c, square_d, eps, BOUNDED: tl.constexpr):
    """`sora_hw.rotation.scale_and_slopes` of the squares of the two norms."""
    norm_c = tl.sqrt(square_c)
    norm_d = tl.sqrt(square_d)
    if BOUNDED:
        product = 2.0 * norm_c * norm_d
        turns = product > 1e-12
        factor = tl.where(turns, eps / tl.where(turns, product, 1.0), 0.0)
        slope_c = -factor / tl.where(turns, square_c, 1.0)
        slope_d = -factor / tl.where(turns, square_d, 1.0)
    else:
        inverse = 1.0 / (norm_c + norm_d + 1e-6)
        factor = tl.minimum(inverse, 1.0)
        slope = tl.where(inverse > 1.0, 0.0, -inverse * inverse)
        slope_c = tl.where(norm_c > 0.0, slope / tl.where(norm_c > 0.0, norm_c, 1.0), 0.0)
        slope_d = tl.where(norm_d > 0.0, slope / tl.where(norm_d > 0.0, norm_d, 1.0), 0.0)
    return factor, slope_c, slope_d


@triton.jit
def forward_sums_kernel(
    b,
    c,
    e,
    parts,
    OUT,
    R,
    RP,
    COLUMNS,
    TURNS_B: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """A row of `parts` a program: of its features `E^T b` and `C^T b`, (2 RP, R), and the squares of C and C + E."""
    program = tl.program_id(0)
    r = tl.arange(0, TILE_R)
    row = parts + program * COLUMNS
    square_c = tl.zeros((TILE_O,), dtype=tl.float32)
    square_d = tl.zeros((TILE_O,), dtype=tl.float32)
    for k in range(0, RP):
        e_b = tl.zeros((TILE_R,), dtype=tl.float32)
        c_b = tl.zeros((TILE_R,), dtype=tl.float32)
        for first in range(program * TILE_O, OUT, tl.num_programs(0) * TILE_O):
            o = first + tl.arange(0, TILE_O)
            e_k = tl.load(e + o * RP + k, mask=o < OUT, other=0.0)
            c_k = tl.load(c + o * RP + k, mask=o < OUT, other=0.0)
            square_c += c_k * c_k
            square_d += (c_k + e_k) * (c_k + e_k)
            if TURNS_B:
                inside = (o < OUT)[:, None] & (r < R)[None, :]
                b_tile = tl.load(b + o[:, None] * R + r[None, :], mask=inside, other=0.0)
                e_b += tl.sum(e_k[:, None] * b_tile, axis=0)
                c_b += tl.sum(c_k[:, None] * b_tile, axis=0)
        if TURNS_B:
            tl.store(row + k * R + r, e_b, mask=r < R)
            tl.store(row + (RP + k) * R + r, c_b, mask=r < R)
    tl.store(row + COLUMNS - 2, tl.sum(square_c))
    tl.store(row + COLUMNS - 1, tl.sum(square_d))


@triton.jit
def forward_kernel(
    b,
    c,
    e,
    scale,
    parts,
    turned,
    q_t,
    sums,
    eps,
    OUT,
    R,
    RP,
    COLUMNS,
    TURNS_B: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BOUNDED: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """TILE_O rows of `turned`, (OUT, R + 2 RP), and columns of `q_t`, (2 RP, OUT); program 0 keeps the sums."""
    program = tl.program_id(0)
    o = program * TILE_O + tl.arange(0, TILE_O)
    r = tl.arange(0, TILE_R)
    o_in, r_in = o < OUT, r < R
    part = tl.arange(0, PARTS) * COLUMNS
    square_c = tl.sum(tl.load(parts + part + COLUMNS - 2))
    square_d = tl.sum(tl.load(parts + part + COLUMNS - 1))
    factor, _, _ = scale_and_slopes(square_c, square_d, eps, BOUNDED)
    if program == 0:
        tl.store(sums + COLUMNS - 2, square_c)
        tl.store(sums + COLUMNS - 1, square_d)

    inside = o_in[:, None] & r_in[None, :]
    b_tile = tl.load(b + o[:, None] * R + r[None, :], mask=inside, other=0.0)
    row = turned + o.to(tl.int64) * (R + 2 * RP)
    for k in range(0, RP):
        e_k = tl.load(e + o * RP + k, mask=o_in, other=0.0)
        c_k = tl.load(c + o * RP + k, mask=o_in, other=0.0)
        if TURNS_B:
            e_b = total(parts, COLUMNS, k * R + r, r_in, PARTS)
            c_b = total(parts, COLUMNS, (RP + k) * R + r, r_in, PARTS)
            b_tile += factor * (c_k[:, None] * e_b[None, :] - e_k[:, None] * c_b[None, :])
            if program == 0:
                tl.store(sums + k * R + r, e_b, mask=r_in)
                tl.store(sums + (RP + k) * R + r, c_b, mask=r_in)
        tl.store(row + R + k, factor * c_k, mask=o_in)
        tl.store(row + R + RP + k, -factor * e_k, mask=o_in)
        if HAS_SCALE:
            scale_tile = tl.load(scale + o, mask=o_in, other=0.0)
            e_k *= scale_tile
            c_k *= scale_tile
        tl.store(q_t + k * OUT + o, e_k, mask=o_in)
        tl.store(q_t + (RP + k) * OUT + o, c_k, mask=o_in)
    tl.store(row[:, None] + r[None, :], b_tile, mask=inside)


@triton.jit
def backward_sums_kernel(
    dturned,
    c,
    e,
    parts,
    OUT,
    R,
    RP,
    COLUMNS,
    TURNS_B: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """A row of `parts` a program: of its features `E^T db'` and `C^T db'`, (2 RP, R), and `<C, dV_1> - <E, dV_2>`."""
    program = tl.program_id(0)
    r = tl.arange(0, TILE_R)
    row = parts + program * COLUMNS
    through_factor = tl.zeros((TILE_O,), dtype=tl.float32)
    for k in range(0, RP):
        e_db = tl.zeros((TILE_R,), dtype=tl.float32)
        c_db = tl.zeros((TILE_R,), dtype=tl.float32)
        for first in range(program * TILE_O, OUT, tl.num_programs(0) * TILE_O):
            o = first + tl.arange(0, TILE_O)
            o_in = o < OUT
            at = dturned + o.to(tl.int64) * (R + 2 * RP)
            e_k = tl.load(e + o * RP + k, mask=o_in, other=0.0)
            c_k = tl.load(c + o * RP + k, mask=o_in, other=0.0)
            through_factor += c_k * tl.load(at + R + k, mask=o_in, other=0.0)
            through_factor -= e_k * tl.load(at + R + RP + k, mask=o_in, other=0.0)
            if TURNS_B:
                db_tile = tl.load(at[:, None] + r[None, :], mask=o_in[:, None] & (r < R)[None, :], other=0.0)
                e_db += tl.sum(e_k[:, None] * db_tile, axis=0)
                c_db += tl.sum(c_k[:, None] * db_tile, axis=0)
        if TURNS_B:
            tl.store(row + k * R + r, e_db, mask=r < R)
            tl.store(row + (RP + k) * R + r, c_db, mask=r < R)
    tl.store(row + COLUMNS - 1, tl.sum(through_factor))


@triton.jit
def backward_kernel(
    dturned,
    dq_t,
    b,
    c,
    e,
    scale,
    sums,
    parts,
    db,
    dc,
    de,
    dscale,
    eps,
    OUT,
    R,
    RP,
    COLUMNS,
    TURNS_B: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BOUNDED: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """TILE_O rows of the gradients of b, c, e and scale. COLUMNS are those of `parts`, one less than `sums` has."""
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    r = tl.arange(0, TILE_R)
    o_in, r_in = o < OUT, r < R
    inside = o_in[:, None] & r_in[None, :]
    factor, slope_c, slope_d = scale_and_slopes(tl.load(sums + COLUMNS - 1), tl.load(sums + COLUMNS), eps, BOUNDED)
    dfactor = tl.sum(tl.load(parts + tl.arange(0, PARTS) * COLUMNS + COLUMNS - 1))
    if TURNS_B:
        for k in range(0, RP):
            e_db = total(parts, COLUMNS, k * R + r, r_in, PARTS)
            c_db = total(parts, COLUMNS, (RP + k) * R + r, r_in, PARTS)
            e_b = tl.load(sums + k * R + r, mask=r_in, other=0.0)
            c_b = tl.load(sums + (RP + k) * R + r, mask=r_in, other=0.0)
            dfactor += tl.sum(c_db * e_b - e_db * c_b)

    at = dturned + o.to(tl.int64) * (R + 2 * RP)
    db_tile = tl.load(at[:, None] + r[None, :], mask=inside, other=0.0)
    db_turned = db_tile
    b_tile = tl.load(b + o[:, None] * R + r[None, :], mask=inside, other=0.0)
    scale_tile = tl.load(scale + o, mask=o_in, other=0.0) if HAS_SCALE else 1.0
    through_scale = tl.zeros((TILE_O,), dtype=tl.float32)
    for k in range(0, RP):
        e_k = tl.load(e + o * RP + k, mask=o_in, other=0.0)
        c_k = tl.load(c + o * RP + k, mask=o_in, other=0.0)
        dq_e = tl.load(dq_t + k * OUT + o, mask=o_in, other=0.0)
        dq_c = tl.load(dq_t + (RP + k) * OUT + o, mask=o_in, other=0.0)
        through_scale += e_k * dq_e + c_k * dq_c
        through_norm_d = dfactor * slope_d * (c_k + e_k)
        de_k = scale_tile * dq_e + through_norm_d - factor * tl.load(at + R + RP + k, mask=o_in, other=0.0)
        dc_k = scale_tile * dq_c + through_norm_d + factor * tl.load(at + R + k, mask=o_in, other=0.0)
        dc_k += dfactor * slope_c * c_k
        if TURNS_B:
            e_db = total(parts, COLUMNS, k * R + r, r_in, PARTS)
            c_db = total(parts, COLUMNS, (RP + k) * R + r, r_in, PARTS)
            e_b = tl.load(sums + k * R + r, mask=r_in, other=0.0)
            c_b = tl.load(sums + (RP + k) * R + r, mask=r_in, other=0.0)
            de_k += factor * tl.sum(b_tile * c_db[None, :] - db_tile * c_b[None, :], axis=1)
            dc_k += factor * tl.sum(db_tile * e_b[None, :] - b_tile * e_db[None, :], axis=1)
            db_turned += factor * (e_k[:, None] * c_db[None, :] - c_k[:, None] * e_db[None, :])
        tl.store(de + o * RP + k, de_k, mask=o_in)
        tl.store(dc + o * RP + k, dc_k, mask=o_in)
    tl.store(db + o[:, None] * R + r[None, :], db_turned, mask=inside)
    if HAS_SCALE:
        tl.store(dscale + o, through_scale, mask=o_in)
