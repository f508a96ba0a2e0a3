"""The GPU benchmark: what it times is right, and without a GPU it says so."""

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

PATH = Path(__file__).parent.parent / "benchmarks" / "gpu_bank.py"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def gpu_bank():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PATH.parent)
        return importlib.import_module("gpu_bank")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("train", [False, True])
def test_every_way_that_is_timed_computes_the_same(gpu_bank, train):
    s = gpu_bank.scene(24, 40, 3, 3, spread=True, train=train, device=DEVICE, dtype=torch.float32)
    off = gpu_bank.check(s)
    expected = {("gate", "fused"), ("bank", "dense"), ("bank", "chunked"), ("whole", "triton")}
    assert off.keys() == (expected if train else expected | {("bank", "gathered")})
    assert max(off.values()) < 1e-3, off
    for way in gpu_bank.ways(s):
        assert way.operations > 0
        assert way.bytes > 0


def test_tokens_in_runs_use_few_chunks(gpu_bank):
    shares = [
        gpu_bank.executed_share(gpu_bank.scene(64, 8, 8, 256, spread, False, DEVICE, torch.float32))
        for spread in (False, True)
    ]
    assert shares[0] < 0.5 < shares[1]


def test_without_a_gpu_it_says_so(gpu_bank, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_bank.main([])
    assert capsys.readouterr().out == "gpu_bank: no GPU that torch can use; nothing was measured\n"
