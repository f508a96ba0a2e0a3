"""Every recipe and table of recipes/coin: resolved, built at full size without memory, counted against arithmetic."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from dymoe.adapter import DyMoEConfig
from dymoe.learning.groups import stored_parameters, trainable_parameters
from dymoe.learning.recipe import Recipe, load_recipe
from dymoe.models.shapes import meta_model, published_config
from dymoe.preflight.memory import Shape, groups_after, memory, shape_of
from dymoe.sweep.plan import Plan
from dymoe.sweep.sweep import is_sweep, load_sweep
from tests.tasks import coin_tree

ALL = sorted(Path("recipes/coin").rglob("*.yaml"))
RECIPES = [path for path in ALL if not is_sweep(path)]
TABLES = sorted(Path("recipes/coin/tables").glob("*.yaml"))
ZERO = "zero-shot"

# LLaVA-1.5's Llama: hidden size, FFN size, layers. Seven linears a layer: q, k, v, o, gate, up, down.
SIZES = {"llava-1.5-7b": (4096, 11008, 32), "llava-1.5-13b": (5120, 13824, 40)}


def sums(shape: str) -> tuple[int, int]:
    """Sum over all linears of in + out, and of in."""
    hidden, inner, layers = SIZES[shape]
    both = layers * (4 * (hidden + hidden) + 3 * (hidden + inner))
    inputs = layers * (4 * hidden + 2 * hidden + inner)
    return both, inputs


def bank(experts: int, rank: int, router: bool, shape: str = "llava-1.5-7b") -> int:
    both, inputs = sums(shape)
    return experts * rank * both + (experts * inputs if router else 0)


# What trains in the first task, as the papers' settings say.
EXPECTED = {
    "lora": 128 * 32 * (4 * 8192 + 3 * 15104),
    "ewc": bank(1, 128, False),
    "lwf": bank(1, 128, False),
    "moelora": bank(8, 16, True),
    "inclora": bank(1, 16, False),
    "olora": bank(1, 16, False),
    "incmoelora": 16 * 4 * 32 * (4 * 8192 + 3 * 15104) + 16 * 32 * (6 * 4096 + 11008),
    "dymoe": bank(16, 4, True),
    "joint": bank(16, 4, True),
    "sefe": bank(1, 128, False),
    # In the feed-forward linears alone.
    "same": 8 * 8 * 32 * 3 * 15104 + 8 * 32 * (2 * 4096 + 11008),
    "cmoe": 4 * 16 * 32 * 3 * 15104 + 4 * 32 * (2 * 4096 + 11008),
    "small-gpu": bank(16, 4, True),
    "dymoe-13b": 16 * 4 * 40 * (4 * 10240 + 3 * 18944) + 16 * 40 * (6 * 5120 + 13824),
    "incmoelora-13b": bank(16, 4, True, "llava-1.5-13b"),
    "small-gpu-13b": bank(16, 4, True, "llava-1.5-13b"),
}


def test_there_is_a_recipe_for_every_table_and_method() -> None:
    assert {path.stem for path in RECIPES} >= {ZERO, *EXPECTED}
    assert {path.name[:2] for path in TABLES} >= {"01", *(f"{n:02d}" for n in range(6, 16))}


def names_of(path: Path) -> str:
    return "/".join(path.parts[2:])


@cache
def recipe_of(path: Path) -> Recipe:
    return load_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=names_of)
def test_a_recipe_has_the_papers_budget(path: Path) -> None:
    recipe = recipe_of(path)
    training = recipe.training
    assert (recipe.stream, training.epochs, training.lr, training.warmup) == ("coin", 1.0, 2e-4, 0.03)
    assert (training.scheduler, training.dtype, training.weight_decay) == ("cosine", "bfloat16", 0.0)
    assert training.samples_of_step() == 128
    assert training.gradient_checkpointing
    assert (recipe.data.scoring, recipe.data.generation, recipe.data.validation_share) == ("coin", "coin", 0)
    assert recipe.model_options.max_length == 2048
    assert recipe.model_options.shape == ("llava-1.5-13b" if "13b" in path.stem else "llava-1.5-7b")


@cache
def base_shape(size: str) -> Shape:
    return shape_of(meta_model(published_config(size)))


@pytest.mark.parametrize("size, parameters", [("llava-1.5-7b", 7_063_427_072), ("llava-1.5-13b", 13_351_494_656)])
def test_the_base_has_the_published_size(size: str, parameters: int) -> None:
    shape = base_shape(size)
    assert shape.parameters == parameters
    assert (shape.hidden, shape.inner, shape.layers) == SIZES[size]
    assert {linear.name.split("language_model.")[1] for linear in shape.linears} == linear_names(size)


def linear_names(size: str) -> set[str]:
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    layers = range(SIZES[size][2])
    return {f"layers.{n}.{part}.{leaf}" for n in layers for part, leaves in parts.items() for leaf in leaves}


# Fields of a config that no parameter depends on: recipes that differ in these alone are built once.
NO_SHAPE = {
    *("lora_alpha", "lora_dropout", "top_k", "temperature", "tau", "guidance", "load_balance", "balance_over"),
    *("exclusivity", "specialization", "rsr_temperature", "rsr_start"),
}


@dataclass(frozen=True)
class Built:
    wrapped: frozenset[str]
    first: int  # trains in the first task
    stored: int  # is stored after the second


def counted(recipe: Recipe) -> Built:
    """The recipe's first two groups on the base of true size, on the meta device."""
    configs = groups_after(recipe.build_method(), 2).configs
    rows = [{key: value for key, value in config.to_dict().items() if key not in NO_SHAPE} for config in configs]
    told = tuple(json.dumps(row, sort_keys=True, default=sorted) for row in rows)
    if (key := (recipe.model_options.shape, told)) not in BUILT:
        BUILT[key] = build(recipe.model_options.shape, configs)
    return BUILT[key]


BUILT: dict[Any, Built] = {}


def build(size: str, configs: Sequence[DyMoEConfig]) -> Built:
    base = meta_model(published_config(size))
    base.requires_grad_(False)
    with torch.device("meta"):
        model: Any = get_peft_model(base, configs[0], adapter_name="g0")
        first = trainable_parameters(model)
        for number, config in enumerate(configs[1:], start=1):
            model.add_adapter(f"g{number}", config)
    wrapped = frozenset(layer.name.split("language_model.")[1] for layer in model.base_model.layers())
    return Built(wrapped, first, stored_parameters(model))


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != ZERO], ids=names_of)
def test_a_recipe_has_the_arithmetics_layers_and_parameters(path: Path) -> None:
    recipe = recipe_of(path)
    size = recipe.model_options.shape
    made, shape = counted(recipe), base_shape(size)
    feed_forward = recipe.method in ("same", "cmoe")
    assert made.wrapped == {name for name in linear_names(size) if ".mlp." in name or not feed_forward}
    if path.stem in EXPECTED:
        assert made.first == EXPECTED[path.stem]
    if recipe.method == "proglora":  # its keys and transform are not in the budget's arithmetic
        assert made.first > memory(recipe, shape, 1).trainable
        return
    assert memory(recipe, shape, 1).trainable == made.first
    if recipe.method == "cmoe":  # nor is its task locator, which does not train with the model
        assert made.stored > memory(recipe, shape, 2).stored
        return
    assert memory(recipe, shape, 2).stored == made.stored


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_is_planned_on_a_made_tree(
    path: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dymoe.sweep.table import published

    words = ["--base.data.root", str(tree), "--base.tasks", "[ImageNet]", "--base.data.templates", "true"]
    sweep = load_sweep(path, words)
    plan = Plan(sweep, path)
    assert len(plan.cells) >= 2
    assert all(cell.recipe["training"]["lr"] == 2e-4 for cell in plan.cells)
    assert sweep.results == f"docs/coin/{path.stem}.json"
    if sweep.published:
        rows = published(sweep.published)["rows"]
        assert {row["label"] for row in rows} <= set(plan.labels)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coin_tree.build(tmp_path_factory.mktemp("coin") / "tree", "release", tasks=("ImageNet",))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYMOE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_tables_say_what_the_supplement_varies() -> None:
    def labels(name: str) -> set[str]:
        return {
            str(row.get("label", row.get("recipe"))) if isinstance(row, dict) else row for row in sweep(name).recipes
        }

    def sweep(name: str) -> Any:
        return load_sweep(Path("recipes/coin/tables") / f"{name}.yaml")

    assert sweep("06-orders").orders == ["origin", "reverse", "alphabet"]
    assert sweep("07-instructions").instructions == ["original", "diverse", "10type"]
    assert sweep("08-top-k").vary == {"settings.top_k": [8, 16]}
    assert sweep("13-replay").vary == {"with.replay.size": [200, 500, 1000]}
    assert sweep("tau").vary == {"settings.tau": [0.1, 0.2, 0.3, 0.5]}
    assert len(labels("10-rank")) == 6
    # 8 experts of rank 8 are as large as 16 of rank 4; the pocket stream's study is made alike.
    for table in (sweep("09-experts"), load_sweep(Path("recipes/pocket/studies/experts.yaml"))):
        eight = [row["set"] for row in table.recipes if "set" in row]
        assert eight == [{"settings.num_experts": 8, "settings.rank": 8}] * 2
    assert bank(8, 8, False) == bank(16, 4, False)
