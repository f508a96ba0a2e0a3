"""Whole files: denominators, odd ids, broken lines, annotation files, in CoIN's own formats."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dymoe.errors import DymoeError
from dymoe.tasks.coin import TASKS
from dymoe.tasks.scoring import scorer
from dymoe.tasks.scoring.runner import Scores, rule_name, score_files

Run = Callable[..., Scores]


def line(identity: object, text: object) -> str:
    """A prediction as CoIN's evaluation writes it."""
    return json.dumps(
        {"question_id": identity, "prompt": "?", "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}
    )


@pytest.fixture
def files(tmp_path: Path) -> Callable[[Sequence[str], object], tuple[Path, Path]]:
    def write(lines: Sequence[str], references: object) -> tuple[Path, Path]:
        predictions, right = tmp_path / "merge.jsonl", tmp_path / "test.json"
        predictions.write_text("".join(f"{each}\n" for each in lines), encoding="utf-8")
        right.write_text(json.dumps(references), encoding="utf-8")
        return predictions, right

    return write


@pytest.fixture
def run(files: Callable[..., tuple[Path, Path]]) -> Run:
    def score(task: str, rule: str, lines: Sequence[str], references: object, **more: Any) -> Scores:
        return score_files(*files(lines, references), task, rule, **more)

    return score


def tree(root: Path) -> Path:
    """The three annotation files of an image root, as published."""
    problems = {
        str(number): {"question": "?", "choices": ["x", "y", "z"], "answer": number % 3, "hint": "", "split": "test"}
        for number in range(1, 7)
    }
    content = {
        "ScienceQA/problems.json": problems,
        "ScienceQA/pid_splits.json": {"train": ["6"], "test": ["1", "2", "3", "4", "5"]},
        "TextVQA/TextVQA_0.5.1_val.json": {
            "dataset_type": "val",
            "data": [
                {"question_id": 34602, "image_id": "a", "answers": ["stop"] * 7 + ["halt"] * 3},
                {"question_id": 34603, "image_id": "b", "answers": ["2"] * 10},
            ],
        },
        "GQA/testdev_balanced_questions.json": {
            str(number): {"question": "?", "answer": "yes", "isBalanced": number != 3, "imageId": "n1"}
            for number in range(1, 5)
        },
    }
    for name, value in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(value))
    return root


GQA = [{"question_id": str(number), "image": "x.jpg", "text": "?", "answer": "no"} for number in range(1, 5)]
VQA = [{"question_id": number, "image": "x.jpg", "text": "?", "answer": "two"} for number in range(1, 5)]
BOXES = [
    {"question_id": "a", "image": "x.jpg", "text": "?", "answer_bbox": "[0.1,0.5,0.9,0.71]", "size": [640, 480]},
    {"question_id": "b", "image": "x.jpg", "text": "?", "answer_bbox": "[0.2,0.3,0.2,0.9]", "size": [640, 480]},
]


def test_what_is_counted_under_each_rule(run: Run) -> None:
    said = [line(1, "TWO"), line(2, "2"), line(3, "")]
    coin, corrected = run("VQAv2", "coin", said, VQA), run("vqav2", "corrected", said, VQA)
    assert (coin.accuracy, coin.denominator) == (pytest.approx(100 / 3), 3)
    assert (corrected.accuracy, corrected.denominator) == (50.0, 4)
    assert (coin.counts.right, coin.counts.wrong, coin.counts.unreadable, coin.counts.missing) == (1, 2, 1, 1)
    assert (corrected.counts.right, corrected.counts.wrong, corrected.counts.missing) == (2, 2, 1)
    assert coin.ids["missing"] == corrected.ids["missing"] == ("4",)
    assert coin.ids["unreadable"] == ("3",)
    assert coin.format_drift == pytest.approx(100 / 3)
    assert coin.lenient_accuracy == pytest.approx(200 / 3)
    assert corrected.format_drift == 0


def test_soft_scores_are_partial_and_ids_may_be_numbers_or_texts(run: Run, tmp_path: Path) -> None:
    references = [{"question_id": 34602, "text": "?", "answer": "stop"}, {"question_id": 34603, "text": "?"}]
    said = [line("34602", "halt"), line("34603", "two")]
    scores = run("TextVQA", "coin", said, references, annotations=tree(tmp_path))
    assert scores.accuracy == pytest.approx(95)
    assert (scores.counts.right, scores.counts.partial, scores.counts.wrong) == (1, 1, 0)
    folder = tmp_path / "TextVQA"
    assert run("TextVQA", "corrected", said[:1], references, annotations=folder).accuracy == pytest.approx(45)
    with pytest.raises(DymoeError, match=r"hold no 'answers'; give the folder with TextVQA_0\.5\.1_val\.json"):
        run("TextVQA", "coin", said, references)
    with pytest.raises(DymoeError, match=r"record '9' of .*test\.json is missing"):
        run("TextVQA", "coin", said, [*references, {"question_id": 9}], annotations=folder)


def test_scienceqa_divides_by_the_whole_split_and_sefe_by_the_predictions(run: Run, tmp_path: Path) -> None:
    references = [{"question_id": str(number), "text": "?", "answer": "ABC"[number % 3]} for number in (1, 2, 3)]
    said = [line("1", "C"), line("1", "B"), line("2", "The answer is C."), line("77", "A")]
    coin = run("ScienceQA", "coin", said, references, annotations=tree(tmp_path))
    # The last answer to question 1 counts, the sentence has no lone letter before C, and 77 is nobody's question.
    assert (coin.counts.right, coin.denominator, coin.accuracy) == (2, 5, 40.0)
    assert (coin.counts.missing, coin.counts.duplicates, coin.counts.unknown) == (3, 1, 1)
    sefe = run("ScienceQA", "coin", said, references, annotations=tmp_path, variant="sefe")
    assert (sefe.rule, sefe.counts.right, sefe.denominator) == ("sefe/scienceqa", 2, 3)
    assert sefe.counts.right + sefe.counts.partial + sefe.counts.wrong == 3
    corrected = run("ScienceQA", "corrected", [said[1], said[2]], references, annotations=tmp_path)
    assert (corrected.counts.right, corrected.denominator) == (1, 5)
    assert corrected.format_drift == pytest.approx(20)
    alone = run("ScienceQA", "corrected", [said[1]], references)
    assert (alone.counts.right, alone.denominator) == (1, 3)


def test_scienceqa_remarks_what_the_two_sources_disagree_on(run: Run, tmp_path: Path) -> None:
    references = [{"question_id": "1", "answer": "A"}, {"question_id": "6", "answer": "A"}]
    scores = run("ScienceQA", "coin", [line("1", "B")], references, annotations=tree(tmp_path))
    assert [remark.split(" records")[0] for remark in scores.remarks] == ["1", "1"]
    assert "not in the test split" in scores.remarks[0]
    assert "another answer" in scores.remarks[1]


def test_gqa_counts_balanced_questions_alone(run: Run, tmp_path: Path) -> None:
    said = [line("1", "no"), line("1", "Yes."), line("3", "yes")]
    coin = run("GQA", "coin", said, GQA, annotations=tree(tmp_path))
    assert (coin.accuracy, coin.denominator) == (100.0, 1)
    assert (coin.ids["skipped"], coin.ids["duplicates"], coin.ids["missing"]) == (("3",), ("1",), ("2", "4"))
    corrected = run("GQA", "corrected", said[1:], GQA, annotations=tmp_path)
    assert (corrected.accuracy, corrected.denominator) == (pytest.approx(100 / 3), 3)
    alone = run("GQA", "coin", said, GQA)
    assert (alone.accuracy, alone.denominator) == (0.0, 2)
    assert "every question counts as balanced" in alone.remarks[0]
    with pytest.raises(DymoeError, match="no prediction counts under coin/gqa"):
        run("GQA", "coin", said[2:], GQA, annotations=tmp_path)


def test_imagenet_goes_by_position_under_coin_and_by_id_under_corrected(run: Run) -> None:
    references = [{"question_id": name, "answer": name} for name in ("cat", "dog", "hen")]
    said = [line("dog", "dog"), line("cat", "cat")]
    coin = run("ImageNet", "coin", said, references)
    assert (coin.accuracy, coin.denominator, coin.ids["missing"]) == (0.0, 2, ("hen",))
    assert coin.remarks[0].startswith("2 lines stand where another question's answer is (first: line 1)")
    assert run("ImageNet", "corrected", said, references).accuracy == pytest.approx(200 / 3)
    with pytest.raises(DymoeError, match=r"4 lines, but .*test\.json has only 3 records"):
        run("ImageNet", "coin", said * 2, references)


def test_ocrvqa_skips_and_keeps_in_the_denominator(run: Run) -> None:
    references = [{"question_id": "1", "answer": "Unanswerable"}, {"question_id": "2", "answer": "Poe"}]
    said = [line("1", "Unanswerable"), line("2", "poe")]
    coin, corrected = run("OCRVQA", "coin", said, references), run("OCRVQA", "corrected", said, references)
    assert (coin.accuracy, coin.denominator, coin.ids["skipped"]) == (50.0, 2, ("1",))
    assert (corrected.accuracy, corrected.counts.skipped) == (100.0, 0)


def test_grounding_reads_what_coin_reads_and_remarks_on_boxes_without_area(run: Run) -> None:
    said = [line("a", "[0.1,0.5,0.9,0.67]"), line("b", "no box")]
    coin, corrected = run("Grounding", "coin", said, BOXES), run("Grounding", "corrected", said, BOXES)
    assert (coin.accuracy, corrected.accuracy) == (0.0, 50.0)
    assert coin.format_drift == 50
    assert coin.ids["unreadable"] == corrected.ids["unreadable"] == ("b",)
    assert "1 boxes" in corrected.remarks[0]
    assert "'b'" in corrected.remarks[0]


def test_answers_twice_count_each_under_coin_and_are_refused_by_corrected(run: Run) -> None:
    said = [line(1, "two"), line(2, "x"), line(1, "two")]
    coin = run("VizWiz", "coin", said, VQA)
    assert (coin.counts.right, coin.denominator, coin.ids["duplicates"]) == (2, 3, ("1",))
    with pytest.raises(DymoeError, match=r"question_id '1' is there twice \(lines 1, 3; 1 ids are\)"):
        run("VizWiz", "corrected", said, VQA)


def test_ids_of_no_question_are_refused(run: Run) -> None:
    for rule in ("coin", "corrected"):
        with pytest.raises(DymoeError, match=r"line 2: question_id '9' is not in .*test\.json"):
            run("VizWiz", rule, [line(1, "x"), line(9, "x")], VQA)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"merge\.jsonl: no predictions"),
        (["{"], r"merge\.jsonl: line 1: not valid JSON"),
        ([line(1, "x"), "", "{"], r"line 3: not valid JSON"),
        (["[1]"], "line 1: must be a JSON object"),
        ([line(1, "x"), line(2, None)], r"line 2 \(question_id '2'\): 'text' must be a text, not None"),
        ([line(1, ["x"])], "'text' must be a text, not "),
        ([line(None, "x")], "line 1: neither 'id' nor 'question_id' is a text or a whole number"),
        ([line(True, "x")], "line 1: neither 'id' nor 'question_id' is a text or a whole number"),
        ([line(1.5, "x")], "line 1: neither 'id' nor 'question_id' is a text or a whole number"),
        ([line(float("nan"), "x")], "line 1: neither 'id' nor 'question_id' is a text or a whole number"),
        ([line(1, float("nan"))], "'text' must be a text, not nan"),
        (['{"question_id": 1, "text": "x", "text": "y"}'], "line 1: not valid JSON .the key 'text' is there twice"),
        (["[" * 10**5], "line 1: not valid JSON"),
        (["9" * 5000], "line 1: not valid JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(run: Run, lines: list[str], message: str) -> None:
    for rule in ("coin", "corrected"):
        with pytest.raises(DymoeError, match=message):
            run("VQAv2", rule, lines, VQA)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([], r"test\.json: it holds no records"),
        ({"a": 1}, "expected a JSON list"),
        ([3], "record 0: expected an object with keys, found int"),
        ([{"answer": "x"}], "record 0: neither 'id' nor 'question_id' is a text or a whole number"),
        ([VQA[0], {**VQA[1], "question_id": "1"}], "'1' is there 1 times, in .* 2 times; which answer belongs"),
        ([{"question_id": 1, "answer": [2]}], "record '1': reference: 'answer' must be a text"),
        ([{"question_id": 1, "answer": float("nan")}], "record 0: 'answer': nan stands for a missing value"),
    ],
)
def test_a_reference_that_cannot_be_used_is_named(run: Run, references: object, message: str) -> None:
    for rule in ("coin", "corrected"):
        with pytest.raises(DymoeError, match=message):
            run("VQAv2", rule, [line(1, "x")], references)


def test_a_reference_is_checked_even_when_its_prediction_is_missing(run: Run) -> None:
    with pytest.raises(DymoeError, match=r"test\.json: record '2': reference: 'answer' must be"):
        run("VQAv2", "corrected", [line(1, "x")], [VQA[0], {"question_id": 2}])


def test_annotation_files_that_cannot_be_used_are_named(run: Run, tmp_path: Path) -> None:
    references, said = [{"question_id": "1", "answer": "A"}], [line("1", "A")]
    with pytest.raises(DymoeError, match="nowhere: no such folder"):
        run("ScienceQA", "coin", said, references, annotations=tmp_path / "nowhere")
    with pytest.raises(DymoeError, match=r"no problems\.json here and none in ScienceQA/"):
        run("ScienceQA", "coin", said, references, annotations=tmp_path)
    root = tree(tmp_path)
    (root / "ScienceQA/pid_splits.json").write_text('{"test": ["1", "8"]}')
    with pytest.raises(DymoeError, match=r"problems\.json has no question '8'"):
        run("ScienceQA", "coin", said, references, annotations=root)
    (root / "ScienceQA/pid_splits.json").write_text('{"val": []}')
    with pytest.raises(DymoeError, match=r"pid_splits\.json: 'test' must be a list"):
        run("ScienceQA", "coin", said, references, annotations=root)
    (root / "ScienceQA/pid_splits.json").write_text("{")
    with pytest.raises(DymoeError, match=r"pid_splits\.json: not valid JSON"):
        run("ScienceQA", "coin", said, references, annotations=root)
    (root / "GQA/testdev_balanced_questions.json").write_text('{"1": {"answer": "yes"}}')
    with pytest.raises(DymoeError, match="question '1': 'isBalanced' must be true or false"):
        run("GQA", "coin", said, references, annotations=root)


def test_line_ends_within_a_text_do_not_end_a_line(files: Callable[..., tuple[Path, Path]]) -> None:
    said = json.dumps({"question_id": 1, "text": "two\u2028\x85"}, ensure_ascii=False)
    predictions, references = files([said, line(2, "two")], VQA)
    assert score_files(predictions, references, "VQAv2", "coin").predictions.records == 2
    predictions.write_bytes(predictions.read_bytes().rstrip(b"\n"))
    assert score_files(predictions, references, "VQAv2", "coin").predictions.records == 2


def test_the_outcome_records_rule_denominator_and_the_files(
    files: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    predictions, references = files([line("1", "Yes.")], GQA)
    scores = score_files(predictions, references, "gqa", "coin", annotations=tree(tmp_path))
    told = json.loads(json.dumps(scores.as_dict()))
    assert (told["rule"], told["task"], told["denominator"]) == ("coin/gqa", "GQA", 1)
    assert "balanced" in told["denominator_is"]
    assert told["files"]["predictions"]["sha256"] == hashlib.sha256(predictions.read_bytes()).hexdigest()
    assert told["files"]["references"]["sha256"] == hashlib.sha256(references.read_bytes()).hexdigest()
    annotation = tmp_path / "GQA/testdev_balanced_questions.json"
    assert told["files"]["annotations"][0]["sha256"] == hashlib.sha256(annotation.read_bytes()).hexdigest()


def test_rule_names() -> None:
    assert rule_name("coin", "OcrVqa") == ("coin/ocrvqa", "OCRVQA")
    assert rule_name("coin", "GQA", "sefe") == ("coin/gqa", "GQA")
    assert rule_name("coin", "scienceqa", "sefe") == ("sefe/scienceqa", "ScienceQA")
    for words, message in (
        (("corect", "GQA"), "unknown rule 'corect'; did you mean corrected"),
        (("coin", "grouding"), "unknown task 'grouding'; did you mean Grounding"),
        (("coin", "GQA", "hide"), "unknown variant 'hide'"),
        (("corrected", "ScienceQA", "sefe"), "the corrected rule has no variants"),
    ):
        with pytest.raises(DymoeError, match=message):
            rule_name(*words)


@settings(max_examples=40)
@given(
    task=st.sampled_from(["VizWiz", "OCRVQA", "GQA", "ScienceQA", "Grounding"]),
    texts=st.lists(st.one_of(st.text(max_size=8), st.sampled_from(["A", "two", "[0,0,1,1]"])), min_size=1, max_size=5),
    rule=st.sampled_from(["coin", "corrected"]),
)
def test_accuracy_is_the_mean_of_the_scores(tmp_path_factory: Any, task: str, texts: list[str], rule: str) -> None:
    folder = tmp_path_factory.mktemp("mean")
    records = [
        {"question_id": at, "answer": "A", "answer_bbox": "[0,0,1,1]", "size": [2, 1]} for at in range(len(texts) + 1)
    ]
    (folder / "test.json").write_text(json.dumps(records))
    (folder / "merge.jsonl").write_text("\n".join(line(at, text) for at, text in enumerate(texts)))
    scores = score_files(folder / "merge.jsonl", folder / "test.json", task, rule)
    over = len(records) if rule == "corrected" or task == "ScienceQA" else len(texts)
    each = [scorer(f"{rule}/{task}")(text, records[0]) for text in texts]
    assert scores.accuracy == pytest.approx(100 * sum(each) / over)
    assert scores.denominator == over == scores.counts.right + scores.counts.partial + scores.counts.wrong
    assert 0 <= scores.accuracy <= scores.lenient_accuracy <= 100


def test_every_task_has_a_rule_that_the_runner_finds() -> None:
    assert {rule_name(rule, task)[0] for rule in ("coin", "corrected") for task in TASKS} == {
        f"{rule}/{task.lower()}" for rule in ("coin", "corrected") for task in TASKS
    }
