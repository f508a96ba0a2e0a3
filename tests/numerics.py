"""Proof that a change leaves the numbers as they are: every method learns two tasks, and what it computed is compared.

    python -m tests.numerics numbers.jsonl [METHOD ..]             # train and write
    python -m tests.numerics numbers.jsonl --against tests/numerics.jsonl   # and compare with an earlier file

Each method trains the tiny model of the tests for eight steps of two pocket tasks, in float32 on one thread, with fixed
seeds and without dropout; dymoe a second time in bfloat16. One JSON line a run holds of every step the losses and
where the tokens went, and of every group its hash and the norms of its tensors. A comparison says of every method which
holds: all is equal bit for bit (the hashes too), or the numbers agree to a relative tolerance, 1e-5 in float32 and 1e-2
in bfloat16.
Shares are compared to the same tolerance of 1, since a token whose type flips changes them by a step.

Bits are comparable on one machine with one torch alone; the first line of a file says which these were.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dymoe.adapter.model import tensors_hash
from dymoe.learning.run import run
from tests.learning.tiny import save_tiny
from tests.methods.test_matrix import SETTINGS, Quiet, recipe

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
LOSSES = ("loss", "next_token", "load_balance", "exclusivity", "specialization")
SHARES = ("share_new", "share_ambiguous", "share_old", "new_group_weight", "entropy")
RUNS = [*((method, "float32") for method in SETTINGS), ("dymoe", "bfloat16")]


def learn(model: Path, folder: Path, method: str, dtype: str) -> dict[str, Any]:
    """Train one method on both tasks; returns its losses, shares and groups.

    Args:
        model: folder of the tiny model.
        folder: where the run is written.
        method: name of the method.
        dtype: of the training.
    """
    output = run(recipe(folder, model, method, None, steps_per_task=8, limit=8, dtype=dtype), display=Quiet())
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    names = [name for name in (*LOSSES, *SHARES) if name in steps[-1]]
    rows = {name: [step[name] for step in steps] for name in names}
    groups = {}
    for file in sorted(output.glob("stages/*/adapter/adapter_model.safetensors")):
        tensors = load_file(file)
        squares: dict[str, float] = {}
        for name, tensor in tensors.items():
            kind = next(part for part in name.split(".") if part.startswith("dymoe_"))
            squares[kind] = squares.get(kind, 0.0) + tensor.double().square().sum().item()
        norms = {kind: float(f"{square**0.5:.9g}") for kind, square in squares.items()}
        groups[file.parts[-3]] = {"sha256": tensors_hash(sorted(tensors.items())), "norms": norms}
    return {"method": method, "dtype": dtype, **rows, "groups": groups}


def difference(one: Any, other: Any, least: float = 0.0) -> float:
    """Largest relative difference of two numbers, or of lists and tables of the same numbers; infinite for others.

    Args:
        one: numbers.
        other: numbers.
        least: size below which a number counts as this large.
    """
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max((difference(one[key], other[key], least) for key in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((difference(a, b, least) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, float) and isinstance(other, float):
        return 0.0 if one == other else abs(one - other) / max(abs(one), abs(other), least)
    return float("inf")


def verdict(now: dict[str, Any], before: dict[str, Any]) -> tuple[bool, str]:
    """Whether one run's numbers are those of an earlier one, and in which of the two ways."""
    if now == before:
        return True, "equal bit for bit, hashes too"
    allowed = TOLERANCE[now["dtype"]]
    parts = {
        # A term that is nearly 0 is a difference of larger numbers: beside the loss it is compared to a thousandth.
        "losses": ([[run[name] for name in LOSSES if name in run] for run in (now, before)], 1e-3),
        "shares": ([[run[name] for name in SHARES if name in run] for run in (now, before)], 1.0),
        "norms": ([{name: group["norms"] for name, group in run["groups"].items()} for run in (now, before)], 0.0),
    }
    differences = {name: difference(*pair, least) for name, (pair, least) in parts.items()}
    words = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    holds = all(value <= allowed for value in differences.values())
    return holds, f"{'agrees' if holds else 'DIFFERS'}, tolerance {allowed:.0e}: {words}"


def against(file: Path, runs: list[dict[str, Any]]) -> bool:
    """Compare runs with those in an earlier file, line by line; true when all agree."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    earlier = {(row["method"], row["dtype"]): row for row in lines if "method" in row}
    agree = True
    for row in runs:
        before = earlier.get((row["method"], row["dtype"]))
        holds, words = (False, f"not in {file}") if before is None else verdict(row, before)
        agree &= holds
        print(f"{row['method']:<11} {row['dtype']:<9} {words}", flush=True)
    return agree


def main() -> None:
    """Train, write, compare; exit status 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines to write")
    parser.add_argument("methods", nargs="*", help="methods; all when none is named")
    parser.add_argument("--against", type=Path, help="an earlier file to compare with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as folder, options.file.open("w") as file:
        model = save_tiny(Path(folder) / "model")
        capability = torch.backends.cpu.get_cpu_capability()
        file.write(json.dumps({"torch": torch.__version__, "cpu": capability}) + "\n")
        for method, dtype in RUNS:
            if not options.methods or method in options.methods:
                runs.append(learn(model, Path(folder) / f"{method}-{dtype}", method, dtype))
                file.write(json.dumps(runs[-1]) + "\n")
                file.flush()
    if options.against and not against(options.against, runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
