"""What it costs to log training dynamics: CPU seconds of a training step of the pocket model, without and with.

    python tools/dynamics_cost.py [steps]

The second task's group trains beside a frozen first one, as recipes/pocket/dymoe.yaml has it (6 samples a step). The
ways take turns step by step, and CPU time of the process is counted, so that other work on the machine matters little.
"""

import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import torch

from dymoe.evaluation.generate import autocast
from dymoe.learning.dynamics import Dynamics
from dymoe.learning.groups import trace_of, train_group
from dymoe.learning.processes import ALONE
from dymoe.learning.recipe import load_recipe
from dymoe.learning.trainer import answer_logits, next_token_loss
from dymoe.lvlm import Collator, cached_features, load
from dymoe.methods import Stage
from dymoe.tasks import load_stream

WAYS = {"no statistics": (False, 0), "statistics alone": (True, 0), "and a line every step": (True, 1)}


def main(steps: int) -> None:
    """Print the median step of each way and its share of the first."""
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
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for step in range(1, steps + 2):
            for way, (trace.collect, every) in WAYS.items():
                write = Dynamics(Path(folder) / "dynamics.jsonl", every, trace, ALONE)
                started = time.process_time()
                with autocast("cpu", recipe.training.dtype):
                    outputs = model(**batch, logits_to_keep=answer_logits(labels), use_cache=False)
                trace.attach(next_token_loss(outputs.logits, labels)).backward()
                optimizer.step()
                optimizer.zero_grad()
                write.on_step_end(None, types.SimpleNamespace(global_step=step, max_steps=steps), None)  # type: ignore[arg-type]
                if step > 1:  # the first one warms up
                    seconds[way].append(time.process_time() - started)
    first = statistics.median(seconds["no statistics"])
    for way, values in seconds.items():
        median = statistics.median(values)
        print(f"{way:<22} {median:.3f} s  {median / first - 1:+.1%}  ({len(values)} steps)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
