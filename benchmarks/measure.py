"""What all benchmarks share: interleaved timing, medians and spread, the machine, the results file."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
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
        "versions": {name: _version(name) for name in ("torch", "transformers", "peft", "numba")},
        "command": " ".join(["python", str(Path("benchmarks", Path(sys.argv[0]).name)), *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # numba may be missing
        return None


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--threads", type=int, default=1, help="CPU threads")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file that is written")
    return made


def without_numba(made: argparse.ArgumentParser) -> None:
    """Add the option `--without-numba`; `by_torch` obeys it."""
    made.add_argument("--without-numba", action="store_true", help="as where Numba is not installed")


def by_torch(options: argparse.Namespace) -> None:
    """Do without Numba where `--without-numba` was given."""
    if options.without_numba:
        from dymoe.adapter.ops import numba

        numba.available = lambda: False  # type: ignore[assignment]


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
