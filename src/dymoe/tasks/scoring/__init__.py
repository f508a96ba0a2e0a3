"""Scoring rules, one file a rule: `scorer(name)` is the task's own rule, `lenient(name)` its tolerant twin.

The pocket stream's rules have plain names ("letter"). CoIN's eight tasks have two rules each: "coin/grounding" does
what CoIN's published code does, flaw for flaw, so that numbers can be compared with published ones;
"corrected/grounding" does what a careful benchmark would do. The task may be in any case. `runner` scores whole files.
A rule from outside (`dymoe.plugins`) is a function ``my_rule.py:rule``, its own lenient twin, or an object with
`strict`, `lenient` and `readable` as the modules here have them.

Both are functions (prediction, reference) -> float in [0, 1]. A prediction may be any text: what cannot be read
is wrong. A reference that cannot be read raises `DymoeError`. An answer that the lenient rule accepts and the
strict rule does not is format drift: the model still knows, but says it in another task's form.
"""

from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

from dymoe import plugins
from dymoe.errors import DymoeError
from dymoe.messages import brief, unknown
from dymoe.tasks.scoring import (
    coin_gqa,
    coin_grounding,
    coin_imagenet,
    coin_ocrvqa,
    coin_open_answer,
    coin_scienceqa,
    exact_match,
    iou,
    letter,
    open_answer,
    processed_match,
    sefe_scienceqa,
    soft_accuracy,
)
from dymoe.tasks.scoring.text import Scorer

_RULES: dict[str, ModuleType] = {
    "letter": letter,
    "soft_accuracy": soft_accuracy,
    "exact_match": exact_match,
    "iou": iou,
    "coin/scienceqa": coin_scienceqa,
    "coin/textvqa": soft_accuracy,
    "coin/imagenet": coin_imagenet,
    "coin/gqa": coin_gqa,
    "coin/vizwiz": coin_open_answer,
    "coin/grounding": coin_grounding,
    "coin/vqav2": coin_open_answer,
    "coin/ocrvqa": coin_ocrvqa,
    "corrected/scienceqa": letter,
    "corrected/textvqa": soft_accuracy,
    "corrected/imagenet": processed_match,
    "corrected/gqa": exact_match,
    "corrected/vizwiz": open_answer,
    "corrected/grounding": iou,
    "corrected/vqav2": open_answer,
    "corrected/ocrvqa": exact_match,
    "sefe/scienceqa": sefe_scienceqa,
}

COIN_TASKS = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA")

__all__ = ["COIN_TASKS", "Scorer", "lenient", "names", "readable", "right_answer", "scorer"]


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


def readable(name: str) -> Callable[[str, Mapping[str, Any]], bool]:
    """Return the test whether the strict rule of this name finds an answer in a prediction at all.

    Raises:
        DymoeError: no such rule; the message names the nearest one.
    """
    reads: Callable[[str, Mapping[str, Any]], bool] = _rule(name).readable
    return reads


def right_answer(name: str) -> Callable[[Mapping[str, Any]], str]:
    """Return what the rule of this name wants said: its reference's answer, of a choice the letter.

    The function raises a `DymoeError` where the reference cannot be read.

    Raises:
        DymoeError: no such rule; the message names the nearest one.
    """
    right: Callable[[Mapping[str, Any]], str] = getattr(_rule(name), "right", exact_match.read_answer)
    return right


def _rule(name: str) -> Any:
    rule = _RULES.get(name) or _RULES.get(str(name).lower()) or plugins.find(str(name), "dymoe.scorers")
    if rule is None:
        raise DymoeError(unknown("scoring rule", name, (*_RULES, *plugins.names("dymoe.scorers"))))
    if all(hasattr(rule, part) for part in ("strict", "lenient", "readable")):
        return rule
    if not callable(rule):
        raise DymoeError(f"{name}: a scoring rule must be a function or have strict, lenient and readable")
    checked = _within(name, rule)
    return SimpleNamespace(strict=checked, lenient=checked, readable=exact_match.readable)


def _within(name: str, rule: Callable[..., Any]) -> Scorer:
    """A user's function whose scores are looked at: an accuracy is a mean of numbers from 0 to 1."""

    def score(prediction: str, reference: Mapping[str, Any]) -> float:
        value = rule(prediction, reference)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise DymoeError(f"{name}: must give a number from 0 to 1, not {brief(value)}")
        return float(value)

    return score
