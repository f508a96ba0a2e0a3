"""LLaVA-CMoE: the threshold rule, what is counted, the copies, what a layer without new experts holds."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

from dymoe import methods
from dymoe.adapter import LayerRouting, group_hash
from dymoe.adapter.observation import prompt_features
from dymoe.errors import DymoeError
from dymoe.files import atomic_json
from dymoe.learning.groups import delete_group, freeze_all, train_group, trainable_parameters
from dymoe.methods import Stage
from dymoe.methods.cmoe import Activations, copy_expert
from tests.adapter.conftest import randomise, tiny_llama

SMALL = {"experts": 3, "rank": 2, "locator_hidden": 8, "locator_latent": 2, "lora_dropout": 0.0, "locator_epochs": 3}


def cmoe(**settings):
    return methods.create("cmoe", **{**SMALL, **settings})


def stage(folder: Path, index: int = 2, samples: int = 50) -> Stage:
    train = [f"s{i}" for i in range(samples)]
    return Stage(index, "b", (SimpleNamespace(name="b", train=train),), folder / "method", seed=index)


# ---- the decision -------------------------------------------------------------------------------------------------


def frequencies(layers: int, seed: int) -> dict[str, dict[str, list[float]]]:
    drawn = np.random.default_rng(seed).random((layers, 7)).tolist()
    return {f"layers.{i}.up": {"a": row[:2], "b": row[2:4], "probe": row[4:]} for i, row in enumerate(drawn)}


@pytest.mark.parametrize("alpha", [-0.9, 0.0, 0.5, 0.9, 3.0])
@pytest.mark.parametrize("added", ["fixed", "counted"])
@pytest.mark.parametrize("layers", [2, 9])
def test_layers_above_the_threshold_get_experts(alpha, added, layers):
    found = frequencies(layers, seed=layers)
    decision = cmoe(alpha=alpha, added=added).decide(found, "probe")
    f = np.array([np.mean(row["probe"]) for row in found.values()])
    threshold = f.mean() - alpha * np.sqrt(((f - f.mean()) ** 2).mean())
    assert decision["threshold"] == pytest.approx(threshold)
    for (name, row), value in zip(found.items(), f, strict=True):
        told = decision["layers"][name]
        assert told["f"] == pytest.approx(value)
        assert told["experts"] == row["probe"]
        number = (3 if value > threshold else 0) if added == "fixed" else sum(e > threshold for e in row["probe"])
        assert told["added"] == number
        assert (name in decision["expanded"]) == (number > 0)
        old = row["a"] + row["b"]
        best = int(np.argmax(old))
        group, expert = ("a", best) if best < 2 else ("b", best - 2)
        assert told["copy"] == {"group": group, "expert": expert, "frequency": max(old)}
    if alpha == 3.0 and added == "fixed":
        assert len(decision["expanded"]) == layers
    json.dumps(decision)


@pytest.mark.parametrize("value", [0.1, 0.3, 1.0])
def test_layers_that_are_all_alike_get_none(value):
    found = {f"l{i}": {"a": [1.0], "probe": [value] * 3} for i in range(7)}
    assert cmoe().decide(found, "probe")["expanded"] == []


def test_a_layer_without_old_experts_has_nothing_to_copy():
    found = {"x": {"a": [], "probe": [0.9]}, "y": {"a": [0.2, 0.2], "probe": [0.1]}}
    layers = cmoe().decide(found, "probe")["layers"]
    assert layers["x"]["copy"] is None
    assert layers["y"]["copy"]["expert"] == 0


def test_activations_count_unpadded_tokens_with_weight():
    generator = torch.Generator().manual_seed(0)
    counter = Activations()
    hits, tokens = np.zeros(5), 0
    for length, masked in ((4, True), (6, True), (3, False)):
        weights = torch.rand(2, length, 5, generator=generator).relu()
        weights[weights < 0.5] = 0
        mask = torch.rand(2, length, generator=generator) > 0.3 if masked else None
        counter(LayerRouting("up", ("a", "none", "probe"), (2, 0, 3), None, weights, mask))
        for row in range(2):
            for token in range(length):
                if mask is None or mask[row, token]:
                    hits += (weights[row, token] > 0).numpy()
                    tokens += 1
    expected = (hits / tokens).tolist()
    assert counter.frequencies() == {"up": {"a": expected[:2], "none": [], "probe": expected[2:]}}


def test_the_probe_trains_on_one_part_and_is_measured_on_another(tmp_path):
    data = SimpleNamespace(steps=40)
    assert cmoe().probe(stage(tmp_path, 1), data) is None
    assert cmoe(probe_share=0.0).probe(stage(tmp_path), data) is None
    method = cmoe(probe_share=0.5, held_share=0.2, probe_experts=2)
    probe = method.probe(stage(tmp_path), data)
    trained, held = method._probe_samples(stage(tmp_path))
    assert (len(trained), len(held)) == (20, 5)
    assert not set(trained) & set(held)
    assert probe.samples == trained == method._probe_samples(stage(tmp_path))[0]
    assert trained != cmoe(probe_share=0.5)._probe_samples(stage(tmp_path, 3))[0]
    assert probe.steps == 20
    assert cmoe(probe_steps=7).probe(stage(tmp_path), data).steps == 7
    assert probe.config.num_experts == 2
    assert probe.config.scaling == method.config(stage(tmp_path)).scaling
    assert (probe.config.load_balance, probe.config.balance_over) == (0.01, "all")
    same = cmoe(measure="same")._probe_samples(stage(tmp_path))
    assert same[0] == same[1]
    for samples in (1, 2, 3):
        trained, held = cmoe()._probe_samples(stage(tmp_path, samples=samples))
        assert trained
        assert held


def test_the_first_bank_has_the_rank_and_scale_of_the_others(tmp_path):
    config = methods.create("cmoe").config(stage(tmp_path, 1))
    assert config.num_experts * config.r == 64
    assert config.scaling == 2.0
    assert config.expert_pattern == {}


# ---- in a model ---------------------------------------------------------------------------------------------------


def grown(folder: Path, pattern: dict[str, int] | None = None, **settings):
    """A tiny model whose group a has experts everywhere and whose group b follows a decision."""
    method = cmoe(**settings)
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), method.config(stage(folder, 1)), adapter_name="a")
    randomise(model)
    names = [layer.name for layer in model.base_model.layers()]
    rows = {name: {"added": (pattern or {}).get(name, method.experts), "copy": None} for name in names}
    for number, name in enumerate(names):
        rows[name]["copy"] = {"group": "a", "expert": number % 3, "frequency": 1.0}
    atomic_json(folder / "method" / "decision.json", {"layers": rows})
    model.add_adapter("b", method.config(stage(folder)))
    return method, model


BATCH = {"input_ids": torch.arange(1, 25).view(3, 8), "attention_mask": torch.ones(3, 8, dtype=torch.long)}


def test_candidates_are_the_ffn_linears(tmp_path):
    _, model = grown(tmp_path)
    names = [layer.name for layer in model.base_model.layers()]
    assert sorted({name.rsplit(".", 1)[1] for name in names}) == ["down_proj", "gate_proj", "up_proj"]
    assert len(names) == 6


def test_a_layer_that_is_not_expanded_gets_a_router_over_the_old_experts_alone(tmp_path):
    pattern = {"model.layers.0.mlp.up_proj": 0, "model.layers.1.mlp.down_proj": 0, "model.layers.1.mlp.up_proj": 1}
    method, model = grown(tmp_path, pattern)
    expected = 0
    for layer in model.base_model.layers():
        new = pattern.get(layer.name, 3)
        assert layer.experts_of("b") == new
        assert layer.dymoe_router["b"].shape == (3 + new, layer.in_features)
        assert ("b" in layer.dymoe_A) == (new > 0)
        expected += 2 * new * (layer.in_features + layer.out_features) + (3 + new) * layer.in_features
    assert trainable_parameters(model) == expected
    assert model.base_model.trace.context.num_layers == 4
    growth = method._growth(model, stage(tmp_path))
    assert growth["parameters"] == expected
    assert growth["parameters_everywhere"] == sum(
        6 * (layer.in_features + layer.out_features) + 6 * layer.in_features for layer in model.base_model.layers()
    )
    assert growth["candidates"] == 6
    assert set(growth["expanded"]) == {layer.name for layer in model.base_model.layers()} - {*list(pattern)[:2]}
    model.train()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    for layer in model.base_model.layers():
        assert layer.dymoe_router["b"].grad.abs().sum() > 0


def test_an_empty_layer_in_the_first_group_is_filled_by_the_next(tmp_path):
    method = cmoe()
    config = method.config(stage(tmp_path, 1))
    config.expert_pattern = {"model.layers.0.mlp.up_proj": 0}
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), config, adapter_name="a")
    model.add_adapter("b", method.config(stage(tmp_path, 1)))
    randomise(model)
    freeze_all(model)
    trace = model.base_model.trace
    model.base_model.selector.select = lambda prompt, groups: torch.tensor([[1.0, 0], [0, 1.0], [0, 1.0]])
    with torch.no_grad():
        mixed = model.eval()(**BATCH).logits
        assert trace.context.selection[0] == ("a", "b")
        model.base_model.selector.select = lambda prompt, groups: None
        last = model(**BATCH).logits
        model.base_model.set_adapter(["a"])
        first = model(**BATCH).logits
    assert torch.allclose(mixed, torch.cat([first[:1], last[1:]]), atol=1e-6)
    assert not torch.allclose(first, last)


@pytest.mark.parametrize("lora_alpha", [128.0, 20.0])
def test_a_copied_expert_computes_what_the_old_one_does(tmp_path, lora_alpha):
    method, model = grown(tmp_path)
    if lora_alpha != 128.0:  # a group with a scale of its own
        for layer in model.base_model.layers():
            layer.group_configs["b"] = cmoe(lora_alpha=lora_alpha).config(stage(tmp_path))
    method.before_task(model, stage(tmp_path), None)
    for number, layer in enumerate(model.base_model.layers()):
        source = number % 3
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
        x[..., 0] = 1.0  # what the routers look at, so that one expert takes all
        outputs = []
        for expert in (source, 3, 4, 5):
            with torch.no_grad():
                layer.dymoe_router["b"].zero_()[expert, 0] = 1e4
                outputs.append(layer(x) - layer.base_layer(x))
        assert outputs[0].abs().max() > 1e-3
        for output in outputs[1:]:
            assert torch.allclose(output, outputs[0], atol=1e-6, rtol=1e-4)
        if lora_alpha != 128.0:
            assert not torch.equal(layer.dymoe_B["b"][0], layer.dymoe_B["a"][source])


def test_experts_of_another_rank_are_not_copied(tmp_path):
    _, model = grown(tmp_path)
    model.add_adapter("c", cmoe(rank=3).config(stage(tmp_path, 1)))
    with pytest.raises(DymoeError, match="experts of rank 3 cannot start as a copy of one of rank 2"):
        copy_expert(model.base_model.layers()[0], "a", 0, "c")


@pytest.mark.parametrize("over, columns", [("all", 6), ("new", 3)])
def test_balance_counts_the_experts_asked_for(tmp_path, over, columns):
    _, model = grown(tmp_path)
    model.train()
    for layer in model.base_model.layers():
        layer.group_configs["b"].load_balance = 1.0
        layer.group_configs["b"].balance_over = over
    seen = []
    model.base_model.trace.observers.append(seen.append)
    plain = model.base_model.trace
    loss = model(**BATCH, labels=BATCH["input_ids"])
    own = F.cross_entropy(loss.logits[:, :-1].flatten(0, 1), BATCH["input_ids"][:, 1:].flatten())
    terms = []
    for routing in seen:
        weights = routing.weights.flatten(0, 1)[:, 6 - columns :]
        weights = weights[weights.sum(-1) > 0]
        share = F.one_hot(weights.argmax(-1), columns).float().mean(0)
        terms.append(columns * (share * weights.sum(0) / weights.sum()).sum())
    assert float(loss.loss.detach()) == pytest.approx(float((own + torch.stack(terms).mean()).detach()), rel=1e-5)
    assert plain.summary()["load_balance"] == pytest.approx(float(torch.stack(terms).mean().detach()), rel=1e-5)


# ---- a probe leaves nothing ---------------------------------------------------------------------------------------


def probed(model, base, method, folder):
    """Add a probe, let it train for two steps, delete it."""
    config = method.probe(stage(folder), SimpleNamespace(steps=10)).config
    model = train_group(base, model, "probe", config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()
    return delete_group(model, "probe")


def picture(model):
    """Everything that a probe could have changed."""
    with torch.no_grad():
        logits = model.eval()(**BATCH).logits
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return logits, {name: value.clone() for name, value in model.state_dict().items()}, hooks, trainable


def assert_same(before, after):
    assert torch.equal(before[0], after[0])
    assert list(before[1]) == list(after[1])
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    assert before[2:] == after[2:]


def fit(model, group):
    selector = model.base_model.selector
    selector.fit(group, prompt_features(model, [BATCH]), epochs=2)


def test_a_deleted_probe_leaves_the_model_bit_identical(tmp_path):
    method, model = grown(tmp_path)
    for group in ("a", "b"):
        fit(model, group)
    freeze_all(model)
    before, hashes = picture(model), [group_hash(model, group) for group in ("a", "b")]
    after = probed(model, None, method, tmp_path)
    assert after is model
    assert_same(before, picture(model))
    assert [group_hash(model, group) for group in ("a", "b")] == hashes
    assert model.base_model.active_adapters == ["a", "b"]
    assert list(model.peft_config) == ["a", "b"]
    other = grown(tmp_path)[1]
    for one in (model, other):
        torch.manual_seed(9)
        train_group(None, one, "c", method.config(stage(tmp_path, 1)))
    assert group_hash(model, "c") == group_hash(other, "c")
    assert trainable_parameters(model) == trainable_parameters(other)


def test_a_probe_before_the_first_group_leaves_the_base_model_as_it_was(tmp_path):
    method, base = cmoe(), tiny_llama()
    before = picture(base)
    assert probed(None, base, method, tmp_path) is None
    freed = picture(base)
    assert_same(before[:3], freed[:3])
    assert not hasattr(base, "dymoe_selector")
    models = []
    for one in (base, tiny_llama()):
        torch.manual_seed(9)
        model = train_group(one, None, "a", method.config(stage(tmp_path, 1)))
        model.add_adapter("b", method.config(stage(tmp_path, 1)))
        randomise(model)
        for group in ("a", "b"):
            fit(model, group)
        freeze_all(model)
        models.append(model)
    assert_same(picture(models[0]), picture(models[1]))
    assert models[0].base_model.trace.context.selection is not None  # the selector speaks to the new trace
