"""The CoIN stream on made trees: layouts, irregular records, laziness, attacks, the cache, and one run end to end."""

import builtins
import json
import os
import pickle
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dymoe.errors import DymoeError
from dymoe.preflight.doctor import overlap
from dymoe.tasks import Sample, Source, available, load_stream, own, task_names
from dymoe.tasks.coin import layout, stream
from dymoe.tasks.coin.layout import published
from dymoe.tasks.index import Plan, cache_folder, index, split, stable_hash
from dymoe.tasks.lazy import ImageFile, Joined, Records, View, image_path, image_size, joined
from dymoe.tasks.llava import parse, read_box
from dymoe.tasks.recordfile import read_records
from dymoe.tasks.scoring import scorer
from tests.tasks import coin_tree as tree

LITTLE = {"validation_share": 0.25}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYMOE_CACHE", str(cache))


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trees")
    return {name: tree.build(root / name, name) for name in ("coin", "release", "fork", "sefe")}


def load(root: Path, *tasks: str, kind: str = "original", **keys: Any) -> Any:
    return load_stream("coin", "origin", kind, list(tasks) or None, 0, Source(root=str(root), **{**LITTLE, **keys}))


def small(tmp_path: Path, *tasks: str, **sizes: int) -> Path:
    return tree.build(tmp_path / "tree", "release", tasks=tasks or ("ImageNet",), **sizes)


def train_file(root: Path, task: str = "ImageNet") -> Path:
    return root / "Instruction_Original" / task / "train.json"


# --- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["coin", "release", "fork", "sefe"])
def test_every_layout_is_found_and_gives_the_same_samples(variant: str, trees: dict[str, Path]) -> None:
    found, expected = load(trees[variant]), load(trees["coin"])
    assert found.names == tree.TASKS
    for one, other in zip(found.tasks, expected.tasks, strict=True):
        for part in ("train", "validation", "test"):
            told = [(s.id, s.question, s.answer, s.turns, s.reference, s.image) for s in getattr(one, part)]
            assert told == [(s.id, s.question, s.answer, s.turns, s.reference, s.image) for s in getattr(other, part)]
        assert len(one.train) + len(one.validation) == 12
        assert len(one.test) == 4


def test_instruction_types_are_told_by_folder_and_text(trees: dict[str, Path], tmp_path: Path) -> None:
    for variant in ("release", "fork"):
        question = load(trees[variant], "TextVQA", kind="diverse").tasks[0].train[0].question
        assert question.endswith("Capture the essence of your response in a single word or a concise phrase.")
    with pytest.raises(DymoeError, match=r"no instruction folder with '10type' text; found: .*Instructions_Diverse"):
        load(trees["fork"], kind="10type")
    # A folder with a name of one's own counts by what is written in it.
    renamed = tree.build(tmp_path / "own-name", "release", tasks=("TextVQA",))
    (renamed / "Instruction_Type2").rename(renamed / "rewritten")
    assert "essence" in load(renamed, "TextVQA", kind="diverse").tasks[0].train[0].question
    assert "essence" not in load(renamed, "TextVQA").tasks[0].train[0].question


def test_a_type_that_is_not_there_comes_from_templates_when_asked(trees: dict[str, Path]) -> None:
    with pytest.raises(DymoeError, match=r"data\.templates: true"):
        load(trees["coin"], "GQA", kind="diverse")
    task = load(trees["coin"], "GQA", kind="diverse", templates=True).tasks[0]
    plain = load(trees["coin"], "GQA").tasks[0]
    assert task.train[0].question.endswith("\nRespond to the question briefly, using only one word or a phrase")
    assert task.train[0].question.splitlines()[:-1] == plain.train[0].question.splitlines()[:-1]
    assert task.train.fingerprint != plain.train.fingerprint
    boxes = load(trees["coin"], "Grounding", kind="10type", templates=True).tasks[0]
    assert all(sample.question.count(": the cup") == 1 for sample in boxes.train)


def test_text_without_a_known_instruction_cannot_be_replaced(tmp_path: Path) -> None:
    root = small(tmp_path)
    records = tree.load(train_file(root))
    records[3]["conversations"][0]["value"] = "<image>\nWhat is the object in the image?\nSay it!"
    tree.save(train_file(root), records)
    with pytest.raises(DymoeError, match=r"train\.json: 1 of 12 questions carry no known instruction"):
        load(root, "ImageNet", kind="10type", templates=True)


def test_options_choose_what_could_be_two(tmp_path: Path) -> None:
    root = tree.build(tmp_path / "both", "release", tasks=("GQA",))
    tree.build(tmp_path / "both", "sefe", tasks=("GQA",))
    with pytest.raises(DymoeError, match=r"several folders hold original .*instructions_folder or data\.variant"):
        load(root, "GQA")
    assert len(load(root, "GQA", variant="sefe", train_file="train_x20", validation_share=0).tasks[0].train) == 11
    assert len(load(root, "GQA", instructions_folder="Instruction_Original").tasks[0].test) == 4
    with pytest.raises(DymoeError, match="no instruction folder of variant 'fork'"):
        load(root, "GQA", variant="fork")
    with pytest.raises(DymoeError, match=r"nowhere: holds no task's training files; found: .*annotations"):
        load(root, "GQA", instructions_folder="nowhere")
    with pytest.raises(DymoeError, match=r"no train file train_x40\.json; there is .*train_ori\.json, train_x20\.json"):
        load(root, "GQA", variant="sefe", train_file="train_x40")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    root = small(tmp_path, "GQA", "TextVQA")
    with pytest.raises(DymoeError, match=r"data\.root: stream 'coin' needs the folder"):
        load_stream("coin")
    with pytest.raises(DymoeError, match=r"data\.root: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DymoeError, match=r"no folder for task 'VizWiz': no such folder; in .* there is GQA, TextVQA"):
        load(root, "VizWiz")
    with pytest.raises(DymoeError, match=r"data\.images: no such folder"):
        load(root, "GQA", images="nowhere")
    (root / "cl_dataset/GQA/testdev_balanced_questions.json").unlink()
    with pytest.raises(DymoeError, match=r"testdev_balanced_questions\.json: no such file; GQA cannot be scored"):
        load(root, "GQA")
    (root / "Instruction_Original/TextVQA/val.json").rename(root / "Instruction_Original/TextVQA/test.json")
    assert len(load(root, "TextVQA").tasks[0].test) == 4  # the other name does too
    (root / "cl_dataset").rename(root / "pictures")
    with pytest.raises(DymoeError, match=r"no image root found .*data\.images"):
        load(root, "TextVQA")
    assert len(load(root, "TextVQA", images="pictures").tasks[0].test) == 4


PACKED = [
    ("playground/Instructions_Original", r"no instruction folder .*; unpack .*/Instructions_Original\.zip$"),
    (
        "playground/Instructions_Original/ImageNet",
        r"no folder for task 'ImageNet': no such folder; unpack .*/ImageNet\.zip$",
    ),
    ("cl_dataset", r"no image root found .*; unpack .*/cl_dataset\.zip$"),
    ("cl_dataset/ImageNet_withlabel/train", r"record 0 .*: no folder .*/train; unpack .*/train\.zip; 11 more cannot"),
]


@pytest.mark.parametrize(("name", "message"), PACKED, ids=[name for name, _ in PACKED])
def test_what_was_not_unpacked_is_named(name: str, message: str, tmp_path: Path) -> None:
    root = tree.build(tmp_path / "tree", "coin", tasks=("GQA", "ImageNet"))
    (root / name).rename(tmp_path / "away")
    (root / f"{name}.zip").write_bytes(b"PK")
    with pytest.raises(DymoeError, match=message):
        load(root, "ImageNet")


def test_what_is_there_instead_is_named(tmp_path: Path) -> None:
    root = small(tmp_path)
    (root / "cl_dataset/ImageNet_withlabel").rename(root / "cl_dataset/ImageNet")
    with pytest.raises(DymoeError, match=r"no folder .*/ImageNet_withlabel; in .*/cl_dataset there is GQA, ImageNet, "):
        load(root, "ImageNet")
    with pytest.raises(
        DymoeError, match=r"/cl_dataset: no instruction folder .*; in .*/cl_dataset there is GQA, ImageNet, "
    ):
        load(root / "cl_dataset", "ImageNet")


def test_orders_and_names() -> None:
    assert "coin" in available()
    assert task_names("coin") == tree.TASKS
    assert task_names("coin", "reverse") == tree.TASKS[::-1]
    assert task_names("coin", "alphabet")[:3] == ("GQA", "Grounding", "ImageNet")


# --- samples -----------------------------------------------------------------------------------------------


def test_samples_of_the_published_records(trees: dict[str, Path]) -> None:
    tasks = {task.name: task for task in load(trees["coin"], validation_share=0).tasks}
    science = tasks["ScienceQA"]
    texts = [sample for sample in science.train if not sample.has_image]
    assert [sample.id for sample in texts] == ["2", "5", "8", "11"]
    assert all(sample.image is None for sample in texts)
    assert science.test[0].reference["choices"] == ["ice", "fire", "sand"]
    assert science.test[0].reference["answer"] == "B"  # problems.json, number 100
    assert [sample.has_image for sample in science.test] == [True, False, True, False]
    assert tasks["TextVQA"].test[0].reference["answers"] == ["dog"] * 7 + ["other"] * 3
    assert tasks["GQA"].test[0].reference["isBalanced"] is True
    box = tasks["Grounding"].test[0]
    assert (box.answer, box.reference["answer_bbox"], box.reference["size"]) == (
        "[0.10,0.2,0.5,0.67]", "[0.10,0.2,0.5,0.67]", [640, 480],
    )  # fmt: skip
    assert box.reference["bbox"] == [0.1, 0.2, 0.5, 0.67]
    assert tasks["ImageNet"].train[1].id == "5001"  # it has question_id alone
    assert tasks["VQAv2"].train[1].turns == (("And what else?", "a spoon"),)
    for task in tasks.values():
        assert not any("<image>" in sample.question for sample in (*task.train, *task.test))
        for sample in task.test:
            assert scorer(task.scorer)(sample.answer, sample.reference) > 0
    assert tasks["GQA"].scorer == "corrected/gqa"
    as_coin = load(trees["coin"], "GQA", "VQAv2", scoring="coin", generation="coin").tasks
    assert [(task.scorer, task.max_new_tokens) for task in as_coin] == [("coin/gqa", 128), ("coin/vqav2", 1024)]


def test_questions_out_of_the_balanced_set_are_left_out_and_told(tmp_path: Path) -> None:
    root = small(tmp_path, "GQA")
    file = root / "cl_dataset/GQA/testdev_balanced_questions.json"
    questions = tree.load(file)
    questions["102"]["isBalanced"] = False
    tree.save(file, questions)
    found = load(root, "GQA")
    assert [sample.id for sample in found.tasks[0].test] == ["100", "101", "103"]
    assert [row["error"] for row in found.skipped] == ["1 questions are not of the balanced set, which alone counts"]


def test_validation_is_held_out_of_training_and_can_be_scored(trees: dict[str, Path]) -> None:
    for task in load(trees["coin"]).tasks:
        held = {sample.id for sample in task.validation}
        assert len(held) == 3
        assert not held & {sample.id for sample in task.train}
        assert all(not sample.turns for sample in task.validation)
        for sample in task.validation:
            assert scorer(task.scorer)(sample.answer, sample.reference) > 0
    whole = load(trees["coin"], "GQA", validation_share=0).tasks[0]
    assert (len(whole.train), len(whole.validation)) == (12, 0)


def test_held_out_records_do_not_depend_on_the_order_and_an_id_stays_whole(tmp_path: Path) -> None:
    root = small(tmp_path, trained=40)
    records = tree.load(train_file(root))
    for number, record in enumerate(records):
        record.pop("question_id", None)
        record["id"] = f"same-{number // 4}"
    tree.save(train_file(root), records)
    task = load(root, "ImageNet").tasks[0]
    raw = [{sample.id.partition("#")[0] for sample in part} for part in (task.train, task.validation)]
    assert raw[0].isdisjoint(raw[1])
    assert len(task.validation) == 8  # the third id would be cut in two at ten
    assert {sample.id for sample in (*task.train, *task.validation)} >= {"same-0", "same-0#2", "same-0#4"}
    tree.save(train_file(root), records[::-1])
    again = load(root, "ImageNet").tasks[0]
    assert {sample.id.partition("#")[0] for sample in again.validation} == raw[1]


@given(st.integers(2, 60), st.floats(0, 0.99), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_the_share_held_out(count: int, share: float, most: int) -> None:
    hashes = [stable_hash(str(number)) if number % 5 else -1 for number in range(count)]
    train, held = split(hashes, share, most)
    assert sorted([*train, *held]) == list(range(count))
    assert all(hashes[row] >= 0 for row in held)
    wanted = max(1, round(share * count)) if share > 0 else 0
    assert len(held) == min(most, wanted, sum(value >= 0 for value in hashes))
    if len(held):
        rest = [hashes[row] for row in train if hashes[row] >= 0]
        assert max(hashes[row] for row in held) <= min(rest, default=2**63)


# --- laziness ----------------------------------------------------------------------------------------------


class Opened(Counter[str]):
    """Counts the image files that are opened through Python's own `open`."""

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> "Opened":
        real = builtins.open

        def opening(file: Any, *args: Any, **keys: Any) -> Any:
            if str(file).endswith((".png", ".jpg", ".JPEG")):
                self[str(file)] += 1
            return real(file, *args, **keys)

        import io

        monkeypatch.setattr(io, "open", opening)
        monkeypatch.setattr(builtins, "open", opening)
        return self


def test_no_image_is_opened_before_it_is_asked_for(trees: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from dymoe.learning.conditions import data_description

    opened = Opened().watch(monkeypatch)
    shutil.rmtree(cache_folder(), ignore_errors=True)
    found = load(trees["coin"])
    samples = [sample for task in found.tasks for sample in (*task.train, *task.validation, *task.test)]
    description = data_description(found)
    assert sum(sample.has_image for sample in samples) == 8 * 16 - 6
    assert not opened
    handles = len(os.listdir("/proc/self/fd"))
    first = next(sample for sample in samples if sample.has_image)
    assert first.image == first.image
    assert len(opened) == 1
    assert sum(opened.values()) == 2  # read at each access, kept by nobody
    for sample in samples:
        assert sample.image is None or sample.image.startswith(b"\x89PNG")
    assert len(os.listdir("/proc/self/fd")) == handles
    assert set(description["scorers"]) == set(tree.TASKS)


def test_samples_are_sequences_that_slice_iterate_and_travel(trees: dict[str, Path]) -> None:
    train = load(trees["coin"], "VQAv2", validation_share=0).tasks[0].train
    whole = list(train)
    assert isinstance(train, Records)
    assert [train[place] for place in range(-12, 12)] == whole * 2
    assert list(train[3:9:2]) == whole[3:9:2]
    assert isinstance(train[:5], Records)
    assert list(train[4:][:3]) == whole[4:7]
    with pytest.raises(IndexError):
        train[12]
    again = pickle.loads(pickle.dumps(train))
    assert list(again) == whole
    assert len(pickle.dumps(train[:5])) < 4000
    assert train[:5].fingerprint != train.fingerprint != train[1:].fingerprint
    both = joined([train, train[:2]])
    assert isinstance(both, Joined)
    assert list(both) == whole + whole[:2]
    assert both[-1] == both[13] == whole[1]
    assert both[10:13] == [*whole[10:], whole[0]]
    assert joined([train]) is train
    assert joined([whole[:1], []]) == whole[:1]


# --- attacks and broken pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "GQA/../../secret.jpg", "..", "a\0b", "C:\\x.jpg", "..\\secret.jpg", "\\x"]
)
def test_paths_that_leave_the_image_root_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    with pytest.raises(DymoeError, match=r"expected a path relative to the image root, without '\.\.'"):
        image_path(tmp_path / "root", name)
    root = small(tmp_path, trained=4)
    records = tree.load(train_file(root))
    records[2]["image"] = name
    tree.save(train_file(root), records)
    with pytest.raises(DymoeError, match=r"train\.json: record 2 \(id '2'\): image "):
        load(root, "ImageNet")


def test_links_stay_inside_unless_allowed(tmp_path: Path) -> None:
    root = small(tmp_path)
    outside = tmp_path / "disk"
    (root / "cl_dataset/ImageNet_withlabel/train").rename(outside)
    (root / "cl_dataset/ImageNet_withlabel/train").symlink_to(outside)
    with pytest.raises(DymoeError, match=r"symbolic link leads out .*data\.outside_links: true"):
        load(root, "ImageNet")
    sample = load(root, "ImageNet", outside_links=True).tasks[0].train[0]
    assert sample.image is not None
    inside = root / "cl_dataset/ImageNet_withlabel/val"
    inside.rename(root / "cl_dataset/elsewhere")
    inside.symlink_to(root / "cl_dataset/elsewhere")
    assert load(root, "ImageNet", outside_links=True).tasks[0].test[0].image == tree.picture(100)
    # A link put there after the records were read is refused when the picture is asked for.
    name = sample.picture.name  # type: ignore[union-attr]
    late = ImageFile(root / "cl_dataset", name, len(sample.image), "f: record 1")
    with pytest.raises(DymoeError, match=r"f: record 1: image .* leads out"):
        late.read()


@given(st.text(max_size=30))
@example("a/./b")
@example("x/..")
@settings(max_examples=150, deadline=None)
def test_any_name_is_below_the_root_or_refused(name: str) -> None:
    root = Path("/tmp")
    try:
        path = image_path(root, name)
    except DymoeError:
        return
    except UnicodeEncodeError:
        return  # half a surrogate pair; `parse` refuses it before
    assert Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def test_pictures_that_are_no_files_or_change(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, message in (("empty.jpg", "is empty"), ("pipe.jpg", "is no file"), ("none.jpg", "No such file")):
        with pytest.raises(DymoeError, match=message):
            image_size(tmp_path, name)
    (tmp_path / "x.jpg").write_bytes(b"12345")
    changed = ImageFile(tmp_path, "x.jpg", 4, "train.json: record 9")
    with pytest.raises(DymoeError, match=r"train\.json: record 9: image 'x\.jpg': it has 5 bytes, 4 when"):
        changed.read()


# --- bad records -------------------------------------------------------------------------------------------


BAD: list[tuple[Any, str]] = [
    ("text", "expected an object with keys, found str"),
    ({"conversations": []}, "found 0 turns"),
    ({"id": 1, "conversations": [{"from": "human", "value": "q"}]}, "found 1 turns; every question needs its answer"),
    ({"id": 1, "conversations": [{"from": "gpt", "value": "q"}] * 2}, "found 'gpt' where human speaks"),
    ({"id": 1, "conversations": "q"}, "expected a list of {from, value}"),
    ({"id": 1, "text": "q"}, "neither 'answer' nor 'answer_bbox'"),
    ({"id": 1}, "neither 'conversations' nor 'text'"),
    ({"text": "q", "answer": "a"}, "neither 'id' nor 'question_id'"),
    ({"id": True, "text": "q", "answer": "a"}, "neither 'id' nor 'question_id'"),
    ({"id": 1, "text": "<image>\n", "answer": "a"}, "'text': it is empty"),
    ({"id": 1, "text": 5, "answer": "a"}, "'text': expected a text, found int"),
    ({"id": 1, "text": "q", "answer": " "}, "'answer': it is empty"),
    ({"id": 1, "text": "q", "answer": {}}, "'answer': expected a text, a number or a box of four numbers, found {}"),
    ({"id": 1, "text": "q", "answer_bbox": "[1,2,3]"}, "expected a box"),
    ({"id": 1, "text": "q", "answer_bbox": "[1,2,3,nan]"}, "expected a box"),
    ({"id": 1, "text": "q", "answer": "a", "image": 7}, "'image': expected one path"),
    ({"id": 1, "text": "q", "answer": "a", "image": ["a", "b"]}, "'image': expected one path"),
    ({"id": 1, "text": "q \ud800", "answer": "a"}, "half of a surrogate pair"),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=[message for _, message in BAD])
def test_a_record_that_cannot_be_used_says_why(value: Any, message: str) -> None:
    with pytest.raises(DymoeError) as caught:
        parse(value, test=False)
    assert message in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "user", "assistant", "system"]) | JSON, "value": st.text() | JSON}
)
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=5) | JSON,
        "question_id": st.integers() | JSON,
        "image": st.text(max_size=9) | JSON,
        "conversations": st.lists(TURN, max_size=5) | JSON,
        "text": st.text(max_size=20) | JSON,
        "answer": st.text(max_size=9) | JSON,
        "answer_bbox": st.lists(st.floats() | st.integers(), max_size=5) | st.text(max_size=15) | JSON,
    },
)


@given(RECORD | JSON, st.booleans())
@example({"id": 1, "text": "a", "answer_bbox": [10**400, 1, 1, 1]}, True)
@settings(max_examples=150, deadline=None)
def test_any_record_is_understood_or_refused(value: Any, test: bool) -> None:
    try:
        record = parse(value, test)
    except DymoeError:
        return
    assert record.id
    assert record.question.strip() == record.question != ""
    assert record.answer
    assert "<image>" not in record.question
    assert not (test and record.turns)
    if value.get("answer_bbox") is not None and value.get("conversations") is None:
        assert read_box(record.answer) is not None


@given(
    st.lists(
        st.tuples(st.text("ab \n?", min_size=1).map(str.strip), st.text("cd", min_size=1)), min_size=1, max_size=4
    ),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_conversation_comes_back_as_it_was_written(turns: list[tuple[str, str]], token: bool) -> None:
    turns = [(question or "a", answer) for question, answer in turns]
    said = []
    for number, (question, answer) in enumerate(turns):
        before = "<image>\n" if token and not number else ""
        said += [{"from": "human", "value": before + question}, {"from": "gpt", "value": answer}]
    record = parse({"id": "x", "image": "p.jpg", "conversations": said}, test=False)
    assert [(record.question, record.answer), *record.turns] == turns


@given(st.lists(JSON, max_size=6), st.sampled_from(["", " ", "\n"]))
@settings(max_examples=30, deadline=None)
def test_a_list_is_read_record_by_record_as_json_reads_it(values: list[Any], space: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "x.json"
        text = f"{space}[{space}" + f"{space},{space}".join(json.dumps(value) for value in values) + f"{space}]\n"
        whole.write_text(text)
        assert repr(list(read_records(whole))) == repr(json.loads(text))
        lines = Path(folder) / "x.jsonl"
        lines.write_text("".join(json.dumps(value) + "\n" for value in values))
        assert repr(list(read_records(lines))) == repr(json.loads(text))
        whole.write_text(text.rstrip()[:-1])
        with pytest.raises(DymoeError, match="is the file whole"):
            list(read_records(whole))


def broken_tree(tmp_path: Path) -> Path:
    root = small(tmp_path)
    records = tree.load(train_file(root))
    records[3]["conversations"] = records[3]["conversations"][:1]
    records[5]["image"] = "ImageNet_withlabel/train/gone.JPEG"
    del records[8]["image"]
    tree.save(train_file(root), records)
    return root


def test_bad_records_end_the_run_with_file_record_and_id(tmp_path: Path) -> None:
    root = broken_tree(tmp_path)
    for _ in range(2):  # the cache is as honest as the file
        with pytest.raises(DymoeError) as caught:
            load(root, "ImageNet")
        message = str(caught.value)
        assert message.startswith(f"{train_file(root)}: record 3 (id 'ImageNet-3'): 'conversations'")
        assert "2 more cannot be used" in message
        assert "\n" not in message


def test_bad_records_are_skipped_counted_and_listed_when_asked(tmp_path: Path) -> None:
    root = broken_tree(tmp_path)
    found = load(root, "ImageNet", on_bad="skip", validation_share=0)
    assert len(found.tasks[0].train) == 9
    assert [(row["record"], row["id"]) for row in found.skipped] == [(3, "ImageNet-3"), (5, "5005"), (8, "8")]
    assert "gone.JPEG" in found.skipped[1]["error"]
    assert "'image' is missing" in found.skipped[2]["error"]
    # A picture that was put in its place is used at the next start.
    (root / "cl_dataset/ImageNet_withlabel/train/gone.JPEG").write_bytes(tree.picture(3))
    again = load(root, "ImageNet", on_bad="skip", validation_share=0)
    assert [row["record"] for row in again.skipped] == [3, 8]
    assert again.tasks[0].train.fingerprint != found.tasks[0].train.fingerprint
    tree.save(train_file(root), [{}, {}])
    with pytest.raises(DymoeError, match=r"train\.json: no record can be used; record 0: "):
        load(root, "ImageNet", on_bad="skip")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1}, {"id": 2', r"record 1: not valid JSON .*is the file whole"),
        ('[{"id": 1} {"id": 2}]', r"after record 0: expected ',' or '\]', found '{'"),
        ('{"id": 1}', r"expected a JSON list of records, it starts with '{"),
        ("", "is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "is a Git LFS pointer, not the file itself"),
        ("<!DOCTYPE html>", "is a web page"),
        ("[] []", r"something stands behind the end"),
        ("[" * 100000, r"record 0: not valid JSON"),
        ("[]", r"it holds no records"),
    ],
)
def test_files_that_are_no_list_of_records(text: str, message: str, tmp_path: Path) -> None:
    root = small(tmp_path)
    train_file(root).write_text(text)
    with pytest.raises(DymoeError, match=message):
        load(root, "ImageNet", on_bad="skip")


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("ScienceQA", {"question_id": "999"}, r"problems\.json has no question '999'"),
        ("TextVQA", {"question_id": 999}, r"TextVQA_0\.5\.1_val\.json has no question '999'"),
        ("GQA", {"question_id": "999"}, r"testdev_balanced_questions\.json has no question '999'"),
        ("Grounding", {"size": [640]}, r"'size' must be the picture's width and height"),
        ("Grounding", {"answer_bbox": "[7,8,9,10]"}, r"'answer_bbox' must be"),
    ],
)
def test_test_records_that_cannot_be_scored_show_before_training(
    task: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    root = small(tmp_path, task, trained=4)
    file = layout.find(Source(root=str(root)), "original", [task]).test_file(task)
    records = tree.load(file)
    records[1] |= change
    tree.save(file, records)
    with pytest.raises(DymoeError, match=rf"(test|val)\.json: record 1 .*{message}"):
        load(root, task)


# --- the cache ---------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_twenty_thousand_records_are_read_once_and_cost_no_memory(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "x.jpg").write_bytes(tree.picture(1))
    said = [{"from": "human", "value": "<image>\n" + "why " * 20}, {"from": "gpt", "value": "so"}]
    file = tree.save(
        tmp_path / "big.json", [{"id": number, "image": "x.jpg", "conversations": said} for number in range(20_000)]
    )

    def reference() -> Any:
        return lambda record: ({"answer": record.answer}, True)

    plan = Plan(file, images, False, "big", reference)
    first = index(plan)

    def never() -> Any:
        raise AssertionError("the records were read again")

    started = time.process_time()
    plan = replace(plan, reference=never)
    again = index(plan)
    assert again == first
    assert time.process_time() - started < 0.5
    samples = Records(again.table, range(20_000), View(file, images))
    before, most = resident(), 0
    for number, sample in enumerate(samples):
        assert sample.id == str(number)
        if number % 500 == 0:
            most = max(most, resident())
    assert most - before < 30 << 20  # pages of the mapped file, and no samples
    os.utime(file, ns=(1, 1))  # another state of the file
    with pytest.raises(AssertionError):
        index(plan)


def test_a_changed_file_or_annotation_makes_a_new_index(tmp_path: Path) -> None:
    root = small(tmp_path, "GQA")
    before = load(root, "GQA").tasks[0]
    file = root / "cl_dataset/GQA/testdev_balanced_questions.json"
    questions = tree.load(file)
    questions["100"]["answer"] = "unicorn"
    tree.save(file, questions)
    after = load(root, "GQA").tasks[0]
    assert after.test[0].reference["answer"] == "unicorn"
    assert after.test.fingerprint != before.test.fingerprint
    assert after.train.fingerprint == before.train.fingerprint


def plan_of(folder: Path, reference: Any, count: int = 5) -> Plan:
    (folder / "x.jpg").write_bytes(b"12345")
    rows = [{"id": number, "image": "x.jpg", "text": "why?", "answer": "so"} for number in range(count)]
    return Plan(tree.save(folder / "data.json", rows), folder, True, "made", reference)


def answer(record: Any) -> Any:
    return {"answer": record.answer}, True


def test_fingerprints_are_those_that_runs_of_earlier_states_keep(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, lambda: answer)
    made = index(plan)
    assert made.digest == "e70e27c5e8f3d4e98c378637e218dcaece145547ea185fe933ff7313c2363996"
    samples = Records(made.table, range(5), View(plan.path, tmp_path), made.digest)
    assert samples.fingerprint == "2e02fc0055419358fa2b2c35b8c291f57ab993037dc52780d15dd1f1ca4e1df6"


def test_two_that_want_the_same_index_make_it_once(tmp_path: Path) -> None:
    made = []

    def reference() -> Any:
        made.append("once")
        time.sleep(0.3)
        return answer

    plan = plan_of(tmp_path, reference)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(index, [plan, plan])
    assert first == second
    assert len(made) == 1


def test_a_file_that_breaks_off_leaves_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYMOE_CACHE", str(tmp_path / "cache"))
    plan = plan_of(tmp_path, lambda: answer, 3000)  # three blocks of a table
    plan.path.write_text(plan.path.read_text()[:-9])
    for _ in range(2):
        with pytest.raises(DymoeError, match=r"data\.json: record 2999: not valid JSON"):
            index(plan)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_changed_picture_makes_a_new_table_beside_the_one_in_use(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, lambda: answer)
    before = index(plan)
    samples = Records(before.table, range(5), View(plan.path, tmp_path))
    (tmp_path / "x.jpg").write_bytes(b"123456789")
    after = index(plan)
    assert after.table != before.table
    assert after.digest != before.digest
    assert index(plan) == after
    assert [sample.answer for sample in samples] == ["so"] * 5
    with pytest.raises(DymoeError, match="it has 9 bytes, 5 when the records were read"):
        _ = samples[0].image
    assert Records(after.table, range(5), View(plan.path, tmp_path))[0].image == b"123456789"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, lambda: answer)
    (tmp_path / "file").touch()
    monkeypatch.setenv("DYMOE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DymoeError, match=r"file/coin: cannot be written \(.*; DYMOE_CACHE names another folder"):
        index(plan)


# --- one's own data ----------------------------------------------------------------------------------------


def own_stream(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = tmp_path / "pictures"
    records = tree.train("VQAv2", 10, images)
    tree.save(tmp_path / "birds/train.json", records)
    tree.save(tmp_path / "birds/test.json", tree.asked_records("ImageNet", 3, images, "original"))
    rows = [
        {"id": f"p{n}", "image": {"bytes": tree.picture(n), "path": None}, "conversations": [
            {"from": "human", "value": f"<image>\nPlate {n}?"}, {"from": "gpt", "value": "a b"}]}
        for n in range(5)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "plates.parquet")
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps({"id": n, "text": "1+1?", "answer": 2}) + "\n" for n in "xy")
    )
    (tmp_path / "mine.yaml").write_text(
        "name: mine\n"
        "images: pictures\n"
        "tasks:\n"
        "  plates:\n"
        "    train: plates.parquet\n"
        "    test: plates.parquet\n"
        "    validation: lines.jsonl\n"
        "    scorer: soft_accuracy\n"
        "    max_new_tokens: 9\n"
        "  birds: {train: birds/train.json, test: birds/test.json}\n"
    )
    return tmp_path / "mine.yaml"


def test_ones_own_json_and_parquet(tmp_path: Path) -> None:
    file = str(own_stream(tmp_path))
    assert task_names(file, "alphabet") == ("birds", "plates")
    found = load_stream(file, source=Source(**LITTLE))
    plates, birds = found.tasks
    assert (found.name, plates.scorer, plates.max_new_tokens, birds.scorer) == (
        "mine",
        "soft_accuracy",
        9,
        "exact_match",
    )
    assert [sample.image for sample in plates.train] == [tree.picture(n) for n in range(5)]
    assert plates.train[0].question == "Plate 0?"
    assert [(s.id, s.image, s.answer) for s in plates.validation] == [("x", None, "2"), ("y", None, "2")]
    assert (len(birds.train), len(birds.validation), len(birds.test)) == (8, 2, 3)
    for task in found.tasks:
        assert all(scorer(task.scorer)(sample.answer, sample.reference) == 1.0 for sample in task.test)
    assert pickle.loads(pickle.dumps(plates.train))[1].image == tree.picture(1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("scorer: soft", "scoring: soft", r"tasks\.plates\.scoring: unknown key 'scoring'; did you mean scorer"),
        (
            "soft_accuracy",
            "soft_acuracy",
            r"tasks\.plates\.scorer: unknown scoring rule .*mean soft_accuracy",
        ),
        (
            "max_new_tokens: 9",
            "max_new_tokens: 0",
            r"tasks\.plates\.max_new_tokens: expected a whole number from 1",
        ),
        ("    test: plates.parquet\n", "", r"tasks\.plates\.test: is missing"),
        ("birds/test.json", "birds/tset.json", r"tset\.json: cannot be read \(No such file"),
        ("name: mine\n", "name: [\n", r"mine\.yaml: not valid YAML"),
        ("  birds:", "  a/b:", r"mine\.yaml: tasks: 'a/b': it has a '/'"),
        ("  birds:", "  0:", r"mine\.yaml: tasks: 0: expected a text"),
        ("  birds:", "  '0':", r"mine\.yaml: tasks: '0': it has digits alone"),
        ("  birds:", "  items:", r"mine\.yaml: tasks: 'items': it is an attribute"),
        ("  birds:", "  Plates:", r"mine\.yaml: tasks: 'Plates': it differs from 'plates' by case"),
    ],
)
def test_mistakes_in_ones_own_file(old: str, new: str, message: str, tmp_path: Path) -> None:
    file = own_stream(tmp_path)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(DymoeError, match=message):
        load_stream(str(file))


def test_ones_own_test_records_must_be_scorable(tmp_path: Path) -> None:
    file = own_stream(tmp_path)
    file.write_text(file.read_text().replace("soft_accuracy", "iou"))
    with pytest.raises(DymoeError, match=r"plates\.parquet: record 0 \(id 'p0'\): reference: 'bbox'"):
        load_stream(str(file))
    with pytest.raises(DymoeError, match="instructions: 'diverse' is CoIN's"):
        load_stream(str(file), instructions="diverse")
    with pytest.raises(DymoeError, match=r"none\.yaml: no such file"):
        own.task_names(tmp_path / "none.yaml")


# --- checks before a run -----------------------------------------------------------------------------------


def test_sizes_are_compared_with_the_published_ones(tmp_path: Path) -> None:
    root = small(tmp_path, "ScienceQA", trained=6)
    source = Source(root=str(root), validation_share=0)
    told = {row[3] for row in stream.findings(["ScienceQA"], "original", source) if row[1] == "size"}
    assert "6 train records, 12,726 are published" in told
    assert "2 test with image records, 2,017 are published" in told
    task = load(root, "ScienceQA", validation_share=0).tasks[0]
    assert overlap(task.train, task.test) == []
    assert overlap(task.train[:1], task.train) == [("0", "0")]


def test_published_sizes_are_those_of_the_paper() -> None:
    tasks = published()["tasks"]
    assert tuple(tasks) == tree.TASKS == tuple(stream.TASKS)
    assert sum(row["train"] for row in tasks.values()) == 573_840
    assert sum(row["test"] for row in tasks.values()) == 376_437


# --- turns and a whole run ---------------------------------------------------------------------------------


def test_every_answer_of_a_conversation_is_learned(tiny_folder: Path) -> None:
    from dymoe.models import Collator
    from dymoe.models import load as load_model

    lvlm = load_model(str(tiny_folder), "float32")
    collator = Collator(lvlm)
    picture = tree.picture(3, 64)
    turns = (("Why?", "so"), ("And then?", "no"))
    told = Sample("a", picture, "What is it?", "cat", {}, turns)
    alone = Sample("b", picture, "What is it?", "cat", {})
    tokenizer = lvlm.processor.tokenizer
    batch = collator([told, alone])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    learned = tokenizer.decode(labels[labels != -100])
    assert learned.replace(" ", "") == "cat</s>so</s>no</s>"
    text = tokenizer.decode(ids[batch["attention_mask"][0].bool()])
    assert text.count("<image>") == collator([alone])["input_ids"][0].tolist().count(
        tokenizer.convert_tokens_to_ids("<image>")
    )
    assert text.index("cat</s>") < text.index("Why?") < text.index("so</s>") < text.index("And then?")
    single = collator([alone])
    mask = batch["attention_mask"][1].bool()
    assert batch["input_ids"][1][mask].tolist() == single["input_ids"][0].tolist()
    assert batch["labels"][1][mask].tolist() == single["labels"][0].tolist()


def test_two_tasks_end_to_end(tiny_folder: Path, tmp_path: Path) -> None:
    import yaml

    from dymoe.learning.recipe import load_recipe
    from dymoe.learning.run import run
    from dymoe.tasks.scoring.runner import score_files
    from tests.learning.tiny import write_recipe

    root = tree.build(tmp_path / "tree", "fork", trained=10, tested=3, tasks=("ScienceQA", "VQAv2"))
    file = root / "playground/Instructions/VQAv2/train.json"
    records = tree.load(file)
    records[0]["conversations"] = []
    tree.save(file, records)
    path = write_recipe(
        tmp_path / "run.yaml",
        tiny_folder,
        stream="coin",
        tasks=["ScienceQA", "VQAv2"],
        data={"root": str(root), "on_bad": "skip", "validation_share": 0.2},
        training={"steps_per_task": 2, "limit": None},
        settings={"num_experts": 2, "top_k": 2, "rank": 2},
        evaluation={"limit": 2},
    )
    folder = run(load_recipe(path))
    results = json.loads((folder / "results.json").read_text())
    assert results["scoring"] == "corrected"
    assert len(results["matrix"]) == 2
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [(row["file"], row["record"], row["id"]) for row in skipped] == [(str(file), 0, "0")]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["records"] for event in events if event["event"] == "skipped"] == [1]
    described = yaml.safe_load((folder / "run.yaml").read_text())
    assert described["data"]["scorers"]["VQAv2"] == {"scorer": "corrected/vqav2", "max_new_tokens": 16}
    assert described["data"]["samples"]["ScienceQA"] == {"train": 8, "validation": 2, "test": 3}
    assert described["recipe"]["data"]["on_bad"] == "skip"
    # Its answers can be scored again from the files, and come to the same.
    for place, task in enumerate(("ScienceQA", "VQAv2")):
        asked = root / "playground/Instructions" / task / ("val.json" if task == "VQAv2" else "test.json")
        references = tree.save(tmp_path / f"{task}.json", tree.load(asked)[:2])
        (answers,) = folder.glob(f"stages/02-*/predictions/{task}.jsonl")
        again = score_files(answers, references, task, "corrected")
        assert (again.accuracy, again.denominator) == (results["matrix"][1][place], 2)
        assert score_files(answers, references, task, "coin").rule == f"coin/{task.lower()}"
    # The tree may move: what counts is what is in it.
    moved = tmp_path / "moved"
    root.rename(moved)
    run(load_recipe(path, ["--data.root", str(moved)]), resume=True)
    wrong = tree.load(moved / "playground/Instructions/VQAv2/train.json")
    wrong[4]["conversations"][1]["value"] = "another answer"
    tree.save(moved / "playground/Instructions/VQAv2/train.json", wrong)
    with pytest.raises(DymoeError, match=r"\(data\): training data of VQAv2 is"):
        run(load_recipe(path, ["--data.root", str(moved)]), resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"rot": "x"}}, r"data\.rot: unknown key; did you mean data\.root\?"),
        ({"data": {"on_bad": "ignore"}}, r"data\.on_bad: expected one of error, skip, got 'ignore'"),
        ({"data": {"validation_share": 1}}, r"data\.validation_share: expected a number in \[0, 1\)"),
        ({"stream": "none.yaml"}, r"none\.yaml: no such file"),
    ],
)
def test_recipe_keys(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    from dymoe.learning.recipe import load_recipe
    from tests.learning.tiny import write_recipe

    path = write_recipe(tmp_path / "r.yaml", tmp_path, tasks=None, stream="coin")
    recipe = load_recipe(path)
    assert recipe.resolved()["data"]["scoring"] == "corrected"
    assert "data" not in load_recipe(path, ["--stream", "pocket-coin"]).resolved()
    with pytest.raises(DymoeError, match=message):
        load_recipe(write_recipe(tmp_path / "r.yaml", tmp_path, tasks=None, **{"stream": "coin", **change}))


def test_replayed_samples_stay_on_disk(trees: dict[str, Path], tmp_path: Path) -> None:
    from dymoe import methods
    from dymoe.methods import Stage

    tasks = load(trees["coin"], "GQA", "VQAv2").tasks
    method = methods.create("dymoe")
    stage = Stage(1, "GQA", tasks, tmp_path / "1", (), (), 0)
    both = method.training_samples(stage)
    assert isinstance(both, Joined)
    assert len(both) == sum(len(task.train) for task in tasks)
    single = Stage(1, "GQA", tasks[:1], tmp_path / "1", (), (), 0)
    assert method.training_samples(single) is tasks[0].train
