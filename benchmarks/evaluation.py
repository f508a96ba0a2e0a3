"""How much faster than one question after the other an evaluation is, and whether the answers are the same.

    python benchmarks/evaluation.py          # learns two tasks for some steps, then asks 120 questions, 500 on a GPU
    python benchmarks/evaluation.py --run runs/dymoe-seed0 --samples 500 --batch-size 125 --dtype bfloat16

Three ways take turns in one process, each on the same questions of several tasks (see docs/performance.md):

- `expert by expert`: what the field's evaluation scripts do. One prompt at a time through transformers' `generate` with
  its cache, the picture through the tower each time, and a bank that computes its experts one after the other.
- `one by one`: the same with this package's bank.
- `ours`: `dymoe.evaluation`, from an empty image cache in every round.

A round's slow ways answer the round's share of the questions, so that all rounds together answer each question once.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import torch
from measure import spread, synchronize, write

from dymoe.evaluation.generate import autocast, generate, to_device
from dymoe.learning.groups import freeze_all, load_group
from dymoe.learning.recipe import load_recipe
from dymoe.learning.run import run
from dymoe.models import Collator, Lvlm, cached_features, load
from dymoe.tasks import Sample, Task, load_stream

RECIPES = Path(__file__).parent.parent / "recipes" / "pocket"
Asked = list[tuple[Task, list[Sample]]]


def main() -> None:
    """Measure, print and write benchmarks/results/evaluation-cpu.json (or -gpu)."""
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        lvlm, model, groups = learned(options, Path(folder))
    asked = questions(options)
    count = sum(len(samples) for _, samples in asked)
    collator = Collator(lvlm)
    ways: dict[str, Callable[[Asked], dict[str, str]]] = {
        "ours": lambda part: ours(lvlm, model, part, options),
        "one by one": lambda part: one_by_one(lvlm, collator, part, options.dtype),
        "expert by expert": lambda part: expert_by_expert(lvlm, model, collator, part, options.dtype),
    }
    warm = [(task, samples[:1]) for task, samples in asked]
    for way in ways.values():
        way(warm)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, dict[str, str]] = {name: {} for name in ways}
    for turn in range(options.rounds):
        share = [(task, samples[turn :: options.rounds]) for task, samples in asked]
        for name, way in ways.items():
            part = asked if name == "ours" else share
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            answers[name].update(way(part))
            synchronize()
            size = sum(len(samples) for _, samples in part)
            seconds[name].append((time.perf_counter() - wall) / size)
            work[name].append((time.process_time() - cpu) / size)
            print(f"round {turn + 1}: {name}: {seconds[name][-1]:.4f} s a question", flush=True)
    same = {name: sum(found[key] == answers["ours"][key] for key in found) for name, found in answers.items()}
    results = {
        "questions": count,
        "tasks": [task.name for task, _ in asked],
        "model": options.model,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "groups": groups,
        "rounds": options.rounds,
        "seconds_a_question": {name: spread(values) for name, values in seconds.items()},
        "cpu_seconds_a_question": {name: spread(values) for name, values in work.items()},
        "times_faster": ratios(seconds),
        "times_faster_by_cpu_seconds": ratios(work),
        "answers_equal_to_ours": {name: f"{same[name]} of {len(answers[name])}" for name in ways if name != "ours"},
    }
    write(options.name, options, results)
    if options.dtype == "float32" and any(same[name] != len(answers[name]) for name in ways):
        raise SystemExit("answers differ under float32")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = measure.parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="pocket", help="as in a recipe")
    parser.add_argument("--stream", default="pocket-coin", help="as in a recipe")
    parser.add_argument("--tasks", nargs="+", default=["ScienceQA", "ImageNet", "Grounding", "VQAv2"])
    gpu = torch.cuda.is_available()
    parser.add_argument("--samples", type=int, default=500 if gpu else 120, help="questions over all tasks")
    parser.add_argument("--run", type=Path, help="a run whose groups answer; without, some steps are learned first")
    parser.add_argument("--groups", type=int, help="the run's first groups alone")
    parser.add_argument("--steps", type=int, default=20, help="steps a task where nothing is learned yet")
    parser.add_argument("--batch-size", type=int, default=125 if gpu else 30)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="evaluation", help="of the results' file")
    return parser.parse_args()


def learned(options: argparse.Namespace, folder: Path) -> tuple[Lvlm, Any, list[str]]:
    """The model with the groups of a run, and their names."""
    place = options.run
    if place is None:
        words = ["--tasks", str(options.tasks[:2]).replace("'", ""), "--output", str(folder / "run")]
        words += ["--model", options.model, "--stream", options.stream, "--evaluation.limit", "4"]
        place = run(load_recipe(RECIPES / "dymoe.yaml", [*words, "--training.steps_per_task", str(options.steps)]))
    lvlm, model = load(options.model, options.dtype), None
    stages = sorted((place / "stages").iterdir())[: options.groups]
    names = [stage.name.partition("-")[2] for stage in stages]
    for name, stage in zip(names, stages, strict=True):
        model = load_group(lvlm.model, model, name, stage / "adapter")
    freeze_all(model)
    if torch.cuda.is_available():
        lvlm.model.to("cuda")
    return lvlm, model, names


def questions(options: argparse.Namespace) -> Asked:
    """The first test samples of every task, as many of each."""
    tasks = load_stream(options.stream, tasks=options.tasks).tasks
    return [(task, list(task.test[: options.samples // len(tasks)])) for task in tasks]


def ours(lvlm: Lvlm, model: Any, asked: Asked, options: argparse.Namespace) -> dict[str, str]:
    """Answers by task and id, as `dymoe run` asks, with nothing kept from before."""
    collator = Collator(lvlm, cached_features(lvlm))
    answers: dict[str, str] = {}
    for task, samples in asked:
        trace = model.base_model.trace
        with trace.measuring():
            told = generate(
                lvlm, collator, samples, task.max_new_tokens, options.batch_size, options.dtype, context=trace.context
            )
        answers |= named(task, samples, told)
    return answers


def one_by_one(lvlm: Lvlm, collator: Collator, asked: Asked, dtype: str) -> dict[str, str]:
    """Answers of transformers' own loop on one prompt at a time, its picture read by the tower each time."""
    model: Any = lvlm.model
    words = lvlm.processor.tokenizer  # type: ignore[attr-defined]
    model.eval()
    answers: dict[str, str] = {}
    for task, samples in asked:
        told = []
        for sample in samples:
            batch = to_device(collator.prompts([sample]), model.device)
            with torch.inference_mode(), autocast(model.device.type, dtype):
                tokens = model.generate(
                    **batch,
                    max_new_tokens=task.max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=collator.stop_tokens,
                    pad_token_id=words.pad_token_id,
                )
            told.append(words.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        answers |= named(task, samples, told)
    return answers


def expert_by_expert(lvlm: Lvlm, model: Any, collator: Collator, asked: Asked, dtype: str) -> dict[str, str]:
    """The same with a bank that goes through its experts in a loop."""
    with computed_by(model, "reference"):
        return one_by_one(lvlm, collator, asked, dtype)


@contextmanager
def computed_by(model: Any, way: str) -> Iterator[None]:
    """Let every layer compute its bank this way."""
    configs = [config for layer in model.base_model.layers() for config in layer.group_configs.values()]
    before = [config.compute for config in configs]
    try:
        for config in configs:
            config.compute = way
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config.compute = old


def named(task: Task, samples: Sequence[Sample], told: Sequence[str]) -> dict[str, str]:
    """Answers by task and sample."""
    return {f"{task.name}/{sample.id}": answer for sample, answer in zip(samples, told, strict=True)}


def ratios(values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How often the time of ours goes into that of the others, over the rounds."""
    ours = values["ours"]
    return {
        name: spread([a / b for a, b in zip(others, ours, strict=True)])
        for name, others in values.items()
        if name != "ours"
    }


if __name__ == "__main__":
    main()
