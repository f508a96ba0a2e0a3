"""The bank on a GPU, in the form that costs a block least.

With H = drop(x) A^T and the gate W spread over the rows of each expert, y = sum over blocks of (scale W * H) B. Given
gy, the gradient of y:

    gG = gy B^T        gH = scale W * gG      gW_e = scale * sum over the rows n of e of gG_n H_n
    gA = gH^T drop(x)  gB = (scale W * H)^T gy               gx = sum over blocks of drop(gH A)

Frozen experts get no gA, gB; x is kept only where gA is asked for, H only where gW or gB is. Dropout is a function of a
seed, drawn from torch's generator: its mask is computed again, not kept.

Three forms of a block, all equal:

- dense: two products of the vendor's library with a gate kernel between them. Cost grows with the experts.
- chunked: experts in chunks of about 64 rows; a tile of tokens multiplies by the chunks that one of its tokens has
  weight in. Never more operations than dense, 1/64 of them where tiles use one group of 64. Sums are over chunks in
  their order: no atomics, the same result each time.
- gathered: for a few tokens (decoding) the rows of the chosen experts alone are read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dymoe.adapter.ops.block import ExpertBlock
from dymoe.adapter.ops.triton.forms import (
    CHUNK_ROWS,
    CHUNKS_TO_SKIP,
    USUAL_TOP_K,
    Chunks,
    Part,
    can_chunk,
    drop,
    dropped,
    find_chunks,
    gate,
    gate_back,
    gathered,
    sampled,
    summed,
)
from dymoe.adapter.ops.triton.launch import DTYPES, plain, require
from dymoe.errors import DymoeError


def triton(
    x: Tensor, weights: Tensor, blocks: Sequence[ExpertBlock], top_k: int | None = None, form: str | None = None
) -> Tensor:
    """Sum over experts of w_e * scale * B_e A_e x, by Triton kernels.

    Args:
        x: (..., in_features), float32, bfloat16 or float16; blocks of the same dtype.
        weights: (..., experts), or (experts,) when all tokens share them; columns in the order of the blocks.
        blocks: at least one.
        top_k: the gate's promise that no token has more than this many weights above 0 and that it asks for no
            gradient of the others (they get 0 or their gradient, whichever is cheaper). None promises nothing: all
            weights get their gradient.
        form: of all blocks that do not learn, "dense", "chunked" or "gathered" (without gradients only), whatever
            `part_of` would choose; to compare them.

    Returns:
        (..., out_features), dtype of the blocks.

    Raises:
        DymoeError: no GPU or no Triton, or a dtype or rank that the kernels do not take.
    """
    require(x.device)
    if x.dtype not in DTYPES or any(block.a.dtype != x.dtype for block in blocks):
        found = sorted({str(t.dtype) for t in (x, *(block.a for block in blocks))})
        raise DymoeError(f'compute="triton": inputs and experts are {", ".join(found)}, not one of 16 or 32 bits')
    *tokens, features = x.shape
    flat = x.reshape(math.prod(tokens), features).contiguous()
    experts = weights.shape[-1]
    # Weights that all tokens share stay one row in memory.
    wide = weights.expand(len(flat), experts) if weights.dim() == 1 else weights.expand(*tokens, experts)
    gates = wide.reshape(len(flat), experts)
    tensors = [matrix.contiguous() for block in blocks for matrix in (block.a, block.b)]
    graded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (flat, gates, *tensors))
    parts, offset = [], 0
    for block in blocks:
        part = part_of(block, len(flat), offset, graded, top_k)
        if form is not None and not block.a.requires_grad:
            part = replace(part, form=form)
        if (part.form == "chunked" and not can_chunk(block.r)) or (part.form == "gathered" and graded):
            raise DymoeError(f"no {part.form} form of experts of rank {block.r} with gradients {graded}")
        parts.append(part)
        offset += block.experts
    return _Bank.apply(flat, gates, tuple(parts), *tensors).view(*tokens, blocks[0].b.shape[1])


def part_of(block: ExpertBlock, tokens: int, offset: int, graded: bool, top_k: int | None) -> Part:
    """Choose a block's form.

    Args:
        block: the experts.
        tokens: tokens of the input.
        offset: the block's first column of the weights.
        graded: whether a gradient is asked for.
        top_k: as for `triton`.
    """
    seed = int(torch.randint(2**31 - 1, ())) if block.dropout else 0
    trained = graded and (block.a.requires_grad or block.b.requires_grad)
    chunks = block.experts * block.r / CHUNK_ROWS
    form = "dense"
    if not trained and not block.dropout:
        if not graded and tokens * (top_k or USUAL_TOP_K) <= block.experts:
            form = "gathered"
        elif (not graded or top_k) and chunks >= CHUNKS_TO_SKIP and can_chunk(block.r):
            form = "chunked"
    return Part(form, block.r, block.experts, offset, block.scale, block.dropout, seed)


class _Bank(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, parts: tuple[Part, ...], *matrices: Tensor) -> Tensor:
        output = x.new_empty(len(x), matrices[1].shape[1])
        kept: list[Tensor | None] = []
        used: list[Tensor | None] = []
        with plain(x):
            for i, (part, a, b) in enumerate(zip(parts, matrices[::2], matrices[1::2], strict=True)):
                hidden, chunks = _forward(part, x, weights, a, b, output, add=i > 0)
                kept.append(hidden if ctx.needs_input_grad[1] or ctx.needs_input_grad[2 * i + 4] else None)
                used.extend(chunks)
        ctx.parts = parts
        trained = any(ctx.needs_input_grad[3::2])
        ctx.shape = x.shape
        ctx.save_for_backward(x if trained else None, weights, *matrices, *kept, *used)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *rest = ctx.saved_tensors
        number = len(ctx.parts)
        matrices, kept, used = rest[: 2 * number], rest[2 * number : 3 * number], rest[3 * number :]
        gradient = gradients[0].contiguous()
        needs = ctx.needs_input_grad
        to_x = gradient.new_empty(ctx.shape) if needs[0] else None
        sparse = any(part.form == "chunked" for part in ctx.parts)
        make = torch.zeros if sparse else torch.empty
        to_weights = make(weights.shape, dtype=torch.float32, device=weights.device)
        to_matrices: list[Tensor | None] = []
        with plain(gradient):
            for i, part in enumerate(ctx.parts):
                a, b = matrices[2 * i : 2 * i + 2]
                back = _Back(part, x, weights, a, b, kept[i], tuple(used[2 * i : 2 * i + 2]))
                to_hidden, gated = back.gate(gradient, to_weights, with_gated=needs[2 * i + 4])
                to_matrices.append(to_hidden.t() @ back.inputs() if needs[2 * i + 3] else None)
                to_matrices.append(gated.t() @ gradient if gated is not None else None)
                if to_x is not None:
                    back.add_to_x(to_hidden, to_x, add=i > 0)
        return to_x, to_weights.to(weights.dtype) if needs[1] else None, None, *to_matrices


def _forward(
    part: Part, x: Tensor, weights: Tensor, a: Tensor, b: Tensor, output: Tensor, add: bool
) -> tuple[Tensor | None, Chunks]:
    """Write or add the block's output; return its hidden values and used chunks as far as the form has them."""
    if part.form == "gathered":
        gathered(part, x, weights, a, b, output, add)
        return None, (None, None)
    if part.form == "chunked":
        chunks = find_chunks(part, weights)
        hidden = x.new_empty(len(x), len(a))
        sampled(part, x, a, weights, chunks, hidden)
        summed(part, hidden, b, weights, chunks, output, gate=True, add=add)
        return hidden, chunks
    hidden = dropped(x, part) @ a.t()
    _add_product(output, gate(part, hidden, weights), b, add)
    return hidden, (None, None)


@dataclass(frozen=True)
class _Back:
    """The backward pass of one block."""

    part: Part
    x: Tensor | None
    weights: Tensor
    a: Tensor
    b: Tensor
    hidden: Tensor | None
    chunks: Chunks

    def inputs(self) -> Tensor:
        """drop(x)."""
        assert self.x is not None, "kept where A learns"
        return dropped(self.x, self.part)

    def gate(self, gradient: Tensor, to_weights: Tensor, with_gated: bool) -> tuple[Tensor, Tensor | None]:
        """Gradient of the hidden values and, on request, the gated ones; fills the block's columns of `to_weights`."""
        part, weights, b = self.part, self.weights, self.b
        if part.form == "chunked":
            to_hidden = gradient.new_empty(len(gradient), len(b))
            hidden = to_hidden if self.hidden is None else self.hidden  # not kept: its gradient is not asked for
            sampled(part, gradient, b, weights, self.chunks, to_hidden, hidden, to_weights)
            return to_hidden, None
        return gate_back(part, gradient @ b.t(), self.hidden, weights, to_weights, with_gated)

    def add_to_x(self, to_hidden: Tensor, to_x: Tensor, add: bool) -> None:
        """Write or add the block's share of the gradient of x."""
        if self.part.form == "chunked":
            summed(self.part, to_hidden, self.a, self.weights, self.chunks, to_x, gate=False, add=add)
        elif self.part.dropout:
            drop(to_hidden @ self.a, self.part, to_x, onto=to_x if add else None)
        else:
            _add_product(to_x, to_hidden, self.a, add)


def _add_product(output: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    if add:
        output.addmm_(left, right)
    else:
        torch.mm(left, right, out=output)
