"""Whether this machine holds a run: memory, disk, and the time that its tasks take."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.files import free_space
from dymoe.learning.recipe import Recipe, load_recipe
from dymoe.preflight.findings import Checkup

if TYPE_CHECKING:
    from dymoe.models import Lvlm
    from dymoe.preflight.memory import Shape
    from dymoe.tasks import Stream

SPARE = 2e9  # bytes of a device that torch, its kernels and fragmentation take beside the arithmetic
# Share of the machine's matrix speed that training reaches; LLaVA-like runs are reported between 0.3 and 0.5.
EFFICIENCY = 0.4


def known_shape(recipe: Recipe, lvlm: "Lvlm | None") -> "Shape | None":
    """The shapes of the recipe's model, loaded as `lvlm` or not; None where they are not known here."""
    from dymoe.models.shapes import config_of, meta_model
    from dymoe.preflight.memory import shape_of

    try:
        return shape_of(lvlm.model if lvlm is not None else meta_model(config_of(recipe.model, recipe.model_options)))
    except (DymoeError, AttributeError):
        return None


def device() -> tuple[str, float]:
    """This machine's device and its bytes: the GPU's, else main memory's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), float(torch.cuda.get_device_properties(0).total_memory)
    return "CPU", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def check_room(checkup: Checkup, recipe: Recipe, path: str, shape: "Shape | None", longest: int) -> None:
    """Find whether the device's memory and the disk hold the run."""
    from dymoe.preflight.memory import memory

    name, size = device()
    checkup.machine |= {"device": name, "bytes": size}
    if name == "CPU":
        checkup.add("note", "device", name, "no GPU: the run would compute on the CPU")
    if shape is None:
        checkup.add("note", "memory", path, "not estimated: the model's shapes are not known here")
        return
    stages = len(recipe.task_names())
    budget = memory(recipe, shape, stages, longest or None)
    comparison = f"{budget.peak / 1e9:.1f} GB at the last task of {stages}, {name} has {size / 1e9:.1f} GB"
    if budget.peak + SPARE > size:
        mend = "a smaller training.batch_size, training.gradient_checkpointing, model_options.load_in_4bit"
        checkup.add("wrong", "memory", path, comparison, f"{mend} (docs/memory.md)")
    else:
        checkup.add("fine", "memory", path, comparison)
    # The groups of all stages, and two checkpoints of the group that trains with its optimizer state.
    needed = 4 * budget.stored + 2 * 12 * budget.trainable
    volume, free = free_space(recipe.output or ".")
    comparison = f"{needed / 1e9:.1f} GB are written, {free / 1e9:.1f} GB are free"
    if needed > free:
        checkup.add("wrong", "disk", str(volume), comparison, "make room, or give --output on another disk")
    else:
        checkup.add("fine", "disk", str(volume), comparison)


def speed(dtype: str) -> float:
    """Floating-point operations a second in products of square matrices on this machine's device."""
    import time

    import torch

    gpu = torch.cuda.is_available()
    side, device_type = (8192, "cuda") if gpu else (512, "cpu")
    one = torch.ones(side, side, dtype=getattr(torch, dtype), device=device_type)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        one @ one
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / max(best, 1e-9)


def check_time(
    checkup: Checkup, recipe: Recipe, stream: "Stream", shape: "Shape | None", lengths: dict[str, tuple[float, int]]
) -> None:
    """Find how long each task trains on this machine."""
    from dymoe.preflight.memory import memory, operations

    fast = speed(recipe.training.dtype)
    checkup.machine["operations_per_second"] = fast
    training = recipe.training
    for number, task in enumerate(stream.tasks, start=1):
        mean, longest = lengths.get(task.name, (0.0, 0))
        row: dict[str, Any] = {"task": task.name, "train": len(task.train), "test": len(task.test)}
        row |= {"tokens_mean": round(mean, 1), "tokens_longest": longest, "hours": None}
        if shape is not None and mean and recipe.trains:
            steps = training.steps_per_task
            # Not whole steps: the last one of an epoch takes the samples that are left.
            samples = min(len(task.train), training.limit or len(task.train)) * (training.epochs or 1.0)
            presentations = steps * training.samples_of_step() if steps is not None else samples
            stored = memory(recipe, shape, number).stored
            work = operations(shape, stored, presentations * mean, training.gradient_checkpointing)
            row["hours"] = work / (EFFICIENCY * fast) / 3600
        checkup.tasks.append(row)
    hours = [row["hours"] for row in checkup.tasks if row["hours"] is not None]
    if hours:
        text = f"about {sum(hours):,.1f} hours of training on one such device"
        checkup.add("note", "time", recipe.stream, text, "dymoe run RECIPE --dry-run measures it")


def check_recipes(checkup: Checkup, beside: Path) -> None:
    """Find which recipes of a folder fit this machine."""
    from dymoe.preflight.memory import memory
    from dymoe.sweep.sweep import is_sweep

    _, size = device()
    shapes: dict[str, Any] = {}
    for file in sorted(beside.rglob("*.yaml")):
        if is_sweep(file):
            continue
        try:
            recipe = load_recipe(file)
            key = json.dumps([recipe.model, recipe.model_options.shape])
            if key not in shapes:
                shapes[key] = known_shape(recipe, None)
            if shapes[key] is None:
                continue
            peak = memory(recipe, shapes[key], len(recipe.task_names())).peak
        except DymoeError:
            continue
        checkup.fits.append({"recipe": str(file), "bytes": peak, "fits": peak + SPARE <= size})
