"""Pruning: who goes is who is used least, who stays computes what it did."""

import json

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

from dymoe import methods
from dymoe.adapter import group_hash
from dymoe.learning.groups import freeze_all, load_group, save_group, train_group
from dymoe.methods import Composed
from dymoe.methods.pruning import Pruning, activation, adjust, dropped, keep, shrink
from dymoe.methods.task_router import TaskRouter
from tests.adapter.conftest import randomise, small, tiny_llama
from tests.methods.toys import data, stages, task, tokens

TASK = task("a", 9)


@pytest.mark.parametrize(
    "experts, share, count",
    [(16, 0.125, 2), (16, 0.25, 4), (1, 0.25, 0), (7, 0.125, 0), (9, 0.25, 2), (100, 0.29, 29), (10, 0.7, 7)],
)
def test_the_number_dropped_is_rounded_down(experts, share, count):
    assert dropped(experts, share) == count
    assert len(keep([1.0] * experts, share)) == experts - count


def test_the_least_activated_go_and_of_equals_the_first():
    assert keep([0.3, 0.1, 0.2, 0.4], 0.5) == [0, 3]
    assert keep([0.2, 0.1, 0.1, 0.1], 0.5) == [0, 3]


# ---- what is measured -------------------------------------------------------------------------------------------


def grown(groups=("a", "b"), **kwargs):
    model = get_peft_model(tiny_llama(), small(**kwargs), adapter_name=groups[0])
    for name in groups[1:]:
        model.add_adapter(name, small(**kwargs))
    randomise(model)
    return model


def prompts_alone(model):
    """Each prompt asked alone, without padding and answer."""
    model.eval()
    with torch.no_grad():
        for sample in TASK.train:
            model(input_ids=torch.tensor([tokens(sample.question)]))


@pytest.mark.parametrize("gate", ["cosine", "linear"])
@pytest.mark.parametrize("top_k", [3, 8])
def test_activation_is_the_mean_routing_weight_of_the_prompts(gate, top_k):
    model = grown(gate=gate, top_k=top_k, temperature=0.1, expert_pattern={"k_proj": 2, "0.self_attn.q_proj": 0})
    model.train()
    found = activation(model, "b", data(TASK.train), TASK.train)
    assert model.training
    assert not model.base_model.trace.observers
    seen: dict = {}
    model.base_model.trace.observers.append(
        lambda r: seen.setdefault(r.layer, []).append(r.weights[0, :, -r.sizes[1] :])
    )
    prompts_alone(model)
    layers = {layer.name: layer for layer in model.base_model.layers() if layer.experts_of("b")}
    assert found.keys() == layers.keys()
    assert len(layers) == 13
    for name, values in found.items():
        assert values.shape == (layers[name].experts_of("b"),)
        torch.testing.assert_close(values, torch.cat(seen[name]).double().mean(0), atol=1e-5, rtol=1e-4)


def test_under_a_uniform_gate_activation_is_the_norm_of_the_output():
    model = grown(gate="uniform")
    found = activation(model, "b", data(TASK.train), TASK.train)
    layers = model.base_model.layers()
    norms: dict = {layer.name: [] for layer in layers}

    def note(layer, arguments):
        for x in arguments[0][0]:
            row = []
            for e in range(4):
                a, b = layer.dymoe_A["b"][e], layer.dymoe_B["b"][e]
                row.append(layer.group_configs["b"].scaling * (b.t() @ (a @ x)).norm())
            norms[layer.name].append(torch.stack(row))

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    prompts_alone(model)
    for handle in handles:
        handle.remove()
    assert found.keys() == norms.keys()
    for name, values in found.items():
        torch.testing.assert_close(values, torch.stack(norms[name]).double().mean(0), atol=1e-6, rtol=1e-4)


# ---- what is left -----------------------------------------------------------------------------------------------

KEPT = [0, 2, 3]


def masked(layer, x, groups, dropped_expert):
    """Oracle: the whole bank with one expert's score at -inf before the softmax."""
    config = layer.group_configs[groups[-1]]
    if config.gate == "linear":
        scores = x @ layer.dymoe_router[groups[-1]].t()
    else:
        rows = torch.cat([layer.dymoe_router[group] for group in groups])
        scores = F.normalize(x, dim=-1) @ F.normalize(rows, dim=-1).t()
    scores[..., dropped_expert] = float("-inf")
    values, places = scores.topk(min(config.top_k, scores.shape[-1] - 1), dim=-1)
    weights = torch.zeros_like(scores).scatter(-1, places, torch.softmax(values / config.temperature, -1))
    output, column = layer.base_layer(x), 0
    for group in groups:
        scale = layer.group_configs[group].scaling
        for a, b in zip(layer.dymoe_A[group], layer.dymoe_B[group], strict=True):
            output = output + scale * weights[..., column : column + 1] * (x @ a.t() @ b)
            column += 1
    return output


@pytest.mark.parametrize("compute", ["stacked", "reference"])
@pytest.mark.parametrize("gate", ["cosine", "linear"])
@pytest.mark.parametrize("top_k", [2, 5, 8])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_pruned_bank_is_the_bank_with_masked_scores(gate, top_k, compute, frozen):
    """The weights of the dropped experts go to the others by the softmax; nothing else changes."""
    model = grown(gate=gate, top_k=top_k, temperature=0.1, compute=compute).eval()
    layers = model.base_model.layers()
    x = {layer.name: torch.randn(3, 5, layer.in_features) for layer in layers}
    with torch.no_grad():
        expected = {layer.name: masked(layer, x[layer.name], ["a", "b"], 4 + 1) for layer in layers}
        shrink(model, "b", {layer.name: KEPT for layer in layers})
        adjust(model.peft_config["b"], 0.25)
        if frozen:
            freeze_all(model)
        for layer in layers:
            assert layer.experts_of("b") == 3
            torch.testing.assert_close(layer(x[layer.name]), expected[layer.name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", ["cosine", "linear"])
def test_experts_without_weight_leave_no_trace_to_the_last_bit(gate):
    """Router rows of one entry make the scores exact, whatever the order in which a library sums."""
    model = grown(gate=gate, top_k=3, temperature=0.1, compute="reference").eval()
    for layer in model.base_model.layers():
        unit = torch.eye(layer.in_features)
        own = torch.stack([unit[5], -unit[0], unit[6], unit[7]])  # the second never wins: every x has a large entry 0
        with torch.no_grad():
            layer.dymoe_router["a"].copy_(unit[1:5])
            layer.dymoe_router["b"].copy_(own if gate == "cosine" else torch.cat([unit[1:5], own]))
        x = torch.randn(3, 5, layer.in_features) + 9 * unit[0]
        seen = []
        model.base_model.trace.observers[:] = [seen.append]
        with torch.no_grad():
            before = layer(x)
            shrink(model, "b", {layer.name: KEPT})
            assert torch.equal(layer(x), before)
        assert (seen[0].weights[..., 5] == 0).all()
        assert torch.equal(seen[1].weights, seen[0].weights[..., [0, 1, 2, 3, 4, 6, 7]])
        assert (seen[1].weights[..., 4:] > 0).any()


def test_an_expert_without_output_leaves_no_trace_under_a_uniform_gate():
    model = grown(gate="uniform", compute="reference").eval()
    for layer in model.base_model.layers():
        with torch.no_grad():
            layer.dymoe_B["b"][1] = 0
            x = torch.randn(3, 5, layer.in_features)
            before = layer(x)
            shrink(model, "b", {layer.name: KEPT})
            assert torch.equal(layer(x), before)


@pytest.mark.parametrize("experts, rank, alpha, share", [(16, 4, 128.0, 0.125), (5, 3, 7.0, 0.3), (3, 2, 0.1, 0.4)])
def test_the_scale_does_not_change(experts, rank, alpha, share):
    config = small(
        num_experts=experts, r=rank, lora_alpha=alpha, expert_pattern={"q_proj": 8, "v_proj": 0, "o_proj": 1}
    )
    scaling = config.scaling
    adjust(config, share)
    assert config.num_experts == experts - int(share * experts)
    assert config.scaling == pytest.approx(scaling, rel=1e-15)
    left = {"q_proj": 8 - int(share * 8), "v_proj": 0, "o_proj": 1}
    assert config.expert_pattern == left


# ---- the plugin ----------------------------------------------------------------------------------------------

TASKS = [TASK, task("b", 9), task("c", 9)]


def learn(folder, method, plugins, tasks=TASKS):
    composed, model, base = Composed(method, plugins), None, tiny_llama()
    for stage in stages(folder, tasks):
        group = composed.group(stage)
        torch.manual_seed(stage.index)
        model = train_group(base, model, group, composed.config(stage))
        randomise(model, [group])
        composed.after_task(model, stage, data(stage.tasks[0].train))
        freeze_all(model)
    return model.eval()


def record(folder, index):
    return json.loads((folder / str(index) / "pruning.json").read_text())


def bank(name, **settings):
    return methods.create(name, **{"rank": 2, "top_k": 3, "lora_dropout": 0.0, **settings})


@pytest.mark.parametrize("plugins", [[Pruning(share=0.25)], [TaskRouter(), Pruning(share=0.25)]])
@pytest.mark.parametrize(
    "method",
    [
        bank("dymoe", num_experts=8),
        bank("cmoe", experts=8, probe_share=0, locator_epochs=1, target_modules=["q_proj", "down_proj"]),
    ],
    ids=["cosine", "linear"],
)
def test_a_pruned_run_is_saved_and_loaded_bit_for_bit(tmp_path, method, plugins):
    model = learn(tmp_path, method, plugins)
    loaded = None
    for number, name in enumerate("abc"):
        config = model.peft_config[name]
        assert config.num_experts == 6
        assert config.scaling == method.config(stages(tmp_path, TASKS)[0]).scaling
        found = record(tmp_path, number)
        assert found["group"] == name
        for layer in model.base_model.layers():
            row = found["layers"][layer.name]
            assert layer.experts_of(name) == len(row["kept"]) == 6
            gone = set(range(8)) - set(row["kept"])
            assert max(row["activation"][e] for e in gone) <= min(row["activation"][e] for e in row["kept"])
            if config.gate == "linear":
                assert layer.dymoe_router[name].shape[0] == 6 * (number + 1)
        save_group(model, name, tmp_path / name)
        loaded = load_group(tiny_llama(), loaded, name, tmp_path / name)
        assert group_hash(loaded, name) == group_hash(model, name)
    ids = torch.tensor([tokens(TASK.train[0].question)])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)


def test_a_group_that_goes_on_training_is_pruned_once(tmp_path):
    model = learn(tmp_path, methods.create("moelora", num_experts=8, rank=2), [Pruning(share=0.25)])
    group = record(tmp_path, 0)["group"]
    assert model.peft_config[group].num_experts == 6
    assert not (tmp_path / "1" / "pruning.json").exists()


def test_a_single_expert_stays(tmp_path):
    model = learn(tmp_path, methods.create("lora", rank=2), [Pruning()])
    assert model.peft_config["shared"].num_experts == 1


def test_a_stage_done_again_keeps_the_same_experts(tmp_path):
    whole = learn(tmp_path, bank("dymoe", num_experts=8), [Pruning(limit=4)])
    files = [(tmp_path / str(number) / "pruning.json").read_bytes() for number in range(3)]
    again = learn(tmp_path, bank("dymoe", num_experts=8), [Pruning(limit=4)])
    assert [(tmp_path / str(number) / "pruning.json").read_bytes() for number in range(3)] == files
    assert [group_hash(again, name) for name in "abc"] == [group_hash(whole, name) for name in "abc"]
