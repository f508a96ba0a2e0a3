"""Small real models (transformers' own classes, random weights) for the adapter's tests."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dymoe import DyMoEConfig


def tiny_llama(**kwargs):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **kwargs,
    )
    return LlamaForCausalLM(config)


def small(**kwargs):
    return DyMoEConfig(**{"num_experts": 4, "r": 2, "top_k": 4, "lora_dropout": 0.0, **kwargs})


def randomise(model, groups=None):
    """Give B (zero at the start) values, so that every group matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.base_model.layers():
            for group, b in layer.dymoe_B.items():
                if groups is None or group in groups:
                    b.copy_(torch.randn(b.shape, generator=generator) * 0.05)


def padded_batch():
    """Three rows of nine tokens, padded on the left; the last four are labels."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 60, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, :1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def batch():
    return padded_batch()
