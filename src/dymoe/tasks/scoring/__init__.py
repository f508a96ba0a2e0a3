"""Scoring rules, one file a rule: `scorer(name)` is the task's own rule, `lenient(name)` its tolerant twin.

Both are functions (prediction, reference) -> float in [0, 1]. A prediction may be any text: what cannot be read
is wrong. A reference that cannot be read raises `DymoeError`. An answer that the lenient rule accepts and the
strict rule does not is format drift: the model still knows, but says it in another task's form.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from dymoe.errors import DymoeError
from dymoe.tasks.naming import unknown
from dymoe.tasks.scoring import exact_match, iou, letter, soft_accuracy

Scorer = Callable[[str, Mapping[str, Any]], float]

_RULES: dict[str, ModuleType] = {
    "letter": letter,
    "soft_accuracy": soft_accuracy,
    "exact_match": exact_match,
    "iou": iou,
}

__all__ = ["Scorer", "lenient", "names", "scorer"]


def names() -> tuple[str, ...]:
    """The names of all rules."""
    return tuple(_RULES)


def scorer(name: str) -> Scorer:
    """Return the strict rule of this name.

    Raises:
        DymoeError: no such rule; the message names the nearest one.
    """
    strict: Scorer = _rule(name).strict
    return strict


def lenient(name: str) -> Scorer:
    """Return the format-tolerant rule of this name; it never scores lower than the strict one.

    Raises:
        DymoeError: no such rule; the message names the nearest one.
    """
    tolerant: Scorer = _rule(name).lenient
    return tolerant


def _rule(name: str) -> ModuleType:
    if name not in _RULES:
        raise DymoeError(unknown("scoring rule", name, _RULES))
    return _RULES[name]
