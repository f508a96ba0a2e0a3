"""Every key of every file that a person writes, with every kind of wrong value: taken, or refused in one short line."""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dymoe import methods
from dymoe.errors import DymoeError
from dymoe.learning.recipe import Recipe, recipe_of, set_key
from dymoe.messages import one_line
from dymoe.methods.settings import build, describe, keys
from dymoe.sweep.plan import Plan
from dymoe.sweep.sweep import Entry, Sweep
from dymoe.tasks import own
from dymoe.yamls import dump_yaml

DEEP: Any = 1
for _ in range(30):
    DEEP = [DEEP]
BAD = [
    *(None, "", "x", "x" * 20_000, "a\x1b[31m\nb", "~nobody/x", "../x", "2e-05", "1e999", [], {}, [None], [[]], [{}]),
    *({"a": None}, {1: 2}, {None: {}}, DEEP, True, False, 0, -1, -0.0, 2.5, 10**40, -(10**400), 10**400, 2**31, 1e300),
    *(float("inf"), float("-inf"), float("nan"), ["x", "x"], [1, "x"], {"x" * 1000: {}}, {"\x1b[2J": 1}),
]
BASE = {"method": "dymoe", "training": {"steps_per_task": 5}}
# A mistake in one of a pair is told by the name of the other, one in keys of a recipe by these keys.
OTHERWISE = ("epochs", "samples_per_step", "base", "vary", "set")
Cases = Iterator[tuple[str, dict[str, Any]]]


def faults(cases: Cases, take: Callable[[dict[str, Any]], object]) -> tuple[int, list[str]]:
    """How many values were tried, and what is wrong with what was said of them."""
    found, count = [], 0
    for key, base in cases:
        for value in BAD:
            values = copied(base)
            set_key(values, key, value)
            count += 1
            what = f"{key} = {str(value)[:40]!r}"
            try:
                take(values)
            except DymoeError as error:
                text = one_line(error).removeprefix(os.getcwd())
                named = re.split(r"\W", key)[-1].removesuffix("s") in text or key.endswith(OTHERWISE)
                if len(text) > 300 or "\n" in text or not named:
                    found.append(f"{what}: {text[:300]}")
            except Exception as error:
                found.append(f"{what}: {error!r}"[:300])
    return count, found


def copied(value: Any) -> Any:
    return {key: copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def recipe_cases() -> Cases:
    yield from ((key, BASE) for key in (*keys(Recipe), "training", "evaluation", "model_options", "data"))
    tried = set()
    for name in methods.available():
        for key, kind, _ in describe(methods.settings_of(name)):
            if (key, kind) not in tried:  # many methods share a setting
                tried.add((key, kind))
                yield f"settings.{key}", {**BASE, "method": name}
    for name in methods.plugins():
        yield f"with.{name}", BASE
        yield from ((f"with.{name}.{key}", BASE) for key in keys(methods.plugin_settings(name)))


def test_every_key_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count, found = faults(recipe_cases(), lambda values: recipe_of(values, "run.yaml"))
    assert not found, "\n".join(found[:20])
    assert count > 3000


@pytest.mark.parametrize("cls", [Recipe, Sweep, Entry, *map(methods.settings_of, methods.available())])
def test_nothing_is_taken_only_where_nothing_may_be(cls):
    """A value left out in YAML (`batch_size:`) is None."""
    for key, kind, _ in describe(cls):
        values: dict[str, Any] = {"training": {"steps_per_task": 1}} if cls is Recipe else {}
        set_key(values, key, None)
        told = ""
        try:
            build(cls, values, "f.yaml")
        except DymoeError as error:
            told = str(error)
        assert told.endswith(f"{key}: expected {kind}, got nothing") is not kind.endswith("nothing"), (key, told)


def test_every_key_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(dump_yaml(BASE))
    base = {"recipes": [{"recipe": "r.yaml"}]}
    places = [*((key, base) for key in keys(Sweep)), *((f"tune.{key}", base) for key in ("grid", "tasks", "steps"))]

    def take(values: dict[str, Any]) -> None:
        sweep = build(Sweep, values, "s.yaml")
        if sweep.recipes == base["recipes"]:
            Plan(sweep, "s.yaml")

    count, found = faults(iter(places), take)
    assert not found, "\n".join(found[:20])
    entries = iter([(key, {}) for key in keys(Entry)])
    more, found = faults(entries, lambda entry: Plan(Sweep(recipes=[{"recipe": "r.yaml", **entry}]), "s.yaml"))
    assert not [text for text in found if "recipe" not in text.partition(":")[0]], "\n".join(found[:20])
    assert count + more > 700


def test_every_key_of_a_stream(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "stream.yaml"
    task = {"train": "a.json", "test": "b.json"}
    base = {"name": "n", "images": "i", "tasks": {"t": task}}
    places = [
        *((key, base) for key in ("name", "images", "tasks")),
        *((f"tasks.t.{key}", base) for key in ("train", "test", "validation", "images", "scorer", "max_new_tokens")),
        ("tasks.t", base),
    ]

    def take(values: dict[str, Any]) -> None:
        file.write_text(dump_yaml(values))
        own.read(file)

    count, found = faults(iter(places), take)
    assert not found, "\n".join(found[:20])
    assert count > 300
