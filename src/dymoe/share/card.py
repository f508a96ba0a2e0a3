"""The model card (README.md) of a shared result."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dymoe.learning.conditions import flat
from dymoe.share.manifest import Group
from dymoe.share.paths import base_kind

WORD = r"[^\W_]"  # a letter or digit
MARKUP = re.compile(rf"(?!(?<={WORD})(?<![wW]{{3}})[-_.](?={WORD}))(?:[^\w ]|_)")


@dataclass(frozen=True)
class Shared:
    """What a card tells about.

    Attributes:
        results: results.json as it is shared.
        recipe: the recipe as it is shared.
        stages: name and groups of every stage.
        base: the base model's name as the run had it, before paths were cut.
        licence: of the groups, an identifier of the Hub such as ``apache-2.0``; None for not stated.
        where: repository or folder name for the lines that load it.
    """

    results: Mapping[str, Any]
    recipe: Mapping[str, Any]
    stages: Sequence[tuple[str, Sequence[Group]]]
    base: str
    licence: str | None
    where: str


def card(shared: Shared) -> str:
    """The whole README.md: metadata, tables, how to load it; text from data is escaped."""
    results = shared.results
    learned, tasks = len(shared.stages), len(results["tasks"])
    joint = results.get("joint") is not None
    how = "from all tasks at once" if joint else "task after task"
    count = f"all {tasks} tasks at once" if joint else f"{learned} of {tasks} tasks"
    sections = [
        _metadata(shared),
        f"# {escape(results['method'])} on {escape(results['stream'])}, {count}",
        f"Expert groups that a vision-language model learned {how} with dymoe's method {escape(results['method'])}. "
        "Each group is one small PEFT adapter; a stage of the run is the groups that manifest.json lists for it, "
        "routed together.",
        _facts(shared),
        "## Tasks in order",
        _tasks(shared),
        "## Accuracy in percent",
        "A row per stage, a column per task. " + _rule(results),
        _matrix(results),
        *_watch(results),
        *_numbers(results),
        "## Load a stage",
        _loading(shared),
        "## Settings",
        _settings(shared),
        "## Licence",
        _licence(shared),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def escape(value: Any) -> str:
    """Text from data for Markdown and HTML: every character that either could read as markup becomes an entity.

    Letters, digits and spaces stay; hyphens, underscores and full stops only inside a word, and not behind "www", which
    the Hub would make a link of. Control and direction marks become spaces.
    """
    plain = "".join(char if char.isprintable() else " " for char in str(value))
    return " ".join(MARKUP.sub(lambda match: f"&#{ord(match[0])};", plain).split())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int | None = None) -> str:
    """A Markdown table of escaped cells; columns from `numbers` on are right-aligned."""
    if not rows:
        return ""
    marks = ["---" if numbers is None or column < numbers else "---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, marks, *rows))


def _metadata(shared: Shared) -> str:
    import yaml

    values: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "image-text-to-text"}
    if base_kind(shared.base) == "hub":
        values["base_model"], values["base_model_relation"] = shared.base, "adapter"
    if shared.licence:
        values["license"] = shared.licence
    else:
        values |= {"license": "other", "license_name": "not-stated"}
    values["tags"] = ["dymoe", "continual-learning", "mixture-of-experts", "lora", "peft"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _facts(shared: Shared) -> str:
    results = shared.results
    base = {"assembled": "model of dymoe", "hub": "Hub repository", "folder": "local folder of the author"}
    versions = results.get("versions", {})
    rows = [
        ("base model", f"{escape(results['base'])} ({base[base_kind(shared.base)]})"),
        ("stream", f"{escape(results['stream'])}, order {escape(results.get('order', ''))}"),
        ("instructions", escape(results.get("instructions", ""))),
        ("seed", escape(results["seed"])),
        ("parameters stored", f"{results['stored_parameters']:,}" if "stored_parameters" in results else ""),
        ("versions", ", ".join(f"{escape(name)} {escape(value)}" for name, value in versions.items())),
    ]
    return _table(("", ""), [(name, value) for name, value in rows if value])


def _tasks(shared: Shared) -> str:
    rows = []
    for number, (name, groups) in enumerate(shared.stages, start=1):
        newest = next(group for group in groups if group.folder.startswith(f"groups/{number:02d}-"))
        questions = shared.results.get("samples", {}).get(name)
        cells = (
            escape(newest.name),
            escape(newest.folder),
            newest.hash[:16],
            "" if questions is None else f"{questions}",
        )
        rows.append((f"{number}", escape(name), *cells))
    head = ("stage", "task", "group it trained", "folder", "SHA-256 of the group", "test questions")
    return _table(head, rows)


def _rule(results: Mapping[str, Any]) -> str:
    sentences = [f"Split: {escape(results['split'])}."] if "split" in results else []
    sentences += [f"Scoring rules: {escape(results['scoring'])}."] if "scoring" in results else []
    return " ".join(sentences)


def _matrix(results: Mapping[str, Any]) -> str:
    tasks = results["tasks"]
    rows: list[tuple[str, Sequence[float]]] = []
    if results.get("zero_shot"):
        rows.append(("before", results["zero_shot"]))
    if results.get("joint"):
        rows.append(("all at once", results["joint"]))
    rows += [(f"{number} {escape(tasks[number - 1])}", row) for number, row in enumerate(results["matrix"], start=1)]
    return _table(
        ("after", *map(escape, tasks)),
        [(name, *(f"{value:.2f}" for value in row), *[""] * (len(tasks) - len(row))) for name, row in rows],
        numbers=1,
    )


def _watch(results: Mapping[str, Any]) -> list[str]:
    """Accuracy on what was only asked, before the first stage and after every one."""
    watch = results.get("watch") or {}
    learned = ["all at once"] if results.get("joint") is not None else results["tasks"]
    rows = [
        (escape(name), *(f"{row['accuracy'][index]:.2f}" for row in watch.values()))
        for index, name in enumerate(("before", *learned))
        if all(index < len(row["accuracy"]) for row in watch.values())
    ]
    if not watch:
        return []
    return ["Of tasks that were only asked, never learned:", _table(("after", *map(escape, watch)), rows, numbers=1)]


def _numbers(results: Mapping[str, Any]) -> list[str]:
    """Metrics, and what each task lost."""
    metrics = [(escape(name), f"{value:.2f}") for name, value in results.get("metrics", {}).items()]
    drift = results.get("format_drift") or {}
    lost = [
        (escape(task), f"{value:.2f}", f"{drift[task]:.2f}" if task in drift else "")
        for task, value in (results.get("forgetting") or {}).items()
    ]
    return [
        _table(("metric", "value"), metrics, numbers=1),
        _table(("task", "forgotten (points)", "of its loss, answer's form alone (points)"), lost, numbers=1),
    ]


def _loading(shared: Shared) -> str:
    base = shared.base if base_kind(shared.base) != "folder" else f"path of {shared.results['base']}"
    last = len(shared.stages)
    return f"""With PEFT alone; `folder` is what `dymoe pull` wrote (it checks every file):

```python
import json, dymoe  # dymoe registers its adapter with PEFT
from peft import PeftModel
from dymoe.models import load

folder, stage = {shared.where!a}, {last}
base = load({base!a}).model  # any way to load it with transformers will do

first, *later = json.load(open(f"{{folder}}/manifest.json"))["stages"][stage - 1]["groups"]
model = PeftModel.from_pretrained(base, folder, subfolder=first["folder"], adapter_name=first["name"])
for group in later: model.load_adapter(folder, subfolder=group["folder"], adapter_name=group["name"])
```

Or, with every hash checked, from a folder or straight from the Hub:
`model = dymoe.load_stage(folder_or_repository, base, stage={last})`."""


def _settings(shared: Shared) -> str:
    recipe = shared.recipe
    rows = [("method", escape(recipe.get("method", "")))]
    for part in ("settings", "with", "training", "evaluation"):
        rows += [(escape(key), escape(value)) for key, value in flat(recipe.get(part) or {}, f"{part}.").items()]
    return (
        _table(("key", "value"), rows) + "\n\nThe whole recipe is recipe.yaml: `dymoe run recipe.yaml` runs it again."
    )


def _licence(shared: Shared) -> str:
    licence = escape(shared.licence) if shared.licence else "not stated by the author; ask before you use them"
    rows = [
        ("these groups", licence),
        ("base model", f"its own: see {escape(shared.results['base'])}"),
        ("training data", f"their own: see the data sets of {escape(shared.results['stream'])}"),
        ("dymoe", "Apache-2.0"),
    ]
    return _table(("part", "licence"), rows)
