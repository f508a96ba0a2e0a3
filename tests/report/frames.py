"""Synthetic analyses below a run folder, from a seeded generator: the page's input, not a measurement."""

import io
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from run_folders import TASKS, picture

from dymoe.analysis import store
from dymoe.files import atomic_write

PARTS = {"image": 16, "instruction": 30, "answer": 3}
PLACE = ("task", "stage", "layer", "projection")


def drift_frame(seed: int, tasks: Sequence[str], layers: int = 4, projections: Sequence[str] = ("q_proj", "v_proj")):
    draw = np.random.default_rng(seed)
    rows = []
    for own, task in enumerate(tasks, start=1):
        for stage in range(own, len(tasks) + 1):
            for layer, projection, (part, tokens) in product(range(layers), projections, PARTS.items()):
                raw = draw.random(stage) + np.where(np.arange(1, stage + 1) == own, 3, 0) + 1e-3
                changed = 0.0 if stage == own else float(draw.random())
                for group, weight in zip(tasks, raw / raw.sum(), strict=False):
                    rows.append((task, stage, layer, projection, part, group, weight, tokens * 5, changed))
    return pd.DataFrame(rows, columns=[*PLACE, "part", "group", "weight", "tokens", "changed"])


def activation_frame(seed: int, tasks: Sequence[str], layers: int = 4, experts: int = 4) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    rows = []
    for stage in range(1, len(tasks) + 1):
        for task, layer in product(tasks[:stage], range(layers)):
            raw = draw.random((stage, experts)) + 0.01
            raw[:, 0] = 1e-9 if layer == 1 else raw[:, 0]  # the first expert of every group is dead in layer 1
            raw /= raw.sum()
            rows += [
                (task, stage, layer, "v_proj", tasks[group], expert, raw[group, expert], 1.0, raw[group, expert])
                for group, expert in product(range(stage), range(experts))
            ]
    return pd.DataFrame(rows, columns=[*PLACE, "group", "expert", "weight", "active", "top"])


def overlay_frame(
    seed: int, tasks: Sequence[str], samples: int = 2, words: Sequence[str] = ("What", " is", " this", "?\n", "Name it")
) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    rows = []
    tokens = [("image", "", place // 4, place % 4) for place in range(16)]
    tokens += [("instruction", word, -1, -1) for word in words] + [("answer", " cat", -1, -1)]
    for number, (task, sample) in enumerate(product(tasks, range(samples))):
        shown = "" if number == 1 else f"{number}.webp"
        for stage in dict.fromkeys((tasks.index(task) + 1, len(tasks))):
            for position, (kind, text, row, column) in enumerate(tokens):
                if kind == "image" and not shown:
                    continue
                group = str(draw.choice([task, *tasks[:stage]]))
                place = (task, f"{task}-{sample}", shown, stage, 2, "v_proj", position, kind, text, row, column)
                rows.append((*place, str(draw.choice(["new", "ambiguous", "old"])), group, float(draw.random())))
    head = "task sample picture stage layer projection position kind text row column type group weight"
    return pd.DataFrame(rows, columns=head.split())


def dynamics_frame(seed: int, tasks: Sequence[str], layers: int = 4, steps: int = 24) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    rows = []
    for stage, task in enumerate(tasks, start=1):
        for step, layer in product((1, *range(4, steps + 1, 4)), range(layers)):
            shares = draw.dirichlet([3, 2, 1]) if stage > 1 else (1.0, 0.0, 0.0)
            terms = draw.random(5)
            rows.append((task, stage, step, layer, "v_proj", *shares, *terms))
    names = ("share_new", "share_ambiguous", "share_old", "new_group_weight", "entropy")
    terms = ("load_balance", "exclusivity", "specialization")
    return pd.DataFrame(rows, columns=["task", "stage", "step", "layer", "projection", *names, *terms])


FRAMES = {
    "drift": drift_frame,
    "activation": activation_frame,
    "overlay": overlay_frame,
    "dynamics": dynamics_frame,
}


def add_analyses(run: Path, seed: int = 0, tasks: Sequence[str] = TASKS, names: Sequence[str] = tuple(FRAMES)) -> Path:
    """Write these analyses of a run, and the overlay's pictures; returns the run."""
    for name in names:
        store(run, name, FRAMES[name](seed, tuple(tasks)), {"samples": 1, "seed": seed})
    if "overlay" in names:
        for number in range(2 * len(tasks)):
            buffer = io.BytesIO()
            with Image.open(io.BytesIO(picture(number))) as image:
                image.resize((128, 128)).save(buffer, "WEBP")
            atomic_write(run / "analysis" / "overlay" / f"{number}.webp", buffer.getvalue())
    return run
