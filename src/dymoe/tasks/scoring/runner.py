"""Scoring a file of predictions, with the denominator that the rule has.

CoIN's published code divides by different things: ScienceQA by the whole test split, the others by the number of
predictions, so that a question without an answer costs nothing. The corrected rules divide by the number of
questions, and refuse answers that are there twice or belong to no question (`dymoe.tasks.scoring.policy`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import unknown
from dymoe.tasks import coin
from dymoe.tasks.scoring import Rule, names
from dymoe.tasks.scoring import rule as rule_of
from dymoe.tasks.scoring.annotations import counts
from dymoe.tasks.scoring.answers import Answer, percent, score_answers
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
    spelled = {name.lower(): name for name in coin.TASKS}.get(task.lower())
    if spelled is None:
        raise DymoeError(unknown("task", task, coin.TASKS))
    if rule == "corrected" and variant != "coin":
        raise DymoeError(f"variant {variant!r}: the corrected rule has no variants; it goes with rule 'coin'")
    variant_rule = f"{variant}/{spelled.lower()}"  # a variant has rules of its own for some tasks alone
    return variant_rule if rule == "coin" and variant_rule in names() else f"{rule}/{spelled.lower()}", spelled


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
    answers, source = read_predictions(predictions)
    if not answers:
        raise DymoeError(f"{predictions}: no predictions; expected one JSON object a line")
    return _score(rule_of(name), spelled, name_predictions(answers, right, str(predictions)), source, right)


@dataclass(frozen=True)
class _Match:
    """Predictions beside their questions.

    Attributes:
        answers: what is to be scored.
        missing: ids of questions without a prediction.
        unknown: ids of predictions without a question.
        remarks: what is to be said of it.
    """

    answers: list[Answer]
    missing: list[str]
    unknown: list[str]
    remarks: tuple[str, ...] = ()


def _score(rule: Rule, task: str, predictions: Sequence[Prediction], source: Source, references: References) -> Scores:
    policy = rule.policy
    duplicates = _duplicates(rule, predictions, source)
    match = (_by_position if policy.over == "positions" else _by_id)(rule, predictions, source, references)
    answers = [each for each in match.answers if counts(each.reference)]
    scores = score_answers(rule, answers, f"{references.origin}: record")
    strict, lenient = [each.strict for each in scores], [each.lenient for each in scores]
    denominator = len(answers) + (len(match.unknown) if policy.strange == "count" else 0)
    if not denominator:
        raise DymoeError(f"{source.path}: no prediction counts under {rule.name} ({policy.what})")
    texts = [(each.id, each.text, each.reference) for each in answers if each.text is not None]
    ids = {
        "missing": match.missing,
        "skipped": [each.id for each in match.answers if not counts(each.reference)]
        + [identity for identity, text, _ in texts if rule.skipped(text)],
        "duplicates": duplicates,
        "unknown": match.unknown,
        "unreadable": [identity for identity, text, right in texts if not rule.readable(text, right)],
    }
    full, none = strict.count(1), strict.count(0)
    return Scores(
        task=task,
        rule=rule.name,
        accuracy=percent(strict, denominator),
        lenient_accuracy=percent(lenient, denominator),
        format_drift=percent(lenient, denominator) - percent(strict, denominator),
        denominator=denominator,
        denominator_is=policy.what,
        counts=Counts(
            right=full,
            partial=len(answers) - full - none,
            wrong=none + denominator - len(answers),
            **{key: len(value) for key, value in ids.items()},
        ),
        ids={key: tuple(value) for key, value in ids.items()},
        remarks=(*references.remarks, *match.remarks, *rule.remarks(references.records, references.origin)),
        predictions=source,
        references=references.sources,
    )


def _duplicates(rule: Rule, predictions: Sequence[Prediction], source: Source) -> list[str]:
    """The ids that come more than once, refused where the rule does so."""
    twice = [identity for identity, count in Counter(each.id for each in predictions).items() if count > 1]
    if twice and rule.policy.twice == "refuse":
        lines = ", ".join(str(each.line) for each in predictions if each.id == twice[0])
        raise DymoeError(
            f"{source.path}: question_id {twice[0]!r} is there twice (lines {lines}; {len(twice)} ids are); "
            "keep one answer a question"
        )
    return twice


def _by_id(rule: Rule, predictions: Sequence[Prediction], source: Source, references: References) -> _Match:
    """What is scored when answers belong to questions by id."""
    records = references.records
    if rule.policy.twice == "last":
        predictions = list({each.id: each for each in predictions}.values())
    strange = [each for each in predictions if each.id not in records]
    if strange and rule.policy.strange == "refuse":
        raise DymoeError(
            f"{source.path}: line {strange[0].line}: question_id {strange[0].id!r} is not in {references.origin} "
            f"({len(strange)} such lines); do the two files belong together?"
        )
    texts = {each.id: each.text for each in predictions}
    if rule.policy.over == "questions":
        answers = [Answer(key, texts.get(key), record) for key, record in records.items()]
    else:
        answers = [Answer(each.id, each.text, records[each.id]) for each in predictions if each.id in records]
    missing = [key for key, record in records.items() if key not in texts and counts(record)]
    return _Match(answers, missing, [each.id for each in strange])


def _by_position(rule: Rule, predictions: Sequence[Prediction], source: Source, references: References) -> _Match:
    """What is scored when line n belongs to record n, whatever their ids say."""
    records = list(references.records.items())
    if len(predictions) > len(records):
        raise DymoeError(
            f"{source.path}: {len(predictions)} lines, but {references.origin} has only {len(records)} records; CoIN's "
            "rule takes them by position"
        )
    pairs = list(zip(predictions, records, strict=False))
    elsewhere = [each for each, (identity, _) in pairs if each.id != identity]
    remarks = []
    if elsewhere:
        where = f"{len(elsewhere)} lines stand where another question's answer is (first: line {elsewhere[0].line})"
        remarks.append(f"{where}; CoIN's rule takes them by position all the same")
    return _Match(
        answers=[Answer(each.id, each.text, record) for each, (_, record) in pairs],
        missing=[identity for identity, _ in records[len(predictions) :]],
        unknown=[each.id for each in predictions if each.id not in references.records],
        remarks=tuple(remarks),
    )
