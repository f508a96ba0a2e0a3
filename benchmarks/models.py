"""What is measured: a decoder of random weights at a real model's shapes, with LoRA or with expert groups."""

from typing import Any

import torch
from counts import EXPERTS, RANK, SHAPES
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaModel

from dymoe import DyMoEConfig
from dymoe.adapter.model import PROJECTIONS


def decoder(shape: str, layers: int, device: str) -> nn.Module:
    """A Llama decoder of these shapes in bfloat16, frozen."""
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(num_hidden_layers=layers, **SHAPES[shape]))
    return model.to(device, torch.bfloat16).requires_grad_(False)


def with_lora(model: nn.Module) -> Any:
    """Plain PEFT LoRA of one group's rank on all projections."""
    return get_peft_model(model, LoraConfig(r=EXPERTS * RANK, lora_alpha=128, target_modules=list(PROJECTIONS)))


def with_group(model: Any, task: int, **choices: Any) -> Any:
    """The model with the group of one more task, counted from 1; `choices` are fields of `DyMoEConfig`."""
    config = DyMoEConfig(lora_dropout=0.0, **choices)
    if task == 1:
        return get_peft_model(model, config, adapter_name="task-1")
    model.add_adapter(f"task-{task}", config)
    return model
