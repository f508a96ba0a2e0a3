"""Every routing function against a slow oracle written with loops over tokens and experts, in plain Python floats."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dymoe import routing
from dymoe.routing import TokenType

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# ---- oracles --------------------------------------------------------------------------------------------------------


def oracle_cosine(x: list[float], row: list[float]) -> float:
    length = math.sqrt(sum(v * v for v in x)) * math.sqrt(sum(v * v for v in row))
    return sum(a * b for a, b in zip(x, row, strict=True)) / length if length > 0 else 0.0


def oracle_weights(scores: list[float], top_k: int, temperature: float) -> list[float]:
    """Unique only without ties at the border; ties are tested by their own properties."""
    chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
    chosen = [e for e in chosen if scores[e] > -math.inf]
    top = max(scores[e] for e in chosen)
    powers = {e: math.exp((scores[e] - top) / temperature) for e in chosen}
    return [powers.get(e, 0.0) / sum(powers.values()) for e in range(len(scores))]


def oracle_type(scores: list[float], num_new: int, tau: float) -> TokenType:
    old, new = scores[: len(scores) - num_new], scores[len(scores) - num_new :]
    if not old:
        return TokenType.NEW
    if not new:
        return TokenType.OLD
    c_old, c_new = max(old), max(new)
    bottom = max(abs(c_old), abs(c_new))
    relative = 0.0 if bottom == 0 else abs(c_new - c_old) / bottom
    if relative <= tau:
        return TokenType.AMBIGUOUS
    return TokenType.NEW if c_new > c_old else TokenType.OLD


def oracle_guidance(scores: list[float], num_new: int, tau: float, mask: str) -> list[float]:
    num_old = len(scores) - num_new
    if num_old == 0 or num_new == 0:
        return list(scores)
    old, new = scores[:num_old], scores[num_old:]
    nothing_old, nothing_new = [-math.inf] * num_old, [-math.inf] * num_new
    kind = oracle_type(scores, num_new, tau).name
    return {
        "exclusive": {"NEW": nothing_old + new, "AMBIGUOUS": old + nothing_new, "OLD": old + nothing_new},
        "protect": {"NEW": old + new, "AMBIGUOUS": old + nothing_new, "OLD": old + nothing_new},
        "only-ambiguous": {"NEW": old + nothing_new, "AMBIGUOUS": old + new, "OLD": old + nothing_new},
        "only-old": {"NEW": old + nothing_new, "AMBIGUOUS": old + nothing_new, "OLD": old + new},
        "no-token": {"NEW": old + nothing_new, "AMBIGUOUS": old + nothing_new, "OLD": old + nothing_new},
        "none": {"NEW": old + new, "AMBIGUOUS": old + new, "OLD": old + new},
    }[mask][kind]


def oracle_rsr(scores: list[float], num_new: int, top_k: int, temperature: float) -> tuple[float, float]:
    weights = oracle_weights(scores, top_k, temperature)
    num_old = len(scores) - num_new
    g_old, g_new = sum(weights[:num_old]), sum(weights[num_old:])
    y = min(max(1 - max(weights[:num_old], default=0.0), 0.0), 1.0)
    spe = -(y * math.log(max(g_new, 1e-8)) + (1 - y) * math.log(max(1 - g_new, 1e-8)))
    return g_old * g_new, spe


def oracle_balance(weights: list[list[float]], num_new: int) -> float:
    tokens = [row[len(row) - num_new :] for row in weights]
    tokens = [row for row in tokens if sum(row) > 0]
    if not tokens:
        return 0.0
    total = sum(sum(row) for row in tokens)
    result = 0.0
    for e in range(num_new):
        dispatched = sum(row.index(max(row)) == e for row in tokens) / len(tokens)
        result += dispatched * sum(row[e] for row in tokens) / total
    return num_new * result


# ---- grids ----------------------------------------------------------------------------------------------------------

SHAPES = [((), 1), ((5,), 1), ((5,), 4), ((2, 7), 16), ((3, 2, 2), 9), ((0,), 4)]


def score_grid() -> list[tuple[str, torch.Tensor]]:
    grid = []
    for (tokens, experts), kind in itertools.product(SHAPES, ("mixed", "negative", "ties", "zero")):
        generator = torch.Generator().manual_seed(experts * 31 + len(tokens))
        scores = torch.rand(*tokens, experts, generator=generator, dtype=torch.float64) * 2 - 1
        if kind == "negative":
            scores = -scores.abs() - 0.01
        elif kind == "ties":
            scores = (scores * 2).round() / 2
        elif kind == "zero":
            scores = torch.zeros_like(scores)
        grid.append((f"{kind}-{tuple(tokens)}-{experts}", scores))
    return grid


GRID = score_grid()
grid = pytest.mark.parametrize("scores", [s for _, s in GRID], ids=[n for n, _ in GRID])


def rows(tensor: torch.Tensor) -> list[list[float]]:
    return tensor.double().reshape(-1, tensor.shape[-1]).tolist()


def splits(experts: int) -> list[int]:
    return sorted({0, 1, experts // 2, experts})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts"), SHAPES)
def test_cosine_scores(tokens, experts, dtype):
    torch.manual_seed(0)
    x, router = torch.randn(*tokens, 6).to(dtype), torch.randn(experts, 6).to(dtype)
    if x.numel() > 6:
        x.reshape(-1, 6)[0] = 0
    scores = routing.cosine_scores(x, router)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert scores.shape == (*tokens, experts)
    expected = [[oracle_cosine(a, b) for b in rows(router)] for a in rows(x)]
    torch.testing.assert_close(
        scores.double().reshape(-1, experts),
        torch.tensor(expected, dtype=torch.float64).reshape(-1, experts),
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("tokens", [(), (5,), (2, 3), (0,)])
def test_cosine_scores_have_the_gradient_of_their_formula(tokens):
    torch.manual_seed(0)
    x = torch.randn(*tokens, 6, dtype=torch.float64, requires_grad=True)
    router = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(*tokens, 4, dtype=torch.float64)
    plain = (x / x.norm(dim=-1, keepdim=True)) @ (router / router.norm(dim=-1, keepdim=True)).t()
    expected = torch.autograd.grad((plain * pull).sum(), (x, router))
    got = torch.autograd.grad((routing.cosine_scores(x, router) * pull).sum(), (x, router))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_token_gets_no_gradient(dtype):
    x = torch.zeros(2, 6, dtype=dtype, requires_grad=True)
    routing.cosine_scores(x, torch.randn(3, 6)).sum().backward()
    assert x.grad.tolist() == torch.zeros(2, 6).tolist()


@pytest.mark.parametrize("alike", [0.0, 3.0], ids=["random", "one direction"])
@pytest.mark.parametrize(("features", "experts"), [(8, 1), (64, 16), (576, 128)])
def test_the_gradient_of_bfloat16_inputs_is_the_formulas_but_for_rounding(features, experts, alike):
    """Also where all scores are nearly equal and the pull sums to 0, as a softmax's does: there terms cancel."""
    torch.manual_seed(0)
    x = (torch.randn(50, features) + alike).bfloat16()
    router = torch.randn(experts, features) + alike
    pull = torch.randn(50, experts)
    pull -= pull.mean(-1, keepdim=True) if experts > 1 else 0
    exact = [x.double().requires_grad_(), router.double().requires_grad_()]
    (routing.cosine_scores(*exact) * pull).sum().backward()
    rounded = [x.clone().requires_grad_(), router.clone().requires_grad_()]
    (routing.cosine_scores(*rounded) * pull).sum().backward()
    for got, expected in zip(rounded, exact, strict=True):
        assert got.grad.dtype == got.dtype
        assert (got.grad.double() - expected.grad).norm() < 0.02 * expected.grad.norm()


def test_cosine_scores_do_not_lose_precision_under_autocast():
    torch.manual_seed(0)
    x, router = torch.randn(4, 64), torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = routing.cosine_scores(x, router)
    torch.testing.assert_close(inside, routing.cosine_scores(x, router), atol=0, rtol=0)


@grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_topk_weights(scores, dtype, temperature):
    scores = scores.to(dtype)
    experts = scores.shape[-1]
    for top_k in sorted({1, max(experts // 2, 1), experts, experts + 3}):
        weights = routing.topk_weights(scores, top_k, temperature)
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        kept = min(top_k, experts)
        for row, got in zip(rows(scores), rows(weights), strict=True):
            expected = oracle_weights(row, top_k, temperature)
            assert sum(got) == pytest.approx(1, abs=1e-5)
            assert sum(w > 0 for w in got) <= kept
            # Ties at the border may be broken either way: the weights by score are the same.
            assert sorted(got) == pytest.approx(sorted(expected), abs=2e-5)
            by_score = {}
            for score, weight in zip(row, got, strict=True):
                if weight > 0:
                    by_score.setdefault(score, []).append(weight)
            border = sorted(row, reverse=True)[kept - 1]
            assert all(score >= border for score in by_score)
            for same in by_score.values():
                assert max(same) == pytest.approx(min(same), abs=1e-6)


def test_topk_weights_ignores_masked_scores_even_if_fewer_than_k_are_left():
    scores = torch.tensor([[0.3, -math.inf, 0.1, -math.inf]])
    weights = routing.topk_weights(scores, 3, 0.1)
    assert weights[0, 1] == 0
    assert weights[0, 3] == 0
    assert rows(weights)[0] == pytest.approx(oracle_weights(rows(scores)[0], 3, 0.1), abs=1e-6)


@grid
@pytest.mark.parametrize("tau", [0.0, 0.2, 1.0])
def test_token_types(scores, tau):
    for num_new in splits(scores.shape[-1]):
        types = routing.token_types(scores, num_new, tau)
        assert types.shape == scores.shape[:-1]
        assert types.reshape(-1).tolist() == [int(oracle_type(row, num_new, tau)) for row in rows(scores)]


def test_token_types_with_opposite_signs_and_zero_denominator():
    scores = torch.tensor([[-0.1, 0.1], [0.1, -0.1], [0.0, 0.0], [0.5, 0.45], [0.1, 0.5]])
    assert routing.token_types(scores, 1, 0.2).tolist() == [
        TokenType.NEW,
        TokenType.OLD,
        TokenType.AMBIGUOUS,
        TokenType.AMBIGUOUS,
        TokenType.NEW,
    ]


@grid
@pytest.mark.parametrize("mask", routing.MASKS)
def test_token_assignment_guidance(scores, mask):
    for num_new in splits(scores.shape[-1]):
        guided = routing.token_assignment_guidance(scores, num_new, 0.2, mask)
        assert guided.dtype == scores.dtype
        assert rows(guided) == [oracle_guidance(row, num_new, 0.2, mask) for row in rows(scores)]
        if guided.numel():
            assert torch.isfinite(guided).any(-1).all()


def test_each_token_reaches_the_new_experts_under_one_of_the_three_masks():
    scores = torch.rand(200, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    masks = ("protect", "only-ambiguous", "only-old")
    seen = [torch.isfinite(routing.token_assignment_guidance(scores, 2, 0.5, mask)[:, -1]) for mask in masks]
    assert all(part.any() for part in seen)
    assert torch.stack(seen).sum(0).eq(1).all()


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=8),
    st.integers(1, 7),
    st.floats(0, 1.5),
    st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_exclusive_guidance_puts_all_mass_in_one_group(values, num_new, tau, top_k):
    num_new = min(num_new, len(values) - 1)
    scores = torch.tensor([values], dtype=torch.float64)
    guided = routing.token_assignment_guidance(scores, num_new, tau)
    weights = routing.topk_weights(guided, top_k, 0.01)[0]
    new = float(weights[-num_new:].sum())
    kind = oracle_type(values, num_new, tau)
    assert new == pytest.approx(1.0 if kind == TokenType.NEW else 0.0, abs=1e-6)


@grid
@pytest.mark.parametrize("masked", [False, True])
def test_regularization_losses(scores, masked):
    tokens = scores.shape[:-1]
    mask = (torch.arange(max(math.prod(tokens), 1)) % 3 != 1)[: math.prod(tokens)].reshape(tokens) if masked else None
    for num_new, top_k in itertools.product(splits(scores.shape[-1]), (1, 3, 16)):
        kept = [row for i, row in enumerate(rows(scores)) if mask is None or bool(mask.reshape(-1)[i])]
        if len({round(v, 6) for row in kept for v in row}) < sum(len(row) for row in kept) and top_k < scores.shape[-1]:
            continue  # ties at the border: which expert is kept is free
        pairs = [oracle_rsr(row, num_new, top_k, 0.1) for row in kept]
        expected = [sum(p[i] for p in pairs) / len(pairs) if pairs else 0.0 for i in (0, 1)]
        exc = routing.exclusivity_loss(scores, num_new, top_k, 0.1, mask)
        spe = routing.specialization_loss(scores, num_new, top_k, 0.1, mask)
        assert [float(exc), float(spe)] == pytest.approx(expected, abs=1e-6)
        both = routing.routing_score_regularization(scores, num_new, top_k, 0.1, mask)
        assert [float(v) for v in both] == [float(exc), float(spe)]


def test_specialization_target_gets_no_gradient():
    scores = torch.tensor([[0.2, 0.1, 0.15]], dtype=torch.float64, requires_grad=True)
    routing.specialization_loss(scores, 1, 3, 0.1).backward()
    weights = torch.softmax(scores.detach() / 0.1, -1)
    y = 1 - float(weights[0, :2].max())
    free = scores.detach().clone().requires_grad_()
    g = torch.softmax(free / 0.1, -1)[0, 2]
    (-(y * g.log() + (1 - y) * (1 - g).log())).backward()
    torch.testing.assert_close(scores.grad, free.grad)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "num_new"), [((6,), 4, 2), ((3, 5), 9, 4), ((2, 3), 3, 3), ((4,), 1, 1)])
def test_load_balance_loss(tokens, experts, num_new, masked, guided):
    torch.manual_seed(1)
    scores = torch.rand(*tokens, experts, dtype=torch.float64)
    if guided:
        scores = routing.token_assignment_guidance(scores, num_new, 0.2)
    weights = routing.topk_weights(scores, 3, 0.3)
    mask = torch.rand(tokens) > 0.4 if masked else None
    kept = [row for i, row in enumerate(rows(weights)) if mask is None or bool(mask.reshape(-1)[i])]
    loss = routing.load_balance_loss(weights, num_new, mask)
    assert float(loss) == pytest.approx(oracle_balance(kept, num_new), abs=1e-9)


def test_load_balance_loss_is_least_when_even_and_moves_scores_apart():
    even = torch.eye(4, dtype=torch.float64)
    assert float(routing.load_balance_loss(even, 4)) == pytest.approx(1)
    one = torch.zeros(4, 4, dtype=torch.float64)
    one[:, 2] = 1
    assert float(routing.load_balance_loss(one, 4)) == pytest.approx(4)
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.3]], requires_grad=True)
    routing.load_balance_loss(torch.softmax(scores, -1), 2).backward()
    assert (scores.grad[:, 0] > 0).all()
    assert (scores.grad[:, 1] < 0).all()


def test_no_token_counts():
    scores = torch.rand(3, 4, requires_grad=True)
    nobody = torch.zeros(3, dtype=torch.bool)
    for loss in (
        routing.exclusivity_loss(scores, 2, mask=nobody),
        routing.specialization_loss(scores, 2, mask=nobody),
        routing.load_balance_loss(torch.softmax(scores, -1), 2, nobody),
    ):
        assert loss.item() == 0
        loss.backward()
    assert torch.isfinite(scores.grad).all()


# ---- route ----------------------------------------------------------------------------------------------------------

BANKS = {  # old experts, new experts
    "first task": (0, 4),
    "first task, few": (0, 2),
    "second task": (4, 4),
    "few old": (2, 5),
    "many old": (40, 4),
    "many new": (5, 9),
    "evaluation": (40, 0),
}
SETTINGS = {"top_k": 3, "temperature": 0.2, "load_balance": 0.7, "exclusivity": 0.3, "specialization": 0.4}


def over_all_experts(scores, num_new, settings, mask, scale):
    """Weights, weighted sum and terms from the formulas over all experts, without candidates."""
    guided = routing.token_assignment_guidance(scores, num_new, settings.tau, settings.guidance)
    weights = routing.topk_weights(guided, settings.top_k, settings.temperature)
    evened = num_new if settings.balance_over == "new" else scores.shape[-1]
    balance = routing.load_balance_loss(weights, evened, mask)
    exclusivity = specialization = scores.new_zeros(())
    if 0 < num_new < scores.shape[-1]:
        exclusivity, specialization = routing.routing_score_regularization(
            scores, num_new, settings.top_k, settings.rsr_temperature, mask
        )
    total = 0.7 * balance + scale * (0.3 * exclusivity + 0.4 * specialization)
    return weights, total, torch.stack([balance, exclusivity, specialization])


@pytest.mark.parametrize("guidance", routing.MASKS)
@pytest.mark.parametrize("bank", BANKS)
def test_what_runs_is_the_formulas_over_all_experts(bank, guidance):
    num_old, num_new = BANKS[bank]
    for tokens, over, masked in itertools.product((1, 11), ("new", "all"), (False, True)):
        torch.manual_seed(tokens)
        scores = torch.rand(tokens, num_old + num_new, dtype=torch.float64) * 2 - 1
        mask = torch.rand(tokens) > 0.3 if masked else None
        settings = routing.Routing(guidance=guidance, balance_over=over, **SETTINGS)
        pull, results = torch.randn(tokens, num_old + num_new, dtype=torch.float64), []
        for way in ("route", "formulas"):
            leaf = scores.clone().requires_grad_()
            if way == "route":
                old, new = leaf.split([num_old, num_new], -1)
                made = routing.route(old, new, settings, learns=num_new > 0, mask=mask, scale=0.6, report=True)
                weights, total, terms = torch.cat([made.columns(0), made.columns(1)], -1), made.total, made.terms
                if num_new:
                    types = routing.token_types(scores, num_new, settings.tau)
                    expected = routing.token_statistics(types, weights.detach(), num_new, mask)
                    torch.testing.assert_close(made.statistics, expected)
                    for side, use in enumerate(made.tokens):
                        assert use is None or not made.weights[side][~use].any()
            else:
                weights, total, terms = over_all_experts(leaf, num_new, settings, mask, 0.6)
            value = (weights * pull).sum() + (total if num_new else 0.0)
            results.append([weights, *torch.autograd.grad(value, leaf), *([total, terms] if num_new else [])])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-7)


def test_equal_scores_at_the_border_keep_exactly_top_k():
    made = routing.route(torch.zeros(6, 8), torch.zeros(6, 5), routing.Routing(top_k=3, guidance="none"), learns=True)
    joined = torch.cat([made.columns(0), made.columns(1)], -1)
    torch.testing.assert_close((joined > 0).sum(-1), torch.full((6,), 3))
    torch.testing.assert_close(joined.sum(-1), torch.ones(6))


def test_the_regularization_is_reported_but_not_learned_before_it_starts():
    old, new = (torch.rand(7, 4).requires_grad_() for _ in range(2))
    settings = routing.Routing(top_k=3, load_balance=0.0)
    quiet = routing.route(old, new, settings, learns=True, scale=None)
    assert quiet.terms.tolist() == [0, 0, 0]
    assert quiet.statistics is None
    told = routing.route(old, new, settings, learns=True, scale=None, report=True)
    assert (told.terms[1:] > 0).all()
    assert not told.total.requires_grad or not torch.autograd.grad(told.total, old, allow_unused=True)[0].any()
    loud = routing.route(old, new, settings, learns=True, scale=torch.tensor(1.0))
    torch.testing.assert_close(loud.terms, told.terms)
    assert torch.autograd.grad(loud.total, old)[0].any()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("top_k", 0, "top_k: expected a whole number from 1, got 0"),
        ("top_k", True, "top_k: expected a whole number from 1, got True"),
        ("temperature", 0.0, "temperature: expected a number above 0"),
        ("guidance", "both", "guidance: expected one of exclusive, protect"),
        ("balance_over", "old", "balance_over: expected one of new, all"),
        ("rsr_start", 1.0, r"rsr_start: expected a number in \[0, 1\)"),
        ("tau", float("nan"), "tau must be 0 or a number between"),
    ],
)
def test_settings_out_of_range_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        routing.Routing(**{field: value})


@pytest.mark.parametrize("start", [0.0, 0.25, 0.5])
def test_rsr_scale(start):
    for total in (1, 7, 100):
        for step in range(total + 1):
            share = step / total
            expected = 0.0 if share <= start else (share - start) / (1 - start)
            assert routing.rsr_scale(step, total, start) == pytest.approx(expected)
    assert routing.rsr_scale(200, 100) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: routing.cosine_scores(torch.ones(2, 3), torch.ones(2, 4)),
            "3 features but router rows have 4",
        ),
        (lambda: routing.topk_weights(torch.ones(2, 3), 0, 0.1), "top_k"),
        (lambda: routing.topk_weights(torch.ones(2, 3), 2, 0.0), "temperature"),
        (lambda: routing.token_types(torch.ones(2, 3), 4, 0.2), "num_new"),
        (lambda: routing.token_types(torch.ones(2, 3), 1, -0.2), "tau"),
        (lambda: routing.token_assignment_guidance(torch.ones(2, 3), 1, 0.2, "both"), "mask must be one of"),
        (lambda: routing.exclusivity_loss(torch.ones(2, 3), 1, mask=torch.ones(3)), "shape of the tokens"),
        (lambda: routing.load_balance_loss(torch.ones(2, 3), 1, mask=torch.ones(3)), "shape of the tokens"),
        (lambda: routing.rsr_scale(1, 0), "total_steps"),
        (lambda: routing.rsr_scale(1, 2, 1.0), "start"),
    ],
)
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
