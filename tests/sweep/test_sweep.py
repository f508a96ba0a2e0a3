"""Sweeps: planned in full before any work, stopped and gone on with at any moment, nothing learned twice."""

import fcntl
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.evaluation.intervals import Answers, compare, metrics
from dymoe.learning.formats import read_results, write_results
from dymoe.learning.recipe import load_recipe
from dymoe.sweep.jobs import _Job, _stop, last_line, stage_of
from dymoe.sweep.plan import Plan
from dymoe.sweep.records import choose, data_fingerprint, record
from dymoe.sweep.sweep import is_sweep, load_sweep
from tests.learning.test_resume import COMMAND
from tests.learning.tiny import write_recipe
from tests.sweep.test_table import numbers

LORA = {"method": "lora", "settings": {"rank": 2, "lora_dropout": 0.0}, "tasks": ["ImageNet"], "seed": 7}
DYMOE = {"method": "dymoe", "settings": {"num_experts": 2, "rank": 2, "top_k": 2}, "tasks": ["ImageNet"]}


def write_sweep(folder: Path, **values: object) -> Path:
    """Two small recipes and a sweep over them."""
    for name, recipe in (("lora", LORA), ("dymoe", DYMOE)):
        text = yaml.safe_dump({**recipe, "training": {"steps_per_task": 2, "lr": 1e-3}, "output": "nowhere"})
        (folder / f"{name}.yaml").write_text(text)
    out = {"output": str(folder / "runs"), "results": str(folder / "r.jsonl"), "table": str(folder / "t.md")}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"recipes": ["lora.yaml", "dymoe.yaml"], **out, **values}))
    return path


def plan(path: Path, *overrides: str) -> Plan:
    return Plan(load_sweep(path, overrides), path)


def test_all_methods_of_a_seed_come_before_the_next_seed(tmp_path):
    cells = plan(write_sweep(tmp_path, seeds=[1, 0], orders=["origin", "reverse"])).cells
    assert [(cell.seed, cell.order, cell.label) for cell in cells] == [
        (seed, order, label) for seed in (1, 0) for order in ("origin", "reverse") for label in ("lora", "dymoe")
    ]
    assert len({cell.folder for cell in cells}) == len({cell.fingerprint for cell in cells}) == 8


def test_what_a_process_is_told_is_the_recipe_planned(tmp_path):
    base = {"training": {"lr": 2e-05, "steps_per_task": 3}, "evaluation.limit": 9, "tasks": ["ImageNet", "VQAv2"]}
    entry = {"recipe": "dymoe.yaml", "label": "mine / tau", "set": {"settings": {"tau": 1e-7}, "training.lr": 5e-06}}
    first, second = plan(write_sweep(tmp_path, base=base, recipes=["lora.yaml", entry], seeds=[3], threads=2)).cells
    assert load_recipe(first.file, first.words).training.lr == 2e-05
    recipe = load_recipe(second.file, second.words)
    assert (recipe.training.lr, recipe.training.steps_per_task, recipe.seed) == (5e-06, 3, 3)
    assert (recipe.settings["tau"], recipe.settings["rank"], recipe.evaluation.limit) == (1e-7, 2, 9)
    assert (recipe.output, recipe.training.threads) == (str(second.folder), 2)
    assert recipe.tasks == ["ImageNet", "VQAv2"]
    assert second.folder.parent == tmp_path / "runs"
    assert re.fullmatch(r"mine-tau-origin-original-3-[0-9a-f]{8}", second.folder.name)


def test_the_fingerprint_is_of_what_is_computed(tmp_path):
    path = write_sweep(tmp_path)
    (mark, *_), whole = [cell.fingerprint for cell in plan(path).cells], load_sweep(path)
    assert whole.jobs == 1
    same = ("--threads", "2", "--jobs", "3", "--output", str(tmp_path / "other"), "--base.training.save_steps", "9")
    assert plan(path, *same).cells[0].fingerprint == mark
    for other in (["--base.training.lr", "1.0e-4"], ["--seeds", "[1]"], ["--base.training.limit", "20"]):
        assert plan(path, *other).cells[0].fingerprint != mark


def test_what_varies_is_in_the_label(tmp_path):
    path = write_sweep(tmp_path, recipes=["dymoe.yaml"], vary={"settings.tau": [0.1, 0.5], "settings.top_k": [1, 2]})
    cells = plan(path).cells
    assert [cell.label for cell in cells] == [f"dymoe tau={tau} top_k={k}" for tau in (0.1, 0.5) for k in (1, 2)]
    assert [(c.recipe["settings"]["tau"], c.recipe["settings"]["top_k"]) for c in cells][1] == (0.1, 2)
    own = {"recipe": "dymoe.yaml", "label": "own", "vary": {"settings.rank": [1, 2]}}
    cells = plan(write_sweep(tmp_path, recipes=["lora.yaml", own])).cells
    assert [cell.label for cell in cells] == ["lora", "own rank=1", "own rank=2"]


def test_a_tuning_sweep_and_what_follows_from_it(tmp_path):
    path = write_sweep(tmp_path, tune={"grid": [1e-3, 1e-4], "tasks": ["VQAv2"], "steps": 5}, seeds=[0, 1])
    cells = plan(path).cells
    assert [cell.label for cell in cells[:4]] == [
        "lora lr=0.001",
        "lora lr=0.0001",
        "dymoe lr=0.001",
        "dymoe lr=0.0001",
    ]
    for cell in cells:
        assert cell.recipe["evaluation"]["split"] == "validation"
        assert (cell.recipe["tasks"], cell.recipe["training"]["steps_per_task"]) == (["VQAv2"], 5)
        assert cell.recipe["training"]["lr"] == cell.rate
    # lora: equal means, so the smaller rate; dymoe: the better mean, although the other rate has the best single run.
    scores = {("lora", 1e-3): (10, 30), ("lora", 1e-4): (20, 20), ("dymoe", 1e-3): (50, 54), ("dymoe", 1e-4): (0, 90)}
    rows = [
        {"label": c.label, "order": c.order, "instructions": c.instructions, "seed": c.seed}
        | {"metrics": {"MFN": float(scores[c.of, c.rate][c.seed])}}
        for c in cells
    ]
    assert choose(rows, cells) == {"lora": 1e-4, "dymoe": 1e-3}
    assert choose(rows[:-1], cells) == {"lora": 1e-4}
    chosen = tmp_path / "tuning.jsonl"
    write_results(chosen, {"about": {}, "chosen": {"lora": 3e-4, "dymoe": 7e-5}}, [])
    entries = ["dymoe.yaml", {"recipe": "dymoe.yaml", "label": "b", "tuned_as": "lora"}]
    entries.append({"recipe": "dymoe.yaml", "label": "c", "set": {"training.lr": 0.5}})
    cells = plan(write_sweep(tmp_path, recipes=entries, tuned=True, tuning=str(chosen))).cells
    assert [cell.recipe["training"]["lr"] for cell in cells] == [7e-5, 3e-4, 0.5]


def record_of(cell, **changes):
    names = {"label": cell.label, "order": cell.order, "instructions": cell.instructions, "seed": cell.seed}
    about = {key: cell.recipe[key] for key in ("method", "stream")}
    about |= {"tasks": ["ImageNet"], "trainable_parameters": 1, "stored_parameters": 1, "metrics": {"MFN": 1.0}}
    return {**names, **about, "fingerprint": cell.fingerprint, "recipe": dict(cell.recipe), **changes}


def test_records_that_hold_and_records_that_do_not(tmp_path):
    path = write_sweep(tmp_path, seeds=[0, 1])
    whole = plan(path)
    rows = [record_of(cell) for cell in reversed(whole.cells)]
    kept, todo = whole.sort_out(rows, False, "r.jsonl")
    assert (kept, todo) == (rows[::-1], [])
    fewer = plan(path, "--seeds", "[0]")
    kept, todo = fewer.sort_out(rows[:2], False, "r.jsonl")
    assert ([row["seed"] for row in kept], [cell.label for cell in todo]) == ([1, 1], ["lora", "dymoe"])
    other = plan(path, "--base.training.lr", "0.25")
    with pytest.raises(DymoeError, match=r"r.jsonl: .*training.lr is 0.001 there, 0.25 here\) and 3 more; give --repl"):
        other.sort_out(rows, False, "r.jsonl")
    assert other.sort_out(rows, True, "r.jsonl") == ([], other.cells)
    with pytest.raises(DymoeError, match="gone, seed 0: no such row in this sweep"):
        whole.sort_out([record_of(whole.cells[0], label="gone")], False, "r.jsonl")


def test_the_same_run_of_another_sweep_is_taken_over(tmp_path):
    path = write_sweep(tmp_path, recipes=[{"recipe": "lora.yaml", "label": "mine"}, "dymoe.yaml"])
    whole = plan(path, "--reuse", f"[{tmp_path}/o*.jsonl]")
    rows = [record_of(cell, label="theirs", metrics={"MFN": 9.0}) for cell in whole.cells]
    write_results(tmp_path / "other.jsonl", {"about": {}}, rows[:1])
    (kept,), (todo,) = whole.sort_out([], False, "r.jsonl")
    assert (kept["label"], kept["metrics"]["MFN"], todo.label) == ("mine", 9.0, "dymoe")
    # The sweep's own file is no other sweep.
    assert whole.sort_out([], False, str(tmp_path / "other.jsonl"))[0] == []


@pytest.mark.parametrize(
    "values, message",
    [
        ({"recipe": ["lora.yaml"]}, "sweep.yaml: recipe: unknown key; did you mean recipes?"),
        ({"recipes": []}, "sweep.yaml: recipes: no recipe is named"),
        ({"recipes": [3]}, "sweep.yaml: recipes.1: expected str or a mapping of keys, got 3"),
        ({"recipes": [{"label": "x"}]}, "sweep.yaml: recipes.1: expected a recipe's file or a mapping with the key"),
        ({"recipes": [{"recipe": "lora.yaml", "lable": "x"}]}, "recipes.1.lable: unknown key; did you mean"),
        ({"recipes": ["lroa.yaml"]}, "recipes.1 (lroa): "),
        ({"recipes": ["lroa.yaml"]}, "no such recipe; did you mean"),
        ({"recipes": ["lora.yaml", "lora.yaml"]}, "recipes: two rows are called 'lora'"),
        ({"jobs": "many"}, "sweep.yaml: jobs: expected a whole number from 1, got 'many'"),
        ({"jobs": 0}, "sweep.yaml: jobs: expected a whole number from 1, got 0"),
        ({"seeds": []}, "sweep.yaml: seeds: expected at least one value, got []"),
        ({"seeds": [0, 0]}, "sweep.yaml: seeds: expected each value once, got [0, 0]"),
        ({"seeds": [-1]}, "lora: seed: expected a whole number from 0 to 4294967295, got -1"),
        ({"orders": ["backwards"]}, "sweep.yaml: orders.1: expected one of origin, reverse, alphabet, got 'backwards'"),
        ({"vary": {"settings.tau": []}}, "sweep.yaml: vary.settings.tau: expected at least one value"),
        ({"vary": {"settings.tua": [1]}}, "recipes.1 (lora tua=1): settings.tua: unknown key"),
        (
            {"base": {"training": {"lr": "fast"}}},
            "(lora): training.lr: expected a number above 0, got 'fast'",
        ),
        ({"base": {"trainig": {"lr": 1.0}}}, "recipes.1 (lora): trainig: unknown key; did you mean training?"),
        ({"base": {"seed": 1}}, "sweep.yaml: seed: the sweep's own key seeds decides it"),
        ({"base": {"training.threads": 1}}, "training.threads: the sweep's own key threads decides it"),
        ({"tune": {"grid": [0.0]}}, "tune.grid.1: expected a number above 0"),
        ({"tuned": True, "tuning": "none.jsonl"}, "tuning: no such file none.jsonl; run the tuning sweep first"),
        ({"published": "leaderbord"}, "published: no published numbers 'leaderbord'; did you mean leaderboard?"),
        ({"reference": "dymo"}, "sweep.yaml: reference: no row 'dymo'; did you mean dymoe?"),
        ({"reference": "dymoe", "tune": {"grid": [0.1]}}, "reference: expected none in a tuning sweep, got 'dymoe'"),
        ({"table": "same.md", "results": "same.md"}, "table: expected another file than results"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(values, message, tmp_path, capsys):
    path = write_sweep(tmp_path, **values)
    before = sorted(tmp_path.iterdir())
    assert main(["sweep", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert sorted(tmp_path.iterdir()) == before


def test_mistakes_on_the_command_line_and_in_the_results(tmp_path, capsys):
    path = write_sweep(tmp_path)
    for words, message in (
        (["nowhere.yaml"], "nowhere.yaml: no such recipe"),
        ([str(path), "--job", "2"], "command line: job: unknown key; did you mean jobs?"),
        ([str(path), "--jobs"], "sweep: --jobs: expected a value after it"),
        (["--jobs", "2"], "sweep: expected SWEEP, got 0 words"),
        ([str(path), "--results", str(path.with_name("other.jsonl"))], "other.jsonl: line 2: method: is missing"),
    ):
        path.with_name("other.jsonl").write_text('{"about": {}}\n{"label": "x"}\n')
        assert main(["sweep", *words]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert message in told
    (tmp_path / "t.jsonl").write_text("{}")
    tuned = write_sweep(tmp_path, tuned=True, tuning=str(tmp_path / "t.jsonl"))
    assert main(["sweep", str(tuned)]) == 2
    assert "t.jsonl: line 1: about: is missing" in capsys.readouterr().err
    (tmp_path / "t.jsonl").write_text('{"about": {}, "chosen": {"lora": 0.1}}')
    assert main(["sweep", str(tuned)]) == 2
    assert "has no chosen learning rate for 'dymoe'" in capsys.readouterr().err


ROOT = Path(__file__).parents[2]
SWEEPS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "recipes" / "pocket").rglob("*.yaml")
    if is_sweep(path) and path.name != "study.yaml"
)


@pytest.mark.parametrize("path", SWEEPS, ids=str)
def test_every_sweep_of_the_repository_is_right(path):
    from dymoe.sweep.table import published

    eight = path.name != "tune.yaml" and "stream" not in load_sweep(path).base
    whole = plan(path, *(["--base.tasks", "[ImageNet]"] if eight else []))  # not the data of all eight tasks
    assert len(whole.cells) >= 3
    if whole.sweep.published:
        rows = published(whole.sweep.published)["rows"]
        assert len({row["label"] for row in rows} & set(whole.labels)) == len({row["label"] for row in rows})


@pytest.mark.parametrize("path", SWEEPS, ids=str)
def test_what_is_published_is_what_the_sweep_would_learn_today(path):
    sweep = load_sweep(path)
    rows = read_results(sweep.results)["rows"]
    held, _ = Plan(sweep, path).sort_out(rows, False, sweep.results)
    assert len(held) >= len(rows)


def test_a_cell_whose_folder_another_process_holds_waits(tmp_path):
    (cell, *_) = plan(write_sweep(tmp_path)).cells
    cell.folder.mkdir(parents=True)
    job = _Job(cell, threads=1)
    with (cell.folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert job.poll() is None
        assert job.process is None
    assert job.poll() is None
    process = job.process
    assert process is not None
    _stop([job])
    assert process.returncode is not None


def test_the_ends_of_files(tmp_path):
    assert (last_line(tmp_path / "none"), stage_of(tmp_path)) == ("", "starting")
    (tmp_path / "log").write_text("x\n" * 9000 + "dymoe: it broke\n\n")
    assert last_line(tmp_path / "log") == "dymoe: it broke"
    events = tmp_path / "events.jsonl"
    events.write_text('{"event": "step", "stage": 2, "task": "B", "step": 5}\n{"event": "st')
    assert stage_of(tmp_path) == "task 2 B, step 5"
    events.write_text('{"event": "stage", "stage": 2, "task": "B", "scores": {}}\n')
    assert stage_of(tmp_path) == "task 2 B done"


def locked(folder: Path) -> bool:
    if not (folder / ".lock").exists():
        return False
    with (folder / ".lock").open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def test_a_sweep_is_interrupted_fails_in_part_and_ends_whole(tiny_folder, tmp_path, capsys):
    small = {"training": {"steps_per_task": 3, "limit": 12}, "evaluation": {"limit": 4}}
    write_recipe(tmp_path / "dymoe.yaml", tiny_folder, **small)
    lora = yaml.safe_load(write_recipe(tmp_path / "lora.yaml", tiny_folder, **small).read_text())
    lora.update({"method": "lora", "settings": {"rank": 2, "lora_dropout": 0.0}, "with": ["task-router"]})
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(lora))
    path = tmp_path / "sweep.yaml"
    two = {"title": "Two", "recipes": ["dymoe.yaml", "lora.yaml"], "seeds": [0, 1], "reference": "dymoe"}
    path.write_text(yaml.safe_dump(two))
    places = [
        "--output",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "r.jsonl"),
        "--table",
        str(tmp_path / "t.md"),
    ]
    words = ["sweep", str(path), *places]
    cells = plan(path, *places).cells

    # Interrupted when the first record stands and the second run has begun: nothing is left at work.
    process = subprocess.Popen([*COMMAND, *words], stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 200
    while not ((tmp_path / "r.jsonl").exists() and locked(cells[1].folder)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 130
    assert b"interrupted; go on with: dymoe sweep" in told
    assert not any(locked(cell.folder) for cell in cells)
    first = read_results(tmp_path / "r.jsonl")["rows"]
    assert [(row["label"], row["seed"]) for row in first] == [("dymoe", 0)]
    kept = (cells[0].folder / "results.json").stat().st_mtime_ns

    # A run that cannot be learned does not stop the others, and is told with its log's last line.
    cells[2].folder.mkdir(parents=True)
    (cells[2].folder / "thesis.tex").write_text("mine")
    capsys.readouterr()
    assert main([*words, "--jobs", "2"]) == 1
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if line.startswith("dymoe: ")]
    assert "dymoe, seed 1 failed: " in line
    assert "holds no run" in line
    assert str(cells[2].log) in line
    rows = read_results(tmp_path / "r.jsonl")["rows"]
    assert [(row["label"], row["seed"]) for row in rows] == [("dymoe", 0), ("lora", 0), ("lora", 1)]
    assert (cells[0].folder / "results.json").stat().st_mtime_ns == kept
    assert "| dymoe | 1 of 2 |" in (tmp_path / "t.md").read_text()

    shutil.rmtree(cells[2].folder)
    assert main(words) == 0
    found = {cell.key: json.loads((cell.folder / "results.json").read_text()) for cell in cells}
    whole = read_results(tmp_path / "r.jsonl")
    assert [tuple(row[key] for key in ("label", "order", "instructions", "seed")) for row in whole["rows"]] == list(
        found
    )
    for row, results in zip(whole["rows"], found.values(), strict=True):
        for key in ("matrix", "lenient_matrix", "metrics", "forgetting", "format_drift", "drift", "steps", "with"):
            assert row[key] == results[key]
    assert whole["about"]["command"].startswith("dymoe sweep ")
    assert whole["about"]["budget"]["training.steps_per_task"] == 3
    assert {"machine", "versions"} <= set(whole["about"])
    assert set(found[cells[0].key]["drift"]) == {"ImageNet", "VQAv2"}

    # The table against the run folders.
    by_label = {label: [found[cell.key] for cell in cells if cell.label == label] for label in ("dymoe", "lora")}
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (tmp_path / "t.md").read_text().splitlines()
        if line.startswith(("| method | seeds", "| dymoe | 2 |", "| lora | 2 |"))
    ]
    told = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}
    final, change = {}, {}
    for label, results in by_label.items():
        matrices = [one["matrix"] for one in results]
        final[label] = statistics.mean((matrix[1][0] + matrix[1][1]) / 2 for matrix in matrices)
        change[label] = statistics.mean((matrix[1][0] - matrix[0][0]) / 2 for matrix in matrices)
        intervals = metrics([Answers.of(one, label) for one in results])
        for name, value in (("MFN", final[label]), ("BWT", change[label])):
            assert told[label][name] == intervals[name].text(sign=name == "BWT")
            assert numbers(told[label][name])[0] == pytest.approx(value, abs=0.051)
    differences = compare(*([Answers.of(one, label) for one in by_label[label]] for label in ("lora", "dymoe")))
    for name, values in (("MFN", final), ("BWT", change)):
        cell = told["lora"][f"{name} against dymoe"]
        assert cell == f"{differences[name].text(sign=True)}, {differences[name].verdict}"
        assert numbers(cell)[0] == pytest.approx(values["lora"] - values["dymoe"], abs=0.051)
        assert told["dymoe"][f"{name} against dymoe"] == "–"
    located = [
        json.loads((cell.folder / "stages" / "02-VQAv2" / "method" / "report.json").read_text())["locator"]
        for cell in cells
        if cell.label == "lora"
    ]
    assert [row["locator"] for row in whole["rows"] if row["label"] == "lora"] == located
    right = statistics.mean(row["accuracy"] for row in located)
    assert numbers(told["lora"]["locator"])[0] == pytest.approx(right, abs=0.051)
    assert told["dymoe"]["locator"] == "–"
    weights = [
        json.loads((cell.folder / "stages" / "02-VQAv2" / "routing.json").read_text())["tasks"]["ImageNet"]["weight"][1]
        for cell in cells
        if cell.label == "dymoe"
    ]
    assert float(told["dymoe"]["drift"].split(" ")[0]) == pytest.approx(100 * statistics.mean(weights), abs=0.06)

    # The records are enough: without the run folders nothing is learned again.
    shutil.rmtree(tmp_path / "runs")
    before = (tmp_path / "t.md").read_text()
    assert main([*words, "--jobs", "2"]) == 0
    assert [file.name for file in (tmp_path / "runs").iterdir()] == [".sweep.lock"]
    assert read_results(tmp_path / "r.jsonl")["rows"] == whole["rows"]
    assert (tmp_path / "t.md").read_text().splitlines()[4:] == before.splitlines()[4:]


def test_a_run_whose_numbers_are_no_record_is_refused_before_it_is_written(tmp_path):
    """A record of the wrong form would make the file of all records unreadable."""
    (cell, *_) = plan(write_sweep(tmp_path)).cells
    cell.folder.mkdir(parents=True)
    made = data_fingerprint(
        *("pocket-coin", "origin", "original", ("ImageNet",), None, None, "test", 0), load_recipe(cell.file).data
    )
    described = {"recipe": load_recipe(cell.file, cell.words).resolved(), "data": {"fingerprint": made}}
    (cell.folder / "run.yaml").write_text(yaml.safe_dump(described))
    results = {**record_of(cell), "name": "run", "reports": [{}, {"locator": {"accuracy": 0.9, "by_task": {}}}]}
    (cell.folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(DymoeError, match=r"results.json: locator.tasks: is missing"):
        record(cell)
    results["reports"] = [{"locator": {"accuracy": 90.0, "tasks": {}}}, {"probe": {}}]
    (cell.folder / "results.json").write_text(json.dumps(results))
    assert "locator" not in record(cell), "the last stage says nothing of one"
