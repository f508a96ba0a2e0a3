"""What companions that look at a trained model share: the group that was trained and the samples to look at."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dymoe.tasks import Sample


def trained_group(model: Any) -> str:
    """Name of the group that the stage has just trained.

    Raises:
        RuntimeError: no group trains (the hook was called after freezing).
    """
    names = {holder.training_group for holder in model.base_model.holders()}
    if len(names) != 1 or None in names:
        raise RuntimeError(f"expected one training group, found {names}")
    return str(names.pop())


def some(samples: Sequence[Sample], limit: int | None, key: str) -> list[Sample]:
    """At most `limit` samples, drawn without replacement by a generator seeded with `key`, in their order."""
    if limit is None or limit >= len(samples):
        return list(samples)
    return [samples[place] for place in sorted(random.Random(key).sample(range(len(samples)), limit))]
