"""Which group serves each patch of a picture and each word, token by token: in a frame, and drawn over the sample.

The report draws kept samples, `dymoe play` the question just asked. Each colour has a mark beside it (the group's
number, the type's letter), each patch and word says the same in words under the pointer.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from dymoe.analysis.figures import COLOURS, Figure, Key, Look, look
from dymoe.analysis.runs import Analysed
from dymoe.analysis.storage import joined
from dymoe.analysis.tokens import KINDS, PADDING, image_tokens, kinds, patch_grid, texts
from dymoe.errors import DymoeError
from dymoe.files import atomic_write, read_bytes
from dymoe.images import data_uri, decode, opened
from dymoe.numbers import number

if TYPE_CHECKING:
    from peft import PeftModel

    from dymoe.adapter import DyMoEConfig, LayerRouting
    from dymoe.analysis.learned import Learned, Tell
    from dymoe.models import Collator, Lvlm
    from dymoe.tasks import Sample

SAMPLES = 3  # of each task
TYPES = ("new", "ambiguous", "old")
TOKEN = ("layer", "projection", "position", "kind", "text", "row", "column", "type", "group", "weight")
NOTHING = "–"  # in place of the number of a group that there is not
# What the page holds at most: samples over all methods, tokens (a patch or word at one stage), base64 of the pictures.
PAGE_SAMPLES = 24
PAGE_TOKENS = 20_000
PAGE_PICTURES = 1_000_000
# Of the wrapped layers of one decoder layer the one that is shown.
PROJECTION = "v_proj"
Token = dict[str, str]
FILE = re.compile(r"[\w-]+\.(webp|png|jpe?g)")


# ---------------------------------------------------------------- the frame


def overlay(
    run: "str | Path | Learned",
    tasks: Sequence[str] | None = None,
    samples: int = SAMPLES,
    layer: int | None = None,
    tell: "Tell | None" = None,
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
    from dymoe.analysis.learned import open_run

    learned = open_run(run)
    learned.require_routing()
    chosen = [
        (task, first, sample)
        for task, first in learned.chosen_tasks(tasks)
        for sample in learned.samples(task, None)[:samples]
    ]
    last, frames = len(learned.stages), []
    for index, (task, first, sample) in enumerate(chosen):
        picture = _write_picture(learned, sample, index)
        for stage in dict.fromkeys((first.index, last)):
            learned.activate(stage)
            model = (learned.lvlm, learned.model, learned.collator)
            frame = token_routing(*model, sample, sample.answer, layer, learned.recipe.training.dtype)
            frames.append(frame.assign(task=task.name, sample=sample.id, picture=picture, stage=stage))
        if tell:
            tell(task.name, index + 1, len(chosen))
    return joined("overlay", frames)


def token_routing(
    lvlm: "Lvlm",
    peft_model: "PeftModel",
    collator: "Collator",
    sample: "Sample",
    answer: str | None,
    layer: int | None = None,
    dtype: str = "bfloat16",
) -> pd.DataFrame:
    """Type and serving group of every token of one sample, under the groups that are active in a model in memory.

    Args:
        lvlm: the base model and its processor.
        peft_model: the model with its groups.
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
    from dymoe.adapter.trace import place_of
    from dymoe.analysis.learned import look
    from dymoe.evaluation.generate import to_device

    batch = collator([replace(sample, answer=answer, turns=())]) if answer else collator.prompts([sample])
    batch = to_device(batch, cast(Any, lvlm.model).device)
    tuner = cast(Any, peft_model.base_model)
    layers = sorted({place_of(one.name)[0] for one in tuner.layers()})
    depth = layers[len(layers) // 2] if layer is None else layer
    if depth not in layers:
        raise DymoeError(f"layer {depth}: the experts sit in layers {layers[0]} to {layers[-1]}")
    tokens = _describe(lvlm, batch)
    newest = cast("DyMoEConfig", peft_model.peft_config[tuner.stage[-1]])
    frames: list[pd.DataFrame] = []

    def note(routing: "LayerRouting") -> None:
        index, projection = place_of(routing.layer)
        if index == depth and routing.weights[..., 0].numel() == len(tokens):
            served = pd.concat([tokens, _serve(routing, newest.tau)], axis=1)
            frames.append(served.assign(layer=index, projection=projection))

    look(peft_model, batch, note, dtype)
    if not frames:
        raise DymoeError(f"layer {depth}: none of the active groups has experts there; give another layer")
    frame = pd.concat(frames, ignore_index=True)
    return frame[frame["kind"] != ""].reset_index(drop=True)[[*TOKEN]]


def _describe(lvlm: "Lvlm", batch: dict[str, Any]) -> pd.DataFrame:
    """Position, kind ("" for padding), text and patch of each token of a batch of one."""
    images = image_tokens(lvlm)
    names = {PADDING: "", **dict(enumerate(KINDS))}
    frame = pd.DataFrame({"kind": [names[part] for part in kinds(batch, images)[0].tolist()]})
    image = frame["kind"] == "image"
    patch = image.cumsum() - 1
    grid = patch_grid(batch, int(image.sum()))
    return frame.assign(
        position=frame.index,
        text=texts(lvlm, batch["input_ids"][0].tolist(), images),
        row=(patch // grid[1]).where(image, -1) if grid else -1,
        column=(patch % grid[1]).where(image, -1) if grid else -1,
    )


def _serve(routing: "LayerRouting", tau: float) -> pd.DataFrame:
    """Type, group and the group's weight of each token."""
    from dymoe.routing import TokenType, token_types

    weights = routing.weights.reshape(-1, routing.weights.shape[-1]).float()
    parts = weights.split(list(routing.sizes), dim=-1)
    by_group = pd.DataFrame({group: part.sum(-1).tolist() for group, part in zip(routing.groups, parts, strict=True)})
    most, types = by_group.max(axis=1), [""] * len(by_group)
    if routing.scores is not None:
        scores = routing.scores.reshape(-1, routing.scores.shape[-1])
        types = [TokenType(kind).name.lower() for kind in token_types(scores, routing.sizes[-1], tau).tolist()]
    return pd.DataFrame({"type": types, "group": by_group.idxmax(axis=1).where(most > 0, ""), "weight": most})


def _write_picture(learned: "Learned", sample: "Sample", index: int) -> str:
    """The sample's picture in RUN/analysis/overlay/; its name there, "" for a question of text alone."""
    if not sample.has_image:
        return ""
    name = f"{index}.webp"
    atomic_write(learned.path / "analysis" / "overlay" / name, as_webp(seen_picture(learned.lvlm, sample)))
    return name


def as_webp(picture: Any) -> bytes:
    """A PIL image as the page holds it."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


def seen_picture(lvlm: "Lvlm", sample: "Sample") -> Any:
    """The picture of a sample as the model sees it, scaled and cut, so that patches lie where they belong.

    Returns:
        A PIL image; the picture as it is where the processor makes several crops or patches of it.

    Raises:
        DymoeError: the picture is broken.
    """
    import numpy as np
    from PIL import Image

    picture = decode(cast(bytes, sample.image))
    processor: Any = lvlm.processor.image_processor  # type: ignore[attr-defined]
    processed = np.asarray(processor(images=[picture], return_tensors="np")["pixel_values"])
    if processed.ndim != 4 or processed.shape[:2] != (1, 3):
        return picture
    pixels = processed[0].transpose(1, 2, 0)
    if processor.do_normalize:
        pixels = pixels * np.array(processor.image_std) + np.array(processor.image_mean)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype("uint8"))


# ---------------------------------------------------------------- a sample as it is drawn


@dataclass(frozen=True)
class View:
    """A sample at one stage: `patches` line by line on a grid of `rows` by `columns`, `loose` for those without one.

    A token is its `classes`, the number of its `group`, its `text` with the line breaks behind it (`end`), and a
    `title` that says what it is.
    """

    title: str
    patches: Sequence[Token]
    loose: Sequence[Token]
    instruction: Sequence[Token]
    answer: Sequence[Token]
    rows: int
    columns: int
    text: str


def view_of(
    frame: pd.DataFrame, groups: Sequence[str], title: str = "", before: Mapping[int, str] | None = None
) -> View:
    """The tokens of one sample at one stage.

    Args:
        frame: rows of one layer and projection, as `token_routing` gives them.
        groups: all groups in order; their places are their numbers and colours.
        title: what is seen.
        before: the serving group of each position at an earlier stage; tokens that another serves now are framed.
    """
    grid = frame[frame["row"] >= 0].sort_values(["row", "column"])
    loose = frame[frame["row"] < 0].sort_values("position")
    patches, rest, instruction, answer = (
        [_token(row, groups, before or {}) for row in rows.to_dict("records")]
        for rows in (grid, *(loose[loose["kind"] == kind] for kind in KINDS))
    )
    image = frame["kind"] == "image"
    parts = {"Patches": frame[image], "Words": frame[~image]}
    sentences = [f"{name}: {served_by(rows)}; {_types(rows)}." for name, rows in parts.items() if len(rows)]
    rows, columns = (int(grid[key].max()) + 1 if len(grid) else 0 for key in ("row", "column"))
    return View(title, patches, rest, instruction, answer, rows, columns, " ".join(sentences))


def _token(row: Mapping[Any, Any], groups: Sequence[str], before: Mapping[int, str]) -> Token:
    group, kind = str(row["group"]), str(row["type"])
    index = groups.index(group) if group in groups else None
    classes = [] if index is None else [f"g{index % COLOURS}"]
    title = f"{group} {number(100 * row['weight'], 0)} %" if group else "no group"
    if kind in TYPES:
        classes.append(kind[0])
        title += f", {kind}"
    if before and before.get(row["position"]) != group:
        classes.append("c")
        title += f", before: {before.get(row['position']) or 'no group'}"
    mark = NOTHING if index is None else str(index + 1)
    # Line breaks have a sign, so that their colour is seen, and stand apart.
    word = str(row["text"]).rstrip("\n")
    end = str(row["text"])[len(word) :]
    text = (word + "↵" * len(end)) or "∅"
    return {"classes": " ".join(classes), "group": mark, "text": text, "end": end, "title": title}


def served_by(rows: pd.DataFrame) -> str:
    """How many tokens each group serves, as in "12 by scienceqa, 4 by textvqa"."""
    counts = Counter(str(group) or "no group" for group in rows["group"])
    return ", ".join(f"{count} by {group}" for group, count in counts.most_common())


def _types(rows: pd.DataFrame) -> str:
    counts = Counter(rows["type"])
    return ", ".join(f"{counts[kind]} {kind}" for kind in TYPES if counts[kind]) or "no types"


def group_look(index: int, group: str) -> Look:
    """A group's entry in a legend: its name, its colour and its number."""
    return look(index, group, str(index + 1))


def type_look(kind: str, label: str = "") -> Look:
    """A token type's entry in a legend: its name (or another label), its colour and its letter."""
    return look(TYPES.index(kind), label or kind, kind[0])


# ---------------------------------------------------------------- the figure


@dataclass(frozen=True)
class Panel:
    """One sample of one method; `picture` is the name of its style rule, `shape` its width divided by its height."""

    key: Key
    title: str
    picture: str
    shape: float
    views: Sequence[View]


@dataclass
class Overlay(Figure):
    """The figure of the samples: its panels are `Panel`s.

    Attributes:
        types: the legend of token types, beside that of the groups.
        pictures: data: URI -> name of its style rule; each once however many methods show it.
    """

    types: Sequence[Look] = ()
    pictures: dict[str, str] = field(default_factory=dict)


def tables(frame: pd.DataFrame, run: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """By which groups the tokens of each sample are served."""
    rows = []
    for (task, sample, stage), part in frame.groupby(["task", "sample", "stage"], sort=False):
        shares = part["group"].value_counts(normalize=True)
        served = ", ".join(f"{group or 'none'} {share:.0%}" for group, share in shares.items())
        rows.append({"task": task, "sample": sample, "stage": str(stage), "tokens served by": served})
    yield f"Layer {frame['layer'].iloc[0]}, all projections", rows


def figures(have: Sequence[Analysed]) -> list[Figure]:
    """Samples before and after, coloured by serving group or by token type.

    Raises:
        DymoeError: a picture is missing or broken; the message names the file.
    """
    chosen = list(_choose(have))
    served = dict.fromkeys(group for one in have for group in one.frame["group"] if group)
    groups = list(dict.fromkeys([*have[0].run.tasks, *served]))
    shown = {group for *_, rows in chosen for group in rows["group"]}
    names = dict.fromkeys(f"{task}: {sample}" for _, task, sample, _ in chosen)
    figure = Overlay(
        "overlay",
        "Token by token",
        head=("method: sample", "stage", "part", "tokens", *TYPES, "served by"),
        legend=[group_look(index, group) for index, group in enumerate(groups) if group in shown],
        choices={"method": [one.label for one in have], "sample": [*names]},
        types=[type_look(kind) for kind in TYPES],
    )
    for one, task, sample, rows in chosen:
        key = (one.label, f"{task}: {sample}")
        views = []
        for view, part in _views(one, task, rows, groups):
            views.append(view)
            for kind, tokens in part.groupby("kind", sort=False):
                counts = Counter(tokens["type"])
                cells = (str(kind), str(len(tokens)), *(str(counts[name]) for name in TYPES), served_by(tokens))
                figure.row(f"{one.label}: {task}, {sample}", view.title, *cells, key=key)
        uri, shape = _picture(one.run.path, str(rows["picture"].iloc[0]))
        if uri and uri not in figure.pictures and sum(map(len, figure.pictures)) + len(uri) <= PAGE_PICTURES:
            figure.pictures[uri] = f"p{len(figure.pictures)}"
        layer = f"layer {rows['layer'].iloc[0]}, {rows['projection'].iloc[0]}"
        title = f"{one.label}: {task}, {sample} ({layer})"
        figure.panels.append(Panel(key, title, figure.pictures.get(uri, ""), shape, views))
    return [figure]


def _choose(have: Sequence[Analysed]) -> Iterator[tuple[Analysed, str, str, pd.DataFrame]]:
    """(analysis, task, sample, its rows) of what is shown: of each task the first sample, then the second ..."""
    tokens = PAGE_TOKENS
    for one in have:
        projections = one.frame["projection"].unique()
        frame = one.frame[one.frame["projection"] == (PROJECTION if PROJECTION in projections else projections[0])]
        frame = frame[frame["task"].isin(one.run.tasks)]
        samples = frame[["task", "sample"]].drop_duplicates()
        samples["turn"], samples["place"] = samples.groupby("task").cumcount(), samples["task"].map(one.run.tasks.index)
        samples = samples.sort_values(["turn", "place"]).head(max(2, PAGE_SAMPLES // len(have)))
        for task, sample in zip(samples["task"], samples["sample"], strict=True):
            rows = frame[(frame["task"] == task) & (frame["sample"] == sample)]
            if len(rows) <= tokens:
                tokens -= len(rows)
                yield one, task, sample, rows


def _views(one: Analysed, task: str, rows: pd.DataFrame, groups: Sequence[str]) -> Iterator[tuple[View, pd.DataFrame]]:
    """The sample at the first and at the last stage it was looked at."""
    before: dict[int, str] = {}
    for stage in dict.fromkeys((rows["stage"].min(), rows["stage"].max())):
        part = rows[rows["stage"] == stage]
        learned = one.run.tasks[stage - 1] if stage <= len(one.run.tasks) else str(stage)
        title = f"After learning {learned}" + (" (its own task)" if learned == task else "")
        yield view_of(part, groups, title, before), part
        before = dict(zip(part["position"], part["group"], strict=True))


def _picture(run: Path, name: str) -> tuple[str, float]:
    """A kept picture as a data: URI, and its width divided by its height; "" and 1 where there is none."""
    if not name:
        return "", 1.0
    if not FILE.fullmatch(name):
        raise DymoeError(f"{run / 'analysis' / 'overlay.parquet'}: picture {name!r} is no plain file name")
    file = run / "analysis" / "overlay" / name
    data = read_bytes(file)
    try:
        with opened(data) as image:
            return data_uri(data), image.width / image.height
    except DymoeError as error:
        raise DymoeError(f"{file}: not a readable picture ({error}); run `dymoe analyze overlay` again") from None
