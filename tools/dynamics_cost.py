"""What it costs to log training dynamics: CPU seconds of a training step of the pocket model, and of what is added.

    python tools/dynamics_cost.py [steps]

The second task's group trains beside a frozen first one, as recipes/pocket/dymoe.yaml has it (6 samples a step). CPU
time of the process is counted, inside a step, so that other work on the machine matters little.
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

from dymoe.adapter import DyMoELayer
from dymoe.evaluation.generate import autocast
from dymoe.learning.dynamics import Dynamics
from dymoe.learning.groups import trace_of, train_group
from dymoe.learning.processes import ALONE
from dymoe.learning.recipe import load_recipe
from dymoe.learning.trainer import answer_logits, next_token_loss
from dymoe.lvlm import Collator, cached_features, load
from dymoe.methods import Stage
from dymoe.tasks import load_stream


def main(steps: int) -> None:
    """Print the median seconds of a step, of the layers' statistics in it, and of a line of dynamics."""
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
    spent = {"step": 0.0, "statistics of all layers": 0.0, "one line of dynamics": 0.0}
    DyMoELayer._statistics = staticmethod(_timed(DyMoELayer._statistics, spent, "statistics of all layers"))  # type: ignore[method-assign]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write = Dynamics(Path(folder) / "dynamics.jsonl", 1, trace, ALONE)
        line = _timed(write.on_step_end, spent, "one line of dynamics")

        def train() -> None:
            with autocast("cpu", recipe.training.dtype):
                outputs = model(**batch, logits_to_keep=answer_logits(labels), use_cache=False)
            trace.attach(next_token_loss(outputs.logits, labels)).backward()
            optimizer.step()
            optimizer.zero_grad()

        for step in range(1, steps + 2):
            spent.update(dict.fromkeys(spent, 0.0))
            _timed(train, spent, "step")()
            line(None, types.SimpleNamespace(global_step=step, max_steps=steps), None)
            rows.append(dict(spent))
    for name in spent:
        median = statistics.median(row[name] for row in rows[1:])  # the first one warms up
        share = median / statistics.median(row["step"] for row in rows[1:])
        print(f"{name:<25} {median:.3f} s  {share:.1%}  ({steps} steps)")


def _timed(call: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """The call, its CPU seconds added up."""

    def timed(*args: Any, **options: Any) -> Any:
        started = time.process_time()
        try:
            return call(*args, **options)
        finally:
            spent[name] += time.process_time() - started

    return timed


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
