"""Methods make their four choices as stated, with the stated parameters."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import get_peft_model

from dymoe import methods
from dymoe.errors import DymoeError
from dymoe.methods import Stage
from dymoe.methods.settings import build
from dymoe.schema import field_types
from tests.adapter.conftest import tiny_llama

TASKS = [SimpleNamespace(name=name, train=[f"{name}{i}" for i in range(3)]) for name in ("a", "b", "c")]


def stages(method):
    rounds = method.rounds(TASKS)
    return [Stage(i, name, tasks, Path("m")) for i, (name, tasks) in enumerate(rounds, start=1)]


def test_names():
    assert {"lora", "incmoelora", "dymoe", "joint", "zero-shot"} <= set(methods.available())
    assert all(methods.available().values())


@pytest.mark.parametrize(
    "name, groups",
    [("lora", ["shared"] * 3), ("incmoelora", list("abc")), ("dymoe", list("abc")), ("joint", ["joint"])],
)
def test_growth_and_data(name, groups):
    method = methods.create(name)
    found = stages(method)
    assert [method.group(stage) for stage in found] == groups
    seen = [sample for stage in found for sample in method.training_samples(stage)]
    assert seen == [sample for task in TASKS for sample in task.train]


@pytest.mark.parametrize("name", ["lora", "incmoelora", "dymoe", "joint"])
def test_every_bank_has_the_same_rank_and_scale(name):
    config = methods.create(name).config(stages(methods.create(name))[0])
    assert config.num_experts * config.r == 64
    assert config.scaling == 2.0
    silent = (config.load_balance, config.exclusivity, config.specialization)
    assert silent == ((1e-3,) * 3 if name == "dymoe" else (0.0,) * 3)
    assert config.guidance == ("exclusive" if name == "dymoe" else "none")
    assert config.gate == ("uniform" if name == "lora" else "cosine")


@pytest.mark.parametrize("name", ["lora", "incmoelora", "dymoe", "joint"])
def test_parameters_added_are_those_claimed(name):
    method = methods.create(name, **({"rank": 8} if name == "lora" else {"num_experts": 4, "rank": 2}))
    model = get_peft_model(tiny_llama(), method.config(stages(method)[0]), adapter_name="a")
    shapes = [(layer.in_features, layer.out_features) for layer in model.base_model.layers()]
    assert len(shapes) == 14
    experts = sum(8 * (inside + outside) for inside, outside in shapes)
    rows = 0 if name == "lora" else sum(4 * inside for inside, _ in shapes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == experts + rows


@pytest.mark.parametrize(
    "change",
    [{"guidance": "none"}, {"guidance": "protect"}, {"load_balance": 0.0}, {"exclusivity": 0.0, "specialization": 0.0}],
)
def test_each_part_of_dymoe_is_switched_alone(change):
    stage = stages(methods.create("dymoe"))[0]
    plain = methods.create("dymoe").config(stage).to_dict()
    changed = methods.create("dymoe", **change).config(stage).to_dict()
    assert {key for key in plain if plain[key] != changed[key]} == set(change)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("dymo", {}, "unknown method 'dymo'; did you mean dymoe?"),
        ("xyz", {}, "there is "),
        ("dymoe", {"tua": 1}, "method dymoe: tua: unknown key; did you mean tau?"),
        ("lora", {"rank": "x"}, "method lora: rank: expected a whole number from 1, got 'x'"),
        ("lora", {"rank": 0}, "method lora: rank: expected a whole number from 1, got 0"),
        ("lora", {"target_modules": []}, "target_modules: expected at least one layer name, got []"),
        ("incmoelora", {"temperature": 0}, "temperature: expected a number above 0, got 0"),
        ("dymoe", {"compute": "fast"}, "compute: expected one of stacked, reference, got 'fast'"),
        ("dymoe", {"lora_dropout": 1}, "lora_dropout: expected a number in [0, 1), got 1"),
        ("dymoe", {"tau": -0.1}, "tau: expected a number from 0, got -0.1"),
        ("cmoe", {"experts": 0}, "experts: expected a whole number from 1"),
        ("cmoe", {"probe_share": 1.5}, "probe_share: expected a number from 0 to 1"),
        ("cmoe", {"held_share": 0}, "held_share: expected a number in (0, 1)"),
        ("cmoe", {"probe_steps": 0}, "probe_steps: expected a whole number from 1 or nothing"),
        ("cmoe", {"locator_samples": 1}, "locator_samples: expected a whole number from 2 or nothing"),
        ("cmoe", {"locator_lr": 0}, "locator_lr: expected a number above 0"),
        ("cmoe", {"added": "some"}, "added: expected one of fixed, counted"),
        ("same", {"energy": 0.0}, "energy: expected a number in (0, 1], got 0.0"),
        ("same", {"components": 0}, "components: expected a whole number from 1 or nothing, got 0"),
        ("same", {"window": 2}, "window: expected an odd number, got 2"),
        ("same", {"mu": 0.0}, "mu: expected a number above 0, got 0.0"),
        ("same", {"decay": 1.0}, "decay: expected a number in [0, 1) or nothing, got 1.0"),
        ("same", {"freeze_below": 2.0}, "freeze_below: expected a number from -1 to 1, got 2.0"),
        ("same", {"samples": 0}, "samples: expected a whole number from 1 or nothing, got 0"),
        ("same", {"router": "x"}, "method same: router: expected one of project, hold, scale, free, got 'x'"),
        ("same", {"load_balance": -1.0}, "load_balance: expected a number from 0, got -1.0"),
        ("ewc", {"penalty": -1}, "penalty: expected a number from 0, got -1"),
        ("ewc", {"samples": 0}, "samples: expected a whole number from 1, got 0"),
        ("ewc", {"mode": "offline"}, "mode: expected one of per-task, online, got 'offline'"),
        ("ewc", {"gamma": 0}, "gamma: expected a number in (0, 1], got 0"),
        ("lwf", {"distillation": -1}, "distillation: expected a number from 0, got -1"),
        ("lwf", {"temperature": 0}, "temperature: expected a number above 0, got 0"),
        ("proglora", {"rank": 0}, "rank: expected a whole number from 1, got 0"),
        ("proglora", {"hidden": 0}, "hidden: expected a whole number from 1, got 0"),
        ("proglora", {"recall": -0.1}, "recall: expected a number from 0 to 1, got -0.1"),
        ("proglora", {"recall": 1.5}, "recall: expected a number from 0 to 1, got 1.5"),
        ("olora", {"orthogonality": -1}, "orthogonality: expected a number from 0, got -1"),
        ("olora", {"norm": "l2"}, "norm: expected one of l1, frobenius, got 'l2'"),
        ("sefe", {"share": 0}, "share: expected a number in (0, 1], got 0"),
        ("sefe", {"penalty": -1}, "penalty: expected a number from 0, got -1"),
        ("inclora", {"rank": 0}, "rank: expected a whole number from 1, got 0"),
    ],
)
def test_mistakes_name_the_setting(name, settings, message):
    with pytest.raises(DymoeError) as caught:
        methods.create(name, **settings)
    assert message in str(caught.value)


def test_a_method_takes_the_ways_to_compute_that_the_adapter_has():
    from dymoe.adapter.config import COMPUTE

    assert set(COMPUTE) == set(methods.base.COMPUTE)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e-320, 1e300])
def test_no_setting_takes_a_number_that_cannot_be_computed_with(value):
    parts = [methods.settings_of(name) for name in methods.available()]
    parts += [methods.plugin_settings(name) for name in methods.plugins()]
    asked = 0
    for part in parts:
        for name, kind in field_types(part).items():
            if "float" in str(kind):
                asked += 1
                with pytest.raises(DymoeError, match=rf"^here: {name}: expected "):
                    build(part, {name: value}, "here")
    assert asked > 60
