"""Gradients shaped by where earlier inputs were: eigenvectors, projections, damped inverses (`dymoe.methods.same`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def decompose(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (features,), largest first and at least 0, and eigenvectors (features, features) in columns.

    Args:
        covariance: (features, features), symmetric, float32 or float64.
    """
    import torch

    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def leading(values: Tensor, energy: float, energy_of: str, components: int | None = None) -> int:
    """How many eigenvalues, largest first, hold the share `energy` of all; 0 where all are 0.

    Args:
        values: eigenvalues, descending, at least 0.
        energy: share in (0, 1].
        energy_of: "squares" or "trace".
        components: upper bound of the result.
    """
    weights = values.double().square() if energy_of == "squares" else values.double()
    sums = weights.cumsum(0)
    total = float(sums[-1])
    # A hair less than the share, since the sum of all may fall short of the total by rounding.
    count = int((sums < energy * total * (1 - 1e-9)).sum()) + 1 if total > 0 else 0
    count = min(count, int((values > 0).sum()))
    return count if components is None else min(count, components)


def running_scale(values: Tensor, window: int) -> Tensor:
    """g_i = m_k / m_i with m the centred running mean of the eigenvalues (shorter at both ends): (kept,), in (0, 1].

    Args:
        values: kept eigenvalues, descending, above 0.
        window: odd length of the running mean.
    """
    import torch

    half = window // 2
    means = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
    return means[-1] / torch.stack(means) if means else values


def outside(gradient: Tensor, basis: Tensor, scale: Tensor | None = None) -> Tensor:
    """The gradient (rows, features) without its part in the span of `basis`, or with `scale` times that part."""
    inside = gradient @ basis
    return gradient - (inside if scale is None else inside * (1 - scale)) @ basis.mT


def damped_inverse(values: Tensor, vectors: Tensor, mu: float, rank: int | None = None) -> Tensor:
    """(C + mu I)^-1, with C's eigenvalues after the first `rank` taken as 0.

    That is V_k (S_k + mu I)^-1 V_k^T + (I - V_k V_k^T) / mu.
    """
    used = values.clone()
    if rank is not None:
        used[rank:] = 0
    return (vectors / (used + mu)) @ vectors.mT


def preconditioned(gradient: Tensor, inverse: Tensor, keep_norm: bool) -> Tensor:
    """Each expert's gradient times the inverse, (experts, rank, features), at its own norm if `keep_norm`."""
    shaped = gradient @ inverse
    if not keep_norm:
        return shaped
    before, after = (part.flatten(1).norm(dim=1) for part in (gradient, shaped))
    factor = before / after.clamp(min=1e-30)
    return shaped * factor.view(-1, 1, 1)


def frozen_experts(used: Tensor, importance: Tensor, below: float) -> Tensor:
    """Which experts of a layer are frozen: score under `below`, except the best one; (experts,), bool.

    Args:
        used: mean routing weights on the new task, (experts,).
        importance: mean of weight x squared input length on earlier tasks, (experts,).
        below: threshold.
    """

    def scaled(values: Tensor) -> Tensor:
        values = values.double()
        return (values - values.min()) / (values.max() - values.min()).clamp(min=1e-30)

    score = scaled(used) - scaled(importance)
    frozen = score < below
    frozen[int(score.argmax())] = False
    return frozen
