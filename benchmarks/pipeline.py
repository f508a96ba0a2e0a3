"""Does training wait for its input? Seconds to make a batch beside those of its step; pictures decoded a second.

    python benchmarks/pipeline.py

The step is forward and backward pass of the pocket model with DyMoE's first group, without the optimizer. `features`
makes the batch from cached image features, as `dymoe run` does where they fit, `pixels` decodes and scales the
pictures. The pictures of the second part are photographs of the pocket stream, enlarged to the sizes that CoIN's
datasets have, with noise that brings the JPEG files to about the usual size; they are read to RGB and made a tower's
input of 336 x 336 pixels, as LLaVA-1.5's processor does. Without a GPU, seconds are CPU seconds of one thread, which
other work on the machine leaves alone; the gain by all cores is one of wall time.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import measure
import numpy as np
import torch
from measure import ratio, spread, synchronize, write
from PIL import Image

from dymoe.images import cores, decode
from dymoe.learning.data import Data
from dymoe.learning.groups import train_group
from dymoe.learning.recipe import Training
from dymoe.methods import Stage, create
from dymoe.models import Collator, cached_features, load
from dymoe.tasks import Sample, load_stream

SIZES = {"COCO (VQAv2, GQA, Grounding)": (640, 480), "ImageNet": (500, 375), "TextVQA": (1024, 768)}  # width, height


def main() -> None:
    """Measure, print and write benchmarks/results/pipeline-cpu.json (or -gpu)."""
    parser = measure.parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[6, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    samples = load_stream("pocket-coin", tasks=["ImageNet"]).tasks[0].train[:64]
    write("pipeline", options, {"training": steps(options, samples), "pictures": pictures(options, samples)})


def steps(options: argparse.Namespace, samples: Sequence[Sample]) -> dict[str, Any]:
    """Seconds to make a batch of each size and to take its step, and the one's share of the other."""
    lvlm = load("pocket", options.dtype)
    if torch.cuda.is_available():
        lvlm.model.to("cuda")
    features, device = cached_features(lvlm), lvlm.model.device
    assert features is not None
    features.add_samples(samples)
    cached, plain = Collator(lvlm, features), Collator(lvlm)
    method = create("dymoe")
    model = train_group(lvlm.model, None, "first", method.config(Stage(1, "first", (), None)))
    model.train()
    training = Training(steps_per_task=1, dtype=options.dtype)
    found = {}
    for size in options.batches:
        part = list(samples[:size])
        data = Data(part, cached, lambda seen: None, training, device, 1)

        def step(data: Data = data, size: int = size) -> None:
            (batch,) = data.batches(batch_size=size)
            data.loss(model, batch).backward()

        made = {"features": lambda part=part: cached(part), "pixels": lambda part=part: plain(part), "step": step}
        times = in_turns(made, options.rounds)
        found[f"batch of {size}"] = {
            "seconds": {name: spread(values) for name, values in times.items()},
            "share_of_step": {name: ratio(times, name, "step") for name in ("features", "pixels")},
        }
    return found


def pictures(options: argparse.Namespace, samples: Sequence[Sample]) -> dict[str, Any]:
    """Pictures a second by one core and by all, decoded and made a tower's input."""
    from transformers import CLIPImageProcessor

    prepare = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    found = {}
    for name, size in SIZES.items():
        files = [jpeg(sample, size) for sample in samples[:8]]

        def both(file: bytes) -> Any:
            return prepare(images=[decode(file)], return_tensors="pt")

        def one_core(work: Callable[[bytes], Any] = both, files: list[bytes] = files) -> None:
            for file in files:
                work(file)

        def all_cores(work: Callable[[bytes], Any] = both, files: list[bytes] = files) -> None:
            with ThreadPoolExecutor(cores()) as pool:
                list(pool.map(work, files))

        ways = {"decoded": lambda files=files: [decode(file) for file in files], "decoded and scaled": one_core}
        times = in_turns(ways, options.rounds)
        shared = in_turns({"one": one_core, "all": all_cores}, options.rounds, time.perf_counter)
        found[f"{name}, {size[0]} x {size[1]}"] = {
            "kilobytes": round(sum(map(len, files)) / len(files) / 1000),
            "pictures_a_second_and_core": {
                way: spread([len(files) / t for t in values]) for way, values in times.items()
            },
            "times_faster_by_all_cores": ratio(shared, "one", "all"),
        }
    return {"cores": cores(), **found}


def in_turns(
    actions: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] | None = None
) -> dict[str, list[float]]:
    """Seconds of every action in every round but a first one; by default of the CPU where there is no GPU."""
    now = clock or (time.perf_counter if torch.cuda.is_available() else time.process_time)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            synchronize()
            started = now()
            action()
            synchronize()
            if turn:
                times[name].append(now() - started)
    return times


def jpeg(sample: Sample, size: tuple[int, int]) -> bytes:
    """The sample's picture in another size."""
    assert sample.image is not None
    large = np.asarray(decode(sample.image).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    noise = np.random.default_rng(0).normal(0, 12, large.shape[:2])[..., None]
    buffer = io.BytesIO()
    Image.fromarray((large + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
