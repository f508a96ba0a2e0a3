"""Print the table of docs/memory.md: what the recipes of CoIN take at the shapes of LLaVA-1.5 7B and 13B."""

from pathlib import Path

from dymoe.learning.recipe import load_recipe
from dymoe.models.shapes import meta_model, published_config
from dymoe.preflight.memory import memory, shape_of, table

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "coin"


def _batch(size: int) -> tuple[str, ...]:
    return ("--training.batch_size", str(size), "--evaluation.batch_size", str(size))


# Label, shape, recipe, task of the stream, what is changed in the recipe.
ROWS = (
    ("7B, LoRA r128", "7b", "lora", 1, ()),
    ("7B, DyMoE, 1 task", "7b", "dymoe", 1, ()),
    ("7B, DyMoE, 8 tasks", "7b", "dymoe", 8, ()),
    ("7B, DyMoE, 8 tasks, 1 sample", "7b", "dymoe", 8, _batch(1)),
    ("7B, 24 GB recipe, 1 task", "7b", "small-gpu", 1, ()),
    ("7B, 24 GB recipe, 8 tasks", "7b", "small-gpu", 8, ()),
    ("13B, LoRA r128 (8 a GPU)", "13b", "lora", 1, _batch(8)),
    ("13B, DyMoE, 1 task", "13b", "13b/dymoe-13b", 1, ()),
    ("13B, DyMoE, 8 tasks", "13b", "13b/dymoe-13b", 8, ()),
    ("13B, 24 GB recipe, 1 task", "13b", "13b/small-gpu-13b", 1, ()),
    ("13B, 24 GB recipe, 8 tasks", "13b", "13b/small-gpu-13b", 8, ()),
)


def made() -> str:
    """The table in Markdown."""
    shapes = {size: shape_of(meta_model(published_config(f"llava-1.5-{size}"))) for size in ("7b", "13b")}
    return table(
        [
            (label, memory(load_recipe(RECIPES / f"{name}.yaml", words), shapes[size], stage))
            for label, size, name, stage, words in ROWS
        ]
    )


if __name__ == "__main__":
    print(made(), end="")
