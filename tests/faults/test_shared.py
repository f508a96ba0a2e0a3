"""Shared results with anything in them changed: taken as they were shared, or refused in one line, and nothing else.

Each input is a valid result with one or a few changes, of which the sender makes the hashes anew (or does not).
Whatever comes: a DymoeError or a result equal to the last bit, nothing written beside the target, no memory for what a
file claims, the model untouched by what is refused.
"""

import json
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dymoe.errors import DymoeError
from dymoe.learning.groups import hashes
from dymoe.share.loading import load_stage
from dymoe.share.manifest import MANIFEST
from dymoe.share.pull import pull
from tests.adapter.conftest import tiny_llama
from tests.share.test_group import NAMES, model_of, seal, share, state

DEFAULT, MANY = 120, 5000
GROWTH = 300 * 2**20  # bytes of memory that all inputs together may add at their worst
ODD = [
    None, True, 0, 1, -1, 2**31, 10**12, 10**30, 0.5, -0.0, 1e300, "", "a", "0", "training", "../x", "/etc/passwd",
    ".*", "(a+)+$", "\x1b[31m", "\u202e", "x" * 10_000, [], {}, [[]], ["q_proj"], {"a": 1}, [None], {"": None}, "nan",
    "1e5", "transformers.evil", "os",
]  # fmt: skip


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def change_json(file: Path, dice: random.Random) -> None:
    values = json.loads(file.read_text())
    *path, last = dice.choice(list(places(values))[1:])
    place = values
    for key in path:
        place = place[key]
    kind = dice.randrange(4)
    if kind == 0:
        del place[last]
    elif kind == 1 and isinstance(place, dict):
        place[dice.choice(["extra", "r", "modules_to_save", "name", "\x1b[2J"])] = place[last]
    else:
        place[last] = dice.choice(ODD)
    text = json.dumps(values)
    if dice.random() < 0.1:
        text = text.replace("1", dice.choice(["NaN", "1e999", "9" * 5000, "01", "-"]), 1)
    file.write_text(text)


def change_bytes(file: Path, dice: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(dice.choice([1, 1, 8])):
        place = dice.randrange(min(len(data), dice.choice([16, 4000, len(data)])))
        data[place] ^= 1 << dice.randrange(8)
    file.write_bytes(data[: dice.choice([len(data), len(data), dice.randrange(len(data))])])


def change_tensors(file: Path, dice: random.Random) -> None:
    tensors = load_file(file)
    name = dice.choice(sorted(tensors))
    tensor = tensors[name]
    other = {
        "gone": None,
        "renamed": tensor,
        "turned": tensor.transpose(0, -1).contiguous(),
        "longer": torch.cat([tensor, tensor]),
        "flat": tensor.flatten(),
        "cut": tensor[:0],
        "wide": torch.zeros(2, 2, 2**20),
        "not finite": tensor * float(dice.choice(["nan", "inf"])),
        "other type": tensor.to(dice.choice([torch.float16, torch.bfloat16, torch.int8, torch.float8_e5m2])),
    }
    kind = dice.choice(list(other))
    del tensors[name]
    extra = [
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.dymoe_A",
        "x",
        f"{name}.birds",
        name * 50,
    ]
    if kind != "gone":
        tensors[dice.choice(extra) if kind == "renamed" else name] = other[kind]
    if dice.random() < 0.2:
        tensors[dice.choice(extra)] = torch.zeros(60, 32)
    save_file(tensors, file)


def change_files(folder: Path, dice: random.Random) -> None:
    file = dice.choice(sorted(path for path in folder.rglob("*") if path.name != MANIFEST))
    kind = dice.randrange(5)
    beside = file.parent / dice.choice(["new.bin", "notes.txt", "\x1b[31m", "x.safetensors", "."])
    if kind == 0 and file.is_file():
        file.unlink()
        file.symlink_to(dice.choice(["/etc/passwd", "/dev/zero", folder / MANIFEST, "nothing"]))
    elif kind == 1 and file.is_file():
        file.unlink()
        file.mkdir()
    elif kind == 2 and not beside.exists():
        beside.write_bytes(dice.randbytes(dice.choice([0, 10, 2**20 + 1])))
    elif kind == 3 and file.is_file():
        file.write_bytes(b"")
    else:
        file.rename(file.with_name(dice.choice(["03-x", "01-birds ", "adapter_model.bin", "elsewhere"])))


def change(folder: Path, dice: random.Random) -> None:
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        kind = dice.randrange(6)
        group = folder / "groups" / f"{(number := dice.randrange(2)) + 1:02d}-{NAMES[number]}"
        if kind == 0:
            change_json(folder / MANIFEST, dice)
            return
        if kind == 1:
            change_bytes(
                dice.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)), dice
            )
            return
        if kind == 2:
            change_files(folder, dice)
            return
        if kind == 3:
            change_tensors(group / "adapter_model.safetensors", dice)
        else:
            change_json(group / "adapter_config.json", dice)
    seal(folder)


def attempt(work: Callable[[], Any]) -> tuple[str | None, Any]:
    """The line that the work was refused with, or what it gave."""
    try:
        return None, work()
    except DymoeError as error:
        return str(error), None


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def outcomes(folder: Path, count: int, seed: int) -> Counter[str]:
    """How many inputs were refused and how many taken; anything else is a failure."""
    shared = share(model_of(), folder / "shared")
    base = tiny_llama()
    was = state(base)
    (folder / "victim").write_text("mine")
    copy, pulled, found = folder / "copy", folder / "pulled", Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        shutil.copytree(shared, copy)
        with suppress(KeyError, IndexError, TypeError, ValueError):  # a second change met what the first one left
            change(copy, random.Random(f"{seed}/{number}"))
        (refused, _), (unfit, model) = attempt(partial(pull, copy, pulled)), attempt(partial(load_stage, copy, base))
        for line in (refused, unfit):
            found["taken" if line is None else "refused"] += 1
            assert line is None or (len(line.splitlines()) == 1 and len(line) < 3000), (seed, number, line)
        if refused is None:
            assert files(pulled).items() <= files(copy).items(), (seed, number)
        if unfit is None:
            groups = json.loads((copy / MANIFEST).read_text())["stages"][-1]["groups"]
            assert {group["name"]: group["hash"] for group in groups} == hashes(model), (seed, number)
            base = tiny_llama()
        assert state(base) == was, (seed, number)
        assert {path.name for path in folder.iterdir()} - {"pulled"} == {"copy", "shared", "victim"}, (seed, number)
        assert (folder / "victim").read_text() == "mine"
        shutil.rmtree(copy)
        shutil.rmtree(pulled, ignore_errors=True)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWTH
    return found


def test_a_changed_result_is_refused_or_right(tmp_path):
    found = outcomes(tmp_path, DEFAULT, seed=0)
    assert found["refused"] > DEFAULT  # or the changes change nothing
    assert found["taken"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_changed_results_are_refused_or_right(tmp_path, seed):
    assert outcomes(tmp_path, MANY, seed)["refused"] > MANY
