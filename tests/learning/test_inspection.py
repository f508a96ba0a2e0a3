"""What cannot be used is found before anything is trained, once, in every split, and left out where that is asked."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning import inspection
from dymoe.learning.recipe import Recipe, load_recipe
from dymoe.models import Collator, Lvlm, load
from dymoe.models.options import ModelOptions
from dymoe.models.shapes import outline
from dymoe.preflight.doctor import check
from dymoe.tasks import Stream
from tests.learning import own_data
from tests.learning.tiny import write_recipe
from tests.models.families import FAMILIES

SPLITS = ("train", "validation", "test")
BAD = 2  # the record that is made unusable


@pytest.fixture(scope="module")
def lvlm(tiny_folder: Path) -> Lvlm:
    return outline(str(tiny_folder), ModelOptions())


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYMOE_CACHE", str(tmp_path / "cache"))


def made(tmp_path: Path, tiny_folder: Path, more: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A recipe over the one task "colours"."""
    own_data.write_task(tmp_path, "colours")
    path = own_data.write_stream(tmp_path, {"colours": {"max_new_tokens": 8, **(more or {})}})
    training = {"steps_per_task": 2, "limit": None, **changes.pop("training", {})}
    return write_recipe(tmp_path / "r.yaml", tiny_folder, stream=str(path), tasks=None, training=training, **changes)


def change(tmp_path: Path, split: str, how: Callable[[dict[str, Any]], None], number: int | None = BAD) -> None:
    """Change one record of a split, or all of them."""
    records = own_data.read(tmp_path, "colours", split)
    for record in records if number is None else [records[number]]:
        how(record)
    own_data.save(tmp_path, "colours", split, records)


def truncate(tmp_path: Path, split: str) -> None:
    file = tmp_path / "pictures" / "colours" / f"{split}-{BAD}.jpg"
    file.write_bytes(file.read_bytes()[:-40])


def text(**texts: str) -> Callable[[Path, str], None]:
    return lambda tmp_path, split: change(tmp_path, split, lambda record: own_data.ask(record, **texts))


def box(record: dict[str, Any]) -> None:
    """A box that is read as one, written as the rule takes none from a model."""
    own_data.ask(record, answer="[2.5e-1,0.3,0.75,0.9]")


BROKEN: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "a picture that breaks off": (truncate, "broken image of"),
    "an end token in a question": (text(question="what is </s> here?"), "its question contains the special token </s>"),
    "an image token in an answer": (text(answer="a ![plot](<image>)"), "its answer contains the special token <image>"),
    "padding in a question": (text(question="what does <pad> say?"), "its question contains the special token <pad>"),
    "a start token in an answer": (text(answer="<s>red"), "its answer contains the special token <s>"),
    "a question that is too long": (text(question="why? " * 60), "more than max_length 200"),
}


def inspected(recipe: Recipe, lvlm: Lvlm, **how: Any) -> tuple[Stream, list[inspection.Inspection]]:
    stream = recipe.load_stream()
    return stream, inspection.inspect(stream, recipe, lvlm, **how)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("reason", BROKEN)
def test_a_sample_that_would_end_a_run_stops_it_before_or_is_left_out(
    reason: str, split: str, tmp_path: Path, tiny_folder: Path, lvlm: Lvlm
) -> None:
    harm, told = BROKEN[reason]
    path = made(tmp_path, tiny_folder, model_options={"max_length": 200})
    harm(tmp_path, split)
    words = ["--evaluation.split", "validation"] if split == "validation" else []
    stream, found = inspected(load_recipe(path, words), lvlm)
    with pytest.raises(DymoeError) as error:
        inspection.refuse(found)
    file = tmp_path / "colours" / f"{split}.json"
    assert f"1 samples cannot be used (1 of colours's {split}), the first: {file}: record {BAD}: " in str(error.value)
    assert f"sample '{split}-{BAD}': " in str(error.value)
    assert told in str(error.value)
    assert "data.on_bad: skip leaves such records out" in str(error.value)
    stream, found = inspected(load_recipe(path, [*words, "--data.on_bad", "skip"]), lvlm)
    rest = inspection.without(stream, found)
    (row,) = rest.skipped
    assert (row["task"], row["split"], row["file"], row["record"], row["id"]) == (
        *("colours", split, str(file), BAD, f"{split}-{BAD}"),
    )
    before, after = getattr(stream.tasks[0], split), getattr(rest.tasks[0], split)
    assert [sample.id for sample in after] == [sample.id for sample in before if sample.id != f"{split}-{BAD}"]
    assert all(getattr(rest.tasks[0], other) is getattr(stream.tasks[0], other) for other in SPLITS if other != split)


WORTHLESS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], None], str]] = {
    "a box in another form": ({"scorer": "iou", "max_new_tokens": 40}, box, "scores 0 by iou"),
    "answers of another row": (
        {"scorer": "soft_accuracy"},
        lambda record: record.update(answers=["dog"] * 10),
        "scores 0 by soft_accuracy",
    ),
    "an answer that is cut": (
        {},
        lambda record: own_data.ask(record, answer="a ruby-throated hummingbird"),
        "has more than max_new_tokens 8 tokens",
    ),
}


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("reason", WORTHLESS)
def test_right_answers_that_cannot_score(
    reason: str, split: str, tmp_path: Path, tiny_folder: Path, lvlm: Lvlm
) -> None:
    more, harm, told = WORTHLESS[reason]
    words = ["--evaluation.split", split]
    path = made(tmp_path, tiny_folder, more)
    if "scorer" in more and more["scorer"] == "iou":
        for name in SPLITS:
            change(tmp_path, name, lambda record: own_data.ask(record, answer="[0.25,0.3,0.75,0.9]"), None)
    change(tmp_path, split, harm)
    # Some: a run goes on and says what can be reached; asked to skip, it leaves them out.
    stream, found = inspected(load_recipe(path, words), lvlm)
    inspection.refuse(found)
    (worthless,) = (each for each in found if each.worthless)
    assert (worthless.split, worthless.reachable) == (split, 75.0)
    assert told in inspection.warning(worthless)
    assert "1 of 4" in inspection.warning(worthless)
    assert "75.0 % at most" in inspection.warning(worthless)
    stream, found = inspected(load_recipe(path, [*words, "--data.on_bad", "skip"]), lvlm)
    rest = inspection.without(stream, found)
    assert [row["record"] for row in rest.skipped] == [BAD]
    assert len(getattr(rest.tasks[0], split)) == 3
    # All: accuracy would be 0 whatever is learned.
    change(tmp_path, split, harm, None)
    stream, found = inspected(load_recipe(path, words), lvlm)
    with pytest.raises(DymoeError, match=r"4 of 4 .* reaches 0.0 % at most"):
        inspection.refuse(found)
    stream, found = inspected(load_recipe(path, [*words, "--data.on_bad", "skip"]), lvlm)
    with pytest.raises(DymoeError, match=f"no {split} sample can be used"):
        inspection.without(stream, found)


def test_a_run_leaves_out_and_lists_what_cannot_be_used_in_training_and_test(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path, tiny_folder)
    assert main(["run", str(path)]) == 0  # as a good one it has neither list nor count
    run = tmp_path / "r"
    assert not (run / "skipped.jsonl").exists()
    assert "left_out" not in json.loads((run / "results.json").read_text())
    truncate(tmp_path, "train")
    change(tmp_path, "train", lambda record: own_data.ask(record, answer="<image>"), 0)
    change(tmp_path, "test", lambda record: own_data.ask(record, question="</s>?"))
    capsys.readouterr()
    assert main(["run", str(path), "--output", str(tmp_path / "stops")]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("dymoe: 3 samples cannot be used (2 of colours's train, 1 of colours's test), the first: ")
    assert not (tmp_path / "stops").exists()
    assert main(["run", str(path), "--output", str(tmp_path / "skips"), "--data.on_bad", "skip"]) == 0
    told = capsys.readouterr().err
    assert "3 records left out (2 of colours's train, 1 of colours's test), the first: " in told
    rows = [json.loads(line) for line in (tmp_path / "skips" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["split"], row["record"]) for row in rows] == [("train", 0), ("train", BAD), ("test", BAD)]
    results = json.loads((tmp_path / "skips" / "results.json").read_text())
    assert results["left_out"] == {"colours": {"train": 2, "test": 1}}
    assert results["samples"] == {"colours": 3}


def test_found_once_and_anew_when_anything_changes(tmp_path: Path, tiny_folder: Path, lvlm: Lvlm) -> None:
    path = made(tmp_path, tiny_folder)
    own_data.write_task(tmp_path, "colours", train=inspection.CHUNK)
    recipe, looked = load_recipe(path), []

    def progress(samples: str, done: int, count: int) -> None:
        looked.append((samples, done, count))

    _, first = inspected(recipe, lvlm, progress=progress)
    assert looked == [("colours, train", inspection.CHUNK, inspection.CHUNK)]
    _, again = inspected(recipe, lvlm, progress=progress)
    assert (len(looked), again) == (1, first)
    inspected(load_recipe(path, ["--model_options.max_length", "300"]), lvlm, progress=progress)
    assert len(looked) == 2
    picture = tmp_path / "pictures" / "colours" / "train-5.jpg"
    good = picture.read_bytes()
    picture.write_bytes(b"x" * len(good))  # of the same size
    _, broken = inspected(recipe, lvlm, progress=progress)
    assert [(one.position, one.kind) for one in broken[0].unusable] == [(5, "picture")]
    assert len(looked) == 3
    picture.write_bytes(good + b"\0")
    _, mended = inspected(recipe, lvlm, progress=progress)
    assert mended[0].unusable == ()
    picture.unlink()
    with pytest.raises(DymoeError, match=r"record 5 \(id 'train-5'\): image 'colours/train-5.jpg'"):
        recipe.load_stream()


def test_a_limit_counts_usable_samples_and_bounds_the_look(tmp_path: Path, tiny_folder: Path, lvlm: Lvlm) -> None:
    path = made(tmp_path, tiny_folder, training={"limit": 3})
    truncate(tmp_path, "train")
    file = tmp_path / "pictures" / "colours" / "train-5.jpg"
    file.write_bytes(b"no picture")
    words = ["--data.on_bad", "skip"]
    stream, found = inspected(load_recipe(path, words), lvlm)
    assert [each.samples for each in found] == [4, 4, 4]
    rest = inspection.without(stream, found).tasks[0].train[:3]
    assert [sample.id for sample in rest] == ["train-0", "train-1", "train-3"]
    _, found = inspected(load_recipe(path, words), lvlm, everything=True)
    assert [one.position for one in found[0].unusable] == [2, 5]
    _, found = inspected(load_recipe(path, words), lvlm, most=1)
    assert [each.samples for each in found] == [1, 1, 1]


def test_lengths_are_those_of_batches(tmp_path: Path, tiny_folder: Path, lvlm: Lvlm) -> None:
    stream, found = inspected(load_recipe(made(tmp_path, tiny_folder)), lvlm)
    collator = Collator(lvlm)
    train = [int(collator([sample])["input_ids"].shape[1]) for sample in stream.tasks[0].train]
    asked = [int(collator.prompts([sample])["input_ids"].shape[1]) for sample in stream.tasks[0].test]
    assert [each.tokens for each in found if each.split != "validation"] == [
        (sum(train) / len(train), max(train)),
        (sum(asked) / len(asked), max(asked)),
    ]


def test_the_doctor_finds_the_same_and_lists_all_of_it(tmp_path: Path, tiny_folder: Path, lvlm: Lvlm) -> None:
    path = made(tmp_path, tiny_folder)
    truncate(tmp_path, "train")
    change(tmp_path, "test", lambda record: own_data.ask(record, question="</s>?"))
    change(tmp_path, "test", lambda record: own_data.ask(record, answer="a ruby-throated hummingbird"), 0)
    found = check(load_recipe(path))
    levels = {finding.what: finding.level for finding in found.findings if finding.where == "colours"}
    assert (levels["pictures"], levels["tokens"], levels["answers"]) == ("wrong", "wrong", "note")
    assert [(row["split"], row["position"]) for row in found.unusable] == [("train", BAD), ("test", 0), ("test", BAD)]
    found = check(load_recipe(path, ["--data.on_bad", "skip"]))
    assert not [one for one in found.findings if one.level == "wrong" and one.what in ("pictures", "tokens")]
    # Without the model what needs none is checked all the same.
    found = check(replace(load_recipe(path), model=str(tmp_path / "nowhere")))
    wrong = {finding.what: finding.result for finding in found.findings if finding.level == "wrong"}
    assert set(wrong) == {"pictures", "model"}
    assert "special tokens, token lengths and max_new_tokens were not checked" in wrong["model"]


@pytest.mark.parametrize(
    ("file", "changed", "told"),
    [
        ("config.json", {"image_token_index": 5}, "config.json: image_token_index: it is 5, the tokenizer has <image>"),
        ("tokenizer_config.json", {"eos_token": None}, "tokenizer_config.json: eos_token: it is missing"),
        ("chat_template.jinja", "{{ messages[0].a.b }}", "its chat template prepares no picture"),
        ("chat_template.jinja", "{% for x in %}", "its chat template prepares no picture"),
        ("chat_template.jinja", "{{ messages[0]['role'] }}", "the chat template writes <image> 0 times"),
    ],
)
def test_other_faults_of_a_models_folder(file: str, changed: Any, told: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    next(family for family in FAMILIES if family.name == "llava").save(folder)
    text = changed if isinstance(changed, str) else json.dumps({**json.loads((folder / file).read_text()), **changed})
    (folder / file).write_text(text)
    with pytest.raises(DymoeError) as error:
        outline(str(folder), ModelOptions())
    assert str(error.value).startswith(f"model '{folder}': ")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("patch_size", None, "patch_size: it is missing, config.json has 14 (vision_config.patch_size)"),
        ("patch_size", 7, "patch_size: it is 7, config.json has 14 (vision_config.patch_size)"),
        ("vision_feature_select_strategy", None, "vision_feature_select_strategy: it is missing, config.json has"),
        ("num_additional_image_tokens", 0, "num_additional_image_tokens: it is 0, 1 would be right"),
    ],
)
def test_a_processor_that_does_not_fit_is_the_models_fault(
    key: str, value: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    next(family for family in FAMILIES if family.name == "llava").save(folder)
    file = folder / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    path = made(tmp_path, folder)
    capsys.readouterr()
    assert main(["run", str(path)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"dymoe: model '{folder}': processor_config.json: {told}")
    assert not (tmp_path / "r").exists()
    with pytest.raises(DymoeError, match=r"processor_config\.json: "):
        load(str(folder), "float32")
    found = [finding for finding in check(load_recipe(path)).findings if finding.level == "wrong"]
    assert [finding.what for finding in found] == ["model"]
    assert told in found[0].result


def test_what_is_mended_in_a_later_task_lets_a_run_go_on(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = made(tmp_path, tiny_folder), tmp_path / "r"
    own_data.write_task(tmp_path, "later")
    own_data.write_stream(tmp_path, {name: {"max_new_tokens": 8} for name in ("colours", "later")})
    picture = tmp_path / "pictures" / "later" / f"train-{BAD}.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-40])
    tests = own_data.read(tmp_path, "later", "test")
    own_data.save(tmp_path, "later", "test", [{**record, "text": "</s>?"} for record in tests[:1]] + tests[1:])
    words = ["run", str(path), "--data.on_bad", "skip"]
    assert main(words) == 0
    assert json.loads((run / "results.json").read_text())["left_out"] == {"later": {"train": 1, "test": 1}}
    # As a kill leaves it that comes after the first task.
    shutil.rmtree(next(run.glob("stages/02-*")))
    (run / "results.json").unlink()
    picture.write_bytes(whole)
    own_data.save(tmp_path, "later", "test", tests)
    assert main([*words, "--resume"]) == 0
    results = json.loads((run / "results.json").read_text())
    assert ("left_out" in results, results["samples"]) == (False, {"colours": 4, "later": 4})
    # What a task learned from is not changed afterwards.
    shutil.rmtree(next(run.glob("stages/02-*")))
    change(tmp_path, "train", lambda record: own_data.ask(record, answer="pink"))
    capsys.readouterr()
    assert main([*words, "--resume"]) == 2
    assert "training data of colours" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["dymoe", "cmoe"])
def test_tasks_without_pictures_and_mixed_ones(method: str, tmp_path: Path, tiny_folder: Path) -> None:
    path = made(tmp_path, tiny_folder, method=method)
    few = {"rank": 2, "top_k": 2, **({"experts": 2, "locator_epochs": 1} if method == "cmoe" else {"num_experts": 2})}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "settings": few}))
    own_data.write_task(tmp_path, "sums")
    own_data.write_task(tmp_path, "mixed")
    for split in SPLITS:
        sums, mixed = own_data.read(tmp_path, "sums", split), own_data.read(tmp_path, "mixed", split)
        for record in (*sums, *mixed[::2]):
            del record["image"]
        for name, records in (("sums", sums), ("mixed", mixed)):
            for record in records:
                if "conversations" in record and "image" not in record:
                    own_data.ask(record, question="How much is one and one?")
            own_data.save(tmp_path, name, split, records)
    own_data.write_stream(tmp_path, {name: {"max_new_tokens": 8} for name in ("sums", "colours", "mixed")})
    assert main(["run", str(path)]) == 0
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert (results["samples"], "left_out" in results) == ({"sums": 4, "colours": 4, "mixed": 4}, False)
