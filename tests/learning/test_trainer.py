"""The trainer's loss against transformers' own, accumulation, logged terms, small checkpoints, method hooks."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainingArguments

from dymoe import methods
from dymoe.errors import DymoeError
from dymoe.learning.groups import train_group
from dymoe.learning.loss import answer_logits, next_token_loss
from dymoe.learning.recipe import Training, load_recipe
from dymoe.learning.run import run
from dymoe.learning.sampler import workers_for
from dymoe.learning.trainer import StageTrainer, training_arguments
from dymoe.methods import Stage
from dymoe.methods.base import Method
from dymoe.methods.lora import LoRA
from dymoe.models import Collator, ImageFeatures, load
from dymoe.tasks import load_stream
from tests.learning.tiny import write_recipe


@pytest.fixture(scope="module")
def task():
    return load_stream("pocket-coin", tasks=["ImageNet"]).tasks[0]


def slow_loss(logits, labels):
    """Mean cross entropy over the learned tokens, position by position."""
    losses = [
        -F.log_softmax(logits[row, column - 1].double(), -1)[labels[row, column]]
        for row in range(labels.shape[0])
        for column in range(1, labels.shape[1])
        if labels[row, column] != -100
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("longest", [1, 2, 5, 11])
def test_answer_only_loss_is_the_loss_over_all_positions(longest):
    generator = torch.Generator().manual_seed(longest)
    logits = torch.randn(4, 12, 7, generator=generator)
    labels = torch.full((4, 12), -100)
    for row, length in enumerate((longest, 1, max(1, longest - 1), 1)):
        labels[row, 12 - length :] = torch.randint(0, 7, (length,), generator=generator)
    keep = answer_logits(labels)
    assert keep == min(12, longest + 1)
    expected = slow_loss(logits, labels)
    assert torch.allclose(next_token_loss(logits[:, -keep:], labels).double(), expected, rtol=1e-6)
    items = int((labels != -100).sum())
    assert torch.allclose(next_token_loss(logits[:, -keep:], labels, 2 * items).double(), expected / 2, rtol=1e-6)


def test_one_process_that_sees_several_gpus_uses_one(tmp_path, monkeypatch):
    """transformers would multiply the batch by their number and copy the model to all of them."""

    def with_three(self):
        self._n_gpu = 3
        return torch.device("cpu")

    devices = cached_property(with_three)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    arguments = training_arguments(Training(steps_per_task=1, batch_size=5, dtype="float32"), tmp_path, 0, 1)
    assert arguments.device.type == "cpu"
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 5


def learn(
    folder: Path, model: Path, method: Method, task, steps: int = 3, pixels: bool = False, **training
) -> tuple[StageTrainer, dict]:
    """Train the method's first group on the task's first samples, in order of the seeded sampler."""
    lvlm = load(str(model), "float32")
    stage = Stage(1, task.name, (task,), folder / "method")
    torch.manual_seed(0)
    peft_model = train_group(lvlm.model, None, method.group(stage), method.config(stage))
    settings = Training(**{"steps_per_task": steps, "dtype": "float32", "save_steps": 2, **training})
    arguments = training_arguments(settings, folder, 0, steps, workers=settings.workers or 0)
    collator = Collator(lvlm, None if pixels else ImageFeatures(lvlm, batch_size=16))
    trainer = StageTrainer(peft_model, method.group(stage), method, task.train[:16], collator, arguments)
    trainer.train()
    trainer.close()
    assert "forward" not in vars(peft_model)  # no wrapper of one stage's accelerator is left for the next
    return trainer, {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}


def test_accumulation_changes_rounding_alone(tiny_folder, task, tmp_path):
    method = methods.create("lora", rank=4, lora_dropout=0.0)
    whole_trainer, whole = learn(tmp_path / "a", tiny_folder, method, task, batch_size=8)
    parts_trainer, parts = learn(tmp_path / "b", tiny_folder, method, task, batch_size=2, gradient_accumulation=4)
    for one, other in zip(whole_trainer.state.log_history, parts_trainer.state.log_history, strict=True):
        if "loss" in one:
            assert one["next_token"] == pytest.approx(other["next_token"], rel=1e-5)
            assert one["loss"] == pytest.approx(one["next_token"], rel=1e-5)
    assert any(not torch.equal(whole[name], torch.zeros_like(whole[name])) for name in whole if "_B" in name)
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=2e-5), name


def test_worker_processes_change_nothing(tiny_folder, task, tmp_path):
    """Batches made ahead in two processes: every tensor equal to the bit, dropout as well."""
    method = methods.create("lora", rank=4, lora_dropout=0.3)
    _, here = learn(tmp_path / "a", tiny_folder, method, task, batch_size=4, pixels=True)
    _, there = learn(tmp_path / "b", tiny_folder, method, task, batch_size=4, pixels=True, workers=2)
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize(
    "asked, cached, gpus, processes, expected",
    [(3, True, 0, 1, 3), (0, False, 1, 1, 0), (None, False, 0, 1, 0), (None, True, 1, 1, 0), (None, False, 1, 1, 4),
     (None, False, 4, 8, 1), (None, False, 1, 8, 4)],
)  # fmt: skip
def test_workers_are_started_where_a_gpu_would_wait(asked, cached, gpus, processes, expected, monkeypatch):
    monkeypatch.setattr("dymoe.learning.sampler.cores", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert workers_for(asked, cached, processes) == expected


def test_gradient_checkpointing_changes_rounding_alone(tiny_folder, task, tmp_path):
    method = methods.create("dymoe", num_experts=4, rank=2, lora_dropout=0.0)
    _, plain = learn(tmp_path / "a", tiny_folder, method, task, batch_size=4)
    _, checkpointed = learn(tmp_path / "b", tiny_folder, method, task, batch_size=4, gradient_checkpointing=True)
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], atol=2e-5), name


def test_bfloat16_keeps_the_experts_in_float32(tiny_folder, task, tmp_path):
    method = methods.create("dymoe", num_experts=4, rank=2, lora_dropout=0.0)
    single, _ = learn(tmp_path / "a", tiny_folder, method, task, batch_size=4)
    half, experts = learn(tmp_path / "b", tiny_folder, method, task, batch_size=4, dtype="bfloat16")
    assert {value.dtype for value in experts.values()} == {torch.float32}
    for one, other in zip(single.state.log_history, half.state.log_history, strict=True):
        if "loss" in one:
            assert one["loss"] != other["loss"]
            assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)


def test_first_loss_is_that_of_transformers(tiny_folder, task, tmp_path):
    trainer, _ = learn(tmp_path, tiny_folder, methods.create("lora", lora_dropout=0.0), task, steps=1, batch_size=16)
    lvlm = load(str(tiny_folder), "float32")
    with torch.no_grad():
        expected = lvlm.model(**Collator(lvlm)(task.train[:16])).loss
    assert trainer.state.log_history[0]["next_token"] == pytest.approx(float(expected), rel=1e-5)


def test_a_checkpoint_holds_the_training_group_alone(tiny_folder, task, tmp_path):
    learn(tmp_path, tiny_folder, methods.create("incmoelora", num_experts=2), task, batch_size=4)
    names = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "complete.json"} <= names
    assert not {"training_args.bin", "model.safetensors"} & names
    assert not (tmp_path / "checkpoint-3").exists()


def test_every_term_stands_beside_the_loss(whole):
    steps = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    steps = [event for event in steps if event["event"] == "step"]
    assert [(event["stage"], event["step"]) for event in steps] == [(s, i) for s in (1, 2) for i in range(1, 9)]
    for event in steps:
        done = (event["step"] - 1) / 8
        scale = max(0.0, (done - 0.5) / 0.5) if event["stage"] == 2 else 0.0
        routing = event["load_balance"] + scale * (event["exclusivity"] + event["specialization"])
        assert event["loss"] == pytest.approx(event["next_token"] + 1e-3 * routing, abs=2e-5)
        assert event["share_new"] + event["share_old"] + event["share_ambiguous"] == pytest.approx(1, abs=1e-4)
    assert all(event["exclusivity"] > 0 for event in steps if event["stage"] == 2)
    results = json.loads((whole / "results.json").read_text())
    one, two = results["group_hashes"]
    assert two["before"] == one["groups"] == {"ImageNet": two["groups"]["ImageNet"]}
    assert set(two["groups"]) == {"ImageNet", "VQAv2"}
    routing = json.loads((whole / "stages" / "02-VQAv2" / "routing.json").read_text())
    assert routing["groups"] == ["ImageNet", "VQAv2"]
    for task in ("ImageNet", "VQAv2"):
        assert sum(routing["tasks"][task]["weight"]) == pytest.approx(1, abs=1e-4)
        assert set(routing["tasks"][task]["by_layer"]) == {"0", "1"}


@dataclass
class Ridge(LoRA):
    """LoRA with a model-level term and a memory, as a method to come would have them."""

    name: ClassVar[str] = "ridge"
    weight: float = 0.5

    def before_task(self, model, stage, data):
        self.anchors = [float((folder / "norm.txt").read_text()) for folder in stage.earlier]

    def loss_terms(self, model, batch, outputs):
        assert "labels" in batch
        total = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
        return {"ridge": self.weight * (1 + len(self.anchors)) * total}

    def after_task(self, model, stage, data):
        stage.memory.mkdir(parents=True, exist_ok=True)
        norm = sum(float(p.detach().square().sum()) for p in model.parameters() if p.requires_grad)
        (stage.memory / "norm.txt").write_text(str(norm))


def test_a_method_brings_its_own_terms_and_memory_without_touching_the_loop(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(methods._METHODS, "ridge", Ridge)
    settings = {"rank": 4, "weight": 0.5, "lora_dropout": 0.0}
    path = write_recipe(tmp_path / "run.yaml", tiny_folder, method="ridge")
    path.write_text(path.read_text().replace("num_experts: 4", "weight: 0.5").replace("  top_k: 4\n", ""))
    recipe = load_recipe(path, ["--training.gradient_accumulation", "2"])
    recipe.settings = settings
    folder = run(recipe)
    steps = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for event in steps:
        if event["event"] == "step":
            assert event["ridge"] > 0
            assert event["loss"] == pytest.approx(event["next_token"] + event["ridge"], rel=1e-4)
    second = [event for event in steps if event["stage"] == 2 and event["event"] == "step"]
    norm = float((folder / "stages" / "01-ImageNet" / "method" / "norm.txt").read_text())
    assert second[0]["ridge"] == pytest.approx(2 * 0.5 * norm, rel=1e-3)
    stages = [json.loads((folder / "stages" / name / "done.json").read_text()) for name in ("01-ImageNet", "02-VQAv2")]
    assert [set(stage["hashes"]) for stage in stages] == [{"shared"}, {"shared"}]
    assert stages[0]["hashes"] != stages[1]["hashes"]


def test_a_frozen_group_that_changes_is_an_error(tiny_folder, tmp_path, monkeypatch):
    def meddle(self, model, stage, data):
        if stage.index == 2:
            layer = model.base_model.layers()[0]
            with torch.no_grad():
                layer.dymoe_B["ImageNet"] += 1e-7

    monkeypatch.setattr(Method, "after_task", meddle)
    recipe = load_recipe(write_recipe(tmp_path / "run.yaml", tiny_folder))
    with pytest.raises(DymoeError, match=r"frozen expert groups changed: \['ImageNet'\]"):
        run(recipe)
    assert not (Path(recipe.output) / "stages" / "02-VQAv2" / "adapter").exists()


def test_joint_learns_all_tasks_in_one_stage(tiny_folder, tmp_path):
    folder = run(load_recipe(write_recipe(tmp_path / "run.yaml", tiny_folder, method="joint")))
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == [16]
    assert len(results["joint"]) == 2
    assert results["matrix"] == []
    assert results["metrics"] == {"MFN": sum(results["joint"]) / 2}
    assert [path.name for path in (folder / "stages").iterdir()] == ["01-joint"]


def test_zero_shot_is_asked_once_before_anything_is_learned(tiny_folder, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "run.yaml", tiny_folder, evaluation={"zero_shot": True}))
    folder = run(recipe)
    results = json.loads((folder / "results.json").read_text())
    assert len(results["zero_shot"]) == 2
    assert (folder / "zero-shot" / "predictions" / "VQAv2.jsonl").is_file()
    assert not (folder / "zero-shot" / "routing.json").exists()


def test_a_run_leaves_the_process_as_it_was(tiny_folder, tmp_path):
    """Threads, warnings and what libraries say of themselves are changed for the run alone."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    def state():
        levels = logging.getLogger("accelerate").level, transformers_logging.get_verbosity()
        return torch.get_num_threads(), levels, transformers_logging.is_progress_bar_enabled(), list(warnings.filters)

    words = ["--method", "zero-shot", "--settings", "{}", "--tasks", "[ImageNet]"]
    recipe = load_recipe(write_recipe(tmp_path / "run.yaml", tiny_folder), words)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        before = state()
        run(recipe)
        assert state() == before
    finally:
        torch.set_num_threads(threads)
