"""Records and files as other tools write them: what is unambiguous is read, the rest refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dymoe.errors import DymoeError
from dymoe.tasks import load_stream
from dymoe.tasks.llava import Names, parse, reference
from dymoe.tasks.recordfile import read_records
from dymoe.tasks.scoring import scorer
from dymoe.tasks.scoring.runner import score_files
from tests.tasks import coin_tree as tree


def human(text: Any) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


PART = {"type": "image", "image": None, "text": None}  # as a row of parquet has it
SAID = {"type": "text", "text": "q", "image": None}
ASKED = [human("<image>\nq"), gpt("a")]
CHAT = [{"role": "user", "content": "<image>\nq"}, {"role": "assistant", "content": "a"}]
#: Forms of one and the same record: a picture a.jpg, the question q, the answer a.
SAME: dict[str, dict[str, Any]] = {
    "llava": {"image": "a.jpg", "conversations": ASKED},
    "a list of one": {"image": ["a.jpg"], "conversations": ASKED},
    "images": {"images": ["a.jpg"], "conversations": ASKED},
    "images, a text": {"images": "a.jpg", "conversations": ASKED},
    "both, agreeing": {"image": "a.jpg", "images": ["a.jpg"], "conversations": ASKED},
    "path": {"image": {"bytes": None, "path": "a.jpg"}, "conversations": ASKED},
    "messages": {"images": ["a.jpg"], "messages": CHAT},
    "messages beside conversations": {"image": "a.jpg", "messages": CHAT, "conversations": ASKED},
    "columns without a value": {
        "image": "a.jpg",
        "images": None,
        "messages": None,
        "text": None,
        "conversations": ASKED,
    },
    "roles in conversations": {"image": "a.jpg", "conversations": CHAT},
    "capitals": {"image": "a.jpg", "conversations": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]},
    "parts": {"image": "a.jpg", "messages": [{"role": "user", "content": [PART, SAID]}, CHAT[1]]},
    "parts in value": {"image": "a.jpg", "conversations": [human([PART, SAID]), gpt("a")]},
    "the picture in its part": {
        "messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, SAID]}, CHAT[1]]
    },
    "an answer of parts": {
        "image": "a.jpg",
        "messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
    },
    "a system message": {"image": "a.jpg", "messages": [{"role": "system", "content": "be short"}, *CHAT]},
    "no token": {"image": "a.jpg", "conversations": [human("q"), gpt("a")]},
    "token at the end": {"image": "a.jpg", "conversations": [human("q\n<image>"), gpt("a")]},
    "a question": {"image": "a.jpg", "text": "q", "answer": "a"},
    "a question with images": {"images": ["a.jpg"], "text": "<image>\nq", "answer": "a"},
}


@pytest.mark.parametrize("form", SAME)
@pytest.mark.parametrize("test", [False, True])
def test_one_record_in_many_forms(form: str, test: bool) -> None:
    record = parse({"id": 1, **SAME[form]}, test)
    assert (record.id, record.image, record.data, record.question, record.answer) == ("1", "a.jpg", None, "q", "a")
    assert not {"images", "messages", "image", "conversations", "text"} & record.fields.keys()
    identity, told = reference({"id": 1, **SAME[form]})
    assert (identity, told["answer"]) == ("1", "a")


TEXT = {"text": "q", "answer": "a"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"conversations": ASKED}, "'image' is missing: <image> stands in the text"),
    ({"text": "<image> q", "answer": "a", "images": []}, "'image' is missing"),
    ({"messages": CHAT, "image": None}, "'image' is missing"),
    ({"messages": [{"role": "user", "content": [PART, SAID]}, CHAT[1]]}, "'image' is missing"),
    ({"image": "a.jpg", "conversations": [human("<image>\n<image>\nq"), gpt("a")]}, "stands 2 times in the text"),
    ({"image": "a.jpg", "conversations": [*ASKED, human("<image> and?"), gpt("b")]}, "stands 2 times"),
    ({"image": "a.jpg", "conversations": [human("q"), gpt("a"), human("<image>r"), gpt("b")]}, "in a later question"),
    ({"images": ["a.jpg", "b.jpg"], "conversations": ASKED}, "found 2; several pictures a sample are not supported"),
    ({"image": "a.jpg", "images": ["b.jpg"], **TEXT}, "'image' and 'images' name other pictures"),
    ({"image": "a.jpg", "images": ["a.jpg", "a.jpg"], **TEXT}, "'image' and 'images' name other pictures"),
    (
        {"image": "b.jpg", "messages": SAME["the picture in its part"]["messages"]},
        "'image' and 'messages' name other pictures",
    ),
    (
        {"image": "a.jpg", "conversations": ASKED, "messages": [CHAT[0], {"role": "assistant", "content": "b"}]},
        "say two",
    ),
    ({"image": "a.jpg", "messages": [{"role": "user", "content": [{"type": "video"}]}, CHAT[1]]}, "expected parts"),
    ({"image": "a.jpg", "messages": [{"role": "tool", "content": "q"}, CHAT[1]]}, "found 'tool' where human speaks"),
    ({"image": "a.jpg", "messages": [{"role": "user"}, CHAT[1]]}, "question 1: expected a text, found NoneType"),
    ({"videos": ["a.mp4"], **TEXT}, "'videos': only pictures are shown"),
    ({"conversation": ASKED}, "neither 'conversations' nor 'text' nor 'messages'"),
    ({"instruction": "q", "input": "", "output": "a"}, "neither 'conversations' nor 'text' nor 'messages'"),
    ({"query": "q", "response": "a", "images": ["a.jpg"]}, "neither 'conversations' nor 'text' nor 'messages'"),
    *(
        ({"image": "a.jpg", "text": f"{mark}\nq", "answer": "a"}, "the picture belongs under 'image' or 'images'")
        for mark in ("<img>a.jpg</img>", "<img>", "<|image_1|>", "<|image_pad|>", "<Image>", "< image >", "<image_1>")
    ),
    ({"text": "Picture 1: <img>a.jpg</img> q", "answer": "a"}, "the picture belongs under 'image'"),
    ({"text": "<|image_1|> q", "answer": "a"}, "the picture belongs under 'image'"),
    *(
        ({"image": empty, **TEXT}, message)
        for empty, message in [
            ("", "'image': it is empty"),
            ("  \n", "'image': it is empty"),
            (b"", "'image': it is empty"),
            ([""], "'image': it is empty"),
            ({"bytes": b"", "path": ""}, "'image': it is empty"),
            ({"bytes": None, "path": " "}, "'image': it is empty"),
            ({"bytes": b"", "path": "a.jpg"}, "'image': it is empty"),
            ({"bytes": None, "path": None}, "'image': expected one path"),
            ([None], "'image': expected one path"),
            (float("nan"), "'image': nan stands for a missing value"),
            ([float("nan")], "'image': nan stands for a missing value"),
            ({"path": float("nan")}, "'image': nan stands for a missing value"),
            ("https://example.org/a.jpg", "nothing is fetched"),
            ("data:image/png;base64,AAAA", "nothing is fetched"),
            ("iVBOR" * 9000, "nothing is fetched"),
            (0, "'image': expected one path"),
        ]
    ),
    *(
        ({**TEXT, key: value}, f"{key!r}: ")
        for key, value in [
            ("answer", float("nan")),
            ("answer", float("inf")),
            ("answer", ""),
            ("answer", True),
            ("answer", ["cat"]),
            ("answer", {"a": 1}),
            ("text", float("nan")),
            ("id", float("nan")),
            ("answers", ["a"] * 9 + [float("nan")]),
            ("answers", ["a"] * 9 + [None]),
            ("answers", ["a"] * 9 + [""]),
            ("answers", [{"answer": " "}]),
            ("choices", ["a", None]),
            ("choices", ["a", ""]),
            ("choices", ["a", float("nan")]),
            ("bbox", [0.1, 0.2, float("nan"), 0.5]),
            ("answer_bbox", [0.1, 0.2, float("inf"), 0.5]),
            ("size", [640, float("nan")]),
            ("more", {"deep": [[{"x": float("-inf")}]]}),
            ("more", 1 << 20000),
        ]
    ),
    ({**TEXT, "answer": None}, "neither 'answer' nor 'answer_bbox'"),
    ({**TEXT, "id": 1.5}, "neither 'id' nor 'question_id' is a text or a whole number"),
    ({**TEXT, "id": " "}, "neither 'id' nor 'question_id'"),
    ({**TEXT, "id": 1e300}, "neither 'id' nor 'question_id'"),
    ({**TEXT, "id": None}, "neither 'id' nor 'question_id'"),
]


@pytest.mark.parametrize(("record", "message"), REFUSED, ids=[str(place) for place in range(len(REFUSED))])
def test_what_is_ambiguous_or_missing_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DymoeError) as caught:
        parse({"id": 1, **record}, test=False)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_word_that_looks_like_a_missing_value_is_a_word() -> None:
    for word in ("nan", "None", "null", "N/A", "inf"):
        assert parse({"id": word, "text": "q", "answer": word}, True).answer == word
    assert parse({"id": 1, "text": "What does the <img> tag do?", "answer": "a"}, True).question.startswith("What")
    assert parse({"id": 2.0, "text": "q", "answer": 12345678901234567890}, True).id == "2"


def test_deep_values_are_refused() -> None:
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(DymoeError, match="'x': nested more than 50 deep"):
        parse({"id": 1, "text": "q", "answer": "a", "x": deep}, True)


# --- any value whatever ------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=4)
WORDS = st.sampled_from(["<image>", "q", "<img>x</img>", "[0,0,1,1]", "", "user", "gpt", "\ud800", "image", "text"])
ANY = st.recursive(
    LEAVES | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["bytes", "path", "type", "text", "image", "from", "role", "value", "content", "url"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
KEYS = ("id", "question_id", "image", "images", "conversations", "messages", "text", "answer", "answer_bbox", "bbox")
KEYS += ("size", "answers", "choices", "videos", "x")


RECORDS = st.dictionaries(st.sampled_from(KEYS), ANY, max_size=8)


@given(RECORDS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_value_is_understood_or_refused(value: dict[str, Any], test: bool) -> None:
    understood_or_refused(value, test)


@pytest.mark.slow
@given(RECORDS, st.booleans())
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_values_are_understood_or_refused(value: dict[str, Any], test: bool) -> None:
    understood_or_refused(value, test)


def understood_or_refused(value: dict[str, Any], test: bool) -> None:
    for read in (lambda: parse(value, test), lambda: reference(value)):
        try:
            found = read()
        except DymoeError as error:
            told = str(error)
            assert told
            assert len(told) < 500
            continue
        json.dumps(found[1] if isinstance(found, tuple) else dict(found.fields), default=str, allow_nan=False)


TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | ANY, "value": WORDS | ANY})


@given(st.lists(TURN, max_size=4), ANY)
@settings(max_examples=100, deadline=None)
def test_any_conversation_keeps_its_pictures_or_is_refused(turns: list[Any], image: Any) -> None:
    try:
        record = parse({"id": 1, "conversations": turns, "images": image}, test=False)
    except DymoeError:
        return
    assert record.question
    assert record.answer
    asked = [turn for turn in turns if str(turn["from"]).lower() in ("human", "user")]
    assert record.has_image or "<image>" not in json.dumps(asked, default=str)


# --- boxes -------------------------------------------------------------------------------------------------

BOX = "[0.25,0.3,0.75,0.9]"


@pytest.mark.parametrize(
    ("more", "right"),
    [
        ({"bbox": [0.25, 0.3, 0.75, 0.9]}, [0.25, 0.3, 0.75, 0.9]),
        ({"bbox": "[0.25,0.3,0.75,0.9]"}, "[0.25,0.3,0.75,0.9]"),
        ({"bbox": [0.25, 0.3, 0.5, 0.6]}, [0.25, 0.3, 0.75, 0.9]),  # x, y, width, height
        ({"bbox": [160, 192, 480, 576], "size": [640, 480]}, [0.25, 0.3, 0.75, 0.9]),  # pixels of the long side
        ({"bbox": [160, 144, 480, 432], "size": [640, 480]}, [0.25, 0.3, 0.75, 0.9]),  # pixels, each side by itself
        ({"bbox": [160, 144, 320, 288], "size": [640, 480]}, [0.25, 0.3, 0.75, 0.9]),
        ({"bbox": None}, None),
    ],
)
def test_a_box_in_another_spelling_is_the_answers_box(more: dict[str, Any], right: Any) -> None:
    assert parse({"id": 1, "text": "q", "answer": BOX, **more}, True).fields["bbox"] == right
    said = {"id": 1, "conversations": [human("q"), gpt(BOX)], **more}
    assert parse(said, False).fields["bbox"] == right
    assert reference({"id": 1, "answer": BOX, **more})[1]["bbox"] == right


@pytest.mark.parametrize(
    "record",
    [
        {"text": "q", "answer": BOX, "bbox": [0.1, 0.1, 0.2, 0.2]},
        {"text": "q", "answer": BOX, "bbox": [160, 192, 480, 576]},
        {"text": "q", "answer": BOX, "answer_bbox": "[0.1,0.1,0.2,0.2]"},
        {"text": "q", "answer_bbox": BOX, "bbox": [0.1, 0.1, 0.2, 0.2]},
        {"conversations": [human("q"), gpt(BOX)], "answer": "[0.1,0.1,0.2,0.2]"},
        {"conversations": [human("q"), gpt(BOX)], "answer_bbox": [0.1, 0.1, 0.2, 0.2]},
        {"text": "q", "answer": "[10,20,50,60]", "bbox": [10, 20, 400, 400]},
    ],
)
def test_boxes_that_contradict_each_other_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(DymoeError, match=r"two boxes|keep one"):
        parse({"id": 1, **record}, test=True)


def test_an_answer_box_as_corner_and_size_is_read_by_the_answer() -> None:
    record = parse({"id": 1, "text": "q", "answer": BOX, "answer_bbox": [0.25, 0.3, 0.5, 0.6]}, True)
    assert (record.answer, record.fields["answer_bbox"]) == (BOX, [0.25, 0.3, 0.75, 0.9])
    assert parse({"id": 1, "text": "q", "answer": "the cup", "answer_bbox": BOX}, True).answer == BOX


# --- own streams -------------------------------------------------------------------------------------------


def stream(folder: Path, train: list[Any], test: list[Any], scorer: str = "exact_match") -> Any:
    tree.save(folder / "train.json", train)
    tree.save(folder / "test.json", test)
    (folder / "s.yaml").write_text(f"tasks: {{t: {{train: train.json, test: test.json, scorer: {scorer}}}}}\n")
    return load_stream(str(folder / "s.yaml")).tasks[0]


def test_a_choice_given_by_its_index_is_its_letter(tmp_path: Path) -> None:
    choices = ["red", "blue", "green"]
    asked = [{"question_id": n, "text": "Which?", "answer": n, "choices": choices} for n in range(3)]
    asked += [{"question_id": 3, "text": "Which?", "answer": 1.0, "choices": choices}]
    task = stream(tmp_path, asked, asked, "letter")
    assert [sample.answer for sample in task.test] == ["A", "B", "C", "B"]
    for sample in (*task.train, *task.validation, *task.test):
        assert scorer("letter")(sample.answer, sample.reference) == 1
    assert [each.answer for each in stream(tmp_path, asked, asked).test] == ["0", "1", "2", "1.0"], "not a choice here"
    asked[1]["answer"] = 7
    with pytest.raises(DymoeError, match=r"test\.json: record 1 \(id '1'\): reference: .* not '7'"):
        stream(tmp_path, asked[:1], asked, "letter")


def test_an_index_beside_a_conversation_does_not_replace_what_is_said(tmp_path: Path) -> None:
    said = [{"id": n, "conversations": [human("q"), gpt("It is B.")], "answer": 1} for n in range(3)]
    asked = [{"id": 1, "text": "q", "answer": "B"}]
    assert {sample.answer for sample in stream(tmp_path, said, asked, "letter").train} == {"It is B."}


def test_columns_without_a_value_are_none(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "text": "q", "answer": "red", "answers": None, "bbox": None, "image": None},
        {"id": 2, "text": "q", "answer": "red", "answers": ["red"] * 10, "bbox": None, "image": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "s.yaml").write_text("tasks: {t: {train: rows.parquet, test: rows.parquet, scorer: soft_accuracy}}\n")
    task = load_stream(str(tmp_path / "s.yaml")).tasks[0]
    assert [scorer("soft_accuracy")(sample.answer, sample.reference) for sample in task.test] == [1, 1]


@pytest.mark.parametrize("empty", [{"bytes": b"", "path": ""}, {"bytes": b"", "path": None}])
def test_an_empty_picture_in_parquet_is_no_question_without_a_picture(empty: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"id": n, "text": "q", "answer": "a", "image": empty} for n in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "s.yaml").write_text("tasks: {t: {train: rows.parquet, test: rows.parquet}}\n")
    with pytest.raises(DymoeError, match=r"rows\.parquet: record 0 \(id '0'\): 'image': it is empty"):
        load_stream(str(tmp_path / "s.yaml"))


# --- files -------------------------------------------------------------------------------------------------

REFS = [{"question_id": n, "text": "Which colour?", "answer": a} for n, a in enumerate(["röt", "blue", "green"])]
SAYS = [{"question_id": each["question_id"], "text": each["answer"]} for each in REFS]


def lines(records: list[Any], end: str = "\n", **options: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, **options) + end for record in records)


#: One file in the forms that systems and tools write it in: the name's ending, and how it is written.
WHOLE: dict[str, tuple[str, Callable[[list[Any]], bytes]]] = {
    "list": (".json", lambda records: json.dumps(records).encode()),
    "list, indented": (".json", lambda records: json.dumps(records, indent=1).encode()),
    "list with BOM": (".json", lambda records: b"\xef\xbb\xbf" + json.dumps(records, ensure_ascii=False).encode()),
    "list, UTF-16": (".json", lambda records: json.dumps(records, ensure_ascii=False).encode("utf-16")),
    "lines": (".jsonl", lambda records: lines(records).encode()),
    "no newline": (".jsonl", lambda records: lines(records).rstrip().encode()),
    "CRLF": (".jsonl", lambda records: lines(records, "\r\n").encode()),
    "lines with BOM": (".jsonl", lambda records: b"\xef\xbb\xbf" + lines(records).encode()),
    "lines, UTF-16": (".jsonl", lambda records: lines(records, "\r\n").encode("utf-16")),
    "lines, UTF-16 without BOM": (".jsonl", lambda records: lines(records).encode("utf-16-le")),
    "lines, UTF-32": (".jsonl", lambda records: lines(records).encode("utf-32")),
    "blank lines": (".jsonl", lambda records: ("\n" + lines(records, "\n\n") + " \r\n").encode()),
    "lines in a .json": (".json", lambda records: lines(records).encode()),
}


@pytest.mark.parametrize("form", WHOLE)
def test_run_and_score_read_the_same_files(form: str, tmp_path: Path) -> None:
    suffix, write = WHOLE[form]
    right, said = tmp_path / f"test{suffix}", tmp_path / f"said{suffix}"
    right.write_bytes(write(REFS))
    said.write_bytes(write(SAYS))
    assert list(read_records(right)) == REFS
    assert score_files(said, right, "VQAv2").accuracy == 100
    (tmp_path / "s.yaml").write_text(f"tasks: {{t: {{train: test{suffix}, test: test{suffix}}}}}\n")
    assert [sample.answer for sample in load_stream(str(tmp_path / "s.yaml")).tasks[0].test] == ["röt", "blue", "green"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.jsonl", lines(REFS).encode("latin-1"), "cannot be read .*save it as UTF-8"),
        ("t.json", lines(REFS[1:]).encode("gbk") + "红色".encode("gbk"), "cannot be read .*save it as UTF-8"),
        ("t.json", json.dumps(REFS)[:-1].encode() + b",]", "record 3: not valid JSON"),
        ("t.json", json.dumps({"data": REFS}).encode(), "expected a JSON list of records"),
        (
            "t.json",
            json.dumps({str(n): each for n, each in enumerate(REFS)}, indent=1).encode(),
            "expected a JSON list",
        ),
        ("t.json", json.dumps(REFS).replace('"question_id"', "'question_id'", 1).encode(), "record 0: not valid JSON"),
        ("t.json", b'[{"question_id": 1, "answer": "a", "answer": "b"}]', "the key 'answer' is there twice"),
        ("t.jsonl", lines(REFS).encode() + b"{", "line 4: not valid JSON"),
    ],
)
def test_files_that_are_refused(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DymoeError, match=message) as caught:
        list(read_records(tmp_path / name))
    assert "\n" not in str(caught.value)
    (tmp_path / "said.jsonl").write_text(lines(SAYS))
    with pytest.raises(DymoeError, match=message):
        score_files(tmp_path / "said.jsonl", tmp_path / name, "VQAv2")


def test_answers_that_are_numbers_and_ids_that_are_floats(tmp_path: Path) -> None:
    right = tree.save(tmp_path / "test.json", [{"question_id": n, "text": "?", "answer": n + 2} for n in range(3)])
    said = tmp_path / "said.jsonl"
    said.write_text(lines([{"question_id": float(n), "text": n + 2} for n in range(3)]))
    assert score_files(said, right, "VQAv2").accuracy == 100
    (tmp_path / "s.yaml").write_text("tasks: {t: {train: test.json, test: test.json, scorer: corrected/vqav2}}\n")
    assert [sample.id for sample in load_stream(str(tmp_path / "s.yaml")).tasks[0].test] == ["0", "1", "2"]
    said.write_text(lines([{"question_id": f"{n:03}", "text": "2"} for n in range(3)]))
    with pytest.raises(DymoeError, match=r"line 1: question_id '000' is not in .*test\.json"):
        score_files(said, right, "VQAv2")


# --- ids that come again -----------------------------------------------------------------------------------

AGAIN = [{"question_id": 100 + n // 2, "text": "?", "answer": a} for n, a in enumerate(["a", "b", "c", "d"])]


@pytest.mark.parametrize("rule", ["coin", "corrected"])
def test_run_and_score_agree_on_ids_that_come_again(rule: str, tmp_path: Path) -> None:
    right = tree.save(tmp_path / "test.json", AGAIN)
    (tmp_path / "s.yaml").write_text("tasks: {t: {train: test.json, test: test.json, scorer: corrected/vqav2}}\n")
    asked = load_stream(str(tmp_path / "s.yaml")).tasks[0].test
    assert [sample.id for sample in asked] == ["100", "100#2", "101", "101#2"]
    said = tmp_path / "said.jsonl"
    said.write_text(lines([{"id": sample.id, "prediction": sample.answer} for sample in asked]))
    assert score_files(said, right, "VQAv2", rule).accuracy == 100
    said.write_text(lines([{"question_id": each["question_id"], "text": each["answer"]} for each in AGAIN]))
    assert score_files(said, right, "VQAv2", rule).accuracy == 100
    said.write_text(lines([{"id": "100#2", "prediction": "b"}, {"id": "100", "prediction": "x"}]))
    scores = score_files(said, right, "VQAv2", rule)
    assert (scores.counts.right, scores.counts.missing) == (1, 2)
    said.write_text(lines([{"question_id": 100, "text": "b"}, {"question_id": 101, "text": "c"}]))
    with pytest.raises(DymoeError, match=r"line 1: question_id '100' is there 1 times, in .*test\.json 2 times"):
        score_files(said, right, "VQAv2", rule)


@given(st.lists(st.sampled_from(["7", "7#2", "7#3", "8", "7#2#2"]), max_size=12))
def test_names_are_unique(ids: list[str]) -> None:
    names = Names()
    named = [names.name(identity) for identity in ids]
    assert len(set(named)) == len(ids)
    assert all(name.startswith(identity) for name, identity in zip(named, ids, strict=True))
