"""Streams that a run only asks: before the first task and after every stage, without a trace in what it learns."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.evaluation.intervals import accuracy, change
from dymoe.learning.recipe import load_recipe
from dymoe.models import Collator, load
from dymoe.preflight.doctor import check
from dymoe.preflight.dryrun import dry_run
from dymoe.tasks import load_stream
from dymoe.tasks.scoring import scorer
from tests.learning.many import forked
from tests.learning.own_data import jpeg
from tests.learning.tiny import write_recipe

LABELS = ("yes", "no", "yes", "no", "no")


def write_pope(folder: Path, labels: tuple[str, ...] = LABELS) -> Path:
    """A small tree in POPE's published form, one JSON object a line, and the stream file over it."""
    (folder / "val2014").mkdir(parents=True)
    lines = []
    for number, label in enumerate(labels, start=1):
        name = f"COCO_val2014_{number:012d}.jpg"
        (folder / "val2014" / name).write_bytes(jpeg("red", 24 + number))
        text = "Is there a snowboard in the image?"
        lines.append(json.dumps({"question_id": number, "image": name, "text": text, "label": label}))
    (folder / "coco_pope_random.json").write_text("\n".join(lines))
    task = {"test": "coco_pope_random.json", "images": "val2014", "scorer": "pope", "max_new_tokens": 8}
    file = folder / "pope.yaml"
    file.write_text(yaml.safe_dump({"name": "pope", "tasks": {"random": task}}))
    return file


def read(run: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    return results


@pytest.fixture(scope="module")
def watched(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watched")
    streams = ["pocket-general", str(write_pope(path / "pope"))]
    assert main(["run", str(write_recipe(path / "run.yaml", tiny_folder, evaluation={"watch": streams}))]) == 0
    return path / "run"


@pytest.fixture
def copy(watched: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of the run, and the words that go on with it."""
    shutil.copytree(watched, tmp_path / "run")
    recipe = watched.with_suffix(".yaml")
    return tmp_path / "run", ["run", str(recipe), "--resume", "--output", str(tmp_path / "run")]


def test_what_is_learned_does_not_depend_on_it(whole: Path, watched: Path) -> None:
    one, other = read(whole), read(watched)
    assert one["group_hashes"] == other["group_hashes"]
    for key in ("tasks", "matrix", "lenient_matrix", "metrics", "answers", "drift", "samples", "steps", "training"):
        assert one[key] == other[key], key
    assert "watch" not in one
    for file in whole.glob("stages/*/predictions/*"):
        assert file.read_bytes() == (watched / file.relative_to(whole)).read_bytes()


def test_it_is_asked_before_the_first_task_and_after_every_stage(watched: Path) -> None:
    found = read(watched)["watch"]
    assert list(found) == ["Captions", "Text", "random"]
    folders = [watched / "zero-shot", *sorted(watched.glob("stages/*"))]
    assert len(folders) == 3
    for task, row in found.items():
        for place, folder in enumerate(folders):
            lines = (folder / "watch" / "predictions" / f"{task}.jsonl").read_text().splitlines()
            scores = [json.loads(line)["score"] for line in lines]
            assert len(scores) == row["samples"] == 4
            assert row["scores"][place] == pytest.approx(scores, abs=1e-4)
            assert row["accuracy"][place] == pytest.approx(25 * sum(scores))
            assert row["lenient"][place] >= row["accuracy"][place]
        assert len(row["accuracy"]) == len(row["measures"]["loss"]) == 3
        assert len(set(row["measures"]["loss"])) == 3  # learning changes what the model thinks of the answers
    assert not list(watched.glob("zero-shot/predictions/*"))  # the tasks themselves were not to be asked before


def test_the_loss_is_that_of_the_right_answers_tokens(watched: Path, tiny_folder: Path) -> None:
    lvlm = load(str(tiny_folder), "float32")
    collator = Collator(lvlm)
    task = next(task for task in load_stream("pocket-general").tasks if task.name == "Captions")
    total, tokens = 0.0, 0
    for sample in task.test[:4]:
        batch = collator([sample])
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = lvlm.model(**batch).logits.double().log_softmax(-1)
        for position in range(1, labels.shape[1]):
            if labels[0, position] != -100:
                total -= float(logits[0, position - 1, labels[0, position]])
                tokens += 1
    assert read(watched)["watch"]["Captions"]["measures"]["loss"][0] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that may use CUDA must not be forked")
def test_processes_share_the_questions(watched: Path, tiny_folder: Path, tmp_path: Path) -> None:
    streams = load_recipe(watched.with_suffix(".yaml")).evaluation.watch
    training, evaluation = {"batch_size": 2, "steps_per_task": 1}, {"watch": streams}
    recipe = write_recipe(
        tmp_path / "run.yaml", tiny_folder, tasks=["ImageNet"], training=training, evaluation=evaluation
    )
    assert forked(2, main, ["run", str(recipe)]) == [0, 0]
    for task, row in read(tmp_path / "run")["watch"].items():
        alone = read(watched)["watch"][task]  # the base model's answers, whatever was learned then
        assert row["scores"][0] == alone["scores"][0]
        assert row["measures"]["loss"][0] == pytest.approx(alone["measures"]["loss"][0], rel=1e-5)


def test_popes_measures_are_those_of_its_answers(watched: Path) -> None:
    found = read(watched)["watch"]["random"]["measures"]
    for place, folder in enumerate([watched / "zero-shot", *sorted(watched.glob("stages/*"))]):
        lines = (folder / "watch" / "predictions" / "random.jsonl").read_text().splitlines()
        said = [scorer("pope")(json.loads(line)["prediction"], {"answer": "yes"}) == 1 for line in lines]
        assert found["yes ratio"][place] == 25 * sum(said)
        hits = sum(1 for yes, label in zip(said, LABELS[:4], strict=True) if yes and label == "yes")
        assert found["recall"][place] == 50 * hits


def test_it_goes_on_where_it_was_interrupted(
    copy: tuple[Path, list[str]], watched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = copy
    stage = run / "stages" / "02-VQAv2"
    (stage / "done.json").unlink()
    scores = json.loads((stage / "watch" / "scores.json").read_text())
    (stage / "watch" / "scores.json").write_text(json.dumps({"Captions": scores["Captions"]}))
    kept = (stage / "watch" / "predictions" / "Captions.jsonl").stat().st_mtime_ns
    assert main(words) == 0
    assert read(run)["watch"] == read(watched)["watch"]
    assert json.loads((stage / "watch" / "scores.json").read_text()) == scores
    assert (stage / "watch" / "predictions" / "Captions.jsonl").stat().st_mtime_ns == kept


def test_it_is_vouched_for_as_the_rest_is(copy: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    run, words = copy
    file = run / "zero-shot" / "watch" / "predictions" / "Text.jsonl"
    file.write_text(file.read_text().replace('"score": 0.0', '"score": 1.0'))
    assert main(words) == 2
    assert f"{file}: was changed since the stage wrote it" in capsys.readouterr().err


def test_another_watch_is_another_run_and_other_questions_are_other_data(
    copy: tuple[Path, list[str]], watched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = copy
    assert main([*words, "--evaluation.watch", "[pocket-general]"]) == 2
    told = capsys.readouterr().err
    assert "run of another recipe: " in told
    assert "evaluation.watch is ['pocket-general', " in told
    file = watched.parent / "pope" / "coco_pope_random.json"
    text = file.read_text()
    try:
        file.write_text(text.replace("a snowboard", "an oven"))
        assert main(words) == 2
        assert "other conditions (data): evaluation data of random is" in capsys.readouterr().err
    finally:
        file.write_text(text)


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        (["pocket-generl"], "evaluation.watch: unknown stream 'pocket-generl'; did you mean pocket-general?"),
        (["pocket-coin"], "evaluation.watch: stream 'pocket-coin' has a task 'ImageNet' as the run has already"),
        (["pocket-general", "pocket-general"], "evaluation.watch: stream 'pocket-general' has a task 'Captions'"),
        (["none.yaml"], "evaluation.watch: none.yaml: no such file"),
        ("pocket-general", "evaluation.watch: expected a list"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(watch: Any, message: str, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "run.yaml", tiny_folder, evaluation={"watch": watch})
    with pytest.raises(DymoeError) as caught:
        load_recipe(recipe)
    assert message in str(caught.value)


def test_its_samples_are_looked_at_before_anything_is_trained(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYMOE_CACHE", str(tmp_path / "cache"))
    stream = write_pope(tmp_path / "pope")
    picture = tmp_path / "pope" / "val2014" / "COCO_val2014_000000000002.jpg"
    picture.write_bytes(picture.read_bytes()[:-40])
    recipe = write_recipe(tmp_path / "run.yaml", tiny_folder, evaluation={"watch": [str(stream)]})
    assert main(["run", str(recipe)]) == 2
    assert "1 samples cannot be used (1 of random's test), the first: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    found = [each for each in check(load_recipe(recipe)).findings if each.level == "wrong"]
    assert [each.what for each in found] == ["pictures"]
    skipping = load_recipe(recipe, ["--data.on_bad", "skip"])
    assert "data" in skipping.resolved()
    assert main(["run", str(recipe), "--data.on_bad", "skip", "--training.steps_per_task", "1"]) == 0
    assert "1 of random's test" in capsys.readouterr().err
    assert read(tmp_path / "run")["watch"]["random"]["samples"] == 4  # the fifth question took the place of the second


def test_a_task_without_training_file_is_asked_and_not_learned(tiny_folder: Path, tmp_path: Path) -> None:
    stream = write_pope(tmp_path / "pope")
    (task,) = load_stream(str(stream)).tasks
    assert (len(task.train), len(task.validation), len(task.test)) == (0, 0, 5)
    assert [sample.answer for sample in task.test] == list(LABELS)
    recipe = load_recipe(write_recipe(tmp_path / "run.yaml", tiny_folder, stream=str(stream), tasks=None))
    from dymoe.learning.run import run

    with pytest.raises(DymoeError, match=r"task 'random' has no training samples; .*evaluation\.watch only asks it"):
        run(recipe)
    recipe = load_recipe(tmp_path / "run.yaml", ["--evaluation.split", "validation", "--stream", "pocket-coin"])
    recipe.evaluation.watch = [str(stream)]
    with pytest.raises(DymoeError, match="task 'random': its validation split is empty"):
        run(recipe)


def test_a_dry_run_asks_it_too(watched: Path, tiny_folder: Path) -> None:
    rows = {row.task: row for row in dry_run(load_recipe(watched.with_suffix(".yaml")))}
    assert list(rows) == ["ImageNet", "VQAv2", "Captions", "Text", "random"]
    for name in ("Captions", "Text", "random"):
        assert rows[name].step_seconds is None
        assert (rows[name].answers_per_second or 0) > 0
        assert (rows[name].asking_hours or 0) > 0


def test_it_is_shown_beside_the_matrix_and_in_the_report(
    watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    capsys.readouterr()
    assert main(["show", str(watched)]) == 0
    printed = capsys.readouterr().out
    for row in read(watched)["watch"].values():
        for place in range(3):
            told = accuracy([row["scores"][place]])
            assert f"{told.value:.1f} ({told.low:.0f}–{told.high:.0f})" in printed
        assert change(row["scores"][:1], row["scores"][-1:]).text(sign=True) in printed
        assert f"{row['measures']['loss'][0]:.2f}" in printed
    assert main(["report", str(watched), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "General ability" in page
    assert change(*(read(watched)["watch"]["Captions"]["scores"][end : end + 1 or None] for end in (0, -1))).text(
        sign=True
    ) in page.replace("&#43;", "+")


def test_it_is_shared_with_the_numbers_as_far_as_the_stages_are(watched: Path, tmp_path: Path) -> None:
    assert main(["push", str(watched), f"file:{tmp_path / 'all'}"]) == 0
    assert main(["push", str(watched), f"file:{tmp_path / 'first'}", "--stage", "1"]) == 0
    whole = read(watched)["watch"]
    assert read(tmp_path / "all")["watch"] == whole
    for task, row in read(tmp_path / "first")["watch"].items():
        assert row["accuracy"] == whole[task]["accuracy"][:2]
        assert row["scores"] == whole[task]["scores"][:2]
        assert row["measures"]["loss"] == whole[task]["measures"]["loss"][:2]
    card = (tmp_path / "all" / "README.md").read_text()
    assert "| after | Captions | Text | random |" in card
    assert f"| before | {whole['Captions']['accuracy'][0]:.2f} |" in card
