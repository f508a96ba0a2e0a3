"""The bank's Triton forms against its formula in float64, forward and all gradients; where they run and where not."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from dymoe.adapter.ops import OPS, ExpertBlock
from dymoe.adapter.ops.triton import bank, forms, launch
from dymoe.errors import DymoeError

package = importlib.import_module("dymoe.adapter.ops.triton")  # its name is also that of the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in TOLERANCE}


def formula(x, weights, blocks):
    """y_t = sum_e w_te scale B_e A_e x_t, expert by expert, in the dtype of its arguments."""
    total, e = 0, 0
    for block in blocks:
        for i in range(block.experts):
            rows = slice(i * block.r, (i + 1) * block.r)
            total = total + block.scale * weights[..., e, None] * (x @ block.a[rows].t() @ block.b[rows])
            e += 1
    return total


def made(shapes, tokens, dtype, features=24, outputs=20, top_k=None, trained=True, shared=False):
    """Inputs, weights with at most top_k above 0 a token, and blocks of which the last learns."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for i, (experts, r) in enumerate(shapes):
        a, b = (torch.randn(experts * r, n, generator=generator).to(DEVICE, dtype) for n in (features, outputs))
        learns = trained and i == len(shapes) - 1
        blocks.append(ExpertBlock(a.requires_grad_(learns), b.requires_grad_(learns), r, scale=1.0 if i == 0 else 0.5))
    experts = sum(e for e, _ in shapes)
    weights = torch.rand(*(() if shared else tokens), experts, generator=generator)
    if top_k is not None and top_k < experts:
        weights = weights * (weights >= weights.topk(top_k).values[..., -1:])
    return torch.randn(*tokens, features, generator=generator).to(DEVICE, dtype), weights.to(DEVICE), blocks


def doubled(blocks):
    learns = [block.a.requires_grad for block in blocks]
    return [
        ExpertBlock(*(m.detach().double().requires_grad_(yes) for m in (block.a, block.b)), block.r, block.scale)
        for block, yes in zip(blocks, learns, strict=True)
    ]


def run(make, x, weights, blocks):
    """Output and the gradients of x, weights and what learns."""
    x, weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    output = make(x, weights, blocks)
    factors = torch.randint(-3, 4, output.shape, generator=torch.Generator().manual_seed(3)).to(output)
    (output * factors).sum().backward()
    return [output, x.grad, weights.grad, *(m.grad for b in blocks for m in (b.a, b.b) if m.requires_grad)]


def near(got, expected, tolerance):
    expected = expected.detach().double()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.detach().double(), expected, atol=tolerance * scale, rtol=0)


def compare(make, x, weights, blocks, tolerance, zeros_count=True):
    """All results of `make` against the formula; on request only the gradients of weights above 0."""
    wide = doubled(blocks)
    wanted = run(formula, x.double(), weights.double(), wide)
    got = run(make, x, weights, blocks)
    assert len(got) == len(wanted)
    if not zeros_count:
        wanted[2] = wanted[2] * (weights != 0)
        got[2] = got[2] * (weights != 0)
    for result, expected in zip(got, wanted, strict=True):
        near(result, expected, tolerance)


def in_form(form):
    """The bank with its frozen blocks computed in this form."""
    return lambda x, weights, blocks: bank.triton(x, weights, blocks, form=form)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=NAMES.get)
@pytest.mark.parametrize("shapes", [[(1, 1)], [(16, 4), (16, 4)], [(3, 2), (2, 5), (1, 1)], [(1, 40)]], ids=str)
def test_the_dense_form_is_the_formula(dtype, shapes):
    for tokens, shared in (((), False), ((1,), True), ((2, 7), False), ((2, 3), True), ((0,), False), ((0,), True)):
        compare(OPS["triton"], *made(shapes, tokens, dtype, shared=shared), TOLERANCE[dtype])


def test_weights_of_a_sample_for_all_its_tokens():
    x, _, blocks = made([(3, 2)], (2, 5), torch.float32)
    compare(OPS["triton"], x, torch.rand(2, 1, 3, device=DEVICE), blocks, 3e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=NAMES.get)
@pytest.mark.parametrize("top_k", [1, 5])
@pytest.mark.parametrize("shapes", [[(33, 4), (4, 2)], [(40, 1), (70, 2), (3, 5)], [(5, 32), (1, 1)]], ids=str)
def test_the_chunked_form_is_the_formula(dtype, top_k, shapes):
    """Chunks that no token uses, last chunks that are not full, tiles of tokens that are not full."""
    for tokens in ((67,), (0,)) if shapes[0] == (33, 4) and top_k == 5 else ((3,),):
        frozen = [shape for shape in shapes if forms.can_chunk(shape[1])]
        arguments = made([*frozen, shapes[-1]], tokens, dtype, features=72, outputs=136, top_k=top_k)
        compare(in_form("chunked"), *arguments, TOLERANCE[dtype], zeros_count=False)


def test_chunks_that_no_token_of_a_tile_uses_are_not_touched():
    """Poison: a chunk without weight holds NaN, its hidden values too."""
    _, _, blocks = made([(64, 4)], (1,), torch.float32, trained=False)
    x = torch.randn(130, 24, device=DEVICE)
    weights = torch.zeros(130, 64, device=DEVICE)
    weights[:64, 3], weights[64:, 20], weights[100, 40] = 0.5, 1.0, 0.25
    part = forms.Part("chunked", 4, 64, 0, 1.0)
    used, counts = forms.find_chunks(part, weights)
    assert counts.tolist() == [1, 2, 1]
    assert [used[i, :n].tolist() for i, n in enumerate(counts.tolist())] == [[0], [1, 2], [1]]
    blocks[0].a[192:] = float("nan")
    blocks[0].b[192:] = float("nan")
    output = in_form("chunked")(x, weights, blocks)
    near(output, formula(x[..., :], weights[:, :48], [ExpertBlock(blocks[0].a[:192], blocks[0].b[:192], 4)]), 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=NAMES.get)
@pytest.mark.parametrize("shapes", [[(18, 4)], [(10, 3), (5, 2)], [(1, 40)]], ids=str)
@pytest.mark.parametrize("top_k", [3, 100])
def test_the_gathered_form_is_the_formula(dtype, shapes, top_k):
    for tokens in ((2,), (0,)):
        x, weights, blocks = made(shapes, tokens, dtype, top_k=top_k, trained=False)
        with torch.no_grad():
            got = in_form("gathered")(x, weights, blocks)
        near(got, formula(x.double(), weights.double(), doubled(blocks)), TOLERANCE[dtype])


def test_a_token_without_any_weight_gets_nothing():
    for form in ("dense", "chunked", "gathered"):
        x, weights, blocks = made([(33, 4)], (2,), torch.float32, trained=False)
        weights[0] = 0
        output = in_form(form)(x, weights, blocks)
        assert (output[0] == 0).all()
        assert (output[1] != 0).any()


def test_the_form_follows_from_what_is_asked():
    def form(experts, r, tokens, graded, top_k=None, learns=False, dropout=0.0):
        matrix = torch.zeros(experts * r, 1, requires_grad=learns)
        return bank.part_of(ExpertBlock(matrix, matrix, r, dropout=dropout), tokens, 0, graded, top_k).form

    assert form(1024, 4, 1, graded=False) == "gathered"
    assert form(1024, 4, 2048, graded=False) == "chunked"
    assert form(1024, 4, 2048, graded=True) == "dense"  # every weight may get a gradient
    assert form(1024, 4, 2048, graded=True, top_k=16) == "chunked"
    assert form(1024, 4, 2048, graded=True, top_k=16, learns=True) == "dense"
    assert form(1024, 4, 1, graded=True, top_k=16, dropout=0.1, learns=True) == "dense"
    assert form(16, 4, 2048, graded=False) == "dense"
    assert form(1024, 3, 2048, graded=False) == "dense"


def test_dropout_has_its_rate_its_seed_and_its_gradient():
    """For a fixed seed the block is linear in x: its gradient is that of the mask seen in the forward pass."""
    features = 4096
    x = torch.ones(2, features, device=DEVICE, requires_grad=True)
    a = torch.eye(features, device=DEVICE)[:512].contiguous().requires_grad_()
    b = torch.eye(512, device=DEVICE).requires_grad_()
    frozen = ExpertBlock(torch.zeros(4, features, device=DEVICE), torch.zeros(4, 512, device=DEVICE), 4)
    weights = torch.ones(2, 513, device=DEVICE)

    def output():
        return bank.triton(x, weights, [frozen, ExpertBlock(a, b, 1, 1.0, 0.25)])

    torch.manual_seed(5)
    first = output()
    torch.manual_seed(5)
    assert torch.equal(first, output())
    assert not torch.equal(first, output())
    assert first.detach().unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.05  # 1024 draws: 4 standard deviations are 0.054
    factors = torch.randn_like(first)
    (first * factors).sum().backward()
    near(x.grad[:, :512], factors * first, 1e-6)
    assert (x.grad[:, 512:] == 0).all()
    mask = torch.zeros(2, features, device=DEVICE)
    mask[:, :512] = first.detach()
    near(a.grad[:, :512], factors.t() @ mask[:, :512], 1e-6)


def test_dropout_draws_anew_for_every_place():
    part = forms.Part("dense", 1, 1, 0, 1.0, dropout=0.3, seed=11)
    values = torch.arange(1.0, 6001.0, device=DEVICE)
    dropped = forms.dropped(values, part)
    kept = dropped != 0
    torch.testing.assert_close(dropped, values / 0.7 * kept)
    assert abs(float(kept.float().mean()) - 0.7) < 0.03  # 5 standard deviations
    # 2048 places a program, 512 a draw: no part repeats another.
    parts = kept[:4096].view(8, 512).float()
    assert all(0.45 < float((parts[i] == parts[j]).float().mean()) < 0.7 for i in range(8) for j in range(i))
    onto = torch.ones(6000, device=DEVICE)
    torch.testing.assert_close(forms.drop(values, part, torch.empty_like(values), onto), dropped + 1)
    assert not torch.equal(kept, forms.dropped(values, replace(part, seed=12)) != 0)


def test_only_what_the_backward_needs_is_kept():
    """Frozen experts: x is not kept, and without a gradient of the weights the hidden values are not."""

    def kept(x_learns, weights_learn, trained):
        x, weights, blocks = made([(4, 2)], (5,), torch.float32, trained=trained)
        output = bank.triton(x.requires_grad_(x_learns), weights.requires_grad_(weights_learn), blocks)
        return [tuple(t.shape) for t in output.grad_fn.next_functions[0][0].saved_tensors if t is not None]

    # flat x (5, 24), weights (5, 4), A (8, 24), B (8, 20), hidden (5, 8)
    assert kept(True, False, False) == [(5, 4), (8, 24), (8, 20)]
    assert kept(True, True, False) == [(5, 4), (8, 24), (8, 20), (5, 8)]
    assert kept(True, True, True) == [(5, 24), (5, 4), (8, 24), (8, 20), (5, 8)]


def test_frozen_experts_get_no_gradient_and_autocast_changes_nothing():
    x, weights, blocks = made([(16, 4)], (5,), torch.float32, trained=False)
    x.requires_grad_()
    plain = bank.triton(x, weights, blocks)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(plain, bank.triton(x, weights, blocks))
    plain.sum().backward()
    assert blocks[0].a.grad is None
    assert blocks[0].b.grad is None


def test_where_triton_cannot_run_the_error_says_so(monkeypatch):
    x, weights, blocks = made([(2, 2)], (3,), torch.float32)
    with pytest.raises(DymoeError, match="float64"):
        bank.triton(x.double(), weights, doubled(blocks))
    with pytest.raises(DymoeError, match=r"bfloat16, torch\.float32"):
        bank.triton(x.to(torch.bfloat16), weights, blocks)
    for form, rank in (("chunked", 3), ("gathered", 2)):
        frozen = ExpertBlock(*(torch.zeros(2 * rank, n, device=DEVICE) for n in (24, 20)), rank)
        with pytest.raises(DymoeError, match=f"no {form} form of experts of rank {rank} with gradients True"):
            bank.triton(x, weights.requires_grad_(), [frozen], form=form)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(DymoeError, match=r"on the CPU and Triton needs a GPU .*; use compute=\"stacked\""):
        bank.triton(x.cpu(), weights.detach().cpu(), blocks)
    assert "do not run on mps" in launch.missing(torch.device("mps"))
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DymoeError, match="triton is not installed"):
        bank.triton(x, weights, blocks)


def test_auto_takes_triton_on_a_gpu_alone(monkeypatch):
    x, weights, blocks = made([(2, 2)], (3,), torch.float32)
    called = []
    for name in ("triton", "stacked"):
        monkeypatch.setattr(package, name, lambda *arguments, name=name: called.append(name))
    OPS["auto"](x.cpu(), weights, blocks)
    monkeypatch.setattr(package, "suits", lambda x: True)
    OPS["auto"](x, weights, blocks, 16)
    assert called == ["stacked", "triton"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_without_spilling_registers(capability, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.adapter.compile_kernels", str(capability)]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    kernels = [json.loads(line) for line in lines]
    assert len({kernel["kernel"] for kernel in kernels}) == 15
    for kernel in kernels:
        assert kernel["local"] == 0, kernel
        assert kernel["shared"] <= 100 * 1024, kernel
