"""A stage that goes on from a checkpoint is the stage that was never interrupted, in its weights and in its logs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from dymoe import methods
from dymoe.errors import DymoeError
from dymoe.learning.checkpoints import last_checkpoint, mark_complete
from dymoe.learning.groups import train_group
from dymoe.learning.recipe import Training
from dymoe.learning.trainer import StageTrainer, training_arguments
from dymoe.methods import Stage
from dymoe.models import Collator, ImageFeatures, load
from dymoe.tasks import load_stream

STEPS = 8


class Stopped(Exception):
    """The training ended as by a kill."""


class StopAt(TrainerCallback):
    """Ends the training when a step is computed, before it is logged and saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


@pytest.fixture(scope="module")
def learn(tiny_folder):
    """Train a stage in a folder, from its last checkpoint on: its log and its tensors."""
    lvlm = load(str(tiny_folder), "float32")
    task = load_stream("pocket-coin", tasks=["ImageNet"]).tasks[0]
    collator = Collator(lvlm, ImageFeatures(lvlm, batch_size=16))

    def learned(folder: Path, stop: int | None = None, steps: int = STEPS, samples=task.train[:9], **training):
        method = methods.create("dymoe", num_experts=4, rank=2, lora_dropout=0.1)
        torch.manual_seed(0)
        model = train_group(lvlm.model, None, "a", method.config(Stage(1, "a", (task,), folder / "method")))
        defaults = {"steps_per_task": steps, "dtype": "float32", "batch_size": 2, "save_steps": 3}
        arguments = training_arguments(Training(**{**defaults, **training}), folder, 0, steps)
        callbacks = [StopAt(stop)] if stop else []
        trainer = StageTrainer(model, "a", method, samples, collator, arguments, callbacks)
        checkpoint = last_checkpoint(folder)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Stopped:
            return None
        finally:
            trainer.close()
            tensors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            model.base_model.unload()
        timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
        rows = [{k: v for k, v in row.items() if k not in timed} for row in trainer.state.log_history]
        return rows, tensors

    return learned


def same(one, other) -> bool:
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize(
    ("log_steps", "save_steps", "stop", "accumulation"),
    [(5, 3, 4, 1), (2, 3, 5, 1), (3, 5, 7, 2), (8, 3, 7, 1)],
)
def test_what_is_logged_does_not_depend_on_where_the_training_was_interrupted(
    learn, tmp_path, log_steps, save_steps, stop, accumulation
):
    settings = {"log_steps": log_steps, "save_steps": save_steps, "gradient_accumulation": accumulation}
    whole = learn(tmp_path / "whole", **settings)
    assert learn(tmp_path / "cut", stop, **settings) is None
    resumed = learn(tmp_path / "cut", **settings)
    assert [row["step"] for row in whole[0] if "loss" in row] == list(range(log_steps, STEPS + 1, log_steps))
    assert same(whole, resumed)


def test_interrupted_twice_between_two_logs(learn, tmp_path):
    settings = {"log_steps": 7, "save_steps": 2}
    whole = learn(tmp_path / "whole", **settings)
    for stop in (3, 5):
        assert learn(tmp_path / "cut", stop, **settings) is None
    assert same(whole, learn(tmp_path / "cut", **settings))


def test_other_log_steps_after_an_interruption_are_means_over_their_own_steps(learn, tmp_path):
    losses = {row["step"]: row["next_token"] for row in learn(tmp_path / "whole", log_steps=1)[0] if "loss" in row}
    assert learn(tmp_path / "cut", 5, log_steps=7) is None
    rows = [row for row in learn(tmp_path / "cut", log_steps=4)[0] if "loss" in row]
    assert [row["step"] for row in rows] == [4, 8]
    for row in rows:
        steps = range(row["step"] - 3, row["step"] + 1)
        assert row["next_token"] == pytest.approx(sum(losses[step] for step in steps) / 4, rel=1e-6)


@pytest.fixture(scope="module")
def cut(learn, tmp_path_factory):
    """A folder with two complete checkpoints, 3 and 6, and the whole run's outcome."""
    folder = tmp_path_factory.mktemp("cut")
    assert learn(folder, 7) is None
    return folder, learn(tmp_path_factory.mktemp("whole"))


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(learn, cut, tmp_path):
    folder, whole = cut
    names = sorted(file.name for file in (folder / "checkpoint-6").iterdir())
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} < {
        *names
    }
    for name in names:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        assert last_checkpoint(copy) == copy / "checkpoint-6"
        flip(copy / "checkpoint-6" / name)
        told = []
        assert last_checkpoint(copy, told.append) == copy / "checkpoint-3"
        assert len(told) == 1
        assert f"{copy / 'checkpoint-6'}/" in told[0]
        assert "was damaged since it was written; this checkpoint is passed over" in told[0]
        assert name in told[0] or name == "complete.json"
    assert same(whole, learn(copy))


def test_a_checkpoint_without_its_marker_was_never_written_to_its_end(tmp_path):
    def checkpoint(step: int) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"x" * 100)
        return folder

    told: list[str] = []
    assert last_checkpoint(tmp_path, told.append) is None
    first, second = checkpoint(3), checkpoint(12)
    (tmp_path / "checkpoint-old").mkdir()
    assert last_checkpoint(tmp_path, told.append) is None
    mark_complete(first)
    assert last_checkpoint(tmp_path, told.append) == first
    mark_complete(second)
    assert last_checkpoint(tmp_path, told.append) == second
    assert told == []
    (second / "optimizer.pt").write_bytes(b"x" * 40)
    assert last_checkpoint(tmp_path, told.append) == first
    (second / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path, told.append) == first
    for marker in ('{"optimizer.pt": 1', "[]", '{"optimizer.pt": 100}', json.dumps({"optimizer.pt": "0" * 64})):
        (first / "complete.json").write_text(marker)
        assert last_checkpoint(tmp_path) is None


def test_tensors_that_are_missing_in_a_checkpoint_are_an_error(learn, cut, tmp_path):
    """Also where the digests are right: what was written lacks some of the group."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(cut[0], tmp_path / "copy")
    checkpoint = tmp_path / "copy" / "checkpoint-6"
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    lost = sorted(tensors)[:2]
    save_file({name: tensors[name] for name in tensors if name not in lost}, checkpoint / "adapter_model.safetensors")
    mark_complete(checkpoint)
    with pytest.raises(DymoeError, match=rf"checkpoint-6/adapter_model\.safetensors lacks 2 of 42 tensors: {lost[0]}"):
        learn(tmp_path / "copy")


class Counted(list):
    """Samples that count how often each was taken."""

    def __init__(self, samples) -> None:
        super().__init__(samples)
        self.taken = [0] * len(self)

    def __getitem__(self, place):
        self.taken[place] += 1
        return super().__getitem__(place)


@pytest.mark.parametrize(("epochs", "samples", "batch", "accumulation"), [(3, 5, 4, 1), (2, 9, 2, 2)])
def test_epochs_are_passes_over_every_sample(learn, tmp_path, epochs, samples, batch, accumulation):
    shape = {"batch_size": batch, "gradient_accumulation": accumulation}
    counted = Counted(load_stream("pocket-coin", tasks=["ImageNet"]).tasks[0].train[:samples])
    steps = Training(epochs=epochs, **shape).steps(samples)
    learn(tmp_path, None, steps, counted, steps_per_task=None, epochs=epochs, save_steps=50, **shape)
    assert counted.taken == [epochs] * samples
