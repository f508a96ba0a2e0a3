"""Routing drift of one task at one stage, from the groups' mean weights on its tokens."""

import math
from collections.abc import Sequence

ROUNDING = 1e-3


def drift(task: str, groups: Sequence[str], weights: Sequence[float]) -> float | None:
    """Share of routing weight that a task's tokens put on groups added after its own, 0 to 1.

    Args:
        task: its group has the same name.
        groups: in the order in which they were added.
        weights: mean weight of each group on the task's tokens; they sum to 1, or less where layers have no experts.

    Returns:
        None if the task has no group of its own, or if the weights sum to more than 1: a method that adds up all groups
        at full weight divides no token among them.
    """
    if task not in groups or math.fsum(weights) > 1 + ROUNDING:
        return None
    return math.fsum(weights[groups.index(task) + 1 :])
