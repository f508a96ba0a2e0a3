"""Which group serves each patch of a picture and each word, token by token."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
from peft import PeftModel

from dymoe.adapter import DyMoEConfig, LayerRouting
from dymoe.adapter.trace import place_of
from dymoe.analysis.learned import Learned, Tell, observe, open_run, silently
from dymoe.analysis.storage import joined
from dymoe.analysis.tokens import KINDS, PADDING, image_tokens, kinds, patch_grid, texts
from dymoe.errors import DymoeError
from dymoe.evaluation.generate import to_device
from dymoe.files import atomic_write
from dymoe.models import Collator, Lvlm
from dymoe.routing import TokenType, token_types
from dymoe.tasks import Sample

SAMPLES = 3  # of each task
TYPES = {int(kind): kind.name.lower() for kind in TokenType}
TOKEN = ("layer", "projection", "position", "kind", "text", "row", "column", "type", "group", "weight")


def overlay(
    run: str | Path | Learned,
    tasks: Sequence[str] | None = None,
    samples: int = SAMPLES,
    layer: int | None = None,
    tell: Tell = silently,
) -> pd.DataFrame:
    """Type and serving group of every token of some samples, at the stage that learned the task and at the last one.

    The samples' pictures are written as the model sees them to RUN/analysis/overlay/.

    Args:
        run: a run folder, or a run that is open.
        tasks: of these tasks; of all when None.
        samples: the first so many of each task's samples.
        layer: decoder layer, from 0; the middle one when None.
        tell: called as the work goes on.

    Returns:
        One row per sample, stage, projection and token; columns as in docs/analysis.md.

    Raises:
        DymoeError: see `open_run`; no such task or layer; a method that routes nothing; a picture cannot be written.
    """
    learned = open_run(run)
    learned.require_routing()
    chosen = [
        (task, own, sample)
        for task, own in learned.chosen_tasks(tasks)
        for sample in learned.samples(task, None)[:samples]
    ]
    last, frames = len(learned.stages), []
    for number, (task, own, sample) in enumerate(chosen):
        picture = _write_picture(learned, sample, number)
        for stage in dict.fromkeys((own.index, last)):
            learned.activate(stage)
            found = token_routing(
                learned.lvlm, learned.model, learned.collator, sample, sample.answer, layer, _dtype(learned)
            )
            frames.append(found.assign(task=task.name, sample=sample.id, picture=picture, stage=stage))
        tell(task.name, number + 1, len(chosen))
    return joined("overlay", frames)


def _dtype(learned: Learned) -> str:
    return learned.recipe.training.dtype


def token_routing(
    lvlm: Lvlm,
    peft_model: PeftModel,
    collator: Collator,
    sample: Sample,
    answer: str | None,
    layer: int | None = None,
    dtype: str = "bfloat16",
) -> pd.DataFrame:
    """Type and serving group of every token of one sample, under the groups that are active in a model in memory.

    Args:
        lvlm: the base model and its processor.
        peft_model: the model with its groups; it is left in evaluation mode.
        collator: makes the batch.
        sample: the question, with or without a picture.
        answer: what stands behind the prompt, for example the generated answer; None or "" for the prompt alone.
        layer: decoder layer, from 0; the middle one when None.
        dtype: of autocast; ``float32`` switches it off.

    Returns:
        One row per projection and token: layer, projection, position (from 0), kind ("image", "instruction" or
        "answer"), text, row and column of the patch (-1 for words, and where the patches are no plain grid), type
        ("new", "ambiguous" or "old" with the newest active group as new; "" for a gate without scores), group (the one
        with most weight; "" where none has any) and weight (of that group, 0..1).

    Raises:
        DymoeError: a sample that the collator refuses, no such layer, or no layer with experts.
    """
    batch = collator([replace(sample, answer=answer, turns=())]) if answer else collator.prompts([sample])
    batch = to_device(batch, cast(Any, lvlm.model).device)
    layers = sorted({place_of(one.name)[0] for one in cast(Any, peft_model.base_model).layers()})
    number = layers[len(layers) // 2] if layer is None else layer
    if number not in layers:
        raise DymoeError(f"layer {number}: the experts sit in layers {layers[0]} to {layers[-1]}")
    tokens = _described(lvlm, batch)
    newest = cast(DyMoEConfig, peft_model.peft_config[cast(Any, peft_model.base_model).stage[-1]])
    rows: list[dict[str, Any]] = []

    def note(routing: LayerRouting) -> None:
        place, projection = place_of(routing.layer)
        if place == number and routing.weights[..., 0].numel() == batch["input_ids"].numel():
            served = _served(routing, newest.tau)
            rows.extend(
                {"layer": place, "projection": projection, **token, **by}
                for token, by in zip(tokens, served, strict=True)
                if token["kind"]
            )

    observe(peft_model, batch, note, dtype)
    if not rows:
        raise DymoeError(f"layer {number}: none of the active groups has experts there; give another layer")
    return pd.DataFrame(rows, columns=[*TOKEN])


def _described(lvlm: Lvlm, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Position, kind, text and patch of each token of a batch of one."""
    images = image_tokens(lvlm)
    ids, parts = batch["input_ids"][0].tolist(), kinds(batch, images)[0].tolist()
    patches = parts.count(KINDS.index("image"))
    grid = patch_grid(batch, patches)
    found, seen = [], 0
    for position, (part, text) in enumerate(zip(parts, texts(lvlm, ids, images), strict=True)):
        row = column = -1
        kind = "" if part == PADDING else KINDS[part]
        if kind == "image":
            row, column = divmod(seen, grid[1]) if grid is not None else (-1, -1)
            seen += 1
        found.append({"position": position, "kind": kind, "text": text, "row": row, "column": column})
    return found


def _served(routing: LayerRouting, tau: float) -> list[dict[str, Any]]:
    """Type, group and the group's weight of each token."""
    weights = routing.weights.reshape(-1, routing.weights.shape[-1]).float()
    by_group = [part.sum(-1).tolist() for part in weights.split(list(routing.sizes), dim=-1)]
    types = [""] * len(weights)
    if routing.scores is not None:
        scores = routing.scores.reshape(-1, routing.scores.shape[-1])
        types = [TYPES[kind] for kind in token_types(scores, routing.sizes[-1], tau).tolist()]
    found = []
    for kind, *row in zip(types, *by_group, strict=True):
        most = max(row)
        group = routing.groups[row.index(most)] if most > 0 else ""
        found.append({"type": kind, "group": group, "weight": most})
    return found


def _write_picture(learned: Learned, sample: Sample, number: int) -> str:
    """The sample's picture in RUN/analysis/overlay/; its name there, "" for a question of text alone."""
    if not sample.has_image:
        return ""
    name = f"{number}.webp"
    buffer = io.BytesIO()
    seen_picture(learned.lvlm, sample).save(buffer, "WEBP", quality=90)
    atomic_write(learned.path / "analysis" / "overlay" / name, buffer.getvalue())
    return name


def seen_picture(lvlm: Lvlm, sample: Sample) -> Any:
    """The picture of a sample as the model sees it, scaled and cut, so that patches lie where they belong.

    Returns:
        A PIL image; the picture as it is where the processor makes several crops or patches of it.

    Raises:
        DymoeError: the picture is broken.
    """
    import numpy as np
    from PIL import Image

    from dymoe.models.images import decode

    picture = decode(cast(bytes, sample.image))
    processor: Any = lvlm.processor.image_processor  # type: ignore[attr-defined]
    made = np.asarray(processor(images=[picture], return_tensors="np")["pixel_values"])
    if made.ndim != 4 or made.shape[:2] != (1, 3):
        return picture
    pixels = made[0].transpose(1, 2, 0)
    if processor.do_normalize:
        pixels = pixels * np.array(processor.image_std) + np.array(processor.image_mean)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype("uint8"))
