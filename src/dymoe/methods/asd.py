"""`asd`: a part of each task's samples is asked and answered in the other answer styles."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from dymoe.methods.base import Stage
from dymoe.methods.plugin import Plugin
from dymoe.schema import PositiveShare

if TYPE_CHECKING:
    from dymoe.tasks import Sample, Task

YES_NO, CHOICE, SHORT, BRIEF, DETAILED = "yes/no", "multiple choice", "short", "brief", "detailed"
LETTERS = "ABCD"
EXPLAINED = ("Grounding", "ImageNet")  # tasks that the source rewrites into explanations alone

INSTRUCTIONS = {
    YES_NO: "Reply with yes or no and nothing else",
    CHOICE: "Reply with the letter of the option that fits and nothing else",
    SHORT: "Reply with the bare answer, a word or a few, and no sentence",
    BRIEF: "Reply with one sentence that holds the answer",
    DETAILED: "Reply with a few sentences that lead to the answer and state it last",
}
BOX_INSTRUCTIONS = {
    BRIEF: "Say in one sentence which box [x0,y0,x1,y1] holds what is named here",
    DETAILED: "Explain in a few sentences how to find the box [x0,y0,x1,y1] of what is named here and give it last",
}
GROUNDS = ("From what the picture shows", "Judging by what can be seen here", "As a look at the picture tells")
READ = ("From what the question says", "Judging by the question alone", "As the question itself tells")
UNSEEN = ("Since the picture does not show enough", "With so little to be seen here", "As nobody could tell from it")


@dataclass
class AnswerStyles(Plugin):
    """Answer style diversification of SEFE (arXiv 2505.02486): the model keeps answering in other forms than the newest
    task's.

    `share` of a task's samples, split evenly over the styles that are not its own: yes/no, multiple choice, short
    answer, brief explanation, detailed explanation. Short-answer tasks take all but short; a multiple-choice task takes
    short (the right choice's text; not in the source), brief and detailed; Grounding and ImageNet take brief and
    detailed as in the source. Every style has its own instruction in place of the sample's.

    The source lets a language model write the new forms. Here they come from sentence patterns filled with question and
    answer, and wrong options are drawn from the task's other answers to like questions (at most three for multiple
    choice, one for yes/no): the styles are kept apart as the source does, the explanations hold no new knowledge.

    Attributes:
        share: share of each task's samples to rewrite (20 %, the source's best of 10, 20, 40, 60 and 80).
        seed: of the choice of samples and wrong options; it does not depend on the run's seed.
    """

    name: ClassVar[str] = "asd"
    summary: ClassVar[str] = "answer style diversification: some samples rewritten into other answer styles"

    share: PositiveShare = 0.2
    seed: int = 0

    def training_samples(self, samples: Sequence[Sample], stage: Stage) -> Sequence[Sample]:
        """The samples with a part of each of the stage's tasks rewritten, all in their places.

        Samples that are not of the stage's tasks (replayed ones) are left alone.
        """
        result = list(samples)
        for task in stage.tasks:
            task_samples = {(sample.id, sample.question) for sample in task.train}
            indices = [index for index, sample in enumerate(samples) if (sample.id, sample.question) in task_samples]
            rng = random.Random(f"asd/{self.seed}/{task.name}")
            drawn = rng.sample(indices, round(self.share * len(indices)))
            if not drawn:
                continue
            writer = _Writer(task, rng)
            for number, index in enumerate(drawn):
                style = writer.styles[number * len(writer.styles) // len(drawn)]
                result[index] = writer.rewrite(samples[index], style)
        return result


class _Writer:
    """Rewrites one task's samples.

    Args:
        task: gives the wrong options.
        rng: draws them.
    """

    def __init__(self, task: Task, rng: random.Random) -> None:
        self.task = task
        self.rng = rng
        self.yes_no_questions = 0
        self.styles = self._styles(task.train[0])
        self._answers: dict[tuple[str, ...], dict[str, str]] | None = None

    def _styles(self, sample: Sample) -> tuple[str, ...]:
        """The styles that are not the sample's own."""
        if "choices" in sample.reference:
            return (SHORT, BRIEF, DETAILED)
        if "bbox" in sample.reference or self.task.name in EXPLAINED:
            return (BRIEF, DETAILED)
        return (YES_NO, CHOICE, BRIEF, DETAILED)

    def rewrite(self, sample: Sample, style: str) -> Sample:
        """The sample in another style; brief where that does not fit it, or where the task has no wrong option."""
        from dymoe.tasks.instructions import strip

        style = style if style in self._styles(sample) else BRIEF
        question = strip(sample.question)
        if "bbox" in sample.reference:
            return replace(sample, question=f"{BOX_INSTRUCTIONS[style]}: {question}", answer=_box(sample, style))
        changed: tuple[str, str, Any] | None = None
        if style == SHORT:
            text = _plain(sample)
            changed = question, text, {"answer": text}
        elif style == CHOICE:
            changed = self._choice(sample, question)
        elif style == YES_NO:
            changed = self._yes_no(sample, question)
        if changed is None:
            style = style if style == DETAILED else BRIEF
            changed = question, self._explanation(sample, question, style), sample.reference
        question, answer, reference = changed
        return replace(sample, question=f"{question}\n{INSTRUCTIONS[style]}", answer=answer, reference=reference)

    def _choice(self, sample: Sample, question: str) -> tuple[str, str, Any] | None:
        wrong = self._wrong(sample, question)
        if not wrong:
            return None
        options = [sample.answer, *self.rng.sample(wrong, min(3, len(wrong)))]
        self.rng.shuffle(options)
        letter = LETTERS[options.index(sample.answer)]
        lines = [f"{name}. {text}" for name, text in zip(LETTERS, options, strict=False)]
        return "\n".join([question, *lines]), letter, {"answer": letter, "choices": options}

    def _yes_no(self, sample: Sample, question: str) -> tuple[str, str, Any] | None:
        if _kind(sample.answer) == YES_NO:
            return question, sample.answer, sample.reference
        wrong = self._wrong(sample, question)
        if not wrong:
            return None
        self.yes_no_questions += 1
        answer = "yes" if self.yes_no_questions % 2 else "no"
        claim = sample.answer if answer == "yes" else self.rng.choice(wrong)
        return f'{question}\nIs "{claim}" the right answer?', answer, {"answer": answer}

    def _wrong(self, sample: Sample, question: str) -> list[str]:
        """Wrong answers: the task's answers to the most alike questions that have three of them."""
        from dymoe.tasks.scoring.text import process_answer

        if _kind(sample.answer) == YES_NO:
            other = "no" if process_answer(sample.answer) == "yes" else "yes"
            return [other.capitalize() if sample.answer[0].isupper() else other]
        right = {process_answer(answer) for answer in (sample.answer, *sample.reference.get("answers", ()))}
        candidates: list[str] = []
        for key in _likeness(question, sample.answer):
            answers = self._pool().get(key, {})
            candidates = [text for plain, text in answers.items() if plain not in right]
            if len(candidates) >= 3:
                break
        return candidates

    def _pool(self) -> dict[tuple[str, ...], dict[str, str]]:
        """The task's different answers by likeness of their questions, compared as answers are scored."""
        from dymoe.tasks.instructions import strip
        from dymoe.tasks.scoring.text import process_answer

        if self._answers is None:
            self._answers = {}
            for sample in self.task.train:
                for key in _likeness(strip(sample.question), sample.answer):
                    self._answers.setdefault(key, {}).setdefault(process_answer(sample.answer), sample.answer)
        return self._answers

    def _explanation(self, sample: Sample, question: str, style: str) -> str:
        """One sentence, or some that begin with the question; the answer comes last."""
        answer = _plain(sample).removesuffix(".")
        leads = READ if sample.image is None else UNSEEN if answer == "unanswerable" else GROUNDS
        lead = self.rng.choice(leads)
        if style == BRIEF:
            return f"{lead}, the answer is {answer}."
        choices = sample.reference.get("choices")
        options = f" There is a choice between these: {'; '.join(choices)}." if choices else ""
        where = "the words of the question" if sample.image is None else "the picture"
        return (
            f'The question to settle is "{question.partition(chr(10))[0]}".{options} What it asks for has to be looked '
            f"for in {where}, and the rest can be left aside. {lead}, the answer is {answer}."
        )


def _plain(sample: Sample) -> str:
    """The answer as text: a letter stands for its choice."""
    choices = sample.reference.get("choices")
    return str(choices["ABCDE".index(sample.answer.strip())]) if choices else sample.answer


def _box(sample: Sample, style: str) -> str:
    if style == BRIEF:
        return f"What is named here lies inside the box {sample.answer}."
    return (
        "First the thing named has to be found in the picture. The box then starts at its left and upper edge and "
        f"ends at its right and lower edge, each as a share of the picture's side. The box is {sample.answer}."
    )


def _kind(answer: str) -> str:
    """What kind of answer a question wants: yes/no, number or other."""
    from dymoe.tasks.scoring.text import process_answer

    plain = process_answer(answer)
    if plain in ("yes", "no"):
        return YES_NO
    return "number" if plain.replace(".", "", 1).isdigit() else "other"


def _likeness(question: str, answer: str) -> Iterator[tuple[str, ...]]:
    """Keys under which like questions meet, from the same question to any: ever fewer words count."""
    kind, words = _kind(answer), question.lower().split()
    yield ("question", kind, *words)
    for count in (4, 3, 2, 0):
        yield (str(count), kind, *words[:count])
    yield ()
