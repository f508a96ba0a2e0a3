"""Seconds of a training step: our bank, plain PEFT LoRA, the frozen base and a loop over experts, side by side.

Random weights at a real model's shapes (speed does not depend on their values; random routers send most tokens to the
old groups, as learned ones do in later tasks). The step is a forward and a backward pass of the decoder's layers, to
the weights that learn and to the inputs, without vocabulary and optimizer. The regularization runs at full scale, which
in training it does only in a task's second half.

On a GPU the rows also say how many operations a second were achieved, against the measured ceiling: products of the
linears and of the bank's `one_side` (attention and the rest not counted). The loop keeps every expert's output for its
backward pass; where the GPU's memory does not hold that, the row says so.

`counted` is the base's own step plus the bank's floating-point operations at the speed that the base's own products
reach here; the operations are those of `counts.Counts.one_side`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import measure
import torch
from counts import SHAPES, Counts, linears
from measure import interleaved, ratio, spread, synchronize, write
from torch import nn

from dymoe.adapter import DyMoELayer
from models import decoder, with_group, with_lora


class Steps:
    """One training step of a model on fixed inputs."""

    def __init__(self, options: argparse.Namespace, device: str) -> None:
        size = SHAPES[options.shape]["hidden_size"]
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(options.batch, options.tokens, size, generator=generator).to(device, torch.bfloat16)
        self.mask = torch.ones(options.batch, options.tokens, dtype=torch.long, device=device)
        self.device = device

    def of(self, model: Any) -> Callable[[], None]:
        """The step as a function; an expert bank's loss terms are attached."""
        trace = getattr(getattr(model, "base_model", None), "trace", None)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        inputs = self.x.clone().requires_grad_(True)

        def step() -> None:
            with torch.autocast(self.device, dtype=torch.bfloat16):
                states = model(inputs_embeds=inputs, attention_mask=self.mask, use_cache=False).last_hidden_state
                loss = states[:, -4:].float().square().mean()
            if trace is not None:
                loss = trace.attach(loss)
            loss.backward()
            inputs.grad = None
            for parameter in trained:
                parameter.grad = None

        return step


def base_speed(options: argparse.Namespace, device: str) -> float:
    """Operations a second of the base's own products, forward and to the inputs, at these shapes."""
    tokens, operations, seconds = options.batch * options.tokens, 0.0, 0.0
    for inside, outside in linears(options.shape):
        x = torch.randn(tokens, inside, device=device).bfloat16()
        weight, back = torch.randn(outside, inside, device=device).bfloat16(), torch.randn(tokens, outside).to(x)
        times = []
        for _ in range(30):
            synchronize()
            started = time.perf_counter()
            nn.functional.linear(x, weight)
            back @ weight
            synchronize()
            times.append(time.perf_counter() - started)
        operations += 4.0 * tokens * inside * outside
        seconds += statistics.median(times)
    return operations / seconds


def operations(options: argparse.Namespace, tasks: int, share: float) -> dict[str, float]:
    """Operations of a step's products by method, `share` of the tokens on the new group."""
    rows, number = [Counts(*pair) for pair in linears(options.shape)], options.batch * options.tokens * options.layers
    base = float(sum(row.base for row in rows))
    added = {"base": 0.0, "lora": sum(row.lora() for row in rows)}
    added["dymoe"] = sum(row.one_side(tasks, share) for row in rows)
    added["incmoelora"] = sum(row.dense(tasks) for row in rows)
    return {name: (base + more) * number for name, more in added.items()}


def configured(model: Any, **values: Any) -> None:
    """Set fields of the training group's config in every wrapped layer."""
    for layer in model.modules():
        if isinstance(layer, DyMoELayer):
            for name, value in values.items():
                setattr(layer.group_configs[layer.training_group], name, value)


def main() -> None:
    """Measure and write benchmarks/results/step-*.json."""
    parser = measure.parser(__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="llava-7b" if gpu else "smollm2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4 if gpu else 6)
    parser.add_argument("--tokens", type=int, default=640 if gpu else 50)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quiet-steps", action="store_true", help="steps whose statistics nobody reads, as most are")
    parser.add_argument("--loop-to", type=int, default=8, help="most tasks for which the loop over experts is timed")
    parser.add_argument("--profile", action="store_true", help="print where our step's time goes, by torch's profiler")
    parser.add_argument("--name", default="step")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if gpu else "cpu"
    steps = Steps(options, device)
    base = steps.of(decoder(options.shape, options.layers, device))
    lora = steps.of(with_lora(decoder(options.shape, options.layers, device)).train())
    model: Any = decoder(options.shape, options.layers, device)
    incremental = {"guidance": "none", "exclusivity": 0.0, "specialization": 0.0}
    ours = {"guidance": "exclusive", "exclusivity": 1e-3, "specialization": 1e-3}
    rows: list[dict[str, Any]] = []
    speed = base_speed(options, device)
    best = measure.ceilings() if gpu else {}
    loop_fits = True
    for tasks in range(1, max(options.tasks) + 1):
        model = with_group(model, tasks).train()
        model.base_model.trace.context.collect = not options.quiet_steps
        if tasks not in options.tasks:
            continue
        step = steps.of(model)

        def with_settings(step: Callable[[], None] = step, model: Any = model, **settings: Any) -> Callable[[], None]:
            def run() -> None:
                configured(model, **settings)
                step()

            return run

        actions = {"base": base, "lora": lora}
        actions["dymoe"] = with_settings(compute="stacked", **ours)
        actions["incmoelora"] = with_settings(compute="stacked", **incremental)
        loop = with_settings(compute="reference", **ours)
        if tasks <= options.loop_to:
            loop_fits = loop_fits and measure.fits(loop)
            if loop_fits:
                actions["loop"] = loop
        times = interleaved(actions, options.rounds)
        if options.profile:
            with torch.profiler.profile() as profile:
                actions["dymoe"]()
                synchronize()
            order = "self_device_time_total" if gpu else "self_cpu_time_total"
            print(profile.key_averages().table(sort_by=order, row_limit=25))
        row: dict[str, Any] = {"tasks": tasks, "seconds": {name: spread(values) for name, values in times.items()}}
        model.base_model.trace.context.collect = True
        step()
        share = model.base_model.trace.summary()["share_new"]
        work = operations(options, tasks, share)
        bank = (work["dymoe"] - work["base"]) / speed
        row["share of tokens on the new group"] = round(share, 3)
        pairs = zip(times["dymoe"], times["base"], strict=True)
        row["dymoe / counted"] = spread([a / (b + bank) for a, b in pairs])
        for other in ("lora", "base", "incmoelora"):
            row[f"dymoe / {other}"] = ratio(times, "dymoe", other)
        if best:
            rates = {name: work[name] / statistics.median(times[name]) for name in actions if name != "loop"}
            row["operations a second"] = {name: float(f"{rate:.4g}") for name, rate in rates.items()}
            row["of ceiling"] = {name: round(rate / best["operations a second"], 3) for name, rate in rates.items()}
        if tasks <= options.loop_to and not loop_fits:
            row["loop"] = "does not fit the GPU's memory"
        if "loop" in times:
            own = [(a - b) / (c - b) for a, b, c in zip(times["loop"], times["base"], times["dymoe"], strict=True)]
            row["adapter's own time, loop / dymoe"] = spread(own)
        rows.append(row)
        print(
            f"{tasks} tasks",
            {name: value["median"] for name, value in row["seconds"].items()},
            file=sys.stderr,
            flush=True,
        )
    write(
        options.name,
        options,
        {
            "base's products, GFLOP/s": round(speed / 1e9, 1),
            "ceilings": best,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
