"""A stage as it lies on disk, in a run folder or in a shared result: its groups, read and checked without a model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from dymoe.errors import DymoeError
from dymoe.files import read_json
from dymoe.learning.folder import StageFolder
from dymoe.learning.formats import Saved
from dymoe.schema import check
from dymoe.share.locations import Source, location_of, open_source
from dymoe.share.manifest import CONFIG, MANIFEST, WEIGHTS, Manifest, check_file, parse
from dymoe.yamls import read_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.adapter import DyMoEConfig

RECIPE = "recipe.yaml"


class _Training(TypedDict):
    dtype: str


class _ModelOptions(TypedDict):
    load_in_4bit: NotRequired[bool]


class BaseKeys(TypedDict):
    """What a recipe says of its base model; its other keys pass."""

    model: str
    training: _Training
    model_options: NotRequired[_ModelOptions]


@dataclass(frozen=True)
class SavedGroup:
    """One expert group: its name, what messages call its source, its config, its tensors as PEFT names them."""

    name: str
    where: str
    config: "DyMoEConfig"
    tensors: "dict[str, Tensor]"


@dataclass(frozen=True)
class SavedStage:
    """A stage with its groups.

    Attributes:
        where: what messages call the run or the shared result.
        folder: name of the stage's folder, ``NN-NAME``.
        groups: in the order they were added, each as it was last trained up to this stage.
        recipe: what its recipe says of the base model.
        base: what tells the base model from another state of it (`dymoe.models.identity`); None in a shared result.
    """

    where: str
    folder: str
    groups: tuple[SavedGroup, ...]
    recipe: BaseKeys
    base: dict[str, str] | None


def read_stage(source: str | Path, stage: int | None = None) -> SavedStage:
    """A stage with what its recipe says of the base model; arguments and errors as of `read_groups`.

    Raises:
        DymoeError: also where the recipe cannot be read.
    """
    from dymoe.learning import conditions

    if (run := _run_folder(source)) is not None:
        done, description = chosen(run, stage), conditions.read(run)
        keys: BaseKeys = check(description["recipe"], BaseKeys, f"{run / 'run.yaml'}: recipe")
        return SavedStage(str(run), done[-1][1].path.name, _of_run(done), keys, description["base"])
    origin, manifest = _open(source)
    groups = _of_shared(origin, manifest, stage)
    number = stage or len(manifest.stages)
    keys = check(read_yaml(_fetch(origin, manifest, RECIPE)), BaseKeys, f"{origin.where}: {RECIPE}")
    return SavedStage(origin.where, f"{number:02d}-{manifest.stages[number - 1][0]}", groups, keys, None)


def read_groups(source: str | Path, stage: int | None = None) -> tuple[SavedGroup, ...]:
    """The groups of a stage, every one the one that was saved; of a shared result nothing else is fetched.

    Args:
        source: a run folder, a folder that `dymoe push` or `dymoe pull` wrote, or a Hub repository ``owner/name``.
        stage: counted from 1; the last one when None.

    Raises:
        DymoeError: there is no such stage, or something in it is not as it was saved or no part of an expert group.
    """
    if (run := _run_folder(source)) is not None:
        return _of_run(chosen(run, stage))
    return _of_shared(*_open(source), stage)


def _run_folder(source: str | Path) -> Path | None:
    """The source as a run folder, None where it is none; what has a manifest is held to it."""
    path = source if isinstance(source, Path) else location_of(source)
    if not isinstance(path, Path) or (path / MANIFEST).exists() or not (path / "stages").is_dir():
        return None
    return path


def _open(source: str | Path) -> tuple[Source, Manifest]:
    """A shared result and its manifest."""
    origin, text = open_source(source)
    return origin, parse(text, origin.where)


def _of_shared(origin: Source, manifest: Manifest, stage: int | None) -> tuple[SavedGroup, ...]:
    """The groups of a stage of a shared result."""
    from dymoe.share.group import read_group

    groups = []
    for group in manifest.groups(stage, origin.where):
        files = [_fetch(origin, manifest, f"{group.folder}/{part}") for part in (CONFIG, WEIGHTS)]
        where = f"{origin.where}: {group.folder}"
        groups.append(SavedGroup(group.name, where, *read_group(files[0].parent, group, origin.where)))
    return tuple(groups)


def _fetch(origin: Source, manifest: Manifest, name: str) -> Path:
    """A file of a shared result, checked."""
    file = origin.fetch(name)
    check_file(file, name, manifest.files[name], origin.where)
    return file


def _of_run(done: Sequence[tuple[str, StageFolder]]) -> tuple[SavedGroup, ...]:
    """The groups of the last of a run's first stages, each as it was last trained."""
    from dymoe.adapter import tensors_hash
    from dymoe.learning.groups import read_saved

    records = [(folder.adapter, read_json(folder.path / "done.json", Saved)) for _, folder in done]
    newest = {record["group"]: (adapter, record["hashes"]) for adapter, record in records}
    groups = []
    for name, (adapter, hashes) in newest.items():
        group = SavedGroup(name, str(adapter), *read_saved(name, adapter))
        if tensors_hash(sorted(group.tensors.items())) != hashes.get(name):
            raise DymoeError(f"{adapter}: expert group {name!r} is not the one saved (hash differs)")
        groups.append(group)
    return tuple(groups)


def chosen(run: Path, stage: int | None) -> list[tuple[str, StageFolder]]:
    """The first `stage` finished stages of a run folder, all when None.

    Raises:
        DymoeError: so many are not finished.
    """
    done = finished(run)
    if stage is not None and (isinstance(stage, bool) or not 1 <= stage <= len(done)):
        raise DymoeError(f"{run}: --stage {stage}: stages 1 to {len(done)} are finished")
    return done[:stage]


def finished(run: Path) -> list[tuple[str, StageFolder]]:
    """Name and folder of the finished stages of a run folder, from the first up to one that is not finished.

    Raises:
        DymoeError: there is none.
    """
    by_number: dict[int, Any] = {
        int(match[1]): (match[2], StageFolder(folder))
        for folder in sorted(run.glob("stages/*"))
        if folder.is_dir() and (match := re.fullmatch(r"(\d+)-(.+)", folder.name))
    }
    done: list[tuple[str, StageFolder]] = []
    while (entry := by_number.get(len(done) + 1)) and entry[1].trained and entry[1].done is not None:
        done.append(entry)
    if not done:
        raise DymoeError(f"{run}: no stage is finished, so there is no group to share")
    return done
