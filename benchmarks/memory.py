"""Memory that a training step takes: our bank against plain PEFT LoRA of the same rank, with and without checkpointing.

Two measures. *Saved*: bytes that the step's graph keeps for its backward pass beyond parameters, every storage once
(torch.autograd.graph.saved_tensors_hooks); exact, the same on every machine. *Peak*: the most that a step allocates
beyond what is there before it, by the GPU's allocator or, on a CPU, by torch's memory profiler.
"""

import gc
from collections.abc import Callable
from typing import Any

import measure
import torch
from counts import SHAPES
from measure import write
from step import Steps
from torch import Tensor
from torch.profiler import profile

from models import decoder, with_group, with_lora


def saved_bytes(model: Any, step: Callable[[], None]) -> int:
    """Bytes kept for the backward pass, without the parameters and what frozen groups are packed in."""
    kept: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        for pack in getattr(module, "_packs", {}).values():
            parts = [tensor for block in pack.blocks for tensor in (block.a, block.b)]
            known |= {tensor.untyped_storage().data_ptr() for tensor in [*parts, pack.rows]}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(kept.values())


def peak_bytes(step: Callable[[], None]) -> int:
    """Most bytes that are allocated during the step beyond those before it."""
    if torch.cuda.is_available():
        gc.collect()  # what an earlier model left must not go during the step
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as measured:
        step()
    now = most = 0
    for event in sorted(measured.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def main() -> None:
    """Measure and write benchmarks/results/memory-*.json."""
    gpu = torch.cuda.is_available()
    parser = measure.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llava-7b" if gpu else "smollm2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4 if gpu else 6)
    parser.add_argument("--tokens", type=int, default=640 if gpu else 50)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if gpu else "cpu"
    rows = []
    for checkpointing in (False, True):
        for name, tasks in [("lora", 1), *(("dymoe", tasks) for tasks in options.tasks)]:
            model: Any = decoder(options.shape, options.layers, device)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if name == "lora":
                model = with_lora(model)
            else:
                for task in range(1, tasks + 1):
                    model = with_group(model, task)
            model.train()
            step = Steps(options, device).of(model)
            step()
            row: dict[str, Any] = {"method": name, "tasks": tasks, "checkpointing": checkpointing}
            row |= {"saved bytes": saved_bytes(model, step), "peak bytes": peak_bytes(step)}
            rows.append(row)
            lora = next(r for r in rows if r["method"] == "lora" and r["checkpointing"] == checkpointing)
            for key in ("saved", "peak"):
                row[f"{key} / lora"] = round(row[f"{key} bytes"] / lora[f"{key} bytes"], 3)
    write("memory", options, {"rows": rows})


if __name__ == "__main__":
    main()
