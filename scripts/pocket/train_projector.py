"""Train the pocket model's projector on captions: `python -m scripts.pocket.train_projector`.

Only the projector (linear, GELU, linear) learns; tower and language model stay frozen, as in the first stage of
LLaVA. The tower's maps are computed once. A fixed normalisation of the 1280 channels, measured on the training
images, makes the maps well scaled and is folded into the first linear layer at the end, so that the shipped file is
a plain FastVLM projector. Writes the weights (bf16) and a JSON record of what was done and reached.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch.nn import functional

from dymoe.errors import DymoeError
from dymoe.files import atomic_json, atomic_write
from dymoe.models import pocket
from dymoe.models.collate import IGNORE, Collator
from dymoe.models.features import ImageFeatures
from dymoe.models.model import Lvlm, freeze
from dymoe.tasks import Sample
from scripts.pocket import captions

QUESTION = "Describe the picture."


class TowerMaps(ImageFeatures):
    """The tower's maps before the projector, (16, 1280) an image, in the place of finished image tokens."""

    def _encode(self, inputs: dict[str, Any]) -> Sequence[torch.Tensor]:
        model = cast(Any, self._lvlm.model)
        with torch.no_grad():
            maps = model.model.vision_tower(inputs["pixel_values"].to(model.dtype), return_dict=True).last_hidden_state
        return cast(Any, maps.flatten(2).permute(0, 2, 1))


class Projector(torch.nn.Module):
    """FastVLM's projector in fp32 with a fixed normalisation of its input in front."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor, width: int, scale: float, seed: int) -> None:
        """`mean`, `deviation`: (1280,) of the tower's channels; `scale`: the output's deviation at the start."""
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", deviation.float())
        self.linear_1 = torch.nn.Linear(pocket.TOWER_WIDTH, width)
        self.linear_2 = torch.nn.Linear(width, width)
        with torch.no_grad():  # unit variance through the first layer, `scale` through the second
            self.linear_1.weight.normal_(0, 1 / math.sqrt(pocket.TOWER_WIDTH), generator=_generator(seed))
            self.linear_2.weight.normal_(0, scale * math.sqrt(2 / width), generator=_generator(seed + 1))
            self.linear_1.bias.zero_()
            self.linear_2.bias.zero_()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(..., 1280) maps to (..., width) image tokens."""
        x = (maps.float() - self.mean) / self.deviation
        return self.linear_2(functional.gelu(self.linear_1(x)))

    def folded(self) -> dict[str, torch.Tensor]:
        """The same function as a plain projector's weights: W / sigma and b - W (mu / sigma) in the first layer."""
        weight = self.linear_1.weight.detach() / self.deviation
        bias = self.linear_1.bias.detach() - weight @ self.mean
        second = self.linear_2
        return {
            "linear_1.weight": weight,
            "linear_1.bias": bias,
            "linear_2.weight": second.weight.detach().clone(),
            "linear_2.bias": second.bias.detach().clone(),
        }


@dataclass
class Plan:
    """What to train on and for how long."""

    train_pairs: int = 8000
    held_out_pairs: int = 200
    steps: int = 900
    batch: int = 16
    learning_rate: float = 1.5e-3
    warmup: int = 20
    seed: int = 0
    output: Path = field(default_factory=lambda: pocket.PROJECTOR)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(pairs: Sequence[captions.Pair]) -> list[Sample]:
    """Caption pairs as samples that ask for a description."""
    return [
        Sample(f"{pair.kind}-{number}", pair.image, QUESTION, pair.caption, {}) for number, pair in enumerate(pairs)
    ]


def caption_loss(model: Any, project: Any, batch: dict[str, Any], reduction: str = "mean") -> torch.Tensor:
    """Next-token cross entropy (nats) on the caption and its end token; `project` maps tower maps to tokens.

    The answers end the rows, so only the last positions' logits are computed.
    """
    labels = batch.pop("labels")
    image = batch["mm_encoder_outputs"]["image"]
    image["pooler_output"] = project(image.pooler_output).to(model.dtype)
    keep = int((labels != IGNORE).sum(dim=1).max())
    logits = model(**batch, logits_to_keep=keep + 1, use_cache=False).logits[:, :-1]
    targets = labels[:, -keep:]
    return functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction
    )


@torch.no_grad()
def held_out_loss(model: Any, project: Any, collator: Collator, items: Sequence[Sample]) -> dict[str, float]:
    """Mean caption loss per token over `items`: of "all" and of each kind of pair."""
    sums: dict[str, list[float]] = {"all": [0.0, 0.0]}
    for kind in sorted({_kind(item) for item in items}):
        part = [item for item in items if _kind(item) == kind]
        for start in range(0, len(part), 32):
            batch = collator(part[start : start + 32])
            tokens = float((batch["labels"] != IGNORE).sum())
            loss = float(caption_loss(model, project, batch, "sum"))
            for name in ("all", kind):
                before = sums.setdefault(name, [0.0, 0.0])
                sums[name] = [before[0] + loss, before[1] + tokens]
    return {name: round(loss / tokens, 4) for name, (loss, tokens) in sums.items()}


def _kind(item: Sample) -> str:
    return item.id.split("-")[0]


@torch.no_grad()
def describe(lvlm: Lvlm, project: Any, collator: Collator, items: Sequence[Sample]) -> list[str]:
    """Greedy captions of `items`."""
    batch = collator.prompts(items)
    image = batch["mm_encoder_outputs"]["image"]
    image["pooler_output"] = project(image.pooler_output).to(lvlm.model.dtype)
    output = cast(Any, lvlm.model).generate(**batch, max_new_tokens=24, do_sample=False)
    texts = cast(Any, lvlm.processor).tokenizer.batch_decode(
        output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


def channel_statistics(maps: TowerMaps, items: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel over images and positions, (1280,) each."""
    stack = torch.stack([maps.get(item.image) for item in items[:2000] if item.image is not None]).float()
    flat = stack.flatten(0, 1)
    return flat.mean(dim=0), flat.std(dim=0).clamp_min(1e-3)


def train(model: Any, projector: Projector, collator: Collator, items: Sequence[Sample], plan: Plan) -> None:
    """AdamW on the projector, linear warm-up and cosine decay, gradients clipped to norm 1."""
    optimizer = torch.optim.AdamW(projector.parameters(), plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def factor(step: int) -> float:
        if step < plan.warmup:
            return (step + 1) / plan.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - plan.warmup) / max(1, plan.steps - plan.warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order: list[int] = []
    generator, running, start = _generator(plan.seed), 0.0, time.monotonic()
    for step in range(plan.steps):
        if len(order) < plan.batch:
            order = torch.randperm(len(items), generator=generator).tolist()
        chosen, order = order[: plan.batch], order[plan.batch :]
        loss = caption_loss(model, projector, collator([items[index] for index in chosen]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += float(loss.detach())
        if (step + 1) % 25 == 0:
            print(f"step {step + 1} loss {running / 25:.3f} {time.monotonic() - start:.0f} s", flush=True)
            running = 0.0


def run(plan: Plan) -> dict[str, Any]:
    """Train, measure and write the projector and its record; return the record."""
    started = time.monotonic()
    torch.manual_seed(plan.seed)
    model, processor = pocket.assemble(torch.bfloat16, projector=pocket.random_projector(576, plan.seed))
    lvlm = Lvlm(freeze(model), processor)
    train_stock, held_stock = captions.stocks()
    items = samples(captions.pairs(train_stock, plan.train_pairs, plan.seed))
    held_out = samples(captions.pairs(held_stock, plan.held_out_pairs, plan.seed + 1))
    maps = TowerMaps(lvlm)
    maps.add_samples([*items, *held_out])
    print(f"{len(items)} + {len(held_out)} pairs, tower done after {time.monotonic() - started:.0f} s", flush=True)
    collator = Collator(lvlm, maps)
    scale = float(cast(Any, model).get_input_embeddings().weight.float().std())
    projector = Projector(*channel_statistics(maps, items), 576, scale, plan.seed)
    plain: Any = cast(Any, model).model.multi_modal_projector
    before = held_out_loss(model, plain, collator, held_out)
    print("before", before, flush=True)
    train(model, projector, collator, items, plan)
    state = {key: value.to(torch.bfloat16).contiguous() for key, value in projector.folded().items()}
    plain.load_state_dict(state)  # measured as shipped: folded, in bf16
    after = held_out_loss(model, plain, collator, held_out)
    shown = held_out[:16]
    record = {
        "command": "python -m scripts.pocket.train_projector",
        "pairs": {"train": len(items), "held_out": len(held_out)},
        "steps": plan.steps,
        "batch": plan.batch,
        "learning_rate": plan.learning_rate,
        "seed": plan.seed,
        "held_out_loss": {"unit": "nats per token", "before": before, "after": after},
        "captions": [
            {"kind": _kind(item), "true": item.answer, "generated": text}
            for item, text in zip(shown, describe(lvlm, plain, collator, shown), strict=True)
        ],
        "seconds": round(time.monotonic() - started),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    notes = {"seed": plan.seed, "steps": plan.steps, "before": before["all"], "after": after["all"]}
    atomic_write(plan.output, save(state, metadata={key: json.dumps(value) for key, value in notes.items()}))
    atomic_json(plan.output.with_suffix(".json"), record)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the defaults are the shipped projector's."""
    parser = argparse.ArgumentParser(prog="scripts.pocket.train_projector", description=__doc__)
    plan = Plan()
    for name in ("train_pairs", "held_out_pairs", "steps", "batch", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(plan, name))
    parser.add_argument("--learning-rate", type=float, default=plan.learning_rate)
    parser.add_argument("--output", type=Path, default=plan.output, help="the .safetensors file to write")
    try:
        record = run(Plan(**vars(parser.parse_args(arguments))))
    except DymoeError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
