"""The fused gate and bank against the formulas of `dymoe.routing` and the bank's reference, by plain autograd."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dymoe import routing
from dymoe.adapter.ops import Bank, ExpertBlock, Rule, fused, numba, reference, sparse

D, OUT = 7, 5
TOP_K, T, T_RSR, TAU = 3, 0.2, 0.5, 0.2
BANKS = {  # experts of the old blocks (experts, rank), experts of the new group
    "first task": ([], 4),
    "first task, few": ([], 2),
    "second task": ([(4, 2)], 4),
    "few old": ([(2, 2)], 5),
    "many old": ([(40, 2)], 4),
    "several ranks": ([(3, 2), (4, 3)], 2),
    "evaluation": ([(6, 2)], 0),
    "evaluation, many old": ([(40, 2)], 0),
}
PATHS = {  # which of the products that leave something out are taken
    "by rule": {},
    "dense": {"SUMMED_FROM": 10**9},
    "summed": {"SUMMED_FROM": 0, "SAMPLED_BELOW": -1.0},
    "sampled": {"SUMMED_FROM": 0, "SAMPLED_BELOW": 2.0},
    "sampled in chunks": {"SUMMED_FROM": 0, "SAMPLED_BELOW": 2.0, "CHUNK": 3},
}


def drawn(bank, tokens, seed=0, dtype=torch.float64):
    """Inputs, the frozen blocks with their unit rows and the new group's parameters (r = 2)."""
    torch.manual_seed(seed)
    blocks, new = BANKS[bank]
    frozen = [
        ExpertBlock(torch.randn(e * r, D, dtype=dtype), torch.randn(e * r, OUT, dtype=dtype), r) for e, r in blocks
    ]
    old = sum(e for e, _ in blocks)
    rows = F.normalize(torch.randn(old, D, dtype=dtype), dim=1) if old else None
    x = torch.randn(*tokens, D, dtype=dtype)
    learned = [torch.randn(new, D), torch.randn(new * 2, D), torch.randn(new * 2, OUT)] if new else []
    return x, frozen, rows, [value.to(dtype) for value in learned]


def plain(x, base, frozen, rows, learned, settings, mask, scale, scaling=0.5):
    """Output, weighted sum of the terms and the terms, as the formulas are written."""
    router, a, b = learned or (None, None, None)
    directions = [r for r in (rows, None if router is None else F.normalize(router, dim=1)) if r is not None]
    scores = routing.cosine_scores(x, torch.cat(directions))
    new = 0 if router is None else len(router)
    guided = scores
    if settings["guidance"] != "none":
        guided = routing.token_assignment_guidance(scores, new, TAU, settings["guidance"])
    weights = routing.topk_weights(guided, TOP_K, T)
    blocks = list(frozen) if router is None else [*frozen, ExpertBlock(a, b, 2, scaling)]
    output = base + reference(x, weights, blocks)
    zero = x.new_zeros(())
    if router is None:
        return output, zero, torch.stack([zero] * 3)
    evened = scores.shape[-1] if settings["balance_all"] else new
    balance = routing.load_balance_loss(weights, evened, mask)
    exclusivity = specialization = zero
    if rows is not None:
        exclusivity, specialization = routing.routing_score_regularization(scores, new, TOP_K, T_RSR, mask)
    total = (0.7 * balance + scale * (0.3 * exclusivity + 0.4 * specialization)) / 5
    return output, total, torch.stack([balance, exclusivity, specialization])


def combinations(name, path):
    """Guidance, balance, mask and tokens: every pair of values, and over four banks every combination."""
    masks = routing.MASKS if BANKS[name][1] else ("none",)  # nothing learns: nothing is guided
    sides, shift = list(itertools.product((False, True), repeat=2)), [*BANKS].index(name) + [*PATHS].index(path)
    for (place, guidance), (number, tokens) in itertools.product(enumerate(masks), enumerate(((9,), (2, 6), (1,)))):
        yield guidance, *sides[(place + number + shift) % 4], tokens


@pytest.fixture(params=["compiled", "torch"])
def gate(request, monkeypatch):
    """The gate by Numba, then by torch's operations."""
    if request.param == "torch":
        monkeypatch.setattr(numba, "available", lambda: False)
    else:
        pytest.importorskip("numba")
        assert numba.available(), "torch's operations would be compared with themselves"
    return request.param


@pytest.mark.parametrize(("path", "gate"), [("by rule", "torch"), *((p, "compiled") for p in PATHS)], indirect=["gate"])
@pytest.mark.parametrize("name", BANKS)
def test_output_terms_and_all_gradients_are_those_of_the_formulas(name, path, gate, monkeypatch):
    for attribute, value in PATHS[path].items():
        monkeypatch.setattr(sparse, attribute, value)
    upstream, scale = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    for guidance, balance_all, masked, tokens in combinations(name, path):
        settings = {"guidance": guidance, "balance_all": balance_all}
        x, frozen, rows, learned = drawn(name, tokens)
        mask = (torch.arange(x[..., 0].numel()) % 3 > 0) if masked else None
        results = []
        for form in ("plain", "fused"):
            leaves = [value.clone().requires_grad_() for value in (x, torch.ones(*tokens, OUT).double(), *learned)]
            inputs, base = leaves[0], leaves[1] * 1.0
            if form == "plain":
                shaped = None if mask is None else mask.view(tokens)
                output, total, terms = plain(inputs, base, frozen, rows, leaves[2:], settings, shaped, scale)
                loss = (output * torch.arange(OUT)).sum() + upstream * total
            else:
                rule = Rule(TOP_K, T, TAU, guidance if learned else "none", 0.7 if learned else 0.0, balance_all)
                rule = Rule(**{**vars(rule), "exclusivity": 0.3, "specialization": 0.4, "rsr_temperature": T_RSR})
                rule = Rule(**{**vars(rule), "regularize": bool(learned), "layers": 5})
                bank = Bank(frozen, rows, rows, rule, torch.float64, 2, 0.5, 0.0, mask, scale, upstream)
                output, outcome = fused(inputs, base, *(leaves[2:] or (None, None, None)), bank)
                total, terms = outcome.chosen.total, outcome.chosen.terms
                loss = (output * torch.arange(OUT)).sum()
            loss.backward()
            results.append([output.detach(), *(leaf.grad for leaf in leaves)])
            if learned:
                results[-1] += [total.detach(), terms.detach()]
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", BANKS)
def test_in_bfloat16_it_differs_from_float64_by_rounding(name):
    x, frozen, rows, learned = drawn(name, (4, 5))
    low = [ExpertBlock(block.a.bfloat16(), block.b.bfloat16(), block.r) for block in frozen]
    wide = [ExpertBlock(block.a.double(), block.b.double(), block.r) for block in low]
    inputs, base = x.bfloat16(), torch.zeros(4, 5, OUT, dtype=torch.bfloat16)
    low_rows = None if rows is None else rows.float()
    rule = Rule(TOP_K, T, TAU)
    bank = Bank(low, low_rows, None if rows is None else rows.bfloat16(), rule, torch.bfloat16, 2, 0.5)
    parameters = [value.float() for value in learned] or [None] * 3
    output, outcome = fused(inputs, base, *parameters, bank)
    assert output.dtype == torch.bfloat16
    assert outcome.scores().dtype == torch.float32
    settings = {"guidance": "none", "balance_all": False}
    expected, _, _ = plain(inputs.double(), 0.0, wide, rows, learned, settings, None, 1.0)
    torch.testing.assert_close(output.double(), expected, atol=0.15, rtol=0.05)


def test_no_tokens_and_dropout():
    x, frozen, rows, learned = drawn("many old", (0,))
    bank = Bank(frozen, rows, rows, Rule(TOP_K, T, TAU, "exclusive", 0.1), torch.float64, 2)
    leaves = [value.requires_grad_() for value in learned]
    output, _ = fused(x.requires_grad_(), torch.zeros(0, OUT).double(), *leaves, bank)
    output.sum().backward()
    assert output.shape == (0, OUT)
    assert all(leaf.grad.abs().sum() == 0 for leaf in leaves)

    x, frozen, rows, learned = drawn("first task", (3000,))
    x = torch.ones_like(x).requires_grad_()
    leaves = [value.requires_grad_() for value in learned]
    bank = Bank([], None, None, Rule(TOP_K, T), torch.float64, 2, 1.0, 0.25)
    torch.manual_seed(3)
    first, _ = fused(x, torch.zeros(3000, OUT).double(), *leaves, bank)
    torch.manual_seed(3)
    again, _ = fused(x, torch.zeros(3000, OUT).double(), *leaves, bank)
    assert torch.equal(first, again)
    kept, _ = fused(x, torch.zeros(3000, OUT).double(), *leaves, Bank([], None, None, Rule(TOP_K, T), torch.float64, 2))
    assert not torch.allclose(first[0], kept[0])
    torch.testing.assert_close(first.mean(0), kept.mean(0), rtol=0.15, atol=0.15)  # dropout keeps the mean
    torch.manual_seed(3)
    assert torch.autograd.gradcheck(
        lambda a, b: (torch.manual_seed(3), fused(x[:4].detach(), torch.zeros(4, OUT).double(), leaves[0], a, b, bank))[
            1
        ][0],
        (leaves[1], leaves[2]),
    )


def test_equal_scores_at_the_border_keep_exactly_top_k(gate):
    rows = F.normalize(torch.ones(10, D, dtype=torch.float64), dim=1)
    frozen = [ExpertBlock(torch.randn(20, D).double(), torch.randn(20, OUT).double(), 2)]
    bank = Bank(frozen, rows, rows, Rule(TOP_K, T), torch.float64)
    _, outcome = fused(torch.randn(4, D).double(), torch.zeros(4, OUT).double(), None, None, None, bank)
    weights = outcome.weights()
    assert ((weights > 0).sum(1) == TOP_K).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(4).double())


def test_the_base_output_that_others_may_hold_is_left_alone():
    x, frozen, rows, _ = drawn("evaluation", (3,))
    bank = Bank(frozen, rows, rows, Rule(TOP_K, T), torch.float64)
    whole = torch.zeros(2, 3, OUT, dtype=torch.float64)
    output, _ = fused(x, whole[0], None, None, None, bank)
    assert whole.abs().sum() == 0
    assert output.abs().sum() > 0
    leaf = torch.zeros(3, OUT, dtype=torch.float64, requires_grad=True)
    fused(x, leaf, None, None, None, bank)
    assert leaf.detach().abs().sum() == 0
    held = torch.zeros(3, OUT, dtype=torch.float64)
    fused(x, held, None, None, None, replace(bank, inplace=False))
    assert held.abs().sum() == 0


def test_a_zero_token_scores_nothing_and_gets_no_gradient_through_its_scores():
    x, frozen, rows, _ = drawn("evaluation", (3,))
    x[1] = 0
    results = []
    for form in ("plain", "fused"):
        leaf = x.clone().requires_grad_()
        if form == "plain":
            settings = {"guidance": "none", "balance_all": False}
            output, _, _ = plain(leaf, torch.zeros(3, OUT).double(), frozen, rows, [], settings, None, 1.0)
        else:
            bank = Bank(frozen, rows, rows, Rule(TOP_K, T), torch.float64)
            output, _ = fused(leaf, torch.zeros(3, OUT).double(), None, None, None, bank)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad))
        assert leaf.grad[1].abs().max() < 100
    torch.testing.assert_close(results[1], results[0])
