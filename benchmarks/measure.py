"""What all benchmarks share: interleaved timing, medians and spread, the machine, the results file."""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dymoe.files import atomic_json

RESULTS = Path(__file__).parent / "results"


def interleaved(actions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every action in every round; the actions take turns, so that all meet the same disturbances."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warmup + rounds):
        for name, action in actions.items():
            synchronize()
            started = time.perf_counter()
            action()
            synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return times


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ceilings(size: int = 2**30, side: int = 8192, times: int = 20) -> dict[str, float]:
    """What the machine does at best: bytes a second of a large copy, operations a second of a large bfloat16 product.

    Args:
        size: bytes of the copy; each is read and written.
        side: rows and columns of the product's matrices.
        times: calls in a row, of which the mean counts; the median of ten such means is given.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in "ab")
    calls = {"bytes a second": lambda: target.copy_(source), "operations a second": lambda: left @ right}
    amounts = {"bytes a second": 2.0 * size, "operations a second": 2.0 * side**3}

    def repeated(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                call()

        return run

    seconds = interleaved({name: repeated(call) for name, call in calls.items()}, 10)
    return {name: amounts[name] * times / statistics.median(values) for name, values in seconds.items()}


def fits(action: Callable[[], Any]) -> bool:
    """Do it once; false where the GPU's memory did not hold it, which is free again then."""
    try:
        action()
    except torch.OutOfMemoryError:
        pass
    else:
        return True
    gc.collect()  # after the handler, whose traceback holds the graph
    torch.cuda.empty_cache()
    return False


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles, rounded to four significant digits."""
    low, _, high = statistics.quantiles(values) if len(values) > 3 else (min(values), None, max(values))
    return {
        "median": float(f"{statistics.median(values):.4g}"),
        "low": float(f"{low:.4g}"),
        "high": float(f"{high:.4g}"),
    }


def ratio(times: Mapping[str, list[float]], above: str, below: str) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios of two actions."""
    return spread([a / b for a, b in zip(times[above], times[below], strict=True)])


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, threads, GPU, versions and the command."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": name,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "command": " ".join(["python", str(Path("benchmarks", Path(sys.argv[0]).name)), *sys.argv[1:]]),
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--threads", type=int, default=1, help="CPU threads")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file that is written")
    return made


def write(name: str, options: argparse.Namespace, results: Mapping[str, Any]) -> Path:
    """Write NAME-cpu.json or NAME-gpu.json into the folder of results; print and return its path."""
    folder = options.results
    used = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    del used["results"]
    target = folder / f"{name}-{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_json(target, {"machine": machine(), "options": used, **results})
    print(json.dumps(results, indent=1))
    print(target)
    return target
