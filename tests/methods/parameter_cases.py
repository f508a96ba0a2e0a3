"""A tiny model that learns in stages, with real stages and real data, for the tests of methods on parameters."""

from pathlib import Path

import torch
from peft import get_peft_model

from dymoe import methods
from dymoe.learning.data import Data
from dymoe.learning.recipe import Training
from dymoe.methods import Stage
from tests.adapter.conftest import tiny_llama


def make(name, **settings):
    return methods.create(name, **{"rank": 3, "lora_alpha": 6, "lora_dropout": 0.0, **settings})


def stage(folder: Path, index: int) -> Stage:
    places = [folder / str(number) for number in range(1, index + 1)]
    return Stage(index, f"task{index}", (), places[-1], tuple(places[:-1]), seed=index)


def begin(method, model, at: Stage):
    """The model with the stage's group training, as the loop prepares it."""
    group, config = method.group(at), method.config(at)
    if model is None:
        return get_peft_model(tiny_llama(), config, adapter_name=group)
    if group in model.peft_config:
        model.base_model.set_training_group(group)
    else:
        model.add_adapter(group, config)
    return model


def change(model, seed: int, size: float = 0.1):
    """Stands for a stage's training: moves everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def samples(count: int, seed: int = 5):
    """Rows of token ids with answers of different lengths at the right edge."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 60, (count, 9), generator=generator)
    return [(row, 2 + index % 4) for index, row in enumerate(rows)]


def collate(part):
    ids = torch.stack([row for row, _ in part])
    labels = ids.clone()
    for line, (_, answer) in zip(labels, part, strict=True):
        line[:-answer] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def data(found, dtype: str = "float32", batch_size: int = 2) -> Data:
    training = Training(steps_per_task=1, batch_size=batch_size, dtype=dtype)
    return Data(found, collate, lambda part: None, training, torch.device("cpu"), 1)


def answer(model, batch):
    """Outputs of a training step's forward pass."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model(**inputs, logits_to_keep=6)
