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
    sloped,
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
    `statistics` (5,), `slope` where `sloped`, the indices and types where they have rows.
    """
    tokens, num_old, num_new = len(old), old.shape[1], new.shape[1]
    split, count = min(num_old, top_k), min(num_old, top_k) + min(num_new, top_k)
    both = 0 < split < count
    number = num_old + num_new if balance_all else num_new
    keys = np.empty(max(num_old, num_new, count), raw_old.dtype)
    top = np.empty(top_k, np.int64)
    member, allowed = np.ones(count, np.bool_), np.ones(count, np.bool_)
    penalised = np.empty(count, scores.dtype)
    mass, dispatched = np.zeros(num_old + num_new), np.zeros(num_old + num_new)
    evened = np.zeros(tokens, np.bool_)
    tokens_counted, tokens_evened = 0, 0
    for t in range(tokens):
        tokens_counted += counted[t]
    share = 1.0 / max(tokens_counted, 1)
    narrowed = both and count > top_k and (regularize or not guided or not exclusive)
    for t in range(tokens):
        if num_old > top_k:
            _largest(raw_old[t], top_k, bits, keys, index_old[t])
            for c in range(split):
                scores[t, c] = old[t, index_old[t, c]]
        else:
            scores[t, :split] = old[t]
        if num_new > top_k:
            _largest(raw_new[t], top_k, bits, keys, index_new[t])
            for c in range(count - split):
                scores[t, split + c] = new[t, index_new[t, c]]
        else:
            scores[t, split:] = new[t]
        kind = 2
        if both and judged:
            best_old, best_new = scores[t, :split].max(), scores[t, split:].max()
            if abs(best_new - best_old) > tau * max(abs(best_new), abs(best_old)):
                kind = 2 if best_new > best_old else 0
            else:
                kind = 1
            types[t] = kind
        if narrowed:
            _largest(scores[t].view(raw_old.dtype), top_k, bits, keys, top)
            member[:] = False
            for c in range(top_k):
                member[top[c]] = True
        for c in range(count):
            allowed[c] = member[c]
            if guided:
                on_new = c >= split
                if exclusive:
                    allowed[c] = on_new == reaches[kind]
                else:  # the old side stays visible
                    allowed[c] = member[c] if reaches[kind] else not on_new
        entropy = _softmax(scores[t], allowed, temperature, weights[t])
        on_new_group = 0.0
        for c in range(split, count):
            on_new_group += weights[t, c]
        if counted[t]:
            statistics[2 - kind] += share
            statistics[3] += on_new_group * share
            statistics[4] += entropy * share
        if balance != 0.0 and counted[t] and number:
            best, place, total = 0.0, 0, 0.0
            for c in range(0 if balance_all else split, count):
                weight = weights[t, c]
                expert = c
                if c < split:
                    expert = index_old[t, c] if num_old > top_k else c
                else:
                    expert = num_old + (index_new[t, c - split] if num_new > top_k else c - split)
                mass[expert] += weight
                total += weight
                if weight > best:
                    best, place = weight, expert
            if total > 0:
                evened[t] = True
                dispatched[place] += 1.0
                tokens_evened += 1
        if both and regularize:
            _softmax(scores[t], member, rsr_temperature, penalised)
            on_old, on_new, largest = 0.0, 0.0, 0.0
            for c in range(split):
                on_old += penalised[c]
                largest = max(largest, penalised[c])
            for c in range(split, count):
                on_new += penalised[c]
            target = 1.0 - largest
            inside, outside = max(on_new, SMALL), max(1.0 - on_new, SMALL)
            if counted[t]:
                terms[1] += on_old * on_new * share
                terms[2] -= (target * math.log(inside) + (1.0 - target) * math.log(outside)) * share
            if sloped:
                by_new = 0.0
                if 1.0 - on_new >= SMALL:
                    by_new += (1.0 - target) / outside
                if on_new >= SMALL:
                    by_new -= target / inside
                factor = share / rsr_temperature if counted[t] else 0.0
                from_old = exclusivity * on_new * factor
                from_new = (exclusivity * on_old + specialization * by_new) * factor
                mean = on_old * from_old + on_new * from_new
                for c in range(count):
                    slope[t, c] = penalised[c] * ((from_new if c >= split else from_old) - mean)
    if balance == 0.0 or not number or not tokens:
        return
    total = 0.0
    for e in range(num_old + num_new):
        total += mass[e]
        dispatched[e] /= max(tokens_evened, 1)
    total = total if total > 0 else 1.0
    mean = 0.0
    for e in range(num_old + num_new):
        mean += dispatched[e] * mass[e]
    mean /= total
    terms[0] = number * mean
    if not sloped:
        return
    factor = number / total * balance / temperature
    gradient = np.empty(count)
    for t in range(tokens):
        if not evened[t]:
            continue
        inner = 0.0
        for c in range(count):
            if c < split:
                expert = index_old[t, c] if num_old > top_k else c
            else:
                expert = num_old + (index_new[t, c - split] if num_new > top_k else c - split)
            gradient[c] = (dispatched[expert] - mean) * factor if balance_all or c >= split else 0.0
            inner += weights[t, c] * gradient[c]
        for c in range(count):
            slope[t, c] += weights[t, c] * (gradient[c] - inner)


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
