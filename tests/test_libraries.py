"""What dymoe needs of other libraries beyond what they promise.

A release that changes one of these names fails here, with a word that says what it is for; what would otherwise go on
in silence is an error at run time too (see `dymoe.libraries`).
"""

import inspect
import re
from pathlib import Path

import accelerate.state
import peft.mapping
import peft.tuners.tuners_utils
import pytest
import torch
import transformers
import transformers.trainer
from accelerate.state import AcceleratorState
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from transformers import GenerationMixin, PreTrainedModel, Trainer, TrainingArguments
from transformers.quantizers import quantizer_bnb_4bit
from transformers.utils import output_capturing

from dymoe.errors import DymoeError
from dymoe.libraries import require_arguments, require_names

# (class, method or attribute, arguments, what breaks)
NAMES = [
    (BaseTuner, "_pre_injection_hook", ("model", "config", "adapter_name"), "the trace of a wrapped model"),
    (BaseTuner, "_post_injection_hook", ("model", "config", "adapter_name"), "the loss terms"),
    (BaseTuner, "_prepare_adapter_config", ("peft_config", "model_config"), "default targets"),
    (BaseTuner, "_create_and_replace", ("peft_config", "adapter_name", "target", "target_name", "parent"), "wrapping"),
    (BaseTuner, "_replace_module", ("parent", "child_name", "new_module", "child"), "wrapping"),
    (BaseTuner, "set_adapter", ("adapter_name", "inference_mode"), "stages of a bank"),
    (BaseTunerLayer, "_disable_adapters", (), "disable_adapter"),
    (BaseTunerLayer, "_active_adapter", (), "set_adapter"),
    (BaseTunerLayer, "merged_adapters", (), "merging, which is refused"),
    (Trainer, "_save", ("output_dir", "state_dict"), "small checkpoints"),
    (Trainer, "_save_checkpoint", ("model", "trial"), "the marker of a complete checkpoint"),
    (Trainer, "_load_from_checkpoint", ("resume_from_checkpoint", "model"), "resume"),
    (Trainer, "_prepare_for_training", ("max_steps", "train_dataloader", "resume_from_checkpoint"), "resume"),
    (Trainer, "_save_optimizer_and_scheduler", ("output_dir",), "checkpoints of several processes"),
    (Trainer, "_load_optimizer_and_scheduler", ("checkpoint",), "resume with another number of processes"),
    (Trainer, "_load_scaler", ("checkpoint",), "resume in float16"),
    (Trainer, "create_accelerator_and_postprocess", (), "precision under FSDP and DeepSpeed"),
    (Trainer, "compute_loss", ("model", "inputs", "return_outputs", "num_items_in_batch"), "the loss"),
    (Trainer, "loss_is_scaled_for_ga", (), "accumulation: the loss would be divided twice"),
    (AcceleratorState, "deepspeed_plugin", (), "what ZeRO-3 does not go with"),
    (GenerationMixin, "_prefill", ("input_ids", "generation_config", "model_kwargs"), "decoding"),
    (GenerationMixin, "_update_model_kwargs_for_generation", ("outputs", "model_kwargs"), "decoding"),
    (GenerationMixin, "prepare_inputs_for_generation", ("input_ids", "next_sequence_length"), "decoding with a cache"),
    (PreTrainedModel, "get_decoder", (), "which linears get experts"),
    (PreTrainedModel, "input_modalities", (), "linears of a vision tower that is part of the decoder"),
    (transformers.LlavaForConditionalGeneration, "forward", ("mm_encoder_outputs",), "the cache of image features"),
    (transformers.FastVlmForConditionalGeneration, "forward", ("mm_encoder_outputs",), "the cache of image features"),
    (transformers.LlavaForConditionalGeneration, "forward", ("labels", "attention_mask"), "token masks"),
    (transformers.LlamaForCausalLM, "forward", ("logits_to_keep", "use_cache"), "memory of a training step"),
    (transformers.LlamaModel, "forward", ("inputs_embeds", "position_ids"), "a selector's view of the prompt"),
    (torch.Tensor, "_base", (), "experts added in place to what the base layer gave"),
    (torch.Tensor, "_version", (), "a norm that is taken over from layer to layer"),
    (transformers.BaseImageProcessor, "model_input_names", (), "which inputs belong to pictures"),
]


@pytest.mark.parametrize("owner, name, arguments, use", NAMES, ids=lambda value: getattr(value, "__name__", None))
def test_a_name_is_there(owner, name, arguments, use):
    assert hasattr(owner, name), f"{use}: {owner.__name__} has no {name}"
    if arguments:
        known = inspect.signature(getattr(owner, name)).parameters
        assert set(arguments) <= set(known), f"{use}: {owner.__name__}.{name} takes {', '.join(known)}"


# (object whose source is read, what must stand in it, what breaks)
READ = [
    (PeftModel.forward, "self._enable_peft_forward_hooks(", "refusing adapter_names"),
    (PeftModel, "self.base_model._enable_peft_forward_hooks(", "refusing adapter_names"),
    (peft.tuners.tuners_utils, 'linear_names = ("Linear",)', "all-linear for a second group"),
    (output_capturing, '"_output_capturing_hooks_installed", True', "pickling a model that saw a picture"),
    (transformers.trainer, "DEFAULT_CALLBACKS +", "the best checkpoint of a plain Trainer"),
    (Trainer._load_from_checkpoint, "active_adapters[0]", "resume of a plain Trainer"),
    (Trainer.training_step, "self.loss_is_scaled_for_ga", "accumulation: the loss would be divided twice"),
    (Trainer, "self._save_checkpoint(", "complete checkpoints"),
    (Trainer, "self._prepare_for_training(", "resume"),
    (Trainer, "self._load_from_checkpoint(", "resume"),
    (Trainer, "self._save_optimizer_and_scheduler(", "checkpoints of several processes"),
    (Trainer, "self._save(", "small checkpoints"),
    (Trainer, "self._train_batch_size", "micro-batches"),
    (Trainer, "num_items_in_batch", "the routing terms' share of a step"),
    (TrainingArguments, "self._n_gpu", "one process that sees several GPUs"),
    (GenerationMixin.generate, "_pad_token_tensor", "decoding"),
    (GenerationMixin._prepare_special_tokens, "_eos_token_tensor", "decoding"),
    (quantizer_bnb_4bit, '"is_loaded_in_4bit", True', "4-bit weights, which FSDP and ZeRO-3 are refused for"),
    (accelerate.state, "ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
    (accelerate.state, "ACCELERATE_USE_FSDP", "FSDP"),
    (accelerate.state, "ACCELERATE_MIXED_PRECISION", "refusing accelerate's own precision"),
    (accelerate.utils.dataclasses.FullyShardedDataParallelPlugin, "CPU_RAM_EFFICIENT_LOADING", "FSDP"),
    (accelerate.utils.dataclasses.FullyShardedDataParallelPlugin, "VERSION", "FSDP2 alone"),
]


@pytest.mark.parametrize("owner, text, use", READ, ids=lambda value: value if isinstance(value, str) else None)
def test_a_name_is_read_by_its_library(owner, text, use):
    """A name that is set or overridden here, and that nobody would read any more, fails nowhere else."""
    assert text in inspect.getsource(owner), f"{use}: nothing reads {text}"


def test_peft_takes_methods_from_outside():
    for name in ("CONFIG", "TUNER", "PREFIX"):
        mapping = getattr(peft.mapping, f"PEFT_TYPE_TO_{name}_MAPPING")
        assert "DYMOE" in mapping


def test_a_missing_name_or_argument_is_one_line_that_says_of_which_library():
    with pytest.raises(DymoeError, match=r"Trainer of transformers \d.* has no _rescue.*requirements\.lock"):
        require_names(Trainer, "_save", "_rescue")
    with pytest.raises(DymoeError, match=r"BaseTuner of peft \d.* takes in set_adapter no groups"):
        require_arguments(BaseTuner, "set_adapter", "adapter_name", "groups")
    with pytest.raises(DymoeError, match=r"BaseTuner of peft \d.* has no fly"):
        require_arguments(BaseTuner, "fly", "adapter_name")


def test_the_lock_that_messages_name_exists():
    root = Path(__file__).parent.parent
    said = re.search(r"\((\S+) in its repository", (root / "src/dymoe/libraries.py").read_text(encoding="utf-8"))
    assert (root / said[1]).is_file()
