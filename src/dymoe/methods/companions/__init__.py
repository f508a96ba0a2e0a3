"""Companions by name: what combines with any method (`with:` in a recipe); one file each."""

from dymoe.methods.companions.asd import AnswerStyles
from dymoe.methods.companions.base import Companion, Composed
from dymoe.methods.companions.pruning import Pruning
from dymoe.methods.companions.replay import Replay
from dymoe.methods.companions.task_router import TaskRouter

_ALL: tuple[type[Companion], ...] = (Replay, AnswerStyles, TaskRouter, Pruning)
COMPANIONS: dict[str, type[Companion]] = {companion.name: companion for companion in _ALL}

__all__ = ["COMPANIONS", "Companion", "Composed"]
