"""Selection over groups: decided once per prompt, obeyed by every layer, with exact gradients for who decides."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache

from dymoe.adapter.holder import GroupHolder
from dymoe.adapter.selection import Prompt, Select, Selector
from dymoe.adapter.selectors import SELECTORS
from dymoe.adapter.trace import RoutingTrace
from dymoe.errors import DymoeError

from .conftest import randomise, small, tiny_llama

GROUPS = ("a", "b", "c")


class Told(Selector):
    """Gives every sample the weights it was told; keeps the prompts it was asked about."""

    name = "told"
    adapter_layer_names = ("dymoe_told",)

    def __init__(self, width):
        super().__init__(width)
        self.dymoe_told = nn.ParameterDict()
        self.weights = None
        self.asked = []

    def add_group(self, group, options):
        self.dymoe_told[group] = nn.Parameter(torch.zeros(1))

    def select(self, prompt, groups):
        self.asked.append(prompt)
        return None if self.weights is None else self.weights[: prompt.embeddings.shape[0], : len(groups)]


class ToldWhileTraining(Told):
    """The same, in training mode too."""

    name = "told-while-training"
    while_training = True


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for selector in (Told, ToldWhileTraining):
        monkeypatch.setitem(SELECTORS, selector.name, selector)


def grown(groups=GROUPS, base=None, **kwargs):
    """A model of several groups with values in B (and, for keys, in everything the selector holds)."""
    config = {"num_experts": 1, "gate": "uniform", "guidance": "none", "load_balance": 0.0, "selector": "told"}
    model = None
    for group in groups:
        made = small(**{**config, **kwargs})
        model = get_peft_model(base or tiny_llama(), made, adapter_name=group) if model is None else model
        if group not in model.peft_config:
            model.add_adapter(group, made)
    randomise(model)
    selector = model.base_model.selector
    if selector is not None and selector.name == "keys":
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for p in selector.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * (3.0 if p.dim() == 1 else 0.5))
    return model


def inputs(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


# ---- deciding ---------------------------------------------------------------------------------------------------


def test_selection_for_gives_the_columns_of_the_groups():
    trace = RoutingTrace()
    assert trace.context.selection_for(["a"]) is None
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    trace.context.selection = (GROUPS, weights)
    assert trace.context.selection_for(GROUPS) is weights
    assert trace.context.selection_for(["c", "a"]).tolist() == [[3, 1], [6, 4]]
    with pytest.raises(ValueError):
        trace.context.selection_for(["nobody"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["told", "told-while-training"])
def test_a_selector_is_asked_in_training_only_if_it_holds_then(batch, training, name):
    model = grown(selector=name).train(training)
    selector = model.base_model.selector
    selector.weights = torch.tensor([[1.0, 0.0, 0.0]] * 3)
    model(**batch)
    asked = not training or selector.while_training
    assert len(selector.asked) == int(asked)
    assert (model.base_model.trace.context.selection is not None) == asked


def test_the_prompt_holds_no_padding_and_no_answer(batch):
    model = grown(selector="told-while-training").train()
    selector = model.base_model.selector
    trace = model.base_model.trace
    model(**batch)  # the loss computed by the model
    with trace.context.labelled(batch["labels"]):
        model(**inputs(batch))  # the loss computed by the trainer
    model.eval()(**inputs(batch))  # generation
    attended = batch["attention_mask"].bool()
    question = attended & (batch["labels"] == -100)
    assert question.sum() < attended.sum() < attended.numel()
    for prompt, expected in zip(selector.asked, (question, question, attended), strict=True):
        assert torch.equal(prompt.prompt_mask, expected)
        assert torch.equal(prompt.attention_mask, attended)
        assert torch.equal(prompt.embeddings, model.base_model.model.model.embed_tokens(batch["input_ids"]))


def test_without_labels_and_masks_every_token_is_prompt(batch):
    model = grown().eval()
    model(batch["input_ids"])
    prompt = model.base_model.selector.asked[0]
    assert prompt.prompt_mask.all()
    assert prompt.prompt_mask.shape == batch["input_ids"].shape


def test_disabled_adapters_ask_nobody(batch):
    model, base = grown().eval(), tiny_llama().eval()
    selector = model.base_model.selector
    selector.weights = torch.tensor([[0.0, 1.0, 0.0]] * 3)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, base(**batch).logits)
    assert selector.asked == []
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, base(**batch).logits)


# ---- obeying ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["uniform", "cosine"])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_one_group_chosen_is_that_group_alone(batch, gate, chosen):
    experts = {"num_experts": 1} if gate == "uniform" else {"num_experts": 4}
    model, alone = (grown(gate=gate, **experts).double().eval() for _ in range(2))
    model.base_model.selector.weights = F.one_hot(torch.full((3,), chosen), 3).float()
    alone.base_model.set_adapter([GROUPS[chosen]])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, alone(**batch).logits)


def test_weights_differ_by_sample(batch):
    """Each row of the batch equals the same row asked alone with its weights."""
    model = grown().eval()
    selector = model.base_model.selector
    rows = torch.softmax(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) * 3, -1)
    selector.weights = rows
    with torch.no_grad():
        together = model(**inputs(batch)).logits
        for i in range(3):
            selector.weights = rows[i : i + 1]
            start = int((batch["attention_mask"][i] == 0).sum())
            alone = model(**{k: v[i : i + 1, start:] for k, v in inputs(batch).items()}).logits
            torch.testing.assert_close(together[i, start:], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compute", ["stacked", "reference"])
def test_a_layer_is_the_weighted_sum_of_its_groups(compute):
    model = grown(compute=compute, num_experts=2, expert_pattern={"k_proj": 3}).eval()
    weights = torch.rand(3, 3)
    model.base_model.trace.context.selection = (GROUPS, weights)
    for layer in model.base_model.layers()[:4]:
        x = torch.randn(3, 5, layer.in_features)
        expected = layer.base_layer(x)
        for column, group in enumerate(GROUPS):
            for e in range(layer.experts_of(group)):
                a, b = layer.dymoe_A[group][e], layer.dymoe_B[group][e]
                scale = layer.group_configs[group].scaling
                expected = expected + weights[:, column].view(3, 1, 1) * scale * (x @ a.t() @ b)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_a_selection_for_another_batch_is_refused():
    model = grown().eval()
    model.base_model.trace.context.selection = (GROUPS, torch.ones(2, 3))
    with pytest.raises(ValueError, match="a selection for 2 samples does not fit"):
        model.base_model.layers()[0](torch.randn(3, 5, 32))


# ---- generating -------------------------------------------------------------------------------------------------


def answers(model, batch, **kwargs):
    return model.generate(**inputs(batch), max_new_tokens=5, min_new_tokens=5, do_sample=False, **kwargs)[:, 9:]


def test_generation_decides_once_per_prompt_and_keeps_it(batch):
    model = grown().eval()
    selector, trace = model.base_model.selector, model.base_model.trace
    selector.weights = torch.softmax(torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]]), -1)
    seen = []
    trace.observers.append(lambda routing: seen.append(routing.weights))
    answers(model, batch)
    assert len(selector.asked) == 1
    assert len(seen) == 14 * 5
    assert {tuple(weights.shape[1:]) for weights in seen} == {(9, 3), (1, 3)}
    for weights in seen:
        assert torch.equal(weights, selector.weights.unsqueeze(1).expand_as(weights))
    answers(model, batch)
    assert len(selector.asked) == 2


def test_the_cache_is_known_whatever_its_argument_is_called_and_a_missing_one_is_an_error(batch):
    """A decoder's call for one token more, as transformers made it under two names and might under a third."""
    model = grown().eval()
    model(**inputs(batch))
    decoder, selector, trace = model.base_model.model.model, model.base_model.selector, model.base_model.trace
    select, one, cache = Select(selector, trace.context), batch["input_ids"][:, :1], DynamicCache()
    cache.update(torch.zeros(3, 1, 9, 4), torch.zeros(3, 1, 9, 4), 0)
    decided, asked = trace.context.selection, len(selector.asked)
    trace.begin(model, {"attention_mask": torch.ones(3, 10, dtype=torch.long)})
    for name in ("past_key_values", "cache", "memory"):
        assert select(decoder, (), {"input_ids": one, name: cache}) is None
    assert select(decoder, (one, cache), {}) is None
    assert trace.context.selection is decided
    assert len(selector.asked) == asked
    with pytest.raises(DymoeError, match=r"LlamaModel of transformers \d.* gets no key/value cache"):
        select(decoder, (), {"input_ids": one, "cache": object()})
    trace.begin(model, {})  # without padding there may be no mask
    with pytest.raises(DymoeError, match="no key/value cache"):
        select(decoder, (), {"input_ids": one, "position_ids": torch.full((1, 1), 9)})


@pytest.mark.parametrize("name", ["told", "keys"])
def test_batched_and_single_answers_agree(batch, name):
    """Left-padded rows asked together, asked alone, and asked alone without padding answer the same."""
    model = grown(selector=name).eval()
    rows = torch.eye(3)
    if name == "told":
        model.base_model.selector.weights = rows
    together = answers(model, batch)
    uncached = answers(grown_like(model), batch) if name == "told" else together
    assert torch.equal(together, uncached)
    for i in range(3):
        if name == "told":
            model.base_model.selector.weights = rows[i : i + 1]
        row = {k: v[i : i + 1] for k, v in batch.items()}
        assert torch.equal(answers(model, row), together[i : i + 1])
        start = int((row["attention_mask"] == 0).sum())
        short = {k: v[:, start:] for k, v in row.items()}
        assert torch.equal(
            model.generate(**inputs(short), max_new_tokens=5, min_new_tokens=5, do_sample=False)[:, 9 - start :],
            together[i : i + 1],
        )


def grown_like(model):
    """A copy: hooks, trace and selector must belong together in it."""
    copied = copy.deepcopy(model)
    assert copied.base_model.selector is not model.base_model.selector
    assert copied.base_model.trace is not model.base_model.trace
    return copied


# ---- features of the frozen decoder -----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_features_are_those_of_the_unwrapped_model(batch, training, positions):
    model = grown(selector="told-while-training").train(training)
    selector = model.base_model.selector
    selector.weights = torch.eye(3)
    given = dict(batch)
    if positions:
        given["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model(**given)
    features = selector.asked[0].features()
    assert features.shape == (3, 32)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    base = tiny_llama().eval()
    with torch.no_grad():
        hidden = base.model(**inputs(given)).last_hidden_state
    torch.testing.assert_close(features, hidden[:, 4])  # labels begin at the sixth token of every row
    # and it does not depend on the answer or the padding
    for i in range(3):
        start = int((batch["attention_mask"][i] == 0).sum())
        with torch.no_grad():
            alone = base.model(input_ids=batch["input_ids"][i : i + 1, start:5]).last_hidden_state[0, -1]
        torch.testing.assert_close(features[i], alone, atol=1e-5, rtol=1e-4)
    assert model.base_model.model.model.training == training
    holders = [module for module in model.modules() if isinstance(module, GroupHolder)]
    assert len(holders) == 15
    assert not any(holder._disable_adapters for holder in holders)


def test_features_inside_a_forward_leave_the_pass_as_it_was(batch, monkeypatch):
    model = grown().eval()
    selector = model.base_model.selector
    selector.weights = torch.eye(3)
    with torch.no_grad():
        expected = model(**inputs(batch)).logits
        monkeypatch.setattr(Told, "select", lambda self, prompt, groups: (prompt.features(), self.weights)[1])
        seen = []
        model.base_model.trace.observers.append(seen.append)
        assert torch.equal(model(**inputs(batch)).logits, expected)
    assert len(seen) == 14, "the features' own pass is not measured"


def test_prompt_masks_by_default():
    prompt = Prompt(nn.Identity(), torch.zeros(2, 3, 4), None, None, {})
    assert prompt.attention_mask.all()
    assert prompt.prompt_mask is prompt.attention_mask


# ---- growing ----------------------------------------------------------------------------------------------------


def test_a_selectors_groups_live_and_die_with_the_layers():
    model = grown()
    selector = model.base_model.selector
    assert selector.training_group == "c"
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"c"}
    assert [p.requires_grad for p in selector.dymoe_told.values()] == [False, False, True]
    model.base_model.set_adapter(["a", "b"])
    assert selector.active_adapters == ["a", "b"]
    assert not any(p.requires_grad for p in selector.parameters())
    model.delete_adapter("b")
    assert list(selector.dymoe_told) == ["a", "c"]
    assert selector.active_adapters == ["a"]


def test_unloading_leaves_the_base_as_it_was(batch):
    model = grown().eval()
    model.base_model.selector.weights = torch.eye(3)
    base = model.base_model.unload().eval()
    assert not [module for module in base.modules() if isinstance(module, GroupHolder)]
    assert not any(isinstance(hook, Select) for hook in base.model._forward_pre_hooks.values())
    assert set(base.state_dict()) == set(tiny_llama().state_dict())
    again = grown(groups=("z",), base=base).eval()
    again.base_model.selector.weights = torch.ones(3, 1)
    again(**batch)
    assert list(again.base_model.selector.dymoe_told) == ["z"]
    assert len(again.base_model.selector.asked) == 1


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"selector must be none or one of .*keys.*, got 'nobody'"):
        grown(selector="nobody")
    model = grown(groups=("a",))
    with pytest.raises(ValueError, match="share one selector"):
        model.add_adapter("b", small(gate="uniform", selector="keys"))
    with pytest.raises(ValueError, match=r"lm_head: a selector weighs layers of the language model's decoder alone"):
        grown(target_modules=["q_proj", "lm_head"])


# ---- learning ---------------------------------------------------------------------------------------------------


class Closure:
    """The plain way: the layers see the selection as a part of their graph (no checkpointing could go through it)."""

    def __init__(self, model):
        decoder = model.base_model.model.model
        key = next(k for k, hook in decoder._forward_pre_hooks.items() if isinstance(hook, Select))
        del decoder._forward_pre_hooks[key]
        self.selector, self.trace = model.base_model.selector, model.base_model.trace
        decoder.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        embeddings = module.embed_tokens(kwargs["input_ids"])
        groups = tuple(self.selector.active_adapters)
        prompt = Prompt(module, embeddings, self.trace.context.token_mask, self.trace.context.prompt_mask, kwargs)
        self.trace.context.selection = (groups, self.selector.select(prompt, groups))


def micro_batches(batch, parts):
    return [{k: v[i::parts] for k, v in batch.items()} for i in range(parts)]


def gradients(model, batch, parts=1, scale=1.0, precision=None):
    model.train()
    items = (batch["labels"][:, 1:] != -100).sum()
    for part in micro_batches(batch, parts):
        with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
            loss = model(**part, num_items_in_batch=items).loss
        (scale * loss).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert sum("selector" in name for name in found) == 5
    assert all(g is not None and g.abs().sum() > 0 for g in found.values())
    return found


def checkpointed(model, reentrant, inputs_require_grad=False):
    if inputs_require_grad:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


KINDS = {
    "plain": lambda model: model,
    "non-reentrant": lambda model: checkpointed(model, False),
    "reentrant": lambda model: checkpointed(model, True),
    "reentrant, inputs with gradient": lambda model: checkpointed(model, True, True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("parts", "scale", "gate"), [(1, 1.0, "linear"), (3, 1024.0, "uniform")])
def test_the_selectors_gradient_is_that_of_plain_autograd(batch, kind, parts, scale, gate):
    options = {"selector": "keys", "selector_options": {"hidden": 6}, "gate": gate, "top_k": 9}
    plain = grown(**options).double()
    Closure(plain)
    expected = gradients(plain, batch, 1, scale)
    model = KINDS[kind](grown(**options).double())
    found = gradients(model, batch, parts, scale)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9 * scale, rtol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_checkpointing_is_exact_under_autocast(batch, kind):
    options = {"selector": "keys", "selector_options": {"hidden": 6}, "lora_dropout": 0.3}
    plain, model = grown(**options), KINDS[kind](grown(**options))
    Closure(plain)
    torch.manual_seed(8)
    expected = gradients(plain, batch, 1, 1.0, torch.bfloat16)
    torch.manual_seed(8)
    found = gradients(model, batch, 1, 1.0, torch.bfloat16)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[name]), name


def test_the_gradient_is_the_slope_of_the_loss(batch):
    model = grown(selector="keys", selector_options={"hidden": 6}).double()
    found = gradients(model, batch)
    selector = model.base_model.selector
    epsilon = 1e-3

    def loss():  # transformers' own is rounded to float32 (so are the norms inside the model)
        logits = model(**batch).logits[:, :-1]
        return float(F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100))

    with torch.no_grad():
        for name, place in (("dymoe_key", 3), ("dymoe_down", (2, 5)), ("dymoe_up", (7, 1)), ("dymoe_norm_bias", 0)):
            parameter = getattr(selector, name)["c"]
            losses = []
            for step in (epsilon, -2 * epsilon):
                parameter[place] += step
                losses.append(loss())
            parameter[place] += epsilon
            gradient = next(g for n, g in found.items() if f"{name}.c" in n)[place]
            assert float(gradient) == pytest.approx((losses[0] - losses[1]) / (2 * epsilon), rel=5e-3, abs=2e-6)


def test_autograd_grad_reaches_the_selector_too(batch):
    model = grown(selector="keys", selector_options={"hidden": 6}).double()
    expected = gradients(model, batch)
    model.zero_grad()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and "selector" in name}
    found = torch.autograd.grad(model(**batch).loss, list(parameters.values()))
    for name, gradient in zip(parameters, found, strict=True):
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_a_teachers_pass_in_between_disturbs_nothing(batch):
    """Two passes of a step, the second aside and without gradient, as distillation runs them."""
    model = grown(selector="keys", selector_options={"hidden": 6}).double()
    expected = gradients(model, batch)
    model.zero_grad()
    checkpointed(model, True)
    loss = model(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss
    with model.base_model.trace.aside(), torch.no_grad():
        model(**{k: v.flip(0) for k, v in batch.items()})
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], atol=1e-9, rtol=1e-6, msg=name)


def test_nothing_is_tied_where_nobody_learns(batch):
    model = grown(selector="keys").train()
    trace = model.base_model.trace
    model(**batch)
    assert trace.context.selection_gradient is not None
    assert not trace.context.selection[1].requires_grad
    with torch.no_grad():
        model(**batch)
    assert trace.context.selection_gradient is None
    model.base_model.set_training_group(None)
    model(**batch)
    assert trace.context.selection is not None
    assert trace.context.selection_gradient is None
