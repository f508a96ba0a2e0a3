"""Scoring rules, one file a rule: `scorer(name)` is the task's own rule, `lenient(name)` its tolerant twin.

The pocket stream's rules have plain names ("letter"). CoIN's eight tasks have two rules each: "coin/grounding" does
what CoIN's published code does, flaw for flaw, so that numbers can be compared with published ones;
"corrected/grounding" does what a careful benchmark would do. The task may be in any case. `runner` scores whole files.
A rule from outside (`dymoe.extensions`) is a function ``my_rule.py:rule``, its own lenient twin, or an object with
`strict`, `lenient` and `readable` as the modules here have them. What else a module may have stands at `Rule`.

Both are functions (prediction, reference) -> float in [0, 1]. A prediction may be any text: what cannot be read
is wrong. A reference that cannot be read raises `DymoeError`. An answer that the lenient rule accepts and the
strict rule does not is format drift: the model still knows, but says it in another task's form.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dymoe import extensions
from dymoe.errors import DymoeError
from dymoe.messages import brief, unknown
from dymoe.tasks.scoring import (
    coin_gqa,
    coin_grounding,
    coin_imagenet,
    coin_ocrvqa,
    coin_open_answer,
    coin_scienceqa,
    coin_textvqa,
    containment,
    exact_match,
    iou,
    letter,
    open_answer,
    pope,
    processed_match,
    sefe_scienceqa,
    soft_accuracy,
    token_f1,
)
from dymoe.tasks.scoring.policy import QUESTIONS, Policy
from dymoe.tasks.scoring.text import Scorer

_RULES: dict[str, ModuleType] = {
    "letter": letter,
    "soft_accuracy": soft_accuracy,
    "exact_match": exact_match,
    "iou": iou,
    "token_f1": token_f1,
    "containment": containment,
    "pope": pope,
    "coin/scienceqa": coin_scienceqa,
    "coin/textvqa": coin_textvqa,
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

__all__ = ["Rule", "Scorer", "lenient", "names", "rule", "scorer"]


@dataclass(frozen=True)
class Rule:
    """A rule, and what a file of answers is scored with under it; the names are those of a module's functions.

    Attributes:
        name: as it was asked for.
        strict: (prediction, reference) -> score.
        lenient: the same by the format-tolerant rule; never lower.
        readable: whether the strict rule finds an answer in a prediction at all.
        right: reference -> what the rule wants said: its answer, of a choice the letter. Raises a DymoeError where the
            reference cannot be read.
        policy: what the rule divides by (`POLICY` of the module).
        skipped: whether the rule passes over a prediction, which is then wrong.
        remarks: (references by id, their file) -> what is to be said of them.
        measures: (predictions, references) -> what there is to tell of all answers beside their mean score, by name.
    """

    name: str
    strict: Scorer
    lenient: Scorer
    readable: Callable[[str, Mapping[str, Any]], bool]
    right: Callable[[Mapping[str, Any]], str] = exact_match.read_answer
    policy: Policy = QUESTIONS
    skipped: Callable[[str], bool] = lambda prediction: False
    remarks: Callable[[Mapping[str, Mapping[str, Any]], str], list[str]] = lambda references, origin: []
    measures: Callable[[Sequence[str], Sequence[Mapping[str, Any]]], dict[str, float]] = (
        lambda predictions, references: {}
    )


def names() -> tuple[str, ...]:
    """The names of all rules."""
    return tuple(_RULES)


def rule(name: str) -> Rule:
    """The rule of this name.

    Raises:
        DymoeError: no such rule; the message names the nearest one.
    """
    entry = _RULES.get(name) or _RULES.get(str(name).lower()) or extensions.find(str(name), "dymoe.scorers")
    if entry is None:
        raise DymoeError(unknown("scoring rule", name, (*_RULES, *extensions.names("dymoe.scorers"))))
    functions = {part: getattr(entry, part) for part in ("strict", "lenient", "readable") if hasattr(entry, part)}
    if len(functions) == 3:
        more = {"right": "right", "policy": "POLICY"} | {name: name for name in ("skipped", "remarks", "measures")}
        functions |= {field: getattr(entry, part) for field, part in more.items() if hasattr(entry, part)}
        return Rule(name, **functions)
    if not callable(entry):
        raise DymoeError(f"{name}: a scoring rule must be a function or have strict, lenient and readable")
    checked = _within(name, entry)
    return Rule(name, checked, checked, exact_match.readable)


def scorer(name: str) -> Scorer:
    """The strict rule of this name; raises as `rule`."""
    return rule(name).strict


def lenient(name: str) -> Scorer:
    """The format-tolerant rule of this name, which never scores lower than the strict one; raises as `rule`."""
    return rule(name).lenient


def _within(name: str, rule: Callable[..., Any]) -> Scorer:
    """A user's function whose scores are looked at: an accuracy is a mean of numbers from 0 to 1."""

    def score(prediction: str, reference: Mapping[str, Any]) -> float:
        value = rule(prediction, reference)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise DymoeError(f"{name}: must give a number from 0 to 1, not {brief(value)}")
        return float(value)

    return score
