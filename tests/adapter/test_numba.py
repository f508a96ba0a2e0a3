"""The compiled gate and the compiled way of few tokens against the torch operations and against plain float64."""

import itertools
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dymoe import routing
from dymoe.adapter.ops import Bank, ExpertBlock, Rule, candidates, fused, numba, reference
from dymoe.adapter.ops.numba import kernels

FIELDS = ("types", "terms", "total", "statistics")
SIZES = [(0, 3), (0, 9), (4, 4), (2, 3), (40, 4), (6, 9), (40, 0), (3, 0), (0, 0)]  # old and new experts


def close(got, expected, dtype):
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(got, expected, **tolerance)


def spread(chosen, values, sizes):
    """Values at the candidates as columns of all experts."""
    parts = values[:, : chosen.split], values[:, chosen.split :]
    return torch.cat([chosen.spread(parts[side], side, sizes[side]) for side in (0, 1)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_gate_decides_as_the_torch_operations_do(sizes, dtype):
    generator = torch.Generator().manual_seed(sum(sizes))
    sides = list(itertools.product((False, True), repeat=2))
    for (place, guidance), (number, tokens), slope in itertools.product(
        enumerate(routing.MASKS), enumerate((0, 1, 11)), (False, True)
    ):
        # Every pair of values, and over four sizes every combination of all five.
        balance_all, masked = sides[(place + number + 3 * slope + SIZES.index(sizes)) % 4]
        old, new = (torch.randn(tokens, size, generator=generator, dtype=dtype) * 0.3 for size in sizes)
        mask = torch.arange(tokens) % 3 > 0 if masked else None
        for learned in (True, False):
            rule = Rule(5, 0.05, 0.2, guidance, statistics=True)
            if learned:
                loss = {"load_balance": 0.7, "exclusivity": 0.3, "specialization": 0.4, "regularize": True}
                rule = Rule(5, 0.05, 0.2, guidance, balance_all=balance_all, layers=3, statistics=True, **loss)
            arguments = (old, new, rule, mask, torch.tensor(0.8, dtype=dtype), slope)
            got, expected = numba.choose(*arguments), candidates.choose(*arguments)
            assert got.split == expected.split
            for name in FIELDS:
                one, other = getattr(got, name), getattr(expected, name)
                assert (one is None) == (other is None), name
                if one is not None:
                    close(one, other.to(one.dtype), dtype)
            assert (got.slope is None) == (expected.slope is None)
            values = [(got.scores, expected.scores), (got.weights, expected.weights)]
            if got.slope is not None:
                values.append((got.slope, expected.slope))
            for one, other in values:
                close(spread(got, one, sizes), spread(expected, other, sizes), dtype)
            back = torch.randn(tokens, sum(sizes), generator=generator, dtype=dtype)
            inverse = torch.rand(tokens, 1, generator=generator, dtype=dtype)
            results = []
            for form, chosen in ((numba, got), (candidates, expected)):
                by_weight = torch.cat([chosen.picked(part, side) for side, part in enumerate(back.split(sizes, 1))], 1)
                scaled, along = form.descend(chosen, by_weight, inverse, 0.05, torch.tensor(0.6, dtype=dtype))
                results.append((spread(chosen, scaled, sizes), along))
            for one, other in zip(*results, strict=True):
                close(one, other, dtype)


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -1e-40, 3e38, -3e38])


@settings(max_examples=200, deadline=None)
@given(row=st.lists(NUMBERS | st.floats(width=32, allow_nan=False), min_size=2, max_size=70), data=st.data())
def test_the_largest_are_found_also_among_equal_ones(row, data):
    k = data.draw(st.integers(1, len(row) - 1))
    numbers = np.array(row, dtype=np.float32)
    index = np.empty(k, dtype=np.int64)
    kernels._largest(numbers.view(np.uint32), k, numba._bits(torch.float32), np.empty(len(row), dtype=np.uint32), index)
    assert (np.diff(index) > 0).all()
    assert sorted(numbers[index].tolist()) == sorted(row_ for row_ in sorted(numbers.tolist())[len(row) - k :])


def test_of_equal_scores_at_the_border_the_first_are_taken():
    old = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 2.0]])
    chosen = numba.choose(old, old[:, :0], Rule(3, 0.1))
    assert chosen.index[0].tolist() == [[1, 2, 3]]


def test_the_ranks_in_use_are_those_of_the_chosen_experts():
    index = torch.tensor([[0, 5, 7], [1, 2, 3]])
    ranks, touched, pairs = numba.ranks_in_use(index, 8, 2, 3)
    assert ranks.tolist() == [[0, 1, 10, 11, 14, 15], [2, 3, 4, 5, 6, 7]]
    assert touched.tolist() == [[True, True, True], [True, True, False]]
    assert pairs == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "r"), [(3, 1), (5, 4), (40, 2), (9, 3)])
@pytest.mark.parametrize("tokens", [1, 7, 32])
def test_few_tokens_are_served_as_the_formulas_say(experts, r, tokens, dtype, monkeypatch):
    torch.manual_seed(experts + tokens)
    block = ExpertBlock(torch.randn(experts * r, 19).to(dtype), torch.randn(experts * r, 13).to(dtype), r)
    rows, x = F.normalize(torch.randn(experts, 19), dim=1), torch.randn(tokens, 19).to(dtype)
    base = torch.randn(tokens, 13).to(dtype)
    bank = Bank([block], rows, rows.to(dtype), Rule(5, 0.2), dtype, r)
    wide = ExpertBlock(block.a.double(), block.b.double(), r)
    scores = routing.cosine_scores(x.double(), rows.double())
    weights = routing.topk_weights(scores, 5, 0.2)
    expected = base.double() + reference(x.double(), weights, [wide])
    served = []
    monkeypatch.setattr(numba, "SERVED", 100)
    monkeypatch.setattr(kernels, "serve", lambda *values, plain=kernels.serve: served.append(plain(*values)))
    with torch.no_grad():
        output, outcome = fused(x, base.clone(), None, None, None, bank)
        kept = base.clone()
        aside, _ = fused(x, kept[None][0], None, None, None, bank)  # a view: its memory belongs to somebody else
    assert len(served) == 2
    assert torch.equal(kept, base)
    assert output.dtype == dtype
    torch.testing.assert_close(outcome.scores().double(), scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outcome.weights().double(), weights, rtol=1e-5, atol=1e-6)
    exact = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(
        output.double(), expected, **(exact if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-4})
    )
    torch.testing.assert_close(
        aside.double(), expected, **(exact if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-6})
    )


def test_a_zero_token_is_served_the_base_plus_nothing():
    rows = F.normalize(torch.randn(6, 8), dim=1)
    block = ExpertBlock(torch.randn(6, 8), torch.randn(6, 5), 1)
    bank = Bank([block], rows, rows, Rule(3, 0.2), torch.float32)
    base = torch.randn(2, 5)
    with torch.no_grad():
        output, outcome = fused(torch.zeros(2, 8), base.clone(), None, None, None, bank)
    assert torch.equal(output, base)
    assert (outcome.scores() == 0).all()


def test_a_numba_that_does_not_work_is_named_and_done_without(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "dymoe.adapter.ops.numba.kernels", None)
    monkeypatch.delattr(numba, "kernels")
    numba._kernels.cache_clear()
    try:
        assert not numba.available()
        assert "torch's operations take its place" in caplog.text
        assert not numba.suits(torch.zeros(9, 4))
    finally:
        numba._kernels.cache_clear()
