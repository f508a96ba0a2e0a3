"""What it costs to log training dynamics: CPU seconds of the pocket model's training step with and without statistics.

    python tools/dynamics_cost.py [steps]

The second task's group trains beside a frozen first one, as recipes/pocket/dymoe.yaml has it (6 samples a step). Steps
with and without the layers' statistics take turns; CPU time of the process is counted.
"""

import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dymoe.evaluation.generate import autocast
from dymoe.learning.distributed import ALONE
from dymoe.learning.dynamics import Dynamics
from dymoe.learning.groups import trace_of, train_group
from dymoe.learning.loss import answer_logits, next_token_loss
from dymoe.learning.recipe import load_recipe
from dymoe.methods import Stage
from dymoe.models import Collator, cached_features, load
from dymoe.tasks import load_stream


def main(steps: int) -> None:
    """Print the median seconds of a step without statistics, of one with them, and of a line of dynamics."""
    torch.set_num_threads(1)
    recipe = load_recipe("recipes/pocket/dymoe.yaml")
    lvlm, model = load("pocket"), None
    tasks = load_stream("pocket-coin", tasks=["ScienceQA", "TextVQA"]).tasks
    for index, task in enumerate(tasks, start=1):
        config = recipe.build_method().config(Stage(index, task.name, (task,), Path()))
        model = train_group(lvlm.model, model, task.name, config)
    features = cached_features(lvlm, 6)
    batch = Collator(lvlm, features)(tasks[1].train[: recipe.training.batch_size])
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-4)
    trace, labels = trace_of(model), batch.pop("labels")
    model.train()
    spent: dict[str, list[float]] = {"step without statistics": [], "with the layers' statistics": [], "one line": []}
    with tempfile.TemporaryDirectory() as folder:
        write = Dynamics(Path(folder) / "dynamics.jsonl", 1, trace, ALONE)

        def train() -> None:
            with autocast("cpu", recipe.training.dtype):
                outputs = model(**batch, logits_to_keep=answer_logits(labels), use_cache=False)
            trace.attach(next_token_loss(outputs.logits, labels)).backward()
            optimizer.step()
            optimizer.zero_grad()

        for step in range(1, steps + 2):
            for name, collect in zip(spent, (False, True), strict=False):
                trace.collect = collect
                spent[name].append(_seconds(train))
            state = types.SimpleNamespace(global_step=step, max_steps=steps)
            spent["one line"].append(_seconds(lambda state=state: write.on_step_end(None, state, None)))
    without = statistics.median(spent["step without statistics"][1:])
    for name, values in spent.items():
        median = statistics.median(values[1:])  # the first one warms up
        print(f"{name:<27} {median:.3f} s  {median / without:.1%}  ({steps} steps)")


def _seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
