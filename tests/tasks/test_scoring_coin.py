"""CoIN's eight tasks: the published rules, flaw for flaw, against slow versions of them, and the corrected rules."""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dymoe.errors import DymoeError
from dymoe.tasks import scoring
from dymoe.tasks.coin import TASKS
from dymoe.tasks.scoring import lenient, names, scorer

TEN = ["stop"] * 6 + ["stop sign"] * 3 + ["halt"]
RECORDS: dict[str, dict[str, Any]] = {
    "ScienceQA": {"answer": "B", "choices": ["bird", "machine", "mammal"]},
    "TextVQA": {"answer": "stop", "answers": TEN},
    "ImageNet": {"answer": "great white shark"},
    "GQA": {"answer": "yes"},
    "VizWiz": {"answer": "unanswerable"},
    "Grounding": {"answer_bbox": "[0.25,0.25,0.75,0.75]", "size": [640, 480]},
    "VQAv2": {"answer": "2", "answers": ["2"] * 10},
    "OCRVQA": {"answer": "Children's Books"},
}
RULES = [f"{rule}/{task}" for rule in ("coin", "corrected") for task in TASKS] + ["sefe/ScienceQA"]
HUGE = [
    "9" * 10**5, "[" * 10**5, "A " * 50_000, "," * 10**5, "." * 10**5, "The answer is B. " * 6000, "\ud800" * 10**5,
    "[0.25,0.25,0.75,0.75]" * 5000, "'s" * 50_000, "1.1" * 30_000, " " * 10**5, "[" + " " * 10**5, "-" * 10**5 + "1",
]  # fmt: skip
ODD = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="ABCDEabcde.()[], \n-0123456789'\u2028\u0130ßΣ", max_size=40),
    st.sampled_from(["", " ", "nan", "[nan,nan,nan,nan]", "[inf,0,1,1]", "[-inf,0,inf,1]", "[-0.0,-0,1,1]", "\x00"]),
    st.lists(st.floats(), min_size=3, max_size=5).map(str),
    st.recursive(st.floats(), lambda inner: st.lists(inner, max_size=4), max_leaves=6).map(str),
)


def record(rule: str) -> dict[str, Any]:
    return RECORDS[rule.partition("/")[2]]


def test_the_eight_tasks_have_both_rules_in_any_case() -> None:
    for rule in ("coin", "corrected"):
        for task in TASKS:
            assert f"{rule}/{task.lower()}" in names()
            assert scorer(f"{rule}/{task}") is scorer(f"{rule}/{task.lower()}") is scorer(f"{rule}/{task.upper()}")
    with pytest.raises(DymoeError, match="did you mean coin/grounding"):
        scorer("coin/grouding")


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40)
@given(prediction=ODD)
@example(prediction="[0.25,0.25,0.75,0.75]")
@example(prediction="[[0.25,0.25],[0.75,0.75]]")
def test_any_prediction_scores_between_0_and_1_and_lenient_never_less(rule: str, prediction: str) -> None:
    strict, tolerant = scorer(rule)(prediction, record(rule)), lenient(rule)(prediction, record(rule))
    assert type(strict) is type(tolerant) is float
    assert 0.0 <= strict <= tolerant <= 1.0
    assert scoring.rule(rule).readable(prediction, record(rule)) in (True, False)
    if strict and rule != "coin/ImageNet":
        assert scoring.rule(rule).readable(prediction, record(rule))


@pytest.mark.parametrize("rule", RULES)
def test_a_hundred_thousand_characters_are_scored(rule: str) -> None:
    for prediction in HUGE:
        assert 0.0 <= scorer(rule)(prediction, record(rule)) <= lenient(rule)(prediction, record(rule)) <= 1.0


@pytest.mark.parametrize("rule", RULES)
def test_the_right_answer_in_its_own_form_is_right_and_an_empty_one_is_wrong(rule: str) -> None:
    own = {"TextVQA": "Stop.", "Grounding": "[0.25,0.25,0.75,0.75]"}
    task = rule.partition("/")[2]
    assert scorer(rule)(own.get(task, str(RECORDS[task].get("answer"))), record(rule)) == 1
    flaw = rule == "coin/ImageNet"
    assert scorer(rule)("", record(rule)) == flaw
    assert not scoring.rule(rule).readable("", record(rule))


@pytest.mark.parametrize("rule", RULES)
def test_a_record_without_its_fields_is_refused(rule: str) -> None:
    for mend in (scorer(rule), lenient(rule)):
        with pytest.raises(DymoeError, match=r"^reference: '"):
            mend("B", {"question_id": "7", "text": "?"})


# --- ScienceQA ---------------------------------------------------------------------------------------------


def slow_letter(text: str, wanted: str) -> bool:
    """CoIN's three steps, looking at one character after the other."""
    if len(text) == 1 and text in "ABCDE":
        return text == wanted
    if len(text) >= 3 and text[0] in "ABCDE" and text[1] == "." and text[2] == " ":
        return text[0] == wanted
    for at, character in enumerate(text):
        before = at > 0 and (text[at - 1].isalnum() or text[at - 1] == "_")
        after = at + 1 < len(text) and (text[at + 1].isalnum() or text[at + 1] == "_")
        if (character.isalnum() or character == "_") and not before and not after:
            return character.upper() == wanted
    return False


@given(
    st.text(alphabet="AaBbCcE I.,_'()1 \n\u00e9", max_size=14),
    st.sampled_from("ABCDE"),
    st.sampled_from([None, ["u", "v", "w", "x", "y"]]),
)
def test_coin_scienceqa_is_the_first_lone_character(text: str, wanted: str, choices: list[str] | None) -> None:
    reference = {"answer": wanted} if choices is None else {"answer": "ABCDE".index(wanted), "choices": choices}
    assert scorer("coin/scienceqa")(text, reference) == slow_letter(text, wanted)


@pytest.mark.parametrize(
    ("prediction", "coin", "sefe", "corrected"),
    [
        ("B", 1, 1, 1), ("B. machine", 1, 1, 1), ("B.", 1, 0, 1), ("b", 1, 0, 1), ("(B)", 1, 0, 1), (" B", 1, 0, 1),
        ("The answer is B.", 1, 1, 0), ("The answer is B", 1, 0, 0), ("The answer is B. The answer is B.", 1, 0, 0),
        ("I think B.", 0, 0, 0), ("What about B?", 1, 0, 0), ("machine", 0, 0, 0), ("B. or A.", 1, 1, 1),
        ("BB", 0, 0, 0), ("FAILED", 0, 0, 0),
    ],
)  # fmt: skip
def test_scienceqa(prediction: str, coin: int, sefe: int, corrected: int) -> None:
    for rule, expected in (("coin", coin), ("sefe", sefe), ("corrected", corrected)):
        assert scorer(f"{rule}/scienceqa")(prediction, RECORDS["ScienceQA"]) == expected


def test_the_article_is_choice_a_for_coin_alone() -> None:
    reference = {"answer": 0, "choices": ["fish", "a whale"]}
    assert scorer("coin/scienceqa")("a whale", reference) == 1
    assert scorer("corrected/scienceqa")("a whale", reference) == 0
    assert lenient("corrected/scienceqa")("a whale", reference) == 0


def test_a_letter_that_no_choice_has_is_unreadable() -> None:
    for rule in ("coin", "sefe", "corrected"):
        assert not scoring.rule(f"{rule}/scienceqa").readable("D", RECORDS["ScienceQA"])
        assert scoring.rule(f"{rule}/scienceqa").readable("C", RECORDS["ScienceQA"])


# --- ImageNet ----------------------------------------------------------------------------------------------


def slow_within(part: str, whole: str) -> bool:
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))


@given(st.text(alphabet="abA ", max_size=5), st.text(alphabet="abA ", max_size=5))
def test_coin_imagenet_is_either_text_within_the_other(prediction: str, answer: str) -> None:
    expected = slow_within(prediction, answer) or slow_within(answer, prediction)
    assert scorer("coin/imagenet")(prediction, {"answer": answer}) == expected


@pytest.mark.parametrize(
    ("prediction", "coin", "corrected", "tolerant"),
    [
        ("great white shark", 1, 1, 1), ("", 1, 0, 0), ("shark", 1, 0, 0), ("Great White Shark", 0, 1, 1),
        ("great_white_shark.", 0, 1, 1), ("The great white shark", 1, 1, 1), ("It is a great white shark!", 1, 0, 1),
        ("g", 1, 0, 0), ("whale", 0, 0, 0), ("a", 1, 0, 0),
    ],
)  # fmt: skip
def test_imagenet(prediction: str, coin: int, corrected: int, tolerant: int) -> None:
    assert scorer("coin/imagenet")(prediction, RECORDS["ImageNet"]) == coin
    assert scorer("corrected/imagenet")(prediction, RECORDS["ImageNet"]) == corrected
    assert lenient("corrected/imagenet")(prediction, RECORDS["ImageNet"]) == tolerant


# --- GQA, OCRVQA, VizWiz, VQAv2 ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "prediction", "answer", "expected"),
    [
        ("coin/gqa", "Yes.", "yes", 1), ("coin/gqa", "yes...", "yes", 1), ("coin/gqa", " yes", "yes", 0),
        ("coin/gqa", "yes", "Yes", 0), ("corrected/gqa", " Yes.", "yes", 1), ("corrected/gqa", "yes", "Yes", 1),
        ("corrected/gqa", "yes it is", "yes", 0),
        ("coin/ocrvqa", "JOHN", "John", 1), ("coin/ocrvqa", "John.", "John", 0), ("coin/ocrvqa", "", "", 1),
        ("coin/ocrvqa", "Unanswerable", "Unanswerable", 0), ("coin/ocrvqa", "unanswerable", "Unanswerable", 1),
        ("corrected/ocrvqa", "Unanswerable", "Unanswerable", 1), ("corrected/ocrvqa", "john.", "John", 1),
        ("coin/vizwiz", "Grey", "grey", 1), ("coin/vizwiz", "grey.", "grey", 0), ("coin/vizwiz", "a grey", "grey", 0),
        ("corrected/vizwiz", "a grey.", "grey", 1), ("corrected/vizwiz", "", "grey", 0),
        ("corrected/vizwiz", "", "a", 0), ("corrected/vizwiz", "A", "a", 1), ("corrected/vizwiz", "the", "a", 0),
        ("coin/vizwiz", "STRASSE", "straße", 1),
        ("coin/vqav2", "two", "2", 0), ("corrected/vqav2", "two", "2", 1), ("corrected/vqav2", "isnt", "isn't", 1),
    ],
)  # fmt: skip
def test_open_answers(rule: str, prediction: str, answer: str, expected: int) -> None:
    assert scorer(rule)(prediction, {"answer": answer}) == expected
    assert lenient(rule)(prediction, {"answer": answer or "x"}) >= (expected if answer else 0)


def test_ten_answers_make_vizwiz_and_vqav2_soft() -> None:
    reference = {"answer": "grey", "answers": [{"answer": "grey"}] * 8 + [{"answer": "Silver"}] * 2}
    for task in ("vizwiz", "vqav2"):
        assert scorer(f"corrected/{task}")("silver", reference) == pytest.approx(0.6)
        assert scorer(f"coin/{task}")("silver", reference) == 0
        with pytest.raises(DymoeError, match="must hold 10 texts, it holds 9"):
            scorer(f"corrected/{task}")("silver", {**reference, "answers": reference["answers"][1:]})


def test_an_empty_answer_is_read_by_coins_rules_and_refused_by_the_corrected() -> None:
    for task in ("gqa", "vizwiz", "ocrvqa", "imagenet"):
        assert scorer(f"coin/{task}")("", {"answer": ""}) == lenient(f"coin/{task}")("", {"answer": ""}) == 1
        assert lenient(f"coin/{task}")("x", {"answer": " "}) == scorer(f"coin/{task}")("x", {"answer": " "}) == 0
        with pytest.raises(DymoeError, match="'answer' must be a text that is not empty"):
            scorer(f"corrected/{task}")("", {"answer": ""})


def test_the_published_metric_takes_an_article_for_nothing() -> None:
    answers = ["a", "The", *["stop"] * 8]
    for rule in ("coin/textvqa", "corrected/textvqa"):
        assert scorer(rule)("", {"answers": answers}) == scorer(rule)("an", {"answers": answers}) == pytest.approx(0.6)


@given(
    st.lists(st.sampled_from(["two", "2", "the cat", "Cat."]), min_size=10, max_size=10), st.sampled_from(["2", "cat"])
)
def test_textvqa_is_leaving_one_out_under_both_rules(answers: list[str], said: str) -> None:
    same = [text in {"2": ("two", "2"), "cat": ("the cat", "Cat.")}[said] for text in answers]
    thirds = [min(Fraction(sum(same) - matches, 3), Fraction(1)) for matches in same]
    for rule in ("coin/textvqa", "corrected/textvqa"):
        assert scorer(rule)(said, {"answers": answers}) == pytest.approx(float(sum(thirds) / 10))


# --- Grounding ---------------------------------------------------------------------------------------------


def slow_box(prediction: str) -> list[Fraction] | None:
    """What is left after the brackets and then a character at each end have gone, as exact numbers."""
    left = [character for character in prediction if character not in "[]"]
    parts = "".join(left[1 : len(left) - 1]).split(",")
    if len(parts) != 4:
        return None
    try:
        return [Fraction(part.strip()) for part in parts]
    except ValueError:
        return None


def exact_iou(first: list[Fraction], second: list[Fraction]) -> Fraction:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = width * height if width > 0 and height > 0 else Fraction(0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - shared
    return shared / union if union > 0 else Fraction(0)


CORNERS = st.lists(st.integers(0, 100), min_size=4, max_size=4)
BOXES = CORNERS.map(lambda box: [*map(min, box[:2], box[2:]), *map(max, box[:2], box[2:])])


def near(box: list[int]) -> st.SearchStrategy[list[int]]:
    """Boxes that overlap this one by more than a half, or by a little less: two drawn apart hardly ever do."""
    return st.tuples(*(st.integers(max(0, edge - 12), min(100, edge + 12)) for edge in box)).map(list)


PAIRS = st.tuples(CORNERS, CORNERS) | BOXES.flatmap(lambda box: st.tuples(near(box), st.just(box)))


@given(PAIRS, st.sampled_from([[640, 480], [333, 500], [1, 1]]))
@example(([0, 0, 100, 67], [0, 0, 100, 67]), [640, 480])
def test_coin_grounding_equals_the_exact_slow_version(pair: tuple[list[int], list[int]], size: list[int]) -> None:
    said, truth = pair
    told = "[" + ",".join(str(value / 100) for value in said) + "]"
    box = slow_box(told)
    reference = {"answer_bbox": "[" + ",".join(str(value / 100) for value in truth) + "]", "size": size}
    overlap = Fraction(0) if box is None else exact_iou(box, [Fraction(value, 100) for value in truth])
    if abs(overlap - Fraction(1, 2)) > Fraction(1, 10**9):
        assert scorer("coin/grounding")(told, reference) == (overlap > Fraction(1, 2))


@given(PAIRS)
def test_corrected_grounding_equals_exact_overlap(pair: tuple[list[int], list[int]]) -> None:
    said, truth = pair
    x0, x1 = sorted((truth[0], truth[2]))
    y0, y1 = sorted((truth[1], truth[3]))
    told = "[" + ", ".join(str(value / 100) for value in said) + "]"
    reference = {"answer_bbox": [x0 / 100, y0 / 100, x1 / 100, y1 / 100], "size": [640, 480]}
    box = [Fraction(value, 100) for value in said]
    overlap = exact_iou(box, [Fraction(value, 100) for value in (x0, y0, x1, y1)])
    if abs(overlap - Fraction(1, 2)) > Fraction(1, 10**9):
        assert scorer("corrected/grounding")(told, reference) == (overlap > Fraction(1, 2))


def test_the_slice_eats_the_last_digit() -> None:
    # 0.67 is read as 0.6, and (0.6 - 0.5) / (0.69 - 0.5) is more than a half all the same; of 0.71 it is less.
    for last, coin in (("0.69", 1), ("0.71", 0)):
        truth = {"answer_bbox": f"[0.1,0.5,0.9,{last}]", "size": [640, 480]}
        assert scorer("coin/grounding")("[0.1,0.5,0.9,0.67]", truth) == coin
        assert scorer("corrected/grounding")("[0.1,0.5,0.9,0.67]", truth) == 1


@pytest.mark.parametrize(
    ("prediction", "coin", "corrected", "tolerant"),
    [
        ("[0.25,0.25,0.75,0.75]", 1, 1, 1), ("[0.25, 0.25, 0.75, 0.75]", 1, 1, 1), ("0.25,0.25,0.75,0.75", 1, 0, 1),
        ("[0.25,0.25,0.75,0.75].", 1, 0, 1), ("[[0.25,0.25,0.75,0.75]]", 1, 0, 1), ("[-.25,.25,.75,.75]", 1, 0, 0),
        ("x0.25,0.25,0.75,0.75x", 1, 0, 0), ("[25,25,75,75]", 0, 0, 1), ("[0.75,0.75,0.25,0.25]", 0, 0, 1),
        ("[nan,0.25,0.75,0.75]", 0, 0, 0), ("[0.25,0.25,inf,0.75]", 0, 0, 0), ("[-0.0,-0.0,1,1]", 0, 0, 0),
        ("[0.25,0.25,0.75]", 0, 0, 0), ("[0.25,0.25,0.75,0.75,0.8]", 0, 0, 0), ("[0.25,0.25,0.75,1_0]", 0, 0, 0),
        ("", 0, 0, 0), ("[]", 0, 0, 0), ("the dog", 0, 0, 0), ("[1e-1,0.25,75e-2,0.75]", 0, 0, 0),
    ],
)  # fmt: skip
def test_grounding(prediction: str, coin: int, corrected: int, tolerant: int) -> None:
    assert scorer("coin/grounding")(prediction, RECORDS["Grounding"]) == coin
    assert scorer("corrected/grounding")(prediction, RECORDS["Grounding"]) == corrected
    assert lenient("corrected/grounding")(prediction, RECORDS["Grounding"]) == tolerant


def test_exactly_one_half_is_not_enough() -> None:
    reference = {"answer_bbox": "[0,0,1,1]", "size": [8, 8]}
    assert scorer("corrected/grounding")("[0,0,1,0.5]", reference) == 0
    assert scorer("coin/grounding")("[00,0,1,0.50]", reference) == 0
    assert scorer("coin/grounding")("[00,0,1,0.510]", reference) == 1


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"size": [4, 3]}, "'bbox' must be|'answer_bbox' must be"),
        ({"answer_bbox": "[0,0,1]", "size": [4, 3]}, "'answer_bbox' must be four numbers"),
        ({"answer_bbox": "[0,0,1,x]", "size": [4, 3]}, "'answer_bbox' must be four numbers"),
        ({"answer_bbox": "[0,0,nan,1]", "size": [4, 3]}, "'answer_bbox' must be four numbers"),
        ({"answer_bbox": "[0,0,1,1]", "size": [4]}, "'size' must be"),
        ({"answer_bbox": "[0,0,1,1]", "size": [0, 3]}, "'size' must be"),
        ({"answer_bbox": "[0,0,1,1]", "size": [math.nan, 3]}, "'size' must be"),
        ({"answer_bbox": "[0,0,1,1]", "size": "[4,3]"}, "'size' must be"),
    ],
)
def test_grounding_refuses_references(reference: dict[str, object], message: str) -> None:
    for rule in ("coin/grounding", "corrected/grounding"):
        with pytest.raises(DymoeError, match=message):
            scorer(rule)("[0,0,1,1]", reference)


def test_corrected_grounding_wants_boxes_of_the_square_and_coins_rule_does_not() -> None:
    pixels = {"answer_bbox": "[10,20,110,220]", "size": [640, 480]}
    assert scorer("coin/grounding")("[10,20,110,220]", pixels) == 0
    assert scorer("coin/grounding")("[010,20,110,2200]", pixels) == 1
    with pytest.raises(DymoeError, match="divided by the long side"):
        scorer("corrected/grounding")("[10,20,110,220]", pixels)
    rounded = {"answer_bbox": "[0.5,0.2,1.01,0.2]", "size": [640, 480]}
    assert scorer("corrected/grounding")("[0.5,0.2,1.01,0.2]", rounded) == 0
