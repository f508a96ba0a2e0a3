"""The gate's decision on a CPU by compiled loops: one pass over a token's scores instead of some fifty operations.

With a few hundred tokens the small operations of `candidates.choose` cost as much as the products they serve. Numba
(extra `fast`) compiles the same steps once and keeps the result beside the module. Where it is not installed,
on other devices and in other dtypes the torch operations do it; the tests hold both against the formulas.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dymoe.adapter.ops.block import ExpertBlock
from dymoe.adapter.ops.candidates import Candidates, Rule
from dymoe.routing import REACHES, TokenType

# Measured with benchmarks/decode.py on one core.
FEW = 32  # tokens, as while decoding
SERVED = 4  # chosen experts of all tokens per expert of the block; above, dense products win
_SHIFT = {torch.bfloat16: 16, torch.float32: 0}
_RAW: dict[torch.dtype, Any] = {torch.float32: np.uint32, torch.float64: np.uint64}
_FLOAT: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


@functools.cache
def _kernels() -> Any:
    """The compiled functions, or None without a Numba that works here (too old for NumPy, no place to keep code)."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from dymoe.adapter.ops.numba import kernels
    except (ImportError, RuntimeError) as error:
        logging.getLogger(__name__).warning("Numba cannot be used (%s); torch's operations take its place", error)
        return None
    return kernels


def available() -> bool:
    """Whether Numba is installed and works."""
    return _kernels() is not None


def suits(scores: Tensor, learning: bool = True) -> bool:
    """Whether the gate of these scores (tokens, experts) is computed here; for few tokens torch's top-k is as fast."""
    fits = scores.device.type == "cpu" and scores.dtype in _RAW
    return fits and (learning or len(scores) > FEW) and available()


def serves(x: Tensor, blocks: Sequence[ExpertBlock], dtype: torch.dtype, top_k: int) -> bool:
    """Whether `serve` computes these tokens (n, d): few beside the experts of the one frozen block."""
    fits = x.device.type == "cpu" and x.dtype in _SHIFT and dtype in _SHIFT and len(blocks) == 1 and available()
    return fits and 0 < len(x) <= FEW and len(x) * top_k <= SERVED * max(blocks[0].experts, top_k)


@functools.cache
def _bits(dtype: torch.dtype) -> Any:
    """The single bits of the unsigned integer as wide as a floating-point type, from the highest down."""
    raw = _RAW[dtype]
    width = 8 * raw().itemsize
    return np.array([1 << place for place in reversed(range(width))], dtype=raw)


@functools.cache
def _reaches(guidance: str) -> Any:
    return np.array([kind in REACHES[guidance] for kind in TokenType])


def choose(
    old: Tensor, new: Tensor, rule: Rule, mask: Tensor | None = None, scale: Tensor | None = None, slope: bool = True
) -> Candidates:
    """`candidates.choose` by one compiled function; arguments and result as there, on a CPU in float32 or float64."""
    dtype, raw, tokens = old.dtype, _RAW[old.dtype], len(old)
    experts = (old.shape[1], new.shape[1])
    sizes = tuple(min(number, rule.top_k) for number in experts)
    split, count = sizes[0], sum(sizes)
    both = 0 < split < count
    guided = both and rule.guidance != "none"
    judged = guided or (both and rule.statistics)
    index = [torch.empty(tokens, size, dtype=torch.long) for size in sizes]
    scores, weights = torch.empty(tokens, count, dtype=dtype), torch.empty(tokens, count, dtype=dtype)
    types = torch.empty(tokens if judged else 0, dtype=torch.int8)
    has_terms = rule.load_balance > 0 or rule.regularize
    sloped = slope and has_terms
    gradient = torch.zeros(tokens if sloped else 0, count, dtype=dtype)
    terms, statistics = torch.zeros(3, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    risen = (1.0 if scale is None else float(scale)) / rule.layers
    factors = (rule.load_balance / rule.layers, rule.exclusivity * risen, rule.specialization * risen)
    old_array, new_array = old.contiguous().numpy(), new.contiguous().numpy()
    _kernels().decide(
        old_array,
        new_array,
        old_array.view(raw),
        new_array.view(raw),
        _bits(dtype),
        (torch.ones(tokens, dtype=torch.bool) if mask is None else mask).numpy(),
        rule.top_k,
        _FLOAT[dtype](rule.temperature),
        float(rule.tau),
        judged,
        guided,
        _reaches(rule.guidance),
        rule.guidance == "exclusive",
        factors[0],
        rule.balance_all,
        both and bool(rule.regularize),
        factors[1],
        factors[2],
        _FLOAT[dtype](rule.rsr_temperature),
        scores.numpy(),
        weights.numpy(),
        index[0].numpy(),
        index[1].numpy(),
        types.numpy(),
        gradient.numpy(),
        terms.numpy(),
        statistics.numpy(),
    )
    narrowed = [found if number > size else None for found, number, size in zip(index, experts, sizes, strict=True)]
    chosen = Candidates(scores, weights, (narrowed[0], narrowed[1]), split)
    chosen.types = types if judged else None
    if rule.statistics:
        chosen.statistics = statistics.to(dtype)
    if has_terms:
        chosen.terms = terms.to(dtype)
        chosen.total = (terms * torch.tensor(factors, dtype=torch.float64)).sum().to(dtype)
        chosen.slope = gradient if sloped else None
    return chosen


def descend(
    chosen: Candidates, by_weight: Tensor, inverse: Tensor, temperature: float, upstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`candidates.descend` by one compiled function; arguments and result as there."""
    weights = chosen.weights
    scaled, along = torch.empty_like(weights), torch.empty_like(inverse)
    slope = weights.new_empty(0, weights.shape[1]) if chosen.slope is None else chosen.slope
    _kernels().descend(
        weights.numpy(),
        by_weight.contiguous().numpy(),
        chosen.scores.numpy(),
        slope.numpy(),
        1.0 if upstream is None else float(upstream),
        temperature,
        inverse.view(-1).numpy(),
        scaled.numpy(),
        along.view(-1).numpy(),
    )
    return scaled, along


def serve(x: Tensor, output: Tensor, block: ExpertBlock, directions: Tensor, rule: Rule) -> tuple[Tensor, Candidates]:
    """Gate the frozen experts and add their output, for a few tokens of which nothing is learned.

    Args:
        x: (n, d), bfloat16 or float32.
        output: (n, out), the dtype of the block; the experts' output is added.
        block: the experts.
        directions: their unit router rows, (experts, d), float32.
        rule: of the gate; only its top_k and temperature are meant.

    Returns:
        The scores, (n, experts), float32, and the gate's decision.
    """
    experts = block.experts
    kept, tokens = min(experts, rule.top_k), len(x)
    scores, best, weights = (torch.empty(tokens, columns, dtype=torch.float32) for columns in (experts, kept, kept))
    index = torch.empty(tokens if experts > kept else 0, kept, dtype=torch.long)
    _kernels().serve(
        _patterns(x),
        np.uint32(_SHIFT[x.dtype]),
        directions.numpy(),
        _patterns(block.a),
        _patterns(block.b),
        block.r,
        np.uint32(_SHIFT[output.dtype]),
        rule.top_k,
        np.float32(rule.temperature),
        _bits(torch.float32),
        scores.numpy(),
        index.numpy(),
        best.numpy(),
        weights.numpy(),
        _patterns(output),
    )
    return scores, Candidates(best, weights, (index if experts > kept else None, None), kept)


def _patterns(values: Tensor) -> Any:
    """The bit patterns of a tensor in bfloat16 or float32, in the same memory."""
    return values.view(torch.uint16 if values.dtype == torch.bfloat16 else torch.uint32).numpy()


def ranks_in_use(index: Tensor, experts: int, r: int, chunk: int) -> tuple[Tensor, Tensor, int]:
    """Rows of a block's matrices that each token uses, (n, candidates * r), the chunks of experts that it touches,
    (n, chunks), bool, and the number of such pairs; `index` (n, candidates) holds its experts."""
    ranks = torch.empty(len(index), index.shape[1] * r, dtype=torch.long)
    touched = torch.zeros(len(index), -(-experts // chunk), dtype=torch.bool)
    pairs = _kernels().ranks_in_use(index.numpy(), r, chunk, ranks.numpy(), touched.numpy())
    return ranks, touched, pairs
