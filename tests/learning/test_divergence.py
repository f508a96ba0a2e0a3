"""A run that diverges ends where it does, says so in a line, and saves nothing of it."""

import json
import math
import re

import pytest
import torch

from dymoe import methods
from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning.callbacks import Divergence
from dymoe.learning.recipe import load_recipe
from dymoe.learning.run import run
from dymoe.methods.lora import LoRA
from tests.learning.tiny import write_recipe

NAN, INF = float("nan"), float("inf")


def steps_of(folder):
    file = folder / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [event for event in events if event["event"] == "step"]


@pytest.mark.parametrize("log_steps", [1, 50])
def test_a_rate_that_is_far_too_high_is_one_line(tiny_folder, tmp_path, capsys, log_steps):
    training = {"lr": 1e6, "log_steps": log_steps, "save_steps": 1, "scheduler": "constant_with_warmup", "warmup": 0.0}
    recipe = write_recipe(tmp_path / "run.yaml", tiny_folder, training=training)
    assert main(["run", str(recipe)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(
        r"dymoe: task .ImageNet.: step 2: the (loss|gradient's norm) is nan; the last finite loss was ", last
    )
    assert ". Training diverged: try a lower training.lr (it is 1e+06)" in last
    folder = tmp_path / "run"
    assert not (folder / "stages" / "01-ImageNet" / "adapter").exists()
    assert not (folder / "stages" / "01-ImageNet" / "training.json").exists()
    assert not (folder / "results.json").exists()
    assert not list(folder.glob("stages/*/trainer/checkpoint-2"))
    assert all(math.isfinite(event["loss"]) for event in steps_of(folder))
    assert main(["run", str(recipe), "--resume"]) == 2  # and once more, from the checkpoint before
    assert "step 2: the " in capsys.readouterr().err


class Sharp(LoRA):
    """LoRA with a term that is finite and whose gradient is not, or that is not finite itself, in its third step."""

    name = "sharp"
    term = "gradient"

    def loss_terms(self, model, batch, outputs):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls != 3:
            return {}
        parameter = next(p for p in model.parameters() if p.requires_grad)
        zero = (parameter - parameter.detach()).square().sum()
        return {"sharp": zero.sqrt() if self.term == "gradient" else zero + INF}


@pytest.mark.parametrize(
    ("term", "clip", "message"),
    [
        ("gradient", 1.0, "step 3: the gradient's norm is nan; the last finite loss was"),
        ("gradient", 0.0, "step 3: the gradient's norm is nan; the last finite loss was"),
        ("value", 1.0, "step 3: the loss is inf; the last finite loss was"),
    ],
)
def test_a_term_or_a_gradient_that_is_not_finite_ends_its_step(tiny_folder, tmp_path, monkeypatch, term, clip, message):
    monkeypatch.setitem(methods._METHODS, "sharp", Sharp)
    monkeypatch.setattr(Sharp, "term", term)
    path = write_recipe(tmp_path / "run.yaml", tiny_folder, training={"max_grad_norm": clip, "log_steps": 5})
    recipe = load_recipe(path)
    recipe.method, recipe.settings = "sharp", {}
    with pytest.raises(DymoeError, match=message):
        run(recipe)
    assert not (tmp_path / "run" / "results.json").exists()
    assert not list((tmp_path / "run").glob("stages/*/trainer/checkpoint-3"))


def watched(*steps) -> Divergence:
    """What has seen these steps: losses of the micro-batches, gradient norm."""
    watch = Divergence("task 'a'", 0.1)
    for step, (losses, norm) in enumerate(steps, start=1):
        for loss in losses:
            watch.add(torch.tensor(loss))
        watch.end_step(step, norm)
    return watch


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [((1.0, 0.5), 2.0), ((1.0,), torch.tensor(3.0)), ((1.0, NAN), 3.0), ((NAN,), NAN)],
            "task 'a': step 3: the loss is nan; the last finite loss was 1, at step 2. Training diverged",
        ),
        ([((1.5,), 1.0), ((2.0,), INF)], "step 2: the gradient's norm is inf; the last finite loss was 2, at step 2"),
        ([((-INF,), 1.0)], "step 1: the loss is -inf; there was no finite loss before"),
    ],
)
def test_steps_are_looked_at_together_and_the_first_bad_one_is_told(steps, message):
    watch = watched(*steps)
    with pytest.raises(DymoeError) as caught:
        watch.check()
    assert message in str(caught.value)


def test_a_step_that_float16_skips_is_none_that_diverged():
    watch = watched(((1.5,), None), ((1.5,), None))
    watch.check()
    watch.check()
