"""The vae selector: its bound against exact integrals, its choice against a loop, its place in a model."""

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.distributions import Normal, kl_divergence

from dymoe import DyMoEConfig
from dymoe.adapter import group_hash
from dymoe.adapter.observation import prompt_features
from dymoe.adapter.selectors import vae as module
from dymoe.adapter.selectors.vae import TENSORS, Vae, VaeSelector, fit_vae
from tests.adapter.conftest import randomise, tiny_llama


def random_vae(features: int, hidden: int, latent: int, scale: float = 1.0, dtype=torch.float64) -> Vae:
    generator = torch.Generator().manual_seed(features + 10 * hidden + 100 * latent)
    shapes = [(hidden, features), (hidden,), (2 * latent, hidden), (2 * latent,)]
    shapes += [(hidden, latent), (hidden,), (features, hidden), (features,)]
    return Vae(*(scale * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes))


@pytest.mark.parametrize("shape", [(1,), (3, 4), (2, 3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_and_likelihood_are_those_of_torch(shape, dtype):
    torch.manual_seed(0)
    mean, log_variance, x = (torch.randn(shape, dtype=dtype) for _ in range(3))
    q = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(q, Normal(torch.zeros_like(mean), 1)).sum(-1)
    assert torch.allclose(module.kl_divergence(mean, log_variance), expected, atol=1e-5)
    assert torch.allclose(module.log_likelihood(x, mean), Normal(mean, 1).log_prob(x).sum(-1), atol=1e-5)
    assert module.kl_divergence(torch.zeros(3), torch.zeros(3)) == 0


def integrals(vae: Vae, x: torch.Tensor) -> tuple[float, float, float]:
    """Log p(x), E_q log p(x|z) - KL and KL(q(z|x) || p(z|x)) of one input with a code of one number, on a grid."""
    mean, log_variance = (float(part) for part in vae.encode(x))
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    step = float(z[1] - z[0])
    joint = Normal(vae.decode(z.unsqueeze(-1)), 1).log_prob(x).sum(-1) + Normal(0.0, 1.0).log_prob(z)
    log_p = float(torch.logsumexp(joint, 0)) + math.log(step)
    log_q = Normal(mean, math.exp(0.5 * log_variance)).log_prob(z)
    q = log_q.exp()
    assert abs(float(q.sum()) * step - 1) < 1e-6
    bound = float((q * (joint - log_q)).sum()) * step
    return log_p, bound, float((q * (log_q - joint + log_p)).sum()) * step


@pytest.mark.parametrize("features", [1, 4])
def test_bound_is_below_the_log_likelihood_by_the_posteriors_divergence(features):
    vae = random_vae(features, hidden=5, latent=1, scale=0.4)
    generator = torch.Generator().manual_seed(3)
    for x in torch.randn(3, features, dtype=torch.float64, generator=generator):
        log_p, expected, gap = integrals(vae, x)
        draws = vae.bound(x.expand(40000, -1), torch.randn(40000, 1, dtype=torch.float64, generator=generator))
        error = float(draws.std()) / 200
        assert abs(float(draws.mean()) - expected) < 5 * error
        assert gap > 1e-3
        assert expected == pytest.approx(log_p - gap, abs=1e-6)
        mean, log_variance = vae.encode(x)
        halved = vae.bound(x, torch.zeros(1, dtype=torch.float64), kl_weight=0.5)
        assert torch.isclose(vae.score(x) - halved, 0.5 * module.kl_divergence(mean, log_variance))


def clusters(count: int, width: int = 12) -> list[torch.Tensor]:
    """Tasks that differ in where their features lie and in how they vary together."""
    generator = torch.Generator().manual_seed(count)
    found = []
    for task in range(3):
        directions = torch.randn(3, width, generator=torch.Generator().manual_seed(task))
        noise = torch.randn(count, width, generator=generator)
        found.append(task + torch.randn(count, 3, generator=generator) @ directions + 0.3 * noise)
    return found


def test_fitting_raises_the_bound_and_leaves_the_random_state_alone():
    x = clusters(64)[1]
    x = (x - x.mean(0)) / x.std(0)
    state = torch.random.get_rng_state()
    start, end, again = (fit_vae(x, 16, 3, epochs=n, lr=1e-2, seed=4) for n in (0, 120, 120))
    assert torch.equal(torch.random.get_rng_state(), state)
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    assert end.bound(x, noise).mean() > start.bound(x, noise).mean() + 2
    assert all(torch.equal(getattr(end, name), getattr(again, name)) for name in TENSORS)


@pytest.fixture(scope="module")
def fitted():
    selector = VaeSelector(12)
    for number, features in enumerate(clusters(96)):
        selector.add_group(f"g{number}", {"hidden": 16, "latent": 3})
        selector.fit(f"g{number}", features, epochs=60, seed=number)
    return selector


def test_statistics_are_those_of_the_training_features(fitted):
    for number, features in enumerate(clusters(96)):
        group = f"g{number}"
        assert torch.allclose(fitted.dymoe_center[group], features.mean(0))
        assert torch.allclose(fitted.dymoe_spread[group], features.std(0, correction=0))
        own = fitted.standard_scores(features, [group])
        assert abs(float(own.mean())) < 1e-4
        assert float(own.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_the_largest_standard_score_decides(fitted):
    groups = ["g2", "g0", "g1"]
    right = 0
    for number, features in enumerate(clusters(40)):
        picked = fitted.locate(features, groups)
        for row, choice in zip(features, picked, strict=True):
            best = None
            for place, group in enumerate(groups):
                x = (row - fitted.dymoe_center[group]) / fitted.dymoe_spread[group]
                value = (float(fitted.vae(group).score(x)) - float(fitted.dymoe_scores[group][0])) / float(
                    fitted.dymoe_scores[group][1]
                )
                if best is None or value > best[0]:
                    best = (value, place)
            assert int(choice) == best[1]
            right += groups[best[1]] == f"g{number}"
    assert right >= 0.9 * 120


def test_the_groups_own_statistics_can_turn_the_choice():
    selector = VaeSelector(2)
    for group, mean in (("easy", -2.0), ("hard", -9.0)):
        selector.add_group(group, {"hidden": 1, "latent": 1})
        for name in TENSORS:
            getattr(selector, f"dymoe_{name}")[group].data.zero_()
        selector.dymoe_scores[group].data = torch.tensor([mean, 1.0])
    selector.dymoe_decoder_out_bias["hard"].data.fill_(2.0)
    x = torch.zeros(1, 2)
    raw = [float(selector.vae(group).score(x)) for group in ("easy", "hard")]
    assert raw[0] > raw[1]
    expected = torch.tensor([[raw[0] + 2, raw[1] + 9]])
    assert torch.allclose(selector.standard_scores(x, ["easy", "hard"]), expected)
    assert selector.locate(x, ["easy", "hard"]).tolist() == [1]


def test_a_feature_that_never_varies_does_not_rule():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    features[:, 2] = 5.0
    selector = VaeSelector(6)
    selector.add_group("a", {"hidden": 4, "latent": 2})
    selector.fit("a", features, epochs=5)
    moved = features.clone()
    moved[:, 2] += 1e-3  # rounding of a lower precision
    scores = selector.standard_scores(torch.cat([features, moved]), ["a"])
    assert torch.isfinite(scores).all()
    assert (scores[:50] - scores[50:]).abs().max() < 1


@pytest.mark.parametrize("options", [{"hidden": 0}, {"latent": 1.5}, {"latent": True}, {"width": 3}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VaeSelector(4).add_group("a", options)


# ---- in a model ---------------------------------------------------------------------------------------------------


def config(**changes) -> DyMoEConfig:
    settings = {"num_experts": 3, "r": 2, "top_k": 2, "temperature": 1.0, "lora_dropout": 0.0, "gate": "linear"}
    settings |= {"guidance": "none", "load_balance": 0.0, "exclusivity": 0.0, "specialization": 0.0, "selector": "vae"}
    settings |= {
        "selector_options": {"hidden": 8, "latent": 2},
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    return DyMoEConfig(**{**settings, **changes})


def prompts(seed: int, low: int, high: int) -> dict[str, torch.Tensor]:
    """Four left-padded prompts with two answer tokens each, their words from [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, high, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(torch.arange(9) < 7, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learned(*groups: str, model=None):
    """A tiny model with fitted groups: group number i was fitted to words of its own."""
    for number, group in enumerate(groups):
        torch.manual_seed(number)
        if model is None:
            model = get_peft_model(tiny_llama(), config(), adapter_name=group)
        else:
            model.add_adapter(group, config())
        randomise(model, [group])
        selector = model.base_model.selector
        batches = [prompts(10 * number + k, 1 + 20 * number, 20 + 20 * number) for k in range(6)]
        selector.fit(group, prompt_features(model, batches), epochs=40)
    model.base_model.set_training_group(None)
    return model.eval()


@pytest.fixture(scope="module")
def two():
    return learned("a", "b")


def without_answer(batch):
    return {"input_ids": batch["input_ids"][:, :7], "attention_mask": batch["attention_mask"][:, :7]}


def test_features_are_the_frozen_models_last_prompt_token(two):
    plain = tiny_llama().eval()
    batch = prompts(50, 1, 60)
    found = prompt_features(two, [batch, without_answer(batch)])
    for row in range(4):
        kept = batch["attention_mask"][row, :7].bool()
        ids = batch["input_ids"][row, :7][kept].unsqueeze(0)
        hidden = plain.model(input_ids=ids).last_hidden_state[0, -1]
        assert torch.allclose(found[row], hidden, atol=1e-5)
        assert torch.allclose(found[4 + row], hidden, atol=1e-5)
    assert not two.training


def test_each_sample_gets_the_router_it_is_located_at(two):
    mixed = {key: torch.cat([prompts(70, 1, 20)[key], prompts(71, 21, 40)[key]]) for key in prompts(0, 1, 2)}
    batch = without_answer(mixed)
    selector, trace = two.base_model.selector, two.base_model.trace
    with torch.no_grad():
        logits = two(**batch).logits
    groups, weights = trace.context.selection
    assert groups == ("a", "b")
    assert torch.equal(weights, torch.eye(2)[selector.locate(prompt_features(two, [batch]), groups)])
    assert weights.argmax(1).tolist() == [0] * 4 + [1] * 4  # the two vocabularies are told apart
    trace.context.selection = None
    for number, active in enumerate((["a"], ["a", "b"])):
        two.base_model.set_adapter(active)
        two.base_model.selector.set_adapter([active[0]])  # a single group: nothing to choose
        with torch.no_grad():
            alone = two(**batch).logits
        rows = slice(4 * number, 4 * number + 4)
        assert torch.allclose(logits[rows], alone[rows], atol=1e-6)
        assert not torch.allclose(logits[4 - 4 * number : 8 - 4 * number], alone[4 - 4 * number : 8 - 4 * number])
    two.base_model.set_adapter(["a", "b"])


def test_the_choice_of_the_prompt_holds_while_decoding(two):
    batch = without_answer(prompts(71, 21, 40))
    with torch.inference_mode():
        two.generate(**batch, max_new_tokens=4, do_sample=False)
    assert two.base_model.trace.context.selection[1].argmax(1).tolist() == [1] * 4


def test_nothing_is_selected_while_a_group_trains_and_its_vae_is_no_parameter_to_train():
    model = learned("a")
    model.add_adapter("b", config())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any("selector" in name for name in trained)
    for mode in (True, False):
        model.train(mode)
        model(**prompts(1, 1, 20))
        assert model.base_model.trace.context.selection is None
    model.base_model.set_training_group(None)
    with pytest.raises(ValueError, match="group 'b': its task locator was not fitted"):
        model.eval()(**prompts(1, 1, 20))


def test_saved_and_loaded_bit_for_bit(two, tmp_path):
    two.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", adapter_name="a", is_trainable=False)
    loaded.load_adapter(tmp_path / "b", adapter_name="b", is_trainable=False)
    assert [group_hash(loaded, group) for group in "ab"] == [group_hash(two, group) for group in "ab"]
    batch = without_answer(prompts(71, 21, 40))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, two(**batch).logits)
    before = group_hash(loaded, "b")
    with torch.no_grad():
        loaded.base_model.selector.dymoe_scores["b"] += 1
    assert group_hash(loaded, "b") != before


def test_a_deleted_group_leaves_the_selector_too():
    model = learned("a", "b")
    model.delete_adapter("a")
    selector = model.base_model.selector
    assert selector.active_adapters == ["b"]
    assert all(list(getattr(selector, name)) == ["b"] for name in selector.adapter_layer_names)
    model(**without_answer(prompts(1, 1, 20)))
