import itertools
import math
import re
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dymoe.errors import DymoeError
from dymoe.tasks import scoring
from dymoe.tasks.scoring import lenient, names, scorer
from dymoe.tasks.scoring.iou import iou
from dymoe.tasks.scoring.text import contains_words, process_answer, same_answer

REFERENCES = {
    "letter": {"answer": "B", "choices": ["bird", "machine", "mammal"]},
    "soft_accuracy": {"answer": "stop", "answers": ["stop"] * 6 + ["stop sign"] * 3 + ["yes"]},
    "exact_match": {"answer": "yes"},
    "iou": {"answer": "[0.25,0.25,0.75,0.75]", "bbox": [0.25, 0.25, 0.75, 0.75]},
    "token_f1": {"answer": "a photo of a ship"},
    "containment": {"answer": "14"},
}
ODD = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="ABCDEabcde.()[], \n-0123456789", max_size=40),
    st.sampled_from(["", " ", "nan", "[nan,nan,nan,nan]", "[inf,0,1,1]", "[-0.0,-0,1,1]", "[" * 50, "\x00"]),
    st.lists(st.floats(), min_size=3, max_size=5).map(str),
)


@pytest.mark.parametrize("name", REFERENCES)
@given(prediction=ODD)
@example(prediction="9" * 5000)
@example(prediction="٠.٢٥ ②")
@example(prediction="[0.25,0.25,0.75,0.75]" * 300)
def test_any_prediction_scores_between_0_and_1_and_lenient_never_less(name: str, prediction: str) -> None:
    strict = scorer(name)(prediction, REFERENCES[name])
    tolerant = lenient(name)(prediction, REFERENCES[name])
    assert 0.0 <= strict <= tolerant <= 1.0


@pytest.mark.parametrize("name", REFERENCES)
def test_the_empty_prediction_is_wrong(name: str) -> None:
    for prediction in ("", "  \n", "."):
        assert scorer(name)(prediction, REFERENCES[name]) == 0
        assert lenient(name)(prediction, REFERENCES[name]) == 0


@pytest.mark.parametrize("name", names())
@settings(max_examples=50)
@given(
    reference=st.dictionaries(
        st.sampled_from(["answer", "answers", "choices", "bbox", "answer_bbox", "size"]),
        st.one_of(
            st.none(),
            st.text(max_size=3),
            st.floats(),
            st.integers(),
            st.lists(st.floats(), max_size=5),
            st.lists(st.dictionaries(st.just("answer"), st.text(max_size=2)), max_size=10),
            st.sampled_from(["[0,0,1,1]", "[nan,0,1,1]", "[0,1]", [640, 10**400], [640, -1], [True, 3]]),
            st.lists(st.text(max_size=2)),
        ),
    )
)
def test_any_reference_scores_or_raises_the_one_error(name: str, reference: dict[str, object]) -> None:
    for rule in (scorer(name), lenient(name)):
        try:
            outcome: object = rule("B", reference)
        except DymoeError as error:
            outcome = str(error)
        readable = isinstance(outcome, float) and 0.0 <= outcome <= 1.0
        assert readable or str(outcome).startswith("reference: ")


def test_an_unknown_rule_names_the_nearest() -> None:
    for find in (scorer, lenient):
        with pytest.raises(DymoeError, match="unknown scoring rule 'exact-match'; did you mean exact_match"):
            find("exact-match")


# --- letter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "strict", "tolerant"),
    [
        ("B", 1, 1), (" b ", 1, 1), ("B.", 1, 1), ("(B)", 1, 1), ("B. machine", 1, 1), ("B) it is", 1, 1),
        ("machine", 0, 1), ("Machine.", 0, 1), ("The answer is B", 0, 1), ("answer: b", 0, 1), ("It is (B).", 0, 1),
        ("A", 0, 0), ("A. machine", 0, 0), ("bird", 0, 0), ("a machine", 0, 1), ("a bird", 0, 0), ("D", 0, 0),
        ("machine or bird", 0, 0), ("B or C", 0, 0), ("B or (C)", 0, 0), ("It is A", 0, 0), ("B. or A.", 1, 1),
        ("Because", 0, 0),
        ("I'd B", 0, 1),
        ("machinery", 0, 0),
    ],
)  # fmt: skip
def test_letter(prediction: str, strict: int, tolerant: int) -> None:
    assert scorer("letter")(prediction, REFERENCES["letter"]) == strict
    assert lenient("letter")(prediction, REFERENCES["letter"]) == tolerant


def test_letter_takes_an_index_for_the_answer() -> None:
    assert scorer("letter")("B", {"answer": 1, "choices": ["x", "y"]}) == 1
    assert scorer("letter")("A", {"answer": 1, "choices": ["x", "y"]}) == 0


def test_letter_needs_no_choices_and_a_choice_within_another_is_one_hit() -> None:
    assert scorer("letter")("E", {"answer": "E"}) == 1
    assert lenient("letter")("sea horse", {"answer": "B", "choices": ["horse", "sea horse"]}) == 1
    assert lenient("letter")("sea horse", {"answer": "A", "choices": ["horse", "sea horse"]}) == 0


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({}, "must be one letter of A to E or its index 0 to 4, not None"),
        ({"answer": "F"}, "not 'F'"),
        ({"answer": "b"}, "not 'b'"),
        ({"answer": 5}, "not 5"),
        ({"answer": -1}, "not -1"),
        ({"answer": True}, "not True"),
        ({"answer": 2, "choices": ["x", "y"]}, "the answer is C, but there are only 2 choices"),
        ({"answer": "C", "choices": ["x", "y"]}, "the answer is C, but there are only 2 choices"),
        ({"answer": "A", "choices": "xy"}, "must be a list of texts"),
        ({"answer": "A", "choices": list("abcdef")}, "6 choices, at most 5"),
    ],
)
def test_letter_refuses_references(reference: dict[str, object], message: str) -> None:
    with pytest.raises(DymoeError, match=message):
        scorer("letter")("A", reference)


# --- soft accuracy -----------------------------------------------------------------------------------------


def leave_one_out(said: str, answers: list[str]) -> float:
    """The definition, word for word."""
    scores = []
    for left_out in range(len(answers)):
        others = [answer for index, answer in enumerate(answers) if index != left_out]
        scores.append(min(1.0, sum(other == said for other in others) / 3))
    return sum(scores) / len(scores)


@given(st.lists(st.sampled_from(["cat", "dog", "7"]), min_size=10, max_size=10), st.sampled_from(["cat", "7", "x"]))
def test_soft_accuracy_is_the_mean_over_leaving_one_out(answers: list[str], said: str) -> None:
    assert scorer("soft_accuracy")(said, {"answers": answers}) == pytest.approx(leave_one_out(said, answers))


@pytest.mark.parametrize(("matches", "expected"), enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]))
def test_soft_accuracy_by_number_of_matches(matches: int, expected: float) -> None:
    answers = ["cat"] * matches + [f"other{number}" for number in range(10 - matches)]
    assert scorer("soft_accuracy")("cat", {"answers": answers}) == pytest.approx(expected)


def test_soft_accuracy_lenient_takes_the_answer_out_of_a_sentence() -> None:
    reference = {"answers": ["stop"] * 8 + ["halt"] * 2}
    assert scorer("soft_accuracy")("The sign says STOP!", reference) == 0
    assert lenient("soft_accuracy")("The sign says STOP!", reference) == 1
    assert lenient("soft_accuracy")("it says halt", reference) == pytest.approx(0.6)
    assert lenient("soft_accuracy")("stopping", reference) == 0
    assert lenient("soft_accuracy")("stop " + "word " * 60, reference) == 0
    assert lenient("soft_accuracy")("yes or no", {"answers": ["yes"] * 10}) == 0


@pytest.mark.parametrize(
    ("reference", "message"),
    [({}, "must be a list of 10 texts"), ({"answers": ["a"] * 3}, "must hold 10 texts, it holds 3"),
     ({"answers": [1] * 9 + [None]}, "must be a list of 10 texts"),
     ({"answers": [float("nan")] * 10}, "must be a list of 10 texts")],
)  # fmt: skip
def test_soft_accuracy_refuses_references(reference: dict[str, object], message: str) -> None:
    with pytest.raises(DymoeError, match=message):
        scorer("soft_accuracy")("a", reference)


def test_soft_accuracy_takes_the_mappings_of_the_published_files() -> None:
    answers = [{"answer": "cat", "answer_confidence": "yes"}] * 2 + [{"answer": "dog", "answer_id": 3}] * 8
    assert scorer("soft_accuracy")("cat", {"answers": answers}) == pytest.approx(0.6)


# --- answer processing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "processed"),
    [
        ("The Dog.", "dog"), ("two", "2"), ("None", "0"), ("ten", "10"), ("dont", "don't"), ("1,000", "1000"),
        ("what?", "what"), ("dog's", "dog 's"), ("red/blue", "red blue"), ("red / blue", "red blue"),
        ("a\nb\tc", "b c"), ("3.5", "3.5"), ("u.s.", "us"), ("", ""), ("an apple", "apple"), ("x-ray", "x ray"),
    ],
)  # fmt: skip
def test_process_answer(raw: str, processed: str) -> None:
    assert process_answer(raw) == processed


def slow_process(answer: str) -> str:
    """The published steps, one character at a time."""
    marks = ';/[]"{}()=+\\_-><@`,?!'
    text = "".join(letter for letter in answer.lower() if letter not in ",?")
    text = "".join(
        " 's" if text[at : at + 2] == "'s" else text[at]
        for at in range(len(text))
        if text[at - 1 : at + 1] != "'s" or not at
    )
    text = "".join(" " if letter in "\n\t" else letter for letter in text).strip()
    gone = {mark for mark in marks if any(text[at : at + 2] in (mark + " ", " " + mark) for at in range(len(text)))}
    text = "".join("" if letter in gone else " " if letter in marks else letter for letter in text)
    kept, dropped = "", 0
    for at, letter in enumerate(text):
        loose = letter == "." and not re.match(r"\d", text[at + 1 : at + 2]) and dropped < 32
        dropped += loose
        kept += "" if loose else letter
    named = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    digits = dict(zip(named, [0, *range(11)], strict=True))
    words = [str(digits.get(word, word)) for word in kept.split()]
    shortened = {"dont": "don't", "couldnt've": "couldn't've", "couldn'tve": "couldn't've", "twas": "'twas"}
    return " ".join(shortened.get(word, word) for word in words if word not in ("a", "an", "the"))


@given(
    st.one_of(
        st.text(alphabet="ab1'sS.,?!;/- \n\t_", max_size=30),
        st.lists(
            st.sampled_from(["the", "Two", "dont", "couldn'tve", "dog's", "x-ray", "3.5", "...", "a", "none", "1,000"]),
            max_size=6,
        ).map(" ".join),
    )
)
@example("." * 40)
@example("'s's s's")
def test_processing_equals_the_steps_one_character_at_a_time(text: str) -> None:
    assert process_answer(text) == slow_process(text)


@pytest.mark.parametrize(
    ("bare", "written"),
    [
        ("dont", "don't"), ("cant", "can't"), ("wont", "won't"), ("isnt", "isn't"), ("youre", "you're"),
        ("theyve", "they've"), ("itll", "it'll"), ("couldve", "could've"), ("oclock", "o'clock"), ("yall", "y'all"),
        ("hadnt've", "hadn't've"), ("hadn'tve", "hadn't've"), ("yall'd've", "y'all'd've"),
    ],
)  # fmt: skip
def test_contractions_get_their_apostrophe_back(bare: str, written: str) -> None:
    assert process_answer(bare) == process_answer(written) == written


def test_an_s_with_an_apostrophe_is_split_off_so_whats_and_what_s_differ_as_published() -> None:
    assert process_answer("whats") == "what's"
    assert process_answer("what's") == "what 's"


def test_words_of_their_own_are_no_contractions() -> None:
    for word in ("id", "ill", "its", "lets", "shed", "shell", "wed", "well", "were", "hell"):
        assert process_answer(word) == word


@given(st.text(alphabet="abA. ", max_size=6), st.text(alphabet="abA. ", max_size=6))
def test_same_answer_is_symmetric_up_to_answers_that_vanish(first: str, second: str) -> None:
    if process_answer(first) or process_answer(second):
        assert (
            same_answer(first, second)
            == same_answer(second, first)
            == (process_answer(first) == process_answer(second))
        )
    assert same_answer(first, first.upper())


@given(st.text(max_size=40))
def test_processed_answers_are_lower_case_words_without_articles(text: str) -> None:
    words = process_answer(text).split(" ")
    assert not {"a", "an", "the"} & set(words)
    assert process_answer(text) == " ".join(process_answer(text).split())


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=3))
def test_contains_words_is_containment_of_padded_text(text: list[str], phrase: list[str]) -> None:
    expected = bool(phrase) and f" {' '.join(phrase)} " in f" {' '.join(text)} "
    assert contains_words(" ".join(text), " ".join(phrase)) == expected


# --- exact match -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "strict", "tolerant"),
    [("yes", 1, 1), ("Yes.", 1, 1), (" YES ", 1, 1), ("yes, it is", 0, 1), ("yes and no", 0, 0), ("no", 0, 0),
     ("yesterday", 0, 0), ("yes..", 0, 1)],
)  # fmt: skip
def test_exact_match(prediction: str, strict: int, tolerant: int) -> None:
    assert scorer("exact_match")(prediction, {"answer": "yes"}) == strict
    assert lenient("exact_match")(prediction, {"answer": "yes"}) == tolerant


@given(st.text(alphabet=string.ascii_letters + " .", min_size=1, max_size=12), st.text(max_size=12))
def test_exact_match_oracle(answer: str, prediction: str) -> None:
    def plain(text: str) -> str:
        text = text.strip()
        return (text[:-1] if text.endswith(".") else text).strip().lower()

    if answer.strip():
        assert scorer("exact_match")(prediction, {"answer": answer}) == (plain(prediction) == plain(answer))
        assert scorer("exact_match")(answer.swapcase(), {"answer": answer}) == 1


@pytest.mark.parametrize("answer", [None, "", "  ", True, float("nan"), float("inf"), [3]])
def test_exact_match_refuses_references(answer: object) -> None:
    with pytest.raises(DymoeError, match="'answer' must be a text that is not empty"):
        scorer("exact_match")("a", {"answer": answer})


def test_a_number_is_read_as_the_text_that_is_learned_in_its_place() -> None:
    for rule in ("exact_match", "corrected/vqav2", "corrected/imagenet", "coin/vqav2", "coin/ocrvqa"):
        assert scorer(rule)("3", {"answer": 3}) == 1
        assert scorer(rule)("3", {"answer": 3, "answers": None}) == 1, "a column without a value is no value"
        assert scoring.rule(rule).right({"answer": 2.5}) == "2.5"
    assert scorer("soft_accuracy")("3", {"answers": [3] * 10}) == 1
    assert scorer("letter")("B", {"answer": 1.0, "choices": [10, 20]}) == 1
    assert scoring.rule("letter").right({"answer": 1, "choices": None}) == "B"
    assert scorer("iou")("[0,0,1,1]", {"answer_bbox": None, "bbox": [0, 0, 1, 1], "size": None}) == 1


@pytest.mark.parametrize("name", names())
def test_what_a_rule_wants_said_is_right(name: str) -> None:
    if name.endswith("grounding") or name == "iou":
        reference: dict[str, object] = {"answer": "[0.10,0.20,0.50,0.60]", "bbox": [0.1, 0.2, 0.5, 0.6]}
        reference |= {"answer_bbox": "[0.10,0.20,0.50,0.60]", "size": [9, 9]}
    else:
        index = name == "letter" or name.endswith("scienceqa")
        right = "no" if name == "pope" else "owl"
        reference = {"answer": 1 if index else right, "choices": ["hen", "owl"], "answers": ["owl"] * 10}
    assert scorer(name)(scoring.rule(name).right(reference), reference) > 0


# --- boxes -------------------------------------------------------------------------------------------------


def counted_iou(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """IoU of integer boxes by counting unit cells."""
    cells = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (first, second)]
    union = cells[0] | cells[1]
    return len(cells[0] & cells[1]) / len(union) if cells[0] and cells[1] else 0.0


def test_iou_equals_counting_cells_on_every_small_pair() -> None:
    edges = [(low, high) for low in range(4) for high in range(4)]
    boxes = [(x0, y0, x1, y1) for (x0, x1), (y0, y1) in itertools.product(edges, edges)]
    for first in boxes[::3]:
        for second in boxes[::2]:
            assert iou(first, second) == pytest.approx(counted_iou(first, second))


@pytest.mark.parametrize(
    ("prediction", "strict", "tolerant"),
    [
        ("[0.25,0.25,0.75,0.75]", 1, 1), ("[ .25, 0.25 ,0.75, 0.8 ]", 1, 1), ("0.25,0.25,0.75,0.75", 0, 1),
        ("(0.25; 0.25; 0.75; 0.75)", 0, 1), ("[25, 25, 75, 75]", 0, 1), ("[0.75,0.75,0.25,0.25]", 0, 1),
        ("The box is [0.25,0.25,0.75,0.75].", 0, 1), ("[0.25,0.25,0.75]", 0, 0), ("[0.5,0.25,1.0,0.75]", 0, 0),
        ("[0.25,0.25,0.75,0.5]", 0, 0), ("[0.25,0.25,0.75,0.50001]", 1, 1), ("[nan,0,1,1]", 0, 0),
        ("[0,0,inf,1]", 0, 0), ("[0.25,0.25,0.75,0.75", 0, 1), ("[[0.25,0.25,0.75,0.75]]", 0, 1),
        ("[-0,-0.0,1,1]", 0, 0), ("[" + "9" * 400 + ",0,1,1]", 0, 0),
    ],
)  # fmt: skip
def test_box(prediction: str, strict: int, tolerant: int) -> None:
    assert scorer("iou")(prediction, REFERENCES["iou"]) == strict
    assert lenient("iou")(prediction, REFERENCES["iou"]) == tolerant


def test_half_is_not_enough() -> None:
    reference = {"bbox": [0, 0, 1, 1]}
    assert iou((0, 0, 1, 0.5), (0, 0, 1, 1)) == 0.5
    assert scorer("iou")("[0,0,1,0.5]", reference) == 0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=4, max_size=4))
def test_iou_is_symmetric_and_bounded_for_any_floats(values: list[float]) -> None:
    box = (values[0], values[1], values[2], values[3])
    truth = (0.0, 0.0, 1.0, 1.0)
    result = iou(box, truth)
    assert result == iou(truth, box)
    assert 0.0 <= result <= 1.0
    assert math.isfinite(result)


@pytest.mark.parametrize("box", [None, "0,0,1,1", [0, 0, 1], [0, 0, 1, 2], [0.5, 0, 0.5, 1], [0, 0, math.nan, 1]])
def test_box_refuses_references(box: object) -> None:
    with pytest.raises(DymoeError, match="'bbox' must be four numbers"):
        scorer("iou")("[0,0,1,1]", {"bbox": box})


# --- token F1, containment, POPE -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "strict", "tolerant"),
    [
        ("a photo of a ship", 1, 1), ("Photo, ship.", 1, 1), ("ship", 2 / 3, 2 / 3), ("a photo of a dog", 1 / 2, 1 / 2),
        ("a photo of a ship and a dog", 4 / 5, 1), ("ship ship ship", 2 / 5, 1 / 2), ("of a", 0, 0), ("", 0, 0),
        ("photo " + "ship " * 30, 4 / 33, 4 / 33),
    ],
)  # fmt: skip
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(prediction: str, strict: float, tolerant: float) -> None:
    reference = {"answer": "a photo of a ship"}
    assert scorer("token_f1")(prediction, reference) == pytest.approx(strict)
    assert lenient("token_f1")(prediction, reference) == pytest.approx(tolerant)


WORDS = st.lists(st.sampled_from(["cat", "dog", "red", "the", "on", "4"]), max_size=8).map(" ".join)


@given(said=WORDS, wanted=WORDS.filter(lambda text: set(text.split()) - {"the", "on"}))
def test_token_f1_against_counting_one_by_one(said: str, wanted: str) -> None:
    one = [word for word in said.split() if word not in ("the", "on")]
    other = [word for word in wanted.split() if word not in ("the", "on")]
    rest, shared = list(other), 0
    for word in one:
        if word in rest:
            rest.remove(word)
            shared += 1
    expected = 0.0
    if shared:
        precision, recall = shared / len(one), shared / len(other)
        expected = 2 * precision * recall / (precision + recall)
    assert scorer("token_f1")(said, {"answer": wanted}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("14", 1), ("7 + 7 = 14", 1), ("7 + 7 = 12", 0), ("114", 0), ("The answer is 14.", 1), ("", 0)],
)
def test_containment_wants_the_answer_as_a_word_of_its_own(prediction: str, right: int) -> None:
    assert scorer("containment")(prediction, {"answer": "14"}) == lenient("containment")(prediction, {"answer": "14"})
    assert scorer("containment")(prediction, {"answer": "14"}) == right


# What the published script makes of an answer, worked out by hand: only a No, not or no between single spaces before
# the first period, commas aside, is a no.
POPE = {
    "Yes, there is.": "yes", "No, there is not.": "no", "no": "no", "There is not a dog": "no", "NO": "yes",
    "no!": "yes", "": "yes", "I see. No dog": "yes", "No\nthere is none": "yes", "Not at all": "yes",
    "a dog,no": "yes", "none": "yes",
}  # fmt: skip


@pytest.mark.parametrize("prediction", POPE)
def test_pope_reads_as_the_published_script_does(prediction: str) -> None:
    for label in ("yes", "no"):
        assert scorer("pope")(prediction, {"answer": label}) == (POPE[prediction] == label)
        assert lenient("pope")(prediction, {"answer": label}) >= scorer("pope")(prediction, {"answer": label})
    assert lenient("pope")("NO!", {"answer": "no"}) == 1
    assert lenient("pope")("yes and no", {"answer": "no"}) == 1  # strictly a no
    assert lenient("pope")("NO, I mean YES", {"answer": "no"}) == 0
    assert not scoring.rule("pope").readable("perhaps", {"answer": "no"})
    assert scoring.rule("pope").readable("Yes.", {"answer": "no"})


def test_pope_refuses_a_label_that_is_neither() -> None:
    with pytest.raises(DymoeError, match="reference: 'answer' must be yes or no, not 'maybe'"):
        scorer("pope")("yes", {"answer": "maybe"})


@given(st.lists(st.tuples(st.sampled_from(sorted(POPE)), st.sampled_from(["yes", "no"])), min_size=1, max_size=12))
def test_popes_measures_are_counted_as_defined(pairs: list[tuple[str, str]]) -> None:
    counts = {(said, label): 0 for said in ("yes", "no") for label in ("yes", "no")}
    for prediction, label in pairs:
        counts[POPE[prediction], label] += 1
    hit, false, missed = counts["yes", "yes"], counts["yes", "no"], counts["no", "yes"]
    found = scoring.rule("pope").measures([text for text, _ in pairs], [{"answer": label} for _, label in pairs])
    assert found["yes ratio"] == pytest.approx(100 * (hit + false) / len(pairs))
    assert found["precision"] == pytest.approx(100 * hit / (hit + false) if hit + false else 0)
    assert found["recall"] == pytest.approx(100 * hit / (hit + missed) if hit + missed else 0)
    assert found["F1"] == pytest.approx(100 * hit / (hit + (false + missed) / 2) if hit + false + missed else 0)
    assert scoring.rule("exact_match").measures(["a"], [{"answer": "a"}]) == {}
