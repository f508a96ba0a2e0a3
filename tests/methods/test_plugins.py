"""Plugins: their order, and the forms in which a recipe names them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dymoe import methods
from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning.recipe import load_recipe
from dymoe.methods import Composed, Plugin, Probe, Stage, plugin_settings
from dymoe.methods.asd import AnswerStyles
from dymoe.methods.replay import Replay
from dymoe.methods.task_router import TaskRouter
from tests.methods.test_asd import task as asked
from tests.methods.toys import stages, task

NAMES = ["replay", "asd", "task-router", "pruning"]
GOOD = {"method": "dymoe", "training": {"steps_per_task": 5}}


def test_names():
    assert list(methods.plugins()) == NAMES
    assert all(methods.plugins().values())


@dataclass
class Mark(Plugin):
    """Writes down that it was called."""

    sign: str = ""
    log: Any = None

    def training_samples(self, samples, stage):
        self.log.append(f"{self.sign} samples")
        return [*samples, self.sign]

    def config(self, config, stage):
        self.log.append(f"{self.sign} config")
        config.lora_alpha = 2 * config.lora_alpha + (self.sign == "y")
        return config

    def before_task(self, model, stage, data):
        self.log.append(f"{self.sign} before")

    def before_step(self, model):
        self.log.append(f"{self.sign} step")

    def after_task(self, model, stage, data):
        self.log.append(f"{self.sign} after")

    def loss_terms(self, model, batch, outputs):
        return {self.sign: 1.0}


def test_the_method_acts_first_and_the_plugins_in_their_order(tmp_path):
    log: list = []
    method = methods.create("dymoe", lora_alpha=8.0)
    composed = Composed(method, [Mark("x", log), Mark("y", log)])
    stage = stages(tmp_path, [task("a", 2, 0)])[0]
    assert composed.training_samples(stage) == [*stage.tasks[0].train, "x", "y"]
    assert composed.config(stage).lora_alpha == 2 * (2 * 8.0) + 1
    composed.before_task(None, stage, None)
    composed.before_step(None)
    composed.after_task(None, stage, None)
    hooks = ["samples", "config", "before", "step", "after"]
    assert log == [f"{sign} {hook}" for hook in hooks for sign in "xy"]
    assert composed.loss_terms(None, {}, None) == {"x": 1.0, "y": 1.0}
    assert (composed.name, composed.group(stage)) == ("dymoe", "a")


def test_a_probe_belongs_to_the_same_bank(tmp_path):
    method = methods.create("cmoe")
    found = stages(tmp_path, [asked("GQA"), asked("TextVQA")])
    data = type("Data", (), {"steps": 20})
    assert Composed(method, [TaskRouter()]).probe(found[0], data) is None
    probe = Composed(method, [TaskRouter()]).probe(found[1], data)
    assert isinstance(probe, Probe)
    assert probe.config.selector == "prototypes"
    assert probe.steps == method.probe(found[1], data).steps


@pytest.mark.parametrize("order", [(Replay(size=7), AnswerStyles()), (AnswerStyles(), Replay(size=7))])
def test_replay_and_answer_styles_do_not_depend_on_their_order(tmp_path, order):
    composed = Composed(methods.create("lora"), order)
    found = stages(tmp_path, [asked("GQA"), asked("TextVQA")])
    composed.after_task(None, found[0], None)
    samples = composed.training_samples(found[1])
    own, earlier = found[1].tasks[0].train, {sample.id: sample for sample in found[0].tasks[0].train}
    assert sum(new is not old for new, old in zip(samples, own, strict=False)) == 12
    assert len(samples) == 67
    assert all(sample is earlier[sample.id] for sample in samples[60:])
    assert samples == composed.training_samples(found[1])


def write(path: Path, values: object) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "given, words, expected",
    [
        (["replay"], [], {"replay": {"size": 200}}),
        (["replay", "asd"], [], {"replay": {}, "asd": {"share": 0.2}}),
        ("task-router", [], {"task-router": {"reach": "earlier"}}),
        ([{"replay": {"size": 500}}, "pruning"], [], {"replay": {"size": 500}, "pruning": {"share": 0.125}}),
        ({"replay": {"size": 1000}, "asd": None}, [], {"replay": {"size": 1000}, "asd": {}}),
        (
            {"pruning": {"share": 0.25}},
            ["--with.replay.size", "500"],
            {"pruning": {"share": 0.25}, "replay": {"size": 500}},
        ),
        (["replay"], ["--with.replay.size", "500"], {"replay": {"size": 500, "policy": "balanced"}}),
        (["replay"], ["--with.task-router.limit=7"], {"replay": {}, "task-router": {"limit": 7}}),
        (["replay"], ["--with", "[asd]"], {"asd": {}}),
        (["replay"], ["--with", "{replay: {policy: reservoir}}"], {"replay": {"policy": "reservoir"}}),
        ([], ["--with", "pruning"], {"pruning": {}}),
    ],
)
def test_the_forms_of_with(tmp_path, given, words, expected):
    recipe = load_recipe(write(tmp_path / "run.yaml", {**GOOD, "with": given}), words)
    method = recipe.build_method()
    assert isinstance(method, Composed)
    assert method.name == "dymoe"
    assert [plugin.name for plugin in method.plugins] == list(expected)
    resolved = recipe.resolved()["with"]
    for name, settings in expected.items():
        assert isinstance(method.plugins[list(expected).index(name)], plugin_settings(name))
        assert settings.items() <= resolved[name].items()


def test_inherited_plugins_stay(tmp_path):
    write(tmp_path / "base.yaml", {**GOOD, "with": ["replay"]})
    path = write(tmp_path / "run.yaml", {"inherit": "base.yaml", "with": {"replay": {"size": 9}, "asd": {}}})
    assert load_recipe(path).with_ == {"replay": {"size": 9}, "asd": {}}


@pytest.mark.parametrize(
    "given, message",
    [
        (["reply"], "with: 'reply': unknown plugin; did you mean replay?"),
        ({"replay": {"sise": 5}}, "with.replay.sise: unknown key; did you mean with.replay.size?"),
        ({"replay": {"size": 0}}, "with.replay.size: expected a whole number from 1, got 0"),
        ({"replay": {"size": "many"}}, "with.replay.size: expected a whole number from 1, got 'many'"),
        ({"replay": {"policy": "random"}}, "with.replay.policy: expected one of balanced, reservoir, got 'random'"),
        ({"replay": {"share": 1}}, "with.replay.share: expected a number in (0, 1) or nothing, got 1"),
        ({"replay": 5}, "with"),
        ({"asd": {"share": 0}}, "with.asd.share: expected a number in (0, 1], got 0"),
        ({"task-router": {"shrinkage": 0}}, "with.task-router.shrinkage: expected a number in (0, 1], got 0"),
        ({"task-router": {"reach": "all"}}, "with.task-router.reach: expected one of own, earlier, got 'all'"),
        ({"task-router": {"check": 0}}, "with.task-router.check: expected a whole number from 1 or nothing, got 0"),
        ({"pruning": {"share": 1}}, "with.pruning.share: expected a number in (0, 1), got 1"),
        ({"pruning": {"limit": 0}}, "with.pruning.limit: expected a whole number from 1 or nothing, got 0"),
        (5, "with: expected a mapping of keys, got 5"),
        ([5], "with"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, given, message):
    path = write(tmp_path / "run.yaml", {**GOOD, "with": given})
    assert main(["run", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert str(path) in told


@pytest.mark.parametrize(
    "words, message",
    [
        (["--with.replay.sise", "5"], "command line: with.replay.sise: unknown key; did you mean with.replay.size?"),
        (["--with.reply.size", "5"], "command line: with: 'reply': unknown plugin; did you mean replay?"),
        (["--with.replay.size"], "command line: --with.replay.size: expected a value after it"),
        (["--with", "[pruner]"], "command line: with: 'pruner': unknown plugin"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_as_such(tmp_path, words, message):
    with pytest.raises(DymoeError) as caught:
        load_recipe(write(tmp_path / "run.yaml", GOOD), words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_recipes_of_the_repository_use_every_plugin():
    found = [load_recipe(path) for path in sorted(Path("recipes/pocket/plugins").glob("*.yaml"))]
    assert {name for recipe in found for name in recipe.with_} == set(NAMES)
    assert {recipe.method for recipe in found} == {"dymoe"}


def test_the_list_shows_plugins_apart(capsys):
    assert main(["list", "methods"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    heading, *rows = second.splitlines()
    assert heading.startswith("plugins")
    assert [row.split()[0] for row in rows] == NAMES
    assert "dymoe" in [row.split()[0] for row in first.splitlines()]


def test_a_stage_can_be_made_without_plugins():
    assert not isinstance(load_recipe("recipes/pocket/dymoe.yaml").build_method(), Composed)
    assert Stage(1, "a", (), Path("m")).earlier_tasks == ()
