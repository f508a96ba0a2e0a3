"""Scoring a file of predictions, with the denominator that the rule has.

CoIN's published code divides by different things: ScienceQA by the whole test split, the others by the number of
predictions, so that a question without an answer costs nothing. The corrected rules divide by the number of
questions, and refuse answers that are there twice or belong to no question.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dymoe.errors import DymoeError
from dymoe.messages import unknown
from dymoe.tasks.scoring import COIN_TASKS, coin_ocrvqa, iou, lenient, readable, scorer
from dymoe.tasks.scoring.reading import (
    Prediction,
    References,
    Source,
    name_predictions,
    read_predictions,
    read_references,
)

RULES = ("coin", "corrected")
VARIANTS = ("coin", "sefe")
# What CoIN's ScienceQA code writes in place of an answer that is not there.
_NO_ANSWER = "FAILED"


@dataclass(frozen=True)
class _Policy:
    """What a rule divides by, and what it does with ids that are there twice or belong to no question."""

    over: Literal["questions", "predictions", "positions"]
    what: str
    twice: Literal["each", "last", "refuse"]
    strange: Literal["refuse", "ignore", "count"]


_CORRECTED = _Policy("questions", "every question; one without a prediction is wrong", "refuse", "refuse")
_COIN = _Policy(
    "predictions", "every line of the predictions file; a question without one is left out", "each", "refuse"
)
_POLICIES = {
    "coin/scienceqa": _Policy(
        "questions", "every question of the test split; one without a prediction is wrong", "last", "ignore"
    ),
    "sefe/scienceqa": _Policy(
        "predictions", "every question with a prediction, known or not; the others are left out", "last", "count"
    ),
    "coin/gqa": _Policy(
        "predictions", "every balanced question with a prediction; the others are left out", "last", "refuse"
    ),
    "coin/imagenet": _Policy(
        "positions", "every line of the predictions file, each with the answer at its position", "each", "ignore"
    ),
}


@dataclass(frozen=True)
class Counts:
    """How many predictions were what.

    `right`, `partial` (a soft score between 0 and 1) and `wrong` add up to the denominator. `unreadable` (the rule
    finds no answer in the text) are among the wrong ones unless the rule takes them all the same. `missing` questions
    have no prediction: wrong where the rule divides by questions, left out where not. `skipped`: holding
    "Unanswerable" (coin/ocrvqa, among the wrong), or not balanced (GQA, left out). `duplicates`: ids that come more
    than once. `unknown`: predictions for no question.
    """

    right: int = 0
    partial: int = 0
    wrong: int = 0
    unreadable: int = 0
    missing: int = 0
    skipped: int = 0
    duplicates: int = 0
    unknown: int = 0


@dataclass(frozen=True)
class Scores:
    """The outcome for one file; `accuracy` and `lenient_accuracy` in percent of `denominator`.

    `format_drift` is their difference: what is right for a tolerant reader and wrong for the rule. `ids` lists by
    name what `counts` counts (missing, skipped, duplicates, unknown, unreadable).
    """

    task: str
    rule: str
    accuracy: float
    lenient_accuracy: float
    format_drift: float
    denominator: int
    denominator_is: str
    counts: Counts
    ids: Mapping[str, tuple[str, ...]]
    remarks: tuple[str, ...]
    predictions: Source
    references: tuple[Source, ...]

    def as_dict(self) -> dict[str, Any]:
        """The scores as plain JSON values, with the version of dymoe that computed them."""
        from dymoe import __version__

        values = asdict(self)
        files = {"predictions": values.pop("predictions"), "references": values["references"][0]}
        files["annotations"] = values.pop("references")[1:]
        return {**values, "files": files, "dymoe": __version__}


def rule_name(rule: str, task: str, variant: str = "coin") -> tuple[str, str]:
    """The name of a scoring rule and CoIN's spelling of the task, from what a user types.

    Args:
        rule: "coin" or "corrected".
        task: one of CoIN's eight tasks, in any case.
        variant: with "coin": whose code, CoIN's or that of "sefe"; they differ on ScienceQA alone.

    Raises:
        DymoeError: an unknown rule, task or variant (the nearest is named), or a variant of the corrected rule.
    """
    for kind, value, known in (("rule", rule, RULES), ("variant", variant, VARIANTS)):
        if value not in known:
            raise DymoeError(unknown(kind, value, known))
    spelled = {name.lower(): name for name in COIN_TASKS}.get(task.lower())
    if spelled is None:
        raise DymoeError(unknown("task", task, COIN_TASKS))
    if rule == "corrected" and variant != "coin":
        raise DymoeError(f"variant {variant!r}: the corrected rule has no variants; it goes with rule 'coin'")
    owner = "sefe" if variant == "sefe" and spelled == "ScienceQA" else rule
    return f"{owner}/{spelled.lower()}", spelled


def score_files(
    predictions: str | Path,
    references: str | Path,
    task: str,
    rule: str = "corrected",
    annotations: str | Path | None = None,
    variant: str = "coin",
) -> Scores:
    """Score a predictions file in CoIN's format.

    Args:
        predictions: JSON lines or list with `question_id` and `text`.
        references: test records (CoIN's test.json or val.json, or one's own).
        task, rule, variant: see `rule_name`.
        annotations: folder with the annotation files, see `reading.read_references`. TextVQA cannot be scored without
            (unless the records hold `answers`); ScienceQA and GQA can, with the references' own answers.

    Raises:
        DymoeError: a file, line or record that cannot be used, or ids that the rule refuses.
    """
    name, spelled = rule_name(rule, task, variant)
    right = read_references(references, spelled, annotations)
    said, source = read_predictions(predictions)
    if not said:
        raise DymoeError(f"{predictions}: no predictions; expected one JSON object a line")
    said = name_predictions(said, right, str(predictions))
    if (
        spelled == "TextVQA"
        and annotations is None
        and not all(record.get("answers") is not None for record in right.records.values())
    ):
        raise DymoeError(
            f"{references}: TextVQA's records hold no 'answers'; give the folder with TextVQA_0.5.1_val.json as "
            "annotations"
        )
    return _score(name, spelled, said, source, right)


def _score(name: str, task: str, said: Sequence[Prediction], source: Source, right: References) -> Scores:
    policy = _POLICIES.get(name, _CORRECTED if name.startswith("corrected/") else _COIN)
    ids: dict[str, list[str]] = {"missing": [], "skipped": [], "duplicates": [], "unknown": [], "unreadable": []}
    remarks = list(right.remarks)
    ids["duplicates"] = [identity for identity, count in Counter(each.id for each in said).items() if count > 1]
    if ids["duplicates"] and policy.twice == "refuse":
        first = ids["duplicates"][0]
        lines = ", ".join(str(each.line) for each in said if each.id == first)
        raise DymoeError(
            f"{source.path}: question_id {first!r} is there twice (lines {lines}; {len(ids['duplicates'])} ids are); "
            "keep one answer a question"
        )
    asked = (
        _by_position(said, source, right, ids, remarks)
        if policy.over == "positions"
        else _by_id(policy, said, source, right, ids)
    )
    kept = []
    for identity, text, reference in asked:
        if reference.get("isBalanced") is not False:
            kept.append((identity, text, reference))
        else:
            ids["skipped"].append(identity)
    if task == "GQA" and any("isBalanced" not in reference for reference in right.records.values()):
        remarks.append("no annotation file: every question counts as balanced")
    rules = scorer(name), lenient(name), readable(name)
    strict_scores, lenient_scores = [], []
    for identity, text, reference in kept:
        strict, tolerant, reads = _one(rules, identity, text, reference, right)
        strict_scores.append(strict)
        lenient_scores.append(tolerant)
        if text is not None and not reads:
            ids["unreadable"].append(identity)
        if name == "coin/ocrvqa" and text is not None and coin_ocrvqa.skipped(text):
            ids["skipped"].append(identity)
    if task == "Grounding":
        remarks += _empty_boxes(right)
    denominator = len(kept) + (len(ids["unknown"]) if policy.strange == "count" else 0)
    if not denominator:
        raise DymoeError(f"{source.path}: no prediction counts under {name} ({policy.what})")
    strict_sum, lenient_sum = math.fsum(strict_scores), math.fsum(lenient_scores)
    whole, none = sum(score == 1 for score in strict_scores), sum(score == 0 for score in strict_scores)
    counts = Counts(
        right=whole,
        partial=len(kept) - whole - none,
        wrong=none + denominator - len(kept),
        **{key: len(value) for key, value in ids.items()},
    )
    return Scores(
        task=task,
        rule=name,
        accuracy=100 * strict_sum / denominator,
        lenient_accuracy=100 * lenient_sum / denominator,
        format_drift=100 * (lenient_sum - strict_sum) / denominator,
        denominator=denominator,
        denominator_is=policy.what,
        counts=counts,
        ids={key: tuple(value) for key, value in ids.items()},
        remarks=tuple(remarks),
        predictions=source,
        references=right.sources,
    )


_Asked = list[tuple[str, str | None, Mapping[str, Any]]]


def _by_id(
    policy: _Policy, said: Sequence[Prediction], source: Source, right: References, ids: dict[str, list[str]]
) -> _Asked:
    """What is scored when answers belong to questions by id; fills in what is unknown and missing."""
    if policy.twice == "last":
        said = list({each.id: each for each in said}.values())
    strange = [each for each in said if each.id not in right.records]
    if strange and policy.strange == "refuse":
        raise DymoeError(
            f"{source.path}: line {strange[0].line}: question_id {strange[0].id!r} is not in {right.origin} "
            f"({len(strange)} such lines); do the two files belong together?"
        )
    ids["unknown"] = [each.id for each in strange]
    texts = {each.id: each.text for each in said}
    ids["missing"] = [
        key for key, record in right.records.items() if key not in texts and record.get("isBalanced") is not False
    ]
    if policy.over == "questions":
        return [(key, texts.get(key), record) for key, record in right.records.items()]
    return [(each.id, each.text, right.records[each.id]) for each in said if each.id in right.records]


def _by_position(
    said: Sequence[Prediction], source: Source, right: References, ids: dict[str, list[str]], remarks: list[str]
) -> _Asked:
    """What is scored when line n belongs to record n, whatever their ids say."""
    records = list(right.records.items())
    if len(said) > len(records):
        raise DymoeError(
            f"{source.path}: {len(said)} lines, but {right.origin} has only {len(records)} records; CoIN's rule "
            "takes them by position"
        )
    ids["missing"] = [identity for identity, _ in records[len(said) :]]
    ids["unknown"] = [each.id for each in said if each.id not in right.records]
    moved = [each for each, (identity, _) in zip(said, records, strict=False) if each.id != identity]
    if moved:
        remarks.append(
            f"{len(moved)} lines stand where another question's answer is (first: line {moved[0].line}); CoIN's rule "
            "takes them by position all the same"
        )
    return [(each.id, each.text, record) for each, (_, record) in zip(said, records, strict=False)]


_Score = Callable[[str, Mapping[str, Any]], float]
_Reads = Callable[[str, Mapping[str, Any]], bool]


def _one(
    rules: tuple[_Score, _Score, _Reads],
    identity: str,
    text: str | None,
    reference: Mapping[str, Any],
    right: References,
) -> tuple[float, float, bool]:
    """Strict score, lenient score and whether the text is readable; a missing text is wrong, its record still read."""
    strict, tolerant, reads = rules
    try:
        if text is None:
            strict(_NO_ANSWER, reference)
            return 0.0, 0.0, False
        return strict(text, reference), tolerant(text, reference), reads(text, reference)
    except DymoeError as error:
        raise DymoeError(f"{right.origin}: record {identity!r}: {error}") from error


def _empty_boxes(right: References) -> list[str]:
    """A remark on boxes that rounding left without area; no answer can overlap them."""
    empty = []
    for identity, record in right.records.items():
        try:
            x0, y0, x1, y1 = iou.read_published(record)
        except DymoeError as error:
            raise DymoeError(f"{right.origin}: record {identity!r}: {error}") from error
        if x0 >= x1 or y0 >= y1:
            empty.append(identity)
    if not empty:
        return []
    return [f"{len(empty)} boxes of {right.origin} have no area, so no answer is right (first: {empty[0]!r})"]
