"""A run folder damaged, copied in part or worked on twice: one clear line, and nothing computed in silence."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import yaml

from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.files import TEMPORARY
from dymoe.learning.folder import RunFolder
from dymoe.learning.progress import Display
from dymoe.learning.recipe import load_recipe
from dymoe.learning.run import run
from tests.learning.tiny import write_recipe

FIRST, SECOND = "stages/01-ImageNet", "stages/02-VQAv2"
TRAINING = {"steps_per_task": 4, "save_steps": 3, "limit": 8, "dynamics_every": 2}


class Stop(Display):
    """Interrupts the run at a step of stage 2, or when a task of it is evaluated."""

    def __init__(self, at: str | int) -> None:
        super().__init__("damage", 2)
        self.at, self.now = at, 0

    def note(self, text: str) -> None:
        pass

    def stage(self, index: int, name: str) -> None:
        self.now = index

    def step(self, step: int, steps: int, logs: dict) -> None:
        if (self.now, step) == (2, self.at):
            raise KeyboardInterrupt

    def evaluating(self, task: str, done: int, samples: int) -> None:
        if (self.now, task) == (2, self.at):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def states(tiny_folder, tmp_path_factory):
    """One run in three states: `training` stopped in its second stage, `asking` in that one's evaluation, `done`."""
    root = tmp_path_factory.mktemp("states")
    recipe = write_recipe(
        root / "run.yaml",
        tiny_folder,
        training=TRAINING,
        evaluation={"limit": 2},
        **{"with": {"replay": {"size": 2}, "pruning": {"share": 0.25}}},
    )
    for state, at in (("training", 4), ("asking", "VQAv2"), ("done", None)):
        display = Stop(at) if at else Display("damage", 2)
        try:
            run(load_recipe(recipe), resume=True, display=display)
        except KeyboardInterrupt:
            assert at
        shutil.copytree(root / "run", root / state)
    return root, recipe


@pytest.fixture
def copied(states, tmp_path):
    """Copies a state of the run; gives its folder and a function that goes on with it, as the command does."""
    root, recipe = states

    def copy(state: str) -> Path:
        return Path(shutil.copytree(root / state, tmp_path / "run"))

    def go_on(*words: str) -> int:
        return main(["run", str(recipe), "--output", str(tmp_path / "run"), "--resume", *words])

    return copy, go_on


def told(capsys) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def results(folder: Path) -> dict:
    """The numbers, without what says when and where they were computed."""
    values = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in values.items() if key not in ("name", "seconds", "machine", "resumed_at")}


# ---- what a stage's marker vouches for -------------------------------------------------------------------------------

DAMAGES = {
    "missing": None,
    "empty": b"",
    "list": b"[1, 2]\n",
    "null": b"null\n",
    "number": b"NaN\n",
    "types": b'{"group": 1, "hashes": [], "tasks": 3, "seconds": null, "files": "x", "recipe": "x", "event": 1}\n',
    "cut": lambda data: data[: len(data) // 2],
    "letter": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
}


def damage(file: Path, how: str) -> None:
    change = DAMAGES[how]
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()) if callable(change) else change)


STAGE = (
    *("done.json", "training.json", "scores.json", "routing.json", "dynamics.jsonl", "method/replay.json"),
    *("method/pruning.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    "predictions/ImageNet.jsonl",
)


@pytest.mark.parametrize("how", DAMAGES)
def test_every_file_of_a_finished_stage_is_compared(copied, capsys, how):
    copy, go_on = copied
    run = copy("done")
    before = sorted(path.name for path in run.rglob("*"))
    for name in STAGE:
        kept = (run / FIRST / name).read_bytes()
        damage(run / FIRST / name, how)
        assert go_on() == 2, name
        assert str(run / FIRST) in told(capsys)
        (run / FIRST / name).write_bytes(kept)
        assert sorted(path.name for path in run.rglob("*")) == before  # nothing was learned, nothing was written
    assert go_on() == 0  # and as it was, it is kept


def test_a_folder_that_a_copy_left_out_is_missed(copied, states, capsys):
    copy, go_on = copied
    run = copy("done")
    for name in ("adapter", "predictions", "method", ""):
        (run / FIRST / name).rename(run / "aside")
        assert go_on() == 2
        assert str(run / FIRST) in told(capsys)
        (run / "aside").rename(run / FIRST / name)
    shutil.rmtree(run / FIRST / "adapter")
    for stage in (FIRST, SECOND):  # as the message says
        shutil.rmtree(run / stage)
    assert go_on() == 0
    assert results(run) == results(states[0] / "done")


@pytest.mark.parametrize("how", ["missing", "list", "letter"])
@pytest.mark.parametrize("name", ["scores.json", "routing.json", "predictions/ImageNet.jsonl"])
def test_answers_that_were_damaged_are_refused_or_given_again(copied, states, capsys, name, how):
    copy, go_on = copied
    run = copy("asking")
    file = run / SECOND / name
    damage(file, how)
    if go_on() == 2:
        assert str(file) in told(capsys)
        file.unlink()
        assert go_on() == 0
    assert results(run) == results(states[0] / "done")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_trained_stage_that_is_not_evaluated_yet_is_compared_too(copied, capsys, how):
    copy, go_on = copied
    run = copy("asking")
    for name in ("training.json", "adapter/adapter_config.json", "method/replay.json"):
        kept = (run / SECOND / name).read_bytes()
        damage(run / SECOND / name, how)
        if (name, how) != ("training.json", "missing"):  # then the stage is trained from its checkpoint
            assert go_on() == 2, name
            assert str(run / SECOND) in told(capsys)
        (run / SECOND / name).write_bytes(kept)


@pytest.mark.parametrize("how", DAMAGES)
def test_the_runs_own_files(copied, capsys, how):
    copy, go_on = copied
    run = copy("done")
    kept = (run / "run.yaml").read_bytes()
    if how != "letter":  # which may stand in what is free
        damage(run / "run.yaml", how)
        assert go_on() == 2
        assert str(run) in told(capsys)
    (run / "run.yaml").write_bytes(kept)
    damage(run / "events.jsonl", how)
    code = go_on()
    line = capsys.readouterr().err
    assert "Traceback" not in line
    if how in ("missing", "empty", "cut"):  # what is left of the log is good
        assert code == 0
        assert "of 4 steps of stage" in line
    elif how != "letter":  # which may stand in a number
        assert code == 2
        assert f"{run / 'events.jsonl'}: line 1" in line


def test_the_numbers_do_not_depend_on_the_log(copied, states, capsys):
    copy, go_on = copied
    run = copy("training")
    (run / "events.jsonl").unlink()
    assert go_on() == 0
    assert "events.jsonl: 0 of 4 steps of stage 1 are left" in capsys.readouterr().err
    assert results(run) == results(states[0] / "done")


def test_the_event_of_a_stage_is_there_once(copied):
    copy, go_on = copied
    run = copy("done")
    (run / SECOND / "done.json").unlink()  # as a kill between the event and the marker leaves it
    (run / SECOND / "trainer/checkpoint-3").mkdir(parents=True)
    assert go_on() == 0
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in events if event["event"] == "stage"] == [1, 2]
    assert not (run / SECOND / "trainer").exists()


def test_what_others_put_into_the_folder_stays(copied):
    copy, go_on = copied
    run = copy("training")
    mine = [run / name for name in (".notes.md", ".backup.2026/thesis.tex", f"{FIRST}/.remarks.txt", "plot.png")]
    mine += [run / SECOND / "trainer" / name for name in ("notes.txt", "checkpoint-best/a", "checkpoint-3.bak/a")]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    ours = [run / f"{TEMPORARY}a", run / FIRST / f"{TEMPORARY}b"]
    for file in ours:
        file.write_text("half")
    assert go_on() == 0
    assert all(file.read_text() == "mine" for file in mine)
    assert not any(file.exists() for file in ours)


# ---- two runs in one folder ------------------------------------------------------------------------------------------


def begin(path: Path, number: int, barrier) -> None:
    barrier.wait(timeout=30)
    try:
        folder, error = RunFolder(path, resume=bool(number % 2)), ""
        folder.marker.write_text(str(number))
    except DymoeError as refusal:
        error = str(refusal)
    path.with_name(f"{path.name}-{number}").write_text(error)
    barrier.wait(timeout=30)  # the lock is kept until all have tried
    os._exit(0)


def test_of_runs_that_begin_together_one_goes_on(tmp_path):
    context = multiprocessing.get_context("fork")
    for turn in range(5):
        path, barrier = tmp_path / f"run{turn}", context.Barrier(4)
        some = [context.Process(target=begin, args=(path, number, barrier)) for number in range(4)]
        for process in some:
            process.start()
        for process in some:
            process.join(timeout=60)
        found = {number: (tmp_path / f"run{turn}-{number}").read_text() for number in range(4)}
        (winner,) = [number for number, error in found.items() if not error]
        assert (path / "run.yaml").read_text() == str(winner)
        assert all("another process is working" in error for error in found.values() if error)


# ---- where nothing can be written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--resume",)])
@pytest.mark.parametrize("kind", ["file", "below a file", "long", "dangling", "system", "lock"])
def test_a_place_that_cannot_be_a_run_folder_is_one_line(states, tmp_path, capsys, kind, words):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "lock" / ".lock").mkdir(parents=True)
    place = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "long": tmp_path / ("x" * 300),
        "dangling": tmp_path / "link",
        "system": Path("/proc/run"),
        "lock": tmp_path / "lock",
    }[kind]
    assert main(["run", str(states[1]), "--output", str(place), *words]) == 2
    line = told(capsys)
    assert str(place) in line
    assert "give another --output" in line
    assert (tmp_path / "file").read_text() == "mine"


# ---- other conditions ------------------------------------------------------------------------------------------------


def change(run: Path, *keys: str | int, value: object) -> None:
    described = yaml.safe_load((run / "run.yaml").read_text())
    inner = described
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (run / "run.yaml").write_text(yaml.safe_dump(described, sort_keys=False))


CONDITIONS = [
    ("versions", ("environments", -1, "versions", "torch"), "2.0.1", "torch is '2.0.1' there"),
    ("versions", ("environments", -1, "versions", "python"), "3.8.1", "python is '3.8.1' there"),
    ("machine", ("environments", -1, "machine", "cpu"), "other", "cpu is 'other' there"),
    ("machine", ("environments", -1, "machine", "threads"), 77, "threads is 77 there, 1 here"),
    ("base", ("base", "sha256"), "0" * 64, "base sha256 is 000000000000 there"),
    ("data", ("data", "tasks", "VQAv2", "training"), "0" * 64, "training data of VQAv2 is 000000000000 there"),
    ("data", ("data", "tasks", "ImageNet", "evaluation"), "0" * 64, "evaluation data of ImageNet is"),
]


def test_other_conditions_are_refused_or_accepted_by_name(copied, capsys):
    copy, go_on = copied
    run = copy("training")
    kept = (run / "run.yaml").read_bytes()
    for part, keys, value, message in CONDITIONS:
        (run / "run.yaml").write_bytes(kept)
        change(run, *keys, value=value)
        assert go_on() == 2
        line = told(capsys)
        assert message in line
        assert f"--accept {part}" in line
        assert go_on("--accept", next(name for name in ("base", "data") if name != part)) == 2
    (run / "run.yaml").write_bytes(kept)
    for _, keys, value, _ in CONDITIONS:
        change(run, *keys, value=value)
    assert go_on(*(word for part in ("base", "data", "versions", "machine") for word in ("--accept", part))) == 0
    found = json.loads((run / "results.json").read_text())
    for accepted in (found["accepted"], yaml.safe_load((run / "run.yaml").read_text())["accepted"]):
        assert len(accepted) == len(CONDITIONS)
        assert {(entry["stage"], entry["part"], entry["there"]) for entry in accepted} == {
            (2, part, value) for part, _, value, _ in CONDITIONS
        }
        assert all(entry["here"] not in (None, entry["there"]) for entry in accepted)
    assert [one["stage"] for one in found["environments"]] == [1, 2]
    assert found["environments"][0]["machine"]["threads"] == 77
    assert found["versions"]["torch"].startswith("2.0.1, ")
    capsys.readouterr()
    assert go_on() == 0  # what was accepted once is what the run goes on with
    assert "finished before" in capsys.readouterr().err


def test_what_is_not_begun_may_differ(copied, capsys):
    copy, go_on = copied
    run = copy("training")
    change(run, "data", "tasks", "VQAv2", "evaluation", value="another")
    shutil.rmtree(run / SECOND / "trainer")
    change(run, "data", "tasks", "VQAv2", "training", value="another")
    assert go_on("--model_options.max_length", "3000") == 0
    assert "accepted" not in json.loads((run / "results.json").read_text())
    described = yaml.safe_load((run / "run.yaml").read_text())
    assert described["data"]["tasks"]["VQAv2"]["training"] != "another"
    assert described["recipe"]["model_options"]["max_length"] == 3000


def test_what_is_finished_is_kept_whatever_computes_here(copied, capsys):
    copy, go_on = copied
    run = copy("done")
    change(run, "environments", -1, "versions", "torch", value="2.0.1")
    change(run, "base", "sha256", value="0" * 64)
    assert go_on() == 0
    assert json.loads((run / "results.json").read_text())["versions"]["torch"] == "2.0.1"


def test_accept_names_what_there_is(states, capsys):
    recipe = str(states[1])
    assert main(["run", recipe, "--resume", "--accept", "all"]) == 2
    assert "--accept: expected one of base, data, versions, machine, got 'all'" in told(capsys)
    assert main(["run", recipe, "--accept=data"]) == 2
    assert "--accept goes with --resume" in told(capsys)
