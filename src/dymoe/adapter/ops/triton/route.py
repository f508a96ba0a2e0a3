"""The cosine gate on a GPU: one product with the router rows, one kernel for all the rest.

For a token x (features,), unit rows u_e and n = |x|:

    p_e = x . u_e          one matrix product, left to the vendor's library
    s_e = p_e / n          scores, float32
    w   = softmax over the k largest of the guided s / temperature

The kernel reads x once for n, and p; it writes s, w and the token types. Backwards, with gw and gs the gradients of w
and s (the choice of the k largest and the guidance have none):

    g_e    = gs_e + w_e (gw_e - sum_j w_j gw_j) / temperature      (w_e = 0 where e was not chosen)
    q_e    = g_e / n                                               gradient of p_e at constant n
    dL/dx  = sum_e q_e u_e - x (sum_e q_e s_e) / n                 since ds_e/dx = (u_e - s_e x / n) / n
    dL/du_e = sum over tokens of q_e x

The kernel gives q and -(sum q s) / n; the two products are again the library's.

Precision: scores are divided by a temperature of 0.01, so a product in 16 bits would not do. For 16-bit x each row is
split into u = high + low / 2^11, both in the dtype of x; x is what it is, so x . high and x . low are exact but for the
float32 sums, and the error of a score is at most 2^-17 (bfloat16) or 2^-22 (float16): the size of float32's own for
what a router row holds. That costs two 16-bit products on the tensor cores in place of one in float32 beside them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from dymoe.adapter.gates import Routing
from dymoe.adapter.ops.triton.launch import DTYPES, plain, power_of_two, require, wide_product
from dymoe.errors import DymoeError
from dymoe.routing import Mask

GUIDES = {"exclusive": 1, "protect": 2, "none": 3}  # the masks that the kernels know, by their numbers there

RESIDUE = 2.0**-11  # exact in every dtype; keeps low parts in float16's normal range
MOST_EXPERTS = 16384  # a program holds a token's scores in registers
_splits: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Guidance:
    """Token Assignment Guidance as `routing.token_assignment_guidance` takes it.

    Args:
        num_new: size of the new group (the last columns), with at least one expert before them.
        tau: threshold of the token types.
        mask: "exclusive", "protect" or "none" (types only).
    """

    num_new: int
    tau: float
    mask: Mask = "exclusive"


@dataclass(frozen=True)
class _Options:
    top_k: int
    temperature: float
    guidance: Guidance | None


def route(
    x: Tensor, rows: Sequence[Tensor], top_k: int, temperature: float, guidance: Guidance | None = None
) -> Routing:
    """Scores, weights and token types of the cosine gate, equal to what `dymoe.routing` computes.

    Args:
        x: layer inputs, (..., features), float32, bfloat16 or float16.
        rows: one or two blocks of unit router rows, (experts of the block, features), float32; columns follow them.
        top_k: experts with weight per token, >= 1.
        temperature: of the softmax, > 0.
        guidance: while training with old and new experts; None for none.

    Returns:
        `Routing` with scores and weights (..., experts), float32, and types (...), int8, or None without guidance.

    Raises:
        DymoeError: no GPU or no Triton; a dtype or a number of experts that the kernel does not take.
        ValueError: top_k, temperature or guidance out of range.
    """
    require(x.device)
    _check(x, rows, top_k, temperature, guidance)
    blocks = [*rows] if len(rows) <= 2 else [rows[0], torch.cat([*rows[1:]])]
    second = blocks[1] if len(blocks) == 2 else x.new_empty(0, x.shape[-1], dtype=torch.float32)
    *tokens, features = x.shape
    flat = x.reshape(math.prod(tokens), features)
    scores, weights, types = _Route.apply(flat, blocks[0], second, _Options(top_k, temperature, guidance))
    return Routing(
        scores.view(*tokens, scores.shape[-1]),
        weights.view(*tokens, weights.shape[-1]),
        types.view(tokens) if guidance is not None else None,
    )


def _check(x: Tensor, rows: Sequence[Tensor], top_k: int, temperature: float, guidance: Guidance | None) -> None:
    experts = sum(len(block) for block in rows)
    if x.dtype not in DTYPES:
        raise DymoeError(f'compute="triton": inputs are {x.dtype}, not float32, bfloat16 or float16')
    if not 1 <= experts <= MOST_EXPERTS:
        raise DymoeError(f'compute="triton": 1 to {MOST_EXPERTS} experts can be routed to, got {experts}')
    if any(block.shape[-1] != x.shape[-1] for block in rows):
        raise ValueError(f"tokens have {x.shape[-1]} features but router rows have {[b.shape[-1] for b in rows]}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if guidance is None:
        return
    if guidance.mask not in GUIDES:
        raise ValueError(f"mask must be one of {', '.join(GUIDES)}, got {guidance.mask!r}")
    if not 0 < guidance.num_new < experts:
        raise ValueError(f"guidance needs old and new experts; num_new is {guidance.num_new} of {experts}")
    if not guidance.tau >= 0:
        raise ValueError(f"tau must not be negative, got {guidance.tau}")


def split_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """High and low parts of unit rows, (2 * experts, features) in a 16-bit `dtype`; kept for rows without gradient."""
    if dtype == torch.float32:
        return rows
    version = 0 if rows.is_inference() else rows._version
    found = _splits.get(rows)
    if found is not None and found[:2] == (version, dtype):
        return found[2]
    with torch.inference_mode(False), torch.no_grad():  # also made for a later pass that trains
        high = rows.to(dtype)
        low = ((rows - high.float()) / RESIDUE).to(dtype)
        parts = torch.cat([high, low])
    if not rows.requires_grad:
        _splits[rows] = (version, dtype, parts)
    return parts


def tile_of(tokens: int, experts: int) -> tuple[int, int, int]:
    """(tokens a program, padded experts, warps): few tokens a program, so that every multiprocessor has several."""
    width = power_of_two(experts)
    block = max(1, min(16, 2048 // width, power_of_two(tokens // 512)))
    return block, width, 8 if width > 4096 else 4


def features_of(block: int, features: int) -> int:
    """Features that a program with `block` tokens reads at once: a tile fits the registers, whatever the batch."""
    return min(1024, power_of_two(features), max(1, 4096 // block))


class _Route(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, options: _Options) -> tuple[Tensor, Tensor, Tensor]:
        from dymoe.adapter.ops.triton.select_kernels import route_forward

        ctx.set_materialize_grads(False)
        x = x.contiguous()
        tokens, features = x.shape
        experts = len(first) + len(second)
        scores = x.new_empty(tokens, experts, dtype=torch.float32)
        weights, inverse = torch.empty_like(scores), scores.new_empty(tokens)
        types = torch.empty(tokens, dtype=torch.int8, device=x.device)
        guidance = options.guidance
        if tokens:
            block, width, warps = tile_of(tokens, experts)
            with plain(x):
                # Not detached: that would be a new tensor each time, of which nothing is kept.
                parts = [split_rows(rows, x.dtype) if len(rows) else None for rows in (first, second)]
                products = [scores if part is None else wide_product(x, part) for part in parts]
                route_forward[(-(-tokens // block),)](
                    x,
                    *products,
                    inverse,
                    scores,
                    weights,
                    types,
                    tokens,
                    features,
                    len(first),
                    len(second),
                    guidance.num_new if guidance else 0,
                    options.top_k,
                    options.temperature,
                    guidance.tau if guidance else 0.0,
                    RESIDUE,
                    PARTS=1 if x.dtype == torch.float32 else 2,
                    GUIDE=GUIDES[guidance.mask] if guidance else 0,
                    BT=block,
                    BE=width,
                    BD=features_of(block, features),
                    num_warps=warps,
                )
        ctx.temperature = options.temperature
        ctx.save_for_backward(x, first, second, inverse, scores, weights)
        ctx.mark_non_differentiable(types)
        return scores, weights, types

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        from dymoe.adapter.ops.triton.select_kernels import route_backward

        x, first, second, inverse, scores, weights = ctx.saved_tensors
        from_scores, from_weights = (None if g is None else g.contiguous() for g in gradients[:2])
        if from_scores is None and from_weights is None:
            return None, None, None, None
        tokens, experts = scores.shape
        # float16 holds no 1 / (temperature |x|) times a scaled loss; bfloat16 does.
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        q = [x.new_empty(tokens, len(rows), dtype=dtype) for rows in (first, second)]
        along = torch.empty_like(inverse)
        needs = ctx.needs_input_grad
        with plain(x):
            if tokens:
                block, width, warps = tile_of(tokens, experts)
                route_backward[(-(-tokens // block),)](
                    scores,
                    weights,
                    inverse,
                    scores if from_weights is None else from_weights,
                    scores if from_scores is None else from_scores,
                    q[0],
                    q[1] if len(second) else q[0],  # no kernel gets a null pointer
                    along,
                    tokens,
                    len(first),
                    len(second),
                    ctx.temperature,
                    WEIGHTS=from_weights is not None,
                    SCORES=from_scores is not None,
                    BT=block,
                    BE=width,
                    num_warps=warps,
                )
            to_x = None
            if needs[0]:
                to_x = (x * along.unsqueeze(-1)).to(dtype)
                for part, rows in zip(q, (first, second), strict=True):
                    if len(rows):
                        to_x.addmm_(part, split_rows(rows, dtype)[: len(rows)])
                to_x = to_x.to(x.dtype)
            to_rows = [
                wide_product(part.t(), x.to(dtype).t()) if need else None
                for part, need in zip(q, needs[1:3], strict=True)
            ]
        return to_x, *to_rows, None


def topk_weights(scores: Tensor, top_k: int, temperature: float) -> Tensor:
    """`routing.topk_weights` in one kernel; of equal scores at the border the first are kept.

    Args:
        scores: (..., experts), computed with in float32; -inf never gets weight (a row of -inf alone gets none).
        top_k: experts with weight per token, >= 1.
        temperature: of the softmax, > 0.

    Returns:
        Weights, (..., experts), float32.
    """
    require(scores.device)
    return _TopK.apply(scores.float().reshape(-1, scores.shape[-1]), top_k, temperature).view(scores.shape)


class _TopK(torch.autograd.Function):
    """ds_e = w_e (gw_e - sum_j w_j gw_j) / temperature."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, top_k: int, temperature: float) -> Tensor:
        from dymoe.adapter.ops.triton.select_kernels import topk_forward

        scores = scores.contiguous()
        weights = torch.empty_like(scores)
        tokens, experts = scores.shape
        if scores.numel():
            block, width, warps = tile_of(tokens, experts)
            with plain(scores):
                topk_forward[(-(-tokens // block),)](
                    scores, weights, tokens, experts, top_k, temperature, BT=block, BE=width, num_warps=warps
                )
        ctx.temperature = temperature
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        from dymoe.adapter.ops.triton.select_kernels import topk_backward

        (weights,) = ctx.saved_tensors
        result = torch.empty_like(weights)
        tokens, experts = weights.shape
        if weights.numel():
            block, width, warps = tile_of(tokens, experts)
            with plain(weights):
                topk_backward[(-(-tokens // block),)](
                    weights,
                    gradients[0].contiguous(),
                    result,
                    tokens,
                    experts,
                    ctx.temperature,
                    BT=block,
                    BE=width,
                    num_warps=warps,
                )
        return result, None, None


def group_mass(scores: Tensor, num_new: int, top_k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """`routing.group_mass` in one kernel that writes three numbers a token and no weights.

    Args:
        scores: unguided scores, (..., experts), computed with in float32.
        num_new: size of the new group (the last columns).
        top_k: experts with weight per token.
        temperature: of the regularization's softmax, > 0.

    Returns:
        (old mass, new mass, largest old weight), each (...), float32; the last has no gradient.
    """
    require(scores.device)
    shape = scores.shape[:-1]
    parts = _Mass.apply(scores.float().reshape(-1, scores.shape[-1]), num_new, top_k, temperature)
    old, new, largest = (part.view(shape) for part in parts)
    return old, new, largest


class _Mass(torch.autograd.Function):
    """Masses are sums of weights: gw_e is the gradient of the side that e is on; then as for the softmax."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, num_new: int, top_k: int, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        from dymoe.adapter.ops.triton.select_kernels import mass_forward

        scores = scores.contiguous()
        tokens, experts = scores.shape
        old, new, largest = (scores.new_empty(tokens) for _ in range(3))
        if scores.numel():
            block, width, warps = tile_of(tokens, experts)
            with plain(scores):
                mass_forward[(-(-tokens // block),)](
                    scores,
                    old,
                    new,
                    largest,
                    tokens,
                    experts,
                    num_new,
                    top_k,
                    temperature,
                    BT=block,
                    BE=width,
                    num_warps=warps,
                )
        ctx.numbers = (num_new, top_k, temperature)
        ctx.save_for_backward(scores)
        ctx.mark_non_differentiable(largest)
        return old, new, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        from dymoe.adapter.ops.triton.select_kernels import mass_backward

        (scores,) = ctx.saved_tensors
        result = torch.empty_like(scores)
        tokens, experts = scores.shape
        if scores.numel():
            block, width, warps = tile_of(tokens, experts)
            with plain(scores):
                mass_backward[(-(-tokens // block),)](
                    scores,
                    gradients[0].contiguous(),
                    gradients[1].contiguous(),
                    result,
                    tokens,
                    experts,
                    *ctx.numbers,
                    BT=block,
                    BE=width,
                    num_warps=warps,
                )
        return result, None, None, None
