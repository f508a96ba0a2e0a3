"""Gates against an oracle of loops over tokens and experts; layers with unequal experts; linear routers deleted."""

import copy
import itertools
import math

import pytest
import torch
from peft import get_peft_model

from dymoe import group_hash
from dymoe.adapter.gates import GATES, Gate, Setting
from dymoe.errors import DymoeError
from dymoe.learning.groups import delete_group, load_group, save_group, stored_parameters, train_group
from dymoe.routing import Decision, Routing

from .conftest import randomise, small, tiny_llama

WIDTH = 5
TEMPERATURE = 0.7


# ---- oracle ---------------------------------------------------------------------------------------------------------


def softmax_over(scores, top_k):
    """Weights of a list of scores, -inf for what must get none; without ties."""
    chosen = sorted((e for e in range(len(scores)) if scores[e] > -math.inf), key=lambda e: -scores[e])[:top_k]
    if not chosen:
        return [0.0] * len(scores)
    powers = {e: math.exp(scores[e] / TEMPERATURE) for e in chosen}
    return [powers.get(e, 0.0) / sum(powers.values()) for e in range(len(scores))]


def dot(a, b):
    return sum(p * q for p, q in zip(a, b, strict=True))


def cosine(a, b):
    length = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / length if length > 0 else 0.0


def oracle(gate, x, rows, sizes, top_k, selected):
    """Weights of one token: `rows` are lists per group, `selected` one number per group or None."""
    group_of = [g for g, size in enumerate(sizes) for _ in range(size)]
    if gate == "uniform":
        return [1.0 if selected is None else selected[g] for g in group_of]
    if gate == "cosine":
        scores = [cosine(x, row) for group in rows for row in group]
        if selected is not None:
            scores = [s if selected[g] != 0 else -math.inf for s, g in zip(scores, group_of, strict=True)]
        return softmax_over(scores, top_k)
    if selected is None:
        return softmax_over([dot(x, row) for row in rows[-1]], top_k)
    total = [0.0] * len(group_of)
    for router, share in zip(rows, selected, strict=True):
        for e, weight in enumerate(softmax_over([dot(x, row) for row in router], top_k)):
            total[e] += share * weight
    return total


def case(gate, sizes, tokens, dtype, seed=0):
    """Inputs (*tokens, WIDTH) and what the gate gets of the bank."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*tokens, WIDTH, generator=generator).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    counts = [sum(sizes[: g + 1]) if gate == "linear" else size for g, size in enumerate(sizes)]
    rows = [torch.randn(count, WIDTH, generator=generator).to(wide) for count in counts]
    return x, [] if gate == "uniform" else rows


def decided(gate, x, rows, sizes, top_k, temperature=TEMPERATURE, selection=None, new=0):
    """The gate's decision over a bank whose last `new` groups, one at most, train."""
    kind, flat = GATES[gate], x.flatten(0, -2)
    frozen = rows[: len(rows) - new]
    setting = Setting(
        sizes, sizes[-1] if new else 0, Routing(top_k=top_k, temperature=temperature), x.shape[:-1], selection
    )
    return kind.decide(flat, kind.pack(frozen) if frozen else None, rows[-1] if new and rows else None, setting)


def weights_of(decision, tokens):
    """Weights of all experts, (*tokens, experts)."""
    joined = torch.cat([decision.columns(0), decision.columns(1)], -1)
    return joined.expand(math.prod(tokens), -1).reshape(*tokens, -1)


SELECTIONS = {
    "none": None,
    "one": [1.0, 0.0, 0.0],
    "last": [0.0, 0.0, 1.0],
    "mixed": [0.25, 0.0, 0.75],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3, 16])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("gate", ["cosine", "uniform", "linear"])
def test_weights_are_the_oracles(gate, selection, top_k, dtype):
    for sizes, tokens in itertools.product([(2, 1, 3), (1, 2, 0), (0, 2, 1)], [(2, 4), (2, 3, 2)]):
        x, rows = case(gate, sizes, tokens, dtype)
        chosen = SELECTIONS[selection]
        pair = None if chosen is None else [chosen, chosen[::-1]]  # the second sample selects the other way round
        selected = None if pair is None else torch.tensor(pair)
        lists = [block.tolist() for block in rows]
        for new in (0, 1):
            found = weights_of(decided(gate, x, rows, sizes, top_k, TEMPERATURE, selected, new), tokens)
            wide = dtype == torch.float64 and gate != "uniform"
            assert found.dtype == (torch.float64 if wide else torch.float32)
            for place in itertools.product(*map(range, tokens)):
                share = None if pair is None else pair[place[0]]
                expected = oracle(gate, x[place].tolist(), lists, sizes, top_k, share)
                torch.testing.assert_close(found[place].tolist(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", ["cosine", "linear"])
def test_scores_without_a_selection(gate):
    x, rows = case(gate, (2, 3), (2, 4), torch.float64)
    found = torch.cat(decided(gate, x, rows, (2, 3), 2, new=1).scores, -1).unflatten(0, (2, 4))
    score, used = (cosine, torch.cat(rows)) if gate == "cosine" else (dot, rows[-1])
    expected = [[[score(token, row) for row in used.tolist()] for token in sample] for sample in x.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_the_uniform_gate_has_no_scores():
    assert decided("uniform", torch.randn(2, 3, WIDTH), [], (2, 1), 1).scores is None


@pytest.mark.parametrize("sizes", [(2, 1, 2), (0, 1, 2)])
@pytest.mark.parametrize("selection", ["none", "one", "mixed"])
@pytest.mark.parametrize("gate", ["cosine", "linear"])
def test_gradients(gate, selection, sizes):
    x, rows = case(gate, sizes, (2, 3), torch.float64)
    chosen = SELECTIONS[selection]
    selected = None if chosen is None else torch.tensor([chosen, chosen[::-1]]).double()
    inputs = [t.clone().requires_grad_(t.numel() > 0) for t in (x, *rows)]

    def weights(x, *rows):
        return weights_of(decided(gate, x, rows, sizes, 16, TEMPERATURE, selected, 1), (2, 3))

    assert torch.autograd.gradcheck(weights, inputs)


def test_a_single_group_of_the_linear_gate_is_a_plain_softmax():
    x, rows = case("linear", (4,), (3, 2), torch.float32)
    found = weights_of(decided("linear", x, rows, (4,), 4, 1.0), (3, 2))
    torch.testing.assert_close(found, torch.softmax(x @ rows[0].T, -1))


def test_the_linear_router_keeps_float32_under_autocast():
    x, rows = case("linear", (4,), (3, 2), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weights_of(decided("linear", x, rows, (4,), 4, 1.0), (3, 2))
    torch.testing.assert_close(found, torch.softmax(x.float() @ rows[0].T, -1), atol=1e-6, rtol=1e-6)


def test_a_linear_router_refuses_groups_it_was_not_trained_with():
    x, rows = case("linear", (2, 1, 3), (2, 3), torch.float32)
    with pytest.raises(ValueError, match=r"router for 6 experts meets 5: activate the groups"):
        decided("linear", x, [rows[0], rows[2]], (2, 3), 4)


@pytest.mark.parametrize("gate", ["cosine", "uniform", "linear"])
@pytest.mark.parametrize("tokens", [(3, 4), (6,)])
def test_a_selection_that_does_not_fit_the_samples_is_refused(gate, tokens):
    x, rows = case(gate, (2, 1), tokens, torch.float32)
    selected = torch.ones(2, 2) / 2
    with pytest.raises((ValueError, RuntimeError)):
        decided(gate, x, rows, (2, 1), 2, 1.0, selected)


# ---- layers with unequal experts ------------------------------------------------------------------------------------

# Experts per layer: none in any o_proj, one in the first layer's down_proj, three where a regular expression says so.
PATTERN = {"o_proj": 0, "layers.0.mlp.down_proj": 1, r".*layers\.1\..*\.q_proj": 3}


def pattern_count(name):
    if name.endswith(".o_proj"):
        return 0
    if name.endswith("layers.0.mlp.down_proj"):
        return 1
    return 3 if name.endswith("layers.1.self_attn.q_proj") else 4


@pytest.mark.parametrize(
    "key, name, fits",
    [
        ("o_proj", "model.layers.0.self_attn.o_proj", True),
        ("o_proj", "model.layers.0.self_attn.no_proj", False),
        ("layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("layers.0.mlp.up_proj", "model.layers.10.mlp.up_proj", False),
        (r".*\.layers\.[01]\..*", "model.layers.1.mlp.up_proj", True),
        (r"layers\.[01]", "model.layers.1.mlp.up_proj", False),
        ("model.up_proj", "model.up_proj", True),
    ],
)
def test_which_layers_a_key_means(key, name, fits):
    assert small(expert_pattern={key: 0}).experts_in(name) == (0 if fits else 4)


def test_the_first_key_that_fits_counts_and_the_scale_stays():
    config = small(expert_pattern={"a.up": 1, "up": 2})
    assert [config.experts_in(name) for name in ("x.a.up", "x.b.up", "x.down")] == [1, 2, 4]
    assert config.scaling == small().scaling


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_a_pattern_holds_whole_numbers(value):
    with pytest.raises(ValueError, match="expert_pattern: 'up': expected a whole number from 0"):
        small(expert_pattern={"up": value})


def patterned(gate, groups=2, unequal=1):
    """A model of two groups (or more), one of them with unequal experts."""
    torch.manual_seed(0)
    model = None
    base = tiny_llama()
    for number in range(groups):
        pattern = PATTERN if number == unequal else {}
        config = small(gate=gate, guidance="none", temperature=TEMPERATURE, expert_pattern=pattern)
        model = train_group(base, model, f"g{number}", config)
    randomise(model)
    return model


def layer_by_loops(layer, x, groups, gate=None):
    """The layer's output for tokens (tokens, features) in evaluation, expert by expert."""
    result = layer.base_layer(x)
    sizes = [layer.experts_of(g) for g in groups]
    gate = gate or layer.group_configs[groups[0]].gate
    held = layer.dymoe_router
    rows = [held[g].tolist() if g in held else [] for g in groups]
    config = layer.group_configs[groups[-1]]
    experts = [
        (layer.group_configs[g].scaling, layer.dymoe_A[g][e], layer.dymoe_B[g][e])
        for g, size in zip(groups, sizes, strict=True)
        for e in range(size)
    ]
    # The oracle's softmax has a temperature of its own: the layers of these tests have the same.
    assert config.temperature == TEMPERATURE
    for t in range(len(x)):
        weights = oracle(gate, x[t].tolist(), rows, sizes, config.top_k, None)
        for weight, (scaling, a, b) in zip(weights, experts, strict=True):
            result[t] = result[t] + weight * scaling * ((x[t] @ a.T) @ b)
    return result


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("unequal", [0, 1])
@pytest.mark.parametrize("gate", ["cosine", "uniform", "linear"])
def test_layers_with_unequal_experts_are_their_formula(gate, unequal, training, batch):
    model = patterned(gate, unequal=unequal)
    model.train(training)
    for layer in model.base_model.layers():
        assert layer.experts_of(f"g{unequal}") == pattern_count(layer.name)
        assert layer.experts_of(f"g{1 - unequal}") == 4
        if gate == "linear":
            assert layer.dymoe_router["g1"].shape[0] == 4 + pattern_count(layer.name)
        x = torch.randn(3, layer.in_features)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer_by_loops(layer, x, ["g0", "g1"]), atol=1e-5, rtol=1e-4)
    model.train()
    model(**batch).loss.backward()
    for layer in model.base_model.layers():
        trains = "g1" in layer.dymoe_A
        assert trains == (unequal == 0 or not layer.name.endswith("o_proj"))
        if trains:
            assert layer.dymoe_A["g1"].grad.abs().sum() > 0


@pytest.mark.parametrize("gate", ["cosine", "uniform", "linear"])
def test_a_layer_without_any_expert_is_its_base(gate, batch):
    config = small(gate=gate, guidance="none", expert_pattern={"o_proj": 0})
    model = get_peft_model(tiny_llama(), config, adapter_name="g0")
    layer = next(layer for layer in model.base_model.layers() if layer.name.endswith("o_proj"))
    x = torch.randn(2, 3, layer.in_features)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not list(layer.dymoe_A) + list(layer.dymoe_B) + list(layer.dymoe_router)
    model.train()
    assert model.base_model.trace.context.num_layers == sum(bool(len(m.dymoe_A)) for m in model.base_model.layers())
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("unequal", [0, 1])
@pytest.mark.parametrize("gate", ["cosine", "uniform", "linear"])
def test_unequal_experts_are_saved_loaded_and_hashed(gate, unequal, tmp_path, batch):
    model = patterned(gate, groups=3, unequal=unequal)
    names = ["g0", "g1", "g2"]
    for name in names:
        save_group(model, name, tmp_path / name)
    base, loaded = tiny_llama(), None
    for name in names:
        loaded = load_group(base, loaded, name, tmp_path / name)
    assert [group_hash(loaded, n) for n in names] == [group_hash(model, n) for n in names]
    assert loaded.peft_config[f"g{unequal}"].expert_pattern == PATTERN
    assert stored_parameters(loaded) == stored_parameters(model)
    for either in (model, loaded):
        either.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
    changed = copy.deepcopy(loaded)
    with torch.no_grad():
        next(layer for layer in changed.base_model.layers() if "g1" in layer.dymoe_B).dymoe_B["g1"][0, 0, 0] += 1
    assert group_hash(changed, "g1") != group_hash(model, "g1")
    assert group_hash(changed, "g0") == group_hash(model, "g0")


@pytest.mark.parametrize("gate", ["cosine", "uniform", "linear"])
def test_deleting_a_group_of_unequal_experts(gate, batch):
    model, alone = patterned(gate).eval(), patterned(gate, groups=1).eval()
    alone.load_state_dict(model.state_dict(), strict=False)
    assert delete_group(model, "g1") is model
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, alone(**batch).logits, atol=1e-4, rtol=1e-4)
    for layer in model.base_model.layers():
        assert list(layer.group_configs) == ["g0"]
        assert all("g1" not in held for held in (layer.dymoe_A, layer.dymoe_B, layer.dymoe_router))
    with pytest.raises(ValueError, match="no expert group 'g1'"):
        group_hash(model, "g1")


# ---- deleting under the linear gate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["g0", "g1", "g2"])
def test_later_linear_routers_lose_the_columns_of_a_deleted_group(gone, batch):
    model = patterned("linear", groups=3)
    names = ["g0", "g1", "g2"]
    before = {
        layer.name: {g: layer.dymoe_router[g].detach().clone() for g in names} for layer in model.base_model.layers()
    }
    sizes = {layer.name: {g: layer.experts_of(g) for g in names} for layer in model.base_model.layers()}
    model.delete_adapter(gone)
    left = [name for name in names if name != gone]
    for layer in model.base_model.layers():
        owners = [g for g in names for _ in range(sizes[layer.name][g])]
        for g in left:
            rows = before[layer.name][g]
            expected = [row for row, owner in zip(rows, owners, strict=False) if owner != gone]
            assert (g in layer.dymoe_router) == bool(expected)
            if not expected:
                continue
            assert torch.equal(layer.dymoe_router[g], torch.stack(expected))
            assert layer.dymoe_router[g].requires_grad == (g == "g2")
    model.eval()
    with torch.no_grad():
        for layer in model.base_model.layers():
            x = torch.randn(3, layer.in_features)
            torch.testing.assert_close(layer(x), layer_by_loops(layer, x, left), atol=1e-5, rtol=1e-4)
    model.train()
    assert torch.isfinite(model(**batch).loss)


def test_a_trained_on_linear_group_after_a_deleted_probe_is_as_if_there_had_been_none(tmp_path, batch):
    """What growth by probing does: a group trains on its own, is deleted, and another takes its place."""
    model, plain = patterned("linear", groups=1), patterned("linear", groups=1)
    config = small(gate="linear", guidance="none", temperature=TEMPERATURE)
    model = train_group(model.base_model.model, model, "probe", config)
    randomise(model, ["probe"])
    model = delete_group(model, "probe")
    for either in (model, plain):
        torch.manual_seed(5)
        train_group(either.base_model.model, either, "g1", config)
        randomise(either)
        either.eval()
    assert group_hash(model, "g1") == group_hash(plain, "g1")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    save_group(model, "g1", tmp_path / "g1")
    with pytest.raises(DymoeError, match=r"'alone' holds .*dymoe_router of shape"):
        load_group(tiny_llama(), None, "alone", tmp_path / "g1")


# ---- one decision for a sample --------------------------------------------------------------------------------------


def pooled(groups=2, **choices):
    torch.manual_seed(0)
    model = None
    base = tiny_llama()
    for number in range(groups):
        model = train_group(base, model, f"g{number}", small(gate="pooled", temperature=TEMPERATURE, **choices))
    randomise(model)
    return model


def routing_of(model, **inputs):
    seen = []
    model.base_model.trace.observers.append(seen.append)
    try:
        model(**inputs)
    finally:
        model.base_model.trace.observers.remove(seen.append)
    return seen


def test_all_tokens_of_a_sample_follow_the_mean_of_its_prompt(batch):
    model, seen = pooled(), {}
    layers = model.base_model.layers()
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: seen.update({m.name: args[0].double()})) for layer in layers
    ]
    inputs = {**batch, "labels": batch["input_ids"].clone()}
    inputs["labels"][:, :-2] = -100
    model.eval()
    with torch.no_grad():
        for routing in routing_of(model, **inputs):
            layer = next(layer for layer in layers if layer.name == routing.layer)
            rows = [layer.dymoe_router[g].tolist() for g in ("g0", "g1")]
            for sample, tokens in enumerate(seen[routing.layer]):
                prompt = (inputs["labels"][sample] == -100) & batch["attention_mask"][sample].bool()
                mean = tokens[prompt].mean(0).tolist()
                top_k = layer.group_configs["g1"].top_k
                expected = torch.tensor(oracle("cosine", mean, rows, routing.sizes, top_k, None))
                for weights in routing.weights[sample]:
                    torch.testing.assert_close(weights, expected, atol=1e-4, rtol=1e-4)
    for hook in hooks:
        hook.remove()


def test_the_prompts_decision_holds_while_an_answer_is_decoded(batch):
    model = pooled().eval()
    prompt = {key: batch[key][:2] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        at_prompt = {routing.layer: routing.weights[:, 0] for routing in routing_of(model, **prompt)}
        seen = []
        model.base_model.trace.observers.append(seen.append)
        model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    steps = [routing for routing in seen if routing.weights.shape[1] == 1]
    assert len(steps) == 3 * len(at_prompt)
    for routing in steps:
        torch.testing.assert_close(routing.weights[:, 0], at_prompt[routing.layer])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pooled_gate_learns_under_guidance(checkpointing, batch):
    model = pooled(guidance="exclusive")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    model.train()
    loss = model(**batch).loss
    loss.backward()
    layer = model.base_model.layers()[-1]
    assert layer.dymoe_router["g1"].grad.abs().sum() > 0
    types = model.base_model.trace.summary()
    assert types["share_new"] + types["share_ambiguous"] + types["share_old"] == pytest.approx(1)


def test_a_mean_needs_samples():
    x = torch.randn(3, WIDTH)
    setting = Setting((2,), 0, Routing(), (3,))
    with pytest.raises(ValueError, match=r"a mean over a sample's tokens needs samples before tokens, got \(3,\)"):
        GATES["pooled"].decide(x, torch.randn(2, WIDTH), None, setting)


# ---- gates by layer, gates from outside -----------------------------------------------------------------------------


def by_layer(groups=2):
    """A model whose first decoder layer is uniform, its other v_proj linear, the rest cosine."""
    torch.manual_seed(0)
    base, model = tiny_llama(), None
    pattern = {r".*\.0\..*": "uniform", "v_proj": "linear"}
    for number in range(groups):
        config = small(gate="cosine", gate_pattern=pattern, guidance="none", temperature=TEMPERATURE)
        model = train_group(base, model, f"g{number}", config)
    randomise(model)
    return model


def gate_by_name(layer):
    return "uniform" if ".0." in layer.name else "linear" if layer.name.endswith("v_proj") else "cosine"


def test_each_layer_has_the_gate_of_its_pattern(tmp_path, batch):
    model = by_layer()
    kinds = {gate_by_name(layer) for layer in model.base_model.layers()}
    assert kinds == {"cosine", "uniform", "linear"}
    model.eval()
    for layer in model.base_model.layers():
        x = torch.randn(3, layer.in_features)
        expected = layer_by_loops(layer, x, ["g0", "g1"], gate_by_name(layer))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        before = model(**batch).logits
    for group in ("g0", "g1"):
        save_group(model, group, tmp_path / group)
    torch.manual_seed(0)
    base, again = tiny_llama(), None
    for group in ("g0", "g1"):
        again = load_group(base if again is None else again.base_model.model, again, group, tmp_path / group)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, before)


def test_groups_of_one_bank_share_their_gates_by_layer():
    model = train_group(tiny_llama(), None, "a", small(gate_pattern={"v_proj": "uniform"}))
    with pytest.raises(ValueError, match=r"group 'b' has gate_pattern \{\} but group 'a' has \{'v_proj': 'uniform'\}"):
        train_group(model.base_model.model, model, "b", small())


@pytest.mark.parametrize("settings", [{"gate": "mean"}, {"gate_pattern": {"v_proj": "mean"}}])
def test_a_gate_that_nobody_knows_is_refused(settings):
    with pytest.raises(ValueError, match=r"must be one of cosine, .*uniform.*, got 'mean'; a gate from outside"):
        small(**settings)


def test_a_gate_from_outside_is_known_by_its_class():
    """Weights halve with every position of a group; nothing of the package names it."""

    class Halving(Gate):
        name = "halving"

        def rows(self, experts, older):
            return 0

        def decide(self, x, old, new, setting):
            weights = torch.cat([torch.full((size,), 0.5**g) for g, size in enumerate(setting.sizes)])
            sides = (setting.num_old, setting.num_new)
            by_old, by_new = weights.expand(len(x), -1).split(list(sides), -1)
            return Decision(None, (by_old, by_new), (None, None), sides)

    model = train_group(tiny_llama(), None, "a", small(gate="halving"))
    model = train_group(model.base_model.model, model, "b", small(gate="halving"))
    randomise(model)
    model.eval()
    layer = model.base_model.layers()[0]
    x = torch.randn(3, layer.in_features)
    parts = [
        layer.group_configs[g].scaling * torch.einsum("ti,eri,ero->to", x, layer.dymoe_A[g], layer.dymoe_B[g])
        for g in ("a", "b")
    ]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x) + parts[0] + parts[1] / 2, atol=1e-5, rtol=1e-4)
    del GATES["halving"]


def test_a_gates_name_has_one_class():
    with pytest.raises(TypeError, match=r"gate 'cosine' is dymoe.adapter.gates.Cosine; take another name"):

        class Cosine(Gate):
            name = "cosine"

    assert type(GATES["cosine"]).__module__ == "dymoe.adapter.gates"
