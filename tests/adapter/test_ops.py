"""Every form of the bank against the formula, forward and all gradients."""

import itertools

import pytest
import torch

from dymoe.adapter.ops import OPS, ExpertBlock

HERE = [name for name in OPS if name != "triton"]  # which tests/adapter/test_triton_bank.py covers
FORMS = [name for name in HERE if name != "reference"]
BLOCKS = [[(1, 1)], [(4, 2)], [(16, 4), (16, 4)], [(3, 2), (2, 5), (1, 1)]]
TOKENS = [(), (1,), (5,), (2, 7), (0,)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-2}


def formula(x, weights, blocks):
    """y_t = sum_e w_te scale B_e A_e x_t, one token and one expert at a time, in float64."""
    tokens = x.reshape(-1, x.shape[-1]).double()
    rows = weights.double().expand(*x.shape[:-1], -1).reshape(len(tokens), weights.shape[-1])
    result = torch.zeros(len(tokens), blocks[0].b.shape[1], dtype=torch.float64)
    for t in range(len(tokens)):
        e = 0
        for block in blocks:
            for i in range(block.experts):
                a = block.a[i * block.r : (i + 1) * block.r].double()
                b = block.b[i * block.r : (i + 1) * block.r].double().t()
                result[t] += rows[t, e] * block.scale * (b @ (a @ tokens[t]))
                e += 1
    return result.reshape(*x.shape[:-1], blocks[0].b.shape[1])


def made(shapes, tokens, dtype, shared):
    torch.manual_seed(0)
    blocks = [
        ExpertBlock(
            torch.randn(e * r, 6, dtype=dtype, requires_grad=True),
            torch.randn(e * r, 5, dtype=dtype, requires_grad=True),
            r,
            scale=1.0 if i == 0 else 0.5,
        )
        for i, (e, r) in enumerate(shapes)
    ]
    experts = sum(e for e, _ in shapes)
    x = torch.randn(*tokens, 6, dtype=dtype, requires_grad=True)
    weights = torch.rand(*(() if shared else tokens), experts, dtype=torch.float64).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    return x, weights.requires_grad_(), blocks


@pytest.mark.parametrize("op", HERE)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shapes", BLOCKS, ids=str)
def test_forward_is_the_formula(op, dtype, shapes):
    for tokens, shared in itertools.product(TOKENS, (False, True)):
        x, weights, blocks = made(shapes, tokens, dtype, shared)
        output = OPS[op](x, weights, blocks)
        assert output.dtype == dtype
        torch.testing.assert_close(
            output.double(), formula(x, weights, blocks), atol=TOLERANCE[dtype] * 10, rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("shapes", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_equal_the_reference(op, shapes, dtype):
    for tokens, shared in itertools.product(TOKENS, (False, True)):
        results = []
        for name in ("reference", op):
            x, weights, blocks = made(shapes, tokens, dtype, shared)
            output = OPS[name](x, weights, blocks)
            (output.square().sum() + output.sum()).backward()
            results.append([x.grad, weights.grad, *(b.a.grad for b in blocks), *(b.b.grad for b in blocks)])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype] * 100, rtol=TOLERANCE[dtype] * 10)
