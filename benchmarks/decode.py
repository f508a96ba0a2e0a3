"""Tokens a second of greedy decoding with an expert bank against the base alone, side by side.

Random weights at a real model's shapes; the decoder's layers alone (no vocabulary), a cache that holds a prompt, one
token a row and step. On a GPU the rows also say how many bytes of weights were read a second, against the measured
ceiling: `counts.decode_bytes`.
"""

import statistics
from collections.abc import Callable
from typing import Any

import measure
import torch
from counts import SHAPES, decode_bytes, linears
from measure import interleaved, ratio, spread, write
from transformers import DynamicCache

from models import decoder, with_group


def steps(model: Any, rows: int, prompt: int, new: int, device: str, size: int) -> Callable[[], None]:
    """A function that fills the cache with a prompt and decodes `new` tokens a row."""
    torch.manual_seed(1)
    x = torch.randn(rows, prompt, size).to(device, torch.bfloat16)
    token = torch.randn(rows, 1, size).to(device, torch.bfloat16)
    cache = DynamicCache()
    with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16):
        model(None, None, None, cache, inputs_embeds=x, use_cache=True)  # by position: its name changes

    def run() -> None:
        with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16):
            for _ in range(new):
                model(None, None, None, cache, inputs_embeds=token, use_cache=True)
            cache.crop(-new)

    return run


def main() -> None:
    """Measure and write benchmarks/results/decode-*.json."""
    gpu = torch.cuda.is_available()
    parser = measure.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llava-7b" if gpu else "smollm2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=50)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--name", default="decode")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if gpu else "cpu"
    size = SHAPES[options.shape]["hidden_size"]
    base: Any = decoder(options.shape, options.layers, device).eval()
    model: Any = decoder(options.shape, options.layers, device)
    best = measure.ceilings() if gpu else {}
    results = []
    for tasks in range(1, max(options.tasks) + 1):
        model = with_group(model, tasks)
        if tasks not in options.tasks:
            continue
        model.eval()
        for rows in options.rows:
            arguments = (rows, options.prompt, options.new, device, size)
            actions = {"base": steps(base, *arguments)}
            actions["dymoe"] = steps(model, *arguments)
            pairs = [decode_bytes(*pair, tasks, rows, True) for pair in linears(options.shape)]
            read = {"base": sum(base for base, _ in pairs), "dymoe": sum(map(sum, pairs))}
            times = interleaved(actions, options.rounds)
            count = rows * options.new
            speeds = {name: [count / value for value in values] for name, values in times.items()}
            row: dict[str, Any] = {"tasks": tasks, "rows": rows}
            row["tokens a second"] = {name: spread(values) for name, values in speeds.items()}
            row["dymoe / base"] = ratio(speeds, "dymoe", "base")
            if best:
                rates = {
                    name: read[name] * options.layers * options.new / statistics.median(times[name]) for name in actions
                }
                row["bytes a second"] = {name: float(f"{rate:.4g}") for name, rate in rates.items()}
                row["of ceiling"] = {name: round(rate / best["bytes a second"], 3) for name, rate in rates.items()}
            results.append(row)
    write(options.name, options, {"ceilings": best, "rows": results})


if __name__ == "__main__":
    main()
