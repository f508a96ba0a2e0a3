"""The loop's probe: it decides, it can be interrupted, and a run that probed in vain is the run that did not."""

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dymoe import methods
from dymoe.adapter import tensors_hash
from dymoe.learning.folder import RunFolder
from dymoe.learning.learner import Substitute
from dymoe.learning.recipe import load_recipe
from dymoe.learning.run import run
from dymoe.methods import Probe
from dymoe.methods.cmoe import CMoE
from dymoe.models import load
from dymoe.tasks import Stream, load_stream
from tests.learning.tiny import write_recipe

SETTINGS = {"experts": 2, "rank": 2, "probe_steps": 5, "locator_epochs": 5, "locator_report": 6, "alpha": 0.2}


def recipe(folder: Path, model: Path, **settings):
    path = write_recipe(folder / "run.yaml", model, training={"steps_per_task": 4, "save_steps": 3})
    loaded = load_recipe(path)
    loaded.method, loaded.settings = "cmoe", {**SETTINGS, **settings}
    return loaded


def events(folder: Path) -> list[dict]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def outcome(folder: Path) -> dict:
    kept = {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("stages/*/adapter/*")}
    kept |= {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("stages/*/method/*")}
    kept |= {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("stages/*/predictions/*")}
    results = json.loads((folder / "results.json").read_text())
    kept["results"] = (results["matrix"], results["group_hashes"])
    kept["steps"] = [event for event in events(folder) if event["event"] in ("step", "probe-step")]
    return kept


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    return run(recipe(tmp_path_factory.mktemp("whole"), tiny_folder))


def test_the_second_task_grows_where_the_probe_says(whole):
    decision = json.loads((whole / "stages/02-VQAv2/method/decision.json").read_text())
    assert 0 < len(decision["expanded"]) < 6 == len(decision["layers"])
    tensors = load_file(whole / "stages/02-VQAv2/adapter/adapter_model.safetensors")
    held = {name.removeprefix("base_model.model.").removesuffix(".dymoe_A") for name in tensors if "dymoe_A" in name}
    assert held == set(decision["expanded"])
    assert sum("dymoe_router" in name for name in tensors) == 6
    assert not (whole / "stages/01-ImageNet/method/decision.json").exists()
    kinds = [(event["event"], event["stage"], event["step"]) for event in events(whole) if "step" in event]
    first = [("step", 1, n) for n in range(1, 5)]
    assert kinds == [*first, *[("probe-step", 2, n) for n in range(1, 6)], *[("step", 2, n) for n in range(1, 5)]]


def test_the_results_carry_the_methods_report(whole):
    results = json.loads((whole / "results.json").read_text())
    one, two = results["reports"]
    assert one["growth"]["parameters"] == one["growth"]["parameters_everywhere"]
    assert two["growth"]["parameters"] < two["growth"]["parameters_everywhere"]
    all_right = {"accuracy": 100.0, "chosen": {"ImageNet": 6}, "right": [1] * 6}
    assert one["locator"] == {"accuracy": 100.0, "tasks": {"ImageNet": all_right}}
    assert set(two["locator"]["tasks"]) == {"ImageNet", "VQAv2"}
    accuracies = [row["accuracy"] for row in two["locator"]["tasks"].values()]
    assert two["locator"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert [100 * statistics.fmean(row["right"]) for row in two["locator"]["tasks"].values()] == accuracies
    assert "probe" not in one
    assert two["probe"]["steps"] == 5
    for stage in (whole / "stages").iterdir():
        assert not (stage / "probe").exists()
    assert set(results["group_hashes"][1]["groups"]) == {"ImageNet", "VQAv2"}
    trained = json.loads((whole / "stages/02-VQAv2/training.json").read_text())["trainable_parameters"]
    assert trained == two["growth"]["parameters"]


class Crash(Exception):
    pass


@dataclass
class Interrupted(CMoE):
    """Probes before the first task too, for nothing; dies at stage 2 after the probe trained and after the task did.

    Both times the last checkpoint is older than the last step.
    """

    def probe(self, stage, data):
        if stage.index > 1:
            return super().probe(stage, data)
        return Probe(self.config(stage), stage.tasks[0].train[:8], 2)

    def probed(self, model, group, stage, data):
        if stage.index == 1:
            assert list(model.peft_config) == ["probe"]
            return
        die_once(stage.memory.parent / "died-probing")
        super().probed(model, group, stage, data)

    def after_task(self, model, stage, data):
        if stage.index == 2:
            die_once(stage.memory.parent / "died-training")
        super().after_task(model, stage, data)


def die_once(marker: Path) -> None:
    if not marker.exists():
        marker.touch()
        raise Crash


def test_interrupted_and_probed_in_vain_it_ends_bit_for_bit_the_same(whole, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(methods._METHODS, "cmoe", Interrupted)
    interrupted = recipe(tmp_path, tiny_folder)
    with pytest.raises(Crash):
        run(interrupted)
    place = Path(interrupted.output) / "stages/02-VQAv2"
    assert (place / "probe/checkpoint-3/complete.json").exists()
    assert not (place / "probed.json").exists()
    with pytest.raises(Crash):
        run(interrupted, resume=True)
    assert json.loads((place / "probed.json").read_text())["resumed_at"] == 3
    (place / "probe").mkdir()  # as a kill between the marker and the clearing leaves it
    folder = run(interrupted, resume=True)
    assert json.loads((place / "training.json").read_text())["resumed_at"] == 3
    assert not (place / "probe").exists()
    mine, theirs = outcome(folder), outcome(whole)
    extra = [event for event in mine["steps"] if event["event"] == "probe-step" and event["stage"] == 1]
    assert len(extra) == 2
    mine["steps"] = [event for event in mine["steps"] if event not in extra]
    assert mine == theirs


def test_rewinding_drops_one_kind_of_one_stage(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    for kind, stage, step in (
        ("step", 1, 9),
        ("probe-step", 2, 1),
        ("probe-step", 2, 9),
        ("step", 2, 1),
        ("step", 2, 5),
    ):
        folder.event(kind, stage=stage, step=step)
    folder.event("stage", stage=1)
    folder.event("step", stage=3, step=1)
    folder.rewind_events(2, 3)
    left = [(event["event"], event["stage"], event.get("step")) for event in events(folder.path)]
    assert left == [("step", 1, 9), ("probe-step", 2, 1), ("probe-step", 2, 9), ("step", 2, 1), ("stage", 1, None)]
    folder.rewind_events(2, 0, "probe-step")
    assert [event["event"] for event in events(folder.path)] == ["step", "step", "stage"]
    folder.close()


def test_tasks_may_have_the_names_of_the_probe_and_of_pefts_first_adapter(tiny_folder, tmp_path):
    shipped = load_stream("pocket-coin", tasks=["ImageNet"]).tasks[0]
    stream = Stream("mine", tuple(replace(shipped, name=name) for name in ("probe", "default")))
    path = write_recipe(tmp_path / "r.yaml", tiny_folder, training={"steps_per_task": 2}, evaluation={"limit": 1})
    folder = run(load_recipe(path), substitute=Substitute(stream, load(str(tiny_folder), "float32"), 0))
    results = json.loads((folder / "results.json").read_text())
    assert list(results["training"]) == ["probe", "default"]
    assert {event["event"] for event in events(folder)} == {"step", "stage"}
    for stage, group in (("01-probe", "probe"), ("02-default", "default")):
        tensors = load_file(folder / "stages" / stage / "adapter/adapter_model.safetensors")
        assert tensors_hash(sorted(tensors.items())) == results["group_hashes"][-1]["groups"][group]
