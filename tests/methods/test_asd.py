"""Answer styles: the share is exact, the styles are even, and a checker of its own finds every new answer right."""

import re
from collections import Counter
from pathlib import Path

import pytest

from dymoe.methods import Stage
from dymoe.methods.asd import BOX_INSTRUCTIONS, INSTRUCTIONS, AnswerStyles
from dymoe.tasks import Sample, Task
from dymoe.tasks.instructions import TYPES, apply, instruction, strip
from dymoe.tasks.scoring import lenient, scorer

GARMENTS = {"sandal": "shoe", "sneaker": "shoe", "boot": "shoe", "coat": "jacket", "bag": "bag", "unanswerable": ""}
EXPLANATION = re.compile(r"(?:answer is|box is|inside the box) (.+)\.$")


def asked(task, number, kind):
    """Question without instruction, answer and reference of one sample of a task like the pocket stream's."""
    if task == "ScienceQA":
        choices = ["wheels", "wings", "the paws."][: 2 + number % 2]
        letter = "ABC"[number % len(choices)]
        lines = [f"{name}. {text}" for name, text in zip("ABC", choices, strict=False)]
        return "\n".join(["What carries it?", *lines]), letter, {"answer": letter, "choices": choices}
    if task == "Grounding":
        box = [0.25 * (number % 3), 0.0, 0.25 * (number % 3) + 0.5, 0.5]
        answer = "[" + ",".join(f"{value:.2f}" for value in box) + "]"
        return f"the dog {number}", answer, {"answer": answer, "bbox": box}
    if task == "VizWiz":
        answer = list(GARMENTS)[number % 6]
        return "What is this?", answer, {"answer": answer, "answers": [answer] * 8 + [GARMENTS[answer] or answer] * 2}
    if task == "OCRVQA":
        question, answer = [
            ("What is the genre of it?", ["Comedy", "Horror", "Action", "Western"][number // 3 % 4]),
            ("What is the rating of it?", ["G", "PG", "R"][number // 3 % 3]),
            ("Is the genre Comedy?", ["Yes", "No"][number // 3 % 2]),
        ][number % 3]
        return question, answer, {"answer": answer}
    if task == "VQAv2":
        answer = ["two", "3", "1", "ten", "yes", "no"][number % 6]
        question = "Is it red?" if answer in ("yes", "no") else f"How many {'cats' if number % 2 else 'dogs'}?"
        return question, answer, {"answer": answer, "answers": [answer] * 10}
    answer = ["frog", "ship", "bird", "horse"][number % 4]
    return "What is the object in the image?", answer, {"answer": answer}


RULES = {"ScienceQA": "letter", "Grounding": "iou", "VizWiz": "soft_accuracy", "VQAv2": "soft_accuracy"}
STYLES = {
    "ScienceQA": {"short", "brief", "detailed"},
    "Grounding": {"brief", "detailed"},
    "ImageNet": {"brief", "detailed"},
}
FOUR = {"yes/no", "multiple choice", "brief", "detailed"}


def task(name, count=60, kind="original"):
    samples = []
    for number in range(count):
        question, answer, reference = asked(name, number, kind)
        key = f"{name}-{number}"
        picture = None if number % 10 == 0 else b"picture"
        samples.append(Sample(key, picture, apply(name, question, kind, key), answer, reference))
    return Task(name, samples, [], [], RULES.get(name, "exact_match"), 8)


def rewritten(made, **settings):
    stage = Stage(1, made.name, (made,), Path("memory"))
    result = AnswerStyles(**settings).training_samples(list(made.train), stage)
    assert len(result) == len(made.train)
    return [(old, new) for old, new in zip(made.train, result, strict=True) if old is not new]


def style_of(sample):
    for name, text in BOX_INSTRUCTIONS.items():
        if sample.question.startswith(f"{text}: "):
            return name, sample.question.removeprefix(f"{text}: ")
    question, _, last = sample.question.rpartition("\n")
    return {text: name for name, text in INSTRUCTIONS.items()}[last], question


def check(made, old, new):
    """Score the new answer by what the old sample holds; returns the style."""
    style, question = style_of(new)
    right, tolerant = scorer(made.scorer), lenient(made.scorer)
    bare = asked(made.name, int(old.id.split("-")[1]), None)[0]
    assert (new.id, new.image) == (old.id, old.image)
    assert question == bare or question.startswith(f"{bare}\n")
    extra = question.removeprefix(bare).strip()
    if style == "yes/no" and old.answer.lower() in ("yes", "no"):
        assert (extra, new.answer) == ("", old.answer)
        assert right(new.answer, new.reference) == 1
    elif style == "yes/no":
        said = re.fullmatch(r'Is "(.+)" the right answer\?', extra)[1]
        assert new.answer == ("yes" if right(said, old.reference) == 1 else "no")
        assert new.answer == "yes" or right(said, old.reference) == 0
        assert scorer("exact_match")(new.answer, new.reference) == 1
    elif style == "multiple choice":
        options = dict(line.split(". ", 1) for line in extra.splitlines())
        assert list(options) == list("ABCD"[: len(options)])
        assert len(options) == (2 if old.answer.lower() in ("yes", "no") else 4)
        scores = {letter: right(text, old.reference) for letter, text in options.items()}
        assert [letter for letter, score in scores.items() if score > 0] == [new.answer]
        assert scores[new.answer] == 1
        assert scorer("letter")(new.answer, new.reference) == 1
    elif style == "short":
        assert tolerant(new.answer, old.reference) == 1
        assert right(new.answer, old.reference) == 0, "a letter is no other style"
    else:
        said = EXPLANATION.search(new.answer)[1]
        rule = tolerant if made.scorer == "letter" else right
        assert rule(said, old.reference) == 1
        sentences = len(re.findall(r"[.?!]\"?\.?(?= |$)", new.answer))
        assert sentences == 1 if style == "brief" else sentences >= 3
        if style == "brief":
            assert tolerant(new.answer, old.reference) == 1
        if style == "detailed" and made.name != "Grounding":
            assert bare.partition("\n")[0] in new.answer
    return style


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA"])
def test_every_rewritten_answer_is_right_in_its_style(name, kind):
    made = task(name, kind=kind)
    found = rewritten(made, share=0.8)
    counts = Counter(check(made, old, new) for old, new in found)
    assert sum(counts.values()) == 48
    assert set(counts) == STYLES.get(name, FOUR)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert not any(instruction(name, kind, old.id) in new.question for old, new in found)


@pytest.mark.parametrize("share, count", [(0.2, 12), (0.1, 6), (0.25, 15), (0.01, 1), (1.0, 60)])
def test_the_share_is_exact(share, count):
    made = task("GQA")
    assert len(rewritten(made, share=share)) == count


def test_the_same_samples_every_time_and_others_with_another_seed():
    made = task("GQA")
    assert rewritten(made) == rewritten(made)
    assert [old.id for old, _ in rewritten(made)] != [old.id for old, _ in rewritten(made, seed=1)]


def test_half_of_the_proposed_answers_are_wrong():
    made = task("TextVQA", 200)
    proposed = [new.answer for old, new in rewritten(made, share=1.0) if style_of(new)[0] == "yes/no"]
    assert Counter(proposed) == {"yes": 25, "no": 25}


def test_a_synonym_in_the_reference_is_no_wrong_option():
    """Both tasks' answers are like "shoe"; for a sandal "shoe" would be right, "sneaker" is wrong."""
    answers = ["sandal", "shoe", "coat"]
    samples = [
        Sample(f"x-{i}", b"p", "What is this?", answers[i % 3], {"answers": [answers[i % 3]] * 7 + ["shoe"] * 3})
        for i in range(30)
    ]
    made = Task("VizWiz", samples, [], [], "soft_accuracy", 8)
    sandals = 0
    for old, new in rewritten(made, share=1.0):
        style, question = style_of(new)
        if style == "multiple choice":
            wrong = {line.split(". ")[1] for line in question.splitlines()[1:]} - {old.answer}
            assert "shoe" not in wrong
            assert wrong
            sandals += old.answer == "sandal"
    assert sandals


def test_a_task_with_one_answer_has_no_wrong_options():
    samples = [Sample(f"x-{i}", b"p", "What is this?", "frog", {"answer": "frog"}) for i in range(20)]
    made = Task("GQA", samples, [], [], "exact_match", 8)
    counts = Counter(style_of(new)[0] for _, new in rewritten(made, share=1.0))
    assert counts == {"brief": 15, "detailed": 5}


def test_only_the_stages_own_samples_are_rewritten():
    made, earlier = task("GQA"), task("TextVQA")
    stage = Stage(2, made.name, (made,), Path("memory"), earlier_tasks=(earlier,))
    samples = [*made.train, *earlier.train[:7]]
    result = AnswerStyles(share=1.0).training_samples(samples, stage)
    assert all(new is old for new, old in zip(result[60:], earlier.train, strict=False))
    assert not any(new is old for new, old in zip(result[:60], made.train, strict=True))
    both = Stage(1, "joint", (made, earlier), Path("memory"))
    result = AnswerStyles(share=0.5).training_samples([*made.train, *earlier.train], both)
    changed = [old is not new for old, new in zip([*made.train, *earlier.train], result, strict=True)]
    assert (sum(changed[:60]), sum(changed[60:])) == (30, 30)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["ScienceQA", "GQA", "Grounding"])
def test_an_instruction_is_stripped_and_nothing_else(name, kind):
    for question in ("the dog", "What: is it?\nA. one\nB. two", "Why\n"):
        for number in range(12):
            assert strip(apply(name, question, kind, str(number))) == question
    assert strip("Say it aloud: the dog") == "Say it aloud: the dog"
    assert strip("What is it?\nAnswer in French") == "What is it?\nAnswer in French"
    assert strip("What is it?\nAnswer the question using a single word or phrase.") == "What is it?"
