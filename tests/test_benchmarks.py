"""The benchmarks' counts against what torch counts, and a small run of each that needs no quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dymoe import DyMoEConfig

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import counts

    return counts


class Host(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.q_proj = nn.Linear(inside, outside, bias=False)

    def forward(self, x):
        return self.q_proj(x)


@pytest.mark.parametrize("tasks", [1, 2])
def test_counted_operations_are_those_that_torch_counts(counts, tasks):
    host = Host(24, 40).requires_grad_(False)
    config = {"lora_dropout": 0.0, "guidance": "none", "load_balance": 0.0, "target_modules": ["q_proj"]}
    model = get_peft_model(host, DyMoEConfig(**config), adapter_name="task-1")
    for task in range(2, tasks + 1):
        model.add_adapter(f"task-{task}", DyMoEConfig(**config))
    x = torch.randn(2, 25, 24, requires_grad=True)
    model.train()(x).sum().backward()  # packs the frozen groups
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    expected = counts.Counts(24, 40)
    assert counter.get_total_flops() == 50 * (expected.base + expected.dense(tasks))


def test_one_side_lies_between_what_is_needed_and_dense(counts):
    for shape in counts.SHAPES:
        for pair in counts.linears(shape):
            row = counts.Counts(*pair)
            for tasks in (1, 2, 8, 64):
                share = 1.0 if tasks == 1 else 0.1
                assert row.needed(tasks, share) <= row.one_side(tasks, share) <= row.dense(tasks)


def test_results_are_written_whatever_the_options_are(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import measure

    parser = measure.parser("")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    written = measure.write("speed", parser.parse_args(["--results", str(tmp_path), "--run", "a/b"]), {"rows": [1]})
    found = json.loads(written.read_text())
    assert found["options"] == {"threads": 1, "run": "a/b", "rounds": 3}
    assert found["rows"] == [1]


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import measure

    return measure


def test_ceilings_are_what_was_moved_and_multiplied_over_the_time(measure, monkeypatch):
    calls = []

    def timed(actions, rounds):
        calls.extend(action() for action in actions.values())
        return {name: [2.0] * rounds for name in actions}

    monkeypatch.setattr(measure, "interleaved", timed)
    found = measure.ceilings(size=100, side=8, times=3)
    assert found == {"bytes a second": 2 * 100 * 3 / 2, "operations a second": 2 * 8**3 * 3 / 2}
    assert len(calls) == 2


def test_what_does_not_fit_is_told_from_what_fails(measure):
    def too_large():
        raise torch.OutOfMemoryError("no memory left")

    assert measure.fits(lambda: None)
    assert not measure.fits(too_large)
    with pytest.raises(ZeroDivisionError):
        measure.fits(lambda: 1 / 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "step.py --layers 1 --tokens 8 --tasks 1 2 --rounds 2 --loop-to 1",
        "decode.py --layers 1 --tasks 1 2 --rounds 2 --new 2 --rows 1 2",
        "memory.py --layers 1 --tokens 8 --tasks 1 2",
        "startup.py --rounds 1",
    ],
)
def test_benchmarks_run(tmp_path, arguments):
    name, *rest = arguments.split()
    done = subprocess.run(
        [sys.executable, BENCHMARKS / name, *rest, "--results", tmp_path], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.glob("*.json")
    results = json.loads(written.read_text())
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert results.get("rows") or results["seconds"]
