"""Recipes: every mistake is one line that names the key and the nearest right one, before any work starts."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning.catalog import shipped
from dymoe.learning.recipe import Recipe, Training, load_recipe, parse_overrides
from dymoe.learning.sampler import Order
from dymoe.methods import available
from dymoe.methods.settings import keys
from dymoe.sweep.sweep import is_sweep

# Those below recipes/accelerate are configurations of the launcher.
FILES = sorted(path for path in Path("recipes").rglob("*.yaml") if path.parent.name != "accelerate")
RECIPES = [path for path in FILES if not is_sweep(path)]
GOOD = {"method": "dymoe", "training": {"steps_per_task": 5}}


def write(path: Path, values: object) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_of_the_repository_is_right(path):
    recipe = load_recipe(path)
    assert recipe.build_method().name == recipe.method


def test_there_is_a_pocket_recipe_for_every_method():
    assert {path.stem for path in RECIPES if path.parent.name == "pocket"} >= set(available())


def test_the_paper_configuration():
    method = load_recipe("recipes/pocket/dymoe.yaml").resolved()["settings"]
    expected = {"num_experts": 16, "rank": 4, "top_k": 16, "tau": 0.2, "guidance": "exclusive", "target_modules": None}
    expected |= {"load_balance": 1e-3, "exclusivity": 1e-3, "specialization": 1e-3, "rsr_start": 0.5}
    assert {key: method[key] for key in expected} == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trainig": {}}, "trainig: unknown key; did you mean training?"),
        ({"training": {"steps_per_task": 5, "learning_rte": 1}}, "training.learning_rte: unknown key; "),
        ({"training": {"stepspertask": 5}}, "did you mean training.steps_per_task?"),
        ({"lr": 1e-3}, "lr: unknown key; did you mean training.lr?"),
        (
            {"training": {"steps_per_task": "many"}},
            "steps_per_task: expected a whole number from 1 or nothing, got 'many'",
        ),
        ({"training": {"steps_per_task": 5.5}}, "steps_per_task: expected a whole number from 1 or nothing, got 5.5"),
        ({"training": {"steps_per_task": True}}, "steps_per_task: expected a whole number from 1 or nothing, got True"),
        (
            {"training": {"steps_per_task": 0}},
            "steps_per_task: expected a whole number from 1 or nothing, got 0",
        ),
        ({"training": {}}, "training.steps_per_task: expected exactly one of steps_per_task and epochs"),
        ({"training": {"steps_per_task": 5, "epochs": 1}}, "exactly one of steps_per_task and epochs"),
        (
            {"training": {"steps_per_task": 5, "dtype": "half"}},
            "expected one of bfloat16, float16, float32, got 'half'",
        ),
        ({"training": 5}, "training: expected a mapping of keys, got 5"),
        ({"training": {"steps_per_task": 5, "lr": -1}}, "training.lr: expected a number above 0, got -1"),
        ({"evaluation": {"split": "train"}}, "evaluation.split: expected one of test, validation, got 'train'"),
        ({"evaluation": {"limit": 0}}, "evaluation.limit: expected a whole number from 1 or nothing, got 0"),
        ({"tasks": "GQA"}, "tasks: expected a list of str or nothing, got 'GQA'"),
        ({"tasks": []}, "tasks: expected at least one task, got []"),
        ({"tasks": ["GQV"]}, "'GQV'"),
        ({"stream": "pocketcoin"}, "pocket-coin"),
        ({"order": "random"}, "order: expected one of origin, reverse, alphabet, got 'random'"),
        ({"method": "dymo"}, "method: unknown method 'dymo'; did you mean dymoe?"),
        ({"settings": {"tua": 0.2}}, "settings.tua: unknown key; did you mean settings.tau?"),
        ({"settings": {"tau": "big"}}, "settings.tau: expected a number from 0, got 'big'"),
        (
            {"settings": {"guidance": "strict"}},
            "settings.guidance: expected one of exclusive, protect, only-",
        ),
        (
            {"training": {"steps_per_task": 5, "lr": float("inf")}},
            "training.lr: expected 0 or a number between 1e-30 and",
        ),
        ({"training": {"epochs": float("nan")}}, "training.epochs: expected a number above 0 or nothing, got nan"),
        ({"training": {"steps_per_task": 5, "weight_decay": 1e31}}, "training.weight_decay: expected 0 or a number"),
        ({"settings": {"temperature": 1e-320}}, "settings.temperature: expected 0 or a number between 1e-30 and 1e+30"),
        ({"settings": {"rsr_temperature": "1e-320"}}, "settings.rsr_temperature: expected 0 or a number between 1e-30"),
        ({"settings": {"load_balance": float("inf")}}, "settings.load_balance: expected 0 or a number between 1e-30"),
        (
            {"with": {"replay": {"share": float("nan")}}},
            "with.replay.share: expected 0 or a number between 1e-30",
        ),
        ({"settings": {"num_experts": 0}}, "settings.num_experts: expected a whole number from 1, got 0"),
        ({"settings": {"rsr_start": 1}}, "settings.rsr_start: expected a number in [0, 1), got 1"),
        ({"method": "lora", "settings": {"tau": 0.2}}, "settings.tau: unknown key"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"model": "./nowhere"}, "model: no such folder ./nowhere"),
        ({"inherit": "missing.yaml"}, "missing.yaml: no such recipe"),
        ({"inherit": 3}, "inherit: expected the name of a recipe file, got 3"),
        ({"inherit": "run.yaml"}, "inherit: a recipe cannot inherit from itself"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, capsys, change, message):
    path = write(tmp_path / "run.yaml", {**GOOD, **change})
    assert main(["run", str(path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert str(tmp_path) in told.err
    assert message in told.err
    assert [file.name for file in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    "text, message",
    [("a: [1", "not valid YAML (line"), ("- 1\n", "expected a mapping of keys, got list"), ("\x00", "not valid YAML")],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    with pytest.raises(DymoeError) as caught:
        load_recipe(write(tmp_path / "run.yaml", text))
    assert message in str(caught.value)


def test_a_missing_recipe_names_the_nearest(tmp_path):
    write(tmp_path / "dymoe.yaml", GOOD)
    with pytest.raises(DymoeError, match=r"no such recipe; did you mean .*dymoe\.yaml"):
        load_recipe(tmp_path / "dymo.yaml")


def test_a_name_stands_for_a_recipe_that_comes_with_dymoe(tmp_path, monkeypatch):
    by_path = load_recipe("recipes/pocket/dymoe.yaml")
    assert "pocket/dymoe" in shipped()
    assert not any("accelerate" in name for name in shipped())
    monkeypatch.chdir(tmp_path)
    assert load_recipe("pocket/dymoe").resolved() == by_path.resolved()
    heir = load_recipe(write(tmp_path / "mine.yaml", "inherit: pocket/dymoe\nseed: 7\n"))
    assert heir.resolved() == {**by_path.resolved(), "seed": 7, "output": "runs/mine-seed7"}
    with pytest.raises(DymoeError, match=r"^pocket/dymo: no such recipe; did you mean pocket/dymoe\?$"):
        load_recipe("pocket/dymo")
    (tmp_path / "pocket").mkdir()
    write(tmp_path / "pocket" / "dymoe", "inherit: pocket/lora\n")
    assert load_recipe("pocket/dymoe").method == "lora", "a file of one's own comes first"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--training.lr"], "--training.lr: expected a value after it"),
        (["--training.step_per_task", "3"], "command line: training.step_per_task: unknown key; did you mean"),
        (["--settings.tua=1"], "command line: settings.tua: unknown key; did you mean settings.tau?"),
        (["--seed", "x"], "command line: seed: expected a whole number from 0 to 4294967295, got 'x'"),
        (["seed", "3"], "'seed': expected --key value"),
        (["--tasks", "[a"], "--tasks: '[a': not valid YAML (line 1: "),
    ],
)
def test_a_mistake_on_the_command_line_is_told_as_such(tmp_path, words, message):
    with pytest.raises(DymoeError) as caught:
        load_recipe(write(tmp_path / "run.yaml", GOOD), words)
    assert message in str(caught.value)


def test_values_merge_over_the_inherited_ones_and_the_command_line_over_all(tmp_path):
    write(tmp_path / "base.yaml", {"seed": 4, "training": {"steps_per_task": 9, "lr": 1e-4}})
    path = write(tmp_path / "run.yaml", {"inherit": "base.yaml", "training": {"lr": "3e-3"}, "method": "lora"})
    recipe = load_recipe(path, ["--training.batch_size=2", "--settings.rank", "7"])
    assert (recipe.seed, recipe.training.steps_per_task, recipe.training.lr) == (4, 9, 3e-3)
    assert (recipe.training.batch_size, recipe.settings, recipe.output) == (2, {"rank": 7}, "runs/run-seed4")
    assert load_recipe(path, ["--training.steps_per_task", "null", "--training.epochs", "2"]).training.epochs == 2.0


@given(st.dictionaries(st.sampled_from([k for k in keys(Recipe) if k != "output"]), st.integers(0, 10**6), max_size=4))
def test_overrides_are_read_back_whatever_their_form(values):
    spaced = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    joined = [f"--{key}={value}" for key, value in values.items()]
    assert parse_overrides(spaced) == parse_overrides(joined) == values


def test_a_wrong_recipe_ends_before_anything_heavy_is_imported(tmp_path):
    path = write(tmp_path / "run.yaml", {**GOOD, "seeds": 1})
    code = (
        "import sys; from dymoe.cli import main; code = main(['run', sys.argv[1]]); "
        "print(sorted({'torch', 'transformers', 'peft', 'pyarrow', 'pandas'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.strip() == "[]"
    assert "did you mean seed?" in done.stderr


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.integers(1, 12))
def test_the_steps_of_a_stage_are_whole_passes_over_every_sample(samples, batch, passes, processes, epochs):
    training = Training(epochs=epochs, batch_size=batch, gradient_accumulation=passes)
    steps = training.steps(samples, 2, processes)
    orders = [Order(samples, batch, 3, rank, processes) for rank in range(processes)]
    seen: Counter[int] = Counter()
    epoch = 0
    while steps > 0:  # as the trainer does: a step takes `passes` micro-batches, the last of a pass what is left
        for order in orders:
            order.set_epoch(epoch)
            batches = list(order)
            seen.update(place for part in batches for place in part)
        steps -= -(-len(batches) // passes)
        epoch += 1
    assert steps == 0
    assert [seen[place] for place in range(samples)] == [epochs] * samples
    assert Training(steps_per_task=5, batch_size=batch).steps(samples, 2, processes) == 10


@pytest.mark.parametrize(
    ("epochs", "samples", "steps"), [(10, 5, 20), (4, 9, 12), (0.5, 9, 2), (1.5, 9, 5), (2.25, 8, 5), (0.01, 8, 1)]
)
def test_a_part_of_a_pass_is_rounded_up_to_whole_steps(epochs, samples, steps):
    assert Training(epochs=epochs, batch_size=4).steps(samples) == steps
