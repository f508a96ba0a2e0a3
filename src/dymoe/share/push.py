"""`push`: a run's groups, recipe, numbers and card into a folder or a Hub repository, all or nothing."""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import atomic_dir, json_text, read_json
from dymoe.learning.folder import StageFolder
from dymoe.learning.formats import Saved
from dymoe.share.card import Shared, card
from dymoe.share.locations import location_of, upload
from dymoe.share.manifest import (
    CONFIG,
    MANIFEST,
    TEXTS,
    WEIGHTS,
    Group,
    Manifest,
    check_tree,
    file_of,
)
from dymoe.share.paths import base_kind, base_name, without_paths
from dymoe.share.stages import chosen
from dymoe.yamls import dump_yaml, read_yaml

LOCAL = ("root", "images", "instructions_folder")  # of a recipe's `data`: where things are on one machine


@dataclass(frozen=True)
class Pushed:
    """What a push did: where the result is, how many stages and bytes, and the SHA-256 of its manifest."""

    where: str
    stages: int
    size: int
    manifest: str


def push(
    run: str | Path,
    target: str | Path,
    stage: int | None = None,
    private: bool = False,
    message: str | None = None,
    licence: str | None = None,
) -> Pushed:
    """Share the first stages of a run.

    The result is put together in a temporary folder and checked there as a pull checks it; then the folder is renamed,
    or sent to the Hub in one commit. A folder that holds an older result is replaced.

    Args:
        run: a run folder with at least one finished stage.
        target: a folder (a Path, ``file:PATH`` or a path) or a Hub repository ``owner/name``.
        stage: share the first `stage` stages; all that are finished when None.
        private: make the Hub repository private.
        message: of the Hub's commit.
        licence: of the groups, an identifier of the Hub (``apache-2.0``); "not stated" when None.

    Raises:
        DymoeError: no run, no finished stage, a stage that is not there, a group that is not the one the run saved, a
            target that holds something else or cannot be written, or the Hub refuses.
    """
    path = Path(run)
    destination = target if isinstance(target, Path) else location_of(target)
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise DymoeError(f"--license: expected an identifier of the Hub such as apache-2.0, got {licence!r}")
    if isinstance(destination, Path):
        if private or message is not None:
            raise DymoeError(
                f"{destination}: is a folder; --private and --message are for Hub repositories (hub:owner/name)"
            )
        _refuse_foreign(destination)
        with atomic_dir(destination) as new:
            pushed = _collect(path, new, stage, licence, destination.resolve().name, str(destination))
        return pushed
    with tempfile.TemporaryDirectory(prefix="dymoe-push-") as room:
        new = Path(room)
        try:
            pushed = _collect(path, new, stage, licence, destination.partition("/")[2], destination)
        except OSError as error:
            raise DymoeError(f"{room}: cannot be written ({error.strerror or error})") from error
        text = message or f"{path.resolve().name} after stage {pushed.stages}"
        return Pushed(upload(new, destination, private, text), pushed.stages, pushed.size, pushed.manifest)


def _refuse_foreign(folder: Path) -> None:
    """Refuse to replace what is no shared result.

    Raises:
        DymoeError: the folder holds something else, or it is a file or a link.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DymoeError(f"{folder}: is no folder; give another target")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise DymoeError(f"{folder}: holds something that dymoe push did not write; give another target")
    if (folder / "stages").exists() or (folder / "events.jsonl").exists():
        raise DymoeError(f"{folder}: is a run folder; give another target")


def _collect(run: Path, new: Path, stage: int | None, licence: str | None, name: str, where: str) -> Pushed:
    """Put the whole result into the empty folder `new` and check it.

    Raises:
        DymoeError: the run is not as it should be.
    """
    description, results = _description(run), read_json(run / "results.json")
    done = chosen(run, stage)
    recipe = description["recipe"]
    base = recipe.get("model")
    if not isinstance(base, str) or not isinstance(results, dict):
        raise DymoeError(f"{run}: run.yaml or results.json is not as dymoe run writes it")
    stages = _groups(done, new, base)
    shared = {**without_paths(first_stages(results, len(done), f"{run}/results.json")), "base": base_name(base)}
    clean = {**_clean(recipe), "model": base_name(base)}
    _write(new / "run.yaml", dump_yaml({**without_paths(description), "recipe": clean}))
    _write(new / "recipe.yaml", dump_yaml(clean))
    _write(new / "results.json", json_text(shared, run / "results.json", indent=1) + "\n")
    _write(new / "README.md", card(Shared(shared, clean, stages, base, licence, name)))
    folders = {group.folder for _, groups in stages for group in groups}
    files = [*TEXTS, *(f"{folder}/{part}" for folder in folders for part in (CONFIG, WEIGHTS))]
    manifest = Manifest(base_name(base), tuple(stages), {name: file_of(new / name) for name in files})
    facts = {key: shared.get(key) for key in ("method", "stream", "tasks", "seed", "versions")}
    _write(new / MANIFEST, json_text(manifest.to_json(**facts), where, indent=1) + "\n")
    check_tree(new, where)
    size = sum(file.size for file in manifest.files.values())
    return Pushed(where, len(stages), size, file_of(new / MANIFEST).sha256)


def _description(run: Path) -> dict[str, Any]:
    """run.yaml of the run.

    Raises:
        DymoeError: it is not there, is no run's, or has numbers that are not finite.
    """
    file = run / "run.yaml"
    if not file.is_file():
        raise DymoeError(f"{run}: no run.yaml here; give a run folder as dymoe run writes it")
    values = read_yaml(file)
    if not isinstance(values, dict) or not isinstance(values.get("recipe"), dict):
        raise DymoeError(f"{file}: expected a mapping with the key recipe; this is no run's description")
    json_text(values, file)
    return values


def _groups(done: list[tuple[str, StageFolder]], new: Path, base: str) -> list[tuple[str, tuple[Group, ...]]]:
    """Copy every stage's group to groups/NN-NAME; a stage's groups are those up to it, each as it was last trained."""
    from safetensors import SafetensorError, safe_open

    from dymoe.share.group import layers_of, plain_config

    stages: list[tuple[str, tuple[Group, ...]]] = []
    now: dict[str, Group] = {}
    configs: dict[Path, Path] = {}
    layers: set[str] = set()
    for number, (name, stage) in enumerate(done, start=1):
        record = read_json(stage.path / "done.json", Saved)
        group = Group(record["group"], f"groups/{number:02d}-{name}", record["hashes"].get(record["group"], ""))
        folder = new / group.folder
        folder.mkdir(parents=True)
        for part in (CONFIG, WEIGHTS):
            if not (stage.adapter / part).is_file():
                raise DymoeError(f"{stage.adapter / part}: no such file")
        shutil.copyfile(stage.adapter / WEIGHTS, folder / WEIGHTS)
        try:
            with safe_open(folder / WEIGHTS, "pt") as tensors:
                layers |= layers_of(tensors.keys())
        except SafetensorError as error:
            raise DymoeError(f"{stage.adapter / WEIGHTS}: cannot be read as safetensors ({error})") from None
        configs[folder / CONFIG] = stage.adapter / CONFIG
        now[group.name] = group
        stages.append((name, tuple(now.values())))
    hub = base if base_kind(base) == "hub" else None
    for file, source in configs.items():
        config = plain_config(read_json(source, dict[str, Any]), layers, hub, source)
        _write(file, json_text(config, source, indent=2) + "\n")
    return stages


def first_stages(results: dict[str, Any], count: int, where: str) -> dict[str, Any]:
    """results.json as it was when `count` stages were done.

    Raises:
        DymoeError: it lacks what a run writes.
    """
    from dymoe.evaluation.metrics import AccuracyMatrix, of_matrix

    for key in ("tasks", "matrix", "method", "stream", "seed", "base"):
        if key not in results:
            raise DymoeError(f"{where}: {key!r} is missing")
    joint = results.get("joint") is not None
    if not joint:
        try:
            AccuracyMatrix(results["matrix"])
        except DymoeError as error:
            raise DymoeError(f"{where}: {error}") from None
    if not joint and len(results["matrix"]) < count:
        raise DymoeError(f"{where}: the matrix has {len(results['matrix'])} rows for {count} finished stages")
    if joint or len(results["matrix"]) == count:
        return dict(results)
    tasks, cut = results["tasks"], dict(results)
    learned = tasks[:count]
    for key in ("matrix", "lenient_matrix", "group_hashes", "steps", "resumed_at", "reports"):
        if key in cut:
            cut[key] = cut[key][:count]
    cut |= of_matrix(cut["matrix"], cut.get("lenient_matrix") or cut["matrix"], learned)
    cut["seconds"] = {key: row[:count] for key, row in results.get("seconds", {}).items()}
    cut["drift"] = {
        task: row[: count - tasks.index(task)] for task, row in results.get("drift", {}).items() if task in learned
    }
    if "answers" in results:
        answers = {task: row for task, row in results["answers"].items() if task in learned}
        cut["answers"] = {
            task: {**row, "scores": row["scores"][: count - tasks.index(task)]} for task, row in answers.items()
        }
    if "watch" in results:
        cut["watch"] = {task: _first_rows(row, count + 1) for task, row in results["watch"].items()}
    for key in ("samples", "training"):
        cut[key] = {task: row for task, row in results.get(key, {}).items() if task in learned}
    # How many parameters there were earlier stands in the stages alone.
    cut.pop("stored_parameters", None)
    cut.pop("trainable_parameters", None)
    return cut


def _first_rows(entry: dict[str, Any], count: int) -> dict[str, Any]:
    """The first rows of a task that was only asked; the first of all is from before the first stage."""
    rows = {key: entry[key][:count] for key in ("accuracy", "lenient", "scores")}
    return {**entry, **rows, "measures": {name: values[:count] for name, values in entry["measures"].items()}}


def _clean(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without what is true on one machine only."""
    values = without_paths({key: value for key, value in recipe.items() if key != "output"})
    if isinstance(values.get("data"), dict):
        values["data"] = {key: value for key, value in values["data"].items() if key not in LOCAL}
    return values


def _write(file: Path, text: str) -> None:
    file.write_bytes(text.encode(errors="replace"))
