"""Launches of the bank's kernels, one function per step of a form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dymoe.adapter.ops.triton.launch import interpreted, power_of_two

# Where the forms change over. Reckoned, not yet measured on a GPU: see benchmarks/gpu_bank.py, which times each form.
CHUNK_ROWS = 64
TILE_TOKENS = 64
CHUNKS_TO_SKIP = 4
USUAL_TOP_K = 16

Chunks = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Part:
    """How a block is computed: its form and what of it is no tensor.

    Args:
        form: "dense", "chunked" or "gathered".
        r: rank of each expert.
        experts: experts of the block.
        offset: the block's first column of the weights.
        scale: factor on the block's output.
        dropout: rate on the block's input.
        seed: of the dropout.
    """

    form: str
    r: int
    experts: int
    offset: int
    scale: float
    dropout: float = 0.0
    seed: int = 0


def can_chunk(r: int) -> bool:
    """Whether chunks hold whole experts of this rank."""
    return r <= CHUNK_ROWS and r & (r - 1) == 0


# ---- dense --------------------------------------------------------------------------------------------------------


def gate(part: Part, hidden: Tensor, weights: Tensor) -> Tensor:
    """scale * weight * hidden, (tokens, experts * r)."""
    from dymoe.adapter.ops.triton.bank_kernels import gate_forward

    gated = torch.empty_like(hidden)
    if gated.numel():
        grid, tile = _cells(part, len(hidden))
        gate_forward[grid](
            hidden, weights, gated, len(hidden), part.experts, *weights.stride(), part.offset, part.scale, **tile
        )
    return gated


def gate_back(
    part: Part, from_gated: Tensor, hidden: Tensor | None, weights: Tensor, to_weights: Tensor, with_gated: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the hidden values and, on request, the gated ones; fills the block's columns of `to_weights`.

    Without `hidden` what it fills them with is of no use.
    """
    from dymoe.adapter.ops.triton.bank_kernels import gate_backward

    to_hidden = torch.empty_like(from_gated)
    gated = torch.empty_like(from_gated) if with_gated else None
    if from_gated.numel():
        grid, tile = _cells(part, len(from_gated))
        gate_backward[grid](
            from_gated,
            from_gated if hidden is None else hidden,
            weights,
            to_hidden,
            to_weights,
            to_hidden if gated is None else gated,
            len(from_gated),
            part.experts,
            *weights.stride(),
            to_weights.shape[1],
            part.offset,
            part.scale,
            GATED=with_gated,
            **tile,
        )
    return to_hidden, gated


def _cells(part: Part, tokens: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile of the gate kernels: about 2048 hidden values a program."""
    ranks = power_of_two(part.r)
    columns = min(power_of_two(part.experts), max(1, 256 // ranks))
    rows = max(1, 2048 // (ranks * columns))
    tile = {"R": part.r, "BR": ranks, "BT": rows, "BC": columns}
    return (-(-tokens // rows), -(-part.experts // columns)), tile


def dropped(values: Tensor, part: Part) -> Tensor:
    """`drop`, or the values themselves where the block has no dropout."""
    return drop(values, part, torch.empty_like(values)) if part.dropout else values


def drop(values: Tensor, part: Part, out: Tensor, onto: Tensor | None = None) -> Tensor:
    """Drop the same places for the same seed; add `onto` if given."""
    from dymoe.adapter.ops.triton.bank_kernels import dropout

    if values.numel():
        dropout[(-(-values.numel() // 2048),)](
            values,
            values if onto is None else onto,
            out,
            values.numel(),
            part.seed,
            part.dropout,
            ADD=onto is not None,
            QUARTER=512,
        )
    return out


# ---- chunked ------------------------------------------------------------------------------------------------------


def find_chunks(part: Part, weights: Tensor) -> tuple[Tensor, Tensor]:
    """For each tile of tokens the chunks that it uses, (tiles, chunks), and their number, (tiles,), both int32."""
    from dymoe.adapter.ops.triton.bank_kernels import used_chunks

    per = CHUNK_ROWS // part.r
    chunks = -(-part.experts // per)
    tiles = -(-len(weights) // TILE_TOKENS)
    used = torch.empty(tiles, chunks, dtype=torch.int32, device=weights.device)
    counts = torch.empty(tiles, dtype=torch.int32, device=weights.device)
    if tiles:
        width = power_of_two(chunks)
        step = max(1, min(TILE_TOKENS, 4096 // (width * per)))
        used_chunks[(tiles,)](
            weights,
            used,
            counts,
            len(weights),
            part.experts,
            *weights.stride(),
            part.offset,
            chunks,
            BM=TILE_TOKENS,
            STEP=step,
            PER=per,
            CHUNKS=width,
            num_warps=8,
        )
    return used, counts


def sampled(
    part: Part,
    x: Tensor,
    rows: Tensor,
    weights: Tensor,
    chunks: Chunks,
    out: Tensor,
    hidden: Tensor | None = None,
    to_weights: Tensor | None = None,
) -> None:
    """Write x @ rows^T into `out` where tiles use chunks.

    With `hidden`, x is the gradient of the output and rows are B: writes the gradients of hidden (into `out`) and of
    the weights instead.
    """
    from dymoe.adapter.ops.triton.bank_kernels import sampled_product

    used, counts = chunks
    assert used is not None, "a chunked block has its chunks"
    if not used.numel():
        return
    sampled_product[(used.shape[1], used.shape[0])](
        x,
        rows,
        out if hidden is None else hidden,
        weights,
        out,
        weights if to_weights is None else to_weights,
        used,
        counts,
        len(x),
        x.shape[1],
        len(rows),
        *weights.stride(),
        weights.shape[1],
        part.offset,
        used.shape[1],
        part.scale,
        GATE=hidden is not None,
        R=part.r,
        BM=TILE_TOKENS,
        BN=CHUNK_ROWS,
        BK=32 if x.dtype == torch.float32 else 64,
        WIDE=interpreted(),
        num_warps=4,
        num_stages=3,
    )


def summed(
    part: Part,
    hidden: Tensor,
    rows: Tensor,
    weights: Tensor,
    chunks: Chunks,
    out: Tensor,
    gate: bool,
    add: bool,
) -> None:
    """Write or add hidden @ rows over the chunks that tiles use; with `gate`, hidden is gated first."""
    from dymoe.adapter.ops.triton.bank_kernels import summed_product

    used, counts = chunks
    assert used is not None, "a chunked block has its chunks"
    if not used.numel():
        return
    features = rows.shape[1]
    wide = rows.dtype == torch.float32  # three products at once: smaller tiles fit the registers
    columns = min(32 if wide else 128, power_of_two(features, 16))
    summed_product[(-(-features // columns), used.shape[0])](
        hidden,
        rows,
        weights,
        out,
        used,
        counts,
        len(hidden),
        features,
        len(rows),
        *weights.stride(),
        part.offset,
        used.shape[1],
        part.scale,
        GATE=gate,
        ADD=add,
        R=part.r,
        BM=TILE_TOKENS,
        BN=columns,
        BK=CHUNK_ROWS,
        WIDE=interpreted(),
        num_warps=8 if wide else 4,
        num_stages=2 if wide else 3,
    )


# ---- gathered -----------------------------------------------------------------------------------------------------


def gathered(part: Part, x: Tensor, weights: Tensor, a: Tensor, b: Tensor, output: Tensor, add: bool = False) -> None:
    """Write or add the block's output for a few tokens, reading the chosen experts' rows of A and B alone.

    Args:
        part: the block.
        x: (tokens, in_features).
        weights: (tokens, experts of the bank), any strides.
        a: (experts * r, in_features).
        b: (experts * r, out_features).
        output: (tokens, out_features), written in place.
        add: whether to add to what `output` holds.
    """
    from dymoe.adapter.ops.triton.bank_kernels import chosen_experts, gathered_hidden, gathered_output

    tokens, features = x.shape
    if not tokens:
        return
    experts = torch.empty(tokens, part.experts, dtype=torch.int32, device=x.device)
    counts = torch.empty(tokens, dtype=torch.int32, device=x.device)
    strides = weights.stride()
    chosen_experts[(tokens,)](
        weights, experts, counts, part.experts, *strides, part.offset, BE=power_of_two(part.experts)
    )
    gated = torch.empty(tokens, len(a), dtype=torch.float32, device=x.device)
    ranks = power_of_two(part.r)
    gathered_hidden[(min(part.experts, 2 * USUAL_TOP_K), tokens)](
        x,
        a,
        weights,
        gated,
        experts,
        counts,
        features,
        part.experts,
        *strides,
        part.offset,
        part.scale,
        R=part.r,
        BR=ranks,
        BD=min(power_of_two(features), max(16, 4096 // ranks)),
    )
    columns = min(64, power_of_two(b.shape[1]))
    gathered_output[(-(-b.shape[1] // columns), tokens)](
        gated, b, output, experts, counts, b.shape[1], part.experts, ADD=add, R=part.r, BK=64, BN=columns
    )
