"""Methods, plugins and scoring rules from outside: learned, resumed and refused as those of the house are."""

import json
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dymoe import extensions, methods
from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning.recipe import load_recipe
from dymoe.tasks import scoring
from dymoe.tasks.scoring import lenient, scorer
from tests.learning.tiny import write_recipe

ANCHOR = "examples/anchor.py:Anchor"
PLUGIN = """
from dataclasses import dataclass
from dymoe.methods import Plugin

@dataclass
class Half(Plugin):
    name = "half"
    summary = "half of the samples"
    least: int = 1

    def training_samples(self, samples, stage):
        return samples[: max(self.least, len(samples) // 2)]

class Bare:
    pass
"""
RULE = """
def first(prediction, reference):
    return float(prediction[:1] == reference["answer"][:1])

def two(prediction, reference):
    return 2

nothing = 3
"""
SMALL = {"steps_per_task": 3, "limit": 8, "save_steps": 1}


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "rule.py").write_text(RULE)
    shutil.copy("examples/anchor.py", tmp_path / "anchor.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def learn(tiny_folder: Path, path: Path, **changes: object) -> Path:
    settings = {"rank": 2, "lora_dropout": 0.0, **changes.pop("settings", {})}
    values = {"settings": {}, "training": SMALL, **changes}
    write_recipe(path, tiny_folder, **values)
    recipe = yaml.safe_load(path.read_text())
    recipe["settings"] = settings
    path.write_text(yaml.safe_dump(recipe))
    assert main(["run", str(path)]) == 0
    return path.with_suffix("")


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The matrices that the last stage left."""
    files = sorted((run / "stages").glob("*/adapter/**/*.safetensors"))
    return load_file(files[-1])


def far(first: Path, second: Path) -> float:
    one, two = weights(first), weights(second)
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_a_method_of_a_file_learns_and_its_term_acts(tiny_folder, files):
    free = learn(tiny_folder, files / "free.yaml", method="lora")
    none = learn(tiny_folder, files / "none.yaml", method="anchor.py:Anchor", settings={"pull": 0.0})
    firm = learn(tiny_folder, files / "firm.yaml", method="anchor.py:Anchor", settings={"pull": 100.0})
    assert far(free, none) == 0
    assert far(free, firm) > 1e-4
    steps = [json.loads(line) for line in (firm / "events.jsonl").read_text().splitlines()]
    assert {"pull" in each for each in steps if each.get("event") == "step" and each["stage"] == 2} == {True}
    assert json.loads((firm / "results.json").read_text())["method"] == "anchor.py:Anchor"


def test_a_run_knows_the_file_it_was_learned_with(tiny_folder, files, capsys):
    run = learn(tiny_folder, files / "a.yaml", method="anchor.py:Anchor", **{"with": {"mine.py:Half": {"least": 2}}})
    kept = yaml.safe_load((run / "run.yaml").read_text())
    assert kept["recipe"]["with"] == {"mine.py:Half": {"least": 2}}
    shutil.rmtree(run / "stages" / "02-VQAv2")
    with (files / "anchor.py").open("a") as file:
        file.write("# changed\n")
    capsys.readouterr()
    assert main(["run", str(files / "a.yaml"), "--resume"]) == 2
    told = capsys.readouterr().err
    assert "anchor.py" in told
    assert "--accept versions" in told
    assert main(["run", str(files / "a.yaml"), "--resume", "--accept", "versions"]) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "nowhere.py:Mine"}, "method: nowhere.py: no such file"),
        ({"method": "mine.py:Mine"}, "method: mine.py: has no 'Mine'"),
        (
            {"method": "mine.py:Bare"},
            "method: mine.py:Bare: must be a dataclass with a name that inherits from dymoe.methods",
        ),
        ({"method": "broken.py:Mine"}, "method: broken.py: cannot be run: SyntaxError"),
        (
            {"method": "anchor.py:Anchor", "settings": {"pul": 1.0}},
            "settings.pul: unknown key; did you mean settings.pull?",
        ),
        ({"method": "anchor.py:Anchor", "settings": {"pull": -1.0}}, "settings.pull: expected a number from 0"),
        (
            {"with": {"anchor.py:Anchor": {}}},
            "must be a dataclass with a name that inherits from dymoe.methods.Plugin",
        ),
        ({"with": {"mine.py:Half": {"least": "x"}}}, "with.mine.py:Half.least: expected int"),
    ],
)
def test_every_mistake_is_one_line(files, change, message):
    (files / "broken.py").write_text("class Mine(:\n")
    (files / "r.yaml").write_text(yaml.safe_dump({"training": {"steps_per_task": 1}, **change}))
    with pytest.raises(DymoeError) as error:
        load_recipe(files / "r.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_scoring_rule_of_a_file(files):
    strict = scorer("rule.py:first")
    assert strict("yes", {"answer": "yellow"}) == lenient("rule.py:first")("yes", {"answer": "yellow"}) == 1.0
    assert strict("no", {"answer": "yes"}) == 0.0
    assert scoring.rule("rule.py:first").readable("x", {})
    assert not scoring.rule("rule.py:first").readable(" ", {})
    with pytest.raises(DymoeError, match=r"rule\.py:two: must give a number from 0 to 1, not 2"):
        scorer("rule.py:two")("x", {})
    with pytest.raises(DymoeError, match="must be a function"):
        scorer("rule.py:nothing")


def test_an_installed_package_brings_methods_and_rules(files, monkeypatch, capsys):
    points = {
        "dymoe.methods": [EntryPoint("outside", "examples.anchor:Anchor", "dymoe.methods")],
        "dymoe.scorers": [EntryPoint("first", "operator:eq", "dymoe.scorers")],
    }

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [each for each in points.get(group, []) if name in (None, each.name)]

    monkeypatch.setattr(extensions, "entry_points", entry_points)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    assert methods.create("outside", pull=2.0).pull == 2.0
    assert methods.available()["outside"] == methods.settings_of(str(files / ANCHOR.split("/")[1])).summary
    assert scorer("first")("a", "a") == 1.0  # type: ignore[arg-type]
    assert main(["list", "methods"]) == 0
    assert "outside" in capsys.readouterr().out
    with pytest.raises(DymoeError, match=r"did you mean outside\?"):
        methods.settings_of("outsid")
