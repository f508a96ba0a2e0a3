"""The next-token loss of the answers, and which logits it needs."""

import torch.nn.functional as F
from torch import Tensor


def answer_logits(labels: Tensor) -> int:
    """How many last positions predict an answer token in some row: the longest answer and the one before it.

    Args:
        labels: (batch, tokens), -100 where nothing is learned; answers end at the right edge.
    """
    learned = (labels != -100).any(0)
    first = int(learned.int().argmax()) if bool(learned.any()) else labels.shape[1] - 1
    return min(labels.shape[1] - first + 1, labels.shape[1])


def next_token_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross entropy of the answers' tokens, a sum divided by `items`.

    Args:
        logits: (batch, k, vocabulary), of the last k positions.
        labels: (batch, tokens >= k), -100 where nothing is learned.
        items: learned tokens of the whole optimizer step (all micro-batches); this batch's own when None.
    """
    targets = labels[:, labels.shape[1] - logits.shape[1] + 1 :].reshape(-1)
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    total = F.cross_entropy(flat, targets, ignore_index=-100, reduction="sum")
    return total / ((targets != -100).sum() if items is None else items)
