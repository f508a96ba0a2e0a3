"""A run in memory answers as it did when it was evaluated, at every stage, one question after the other."""

import gc
import json
import threading
from itertools import pairwise

import pytest
import torch

from dymoe import images
from dymoe.analysis import open_run
from dymoe.errors import DymoeError
from dymoe.evaluation.generate import generate
from dymoe.models import Collator, load
from dymoe.play import ask
from dymoe.play.ask import Runs
from tests.test_images import png_header

LONGEST = 12


def last(runs, stage, sample, name="routed"):
    return [*runs.ask(name, stage, sample.question, sample.image, LONGEST)][-1].sample.answer


def test_every_stage_answers_as_evaluation_does(runs, folders):
    alone = open_run(folders[0])
    samples = runs.examples("routed")
    expected = {}
    for stage in (1, 2):
        alone.activate(stage)
        expected[stage] = generate(alone.lvlm, alone.collator, samples, LONGEST, 2, "float32")
    assert expected[1] != expected[2], "two stages that answer alike would show nothing"
    for stage in (2, 1, 2):  # back and forth
        assert [last(runs, stage, sample) for sample in samples] == expected[stage]


def test_answers_are_those_that_the_run_wrote_down(runs, folders):
    sample = runs.examples("routed")[0]
    lines = (folders[0] / "stages" / "02-VQAv2" / "predictions" / "ImageNet.jsonl").read_text().splitlines()
    (written,) = [row["prediction"] for row in map(json.loads, lines) if row["id"] == sample.id]
    longest = runs["routed"].tasks["ImageNet"][0].max_new_tokens
    *_, asked = runs.ask("routed", 2, sample.question, sample.image, longest)
    assert asked.sample.answer == written


def test_stage_0_is_the_base_model(runs, tiny_folder):
    samples = runs.examples("routed")
    learned = last(runs, 2, samples[0])
    lvlm = load(str(tiny_folder), "float32")
    assert [last(runs, 0, sample) for sample in samples] == generate(
        lvlm, Collator(lvlm), samples, LONGEST, 1, "float32"
    )
    assert last(runs, 2, samples[0]) == learned
    with pytest.raises(DymoeError, match="before learning there are no experts"):
        runs.route(ask.Exchange("routed", 0, samples[0]), 0)


def test_the_answer_grows_and_can_be_given_up(runs):
    sample = runs.examples("routed")[0]
    said = [asked.sample.answer for asked in runs.ask("routed", 0, sample.question, sample.image, 48)]
    assert len(set(said)) > 1
    assert all(after.startswith(before) for before, after in pairwise(said))
    threads = threading.active_count()
    answers = runs.ask("routed", 0, sample.question, sample.image, ask.LONGEST)
    next(answers)
    answers.close()
    assert threading.active_count() == threads
    next(runs.ask("routed", 0, sample.question, sample.image, ask.LONGEST))  # dropped, not closed
    gc.collect()
    assert threading.active_count() == threads
    assert last(runs, 0, sample)


def test_a_second_question_waits_and_then_says_so(runs, monkeypatch):
    sample = runs.examples("routed")[0]
    monkeypatch.setattr(ask, "PATIENCE", 0.05)
    first = runs.ask("routed", 0, sample.question, sample.image, 48)
    next(first)
    with pytest.raises(DymoeError, match="another question is still being answered"):
        next(runs.ask("routed", 1, sample.question, sample.image, 2))
    first.close()


def test_routing_is_that_of_the_stage(runs):
    sample = runs.examples("routed")[0]
    *_, asked = runs.ask("routed", 1, sample.question, sample.image, LONGEST)
    *_, later = runs.ask("routed", 2, sample.question, sample.image, LONGEST)
    first, second = runs.route(asked, 1), runs.route(later, 1)
    assert set(first["group"]) == {"ImageNet"}
    assert set(second["group"]) == {"ImageNet", "VQAv2"}
    words = second[(second["kind"] == "answer") & (second["projection"] == "v_proj")]["text"]
    assert later.sample.answer in "".join(words)


def test_text_alone_is_asked_too(runs):
    assert isinstance([*runs.ask("plain", 1, "What is red?", None, 4)][-1].sample.answer, str)
    with pytest.raises(DymoeError, match="method lora routes nothing"):
        runs.route(ask.Exchange("plain", 1, runs.examples("plain")[0]), 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("nothing", 1, "x", None, 4), "run 'nothing': not loaded; there is routed, plain"),
        (("routed", 3, "x", None, 4), "stage 3: the run has stages 1 to 2"),
        (("routed", -1, "x", None, 4), "stage -1"),
        (("routed", 1, " \n", None, 4), "there is no question"),
        (("routed", 1, "x", None, 0), "expected 1 to 256 tokens, got 0"),
        (("routed", 1, "x", b"GIF89a", 4), "is no picture that can be used: broken image of 6 bytes"),
        (("routed", 1, "x", png_header(10_000, 10_000), 4), "10000 x 10000 pixels; at most 89 million"),
        (("routed", 1, "see <image>", None, 4), "contains the special token <image>"),
    ],
)
def test_what_cannot_be_asked_is_told(runs, values, message):
    with pytest.raises(DymoeError) as caught:
        next(runs.ask(*values))
    assert message in str(caught.value)
    next(runs.ask("routed", 1, "x", None, 2))  # and the next question is answered


def test_runs_are_told_apart(folders, tmp_path):
    with pytest.raises(DymoeError, match="at least one"):
        Runs([])
    with pytest.raises(DymoeError, match="given more than once"):
        Runs([folders[0], folders[0] / ".." / folders[0].name])
    with pytest.raises(DymoeError):
        Runs([tmp_path])


def test_examples_take_the_tasks_in_turn(runs):
    learned = runs["routed"]
    tasks = [{sample.id for sample in learned.samples(task, None)} for task, _ in learned.tasks.values()]
    found = runs.examples("routed")
    assert [next(n for n, ids in enumerate(tasks) if sample.id in ids) for sample in found] == [0, 1, 0, 1]


def test_a_picture_of_too_many_bytes_is_refused(runs, monkeypatch):
    sample = runs.examples("routed")[0]
    monkeypatch.setattr(images, "MAX_BYTES", len(sample.image) - 1)
    with pytest.raises(DymoeError, match=r"a picture of \d+ bytes; at most"):
        next(runs.ask("routed", 1, "x", sample.image, 4))


def test_nothing_learns(runs):
    with torch.enable_grad():
        next(runs.ask("routed", 1, "x", None, 2))
    assert not any(parameter.requires_grad for parameter in runs["routed"].model.parameters())
