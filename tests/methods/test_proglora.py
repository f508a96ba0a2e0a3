"""ProgLoRA's attention over keys against its formula, its groups on disk, its recall."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model

from dymoe import group_hash, methods
from dymoe.adapter.selectors import SELECTORS
from dymoe.learning.data import Data
from dymoe.learning.recipe import Training
from dymoe.methods import Stage
from tests.adapter.conftest import padded_batch, randomise, tiny_llama

TASKS = [SimpleNamespace(name=name, train=[f"{name}{i}" for i in range(20)]) for name in "abc"]


def stage(index=1, seed=0):
    return Stage(index, TASKS[index - 1].name, (TASKS[index - 1],), Path("m"), (), tuple(TASKS[: index - 1]), seed)


def config(**settings):
    return methods.create("proglora", **{"rank": 4, "hidden": 6, "lora_dropout": 0.0, **settings}).config(stage())


def move(model, seed=0):
    """Give the newest group's part of the selector other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.base_model.selector.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator))


def grown(count=3, base=None):
    model = get_peft_model(base or tiny_llama(), config(), adapter_name="a")
    move(model, 0)
    for i, group in enumerate("bcdef"[: count - 1], start=1):
        model.add_adapter(group, config())
        move(model, i)
    randomise(model)
    return model


def slow_attention(selector, embeddings, mask, groups, last):
    """The formula for one sample after the other, number by number, in Python floats."""
    rows = []
    d = embeddings.shape[-1]
    down, up = selector.dymoe_down[last].tolist(), selector.dymoe_up[last].tolist()
    weight, bias = selector.dymoe_norm_weight[last].tolist(), selector.dymoe_norm_bias[last].tolist()
    for sample, kept in zip(embeddings.tolist(), mask.tolist(), strict=True):
        tokens = [token for token, keep in zip(sample, kept, strict=True) if keep]
        pooled = [max(token[j] for token in tokens) for j in range(d)]
        hidden = [sum(w * p for w, p in zip(row, pooled, strict=True)) for row in down]
        wide = [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in up]
        silu = [x / (1 + math.exp(-x)) for x in wide]
        mean = sum(silu) / d
        variance = sum((x - mean) ** 2 for x in silu) / d
        query = [(x - mean) / math.sqrt(variance + 1e-5) * w + b for x, w, b in zip(silu, weight, bias, strict=True)]
        scores = [sum(k * q for k, q in zip(selector.dymoe_key[g].tolist(), query, strict=True)) for g in groups]
        powers = [math.exp(s / math.sqrt(d)) for s in scores]
        rows.append([p / sum(powers) for p in powers])
    return torch.tensor(rows)


def question(batch):
    return batch["attention_mask"].bool() & (batch["labels"] == -100)


@pytest.fixture
def batch():
    return padded_batch()


# ---- the attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["a", "ab", "abc", "ca"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_is_its_formula(batch, groups, training, dtype):
    model = grown().train(training).to(dtype)
    model.base_model.set_adapter(list(groups))
    model(**batch)
    names, weights = model.base_model.trace.context.selection
    assert names == tuple(groups)
    assert weights.dtype == dtype
    embeddings = model.base_model.model.model.embed_tokens(batch["input_ids"])
    expected = slow_attention(model.base_model.selector, embeddings, question(batch), groups, groups[-1])
    torch.testing.assert_close(weights.float(), expected, atol=2e-6, rtol=1e-4)
    assert len(groups) == 1 or weights.std(0).max() > 1e-3, "the samples must differ for this to say anything"


@pytest.mark.parametrize("change", ["answer", "padding"])
def test_answers_and_padding_are_not_seen(batch, change):
    model = grown().train()
    model(**batch)
    before = model.base_model.trace.context.selection[1]
    unseen = ~question(batch) & (batch["attention_mask"].bool() if change == "answer" else batch["attention_mask"] == 0)
    model(**{**batch, "input_ids": batch["input_ids"].masked_fill(unseen, 7)})
    assert torch.equal(model.base_model.trace.context.selection[1], before)
    model(**{**batch, "input_ids": batch["input_ids"].masked_fill(question(batch), 7)})
    assert not torch.equal(model.base_model.trace.context.selection[1], before)


def test_a_hooks_loss_hides_the_answers_too(batch):
    model = grown().eval()
    data = Data([], None, None, Training(steps_per_task=1, dtype="float32"), torch.device("cpu"), 1)
    loss = data.loss(model, batch)
    hidden = model.base_model.trace.context.selection[1]
    expected = model(**batch)
    assert torch.equal(hidden, model.base_model.trace.context.selection[1])
    torch.testing.assert_close(loss, expected.loss)
    model(**{key: value for key, value in batch.items() if key != "labels"})
    assert not torch.equal(hidden, model.base_model.trace.context.selection[1])


def test_a_sample_does_not_depend_on_its_neighbours(batch):
    model = grown().eval()
    model(**batch)
    together = model.base_model.trace.context.selection[1]
    for i in range(3):
        model(**{k: v[i : i + 1] for k, v in batch.items()})
        torch.testing.assert_close(model.base_model.trace.context.selection[1][0], together[i])


def test_autocast_and_a_half_precision_base_leave_the_attention_in_float32(batch):
    model = grown().eval()
    model(**batch)
    expected = model.base_model.trace.context.selection[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch)
    assert torch.equal(model.base_model.trace.context.selection[1], expected)
    half = grown(base=tiny_llama().to(torch.bfloat16)).eval()
    assert {p.dtype for p in half.base_model.selector.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half(**batch)
    rounded = half.base_model.trace.context.selection[1]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, atol=0.05, rtol=0.1)


def test_a_prompt_without_tokens_gives_numbers(batch):
    model = grown().train()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**{**batch, "labels": labels}).loss.backward()
    assert torch.isfinite(model.base_model.trace.context.selection[1]).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_all_layers_use_the_attention(batch):
    """y = W0 x + sum_i a_i (alpha / r) B_i A_i x in every layer, the rows of a in the order of the samples."""
    model = grown().eval()
    seen = []
    model.base_model.trace.observers.append(seen.append)
    with torch.no_grad():
        model(**batch)
    weights = model.base_model.trace.context.selection[1]
    assert len(seen) == 14
    for routing in seen:
        assert routing.groups == ("a", "b", "c")
        assert torch.equal(routing.weights, weights.unsqueeze(1).expand(3, 9, 3))
    layer = model.base_model.layers()[3]
    x = torch.randn(3, 9, 32)
    expected = layer.base_layer(x)
    for i, group in enumerate("abc"):
        update = x @ layer.dymoe_A[group][0].t() @ layer.dymoe_B[group][0]
        expected = expected + weights[:, i].view(3, 1, 1) * (16 / 4) * update
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


# ---- growth -----------------------------------------------------------------------------------------------------


def test_the_transform_goes_on_and_the_key_starts_anew():
    model = grown(2)
    model.add_adapter("c", config())
    selector = model.base_model.selector
    for attribute in ("dymoe_down", "dymoe_up", "dymoe_norm_weight", "dymoe_norm_bias"):
        held = getattr(selector, attribute)
        assert torch.equal(held["c"], held["b"])
        assert held["c"] is not held["b"]
        assert not torch.equal(held["b"], held["a"]), "a's was left as it was when b trained"
    assert not torch.equal(selector.dymoe_key["c"], selector.dymoe_key["b"])
    d = 32
    expected = d + 6 * d + d * 6 + d + d
    assert sum(p.numel() for p in selector.parameters() if p.requires_grad) == expected
    loras = sum(4 * (layer.in_features + layer.out_features) for layer in model.base_model.layers())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected + loras


def test_initial_values():
    torch.manual_seed(0)
    selector = SELECTORS["keys"](300)
    selector.add_group("a", {})
    assert selector.dymoe_down["a"].shape == (100, 300)
    assert selector.dymoe_up["a"].shape == (300, 100)
    for values, fans in (("dymoe_key", 301), ("dymoe_down", 400), ("dymoe_up", 400)):
        bound = math.sqrt(6 / fans)
        assert 0.95 * bound < getattr(selector, values)["a"].abs().max() <= bound
    assert (selector.dymoe_norm_weight["a"] == 1).all()
    assert (selector.dymoe_norm_bias["a"] == 0).all()


def test_learning_leaves_older_groups_bit_identical(batch):
    model = grown().train()
    before = {g: group_hash(model, g) for g in "abc"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    moved = {n: p.detach().clone() for n, p in model.base_model.selector.named_parameters() if p.requires_grad}
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(moved) == 5
    for name, p in model.base_model.selector.named_parameters():
        assert name not in moved or not torch.equal(p, moved[name]), name
    assert [group_hash(model, g) == before[g] for g in "abc"] == [True, True, False]


def test_the_hash_covers_key_and_transform():
    for attribute in SELECTORS["keys"].adapter_layer_names:
        model = grown(2)
        before = group_hash(model, "b")
        with torch.no_grad():
            getattr(model.base_model.selector, attribute)["b"].view(-1)[0] += 1e-3
        assert group_hash(model, "b") != before, attribute


def test_save_load_and_go_on(tmp_path, batch):
    model = grown()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", adapter_name="a")
    for group in "bc":
        loaded.load_adapter(tmp_path / group, adapter_name=group)
    assert [group_hash(loaded, g) for g in "abc"] == [group_hash(model, g) for g in "abc"]
    assert not any(p.requires_grad for p in loaded.parameters())
    model.eval(), loaded.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    for either in (model, loaded):
        torch.manual_seed(5)
        either.add_adapter("z", config())
    assert group_hash(loaded, "z") == group_hash(model, "z")
    trained = {name.rsplit(".", 1)[1] for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {"z"}


@pytest.mark.parametrize("groups", ["a", "ab"])
def test_a_stage_is_its_first_groups(tmp_path, batch, groups):
    model = grown().eval()
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", adapter_name="a")
    for group in groups[1:]:
        alone.load_adapter(tmp_path / group, adapter_name=group)
    model.base_model.set_adapter(list(groups))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, alone.eval()(**batch).logits, atol=1e-5, rtol=1e-4)
    assert not any(p.requires_grad for p in model.base_model.selector.parameters())
    model.base_model.set_adapter(["a", "b", "c"])
    assert sum(p.requires_grad for p in model.base_model.selector.parameters()) == 5


@pytest.mark.parametrize("group", ["a", "b", "c"])
def test_deleting_a_group_leaves_the_others_as_if_it_were_inactive(batch, group):
    model, other = grown().eval(), grown().eval()
    model.delete_adapter(group)
    rest = [name for name in "abc" if name != group]
    other.base_model.set_adapter(rest)
    assert list(model.base_model.selector.dymoe_key) == rest
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, other(**batch).logits, atol=1e-5, rtol=1e-4)
    model.add_adapter("z", config())
    selector = model.base_model.selector
    assert torch.equal(selector.dymoe_up["z"], selector.dymoe_up[rest[-1]])


def test_disabling_is_the_base(batch):
    model, base = grown().eval(), tiny_llama().eval()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, base(**batch).logits)


# ---- the method -------------------------------------------------------------------------------------------------


def test_the_four_choices():
    method = methods.create("proglora")
    assert [method.group(stage(i)) for i in (1, 2, 3)] == ["a", "b", "c"]
    made = method.config(stage())
    assert (made.num_experts, made.r, made.scaling) == (1, 8, 2.0)
    assert (made.gate, made.selector, made.selector_options) == ("uniform", "keys", {"hidden": 100})
    assert made.load_balance == made.exclusivity == made.specialization == 0
    assert method.training_samples(stage(3)) == TASKS[2].train


@pytest.mark.parametrize(
    ("recall", "index", "counts"),
    [(0.5, 1, {}), (0.0, 3, {}), (0.25, 3, {"a": 3, "b": 2}), (1.0, 2, {"a": 20}), (1.0, 3, {"a": 10, "b": 10})],
)
def test_recall_draws_evenly_and_without_repetition(recall, index, counts):
    method = methods.create("proglora", recall=recall)
    samples = method.training_samples(stage(index))
    own = TASKS[index - 1].train
    assert samples[: len(own)] == own
    recalled = samples[len(own) :]
    assert len(set(recalled)) == len(recalled)
    assert Counter(sample[0] for sample in recalled) == counts


def test_recall_follows_the_stages_seed():
    method = methods.create("proglora", recall=0.5)
    assert method.training_samples(stage(3, 1)) == method.training_samples(stage(3, 1))
    assert method.training_samples(stage(3, 1)) != method.training_samples(stage(3, 2))


def test_the_transforms_width_is_one_for_all_groups():
    model = grown(1)
    with pytest.raises(ValueError, match=r"T is shared .* hidden must be 6, got 7"):
        model.add_adapter("b", config(hidden=7))
    with pytest.raises(ValueError, match="hidden must be a whole number of at least 1, got 0"):
        SELECTORS["keys"](8).add_group("a", {"hidden": 0})
