"""The memory arithmetic against what torch itself holds: autograd's saved tensors, parameters, AdamW's state."""

import runpy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import dymoe  # noqa: F401 - registers the method
from dymoe.adapter import DyMoEConfig
from dymoe.errors import DymoeError
from dymoe.learning.groups import stored_parameters, trainable_parameters
from dymoe.learning.recipe import load_recipe
from dymoe.libraries import require_extra
from dymoe.models.options import ModelOptions
from dymoe.models.shapes import meta_model, published_config
from dymoe.preflight.memory import (
    Groups,
    distinct_inputs,
    group_parameters,
    groups_after,
    memory,
    operations,
    saved,
    shape_of,
    weight_bytes,
)

LORA = {"gate": "uniform", "guidance": "none", "load_balance": 0.0, "exclusivity": 0.0, "specialization": 0.0}


def tiny() -> LlavaForConditionalGeneration:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=28, patch_size=14, projection_dim=8),
        text_config=text,
        image_token_index=63,
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config).to(torch.bfloat16).requires_grad_(False)


def autograd_saves(model: torch.nn.Module, layers: range, rows: int, tokens: int) -> float:
    """Bytes that autograd keeps per token of the middle layers: all of them less the same with fewer layers."""
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.Tensor] = {}
    now = [-1]
    inner = model.base_model.model.model.language_model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda *_, number=number: now.__setitem__(0, number))
        for number, layer in enumerate(inner)
    ]
    hooks.append(
        model.base_model.model.model.language_model.norm.register_forward_pre_hook(lambda *_: now.__setitem__(0, -1))
    )

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        # What has a token dimension: weights in the compute dtype are no activations.
        if now[0] in layers and place not in held and tensor.numel() % (rows * tokens) == 0:
            found[place] = tensor
        return tensor

    ids = torch.randint(1, 60, (rows, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(**batch, logits_to_keep=2, use_cache=False)
    assert output.logits.requires_grad
    for hook in hooks:
        hook.remove()
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()) / len(layers) / rows / tokens


@pytest.mark.parametrize(
    "configs",
    [
        [DyMoEConfig(num_experts=1, r=16, top_k=1, lora_dropout=0.0, **LORA)],
        [DyMoEConfig(num_experts=8, r=2, top_k=8, lora_dropout=0.0)],
        [DyMoEConfig(num_experts=8, r=2, top_k=8, lora_dropout=0.0) for _ in range(3)],
        [DyMoEConfig(num_experts=8, r=2, top_k=8, lora_dropout=0.0) for _ in range(5)],
    ],
    ids=["lora", "one group", "three groups", "five groups"],
)
def test_a_layer_keeps_what_autograd_saves(configs: list[DyMoEConfig]) -> None:
    base = tiny()
    shape = shape_of(base)
    model = get_peft_model(base, configs[0], adapter_name="g0")
    for number, config in enumerate(configs[1:], start=1):
        model.add_adapter(f"g{number}", config)
    model.train()
    # Without dropout: a GPU keeps its mask in bytes, a CPU in the compute dtype.
    expected = saved(shape, Groups(tuple(configs)), "bfloat16")
    assert autograd_saves(model, range(1, 4), 2, 97) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("method", ["lora", "moelora", "inclora", "dymoe"])
def test_groups_gradients_and_state_are_those_of_the_parameters(method: str) -> None:
    recipe = load_recipe(Path("recipes/pocket") / f"{method}.yaml")
    base = tiny()
    shape = shape_of(base)
    stages = 3
    groups = groups_after(recipe.build_method(), stages)
    model = get_peft_model(base, groups.configs[0], adapter_name="g0")
    for number, config in enumerate(groups.configs[1:], start=1):
        model.add_adapter(f"g{number}", config)
    found = memory(recipe, shape, stages)
    assert found.trainable == trainable_parameters(model)
    assert found.stored == stored_parameters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = sum(value.nbytes for row in optimizer.state.values() for name, value in row.items() if name != "step")
    assert found.optimizer == state
    assert found.gradients == sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    assert found.weights == sum(value.nbytes for name, value in base.named_parameters() if "dymoe_" not in name)
    assert found.training > found.asking - found.evaluation


@pytest.mark.parametrize("method, copies", [("lora", 0), ("lwf", 1), ("ewc", 2)])
@pytest.mark.parametrize("words", [[], ["--with", "[replay]"]], ids=["alone", "with replay"])
def test_what_a_method_keeps_of_the_group_that_trains_is_counted(method: str, copies: int, words: list[str]) -> None:
    recipe = load_recipe(Path("recipes/pocket") / f"{method}.yaml", words)
    shape = shape_of(tiny())
    first, second = memory(recipe, shape, 1), memory(recipe, shape, 2)
    assert first.groups == 4 * first.stored
    assert second.groups == 4 * (second.stored + copies * second.trainable)


def test_same_holds_a_matrix_for_each_distinct_input() -> None:
    recipe = load_recipe(Path("recipes/coin/same.yaml"))
    shape = shape_of(meta_model(published_config("llava-1.5-7b")))
    first, second = memory(recipe, shape, 1), memory(recipe, shape, 2)
    # gate and up read 4096 features, down 11008, in 32 layers.
    assert second.groups - first.groups == 4 * 32 * (4096**2 + 11008**2)
    assert distinct_inputs(shape, None) == (4096, 4096, 4096, 11008) * 32
    without = load_recipe(Path("recipes/coin/same.yaml"), ["--settings.curvature", "false"])
    assert memory(without, shape, 2).groups == first.groups


def test_four_bits_take_an_eighth_of_the_linears_and_their_scales() -> None:
    shape = shape_of(meta_model(published_config("llava-1.5-7b")))
    # 32 layers: q, k, v, o of 4096 x 4096; gate, up, down of 4096 x 11008.
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert shape.linear_parameters == linears
    assert weight_bytes(shape, "bfloat16", ModelOptions()) == 2 * 7_063_427_072
    found = weight_bytes(shape, "bfloat16", ModelOptions(load_in_4bit=True, double_quant=False))
    assert found == linears * 4.5 / 8 + 2 * (7_063_427_072 - linears)
    double = weight_bytes(shape, "bfloat16", ModelOptions(load_in_4bit=True))
    assert (found - double) * 8 / linears == pytest.approx(0.373, abs=1e-3)  # QLoRA, section 3


def test_paged_state_leaves_the_device() -> None:
    shape = shape_of(meta_model(published_config("llava-1.5-7b")))
    recipe = load_recipe("recipes/coin/small-gpu.yaml")
    found = memory(recipe, shape, 8)
    assert (found.optimizer, found.paged) == (0.0, 8.0 * found.trainable)
    assert found.peak < 24e9
    assert memory(load_recipe("recipes/coin/dymoe.yaml"), shape, 8).peak > 24e9


def test_operations_count_two_a_weight_and_pass() -> None:
    shape = shape_of(meta_model(published_config("llava-1.5-7b")))
    assert operations(shape, 0, 1.0, True) == 6 * shape.linear_parameters
    assert operations(shape, 0, 1.0, False) == 4 * shape.linear_parameters
    assert operations(shape, 10, 1.0, False) == 4 * shape.linear_parameters + 60


def test_a_linear_router_scores_the_older_experts_too() -> None:
    shape = shape_of(tiny())
    config = DyMoEConfig(num_experts=4, r=2, top_k=4, gate="linear", guidance="none")
    inputs = 5 * (6 * 64 + 160)
    assert group_parameters(shape, config, older=8)[1] == 12 * inputs


def test_the_page_holds_the_table_that_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path("tools/memory.py", run_name="__main__")
    made = capsys.readouterr().out
    assert made.count("\n| ") == 11
    assert made in Path("docs/memory.md").read_text(encoding="utf-8")


@pytest.mark.skipif(__import__("importlib.util").util.find_spec("bitsandbytes") is not None, reason="it is there")
def test_without_bitsandbytes_the_key_that_needs_it_is_named() -> None:
    for key in ("model_options.load_in_4bit", "training.optimizer"):
        with pytest.raises(DymoeError, match=f"^{key}: needs bitsandbytes, which is not installed"):
            require_extra("quantization", key)
