"""Keep the numbers of runs beside the docs: `python tools/keep_results.py RUN [RUN ...]` writes docs/results/NAME.json.

The file holds the run's results.json, its recipe, and from events.jsonl what the routing did while each task trained
(shares of token types and weight on the new group at the first, middle and last logged step). Then it prints, for all
files kept there, the metrics of each method as mean ± standard deviation over seeds, and the last row of each matrix.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from dymoe.files import atomic_write, read_json

SHARES = ("share_new", "share_ambiguous", "share_old", "new_group_weight", "next_token")


def routing_over_steps(events: Path) -> dict[str, dict[str, list[float]]]:
    """Task -> name -> values at the first, middle and last logged step of its training."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in events.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            rows.setdefault(event["task"], []).append(event)
    return {
        task: {
            name: [round(steps[i][name], 4) for i in (0, len(steps) // 2, len(steps) - 1)]
            for name in SHARES
            if name in steps[0]
        }
        for task, steps in rows.items()
    }


def drift(run: Path) -> dict[str, list[float]]:
    """Earlier task -> weight that its tokens put on groups added after its own, stage by stage."""
    found: dict[str, list[float]] = {}
    for file in sorted(run.glob("stages/*/routing.json")):
        stage = read_json(file)
        for task, row in stage["tasks"].items():
            if task in stage["groups"]:
                later = row["weight"][stage["groups"].index(task) + 1 :]
                found.setdefault(task, []).append(round(sum(later), 4))
    return found


def table(folder: Path) -> str:
    """The kept runs of whole streams as Markdown: metrics by method, then accuracy on each task at the end.

    "forgetting" is best earlier minus final accuracy, "drift" the share of routing weight (in percent) that a task's
    tokens put on later groups at the end; both are means over all tasks but the last.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*-[0-9].json")):
        results = read_json(file)
        runs.setdefault(results["method"], []).append(results)
    names = ("MFT", "MFN", "MAA", "BWT", "BWT_T-1")
    tasks = next(iter(runs.values()))[0]["tasks"]
    lines = [f"| method | seeds | {' | '.join(names)} | forgetting | drift |", "|---" * (len(names) + 4) + "|"]
    for method, members in runs.items():
        cells = [_mean([run["metrics"].get(name) for run in members]) for name in names]
        cells += [_mean([_earlier(run["forgetting"]) for run in members])]
        cells += [_mean([_earlier({task: 100 * row[-1] for task, row in run["drift"].items()}) for run in members])]
        lines.append(f"| {method} | {len(members)} | {' | '.join(cells)} |")
    lines += ["", f"| at the end | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for method, members in runs.items():
        last = [run.get("joint") or run["matrix"][-1] for run in members]
        lines.append(f"| {method} | {' | '.join(_mean(column) for column in zip(*last, strict=True))} |")
    return "\n".join(lines)


def _earlier(by_task: dict[str, float]) -> float | None:
    """Mean over all tasks but the last, which had nothing to lose."""
    values = list(by_task.values())[:-1]
    return statistics.mean(values) if values else None


def _mean(values: Any) -> str:
    """Mean ± standard deviation, or a dash where there is no number."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.1f}{spread}"


def main() -> None:
    """Write one file per run, then print the table."""
    target = Path(__file__).resolve().parent.parent / "docs" / "results"
    for name in sys.argv[1:]:
        run = Path(name)
        results = read_json(run / "results.json")
        results["recipe"] = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))["recipe"]
        results["training"] = routing_over_steps(run / "events.jsonl")
        results["drift"] = drift(run)
        results["recipe"].pop("output", None)
        text = json.dumps(results, ensure_ascii=False)
        atomic_write(target / f"{run.name}.json", text + "\n")
    print(table(target))


if __name__ == "__main__":
    main()
