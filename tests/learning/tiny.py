"""A tiny FastVLM with random weights, saved as a folder: the pocket model's classes at small sizes."""

from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- message['role'] + ':' -}}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ ' ' + part['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if message['role'] == 'assistant' -%}{{ '</s>' }}{%- else -%}{{ '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    base.train_from_iterator(
        ["What is the object in the image? Answer the question using a single word or phrase"],
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def save_tiny(folder: Path) -> Path:
    """Save model and processor; the folder is what a recipe's `model` names."""
    words = tokenizer()
    image = words.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "test_efficientnet",
            "do_pooling": False,
            "hidden_size": 256,
            "initializer_range": 0.02,
        },
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
        ),
        image_token_index=image,
        image_seq_length=4,
    )
    FastVlmForConditionalGeneration(config).save_pretrained(folder)
    side = {"height": 64, "width": 64}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False),
        tokenizer=words,
        patch_size=32,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        image_token="<image>",
    )
    processor.save_pretrained(folder)
    return folder


def write_recipe(path: Path, model: Path, **changes: object) -> Path:
    """A recipe of two pocket tasks that the tiny model learns in seconds."""
    recipe: dict[str, object] = {
        "model": str(model),
        "tasks": ["ImageNet", "VQAv2"],
        "method": "dymoe",
        "settings": {"num_experts": 4, "rank": 2, "top_k": 4, "lora_dropout": 0.1},
        "training": {
            "steps_per_task": 8,
            "batch_size": 4,
            "dtype": "float32",
            "threads": 1,
            "save_steps": 3,
            "limit": 24,
        },
        "evaluation": {"limit": 4, "batch_size": 3},
        "output": str(path.with_suffix("")),
    }
    for key, value in changes.items():
        old = recipe.get(key)
        recipe[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(recipe))
    return path
