"""Every way to compute the bank against the formula, forward and all gradients."""

import itertools

import pytest
import torch

from dymoe.adapter import bank
from dymoe.adapter.bank import Block, reference, stacked
from dymoe.routing import Decision, Routing, route

BANKS = {"reference": reference, "stacked": stacked}
# Experts and rank of the old blocks and of the new one, if there is one.
SHAPES = [([], (1, 1)), ([(4, 2)], None), ([(16, 4)], (16, 4)), ([(3, 2), (2, 5)], (1, 1))]
TOKENS = [0, 1, 5, 14]
IN, OUT = 6, 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-2}


def formula(result, x, decision, old, new):
    """y_t = y0_t + sum_e w_te scale B_e A_e x_t, one token and one expert at a time, in float64."""
    output = result.detach().double().clone()
    weights = torch.cat([decision.columns(0), decision.columns(1)], -1).double().expand(len(x), -1)
    for t in range(len(x)):
        e = 0
        for block in [*old, *([] if new is None else [new])]:
            for i in range(block.experts):
                hidden = block.a[:, i].double() @ x[t].double()
                output[t] += weights[t, e] * block.scale * (hidden @ block.b[:, i].double())
                e += 1
    return output


def made(shapes, tokens, dtype, shared=False, guided=False, out_dtype=None):
    """Base output, inputs, decision and blocks; `guided` sends about half of the tokens to each side."""
    torch.manual_seed(0)
    old, new = shapes

    def block(experts, r, scale):
        a, b = (torch.randn(r, experts, size, dtype=dtype, requires_grad=True) for size in (IN, OUT))
        return Block(a, b, scale)

    blocks = [block(e, r, 1.0) for e, r in old]
    fresh = None if new is None else block(*new, 0.5)
    experts = (sum(e for e, _ in old), 0 if new is None else new[0])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [torch.rand(1 if shared else tokens, e, dtype=wide) for e in experts]
    use = (None, None)
    if guided:
        to_new = torch.arange(tokens) % 3 == 0
        use = (~to_new, to_new)
    learned = [w.requires_grad_() for w in weights]
    if guided:  # as the softmax over a side alone leaves them, in its gradient too
        weights = [w * mask.unsqueeze(1) for w, mask in zip(weights, use, strict=True)]
    x = torch.randn(tokens, IN, dtype=dtype, requires_grad=True)
    result = torch.randn(tokens, OUT, dtype=out_dtype or dtype, requires_grad=True)
    decision = Decision(None, tuple(weights), (None, None), experts, use)
    return (result, x, decision, blocks, fresh), learned


def variants(shapes):
    """Shared weights, and guided tokens where there are two sides."""
    return [(False, False), (True, False), *([(False, True)] if shapes[0] and shapes[1] else [])]


@pytest.mark.parametrize("way", BANKS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_forward_is_the_formula(way, dtype, shapes):
    for tokens, (shared, guided) in itertools.product(TOKENS, variants(shapes)):
        arguments, _ = made(shapes, tokens, dtype, shared, guided)
        output = BANKS[way](*arguments)
        assert output.dtype == dtype
        torch.testing.assert_close(
            output.double(), formula(*arguments), atol=TOLERANCE[dtype] * 10, rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_equal_the_reference(shapes, dtype):
    for tokens, (shared, guided) in itertools.product(TOKENS, variants(shapes)):
        gradients = []
        for way in ("reference", "stacked"):
            (result, x, decision, old, new), learned = made(shapes, tokens, dtype, shared, guided)
            output = BANKS[way](result, x, decision, old, new)
            (output.square().sum() + output.sum()).backward()
            blocks = [*old, *([] if new is None else [new])]
            gradients.append([result.grad, x.grad, *(w.grad for w in learned if w.numel())])
            gradients[-1] += [part.grad for block in blocks for part in (block.a, block.b)]
        for expected, got in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype] * 100, rtol=TOLERANCE[dtype] * 10)


def test_the_base_output_keeps_its_dtype_and_its_values():
    arguments, _ = made(SHAPES[2], 5, torch.bfloat16, out_dtype=torch.float32)
    before = arguments[0].detach().clone()
    for way in BANKS.values():
        assert way(*arguments).dtype == torch.float32
        assert torch.equal(arguments[0].detach(), before)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gathered_rows_without_gradient_are_the_formula(tokens, dtype, monkeypatch):
    gathered = []
    plain = bank._add_gathered
    monkeypatch.setattr(bank, "_add_gathered", lambda *a: gathered.append(1) or plain(*a))
    (result, x, _, old, _), _ = made(([(40, 2)], None), tokens, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    decision = route(torch.randn(tokens, 40, dtype=wide), torch.zeros(tokens, 0, dtype=wide), Routing(top_k=3))
    with torch.no_grad():
        output = BANKS["stacked"](result, x, decision, old, None)
    assert gathered, "many experts, few of them in use"
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        output.double(), formula(result, x, decision, old, None), atol=tolerance * 10, rtol=tolerance
    )
    BANKS["stacked"](result, x, decision, old, None)
    assert len(gathered) == 1, "a gradient is asked for"


def test_dropout_acts_on_the_new_experts_input_alone():
    (result, x, decision, old, new), _ = made(SHAPES[2], 60, torch.float64)
    torch.manual_seed(1)
    for way in BANKS.values():
        mean = sum(way(result, x, decision, old, new._replace(dropout=0.5)).detach() for _ in range(60)) / 60
        expected = formula(result, x, decision, old, new)
        assert 0 < (mean - expected).abs().mean() < 0.3 * (expected - result).abs().mean()
