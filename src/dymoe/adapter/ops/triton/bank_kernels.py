"""Kernels of the expert bank between and in place of its matrix products.

Hidden values have columns n = e * R + j, j < R the row within expert e. Weights are float32 of any strides; `offset`
is the block's first column in them.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

# ---- every expert of every token: what stands between the two dense products -------------------------------------


@triton.jit
def _cells(tokens, experts, R: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """This program's (tokens, experts) and (tokens, experts, ranks) cells: coordinates and what of them exists."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.program_id(1) * BC + tl.arange(0, BC)
    j = tl.arange(0, BR)
    pair = (t < tokens)[:, None] & (e < experts)[None, :]
    cell = pair[:, :, None] & (j < R)[None, None, :]
    return t, e, pair, cell, t[:, None, None] * (experts * R) + e[None, :, None] * R + j[None, None, :]


@triton.jit(do_not_specialize=["tokens"])
def gate_forward(
    hidden,
    weights,
    gated_out,
    tokens,
    experts,
    along_tokens,
    along_experts,
    offset,
    scale,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """gated = scale * weight of the expert * hidden."""
    t, e, pair, cell, place = _cells(tokens, experts, R, BR, BT, BC)
    at = t[:, None] * along_tokens + (offset + e[None, :]) * along_experts
    w = tl.load(weights + at, mask=pair, other=0.0).to(tl.float32) * scale
    h = tl.load(hidden + place, mask=cell, other=0.0).to(tl.float32)
    tl.store(gated_out + place, (h * w[:, :, None]).to(gated_out.dtype.element_ty), mask=cell)


@triton.jit(do_not_specialize=["tokens"])
def gate_backward(
    from_gated,
    hidden,
    weights,
    hidden_out,
    weights_out,
    gated_out,
    tokens,
    experts,
    along_tokens,
    along_experts,
    columns,
    offset,
    scale,
    GATED: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradients of hidden and weights; on request `gated` once more (the gradient of B needs it)."""
    t, e, pair, cell, place = _cells(tokens, experts, R, BR, BT, BC)
    at = t[:, None] * along_tokens + (offset + e[None, :]) * along_experts
    w = tl.load(weights + at, mask=pair, other=0.0).to(tl.float32) * scale
    g = tl.load(from_gated + place, mask=cell, other=0.0).to(tl.float32)
    h = tl.load(hidden + place, mask=cell, other=0.0).to(tl.float32)
    dtype = hidden_out.dtype.element_ty
    tl.store(hidden_out + place, (g * w[:, :, None]).to(dtype), mask=cell)
    tl.store(weights_out + t[:, None] * columns + offset + e[None, :], scale * tl.sum(g * h, 2), mask=pair)
    if GATED:
        tl.store(gated_out + place, (h * w[:, :, None]).to(dtype), mask=cell)


@triton.jit
def _drop_quarter(values, onto, out, at, numel, draws, rate, ADD: tl.constexpr):
    inside = at < numel
    kept = tl.load(values + at, mask=inside, other=0.0).to(tl.float32) / (1 - rate)
    result = tl.where(draws >= rate, kept, 0.0)
    if ADD:
        result += tl.load(onto + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["numel", "seed"])
def dropout(values, onto, out, numel, seed, rate, ADD: tl.constexpr, QUARTER: tl.constexpr):
    """Values at a place either 0 or divided by 1 - rate, as the seed says; with ADD, added to `onto`.

    One call of the generator draws for four places. Its counter has 32 bits: masks repeat after 2^34 places.
    """
    program = tl.program_id(0)
    i = tl.arange(0, QUARTER)
    draws0, draws1, draws2, draws3 = tl.rand4x(seed, program * QUARTER + i)
    at = program.to(tl.int64) * (4 * QUARTER) + i
    _drop_quarter(values, onto, out, at, numel, draws0, rate, ADD)
    _drop_quarter(values, onto, out, at + QUARTER, numel, draws1, rate, ADD)
    _drop_quarter(values, onto, out, at + 2 * QUARTER, numel, draws2, rate, ADD)
    _drop_quarter(values, onto, out, at + 3 * QUARTER, numel, draws3, rate, ADD)


# ---- few experts of every token: products over the chunks of experts that a tile of tokens uses ------------------


@triton.jit
def _dot(left, right, total, WIDE: tl.constexpr):
    """total + left @ right; float32 operands as three products on the tensor cores, which loses next to nothing.

    WIDE: for Triton's interpreter, which would multiply the bits of bfloat16.
    """
    if WIDE:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="tf32x3")


@triton.jit(do_not_specialize=["tokens"])
def used_chunks(
    weights,
    chunks_out,
    counts_out,
    tokens,
    experts,
    along_tokens,
    along_experts,
    offset,
    chunks,
    BM: tl.constexpr,
    STEP: tl.constexpr,
    PER: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The chunks of PER experts in which a token of this tile of BM has weight, ascending, and how many they are."""
    tile = tl.program_id(0)
    e = tl.arange(0, CHUNKS * PER)
    used = tl.zeros((CHUNKS * PER,), tl.int32)
    for start in range(0, BM, STEP):
        t = tile.to(tl.int64) * BM + start + tl.arange(0, STEP)
        mask = (t < tokens)[:, None] & (e < experts)[None, :]
        at = t[:, None] * along_tokens + (offset + e[None, :]) * along_experts
        used = tl.maximum(used, tl.max((tl.load(weights + at, mask=mask, other=0.0) != 0).to(tl.int32), 0))
    of_chunk = tl.max(tl.reshape(used, (CHUNKS, PER)), 1)
    slot = tl.cumsum(of_chunk, 0) - 1
    tl.store(chunks_out + tile * chunks + slot, tl.arange(0, CHUNKS), mask=of_chunk > 0)
    tl.store(counts_out + tile, tl.sum(of_chunk, 0))


@triton.jit(do_not_specialize=["tokens"])
def sampled_product(
    x,
    rows,
    hidden,
    weights,
    out,
    weights_out,
    chunks_of,
    counts,
    tokens,
    features,
    width,
    along_tokens,
    along_experts,
    columns,
    offset,
    chunks,
    scale,
    GATE: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x @ rows^T where a tile of tokens uses the chunk of BN rows; nothing is written elsewhere.

    With GATE, x is the gradient of the bank's output and rows are B: writes the gradients of hidden and weights.
    """
    slot = tl.program_id(0)
    tile = tl.program_id(1)
    if slot < tl.load(counts + tile):
        chunk = tl.load(chunks_of + tile * chunks + slot)
        t = tile.to(tl.int64) * BM + tl.arange(0, BM)
        n = chunk * BN + tl.arange(0, BN)
        here = (t < tokens)[:, None]
        there = n < width
        total = tl.zeros((BM, BN), tl.float32)
        for start in range(0, features, BK):
            k = start + tl.arange(0, BK)
            inside = (k < features)[None, :]
            left = tl.load(x + t[:, None] * features + k[None, :], mask=here & inside, other=0.0)
            at = n.to(tl.int64)[:, None] * features + k[None, :]
            right = tl.load(rows + at, mask=there[:, None] & inside, other=0.0)
            total = _dot(left, tl.trans(right), total, WIDE)
        mask = here & there[None, :]
        place = t[:, None] * width + n[None, :]
        if GATE:
            h = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
            at = t[:, None] * along_tokens + (offset + n[None, :] // R) * along_experts
            w = tl.load(weights + at, mask=mask, other=0.0).to(tl.float32) * scale
            e = chunk * (BN // R) + tl.arange(0, BN // R)
            to_weights = scale * tl.sum(tl.reshape(total * h, (BM, BN // R, R)), 2)
            chosen = here & (e * R < width)[None, :]
            tl.store(weights_out + t[:, None] * columns + offset + e[None, :], to_weights, mask=chosen)
            total *= w
        tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def summed_product(
    hidden,
    rows,
    weights,
    out,
    chunks_of,
    counts,
    tokens,
    features,
    width,
    along_tokens,
    along_experts,
    offset,
    chunks,
    scale,
    GATE: tl.constexpr,
    ADD: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """hidden @ rows over the chunks that a tile of tokens uses; with GATE, hidden is gated on the way."""
    tile = tl.program_id(1)
    t = tile.to(tl.int64) * BM + tl.arange(0, BM)
    f = tl.program_id(0) * BN + tl.arange(0, BN)
    here = (t < tokens)[:, None]
    inside = (f < features)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for slot in range(tl.load(counts + tile)):
        k = tl.load(chunks_of + tile * chunks + slot) * BK + tl.arange(0, BK)
        mask = here & (k < width)[None, :]
        left = tl.load(hidden + t[:, None] * width + k[None, :], mask=mask, other=0.0)
        if GATE:
            at = t[:, None] * along_tokens + (offset + k[None, :] // R) * along_experts
            w = tl.load(weights + at, mask=mask, other=0.0).to(tl.float32) * scale
            left = (left.to(tl.float32) * w).to(rows.dtype.element_ty)
        at = k.to(tl.int64)[:, None] * features + f[None, :]
        right = tl.load(rows + at, mask=(k < width)[:, None] & inside, other=0.0)
        total = _dot(left, right, total, WIDE)
    place = t[:, None] * features + f[None, :]
    if ADD:
        total += tl.load(out + place, mask=here & inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=here & inside)


# ---- few tokens: the rows of the chosen experts alone are read -----------------------------------------------------


@triton.jit
def chosen_experts(weights, experts_out, counts_out, experts, along_tokens, along_experts, offset, BE: tl.constexpr):
    """The experts of the block in which this token has weight, ascending, and how many they are."""
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BE)
    w = tl.load(weights + t * along_tokens + (offset + e) * along_experts, mask=e < experts, other=0.0)
    used = (w != 0).to(tl.int32)
    tl.store(experts_out + t * experts + tl.cumsum(used, 0) - 1, e, mask=used > 0)
    tl.store(counts_out + t, tl.sum(used, 0))


@triton.jit
def gathered_hidden(
    x,
    rows,
    weights,
    gated_out,
    experts_of,
    counts,
    features,
    experts,
    along_tokens,
    along_experts,
    offset,
    scale,
    R: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """scale * w_e * A_e x for a token's chosen experts, slot by slot, (tokens, experts * R), float32."""
    t = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, BR)
    for slot in range(tl.program_id(0), tl.load(counts + t), tl.num_programs(0)):
        e = tl.load(experts_of + t * experts + slot)
        n = e.to(tl.int64) * R + j
        total = tl.zeros((BR, BD), tl.float32)
        for start in range(0, features, BD):
            d = start + tl.arange(0, BD)
            value = tl.load(x + t * features + d, mask=d < features, other=0.0).to(tl.float32)
            mask = (j < R)[:, None] & (d < features)[None, :]
            row = tl.load(rows + n[:, None] * features + d[None, :], mask=mask, other=0.0).to(tl.float32)
            total += row * value[None, :]
        w = tl.load(weights + t * along_tokens + (offset + e) * along_experts).to(tl.float32) * scale
        tl.store(gated_out + t * (experts * R) + slot * R + j, tl.sum(total, 1) * w, mask=j < R)


@triton.jit
def gathered_output(
    gated,
    rows,
    out,
    experts_of,
    counts,
    features,
    experts,
    ADD: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum over a token's chosen experts of B_e gated_e."""
    t = tl.program_id(1).to(tl.int64)
    f = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = f < features
    total = tl.zeros((BN,), tl.float32)
    filled = tl.load(counts + t) * R
    for start in range(0, filled, BK):
        k = start + tl.arange(0, BK)
        e = tl.load(experts_of + t * experts + k // R, mask=k < filled, other=0)
        g = tl.load(gated + t * (experts * R) + k, mask=k < filled, other=0.0)
        at = (e.to(tl.int64) * R + k % R)[:, None] * features + f[None, :]
        row = tl.load(rows + at, mask=(k < filled)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(row.to(tl.float32) * g[:, None], 0)
    if ADD:
        total += tl.load(out + t * features + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * features + f, total.to(out.dtype.element_ty), mask=inside)
