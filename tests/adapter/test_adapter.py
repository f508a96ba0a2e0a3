"""An expert group is a PEFT adapter: PEFT's own calls, unmodified."""

import copy
import json
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from dymoe import DyMoEConfig, group_hash, routing
from dymoe.adapter.layer import DyMoELayer
from dymoe.adapter.trace import GroupWeights, LayerRouting

from .conftest import randomise, small, tiny_llama


def two_groups(**kwargs):
    model = get_peft_model(tiny_llama(), small(**kwargs), adapter_name="scienceqa")
    model.add_adapter("textvqa", small(**kwargs))
    randomise(model)
    return model


def trainable(model):
    return {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}


def test_adding_a_group_freezes_the_earlier_ones_and_leaves_all_active():
    model = get_peft_model(tiny_llama(), small(), adapter_name="scienceqa")
    assert trainable(model) == {"scienceqa"}
    model.add_adapter("textvqa", small())
    assert trainable(model) == {"textvqa"}
    assert model.base_model.stage == ["scienceqa", "textvqa"]
    assert model.active_adapters == ["textvqa", "scienceqa"], "first the one that trains"
    model.add_adapter("imagenet", small(r=3))
    assert trainable(model) == {"imagenet"}
    assert model.base_model.stage == ["scienceqa", "textvqa", "imagenet"]
    wrapped = 2 * 7
    assert len(model.base_model.layers()) == wrapped
    width = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = sum(4 * 3 * (m.in_features + m.out_features) + 4 * m.in_features for m in model.base_model.layers())
    assert width == expected


def test_a_new_group_changes_nothing_before_it_trains_but_takes_its_share(batch):
    base = tiny_llama().eval()
    model = get_peft_model(tiny_llama(), small(), adapter_name="scienceqa").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, base(**batch).logits)


def explicit(layer, x, groups, new, config, training):
    """The layer's formula, token by token and expert by expert."""
    rows, experts = [], []
    for g in groups:
        rows.append(layer.dymoe_router[g])
        for e in range(layer.group_configs[g].num_experts):
            a, b = layer.dymoe_A[g][e], layer.dymoe_B[g][e].t()
            experts.append((layer.group_configs[g].scaling, a, b))
    scores = routing.cosine_scores(x, torch.cat(rows))
    if training and new:
        scores = routing.token_assignment_guidance(
            scores, layer.group_configs[groups[-1]].num_experts, config.tau, config.guidance
        )
    weights = routing.topk_weights(scores, config.top_k, config.temperature)
    result = layer.base_layer(x)
    for t in range(x.shape[0]):
        for e, (scaling, a, b) in enumerate(experts):
            result[t] = result[t] + weights[t, e] * scaling * (b @ (a @ x[t]))
    return result


@pytest.mark.parametrize("compute", ["stacked", "reference"])
@pytest.mark.parametrize("guidance", routing.MASKS)
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_its_formula(compute, guidance, training):
    model = two_groups(compute=compute, guidance=guidance, top_k=3)
    model.train(training)
    layer = model.base_model.layers()[6]
    x = torch.randn(11, layer.in_features)
    with torch.no_grad():
        expected = explicit(layer, x, ["scienceqa", "textvqa"], True, small(guidance=guidance, top_k=3), training)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_what_a_hook_keeps_of_the_base_layer_stays_the_bases(training):
    layer = two_groups().train(training).base_model.layers()[6]
    kept = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    x = torch.randn(2, 11, layer.in_features)
    with torch.no_grad():
        output = layer(x)
        torch.testing.assert_close(kept[0], F.linear(x, layer.base_layer.weight))
    assert not torch.allclose(output, kept[0])


def test_stacked_and_reference_agree_in_all_gradients(batch):
    gradients = []
    for compute in ("stacked", "reference"):
        model = two_groups(compute=compute).double().train()  # the router's temperature of 0.01 magnifies rounding
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-10, rtol=1e-7, msg=name)
        if "dymoe_A" in name or "dymoe_B" in name:
            assert gradient.abs().sum() > 0, name


def test_save_and_load_one_folder_per_group(tmp_path, batch):
    model = two_groups()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "last", selected_adapters=["textvqa"])
    assert sorted(p.name for p in (tmp_path / "last").iterdir() if p.is_dir()) == ["textvqa"]
    assert (tmp_path / "scienceqa" / "adapter_model.safetensors").exists()
    config = json.loads((tmp_path / "textvqa" / "adapter_config.json").read_text())
    assert config["peft_type"] == "DYMOE"
    assert config["num_experts"] == 4

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "scienceqa", adapter_name="scienceqa")
    loaded.load_adapter(tmp_path / "textvqa", adapter_name="textvqa")
    assert loaded.active_adapters == ["scienceqa", "textvqa"]
    assert trainable(loaded) == set()
    for group in ("scienceqa", "textvqa"):
        assert group_hash(loaded, group) == group_hash(model, group)
    model.eval(), loaded.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
    loaded.add_adapter("imagenet", small())
    assert trainable(loaded) == {"imagenet"}


def test_a_stage_is_the_first_groups(tmp_path, batch):
    model = two_groups().eval()
    alone = get_peft_model(tiny_llama(), small(), adapter_name="scienceqa").eval()
    alone.load_state_dict(model.state_dict(), strict=False)
    model.set_adapter("scienceqa")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, alone(**batch).logits, atol=1e-4, rtol=1e-4)
    model.base_model.set_adapter(["scienceqa", "textvqa"])
    assert trainable(model) == {"textvqa"}, "an old group must never start to train again by being activated"


def test_disable_and_delete(batch):
    model, base = two_groups().eval(), tiny_llama().eval()
    with torch.no_grad():
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch).logits, base(**batch).logits)
        assert trainable(model) == {"textvqa"}
        both = model(**batch).logits
        assert not torch.allclose(both, base(**batch).logits)
        model.delete_adapter("textvqa")
        assert model.active_adapters == ["scienceqa"]
        after = model(**batch).logits
        model.add_adapter("imagenet", small())
        model.set_adapter("scienceqa")
        torch.testing.assert_close(model(**batch).logits, after, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(after, both)
        model.delete_adapter("imagenet")
        model.delete_adapter("scienceqa")
        torch.testing.assert_close(model.base_model(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("later", [["textvqa"], ["textvqa", "imagenet"]])
def test_deleting_the_first_group_keeps_the_later_ones(batch, later):
    model, alone = two_groups().eval(), two_groups().eval()
    for either in (model, alone):
        if "imagenet" in later:
            torch.manual_seed(3)
            either.add_adapter("imagenet", small())
            randomise(either, ["imagenet"])
        either.eval()
    model.delete_adapter("scienceqa")
    assert model.base_model.stage == later
    alone.base_model.set_adapter(later)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, alone(**batch).logits, atol=1e-4, rtol=1e-4)


def test_old_groups_stay_bit_identical_while_the_new_one_trains(batch):
    model = two_groups().train()
    before = {g: group_hash(model, g) for g in ("scienceqa", "textvqa")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert group_hash(model, "scienceqa") == before["scienceqa"]
    assert group_hash(model, "textvqa") != before["textvqa"]


def test_packed_groups_follow_a_change_of_their_weights(batch):
    model = two_groups().eval()
    with torch.no_grad():
        first = model(**batch).logits
        for layer in model.base_model.layers():
            layer.dymoe_B["scienceqa"].zero_()
        changed = model(**batch).logits
        assert not torch.allclose(first, changed)
        other = two_groups().eval()
        for layer in other.base_model.layers():
            layer.dymoe_B["scienceqa"].zero_()
        torch.testing.assert_close(other(**batch).logits, changed)
        model.double()
        torch.testing.assert_close(model(**batch).logits.float(), changed, atol=1e-4, rtol=1e-3)


def test_frozen_groups_are_packed_once(batch):
    model = two_groups().train()
    model(**batch).loss.backward()
    packs = [next(iter(layer._packs.values())) for layer in model.base_model.layers()]
    model(**batch).loss.backward()
    again = [next(iter(layer._packs.values())) for layer in model.base_model.layers()]
    assert all(a is b for a, b in zip(packs, again, strict=True))


class Wrapped4bit(nn.Module):
    """A linear as bitsandbytes wraps it: no floating-point weight of the usual shape, a compute dtype of its own."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = torch.bfloat16
        self.scale = linear.weight.abs().max() / 127
        quantised = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(quantised.reshape(-1, 1), requires_grad=False)

    def forward(self, x):
        weight = self.weight.reshape(self.out_features, self.in_features).to(self.compute_dtype) * self.scale
        return F.linear(x.to(self.compute_dtype), weight.to(self.compute_dtype)).to(x.dtype)


def test_quantised_linears_hold_experts(batch):
    base = tiny_llama()
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name.endswith("_proj"):
                setattr(module, name, Wrapped4bit(child))
    model = get_peft_model(base, small(), adapter_name="scienceqa")
    model.add_adapter("textvqa", small())
    model.train()(**batch).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if p.requires_grad and "dymoe_B" in n]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)


def test_autocast_keeps_scores_in_float32_and_parameters_too(batch):
    model = two_groups().to(torch.float32).eval()
    kept = []
    model.base_model.trace.observers.append(kept.append)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(**batch).logits
    assert {r.scores.dtype for r in kept} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "dymoe" in n} == {torch.float32}
    with torch.no_grad():
        difference = (inside.float() - model(**batch).logits).abs()
    assert difference.mean() < 0.02, "rounding only (a token at the border between two experts may differ more)"


def test_the_graph_lets_go_of_the_linears_inputs_with_its_backward_pass(batch):
    model = two_groups().train()
    held = []
    for layer in model.base_model.layers():
        layer.register_forward_pre_hook(lambda _, args: held.append(weakref.ref(args[0])))
    loss = model(**batch).loss
    assert any(x() is not None for x in held), "the graph needs some of them"
    loss.backward()
    assert loss.grad_fn is not None, "the graph itself is still there"
    assert all(x() is None for x in held)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(batch, reentrant):
    plain, checkpointed = two_groups(load_balance=0.1, specialization=0.3).train(), None
    plain.base_model.trace.context.progress = 1.0
    plain(**batch).loss.backward()
    checkpointed = two_groups(load_balance=0.1, specialization=0.3).train()
    checkpointed.base_model.trace.context.progress = 1.0
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed(**batch).loss.backward()
    assert plain.base_model.trace.summary() == pytest.approx(checkpointed.base_model.trace.summary(), rel=1e-5)
    expected = dict(plain.named_parameters())
    for name, p in checkpointed.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name].grad, atol=1e-7, rtol=1e-4, msg=name)


def graph_loss(model, batch, coefficients, scale):
    """The loss with the routing terms added by ordinary autograd, from scores that an observer cannot give."""
    kept = {}
    handles = []
    for layer in model.base_model.layers():

        def hook(layer, args):
            kept[layer.name] = args[0]

        handles.append(layer.register_forward_pre_hook(hook))
    trace = model.base_model.trace
    trace.context.collect = False
    for config in model.peft_config.values():
        config.load_balance = config.exclusivity = config.specialization = 0.0
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    mask = batch["attention_mask"].bool()
    total = 0.0
    for layer in model.base_model.layers():
        router = torch.cat([layer.dymoe_router[g] for g in ("scienceqa", "textvqa")])
        scores = routing.cosine_scores(kept[layer.name], router)
        guided = routing.token_assignment_guidance(scores, 4, 0.2)
        weights = routing.topk_weights(guided, 4, 0.01)
        balance = routing.load_balance_loss(weights, 4, mask)
        exc = routing.exclusivity_loss(scores, 4, 4, 0.1, mask)
        spe = routing.specialization_loss(scores, 4, 4, 0.1, mask)
        total = total + coefficients[0] * balance + scale * (coefficients[1] * exc + coefficients[2] * spe)
    return loss + total / len(model.base_model.layers())


@pytest.mark.parametrize(("progress", "scale"), [(None, 1.0), (0.25, 0.0), (0.75, 0.5), (1.0, 1.0)])
def test_loss_terms_reach_the_router_as_if_they_were_in_the_graph(batch, progress, scale):
    coefficients = (0.2, 0.3, 0.4)
    kwargs = dict(zip(("load_balance", "exclusivity", "specialization"), coefficients, strict=True))
    model, explicit_model = two_groups(**kwargs).train(), two_groups(**kwargs).train()
    model.base_model.trace.context.progress = progress
    loss = model(**batch).loss
    (3 * loss).backward()  # as a gradient scaler would
    expected = graph_loss(explicit_model, batch, coefficients, scale)
    (3 * expected).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    parameters = dict(explicit_model.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, parameters[name].grad, atol=1e-6, rtol=1e-3, msg=name)


def test_accumulation_counts_each_micro_batch_by_its_share(batch):
    """With equal micro-batches and a linear term, accumulated gradients equal those of the whole batch."""
    whole = two_groups(load_balance=0.0, exclusivity=0.5, specialization=0.5).train()
    same = {k: torch.cat([v[2:], v[2:]]) for k, v in batch.items()}
    items = (same["labels"][:, 1:] != -100).sum()
    whole(**same, num_items_in_batch=items).loss.backward()
    parts = two_groups(load_balance=0.0, exclusivity=0.5, specialization=0.5).train()
    for i in (0, 1):
        parts(**{k: v[i : i + 1] for k, v in same.items()}, num_items_in_batch=items).loss.backward()
    expected = dict(whole.named_parameters())
    for name, p in parts.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name].grad, atol=1e-6, rtol=1e-3, msg=name)


def test_padding_changes_neither_terms_nor_statistics(batch):
    model = two_groups().train()
    row = {k: v[2:] for k, v in batch.items()}
    model(**row)
    alone = model.base_model.trace.summary()
    padded = {k: F.pad(v, (3, 0), value=-100 if k == "labels" else 0) for k, v in row.items()}
    model(**padded)
    assert model.base_model.trace.summary() == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_a_mask_given_by_position_counts_as_one_given_by_name(batch):
    model = two_groups().train()
    model(**batch)
    named = model.base_model.trace.summary()
    model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    assert model.base_model.trace.summary() == named
    model(batch["input_ids"], labels=batch["labels"])
    assert model.base_model.trace.summary() != named


def test_measured_group_weights_sum_to_one_and_count_real_tokens_only(batch):
    model = two_groups().eval()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad(), model.base_model.trace.measuring() as weights:
        model(**inputs)
    assert weights.groups == ("scienceqa", "textvqa")
    assert sum(weights.by_group()) == pytest.approx(1, abs=1e-6)
    assert list(weights.by_layer()) == [0, 1]
    with torch.no_grad(), model.base_model.trace.measuring() as single:
        for i in range(3):
            start = int((inputs["attention_mask"][i] == 0).sum())
            model(**{k: v[i : i + 1, start:] for k, v in inputs.items()})
    assert single.by_group() == pytest.approx(weights.by_group(), abs=1e-4)


def test_group_weights_are_summed_where_the_layer_is():
    """A copy to the CPU in every layer would let a GPU wait; one from `meta` would fail here."""
    weights, mask = torch.ones(2, 3, 4, device="meta"), torch.ones(2, 3, dtype=torch.bool, device="meta")
    seen = GroupWeights()
    for counted in (mask, None):
        for _ in range(2):
            seen(LayerRouting("layer", ("one", "two"), (2, 2), None, weights, counted))


def test_generation_measures_decoded_tokens_too(batch):
    model = two_groups().eval()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with model.base_model.trace.measuring() as weights:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    tokens = int(inputs["attention_mask"].sum()) + 2 * 3
    assert {int(n) for n in weights._tokens.values()} == {tokens}


def test_lora_is_one_expert_with_weight_one(batch):
    config = DyMoEConfig(num_experts=1, r=8, lora_alpha=16, gate="uniform", guidance="none", lora_dropout=0.0)
    model = get_peft_model(tiny_llama(), config, adapter_name="shared").eval()
    randomise(model)
    merged = copy.deepcopy(tiny_llama()).eval()
    modules = dict(merged.named_modules())
    with torch.no_grad():
        for layer in model.base_model.layers():
            a, b = layer.dymoe_A["shared"][0], layer.dymoe_B["shared"][0]
            modules[layer.name].weight += 2 * b.t() @ a
        torch.testing.assert_close(model(**batch).logits, merged(**batch).logits, atol=1e-5, rtol=1e-4)
    assert not any("router" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("training", [True, False])
def test_compiled_layer_has_no_graph_break(training):
    model = two_groups().train(training)
    layer = model.base_model.layers()[0]
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    layer(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output = compiled(x)
    torch.testing.assert_close(output, layer(x))
    layer.zero_grad()
    output.square().sum().backward()
    got = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts", 0, "num_experts"),
        ("r", 2.5, "r must be a whole number"),
        ("top_k", 0, "top_k"),
        ("temperature", 0.0, "temperature"),
        ("temperature", 1e-320, "temperature must be 0 or a number between 1e-30 and 1e"),
        ("lora_alpha", float("inf"), "lora_alpha must be 0 or a number between"),
        ("specialization", float("nan"), "specialization must be 0 or a number between"),
        ("tau", -1.0, "tau"),
        ("guidance", "both", "guidance: expected one of exclusive, protect, only-"),
        ("gate", "softmax", "gate must be one of"),
        ("compute", "fast", "compute must be one of"),
        ("lora_dropout", 1.0, "lora_dropout"),
        ("exclusivity", -1e-3, "exclusivity"),
    ],
)
def test_config_values_out_of_range_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        DyMoEConfig(**{field: value})


def test_targets_that_are_no_linears_are_refused():
    with pytest.raises(ValueError, match="a LlamaRMSNorm cannot hold experts"):
        get_peft_model(tiny_llama(), small(target_modules=["input_layernorm"]), adapter_name="a")


def test_groups_of_different_gates_do_not_mix():
    model = get_peft_model(tiny_llama(), small(), adapter_name="a")
    with pytest.raises(ValueError, match="share one gate"):
        model.add_adapter("b", small(gate="uniform"))


def test_merging_is_refused():
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        two_groups().merge_and_unload()


def test_hash_of_an_unknown_group():
    with pytest.raises(ValueError, match="no expert group 'nobody'"):
        group_hash(two_groups(), "nobody")


def test_initial_values_follow_lora():
    layer = get_peft_model(tiny_llama(), small(), adapter_name="a").base_model.layers()[0]
    assert isinstance(layer, DyMoELayer)
    assert not layer.dymoe_B["a"].any()
    bound = math.sqrt(1 / layer.in_features)
    for values in (layer.dymoe_A["a"], layer.dymoe_router["a"]):
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.8 * bound


def test_batch_norms_of_the_frozen_base_stay_as_they_are():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.q_proj = nn.Linear(6, 4)

        def forward(self, x):
            return self.q_proj(self.norm(x))

    model = get_peft_model(Tower(), small(target_modules=["q_proj"]), adapter_name="a")
    model.train()
    before = model.base_model.model.norm.running_mean.clone()
    model.base_model.model(torch.randn(5, 6) + 3)
    assert torch.equal(model.base_model.model.norm.running_mean, before)
    assert model.base_model.layers()[0].training
