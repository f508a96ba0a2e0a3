"""Kernels of routing: scores of a token -> guidance, top-k, softmax, and the way back.

A program holds all experts of a few tokens in registers. The k largest of a row are found by bisection on the bits of
the scores (32 counts, no sort, no second copy of the row); of equal scores at the border the first are kept.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def _largest(scores, valid, top_k):
    """Which of the valid scores belong to the k largest of their row; of equal ones the first. Both (BT, BE)."""
    # Floats in the order of unsigned integers: negative ones flip all bits, the others the sign. + 0.0 makes -0.0 0.0.
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    keys = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    keys = tl.where(valid, keys, 0)
    border = tl.zeros((scores.shape[0],), tl.uint32)
    bit = tl.full((scores.shape[0],), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = border | bit
        count = tl.sum((keys >= candidate[:, None]).to(tl.int32), 1)
        border = tl.where(count >= top_k, candidate, border)
        bit = bit >> 1
    above = keys > border[:, None]
    equal = (keys == border[:, None]) & valid
    room = top_k - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None]))


@triton.jit
def _softmax(scores, chosen, temperature):
    """Softmax over the chosen scores divided by the temperature; 0 elsewhere and for -inf. (BT, BE)."""
    masked = tl.where(chosen, scores, float("-inf"))
    best = tl.max(masked, 1)
    best = tl.where(best == float("-inf"), 0.0, best)  # a row of nothing else: all its weights are 0
    powers = tl.exp((masked - best[:, None]) / temperature)
    total = tl.sum(powers, 1)
    return powers / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _through_softmax(w, dw, temperature):
    """Gradient at the scores of a softmax, given its result and the gradient there."""
    return w * (dw - tl.sum(w * dw, 1)[:, None]) / temperature


@triton.jit
def _place(tokens, experts, BT: tl.constexpr, BE: tl.constexpr):
    """Rows and columns of this program's tile, what of it exists, and its offsets in a (tokens, experts) matrix."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    valid = (t < tokens)[:, None] & (e < experts)[None, :]
    return t, e, valid, t[:, None] * experts + e[None, :]


@triton.jit(do_not_specialize=["tokens"])
def route_forward(
    x,
    first,
    second,
    inverse_out,
    scores_out,
    weights_out,
    types_out,
    tokens,
    features,
    num_first,
    num_second,
    num_new,
    top_k,
    temperature,
    tau,
    residue,
    PARTS: tl.constexpr,
    GUIDE: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    """1/|x|, scores, token types, guided weights. `first` and `second` are x @ rows^T, low parts to the right.

    GUIDE: 0 no types, 1 exclusive mask, 2 protecting mask, 3 types alone.
    """
    experts = num_first + num_second
    t, e, valid, place = _place(tokens, experts, BT, BE)
    here = t < tokens

    squares = tl.zeros((BT, BD), tl.float32)
    for start in range(0, features, BD):
        d = start + tl.arange(0, BD)
        tile = tl.load(x + t[:, None] * features + d, mask=here[:, None] & (d < features)[None, :], other=0.0)
        tile = tile.to(tl.float32)
        squares += tile * tile
    norm = tl.sqrt(tl.sum(squares, 1))
    inverse = tl.where(norm > 0, 1.0 / tl.maximum(norm, 1e-12), 0.0)

    own = valid & (e < num_first)[None, :]
    other = valid & (e >= num_first)[None, :]
    at_first = t[:, None] * (PARTS * num_first) + e[None, :]
    at_second = t[:, None] * (PARTS * num_second) + (e[None, :] - num_first)
    scores = tl.load(first + at_first, mask=own, other=0.0) + tl.load(second + at_second, mask=other, other=0.0)
    if PARTS == 2:
        scores += residue * tl.load(first + at_first + num_first, mask=own, other=0.0)
        scores += residue * tl.load(second + at_second + num_second, mask=other, other=0.0)
    scores *= inverse[:, None]
    tl.store(inverse_out + t, inverse, mask=here)
    tl.store(scores_out + place, scores, mask=valid)

    guided = scores
    if GUIDE > 0:
        newer = (e >= experts - num_new)[None, :]
        old = tl.max(tl.where(valid & ~newer, scores, float("-inf")), 1)
        new = tl.max(tl.where(valid & newer, scores, float("-inf")), 1)
        gap = tl.abs(new - old)
        scale = tl.maximum(tl.abs(new), tl.abs(old))
        relative = tl.where(scale > 0, gap / tl.maximum(scale, 1.1754943508222875e-38), 0.0)
        kind = tl.where(relative > tau, tl.where(new > old, 2, 0), 1)
        tl.store(types_out + t, kind.to(tl.int8), mask=here)
        to_new = (kind == 2)[:, None]
        if GUIDE == 1:
            guided = tl.where(newer ^ to_new, float("-inf"), scores)
        if GUIDE == 2:
            guided = tl.where(newer & ~to_new, float("-inf"), scores)
    weights = _softmax(guided, _largest(guided, valid, top_k), temperature)
    tl.store(weights_out + place, weights, mask=valid)


@triton.jit(do_not_specialize=["tokens"])
def route_backward(
    scores,
    weights,
    inverse,
    from_weights,
    from_scores,
    first_out,
    second_out,
    along_out,
    tokens,
    num_first,
    num_second,
    temperature,
    WEIGHTS: tl.constexpr,
    SCORES: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Gradient of x @ rows^T (both blocks) and of the factor on x that comes from its norm."""
    t, e, valid, place = _place(tokens, num_first + num_second, BT, BE)
    here = t < tokens
    total = tl.zeros((BT, BE), tl.float32)
    if WEIGHTS:
        w = tl.load(weights + place, mask=valid, other=0.0)
        dw = tl.load(from_weights + place, mask=valid, other=0.0).to(tl.float32)
        total += _through_softmax(w, dw, temperature)
    if SCORES:
        total += tl.load(from_scores + place, mask=valid, other=0.0).to(tl.float32)
    factor = tl.load(inverse + t, mask=here, other=0.0)
    total *= factor[:, None]
    s = tl.load(scores + place, mask=valid, other=0.0)
    tl.store(along_out + t, -tl.sum(total * s, 1) * factor, mask=here)
    at_first = t[:, None] * num_first + e[None, :]
    at_second = t[:, None] * num_second + (e[None, :] - num_first)
    dtype = first_out.dtype.element_ty
    tl.store(first_out + at_first, total.to(dtype), mask=valid & (e < num_first)[None, :])
    tl.store(second_out + at_second, total.to(dtype), mask=valid & (e >= num_first)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def topk_forward(scores, weights_out, tokens, experts, top_k, temperature, BT: tl.constexpr, BE: tl.constexpr):
    """Softmax over the k largest scores."""
    _, _, valid, place = _place(tokens, experts, BT, BE)
    s = tl.load(scores + place, mask=valid, other=float("-inf")).to(tl.float32)
    tl.store(weights_out + place, _softmax(s, _largest(s, valid, top_k), temperature), mask=valid)


@triton.jit(do_not_specialize=["tokens"])
def topk_backward(weights, from_weights, scores_out, tokens, experts, temperature, BT: tl.constexpr, BE: tl.constexpr):
    """Gradient of the scores from that of the weights."""
    _, _, valid, place = _place(tokens, experts, BT, BE)
    w = tl.load(weights + place, mask=valid, other=0.0)
    dw = tl.load(from_weights + place, mask=valid, other=0.0).to(tl.float32)
    tl.store(scores_out + place, _through_softmax(w, dw, temperature), mask=valid)


@triton.jit(do_not_specialize=["tokens"])
def mass_forward(
    scores,
    old_out,
    new_out,
    largest_out,
    tokens,
    experts,
    num_new,
    top_k,
    temperature,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Weight of both sides and the largest old weight of a token, without writing the weights."""
    t, e, valid, place = _place(tokens, experts, BT, BE)
    s = tl.load(scores + place, mask=valid, other=float("-inf")).to(tl.float32)
    w = _softmax(s, _largest(s, valid, top_k), temperature)
    old = tl.where((e < experts - num_new)[None, :], w, 0.0)
    here = t < tokens
    tl.store(old_out + t, tl.sum(old, 1), mask=here)
    tl.store(new_out + t, tl.sum(w - old, 1), mask=here)
    tl.store(largest_out + t, tl.max(old, 1), mask=here)


@triton.jit(do_not_specialize=["tokens"])
def mass_backward(
    scores,
    from_old,
    from_new,
    scores_out,
    tokens,
    experts,
    num_new,
    top_k,
    temperature,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Gradient of the scores from those of the two masses; the weights are computed once more."""
    t, e, valid, place = _place(tokens, experts, BT, BE)
    s = tl.load(scores + place, mask=valid, other=float("-inf")).to(tl.float32)
    w = _softmax(s, _largest(s, valid, top_k), temperature)
    here = t < tokens
    to_old = tl.load(from_old + t, mask=here, other=0.0)
    to_new = tl.load(from_new + t, mask=here, other=0.0)
    dw = tl.where((e < experts - num_new)[None, :], to_old[:, None], to_new[:, None])
    tl.store(scores_out + place, _through_softmax(w, dw, temperature), mask=valid)
