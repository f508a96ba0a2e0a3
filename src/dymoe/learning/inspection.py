"""What cannot be used is found before anything is trained: every sample that a run takes is looked at once.

Its picture is decoded as training decodes it, its text is tokenised by the model's own processor and counted, a right
answer is scored by the task's rule as far as `max_new_tokens` lets a model write it. What was found of a split is kept
in the cache, so that a second look at the same samples with the same processor and limits reads no picture.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dymoe.errors import DymoeError
from dymoe.files import atomic_json, cache_root, read_json, read_json_lines
from dymoe.images import cores, decode
from dymoe.learning.formats import Skipped
from dymoe.messages import brief
from dymoe.tasks.lazy import Records, fingerprint, subset

if TYPE_CHECKING:
    from dymoe.learning.recipe import Recipe
    from dymoe.models import Lvlm
    from dymoe.models.count import TokenCounter
    from dymoe.tasks import Sample, Stream, Task

SKIPPED = "skipped.jsonl"  # of a run: the records that were left out, one a line
CHUNK = 256  # samples whose pictures are decoded while those before are tokenised
NAMED = 3  # of those that cannot be used, how many an error names
# A sample of these kinds can be asked; but no answer to it scores.
WORTHLESS = ("scores 0", "too long")

Progress = Callable[[str, int, int], None]  # task and split, how many samples are looked at, of how many


@dataclass(frozen=True)
class Unusable:
    """One sample that cannot be used.

    Attributes:
        position: in its split.
        id: the sample's.
        file: where it comes from, None where no file is named.
        record: its number there.
        kind: ``picture``, ``text``, ``reference``, ``scores 0`` or ``too long``.
        error: what is wrong.
    """

    position: int
    id: str
    file: str | None
    record: int | None
    kind: str
    error: str

    def __str__(self) -> str:
        return _origin(self.file, self.record, self.id) + self.error


@dataclass(frozen=True)
class Inspection:
    """What was found of one split.

    Attributes:
        task: its task's name.
        split: ``train``, ``validation`` or ``test``.
        samples: how many were looked at, the first ones of the split.
        tokens: mean and longest of the rows that a model gets; zeros where no model is known.
        reachable: accuracy in percent of a model that gives every right answer; None where nothing is asked.
        unusable: in the order of the split.
    """

    task: str
    split: str
    samples: int
    tokens: tuple[float, int]
    reachable: float | None
    unusable: tuple[Unusable, ...]

    @property
    def broken(self) -> tuple[Unusable, ...]:
        """Those that would end a run."""
        return tuple(each for each in self.unusable if each.kind not in WORTHLESS)

    @property
    def worthless(self) -> tuple[Unusable, ...]:
        """Those that can be asked and that no answer can be right for."""
        return tuple(each for each in self.unusable if each.kind in WORTHLESS)

    @property
    def hopeless(self) -> bool:
        """Whether no answer to any of its samples can be right."""
        return bool(self.worthless) and len(self.worthless) == self.samples - len(self.broken)


def load(recipe: "Recipe", progress: Progress | None = None) -> "Stream":
    """The recipe's stream as a run takes it: looked at, without the samples that cannot be used.

    Raises:
        DymoeError: there are such samples and `data.on_bad` is ``error``, a task has none that can be used, no right
            answer of a task can score, or the model's folder has no processor that fits it.
    """
    from dymoe.models.shapes import outline

    stream = recipe.load_stream()
    inspections = inspect(stream, recipe, outline(recipe.model, recipe.model_options), progress)
    if recipe.data.on_bad == "skip":
        return without(stream, inspections)
    refuse(inspections)
    return replace(stream, notes=tuple(warning(each) for each in inspections if each.worthless))


def without(stream: "Stream", inspections: Sequence[Inspection]) -> "Stream":
    """The stream without the samples that cannot be used; they are listed in its `skipped`.

    Raises:
        DymoeError: a split has none that can be used.
    """
    tasks = {task.name: task for task in (*stream.tasks, *stream.watch)}
    skipped = list(stream.skipped)
    for each in inspections:
        if each.unusable:
            task = tasks[each.task]
            rest = _without(getattr(task, each.split), each)
            tasks[each.task] = cast(Any, replace)(task, **{each.split: rest})
        rows = [(one.file, one.record, one.id, one.error) for one in each.unusable]
        names = {"task": each.task, "split": each.split}
        skipped += [{**dict(zip(("file", "record", "id", "error"), row, strict=True)), **names} for row in rows]
    learned, watch = (tuple(tasks[task.name] for task in part) for part in (stream.tasks, stream.watch))
    return replace(stream, tasks=learned, watch=watch, skipped=tuple(skipped))


def refuse(inspections: Sequence[Inspection]) -> None:
    """Raise one error about everything that ends a run or makes it worth nothing.

    Raises:
        DymoeError: naming tasks, splits, how many, and the first ones.
    """
    broken = [(each, one) for each in inspections for one in each.broken]
    if broken:
        counts = ", ".join(f"{len(each.broken)} of {each.task}'s {each.split}" for each in inspections if each.broken)
        first = "; ".join(str(one) for _, one in broken[:NAMED])
        raise DymoeError(
            f"{len(broken)} samples cannot be used ({counts}), the first: {first}; "
            "data.on_bad: skip leaves such records out and lists them"
        )
    for each in inspections:
        if each.hopeless:
            raise DymoeError(f"{warning(each)}; mend the records, the rule or max_new_tokens")


def warning(result: Inspection) -> str:
    """What is said of right answers that cannot score."""
    first = result.worthless[0]
    return (
        f"task {result.task!r}: {len(result.worthless)} of {result.samples} {result.split} samples have no answer that "
        f"can score, so accuracy reaches {result.reachable:.1f} % at most; the first: {first}"
    )


def left_out(skipped: Sequence[Mapping[str, Any]], file: Path) -> list[str]:
    """What is said of the records that were left out, a line or none.

    Args:
        skipped: of the stream.
        file: where all of them are listed.
    """
    if not skipped:
        return []
    counts = Counter(f"{row['task']}'s {row['split']}" for row in skipped)
    counts_by_split = ", ".join(f"{count} of {name}" for name, count in counts.items())
    first = "; ".join(_origin(row["file"], row["record"], row["id"]) + row["error"] for row in skipped[:NAMED])
    return [f"{len(skipped)} records left out ({counts_by_split}), the first: {first}; all of them: {file}"]


def counts(file: Path) -> dict[str, dict[str, int]]:
    """How many records were left out by task and split.

    Args:
        file: skipped.jsonl of a run; nothing was left out where it is not there.
    """
    by_task: dict[str, dict[str, int]] = {}
    for row in read_json_lines(file, Skipped) if file.is_file() else ():
        task = by_task.setdefault(row["task"], {})
        task[row["split"]] = task.get(row["split"], 0) + 1
    return by_task


def _origin(file: str | None, record: int | None, name: str | None) -> str:
    """The beginning of a message about a sample, as far as it is known where it comes from."""
    id_ = "" if name is None else f"sample {brief(name)}: "
    if file is None:
        return id_
    return f"{file}: {id_}" if record is None else f"{file}: record {record}: {id_}"


def _without(samples: "Sequence[Sample]", result: Inspection) -> "Sequence[Sample]":
    bad = {one.position for one in result.unusable}
    rest = [position for position in range(len(samples)) if position not in bad]
    if not rest:
        raise DymoeError(f"task {result.task!r}: no {result.split} sample can be used; the first: {result.unusable[0]}")
    return subset(samples, rest)


def inspect(
    stream: "Stream",
    recipe: "Recipe",
    lvlm: "Lvlm | None",
    progress: Progress | None = None,
    most: int | None = None,
    everything: bool = False,
) -> list[Inspection]:
    """Look at the samples that a run of this recipe takes, or take from the cache what was found of them.

    Args:
        stream: of the recipe.
        recipe: which samples are taken: its limits and split; and whether unusable ones are replaced by later ones.
        lvlm: the model's shapes and its processor (`dymoe.models.shapes.outline`); without it no text is checked.
        progress: called after every `CHUNK` samples; not where the cache knows them.
        most: look at the first so many of each split alone.
        everything: look at every sample, whatever the recipe's limits.

    Raises:
        DymoeError: the cache cannot be written.
    """
    from dymoe.models.count import TokenCounter

    counter = None if lvlm is None else TokenCounter(lvlm, recipe.model_options.max_length)
    same: dict[str, Any] = {"code": _code(), "processor": None if lvlm is None else _processor(lvlm)}
    same |= {"max_length": recipe.model_options.max_length, "skip": recipe.data.on_bad}
    inspections = []
    both = [*((task, True) for task in stream.tasks), *((task, False) for task in stream.watch)]
    for task, learned in both:
        for split, limit in _splits(recipe, everything, learned):
            samples = getattr(task, split)
            count = min(bound for bound in (len(samples), limit, most) if bound is not None)
            scored = split != "train" and (everything or split == recipe.evaluation.split)
            if count:
                skip = recipe.data.on_bad == "skip"
                inspections.append(_cached(_Look(task, split, samples, count, scored, skip, counter, progress), same))
    return inspections


def _splits(recipe: "Recipe", everything: bool, learned: bool) -> Iterator[tuple[str, int | None]]:
    """Splits that a run takes of a task that it learns, or that it only asks, and how many samples of each."""
    if not learned:
        yield recipe.evaluation.split, None if everything else recipe.evaluation.limit
        return
    if everything or recipe.trains:
        yield "train", None if everything else recipe.training.limit
    yield "validation", None  # some methods look at samples of it that they choose themselves
    if everything or recipe.evaluation.split == "test":
        yield "test", None if everything else recipe.evaluation.limit


@dataclass(frozen=True)
class _Look:
    """One split to be looked at."""

    task: "Task"
    split: str
    samples: "Sequence[Sample]"
    count: int
    scored: bool
    skip: bool
    counter: "TokenCounter | None"
    progress: Progress | None

    def key(self) -> dict[str, Any]:
        return {
            "samples": fingerprint(self.samples),
            "pictures": self.samples.picture_files() if isinstance(self.samples, Records) else None,
            "learned": self.split == "train",
            "wanted": self.count,
            "scored": self.scored,
            "scorer": self.task.scorer,
            "max_new_tokens": self.task.max_new_tokens,
        }

    def run(self) -> dict[str, Any]:
        """Look at the first samples, until enough of them can be used."""
        unusable: list[dict[str, Any]] = []
        lengths: list[int] = []
        reach: list[float] = []
        looked = 0
        for done, (sample, size) in enumerate(self._sized()):
            if done - (len(unusable) if self.skip else 0) >= self.count:
                break
            looked = done + 1
            try:
                length, reached = self._sample(sample, size)
                lengths.append(length)
                reach.append(reached)
            except _Bad as bad:
                file, record = sample.source or (None, None)
                row = {"position": done, "id": sample.id, "file": file, "record": record}
                unusable.append({**row, "kind": bad.kind, "error": bad.error})
                if bad.kind in WORTHLESS:
                    reach.append(0.0)
            if self.progress is not None and looked % CHUNK == 0:
                self.progress(f"{self.task.name}, {self.split}", looked, self.count)
        mean, longest = sum(lengths) / max(len(lengths), 1), max(lengths, default=0)
        reachable = 100 * sum(reach) / len(reach) if reach and self.scored else None
        return {"samples": looked, "tokens": [mean, longest], "reachable": reachable, "unusable": unusable}

    def _sized(self) -> "Iterator[tuple[Sample, Any]]":
        """The samples with their pictures' sizes, or what is wrong with these; the next ones are decoded meanwhile."""
        sizes: dict[Any, Any] = {}
        with ThreadPoolExecutor(cores()) as pool:
            ahead: list[Sample] = []
            for start in range(0, len(self.samples) + CHUNK, CHUNK):
                now, ahead = ahead, list(self.samples[start : start + CHUNK])
                fresh = {_picture(sample): sample for sample in ahead if _picture(sample) not in sizes}
                coming = pool.map(_size, fresh.values())
                yield from ((sample, sizes[_picture(sample)]) for sample in now)
                sizes |= zip(fresh, coming, strict=True)

    def _sample(self, sample: "Sample", size: Any) -> tuple[int, float]:
        """(tokens, highest score of a right answer) of a sample."""
        if isinstance(size, DymoeError):
            raise _Bad("picture", size, sample)
        try:
            length = 0 if self.counter is None else self.counter.length(sample, size, self.split == "train")
        except DymoeError as error:
            raise _Bad("text", error, sample) from None
        return length, self._reached(sample) if self.scored else 0.0

    def _reached(self, sample: "Sample") -> float:
        """The highest score of the right answers to a sample, as far as they may be written."""
        from dymoe.tasks.scoring import scorer

        score, most = scorer(self.task.scorer), self.task.max_new_tokens
        others = sample.reference.get("answers")
        answers = [sample.answer, *(others if isinstance(others, list | tuple) else ())]
        texts = list(dict.fromkeys(text for text in answers if isinstance(text, str) and text.strip()))
        try:
            if not any(score(text, sample.reference) > 0 for text in texts[:1]):
                raise _Bad("scores 0", f"its answer {brief(sample.answer)} scores 0 by {self.task.scorer}", sample)
            best = 0.0
            for text in texts:
                written = text if self.counter is None else self.counter.cut(sample, text, most)
                best = max(best, score(written, sample.reference))
                if best == 1:
                    break
        except DymoeError as error:
            raise _Bad("reference", error, sample) from None
        if not best:
            raise _Bad(
                "too long", f"its answer {brief(sample.answer)} has more than max_new_tokens {most} tokens", sample
            )
        return best


class _Bad(Exception):
    """What is wrong with a sample."""

    def __init__(self, kind: str, error: object, sample: "Sample") -> None:
        super().__init__(kind)
        self.kind = kind
        self.error = str(error).removeprefix(f"{sample.label}: ")


def _picture(sample: "Sample") -> Any:
    """What tells a sample's picture from others."""
    name = getattr(sample.picture, "name", None)
    return sample.id if name is None else (str(getattr(sample.picture, "root", "")), name)


def _size(sample: "Sample") -> Any:
    """Width and height of a sample's picture, None without one, or the error where it cannot be decoded."""
    try:
        data = sample.image
        return None if data is None else decode(data).size
    except DymoeError as error:
        return error


def _cached(look: _Look, same: Mapping[str, Any]) -> Inspection:
    """What was found of a split, from the cache if that has it."""
    key = {**same, **look.key()}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    file = cache_root() / "inspected" / f"{name}.json"
    with _locked(file):
        values = read_json(file) if file.is_file() else None
        if values is None:
            values = look.run()
            atomic_json(file, values)
    rows = tuple(Unusable(**row) for row in values["unusable"])
    mean, longest = values["tokens"]
    return Inspection(look.task.name, look.split, values["samples"], (mean, longest), values["reachable"], rows)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep others from `path` in the cache while the block works on it.

    Raises:
        DymoeError: the cache cannot be written.
    """
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    except OSError as error:
        message = (
            f"{path}: cannot be written ({error.strerror or error}); DYMOE_CACHE names another folder for the cache"
        )
        raise DymoeError(message) from error
    try:
        yield
    finally:
        lock.release()


@cache
def _code() -> str:
    """What decides about a sample beside the data: this package's rules and the libraries that read."""
    from importlib.metadata import version

    home = Path(__file__).parents[1]
    files = [Path(__file__), *sorted((home / "models").glob("*.py")), *sorted((home / "tasks/scoring").glob("*.py"))]
    digest = hashlib.sha256()
    for file in (*files, home / "images.py"):
        digest.update(file.read_bytes())
    library_versions = [version(name) for name in ("pillow", "tokenizers", "transformers")]
    return f"{digest.hexdigest()} {' '.join(library_versions)}"


def _processor(lvlm: "Lvlm") -> str:
    """SHA-256 over a model's processor as it is stored, and over what the model's configuration says of tokens."""
    import tempfile

    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="dymoe-") as folder:
        lvlm.processor.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            data = file.read_bytes()
            if file.name == "tokenizer.json":  # how its last call padded and cut is stored in it too
                values = read_json(file)
                data = json.dumps({**values, "padding": None, "truncation": None}).encode()
            digest.update(file.name.encode() + b"\0" + data)
    digest.update(str(getattr(lvlm.model.config, "image_token_id", None)).encode())
    return digest.hexdigest()
