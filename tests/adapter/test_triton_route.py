"""The fused cosine gate against its formula in float64, forward and all gradients.

Without a GPU the kernels run in Triton's interpreter, on a real one as they are.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from dymoe import routing
from dymoe.adapter.ops.triton import route as module
from dymoe.adapter.ops.triton.route import Guidance, group_mass, route, split_rows, topk_weights
from dymoe.errors import DymoeError

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # rows past the last token
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORWARD = {torch.float32: 2e-6, torch.bfloat16: 2e-4, torch.float16: 2e-5}  # of a weight: 1/temperature of a score's
GRADIENT = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FORWARD}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tokens a program, the last program not full; also fewer programs for the interpreter."""
    usual = module.tile_of
    monkeypatch.setattr(module, "tile_of", lambda tokens, experts: (4, *usual(tokens, experts)[1:]))


def softmax_over_first_largest(scores, top_k, temperature):
    """Top-k softmax, of equal scores the first: sort, take k, softmax, put back."""
    if top_k >= scores.shape[-1]:
        return (scores / temperature).softmax(-1)
    index = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    part = (scores.gather(-1, index) / temperature).softmax(-1)
    return torch.zeros_like(scores).scatter(-1, index, part)


def formula(x, rows, top_k, temperature, guidance):
    """Scores, weights and types as written, in float64."""
    directions = torch.cat(rows)
    scores = (x @ directions.t()) / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    guided, types = scores, None
    if guidance is not None:
        types = routing.token_types(scores, guidance.num_new, guidance.tau)
        guided = routing.token_assignment_guidance(scores, guidance.num_new, guidance.tau, guidance.mask, types)
    return scores, softmax_over_first_largest(guided, top_k, temperature), types


def unit_rows(*sizes, features):
    return [F.normalize(torch.randn(n, features), dim=-1).to(DEVICE) for n in sizes if n]


def run(make, x, rows, wide):
    """Outputs and gradients of a weighted sum of scores and weights."""
    x = (x.double() if wide else x.clone()).requires_grad_()
    rows = [(r.double() if wide else r.clone()).requires_grad_() for r in rows]
    scores, weights, types = make(x, rows)
    generator = torch.Generator().manual_seed(7)
    factors = [torch.randn(scores.shape, generator=generator).to(DEVICE) for _ in range(2)]
    ((scores * factors[0]).sum() + (weights * factors[1]).sum()).backward()
    return (scores, weights, types), (x.grad, *(r.grad for r in rows))


def near(got, expected, tolerance):
    expected = expected.detach().double()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected, atol=tolerance * scale, rtol=0, equal_nan=False)


CASES = [
    # old, new, tokens, features, top_k, guidance
    (3, 2, (5,), 7, 2, Guidance(2, 0.2, "exclusive")),
    (16, 16, (2, 3), 40, 16, Guidance(16, 0.2, "protect")),
    (16, 5, (6,), 33, 4, Guidance(5, 0.0, "none")),
    (7, 5, (0,), 6, 3, Guidance(5, 0.2, "exclusive")),
    (5, 5, (6,), 6, 30, Guidance(5, 0.1, "exclusive")),
    (33, 0, (1,), 40, 5, None),
    (1, 0, (3,), 5, 1, None),
    (20, 4, (), 24, 16, None),
]


@pytest.mark.parametrize("dtype", FORWARD, ids=NAMES.get)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gate_is_its_formula_with_all_gradients(case, dtype, small_tiles):
    old, new, tokens, features, top_k, guidance = case
    torch.manual_seed(0)
    x, rows = torch.randn(*tokens, features).to(DEVICE, dtype), unit_rows(old, new, features=features)
    temperature = 0.1

    def fused(x, rows):
        decision = route(x, rows, top_k, temperature, guidance)
        return decision.scores, decision.weights, decision.types

    outputs, gradients = run(fused, x, rows, wide=False)
    wanted, wanted_gradients = run(lambda x, r: formula(x, r, top_k, temperature, guidance), x, rows, wide=True)
    near(outputs[0], wanted[0], FORWARD[dtype])
    near(outputs[1], wanted[1], FORWARD[dtype])
    assert outputs[0].dtype == outputs[1].dtype == torch.float32
    if guidance is None:
        assert outputs[2] is None
    else:
        assert torch.equal(outputs[2], wanted[2])
    for got, expected in zip(gradients, wanted_gradients, strict=True):
        near(got, expected, GRADIENT[dtype])


def test_scores_alone_and_weights_alone_have_their_gradients(small_tiles):
    """A loss may use one of the two outputs only."""
    torch.manual_seed(1)
    x, rows = torch.randn(3, 8).to(DEVICE), unit_rows(4, 2, features=8)
    for pick in (0, 1):
        results = []
        for make, wide in ((lambda x, r: route(x, r, 3, 0.1), False), (lambda x, r: formula(x, r, 3, 0.1, None), True)):
            own = (x.double() if wide else x).clone().requires_grad_()
            output = make(own, [r.double() if wide else r for r in rows])
            output = (output.scores, output.weights) if not wide else output
            output[pick].square().sum().backward()
            results.append(own.grad)
        near(results[0], results[1], 2e-5)


def test_usual_tiles_and_many_experts():
    torch.manual_seed(2)
    x, rows = torch.randn(2, 12).to(DEVICE), unit_rows(300, 16, features=12)
    decision = route(x, rows, 16, 0.01)
    scores, weights, _ = formula(x.double(), [r.double() for r in rows], 16, 0.01, None)
    near(decision.scores, scores, 2e-6)
    near(decision.weights, weights, 1e-4)
    assert ((decision.weights > 0).sum(-1) <= 16).all()


def test_three_blocks_of_rows_are_one_bank(small_tiles):
    torch.manual_seed(3)
    x, rows = torch.randn(2, 9).to(DEVICE), unit_rows(3, 4, 2, features=9)
    near(route(x, rows, 4, 0.1).weights, formula(x.double(), [r.double() for r in rows], 4, 0.1, None)[1], 2e-6)


@pytest.mark.parametrize("dtype", FORWARD, ids=NAMES.get)
def test_a_zero_token_scores_zero_and_has_no_gradient(dtype, small_tiles):
    rows = unit_rows(3, 2, features=6)
    x = torch.zeros(2, 6, dtype=dtype, device=DEVICE)
    x[1] = 1
    x.requires_grad_()
    decision = route(x, rows, 5, 0.1, Guidance(2, 0.2))
    (decision.scores.sum() + decision.weights[:, 0].sum()).backward()
    assert (decision.scores[0] == 0).all()
    assert int(decision.types[0]) == routing.TokenType.AMBIGUOUS
    near(decision.weights[0], torch.tensor([1 / 3] * 3 + [0] * 2, device=DEVICE), 1e-6)
    assert (x.grad[0] == 0).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("top_k", [1, 2, 4, 7, 9])
def test_ties_and_masked_scores(top_k, small_tiles):
    """Of equal scores exactly as many as fit, the first; -inf never, also where fewer are left than fit."""
    none = float("-inf")
    scores = torch.tensor(
        [
            [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
            [0.1, 0.3, 0.3, -0.3, 0.3, 0.3, 0.9],
            [none, 0.2, none, 0.2, none, 0.2, none],
            [0.0, -0.0, 0.0, -0.0, none, 0.0, -1.0],
            [none, none, none, none, none, none, -0.7],
            [-1e-30, 1e-30, -0.5, -0.5, -0.25, none, -0.25],
        ],
        device=DEVICE,
    )
    got, expected = scores.clone().requires_grad_(), scores.double().requires_grad_()
    factors = torch.arange(42.0, device=DEVICE).view(6, 7)
    weights, wanted = topk_weights(got, top_k, 0.3), softmax_over_first_largest(expected, top_k, 0.3)
    near(weights, wanted, 1e-6)
    assert (weights[scores == none] == 0).all()
    (weights * factors).sum().backward()
    (wanted * factors).sum().backward()
    near(got.grad, expected.grad, 1e-6)


def test_a_row_of_masked_scores_alone_gets_no_weight():
    scores = torch.full((1, 3), float("-inf"), device=DEVICE, requires_grad=True)
    weights = topk_weights(scores, 2, 0.1)
    weights.sum().backward()
    assert (weights == 0).all()
    assert (scores.grad == 0).all()


def test_topk_over_a_grid(small_tiles):
    """Coarse scores, so that ties at the border are the rule."""
    generator = torch.Generator().manual_seed(4)
    for experts, top_k in ((1, 1), (2, 1), (16, 16), (17, 3), (64, 16), (130, 16)):
        scores = torch.randint(-3, 4, (4, experts), generator=generator).float().div(4).to(DEVICE)
        near(topk_weights(scores, top_k, 0.1), softmax_over_first_largest(scores.double(), top_k, 0.1), 1e-6)


@pytest.mark.parametrize("num_new", [0, 2, 6])
@pytest.mark.parametrize("top_k", [2, 16])
def test_masses_of_both_sides(num_new, top_k, small_tiles):
    torch.manual_seed(5)
    scores = torch.randn(2, 3, 6).clamp(-1, 1).to(DEVICE)
    results = []
    for make, values in ((group_mass, scores.clone()), (routing.group_mass, scores.double())):
        values.requires_grad_()
        old, new, largest = make(values, num_new, top_k, 0.1)
        (old * new + new.square() * 3).sum().backward()
        results.append([old, new, largest, values.grad])
    assert not results[0][2].requires_grad
    for got, expected in zip(*results, strict=True):
        near(got, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_split_rows_lose_no_more_than_said_and_are_kept(dtype):
    rows = F.normalize(torch.randn(5, 576), dim=-1)
    parts = split_rows(rows, dtype)
    high, low = parts.double().chunk(2)
    lost = (high + low * module.RESIDUE - rows.double()).abs()
    assert (lost <= rows.abs() * 2.0 ** (-17 if dtype == torch.bfloat16 else -22) + 1e-10).all()
    assert split_rows(rows, dtype) is parts
    rows.mul_(-1)
    assert torch.equal(split_rows(rows, dtype), -parts)
    with torch.inference_mode():
        other = split_rows(rows.clone().mul_(2), dtype)
    assert not other.is_inference()


def test_rows_that_stay_are_split_once(monkeypatch):
    """Frozen rows are the same tensor in every pass, also in the backward ones; rows that learn are split anew."""
    made, usual = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, *rest: made.append(parts[0].shape) or usual(parts, *rest))
    torch.manual_seed(6)
    frozen, learning = unit_rows(3, 2, features=8)
    learning.requires_grad_()
    x = torch.randn(2, 8, device=DEVICE).to(torch.bfloat16).requires_grad_()
    for _ in range(2):
        decision = route(x, [frozen, learning], 3, 0.1)
        (decision.scores.sum() + decision.weights[:, 0].sum()).backward()
    assert made.count(frozen.shape) == 1
    assert made.count(learning.shape) == 4


def test_a_tile_fits_the_registers_for_any_number_of_tokens():
    for tokens in (1, 16, 2048, 11200, 65536):
        for experts in (1, 16, 128, 1024, 16384):
            block, width, warps = module.tile_of(tokens, experts)
            for features in (64, 576, 4096, 13824):
                wide = module.features_of(block, features)
                assert max(block * wide, block * width) <= 64 * 32 * warps  # values a thread: 64 of 255 registers
                assert wide & (wide - 1) == 0
                assert wide >= min(32, features)


def test_bad_arguments_name_what_is_wrong():
    x, rows = torch.ones(2, 4, device=DEVICE), unit_rows(3, 2, features=4)
    for arguments, error, words in (
        ((x.double(), rows, 2, 0.1), DymoeError, "float64"),
        ((x, rows, 0, 0.1), ValueError, "top_k must be at least 1"),
        ((x, rows, 2, 0.0), ValueError, "temperature must be positive"),
        ((x[:, :3], rows, 2, 0.1), ValueError, "3 features"),
        ((x, rows, 2, 0.1, Guidance(5, 0.2)), ValueError, "old and new experts"),
        ((x, rows, 2, 0.1, Guidance(2, -1.0)), ValueError, "tau"),
        ((x, rows, 2, 0.1, Guidance(2, 0.2, "all")), ValueError, "mask must be one of"),
        ((x, [rows[0][:0]], 2, 0.1), DymoeError, "experts"),
    ):
        with pytest.raises(error, match=words):
            route(*arguments)
