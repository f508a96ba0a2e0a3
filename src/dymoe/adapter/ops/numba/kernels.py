"""Numba kernels of `choose` and its way back; `dymoe.adapter.ops.numba` calls them with arrays that share memory."""

# Numba compiles these functions; it takes no annotations.
# mypy: disable-error-code="no-untyped-def"

import math

import numpy as np
from numba import njit

# Sums may be reordered and divisions become products, so that loops are vectorised; infinities keep their meaning.
_compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp"})
SMALL = 1e-8  # as in `routing.routing_score_regularization`


@_compiled
def _threshold(keys, number, k, bits):
    """Largest bound that at least k of the first `number` keys reach, one bit after another, and how many reach it."""
    bound = bits[0] ^ bits[0]  # 0 of that type
    reached = number
    for bit in bits:
        trial = bound | bit
        count = 0
        for e in range(number):  # without a branch, so that it is vectorised
            count += keys[e] >= trial
        if count >= k:
            bound, reached = trial, count
            if count == k:
                break
    return bound, reached


@_compiled
def _largest(raw, k, bits, keys, index):
    """Places of the k largest numbers in ascending order; of equal ones at the border the first.

    `raw` are the numbers' bit patterns; flipped into `keys` they are unsigned integers of the numbers' order.
    """
    number, top = len(raw), bits[0]
    for e in range(number):
        keys[e] = ~raw[e] if raw[e] & top else raw[e] | top
    bound, reached = _threshold(keys, number, k, bits)
    found, surplus = 0, reached - k
    if surplus:
        for e in range(number - 1, -1, -1):  # the last of those at the border
            if surplus and keys[e] == bound:
                keys[e] = 0
                surplus -= 1
    for e in range(number):
        if found < k:
            index[found] = e
            found += keys[e] >= bound


@_compiled
def _softmax(scores, allowed, temperature, weights):
    """Softmax over the allowed candidates into `weights`, 0 elsewhere; returns its entropy in nats."""
    best = -np.inf
    for c in range(len(scores)):
        if allowed[c] and scores[c] > best:
            best = scores[c]
    total = 0.0
    for c in range(len(scores)):
        power = 0.0
        if allowed[c]:
            power = math.exp((scores[c] - best) / temperature)
        weights[c] = power
        total += power
    mean = 0.0
    for c in range(len(scores)):
        weights[c] = weights[c] / total
        if allowed[c]:
            mean += weights[c] * (scores[c] - best)
    return math.log(total) - mean / temperature if len(scores) else 0.0


@_compiled
def _take(values, raw, k, bits, keys, index, taken):
    """The largest k of a side's scores with their places; all in order where there are not more."""
    if len(values) > k:
        _largest(raw, k, bits, keys, index)
    else:
        for c in range(len(values)):
            index[c] = c
    for c in range(len(taken)):
        taken[c] = values[index[c]]


@_compiled
def _kind(old, new, tau):
    """Token type (OLD 0, AMBIGUOUS 1, NEW 2) from the candidates' scores of both sides."""
    best_old, best_new = old.max(), new.max()
    if abs(best_new - best_old) > tau * max(abs(best_new), abs(best_old)):
        return 2 if best_new > best_old else 0
    return 1


@_compiled
def _allow(member, split, sees_new, exclusive, allowed):
    """Guidance: which candidates a token may use; unless `exclusive`, the old side stays visible to all."""
    for c in range(len(member)):
        if exclusive:
            allowed[c] = (c >= split) == sees_new
        else:
            allowed[c] = member[c] if sees_new else c < split


@_compiled
def _penalise(scores, member, split, temperature, share, exclusivity, specialization, weights, terms, slope):
    """Add a token's share of exclusivity and specialization to `terms`; write their slope if it has columns."""
    _softmax(scores, member, temperature, weights)
    on_old, on_new, largest = 0.0, 0.0, 0.0
    for c in range(split):
        on_old += weights[c]
        largest = max(largest, weights[c])
    for c in range(split, len(weights)):
        on_new += weights[c]
    target = 1.0 - largest
    inside, outside = max(on_new, SMALL), max(1.0 - on_new, SMALL)
    terms[1] += on_old * on_new * share
    terms[2] -= (target * math.log(inside) + (1.0 - target) * math.log(outside)) * share
    by_new = 0.0
    if 1.0 - on_new >= SMALL:
        by_new += (1.0 - target) / outside
    if on_new >= SMALL:
        by_new -= target / inside
    from_old = exclusivity * on_new * share / temperature
    from_new = (exclusivity * on_old + specialization * by_new) * share / temperature
    mean = on_old * from_old + on_new * from_new
    for c in range(len(slope)):
        slope[c] = weights[c] * ((from_new if c >= split else from_old) - mean)


@_compiled
def _balance(weights, expert, experts, first, number, counted, temperature, balance, terms, slope):
    """Write the load balance to `terms` and add its slope; `expert` (tokens, C) are columns of all experts.

    The candidates from `first` on belong to the `number` experts that are evened out.
    """
    count = weights.shape[1]
    mass, dispatched = np.zeros(experts), np.zeros(experts)
    evened, tokens = np.zeros(len(weights), np.bool_), 0
    for t in range(len(weights)):
        if not counted[t]:
            continue
        best, place = 0.0, -1
        for c in range(first, count):
            mass[expert[t, c]] += weights[t, c]
            if weights[t, c] > best:
                best, place = weights[t, c], expert[t, c]
        if place >= 0:
            evened[t] = True
            dispatched[place] += 1.0
            tokens += 1
    total = mass.sum()
    if total == 0:
        return
    dispatched /= max(tokens, 1)
    mean = (dispatched * mass).sum() / total
    terms[0] = number * mean
    factor = number / total * balance / temperature
    gradient = np.zeros(count)
    for t in range(len(slope)):
        if evened[t]:
            inner = 0.0
            for c in range(first, count):
                gradient[c] = (dispatched[expert[t, c]] - mean) * factor
                inner += weights[t, c] * gradient[c]
            for c in range(count):
                slope[t, c] += weights[t, c] * (gradient[c] - inner)


@_compiled
def decide(
    old,
    new,
    raw_old,
    raw_new,
    bits,
    counted,
    top_k,
    temperature,
    tau,
    judged,
    guided,
    reaches,
    exclusive,
    balance,
    balance_all,
    regularize,
    exclusivity,
    specialization,
    rsr_temperature,
    scores,
    weights,
    index_old,
    index_new,
    types,
    slope,
    terms,
    statistics,
):
    """Everything that `candidates.choose` finds, one token after another.

    `raw_*` are the scores' bit patterns, `bits` the single bits of that type from the highest down; `counted` says
    which tokens count in the losses. `reaches` tells for each token type (OLD, AMBIGUOUS, NEW) whether it sees the new
    group. `balance`, `exclusivity` and `specialization` are factors of the slope. The rest is written: `terms` (3,),
    `statistics` (5,), and `slope` and `types` where they have rows.
    """
    tokens, num_old, num_new = len(old), old.shape[1], new.shape[1]
    split, count = index_old.shape[1], weights.shape[1]
    keys = np.empty(max(num_old, num_new, count), raw_old.dtype)
    top = np.empty(top_k, np.int64)
    member, allowed = np.ones(count, np.bool_), np.ones(count, np.bool_)
    penalised, unsloped = np.empty(count, scores.dtype), np.empty(0, scores.dtype)
    share = 1.0 / max(counted.sum(), 1)
    narrowed = 0 < split < count and count > top_k and (regularize or not guided or not exclusive)
    for t in range(tokens):
        _take(old[t], raw_old[t], top_k, bits, keys, index_old[t], scores[t, :split])
        _take(new[t], raw_new[t], top_k, bits, keys, index_new[t], scores[t, split:])
        kind = 2
        if judged:
            kind = types[t] = _kind(scores[t, :split], scores[t, split:], tau)
        if narrowed:
            _largest(scores[t].view(raw_old.dtype), top_k, bits, keys, top)
            member[:] = False
            for c in top:
                member[c] = True
        if guided:
            _allow(member, split, reaches[kind], exclusive, allowed)
        entropy = _softmax(scores[t], allowed if guided else member, temperature, weights[t])
        if counted[t]:
            statistics[2 - kind] += share
            statistics[3] += weights[t, split:].sum() * share
            statistics[4] += entropy * share
            if regularize:
                place = slope[t] if len(slope) else unsloped
                _penalise(
                    scores[t],
                    member,
                    split,
                    rsr_temperature,
                    share,
                    exclusivity,
                    specialization,
                    penalised,
                    terms,
                    place,
                )
    if balance != 0.0 and (num_new or balance_all):
        expert = np.empty((tokens, count), np.int64)
        for t in range(tokens):
            expert[t, :split] = index_old[t]
            expert[t, split:] = index_new[t] + num_old
        first, number = (0, num_old + num_new) if balance_all else (split, num_new)
        _balance(weights, expert, num_old + num_new, first, number, counted, temperature, balance, terms, slope)


@_compiled
def descend(weights, by_weight, scores, slope, upstream, temperature, inverse, scaled, along):
    """Gradient at the scores over the length of x, `scaled` (tokens, C), and minus its part along x, `along`."""
    sloped = len(slope) > 0
    for t in range(len(weights)):
        inner = 0.0
        for c in range(weights.shape[1]):
            inner += weights[t, c] * by_weight[t, c]
        part = 0.0
        for c in range(weights.shape[1]):
            value = weights[t, c] * (by_weight[t, c] - inner) / temperature
            if sloped:
                value += slope[t, c] * upstream
            value *= inverse[t]
            scaled[t, c] = value
            part += value * scores[t, c]
        along[t] = -part * inverse[t]


@_compiled
def ranks_in_use(index, r, chunk, ranks, touched):
    """Rows of a block's matrices that each token uses, and which chunks of experts; returns the pairs in use."""
    pairs = 0
    for t in range(len(index)):
        place = 0
        for c in range(index.shape[1]):
            expert = index[t, c]
            for rank in range(r):
                ranks[t, place] = expert * r + rank
                place += 1
            if not touched[t, expert // chunk]:
                touched[t, expert // chunk] = True
                pairs += 1
    return pairs


@_compiled
def _wider(raw, shift, bits):
    """A row in bfloat16 (shift 16) or float32 (0), both as bit patterns, as the bit patterns of float32."""
    for i in range(len(raw)):
        bits[i] = np.uint32(raw[i]) << shift


@_compiled
def _dot(first, second):
    total = np.float32(0)
    for i in range(len(first)):
        total += first[i] * second[i]
    return total


@_compiled
def serve(x, x_shift, directions, a, b, r, shift, top_k, temperature, bits, scores, index, best, weights, output):
    """Gate and frozen experts for a few tokens, nothing learned: read only the rows that are used, add to `output`.

    x (tokens, d), a, b and output are bit patterns of bfloat16 (shift 16) or float32 (0), the unit `directions`
    (experts, d) float32. Sums are float32. `scores`, `index`, `best` (the chosen scores) and `weights` are written.
    """
    tokens, experts, d = len(x), len(directions), x.shape[1]
    count = weights.shape[1]
    keys, allowed = np.empty(experts, np.uint32), np.ones(count, np.bool_)
    token_bits, sum_bits = np.empty(d, np.uint32), np.empty(output.shape[1], np.uint32)
    row_bits = np.empty(max(d, output.shape[1]), np.uint32)
    token, row, total = token_bits.view(np.float32), row_bits.view(np.float32), sum_bits.view(np.float32)
    for t in range(tokens):
        _wider(x[t], x_shift, token_bits)
        square = _dot(token, token)
        inverse = np.float32(1) / np.sqrt(square) if square > 0 else np.float32(0)
        for e in range(experts):
            scores[t, e] = _dot(token, directions[e]) * inverse
        if experts > top_k:
            _largest(scores[t].view(np.uint32), top_k, bits, keys, index[t])
        for c in range(count):
            best[t, c] = scores[t, index[t, c] if experts > top_k else c]
        _softmax(best[t], allowed, temperature, weights[t])
        _wider(output[t], shift, sum_bits)
        for c in range(count):
            weight = weights[t, c]
            if weight == 0:
                continue
            expert = index[t, c] if experts > top_k else c
            for rank in range(expert * r, expert * r + r):
                _wider(a[rank], shift, row_bits)
                value = _dot(token, row[:d]) * weight
                _wider(b[rank], shift, row_bits)
                for i in range(len(total)):
                    total[i] += value * row[i]
        for i in range(len(total)):
            if shift:  # to the nearest, of two as near the even one
                odd = (sum_bits[i] >> np.uint32(16)) & np.uint32(1)
                output[t, i] = (sum_bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            else:
                output[t, i] = sum_bits[i]
