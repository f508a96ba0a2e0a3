"""What determines a run, as run.yaml holds it, and what of it may differ when the run goes on.

A run goes on where it computes what it would have computed: under the same recipe, base weights, versions and kind of
machine, with the same data of the tasks it has begun. What differs otherwise is refused, or accepted part by part
(`ACCEPTABLE`) and written down.
"""

import hashlib
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from dymoe import extensions
from dymoe.errors import DymoeError
from dymoe.files import atomic_write
from dymoe.learning import clock
from dymoe.learning.folder import FREE
from dymoe.models.options import ModelOptions
from dymoe.schema import Count, check
from dymoe.yamls import dump_yaml, read_yaml

if TYPE_CHECKING:
    from dymoe.tasks import Stream, Task

#: What a person may accept a difference in; `dymoe run --help` says what each is.
ACCEPTABLE = ("base", "data", "versions", "machine")
# How a step's samples are shared out; what they come to together is compared instead.
SHARED = ("training.gradient_accumulation", "training.samples_per_step")
# Those that compute; of the second row what is installed.
PACKAGES = ("dymoe", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy", "pillow")
OPTIONAL = ("torchvision", "timm", "bitsandbytes", "deepspeed")
# It changes nothing but which records can be used, and these are compared as data.
LENGTH = "model_options.max_length"


class Environment(TypedDict):
    """What computed the stages from `stage` (counted from 1) on."""

    stage: Count
    versions: dict[str, str]
    machine: dict[str, Any]


class Difference(TypedDict):
    """One difference that was accepted when stage `stage` was the next to compute; 0 where none was left."""

    stage: Count
    part: str
    name: str
    there: Any
    here: Any


class Fingerprints(TypedDict):
    """SHA-256 over the samples that a task is trained on, and over those it is evaluated on with their rule."""

    training: str
    evaluation: str


class Data(TypedDict):
    """Sizes and fingerprints of the tasks; `fingerprint` is over the whole stream, `watch` of what is only asked."""

    samples: dict[str, dict[str, int]]
    fingerprint: str
    tasks: dict[str, Fingerprints]
    watch: NotRequired[dict[str, str]]
    scorers: NotRequired[dict[str, Any]]


class Step(TypedDict):
    """Samples of an optimizer step, over all processes."""

    samples: Count


class Description(TypedDict):
    """run.yaml."""

    recipe: dict[str, Any]
    base: dict[str, str]
    data: Data
    step: Step
    environments: list[Environment]
    accepted: list[Difference]


@dataclass(frozen=True)
class State:
    """How far a run is: the next stage (None where all are done), the tasks it has trained on and evaluated so far."""

    stage: int | None
    trained: Collection[str]
    evaluated: Collection[str]


def data_of(stream: "Stream", split: str, limit: int | None) -> Data:
    """The data's part of a description.

    Args:
        stream: the tasks as they are trained on.
        split: the one that is evaluated.
        limit: at most so many samples of it.
    """
    from dymoe.evaluation.generate import evaluated
    from dymoe.tasks.lazy import fingerprint

    def of_questions(task: "Task") -> str:
        return f"{fingerprint(evaluated(task, split, limit))} {task.scorer} {task.max_new_tokens}"

    tasks: dict[str, Fingerprints] = {
        task.name: {"training": fingerprint(task.train), "evaluation": of_questions(task)} for task in stream.tasks
    }
    watch = {"watch": {task.name: of_questions(task) for task in stream.watch}} if stream.watch else {}
    return {**data_description(stream), "tasks": tasks, **watch}  # type: ignore[typeddict-item]


def data_description(stream: "Stream") -> dict[str, Any]:
    """Sizes of the tasks and a fingerprint over every sample.

    A sample in memory counts with its text, answer and picture. Samples on disk count with their index's fingerprint,
    which was computed when the records were read: texts, answers, references, and of each picture file the path and the
    size, not the contents; so this takes no longer for big data. Their tasks also say how they are scored.
    """
    from dymoe.tasks.lazy import Records

    digest = hashlib.sha256()
    sizes: dict[str, dict[str, int]] = {}
    rules: dict[str, dict[str, Any]] = {}
    for task in stream.tasks:
        sizes[task.name] = {split: len(getattr(task, split)) for split in ("train", "validation", "test")}
        for split in ("train", "validation", "test"):
            samples = getattr(task, split)
            if isinstance(samples, Records):
                digest.update(f"{task.name}\0{split}\0{samples.fingerprint}".encode())
                rules[task.name] = {"scorer": task.scorer, "max_new_tokens": task.max_new_tokens}
                continue
            for sample in samples:
                for part in (task.name, split, sample.id, sample.question, sample.answer):
                    digest.update(part.encode() + b"\0")
                digest.update(hashlib.sha256(sample.image or b"").digest())
    return {"samples": sizes, "fingerprint": digest.hexdigest(), **({"scorers": rules} if rules else {})}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute; of a user's own files (`dymoe.extensions`) the SHA-256."""
    result = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    for name in OPTIONAL:
        with suppress(PackageNotFoundError):
            result[name] = version(name)
    return {**result, **extensions.digests()}


def machine() -> dict[str, Any]:
    """What the run was computed on, and by which clock its seconds are counted (`learning.clock`)."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "clock": clock.clock(),
    }


def environment(stage: int) -> Environment:
    """What computes here, from stage `stage` on."""
    return {"stage": stage, "versions": versions(), "machine": machine()}


def read(run: Path) -> Description:
    """The description in run.yaml.

    Raises:
        DymoeError: it cannot be read or is none that this version of dymoe wrote.
    """
    marker = run / "run.yaml"
    return check(read_yaml(marker), Description, str(marker))


def write(run: Path, description: Description) -> None:
    """Write run.yaml, atomically."""
    atomic_write(run / "run.yaml", dump_yaml(dict(description)))


def go_on(run: Path, there: Description, here: Description, state: State, accept: Sequence[str]) -> Description:
    """The description of a run that goes on.

    Args:
        run: the folder, for messages.
        there: what its run.yaml says.
        here: what would be written if it began now; `environments` holds what computes here alone.
        state: how far it is; what computes does not matter where nothing is left to compute.
        accept: the parts (`ACCEPTABLE`) in which differences are accepted.

    Raises:
        DymoeError: a difference that matters and was not accepted; all of them are named, there and here.
    """
    refuse_other(run, there, here)
    stage = 0 if state.stage is None else state.stage
    all_differences = [*_data(there["data"], here["data"], state), *(_computing(there, here) if stage else ())]
    for entry in all_differences:
        entry["stage"] = stage
    refused = [entry for entry in all_differences if entry["part"] not in accept]
    if refused:
        listing = "; ".join(f"{e['name']} is {_short(e['there'])} there, {_short(e['here'])} here" for e in refused)
        parts = [part for part in ACCEPTABLE if any(entry["part"] == part for entry in refused)]
        flags = " ".join(f"--accept {part}" for part in parts)
        raise DymoeError(
            f"{run}: the run computed under other conditions ({', '.join(parts)}): {listing}; go on as it was, or give "
            f"{flags} to go on all the same, which run.yaml and results.json then say"
        )
    other = any(entry["part"] in ("versions", "machine") for entry in all_differences)
    new = [{**here["environments"][-1], "stage": stage}] if other else []
    return {
        **here,
        "base": here["base"] if state.stage is not None else there["base"],
        "environments": [*there["environments"], *new],  # type: ignore[list-item]
        "accepted": [*there["accepted"], *all_differences],
    }


def refuse_other(run: Path, there: Description, here: Description) -> None:
    """Refuse what makes it another run.

    Raises:
        DymoeError: another recipe, other tasks or steps of another size; what differs is named, there and here.
    """
    defaults = {"model_options": asdict(ModelOptions())}
    was, now = flat({**defaults, **there["recipe"]}), flat({**defaults, **here["recipe"]})
    names = [name for name in sorted({*was, *now} - {*FREE, *SHARED, LENGTH}) if was.get(name) != now.get(name)]
    differences = [f"{name} is {was.get(name)!r} there, {now.get(name)!r} here" for name in names]
    if differences:
        raise DymoeError(f"{run}: run of another recipe: {'; '.join(differences)}; give another --output")
    tasks = [", ".join(description["data"]["tasks"]) for description in (there, here)]
    if tasks[0] != tasks[1]:
        raise DymoeError(f"{run}: run of other tasks: {tasks[0]} there, {tasks[1]} here; give another --output")
    samples = [description["step"]["samples"] for description in (there, here)]
    if samples[0] != samples[1]:
        raise DymoeError(
            f"{run}: a step of this run takes {samples[0]} samples, here {samples[1]}; let batch_size x "
            "gradient_accumulation x processes be the same, or give training.samples_per_step"
        )


def _data(there: Data, here: Data, state: State) -> list[Difference]:
    """Differences in the data that the run has used; what it has not begun may be mended."""
    differences = []
    for task, was in there["tasks"].items():
        now = here["tasks"][task]
        if task in state.trained and was["training"] != now["training"]:
            differences.append(_difference("data", f"training data of {task}", was["training"], now["training"]))
        if task in state.evaluated and was["evaluation"] != now["evaluation"]:
            differences.append(_difference("data", f"evaluation data of {task}", was["evaluation"], now["evaluation"]))
    watch_there, watch_here = there.get("watch", {}), here.get("watch", {})
    for name in (name for name in watch_there if name in state.evaluated and watch_there[name] != watch_here.get(name)):
        differences.append(_difference("data", f"evaluation data of {name}", watch_there[name], watch_here.get(name)))
    return differences


def _computing(there: Description, here: Description) -> list[Difference]:
    """Differences in what computes."""
    was, now = there["environments"][-1], here["environments"][-1]
    parts: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("base", there["base"], here["base"]),
        ("versions", was["versions"], now["versions"]),
        ("machine", _compared(was["machine"]), _compared(now["machine"])),
    ]
    return [
        _difference(part, f"base {name}" if part == "base" else name, one.get(name), other.get(name))
        for part, one, other in parts
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    ]


def _compared(machine: Mapping[str, Any]) -> dict[str, Any]:
    """What of a machine decides over bits: on a GPU the CPU does not."""
    names = ("system", "gpu") if machine.get("gpu") else ("system", "cpu", "gpu", "threads")
    return {name: machine.get(name) for name in names}


def _difference(part: str, name: str, there: Any, here: Any) -> Difference:
    return {"stage": 0, "part": part, "name": name, "there": there, "here": here}


def _short(value: Any) -> str:
    """A value as a message shows it: the beginning of a digest."""
    return "none" if value is None else repr(value) if len(str(value)) < 40 else str(value)[:12]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings."""
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        dotted.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return dotted
